"""The ioctls of the pin ABI on a descriptor, one function each; and what their errnos mean to a person.

Owns the encoding of `daxfs.abi` on the holder's side. Answers are checked before they are believed: the other end is
whatever the descriptor leads to.
"""

from __future__ import annotations

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
_ANY = {
    errno.ENOTTY: "not on a daxfs mount, or on one of another version",
    errno.ENOSYS: "not on a daxfs mount, or on one of another version",
    errno.ENOTCONN: _GONE,
    errno.ECONNABORTED: _GONE,
}
_PIN = {
    errno.EINVAL: "offset and length must be whole blocks, the length more than 0, the flags ones that go together",
    errno.EACCES: "a write pin needs a descriptor that is open for writing",
    errno.EBADF: "a pin needs a descriptor that is open for reading or writing",
    errno.ENXIO: "the range reaches beyond the end of the file",
    errno.EFAULT: "the range has a hole: write it first, or take a write pin, which allocates",
    errno.EISDIR: "only regular files can be pinned",
    errno.ENOMEM: "the limit of pinned blocks of this holder is reached: unpin something first",
    errno.ENOSPC: "the volume is full: a write pin of a hole needs free blocks",
    errno.EOPNOTSUPP: "this mount refuses such pins (longterm=deny)",
    errno.EROFS: "the file system is mounted read-only: a write pin is not possible",
}
_UNPIN = {errno.ENOENT: "no such pin on this descriptor: it was released before"}
_EXTENTS = {errno.EINVAL: "only regular files have extents", errno.EISDIR: "only regular files have extents"}
_WORDS = {abi.IOC_PIN: _PIN, abi.IOC_UNPIN: _UNPIN, abi.IOC_PIN_RUNS: _UNPIN, abi.IOC_EXTENTS: _EXTENTS}


def words_for(code: int) -> str | None:
    """What an errno of any call on a daxfs mount means beyond its usual text."""
    return _ANY.get(code)


def _call(fd: int, number: int, buffer: bytearray) -> None:
    while True:
        try:
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
