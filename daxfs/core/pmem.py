"""The medium: an image file mapped as if it were persistent memory.

Loads and stores go straight to the mapping. A store is durable once its lines were flushed and a fence came after. The image
lives in the host's page cache, so a daemon that dies loses nothing that was stored; with `hostsync` every fence is an
msync, for those who need the host's power cut as well. The lock on the image lasts as long as the medium is open.

Not here: what the bytes mean (layout.py), and when to flush (whoever stores).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat

import numpy as np

from daxfs.errors import ImageError

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; in the module from Python 3.13 on


class Pmem:
    """An open image. `view` is all of it, `words` the same as aligned 8-byte words, `address` where it is mapped."""

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, hostsync: bool = False,
                 lock: bool = True) -> None:  # fmt: skip
        self.path = os.fspath(path)
        self.readonly = readonly
        self.hostsync = hostsync
        self._dirty: list[tuple[int, int]] = []
        self._fd = _open_image(self.path, readonly)
        try:
            if lock:
                _lock_image(self._fd, self.path, readonly)
            self.size = os.fstat(self._fd).st_size & ~7
            if self.size < mmap.PAGESIZE:
                hint = "name another file" if self.size else f"make one with: daxfs mkfs {self.path}"
                raise ImageError(f"{self.path} is {'too small' if self.size else 'empty, too small'} for an image; {hint}")
            # Read-only means a private copy: a journal can be replayed in it, and no store ever reaches the image.
            sharing = mmap.MAP_PRIVATE | _MAP_NORESERVE if readonly else mmap.MAP_SHARED
            self._map = mmap.mmap(self._fd, self.size, sharing, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._fd)
            raise
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)

    @property
    def file_id(self) -> tuple[int, int]:
        """Device and inode of the image file, which may have another name by now, or none."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    def load(self, at: int, n: int) -> bytes:
        return bytes(self.view[at : at + n])

    def store(self, at: int, data: bytes | bytearray | memoryview) -> None:
        self.view[at : at + len(data)] = data

    def fill_zero(self, at: int, n: int) -> None:
        self.bytes[at : at + n] = 0

    def copy(self, source: int, target: int, n: int) -> None:
        """Copy within the image; the ranges may overlap."""
        self.view[target : target + n] = self.view[source : source + n]

    def store_word(self, at: int, value: int) -> None:
        """One aligned 8-byte store, which is atomic."""
        self.words[at >> 3] = value

    def load_word(self, at: int) -> int:
        return self.words[at >> 3]

    def flush(self, at: int, n: int) -> None:
        if self.hostsync and not self.readonly:
            self._dirty.append((at, n))

    def fence(self) -> None:
        if self._dirty:
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
