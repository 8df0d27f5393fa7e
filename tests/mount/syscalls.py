"""System calls that Python's os module lacks, or hides behind defaults. Each raises OSError as os does."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
libc.copy_file_range.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_uint,
]
libc.copy_file_range.restype = ctypes.c_ssize_t
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
libc.syncfs.argtypes = [ctypes.c_int]

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2

MNT_DETACH = 2
STATX_BTIME = 0x800
FS_IOC_GETFLAGS = 0x80086601
FIFREEZE = 0xC0045877

Path = str | bytes | os.PathLike[str]


def _check(result: int, path: Path | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(libc.fallocate(fd, mode, offset, length))


def rename2(old: Path, new: Path, flags: int = 0) -> None:
    _check(libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags), new)


def utimens(path: Path, atime: tuple[int, int] | int, mtime: tuple[int, int] | int, *, follow: bool = True) -> None:
    """Set (seconds, nanoseconds) pairs, or UTIME_NOW / UTIME_OMIT."""
    words: list[int] = []
    for value in (atime, mtime):
        words += (0, value) if isinstance(value, int) else value
    times = struct.pack("qqqq", *words)
    _check(libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0 if follow else AT_SYMLINK_NOFOLLOW), path)


def utimens_now(path: Path) -> None:
    """utimensat with a null pointer: both times now."""
    _check(libc.utimensat(AT_FDCWD, os.fsencode(path), None, 0), path)


def btime_ns(path: Path) -> int | None:
    """Birth time, None if the file system does not tell."""
    out = ctypes.create_string_buffer(256)
    _check(libc.statx(AT_FDCWD, os.fsencode(path), AT_SYMLINK_NOFOLLOW, STATX_BTIME, out), path)
    if not struct.unpack_from("I", out.raw)[0] & STATX_BTIME:
        return None
    seconds, nanos = struct.unpack_from("qI", out.raw, 80)
    return int(seconds * 10**9 + nanos)


def link_fd(fd: int, path: Path) -> None:
    """Give the file behind a descriptor a name (O_TMPFILE)."""
    _check(libc.linkat(AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW), path)


def copy_range(source: int, source_at: int, target: int, target_at: int, length: int, flags: int = 0) -> int:
    ins, outs = ctypes.c_int64(source_at), ctypes.c_int64(target_at)
    return _check(libc.copy_file_range(source, ctypes.byref(ins), target, ctypes.byref(outs), length, flags))


def sync_file_range(fd: int, offset: int, length: int, flags: int = 7) -> None:
    _check(libc.sync_file_range(fd, offset, length, flags))


def syncfs(fd: int) -> None:
    _check(libc.syncfs(fd))


def mount_tmpfs(where: Path, size: str) -> None:
    _check(libc.mount(b"tmpfs", os.fsencode(where), b"tmpfs", 0, b"mode=0755,size=" + size.encode()), where)


def umount(where: Path, *, detach: bool = False) -> None:
    _check(libc.umount2(os.fsencode(where), MNT_DETACH if detach else 0), where)


def die_with_parent() -> None:
    """For a child between fork and exec: no test process outlives the test run."""
    _check(libc.prctl(1, 9, 0, 0, 0))  # PR_SET_PDEATHSIG, SIGKILL


def extents_flags(fd: int) -> int:
    buffer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    return int.from_bytes(buffer[:4], "little")
