"""The pin ABI: ioctl numbers, structures, flags. Client and daemon share this module and nothing else.

A pin belongs to an open file description: `ioctl(fd, IOC_PIN, buffer)` on a regular file of the mount. The last close of
that description releases it. Offsets and lengths of calls are bytes; runs are (start block, count) on the image.
Reports (IOC_REPORT) are asked of the root directory of the mount, or of any file or directory in it.

Numbers are made as `_IOC` of `<asm-generic/ioctl.h>` makes them, type byte 0xDA. Structures are little-endian, without
padding. Only the standard library is imported here: this module runs inside other people's processes.
"""

from __future__ import annotations

import os
import struct

ABI_VERSION = 1
IOC_TYPE = 0xDA
IOC_SIZE_MAX = (1 << 14) - 1  # the size field of an ioctl number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | IOC_TYPE << 8 | number


# Flags of PIN; the kernel's names and rules (include/linux/mm_types.h).
FOLL_WRITE = 1 << 0
FOLL_GET = 1 << 1
FOLL_LONGTERM = 1 << 8
FOLL_PIN = 1 << 19
# Two of our own. NOWAIT: EAGAIN instead of waiting behind a truncate of the range. ON_DEMAND: no pin but a registration that
# is told before its blocks go (IB_ACCESS_ON_DEMAND); neither FOLL_PIN nor FOLL_GET go with it.
PIN_NOWAIT = 1 << 30
PIN_ON_DEMAND = 1 << 31
PIN_FLAGS = FOLL_WRITE | FOLL_GET | FOLL_LONGTERM | FOLL_PIN | PIN_NOWAIT | PIN_ON_DEMAND

# Flags of open(2) for whoever will pin: with dax=never the file does without the page cache as long as such a descriptor is
# open, if it was closed before. O_NONBLOCK means nothing else to a regular file. Without dax=never it makes no difference.
# (For C: <fcntl.h> with _GNU_SOURCE has the two.)
O_PIN = os.O_DIRECT | os.O_NONBLOCK

# PIN: in: offset, length (bytes, block aligned), flags. out: id, how many runs, how many blocks. PIN_RUNS has the runs.
# Errors: EINVAL (misaligned, empty, flags), EACCES (the descriptor is not open for reading, or for a write pin not for
# writing), ENXIO (beyond the end of file), EFAULT (read pin of a hole), EIO (poisoned blocks), ENODEV (the device is being
# removed), EISDIR/EINVAL (not a regular file), ENOMEM (limit), ENOSPC (write pin of a hole, volume full), EBUSY (dax=never:
# the file is open through the page cache: open it with O_PIN when it is closed everywhere else).
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

# PAGES: what struct page would say of each block. key = pin id, first = index of the first block of it wanted; or key 0,
# first = first logical block of the file wanted, holes are left out. Records of PAGE_STATE; total: blocks of the pin, or 0.
# pins: FOLL_PIN holders of the block; references: those, FOLL_GET holders, and 1 for the file if it (still) has the block.
PAGE_STATE = struct.Struct("<QQII")  # index (in the pin, or logical block of the file), physical, pins, references
IOC_PAGES = _iowr(12, PAGE_BYTES)

# LEASE: a layout lease of the description. in: offset, length (bytes; length 0: the whole file), op. Errors: EINVAL, ENOMEM
# (limit).
LEASE = struct.Struct("<QQII")  # offset, length, op, zero
IOC_LEASE = _iowr(6, LEASE.size)
LEASE_TAKE, LEASE_RELEASE = 1, 2

# NEXT_EVENT: out: the oldest event of this description. Errors: EAGAIN (there is none; poll(2) says POLLPRI when there is).
EVENT = struct.Struct("<IIQQQ")  # type, lost (events dropped before this one), pin id (0: a lease), offset, length
IOC_NEXT_EVENT = _iowr(7, EVENT.size)
EVENT_INVALIDATE = 1  # on demand: stop using the range, then ACK
EVENT_LEASE_BREAK = 2  # somebody waits for the range: unpin, or release the lease
EVENT_REVOKED = 3  # the pin's access is gone; unpin it
EVENT_DEVICE_REMOVE = 4  # the device goes away: unpin everything (pin id 0)
EVENT_POISON = 5  # the medium failed under the range

# ACK: an on-demand registration has let go. in: pin id. Errors: ENOENT, EINVAL (nothing to acknowledge).
ACK = struct.Struct("<QQ")  # id, zero
IOC_ACK = _iowr(8, ACK.size)

# ADMIN: for root and for whoever mounted. in: op, flags, two arguments; a and b come back with an answer.
# Errors: EPERM, EINVAL, ENOENT, ENODEV (the device is removed).
ADMIN = struct.Struct("<IIQQ")  # op, flags, a, b
IOC_ADMIN = _iowr(9, ADMIN.size)
# RELEASE_PIN, a: pin id. Its holder gets EVENT_REVOKED; blocks that it may still have mapped stay with it till it closes.
# A survivor (of an earlier daemon) goes for good when its holder has ended, or with ADMIN_FORCE; else EBUSY. out: a: 1 if
# it went for good, b: blocks that it keeps.
ADMIN_RELEASE_PIN = 1
ADMIN_REAP_BUSY = 2  # release survivors whose holders have ended, free what is due; out: blocks freed, survivors released
# DEVICE_REMOVE, a: milliseconds to drain (ADMIN_FORCE: none, revoke at once). It goes on after the call; REPORT_DEVICE
# shows how far it is. Again: the earlier end counts. out: a: pins that are left.
ADMIN_DEVICE_REMOVE = 3
ADMIN_POISON = 4  # a: first block, b: count; out: a: files that have some of them, b: 1 if metadata is among them
ADMIN_CLEAR_POISON = 5  # likewise
ADMIN_FORCE = 1

# CHANGE: a layout change that does not wait. in: offset (TRUNCATE: the size), length, op, flags. Errors: as truncate(2) and
# fallocate(2), EAGAIN with CHANGE_NOWAIT where those would wait, and EOPNOTSUPP with dax=never.
CHANGE = struct.Struct("<QQII")  # offset, length, op, flags
IOC_CHANGE = _iowr(10, CHANGE.size)
CHANGE_TRUNCATE, CHANGE_PUNCH = 1, 2
CHANGE_NOWAIT = 1

# HCA: the simulated RDMA adapter; its calls are in abi_hca.py.
IOC_HCA = _iowr(11, PAGE_BYTES)

# LABEL: a name of the holder's own for one of its pins, for whoever looks at the list. in: pin id, UTF-8 up to the first
# NUL. Errors: ENOENT.
LABEL = struct.Struct("<Q56s")  # id, text
IOC_LABEL = _iowr(13, LABEL.size)

# Reports of the daemon, as JSON (UTF-8): `first` is a byte offset into the text, the records are bytes, `total` its length.
# Which report: `key`. A client reads until it has `total` bytes; offset 0 makes a new text for this description.
# Errors: ESTALE (too many are being read at once, the text was dropped: start again).
IOC_REPORT = _iowr(5, PAGE_BYTES)
REPORT_INFO, REPORT_PINS, REPORT_BUSY, REPORT_STATUS, REPORT_DEVICE = 1, 2, 3, 4, 5


def ioc_size(number: int) -> int:
    """Bytes that an ioctl of this number carries in and out."""
    return number >> 16 & IOC_SIZE_MAX
