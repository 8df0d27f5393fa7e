"""The pin ABI: ioctl numbers, structures, flags. Client and daemon share this module and nothing else.

A pin belongs to an open file description: `ioctl(fd, IOC_PIN, buffer)` on a regular file of the mount. The last close of
that description releases it. Offsets and lengths of calls are bytes; runs are (start block, count) on the image.
Reports (IOC_REPORT) are asked of the root directory of the mount, or of any file or directory in it.

Numbers are made as `_IOC` of `<asm-generic/ioctl.h>` makes them, type byte 0xDA. Structures are little-endian, without
padding. Only the standard library is imported here: this module runs inside other people's processes.
"""

from __future__ import annotations

import struct

ABI_VERSION = 1
IOC_TYPE = 0xDA
IOC_SIZE_MAX = (1 << 14) - 1  # the size field of an ioctl number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | IOC_TYPE << 8 | number


# Flags of PIN; the kernel's names and rules (include/linux/mm_types.h; D6.2).
FOLL_WRITE = 1 << 0
FOLL_GET = 1 << 2
FOLL_LONGTERM = 1 << 8
FOLL_PIN = 1 << 19
PIN_FLAGS = FOLL_WRITE | FOLL_GET | FOLL_LONGTERM | FOLL_PIN

# PIN: in: offset, length (bytes, block aligned), flags. out: id, how many runs, how many blocks. PIN_RUNS has the runs.
# Errors: EINVAL (misaligned, empty, flags), EACCES (write pin of a read-only descriptor), ENXIO (beyond the end of file),
# EFAULT (read pin of a hole), EISDIR/EINVAL (not a regular file), ENOMEM (limit), ENOSPC (write pin of a hole, volume full).
PIN = struct.Struct("<QQIIQQQ")  # offset, length, flags, zero, id, runs, blocks
IOC_PIN = _iowr(1, PIN.size)

# UNPIN: in: id, flags (UNPIN_DIRTY: the device wrote; the file system dirties the file). Errors: ENOENT (no such pin here).
UNPIN = struct.Struct("<QII")  # id, flags, zero
IOC_UNPIN = _iowr(2, UNPIN.size)
UNPIN_DIRTY = 1

# Paged answers: a header, then as many records as fit. `first` is the index of the first record wanted; the answer has how
# many are in it and how many there are in all.
PAGE = struct.Struct("<QQII")  # key (pin id, or 0), first, count, total
PAGE_BYTES = 8192

# PIN_RUNS: key = pin id; records of RUN.
# EXTENTS: key = first logical block wanted (`first` is not used, 0); records of EXTENT.
RUN = struct.Struct("<QQ")  # start block, count
IOC_PIN_RUNS = _iowr(3, PAGE_BYTES)
EXTENT = struct.Struct("<QQQII")  # logical, physical, count, unwritten, zero
IOC_EXTENTS = _iowr(4, PAGE_BYTES)

# Reports of the daemon, as JSON (UTF-8): `first` is a byte offset into the text, the records are bytes, `total` its length.
# Which report: `key`. A client reads until it has `total` bytes; offset 0 makes a new text for this description.
IOC_REPORT = _iowr(5, PAGE_BYTES)
REPORT_INFO, REPORT_PINS, REPORT_BUSY = 1, 2, 3


def ioc_size(number: int) -> int:
    """Bytes that an ioctl of this number carries in and out."""
    return number >> 16 & IOC_SIZE_MAX
