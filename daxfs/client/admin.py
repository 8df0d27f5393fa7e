"""What an admin may do to a mount: release pins, reap busy extents, remove the device, inject errors into the medium.

`path` is the mount point or anything on it. Root may, and whoever mounted. Errors are `PinError`: EPERM for others, ENODEV
when the device is removed, ENOTTY, ENOTCONN and what opening the path may give, as in `reports`.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

from daxfs import abi
from daxfs.client import calls
from daxfs.client.calls import PinError
from daxfs.client.reports import Path, ask, open_descriptor


def _act(path: Path, operation: int, a: int = 0, b: int = 0, *, force: bool = False) -> tuple[int, int]:
    try:
        buffer = bytearray(abi.ADMIN.pack(operation, abi.ADMIN_FORCE if force else 0, a, b))
    except struct.error:
        raise PinError(errno.EINVAL, "a number is not from 0 to 2^64 - 1", os.fsdecode(path)) from None
    fd = open_descriptor(path, os.O_RDONLY)
    try:
        calls.admin(fd, buffer)
    except PinError as problem:
        raise PinError(problem.errno, problem.strerror, os.fsdecode(path)) from None
    finally:
        os.close(fd)
    _, _, a, b = abi.ADMIN.unpack(buffer)
    return a, b


def release_pin(path: Path, pin_id: int, *, force: bool = False) -> int | None:
    """Take the access of a pin away; its holder hears (REVOKED). Blocks that it still keeps, or None if it is gone for good.

    Only a survivor of an earlier daemon can go for good: when its holder has ended, or with `force`, which gives blocks away
    that somebody may still have mapped. PinError: ENOENT (no such pin), EBUSY (a survivor whose holder is still there).
    """
    gone, kept = _act(path, abi.ADMIN_RELEASE_PIN, pin_id, force=force)
    return None if gone else kept


def reap_busy(path: Path) -> tuple[int, int]:
    """Free what is due, release survivors whose holders have ended: (blocks freed, survivors released)."""
    return _act(path, abi.ADMIN_REAP_BUSY)


def remove_device(path: Path, deadline_s: float, *, force: bool = False) -> int:
    """Begin to remove the device: no new pins, every holder hears (DEVICE_REMOVE), and has `deadline_s` to let go, or with
    `force` no time. How many pins there are. `device(path)` shows how far it is."""
    return _act(path, abi.ADMIN_DEVICE_REMOVE, round(deadline_s * 1000), force=force)[0]


def poison(path: Path, first: int, count: int) -> tuple[int, bool]:
    """Make blocks of the image fail: (how many files have some of them, whether metadata is among them)."""
    files, metadata = _act(path, abi.ADMIN_POISON, first, count)
    return files, bool(metadata)


def clear_poison(path: Path, first: int, count: int) -> int:
    """Make them sound again; their bytes are what they were. How many files had some of them."""
    return _act(path, abi.ADMIN_CLEAR_POISON, first, count)[0]


def status(path: Path) -> dict[str, Any]:
    """`info`, and: pins, holders (open files with pins), busy_extents, due, poisoned, retired (blocks), waiting (calls)."""
    answer: dict[str, Any] = ask(path, abi.REPORT_STATUS)
    return answer


def device(path: Path) -> dict[str, Any]:
    """state (live, removing, removed), left_s, mounts, dirty_shutdowns, last_shutdown (why), failed, holders, pins,
    poison (start, count, owner: file, busy, retired or metadata)."""
    answer: dict[str, Any] = ask(path, abi.REPORT_DEVICE)
    return answer
