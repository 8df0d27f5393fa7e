"""The medium: an image file mapped as if it were persistent memory.

Loads and stores go straight to the mapping. A store is durable once its lines were flushed and a fence came after. The image
lives in the host's page cache, so a daemon that dies loses nothing that was stored; with `hostsync` every fence is an
msync, for those who need the host's power cut as well. The lock on the image lasts as long as the medium is open.

Stores and flushes themselves are in memory.pyx, compiled. Not here: what the bytes mean (layout.py), and when to flush
(whoever stores).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from daxfs.core.memory import Memory
from daxfs.errors import ImageError, NoSpace

_PART_SHIFT = 20  # the host is asked for so much of the image at once
_UNKNOWN, _RESERVED, _POPULATED = range(3)  # what is known of a part
_MADV_POPULATE_WRITE = 23  # <linux/mman.h>
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; in the module from Python 3.13 on


class Pmem(Memory):
    """An open image. `view` is all of it, `words` the same as aligned 8-byte words, `address` where it is mapped."""

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, hostsync: bool = False,
                 lock: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.path = os.fspath(path)
        self.readonly = readonly
        self.hostsync = hostsync
        self._fd = _open_image(self.path, readonly)
        try:
            if lock:
                _lock_image(self._fd, self.path, readonly)
            status = os.fstat(self._fd)
            self.file_id = status.st_dev, status.st_ino  # the file may have another name by now, or none
            self.size = status.st_size & ~7
            if self.size < mmap.PAGESIZE:
                hint = "name another file" if self.size else f"make one with: daxfs mkfs {self.path}"
                raise ImageError(f"{self.path} is {'too small' if self.size else 'empty, too small'} for an image; {hint}")
            # Read-only means a private copy: a journal can be replayed in it, and no store ever reaches the image.
            sharing = mmap.MAP_PRIVATE | _MAP_NORESERVE if readonly else mmap.MAP_SHARED
            try:
                self._map = mmap.mmap(self._fd, self.size, sharing, mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, ValueError, OverflowError) as e:
                raise ImageError(f"{self.path}: its {self.size} bytes cannot be mapped: {e}") from None
        except BaseException:
            os.close(self._fd)
            raise
        self._parts = bytearray(-(-self.size >> _PART_SHIFT))
        self._attach(self._map)

    def _attach(self, memory: mmap.mmap) -> None:
        self.view = memoryview(memory)
        self.words = self.view.cast("Q")
        self.bytes = np.frombuffer(memory, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self._place(self.address, self.size)

    def reserve(self, at: int, n: int) -> None:
        """Make the host's disk give these bytes now if the image is sparse there: a store has no way to fail. NoSpace."""
        first, last = at >> _PART_SHIFT, (at + n - 1) >> _PART_SHIFT
        if first == last and self._parts[first]:
            return
        for part in range(first, last + 1):
            start, end = part << _PART_SHIFT, min((part + 1) << _PART_SHIFT, self.size)
            if self._parts[part] == _UNKNOWN:
                sparse = next(self.written(start, end), None) is None
                if self._reserve(start, end - start):
                    self._parts[part] = _RESERVED
                    if sparse:
                        self._populate(part, start, end)
                elif not self._reserve(max(start, at), min(end, at + n) - max(start, at)):
                    raise NoSpace(f"the disk that {self.path} is on is full")
            if self._parts[part] == _RESERVED and at <= start and end <= at + n:
                self._populate(part, start, end)

    def _reserve(self, at: int, n: int) -> bool:
        """Whether there is room for them. A host that cannot tell (EOPNOTSUPP) may have it."""
        return _libc.fallocate(self._fd, 0, at, n) == 0 or ctypes.get_errno() not in (errno.ENOSPC, errno.EDQUOT)

    def _populate(self, part: int, start: int, end: int) -> None:
        """Have the host map all pages of a part at once, which costs less than a fault for each. They are zeros of a hole,
        or about to be overwritten as a whole, so nothing is read for it. A kernel before 5.14 cannot: no harm."""
        _libc.madvise(self.address + start, end - start, _MADV_POPULATE_WRITE)
        self._parts[part] = _POPULATED

    def fileno(self) -> int:
        """The image's descriptor."""
        return self._fd

    def private(self) -> Pmem:
        """The same image once more, read-only: it can be read, and replayed, while it is open here."""
        return Pmem(self.path, readonly=True, lock=False)

    def load(self, at: int, n: int) -> bytes:
        return bytes(self.view[at : at + n])

    def gather(self, blocks: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.uint8]:
        """A copy of some blocks, as an array of shape (blocks, block_size)."""
        whole = self.size // block_size * block_size
        out: npt.NDArray[np.uint8] = self.bytes[:whole].reshape(-1, block_size)[blocks]
        return out

    def reading(self, starts: npt.NDArray[np.int64], count: int, block_size: int) -> memoryview:
        """The image, for compiled code that reads `count` blocks from each of these on: a medium may want to know."""
        return self.view

    def written(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges (first byte, end) of the image that its file has data for; the others are holes, and zeros."""
        while at < end:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more
                return
            hole = os.lseek(self._fd, at, os.SEEK_HOLE)
            if at < end:
                yield at, min(hole, end)
            at = hole

    def _sync_dirty(self) -> None:
        """The fence of `hostsync`."""
        first = min(at for at, _ in self._dirty) & -mmap.PAGESIZE
        last = max(at + n for at, n in self._dirty)
        if last - first > 1 << 24:
            for at, n in self._dirty:
                self._map.flush(at & -mmap.PAGESIZE, n + at % mmap.PAGESIZE)
        else:
            self._map.flush(first, last - first)
        self._dirty.clear()

    def sync(self) -> None:
        """Ask the host to write the whole image to its disk (what fsync and sync ask for)."""
        if not self.readonly:
            os.fdatasync(self._fd)

    def close(self) -> None:
        self._place(0, 0)
        self.words.release()
        self.view.release()
        del self.bytes
        with contextlib.suppress(BufferError):  # somebody still reads from the mapping: it goes when they do
            self._map.close()
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # a map that stays has the descriptor, and with it the lock
        os.close(self._fd)


def _open_image(path: str, readonly: bool) -> int:
    try:
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"no image {path}; make one with: daxfs mkfs {path}") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a directory, not an image; name a file") from None
    except OSError as e:
        raise ImageError(f"cannot open the image {path}: {e.strerror}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ImageError(f"{path} is {kind}, not an image; name a file")
    return fd


def _lock_image(fd: int, path: str, readonly: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImageError(f"{path} is in use: it is mounted or being changed; unmount it first") from None
