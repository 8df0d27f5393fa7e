# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The records of a directory block, compiled: the first lookup in a directory reads all of it, and so does fsck.

Blocks on media are hostile: a record that directory.py would not have written is Corrupt. `records` says what is in the
rest of a block whose header was believed.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr

from daxfs.core.records cimport DX_HAS_CRC, dx_crc, dx_crc_init, dx_entry_record, dx_has_crc

from daxfs.core import layout
from daxfs.errors import Corrupt

dx_crc_init()
dx_has_crc = DX_HAS_CRC()

cdef uint32_t GRANULE = layout.DIRENT_ALIGN
cdef uint32_t TYPES = sum(1 << dtype for dtype in (1, 2, 4, 6, 8, 10, 12))  # as directory.TYPES
assert layout.DIRENT.size == sizeof(dx_entry_record) == GRANULE


def records(const uint8_t[:] block, uint32_t at, uint64_t ino_end, str what):
    """All records from byte `at` of a block on: (offset, granules, ino (0: free), type, name). Corrupt, with `what` it is a
    block of, unless every byte that counts is right and the last record ends with the block."""
    cdef uint32_t end = block.shape[0], stop, following
    cdef const dx_entry_record *record
    cdef const char *name
    cdef list out = []
    cdef bint named = True
    while at < end:
        if end - at < sizeof(dx_entry_record):
            raise Corrupt(f"{what}: entry at {at} is cut off")
        record = <const dx_entry_record *>&block[at]
        stop = at + sizeof(dx_entry_record) + record.name_length
        following = at + record.length * GRANULE
        name = <const char *>(record + 1)
        if stop > end or dx_crc(dx_crc(0, record, 8), <const uint8_t *>record + 12, stop - at - 12) != record.crc:
            raise Corrupt(f"{what}: bad checksum of the entry at {at}")
        if following > end or following < stop:
            raise Corrupt(f"{what}: entry at {at} has length {record.length}")
        out.append((at, record.length, record.ino, record.type, PyBytes_FromStringAndSize(name, record.name_length)))
        if record.ino:
            if following - stop >= GRANULE or record.ino >= ino_end or record.type > 15 or not TYPES >> record.type & 1:
                raise Corrupt(f"{what}: entry at {at} is not valid")
            named = named and _is_name(name, record.name_length)
        elif record.name_length or record.type:
            raise Corrupt(f"{what}: free slot at {at} is not valid")
        at = following
    if not named:
        raise Corrupt(f"{what}: a name is not valid")
    return out


cdef bint _is_name(const char *name, size_t length) noexcept:
    if length == 0 or (name[0] == c'.' and (length == 1 or (length == 2 and name[1] == c'.'))):
        return False
    return memchr(name, c'/', length) == NULL and memchr(name, 0, length) == NULL
