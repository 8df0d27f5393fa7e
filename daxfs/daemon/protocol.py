"""The FUSE kernel protocol: numbers and records of <linux/fuse.h>, as far as raw requests and their replies carry them.

Requests are unpacked from `Request.body` with the `*_IN` structs (paddings are skipped), replies are packed with the
`*_OUT` structs or the functions below. Attributes, entries and listings are packed by requests.pyx. No state is here.
"""

from __future__ import annotations

import os
from struct import Struct

from daxfs.core.inode import Inode
from daxfs.daemon.requests import VALID_S

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE = (
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16
)  # fmt: skip
STATFS, RELEASE, FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH = 17, 18, 20, 21, 22, 23, 24, 25
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, ACCESS, CREATE, IOCTL, POLL = 27, 28, 29, 30, 34, 35, 39, 40
BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = 42, 43, 44, 45, 46, 47
TMPFILE, STATX, COPY_FILE_RANGE_64 = 51, 52, 53
NOTIFY_REPLY = 41

FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FATTR_ATIME, FATTR_MTIME, FATTR_ATIME_NOW, FATTR_MTIME_NOW = 1 << 4, 1 << 5, 1 << 7, 1 << 8
GETATTR_FH = 1 << 0
FATTR_FH, FATTR_CTIME, FATTR_KILL_SUIDGID = 1 << 6, 1 << 10, 1 << 11
FATTR_FLUSH = FATTR_MTIME | FATTR_CTIME | FATTR_FH  # what the kernel sends of its own accord when it writes back
POLL_SCHEDULE_NOTIFY = 1 << 0
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR, FOPEN_PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 1, 1 << 3, 1 << 6
OPEN_KILL_SUIDGID = 1 << 0
READ_LOCKOWNER = 1 << 1
WRITE_CACHE, WRITE_KILL_SUIDGID = 1 << 0, 1 << 2
SETXATTR_ACL_KILL_SGID = 1 << 0

RELEASE_IN = Struct("=Q16x")  # fh
GETATTR_IN = Struct("=I4xQ")  # getattr_flags, fh
SETATTR_IN = Struct("=I4xQQ8xqqqIIII4xII4x")  # valid, fh, size, atime, mtime, ctime (s), the same (ns), mode, uid, gid
OPEN_IN = Struct("=II")  # flags of open(2), open_flags
CREATE_IN = Struct("=IIII")  # flags of open(2), mode, umask, open_flags, then the name
READ_IN = Struct("=QQI20x")  # fh, offset, size; READDIR and READDIRPLUS, too
WRITE_IN = Struct("=QQII16x")  # fh, offset, size, write_flags, then the data
FORGET_IN = Struct("=Q")  # lookups
BATCH_FORGET_IN = Struct("=I4x")  # how many records of the next kind
FORGET_ONE = Struct("=QQ")  # nodeid, lookups
MKNOD_IN = Struct("=III4x")  # mode, rdev, umask, then the name
MKDIR_IN = Struct("=II")  # mode, umask, then the name
LINK_IN = Struct("=Q")  # nodeid of the file, then the name
RENAME_IN = Struct("=Q")  # nodeid of the new directory, then the old and the new name
RENAME2_IN = Struct("=QI4x")  # the same with the flags of renameat2(2)
GETXATTR_IN = Struct("=I4x")  # size, then the name (unless it is LISTXATTR)
SETXATTR_IN = Struct("=III4x")  # size, flags of setxattr(2), setxattr_flags, then the name and the value
FALLOCATE_IN = Struct("=QQQI4x")  # fh, offset, length, mode
LSEEK_IN = Struct("=QQI4x")  # fh, offset, whence
COPY_FILE_RANGE_IN = Struct("=QQQQQQQ")  # fh, offset, other nodeid, other fh, other offset, length, flags
IOCTL_IN = Struct("=QIIQII")  # fh, flags, number, argument, in_size, out_size, then in_size bytes

RETRIEVED_IN = Struct("=8xQI20x")  # offset, size, then the pages
POLL_IN = Struct("=QQII")  # fh, kh, flags, events

POLL_OUT = Struct("=I4x")  # revents
GETXATTR_OUT = Struct("=I4x")  # size
STATFS_OUT = Struct("=QQQQQIII28x")  # blocks, free, available, inodes, free inodes, block size, longest name, fragment size
OPEN_OUT = Struct("=QI4x")  # fh, FOPEN_*
WRITE_OUT = Struct("=I4x")  # size; of COPY_FILE_RANGE, too
COPY_64_OUT = Struct("=Q")  # size
LSEEK_OUT = Struct("=Q")  # offset
IOCTL_OUT = Struct("=iI8x")  # result, flags, then the out bytes
_STATX_OUT = Struct("=QII16xIIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")
SECTOR = 512
_NS = 1_000_000_000
NEGATIVE_ENTRY = Struct("=QQQ104x").pack(0, 0, VALID_S)
"""There is no such name, and the kernel may remember it."""
_READ_FLAGS_AT = 20  # in READ_IN
_STATX_ALL = 0xFFF  # STATX_BASIC_STATS | STATX_BTIME


def names_at(body: memoryview, at: int) -> list[bytes]:
    """The names that start at `at`, each with a NUL behind it."""
    return bytes(body[at:]).split(b"\0")[:-1]


def name_at(body: memoryview, at: int) -> bytes:
    """The name that starts at `at`, up to its NUL."""
    return bytes(body[at:]).split(b"\0", 1)[0]


def fills_pages(body: memoryview) -> bool:
    """Whether a READ is for a page of the kernel's (a mapping, a splice, the page cache), not for the buffer of a read(2):
    only that names the owner of locks."""
    return not body[_READ_FLAGS_AT] & READ_LOCKOWNER


def statx_out(inode: Inode, block_size: int) -> bytes:
    times = [part for ns in (inode.atime, inode.btime, inode.ctime, inode.mtime) for part in divmod(ns, _NS)]
    return _STATX_OUT.pack(
        VALID_S, 0, 0, _STATX_ALL, block_size, 0, inode.nlink, inode.uid, inode.gid, inode.mode, inode.ino, inode.size,
        inode.blocks * (block_size // SECTOR), 0, *times, os.major(inode.rdev), os.minor(inode.rdev), 0, 0,
    )  # fmt: skip
