"""The FUSE kernel protocol: numbers and records of <linux/fuse.h>, as far as raw requests and their replies carry them.

Requests are unpacked from `Request.body` with the `*_IN` structs (paddings are skipped), replies are packed with the
`*_OUT` structs or the functions below. No state is here, and one decision: how long
the kernel may believe an answer.
"""

from __future__ import annotations

import os
from struct import Struct

from daxfs.core.inode import Inode

LOOKUP, GETATTR, SETATTR, UNLINK, OPEN, READ, WRITE, RELEASE, SETXATTR = 1, 3, 4, 10, 14, 15, 16, 18, 21
OPENDIR, READDIR, RELEASEDIR, CREATE, IOCTL, POLL = 27, 28, 29, 35, 39, 40
FALLOCATE, READDIRPLUS, LSEEK, COPY_FILE_RANGE, TMPFILE, STATX, COPY_FILE_RANGE_64 = 43, 44, 46, 47, 51, 52, 53

FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FATTR_ATIME, FATTR_MTIME, FATTR_ATIME_NOW, FATTR_MTIME_NOW = 1 << 4, 1 << 5, 1 << 7, 1 << 8
FATTR_FH, FATTR_CTIME, FATTR_KILL_SUIDGID = 1 << 6, 1 << 10, 1 << 11
POLL_SCHEDULE_NOTIFY = 1 << 0
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 1, 1 << 6
OPEN_KILL_SUIDGID = 1 << 0
READ_LOCKOWNER = 1 << 1
WRITE_CACHE, WRITE_KILL_SUIDGID = 1 << 0, 1 << 2
SETXATTR_ACL_KILL_SGID = 1 << 0

RELEASE_IN = Struct("=Q16x")  # fh
SETATTR_IN = Struct("=I4xQQ8xqqqIIII4xII4x")  # valid, fh, size, atime, mtime, ctime (s), the same (ns), mode, uid, gid
OPEN_IN = Struct("=II")  # flags of open(2), open_flags
CREATE_IN = Struct("=IIII")  # flags of open(2), mode, umask, open_flags, then the name
READ_IN = Struct("=QQI20x")  # fh, offset, size; READDIR and READDIRPLUS, too
WRITE_IN = Struct("=QQII16x")  # fh, offset, size, write_flags, then the data
SETXATTR_IN = Struct("=III4x")  # size, flags of setxattr(2), setxattr_flags, then the name and the value
FALLOCATE_IN = Struct("=QQQI4x")  # fh, offset, length, mode
LSEEK_IN = Struct("=QQI4x")  # fh, offset, whence
COPY_FILE_RANGE_IN = Struct("=QQQQQQQ")  # fh, offset, other nodeid, other fh, other offset, length, flags
IOCTL_IN = Struct("=QIIQII")  # fh, flags, number, argument, in_size, out_size, then in_size bytes

POLL_IN = Struct("=QQII")  # fh, kh, flags, events

POLL_OUT = Struct("=I4x")  # revents
OPEN_OUT = Struct("=QI4x")  # fh, FOPEN_*
WRITE_OUT = Struct("=I4x")  # size; of COPY_FILE_RANGE, too
COPY_64_OUT = Struct("=Q")  # size
LSEEK_OUT = Struct("=Q")  # offset
IOCTL_OUT = Struct("=iI8x")  # result, flags, then the out bytes
_ATTR = "QQQqqqIIIIIIIIII"  # ino size sectors atime mtime ctime (s) the same (ns) mode nlink uid gid rdev blksize flags
_ATTR_OUT = Struct("=QI4x" + _ATTR)  # valid (s, ns)
_ENTRY_OUT = Struct("=QQQQII" + _ATTR)  # nodeid generation entry_valid attr_valid (s) the same (ns)
_STATX_OUT = Struct("=QII16xIIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")
_DIRENT = Struct("=QQII")  # ino, position of the next entry, length of the name, type, then the name

VALID_S = 86400  # the daemon is the one authority: an answer holds until the kernel, or the daemon, changes something
SECTOR = 512
_NS = 1_000_000_000
_NO_ENTRY = bytes(_ENTRY_OUT.size)
NEGATIVE_ENTRY = _ENTRY_OUT.pack(0, 0, VALID_S, 0, 0, 0, *bytes(16))
"""There is no such name, and the kernel may remember it."""
_READ_FLAGS_AT = 20  # in READ_IN
_STATX_ALL = 0xFFF  # STATX_BASIC_STATS | STATX_BTIME


def name_at(body: memoryview, at: int) -> bytes:
    """The name that starts at `at`, up to its NUL."""
    return bytes(body[at:]).split(b"\0", 1)[0]


def fills_pages(body: memoryview) -> bool:
    """Whether a READ is for a page of the kernel's (a mapping, a splice, the page cache), not for the buffer of a read(2):
    only that names the owner of locks."""
    return not body[_READ_FLAGS_AT] & READ_LOCKOWNER


def sectors(inode: Inode, block_size: int) -> int:
    """st_blocks."""
    return inode.blocks * (block_size // SECTOR)


def _attributes(inode: Inode, block_size: int) -> tuple[int, ...]:
    atime, atime_ns = divmod(inode.atime, _NS)
    mtime, mtime_ns = divmod(inode.mtime, _NS)
    ctime, ctime_ns = divmod(inode.ctime, _NS)
    return (
        inode.ino, inode.size, sectors(inode, block_size), atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, block_size, 0,
    )  # fmt: skip


def attr_out(inode: Inode, block_size: int) -> bytes:
    return _ATTR_OUT.pack(VALID_S, 0, *_attributes(inode, block_size))


def entry_out(inode: Inode, block_size: int) -> bytes:
    """What makes the kernel know an inode: whoever sends it counts a lookup."""
    return _ENTRY_OUT.pack(inode.ino, inode.generation, VALID_S, VALID_S, 0, 0, *_attributes(inode, block_size))


def statx_out(inode: Inode, block_size: int) -> bytes:
    times = [part for ns in (inode.atime, inode.btime, inode.ctime, inode.mtime) for part in divmod(ns, _NS)]
    return _STATX_OUT.pack(
        VALID_S, 0, 0, _STATX_ALL, block_size, 0, inode.nlink, inode.uid, inode.gid, inode.mode, inode.ino, inode.size,
        sectors(inode, block_size), 0, *times, os.major(inode.rdev), os.minor(inode.rdev), 0, 0,
    )  # fmt: skip


class Listing:
    """The answer to a READDIR or, with `plus`, a READDIRPLUS: records up to the size that the kernel asked for."""

    __slots__ = ("_head", "_parts", "_room")

    def __init__(self, size: int, *, plus: bool) -> None:
        self._room = size
        self._head = _DIRENT.size + (_ENTRY_OUT.size if plus else 0)
        self._parts: list[bytes] = []

    def has_room(self, name: bytes) -> bool:
        return (self._head + len(name) + 7) & ~7 <= self._room

    def add(self, name: bytes, ino: int, dtype: int, following: int, entry: bytes = b"") -> bool:
        """False if it does not fit. `following` is where the next listing starts. Without an `entry`, READDIRPLUS says
        nothing about the inode, and no lookup counts: `.` and `..` must have it so."""
        if not self.has_room(name):
            return False
        length = self._head + len(name)
        self._room -= (length + 7) & ~7
        if self._head > _DIRENT.size:
            self._parts.append(entry or _NO_ENTRY)
        self._parts += (_DIRENT.pack(ino, following, len(name), dtype), name, bytes(-length % 8))
        return True

    def data(self) -> bytes:
        return b"".join(self._parts)
