"""What a person sees through a mount: the daemon's memory while the kernel knows many files, and after it forgot them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daxfs import client
from tools.scale import volumes
from tools.scale.measure import Rows, memory

DAXFS = [sys.executable, "-m", "daxfs.cli"]
_SETTLE_S = 20.0


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[int]:
    """The daemon's pid while the image is mounted."""
    place.mkdir(exist_ok=True)
    log = place.with_suffix(".log")
    command = [*DAXFS, "mount", "--image", str(image), "--log", str(log), str(place)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    try:
        yield int(client.info(place)["pid"])
    finally:
        subprocess.run([*DAXFS, "umount", str(place)], check=True)


def known(rows: Rows, n: int, place: Path) -> None:
    """Files that were looked up, and are not open."""
    volumes.make(place / "image", n)
    with mounted(place / "image", place / "mnt") as pid:
        before, began = memory(pid), time.perf_counter()
        count = _walk(place / "mnt")
        assert count == n, f"{count} files, not {n}"
        rows.put("find -size, wall time per file", "µs", n, (time.perf_counter() - began) / n * 1e6)
        rows.put("memory of a file that the kernel knows", "B", n, (memory(pid) - before) / n)
        _forget()
        rows.put("... after it forgot them (drop_caches)", "B", n, _lowest(pid, before) / n, flat=False)


def _walk(root: Path) -> int:
    count = 0
    for _, _, files, at in os.fwalk(root):
        for name in files:
            os.stat(name, dir_fd=at, follow_symlinks=False)
        count += len(files)
    return count


def _forget() -> None:
    if os.getuid():
        raise PermissionError("making the kernel forget (drop_caches) is for root")
    for _ in range(3):  # what was used lately is spared the first time
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")


def _lowest(pid: int, before: int) -> int:
    """What is left once the daemon has worked on the FORGETs: its memory has not moved for a second."""
    last, still, end = memory(pid), 0, time.monotonic() + _SETTLE_S
    while still < 5 and time.monotonic() < end:
        time.sleep(0.2)
        now = memory(pid)
        still, last = (still + 1, last) if now == last else (0, now)
    return last - before
