"""The place of a mount: is it fit to mount on, what is mounted there, take it away.

The kernel's table (/proc/self/mountinfo) is read before any path is touched, since a mount whose daemon is dead answers
ENOTCONN, and one whose daemon hangs does not answer at all. A dead daxfs mount is cleared, nothing else ever is.
Unmounting is left to fusermount3, which works for root and for the user who mounted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from daxfs.errors import Busy, FsError, NoEntry, NotDirectory, NotEmpty, NotPermitted

FSTYPE = "fuse.daxfs"
_UNMOUNT_S_MAX = 60
_TRIES, _PAUSE_S = 4, 0.1


@dataclass(frozen=True)
class Mounted:
    id: str
    device: str  # major:minor
    place: str
    fstype: str
    source: str


def table(pid: int | str = "self") -> list[Mounted]:
    """What a process sees mounted, nothing if it is gone; of several mounts on one place the last one is on top."""
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        fields = line.split(b" ")
        dash = fields.index(b"-", 6)
        mounts.append(Mounted(*(_unescape(fields[n]) for n in (0, 2, 4, dash + 1, dash + 2))))
    return mounts


def top(place: str) -> Mounted | None:
    """What is mounted on a place, if anything is."""
    return next((m for m in reversed(table()) if m.place == place), None)


def prepare(path: str | os.PathLike[str], *, nonempty: bool = False) -> str:
    """The absolute path of a place that can be mounted on; a dead daxfs mount on it is cleared first. FsError."""
    place = os.path.realpath(path)
    while (mounted := top(place)) is not None and mounted.fstype == FSTYPE:
        if _alive(place):
            raise Busy(f"{place} has daxfs mounted already ({mounted.source}); unmount it first: daxfs umount {place}")
        unmount(place, lazy=True)
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        raise NoEntry(f"the mount point {place} does not exist; make it first: mkdir -p {place}") from None
    except NotADirectoryError:
        raise NotDirectory(f"the mount point {place} is not a directory; name one") from None
    except OSError as e:
        raise FsError(f"the mount point {place} cannot be used: {e.strerror}", e.errno) from None
    if names and not nonempty:
        raise NotEmpty(f"the mount point {place} is not empty; name an empty directory, or use -o nonempty")
    return place


def _alive(place: str) -> bool:
    try:
        os.statvfs(place)  # stat could be answered from the kernel's cache
    except OSError as e:
        return e.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def unmount(place: str, *, lazy: bool = False) -> None:
    """Take the mount away. Busy if it is in use; if lazy, it goes from the tree now and ends with its last user.

    A call that is just looking at the mount (df, find) makes it busy for a moment: a few tries are made.
    """
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Busy):
            return _unmount(place, lazy)
        time.sleep(_PAUSE_S)
    return _unmount(place, lazy)


def _unmount(place: str, lazy: bool) -> None:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", place]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_UNMOUNT_S_MAX, start_new_session=True,
            env={**os.environ, "LC_ALL": "C"}, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise NoEntry("fusermount3 is missing; install the package fuse3") from None
    except subprocess.TimeoutExpired:
        raise Busy(f"{place} could not be unmounted within {_UNMOUNT_S_MAX} s") from None
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
        if "busy" in why.lower():
            raise Busy(f"{place} is in use: close the files and pins that are open on it")
        raise NotPermitted(f"{place} cannot be unmounted: {why}")


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))
