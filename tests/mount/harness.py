"""A daxfs mount as people get it: mounted and unmounted through the real command line and daemon. (They are imported only
once, see warm.py; mkfs, fsck and info are called in this process. tests/cli has the commands as they are started by people.)

Owns one directory with an image, a mount point and the daemon's log. A daemon that does not answer any more is killed by
a watchdog, so that a test fails instead of hanging: the kernel answers ENOTCONN to whoever waits.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daxfs import client
from daxfs.cli import sizes
from daxfs.core.format import format_image
from daxfs.core.fsck import check
from tests.mount import warm

DAXFS = [sys.executable, "-m", "daxfs.cli"]
COMMAND_S = 60
WATCHDOG_S = 240
DAX = os.environ.get("DAXFS_TEST_DAX", "")  # -o dax= of mounts that do not say: the same tests with the page cache
HOTPATH = "DAXFS_TEST_HOTPATH"  # on or off: for all mounts of this run
REPOSITORY = Path(__file__).resolve().parents[2]


def daxfs(*arguments: str | Path, check: bool = True, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
    """Run a daxfs command. Its output goes to files: a daemon that inherits a pipe would keep it open."""
    command = [*DAXFS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY)
    return _checked(done, command[3:]) if check else done


def quickly(*arguments: str | Path, setup: str = "") -> subprocess.CompletedProcess[str]:
    """The same in a child of a process that has imported everything (see warm.py). It must succeed."""
    words = [*map(str, arguments)]
    return _checked(warm.warm().start(words, setup).wait(COMMAND_S), words)


def _checked(done: subprocess.CompletedProcess[str], words: list[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        raise AssertionError(f"daxfs {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


REAPED_S = 60.0
"""For a survivor to be found gone. As long as any process has a file of that number open on a detached mount of a dead
daemon it is a doubt, and other tests have such files for a while."""


def eventually(what: str, condition: Callable[[], Any], within_s: float = 3.0) -> Any:
    """Poll until the condition holds, return its value."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {within_s} s")
        time.sleep(0.005)
    return value


def mounts_below(*places: Path) -> list[str]:
    """Mount points in or with sources in these directories."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point, source = left.split(" ")[4], right.split(" ")[1]
        if any(p.startswith(f"{place}/") or p == str(place) for place in places for p in (point, source)):
            found.append(point)
    return found


class Mounted:
    def __init__(self, home: Path, *, size: str = "256M", block_size: str = "4K", options: str = "allow_other") -> None:
        self.home = home
        self.image = home / "image"
        self.path = home / "mnt"
        self.log = home / "log"
        self.options = options
        self.size = size
        self.pid = 0
        self.hung = False
        self._fresh = 0
        self.path.mkdir(parents=True)
        format_image(self.image, sizes.size(size), block_size=sizes.size(block_size), now=time.time_ns())

    # -- life -------------------------------------------------------------------------------------------------------

    def mount(self, options: str | None = None, *, setup: str = "") -> None:
        wanted = self.options if options is None else options
        if HOTPATH in os.environ and "hotpath=" not in wanted:
            wanted = ",".join(filter(None, (wanted, f"hotpath={os.environ[HOTPATH]}")))
        if DAX and "dax=" not in wanted:
            wanted = ",".join(filter(None, (wanted, f"dax={DAX}")))
        more = ["-o", wanted] if wanted else []
        quickly("mount", "--image", self.image, "--log", self.log, *more, self.path, setup=setup)
        info = self.info()
        self.pid = int(info["pid"])
        self.free_at_mount = int(info["free"])

    def umount(self) -> None:
        """Unmount; the daemon must be gone when the command returns."""
        end = time.monotonic() + 10
        while True:
            try:
                quickly("umount", self.path)
                break
            except AssertionError as e:  # the `io` stressor of the other test process opens every mount that it finds
                user = any(f"is in use by {who}" in str(e) for who in ("stress-ng", "a process that cannot be seen"))
                if not user or time.monotonic() > end:
                    raise
                time.sleep(0.02)
        assert not alive(self.pid), f"daemon {self.pid} still runs after `daxfs umount`"
        self.pid = 0

    def remount(self, *more: str) -> None:
        """Unmount and mount again, with these options besides its own."""
        self.umount()
        self.mount(",".join((self.options, *more)))

    def kill(self, shoot: Callable[[], object] | None = None) -> None:
        """SIGKILL to the daemon (or what `shoot` does). The dead mount stays: the next `mount` has to clear it."""
        daemon = os.pidfd_open(self.pid)
        waiter = select.poll()
        waiter.register(daemon, select.POLLIN)
        if shoot:
            shoot()
        else:
            os.kill(self.pid, signal.SIGKILL)
        gone = waiter.poll(10_000)  # all its threads, and with them the lock on the image
        os.close(daemon)
        assert gone, f"daemon {self.pid} is killed but does not end"
        self.pid = 0

    def fsck(self) -> None:
        report = check(self.image)
        assert not report.errors, "fsck: " + "\n".join(str(finding) for finding in report.findings)

    def finish(self) -> None:
        """End of a test: unmount, check the image and the log, leave nothing."""
        try:
            if self.pid:
                self.umount()
            self.fsck()
            self.check_log()
        finally:
            self.remove()

    def remove(self) -> None:
        """Take everything away, whatever state it is in."""
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        for point in mounts_below(self.home):
            subprocess.run(["umount", "--lazy", point], check=False)
        shutil.rmtree(self.home)

    # -- looking ----------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        return client.info(self.path)

    def check_log(self) -> None:
        text = self.log_text()
        assert not self.hung, f"the daemon did not answer within {WATCHDOG_S} s and was killed; its log:\n{text}"
        for trouble in ("Traceback", "ERROR", "CRITICAL", "Exception ignored"):
            assert trouble not in text, f"the daemon's log:\n{text}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def fresh_directory(self, parent: Path | None = None) -> Path:
        """An empty directory of a mount that several tests share."""
        self._fresh += 1
        path = (parent or self.path) / f"case-{self._fresh}"
        path.mkdir()
        return path

    def watchdog(self, seconds: float = WATCHDOG_S) -> threading.Timer:
        timer = threading.Timer(seconds, self._give_up)
        timer.daemon = True
        timer.start()
        return timer

    def _give_up(self) -> None:
        self.hung = True
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGABRT)  # faulthandler writes where it hangs
            time.sleep(1)
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent (a zombie) does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
