"""Runs of the image as one contiguous piece of memory.

An anonymous reservation is made first, as a Python `mmap` object: it owns the addresses, and it refuses to give them up
while a memoryview of it lives. Each run is then mapped over its part of the reservation with MAP_FIXED, which Python's
`mmap` cannot do, so libc is asked. When the window is closed the pieces are replaced by anonymous memory first: a slice
that somebody still holds goes dead, it does not reach the image any more and it does not crash.

What is not there: copying. A load or a store in the window is one in the image.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from types import TracebackType

from daxfs.client.calls import PinError, Run

_MAP_FIXED = 0x10  # <asm-generic/mman-common.h>; Python has no name for it
_MAP_NORESERVE = 0x4000
_FAILED = ctypes.c_void_p(-1).value
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


def _map_over(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> None:
    """Replace what is mapped at `address` (bytes everywhere)."""
    if _libc.mmap(address, length, protection, flags | _MAP_FIXED, fd, offset) == _FAILED:
        code = ctypes.get_errno()
        why = os.strerror(code)
        if code == errno.ENOMEM:
            why = "too many separate pieces for one process: pin a shorter range, or raise vm.max_map_count"
        raise PinError(code, f"cannot map the blocks: {why}")


class Window:
    """Runs of an image file, mapped in order as one range of `length` bytes at `address`. A context manager."""

    def __init__(self, image_fd: int, runs: Sequence[Run], block_size: int, *, writable: bool) -> None:
        """Map the runs; `image_fd` may be closed afterwards. PinError if the image is too short or mmap refuses."""
        self.length = sum(count for _, count in runs) * block_size
        self.writable = writable
        if not self.length:
            raise PinError(errno.EINVAL, "there is nothing to map: no runs")
        if max(start + count for start, count in runs) * block_size > os.fstat(image_fd).st_size:
            raise PinError(errno.ENXIO, "the image file is shorter than the volume: it is not the mounted one")
        self._memory = mmap.mmap(-1, self.length, _ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.view = memoryview(self._memory) if writable else memoryview(self._memory).toreadonly()
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        at = self.address
        try:
            for start, count in runs:
                size = count * block_size
                _map_over(at, size, protection, mmap.MAP_SHARED, image_fd, start * block_size)
                at += size
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return self.address == 0

    def close(self) -> None:
        """Unmap. Slices of `view` that are still held read zeros from now on and write nowhere. Again: no effect."""
        if self.closed:
            return
        _map_over(self.address, self.length, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
        self.address = 0
        self.view.release()
        with contextlib.suppress(BufferError):  # a slice lives: the addresses stay reserved until it is gone
            self._memory.close()

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
