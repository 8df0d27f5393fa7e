"""The ioctls of the pin ABI on a descriptor, one function each; and what their errnos mean to a person.

Owns the encoding of `daxfs.abi` on the holder's side. Answers are checked before they are believed: the other end is
whatever the descriptor leads to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
from typing import Any, NoReturn

from daxfs import abi

Run = tuple[int, int]


class PinError(OSError):
    """A call that the mount refused or that cannot be made; `errno` says which, `strerror` is one line for people."""


_GONE = "the daxfs daemon of this mount is gone: mount it again (daxfs mount clears the dead mount)"
_REMOVED = "the device is removed"
_ANY = {
    errno.ENODEV: _REMOVED,
    errno.ENOTTY: "not on a daxfs mount, or on one of another version",
    errno.ENOSYS: "not on a daxfs mount, or on one of another version",
    errno.ENOTCONN: _GONE,
    errno.ECONNABORTED: _GONE,
}
_PIN = {
    errno.EINVAL: "offset and length must be whole blocks, the length more than 0, the flags ones that go together",
    errno.EACCES: "a write pin needs a descriptor that is open for writing, and any pin one that is open for reading",
    errno.EBADF: "a pin needs a descriptor that is open for reading or writing",
    errno.ENXIO: "the range reaches beyond the end of the file",
    errno.EFAULT: "the range has a hole: write it first, or take a write pin, which allocates",
    errno.EISDIR: "only regular files can be pinned",
    errno.ENOMEM: "the limit of pinned blocks of this holder is reached: unpin something first",
    errno.ENOSPC: "the volume is full: a write pin of a hole needs free blocks",
    errno.EOPNOTSUPP: "this mount refuses such pins (longterm=deny)",
    errno.EROFS: "the file system is mounted read-only: a write pin is not possible",
    errno.EAGAIN: "a layout change waits for this range: a new pin waits behind it",
    errno.EPERM: "a long-term pin needs a layout lease on its range first (longterm=lease)",
    errno.ENODEV: "the device is being removed, or gone: no new pins",
    errno.EBUSY: "the file is open through the page cache (dax=never): open it with O_DIRECT, and close it everywhere else",
    errno.EIO: "the range has poisoned blocks: write them anew, or punch them out (see daxfs device status)",
}
_UNPIN = {errno.ENOENT: "no such pin on this descriptor: it was released before"}
_EXTENTS = {errno.EINVAL: "only regular files have extents", errno.EISDIR: "only regular files have extents"}
_LEASE = {
    errno.EINVAL: "offset and length of a lease must be whole blocks of a regular file",
    errno.ENOENT: "no lease on this descriptor: it was released or broken before",
}
_ACK = {errno.ENOENT: _UNPIN[errno.ENOENT], errno.EINVAL: "nothing to acknowledge: it was not told to let go"}
_CHANGE = {
    errno.EAGAIN: "the range is pinned",
    errno.EBADF: "the descriptor is not open for writing",
    errno.ETXTBSY: "the range is pinned, and the policy is to fail, or the holders did not let go in time",
    errno.EDEADLK: "the pins in the way are this descriptor's own: unpin first",
    errno.EOPNOTSUPP: "with dax=never the kernel owns size and pages: use truncate(2) and fallocate(2)",
    errno.EBUSY: "the range was still pinned after the time limit of the mount (wait_s)",
}
_ADMIN = {
    errno.EPERM: "only root and the user who mounted may do this",
    errno.ENOENT: "no such pin",
    errno.EBUSY: "the holder outlived an earlier daemon and is still there: end it, or use force",
    errno.EINVAL: "the blocks are not in the image",
    errno.ENODEV: _REMOVED,
}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_LABEL_MAX = abi.LABEL.size - 8
_REPORT = {errno.ESTALE: "the report was dropped, as too many are being read at once: ask again"}
_WORDS = {
    abi.IOC_REPORT: _REPORT,
    abi.IOC_LABEL: _UNPIN,
    abi.IOC_ADMIN: _ADMIN,
    abi.IOC_PIN: _PIN,
    abi.IOC_UNPIN: _UNPIN,
    abi.IOC_PIN_RUNS: _UNPIN,
    abi.IOC_PAGES: _UNPIN,
    abi.IOC_EXTENTS: _EXTENTS,
    abi.IOC_LEASE: _LEASE,
    abi.IOC_ACK: _ACK,
    abi.IOC_CHANGE: _CHANGE,
}


def words_for(code: int) -> str | None:
    """What an errno of any call on a daxfs mount means beyond its usual text."""
    return _ANY.get(code)


def ioctl_page(fd: int, number: int, buffer: bytearray) -> None:
    """An ioctl that carries a page. OSError. For such large ones fcntl.ioctl would keep the interpreter's lock, and these
    may take their time: other threads shall go on."""
    memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _libc.ioctl(fd, number, ctypes.addressof(memory)) < 0:
        raise OSError(ctypes.get_errno(), "")


def _call(fd: int, number: int, buffer: bytearray) -> None:
    while True:
        try:
            if len(buffer) == abi.PAGE_BYTES:
                ioctl_page(fd, number, buffer)
            else:
                fcntl.ioctl(fd, number, buffer, True)
            return
        except InterruptedError:
            continue  # a handler has run and did not raise; the daemon did nothing
        except OSError as problem:
            code = problem.errno or errno.EIO
            text = _WORDS.get(number, {}).get(code) or words_for(code) or os.strerror(code)
            raise PinError(code, text) from None


def _broken(what: str) -> NoReturn:
    raise PinError(errno.EPROTO, f"the answer to {what} makes no sense: is this daemon of another version?")


def access_mode(fd: int) -> int:
    """How a descriptor was opened: os.O_RDONLY, O_WRONLY or O_RDWR."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def pin(fd: int, offset: int, length: int, flags: int) -> tuple[int, int, int]:
    """Pin `length` bytes at `offset`; returns the pin's id, how many runs it has and how many blocks."""
    try:
        buffer = bytearray(abi.PIN.pack(offset, length, flags, 0, 0, 0, 0))
    except struct.error:
        raise PinError(errno.EINVAL, "offset and length must be from 0 to 2^64 - 1") from None
    _call(fd, abi.IOC_PIN, buffer)
    *_, pin_id, runs, blocks = abi.PIN.unpack(buffer)
    return pin_id, runs, blocks


def unpin(fd: int, pin_id: int, *, dirty: bool) -> None:
    """Release a pin of this open file description. `dirty`: the device wrote, so the file counts as modified."""
    buffer = bytearray(abi.UNPIN.pack(pin_id, abi.UNPIN_DIRTY if dirty else 0, 0))
    _call(fd, abi.IOC_UNPIN, buffer)


def _page(fd: int, number: int, key: int, first: int, record_size: int, what: str) -> tuple[bytes, int, int]:
    """One page of an answer: its records' bytes, how many they are, how many there are in all."""
    buffer = bytearray(abi.PAGE_BYTES)
    abi.PAGE.pack_into(buffer, 0, key, first, 0, 0)
    _call(fd, number, buffer)
    _, _, count, total = abi.PAGE.unpack_from(buffer)
    end = abi.PAGE.size + count * record_size
    if end > abi.PAGE_BYTES:
        _broken(what)
    return bytes(buffer[abi.PAGE.size : end]), count, total


def pin_runs(fd: int, pin_id: int) -> tuple[Run, ...]:
    """The blocks of a pin in file order: (start block on the image, count)."""
    runs: list[Run] = []
    while True:
        records, count, total = _page(fd, abi.IOC_PIN_RUNS, pin_id, len(runs), abi.RUN.size, "PIN_RUNS")
        runs += abi.RUN.iter_unpack(records)
        if len(runs) >= total:
            return tuple(runs)
        if not count:
            _broken("PIN_RUNS")


def extents(fd: int) -> list[tuple[int, int, int, bool]]:
    """The extent map of a file in blocks: (logical, physical, count, unwritten), in file order."""
    found: list[tuple[int, int, int, bool]] = []
    key = 0
    while True:
        records, count, _ = _page(fd, abi.IOC_EXTENTS, key, 0, abi.EXTENT.size, "EXTENTS")
        if not count:
            return found
        for logical, physical, length, unwritten, _ in abi.EXTENT.iter_unpack(records):
            if not length:
                _broken("EXTENTS")
            found.append((logical, physical, length, bool(unwritten)))
        key = found[-1][0] + found[-1][2]


def page_states(fd: int, key: int, first: int) -> list[tuple[int, int, int, int]]:
    """What the daemon counts for blocks of a pin (key: its id) or of the file (key 0), from index `first` on, as many as one
    answer has: (index, block on the image, pins, references)."""
    records, _, _ = _page(fd, abi.IOC_PAGES, key, first, abi.PAGE_STATE.size, "PAGES")
    return list(abi.PAGE_STATE.iter_unpack(records))


def lease(fd: int, offset: int, length: int, operation: int) -> None:
    """Take or release (abi.LEASE_*) a layout lease; length 0: the whole file."""
    try:
        buffer = bytearray(abi.LEASE.pack(offset, length, operation, 0))
    except struct.error:
        raise PinError(errno.EINVAL, _LEASE[errno.EINVAL]) from None
    _call(fd, abi.IOC_LEASE, buffer)


def next_event(fd: int) -> tuple[int, int, int, int, int] | None:
    """The oldest event of this description: (type, how many were lost before it, pin id, offset, length)."""
    buffer = bytearray(abi.EVENT.size)
    try:
        _call(fd, abi.IOC_NEXT_EVENT, buffer)
    except PinError as problem:
        if problem.errno == errno.EAGAIN:
            return None
        raise
    kind, lost, pin_id, offset, length = abi.EVENT.unpack(buffer)
    return kind, lost, pin_id, offset, length


def acknowledge(fd: int, pin_id: int) -> None:
    """An on-demand registration has let go of its range."""
    _call(fd, abi.IOC_ACK, bytearray(abi.ACK.pack(pin_id, 0)))


def change(fd: int, offset: int, length: int, operation: int, *, wait: bool) -> None:
    """Truncate or punch (abi.CHANGE_*); without `wait`: EAGAIN where it would wait."""
    try:
        buffer = bytearray(abi.CHANGE.pack(offset, length, operation, 0 if wait else abi.CHANGE_NOWAIT))
    except struct.error:
        raise PinError(errno.EINVAL, "offset and length must be from 0 to 2^64 - 1") from None
    _call(fd, abi.IOC_CHANGE, buffer)


def label(fd: int, pin_id: int, text: str) -> None:
    """Name a pin, for the list of pins; as much of the text as fits into 56 bytes of UTF-8."""
    name = text.encode("utf-8", "replace").partition(b"\0")[0][:_LABEL_MAX].decode("utf-8", "ignore").encode()
    _call(fd, abi.IOC_LABEL, bytearray(abi.LABEL.pack(pin_id, name)))


def admin(fd: int, buffer: bytearray) -> None:
    """An admin call (abi.ADMIN); the answer is in the buffer."""
    _call(fd, abi.IOC_ADMIN, buffer)


def report(fd: int, which: int) -> Any:
    """A report of the daemon (`abi.REPORT_*`), decoded from its JSON text."""
    text = b""
    while True:
        records, count, total = _page(fd, abi.IOC_REPORT, which, len(text), 1, "REPORT")
        text += records
        if len(text) >= total:
            break
        if not count:
            _broken("REPORT")
    try:
        return json.loads(text)
    except ValueError:
        _broken("REPORT")
