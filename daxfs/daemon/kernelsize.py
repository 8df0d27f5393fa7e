"""How long the kernel has a file. With a write-back cache it says so in no request before it has written back.

So the file is looked at on the mount, by its handle (open_by_handle_at(2), which needs no name and takes no lock of the
file). What the kernel has to ask for that, the daemon answers: it is for a thread. It needs CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import os
import struct

_HANDLE = struct.Struct("=IiIII")  # struct file_handle: bytes, type, then the inode's number (high, low) and generation
_INO64_GEN = 0x81
_libc = ctypes.CDLL(None, use_errno=True)


def of(mountpoint: str, ino: int, generation: int) -> int:
    """The size in bytes.

    Raises:
        OSError: the kernel has forgotten the file, or the daemon may not do this.
    """
    place = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        handle = _HANDLE.pack(12, _INO64_GEN, ino >> 32, ino & 0xFFFFFFFF, generation)
        fd = _libc.open_by_handle_at(place, handle, os.O_PATH | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
    finally:
        os.close(place)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
