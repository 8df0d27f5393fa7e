"""The daemon's reports about a mount: what `daxfs info`, `daxfs pins` and `daxfs busy` show.

`path` is the mount point or any file or directory of the mount; only permission to open it is needed.
Errors are `PinError`: ENOTTY (not a daxfs mount), ENOTCONN (its daemon is gone), and what opening the path may give.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Any

from daxfs import abi
from daxfs.client import calls
from daxfs.client.calls import PinError

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def open_descriptor(path: Path, flags: int, *, to_pin: bool = False) -> int:
    """Open a file or directory (never a fifo or a device: opening those has effects). PinError with the path in it.
    `to_pin`: past the page cache, if the mount has one (dax=never)."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise PinError(errno.EINVAL, "neither a regular file nor a directory", os.fsdecode(path))
        if to_pin and stat.S_ISREG(mode):
            with suppress(OSError):  # not here: without it the error is the right one
                return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
        return os.open(path, flags | os.O_CLOEXEC)
    except PinError:
        raise
    except OSError as problem:
        code = problem.errno or errno.EIO
        text = calls.words_for(code) or os.strerror(code)
        raise PinError(code, text, os.fsdecode(path)) from None


def ask(path: Path, which: int) -> Any:
    """A report of the daemon (abi.REPORT_*)."""
    fd = open_descriptor(path, os.O_RDONLY)
    try:
        return calls.report(fd, which)
    except PinError as problem:
        raise PinError(problem.errno, problem.strerror, os.fsdecode(path)) from None
    finally:
        os.close(fd)


def info(path: Path) -> dict[str, Any]:
    """The volume: uuid, image (path), block_size (bytes), blocks, free, used, busy, pinned (blocks), policy, pid."""
    answer: dict[str, Any] = ask(path, abi.REPORT_INFO)
    return answer


def pins(path: Path) -> list[dict[str, Any]]:
    """The pins of the mount, the oldest 10,000: id, pid, comm, holders (all processes that have the
    description), ino, path, offset, length (bytes), mode, flags, state, label, age_s, blocks, withheld (bytes that only pins
    keep), runs (256 at most)."""
    answer: list[dict[str, Any]] = ask(path, abi.REPORT_PINS)
    return answer


def busy(path: Path) -> list[dict[str, Any]]:
    """Busy extents, the first 10,000: start, count (blocks), bytes, pins (ids of those that keep it), holders, and ino,
    path, mode, age_s of the oldest pin."""
    answer: list[dict[str, Any]] = ask(path, abi.REPORT_BUSY)
    return answer
