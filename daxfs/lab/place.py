"""Where scenarios run: a mount of its own on a temporary image, or somebody's mount.

A temporary one is mounted by the real command line with a small volume (`SIZE`, so that taking all its space is quick) and
short time limits (`OPTIONS`); at its end it is unmounted and its image is checked. On somebody's mount the scenarios work in
one new directory, and a policy that is not the mount's is set file by file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import daxfs
from daxfs import client
from daxfs.core.format import format_image
from daxfs.core.fsck import check
from daxfs.daemon.mountpoint import unmount
from daxfs.errors import FsError
from daxfs.lab.processes import Unseen, alive, eventually

SIZE = 24 << 20
OPTIONS: Mapping[str, str] = {"lease_break_s": "3", "invalidate_s": "0.4"}
CLOSE_S = 30
_COMMAND_S = 60
_TROUBLE = ("Traceback", "ERROR", "CRITICAL", "Exception ignored")


@dataclass
class Place:
    """A mounted volume. `policy` is the mount's own; `own` says that it is a temporary one."""

    path: str
    policy: str
    own: bool
    settings: dict[str, str] = field(default_factory=dict)
    image: str = ""
    log: str = ""
    daemon: int = 0

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a daxfs command."""
        return run_daxfs(*arguments)


def run_daxfs(*arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(daxfs.__file__).resolve().parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "daxfs.cli", *arguments], capture_output=True, text=True, timeout=_COMMAND_S, check=False,
        env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def temporary(policy: str, settings: Mapping[str, str] | None = None, *, size: int = SIZE) -> Iterator[Place]:
    """A fresh volume under a policy; `settings` are options of the mount besides OPTIONS. Unseen if it ends badly."""
    home = Path(tempfile.mkdtemp(prefix="daxfs-lab-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    place = Place(str(home / "mnt"), policy, True, {**OPTIONS, **(settings or {})}, str(home / "image"), str(home / "log"))
    os.mkdir(place.path)
    try:
        make_image(place.image, size)
        mount(place)
        yield place
        _finish(place)
    finally:
        _remove(place)


def make_image(path: str, size: int) -> None:
    format_image(path, size, now=time.time_ns(), uid=os.getuid(), gid=os.getgid())


def mount(place: Place) -> None:
    """Mount (again). FsError with what the command said: then nothing can be run."""
    options = ",".join(f"{name}={value}" if value else name for name, value in place.settings.items())
    policy = ["--policy", place.policy]
    words = ["mount", "--image", place.image, "--log", place.log, *policy, "-o", options, place.path]
    done = run_daxfs(*words)
    if done.returncode:
        raise FsError(f"daxfs {' '.join(words)}: {done.stderr.strip()[-500:]}")
    place.daemon = int(client.info(place.path)["pid"])


def _finish(place: Place) -> None:
    if place.daemon:
        try:
            unmount(place.path)
        except FsError as problem:
            raise Unseen(f"the mount could not be unmounted: {problem.why}") from None
        eventually("the daemon closes the image", lambda: not alive(place.daemon), CLOSE_S)
    if place.policy == "unsafe":
        return  # a holder may have destroyed anything: that is the point
    report = check(place.image)
    if report.errors:
        raise Unseen("fsck of the image: " + "; ".join(str(finding) for finding in report.findings[:3]))
    lines = Path(place.log).read_text(errors="replace").splitlines()
    trouble = [line for line in lines if any(word in line for word in _TROUBLE)]
    if trouble:
        bug = next((line for line in lines if line.partition(":")[0].endswith("Error")), "")
        raise Unseen(f"the daemon's log has {len(trouble)} lines of trouble: {trouble[0]} {bug}".strip())


def _remove(place: Place) -> None:
    if place.daemon and alive(place.daemon):
        with contextlib.suppress(Unseen):
            eventually("the daemon ends", lambda: not alive(place.daemon) or not _is_mounted(place.path), 1.0)
    if place.daemon and alive(place.daemon):
        os.kill(place.daemon, signal.SIGKILL)
    while _is_mounted(place.path):
        subprocess.run(["fusermount3", "-u", "-z", place.path], check=False, capture_output=True)
    shutil.rmtree(os.path.dirname(place.path), ignore_errors=True)


def _is_mounted(path: str) -> bool:
    return any(line.split(" ")[4] == path for line in Path("/proc/self/mountinfo").read_text().splitlines())


def existing(path: str) -> Place:
    """Somebody's mount. PinError if it is none of daxfs."""
    info: dict[str, Any] = client.info(path)
    settings = {name: str(value) for name, value in info.get("settings", {}).items()}
    return Place(str(path), str(info["policy"]), False, settings, str(info["image"]), "", int(info["pid"]))
