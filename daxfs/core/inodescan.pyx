# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The inode table, read as a mount after a crash reads it: compiled, since it goes through every inode of the volume.

A live record must be its inode's and have the right checksum. What it refers to by itself, its inline extents, comes out as
runs of blocks, neighbours joined as they come; what has leaves or xattr blocks is only named, for scan.py to follow.
Bytes are believed no further than that: runs may overlap or lie outside the image, which whoever sorts them finds out.
"""

from cpython cimport array
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from daxfs.core.records cimport DX_HAS_CRC, dx_crc, dx_crc_init, dx_has_crc, dx_inode_record
from daxfs.core.runs cimport dx_extent

from array import array as new_array

from daxfs.core import layout
from daxfs.errors import Corrupt

dx_crc_init()
dx_has_crc = DX_HAS_CRC()

cdef uint32_t INODE_MAGIC = layout.INODE_MAGIC
cdef uint32_t CRC_END = layout.INODE_CRC_END
cdef uint32_t INLINE = layout.INLINE_EXTENTS
cdef uint32_t CHUNK_INODES = layout.CHUNK_INODES
assert layout.INODE_SIZE == sizeof(dx_inode_record)


cdef class TableScan:
    """Of all chunks looked at so far: `starts` and `counts` of runs in use, `free` numbers (rising), `orphans` (no link) and
    `chained` ones (leaves or xattr blocks). All are arrays of 8-byte words."""

    cdef readonly array.array starts, counts, free, orphans, chained

    def __cinit__(self):
        self.starts, self.counts, self.free, self.orphans, self.chained = [new_array("Q") for _ in range(5)]

    def look(self, const uint8_t[:] image, const uint64_t[:] chunks, uint64_t first, uint64_t block_size):
        """Go through chunks of the table: `chunks` are their first blocks, `first` the number of the first. Corrupt."""
        cdef Py_ssize_t i
        cdef uint32_t slot
        cdef uint64_t ino
        cdef const dx_inode_record *record
        for i in range(chunks.shape[0]):
            ino = (first + i) * CHUNK_INODES
            if (chunks[i] + 1) * block_size > <uint64_t>image.shape[0]:
                raise Corrupt(f"inode directory: chunk {first + i} lies outside the image")
            record = <const dx_inode_record *>&image[chunks[i] * block_size]
            for slot in range(CHUNK_INODES):
                if record[slot].mode:
                    self._live(&record[slot], ino + slot)
                elif ino + slot:
                    _append(self.free, ino + slot)

    cdef int _live(self, const dx_inode_record *record, uint64_t ino) except -1:
        cdef const dx_extent *extents = <const dx_extent *>record.body
        cdef uint32_t i, crc = dx_crc(0, record, 4)
        if record.magic != INODE_MAGIC or record.ino != ino:
            raise Corrupt(f"inode {ino}: the record is not an inode, or another's")
        if dx_crc(crc, <const uint8_t *>record + 8, CRC_END - 8) != record.crc:
            raise Corrupt(f"inode {ino}: bad checksum")
        if record.nlink == 0:
            _append(self.orphans, ino)
        if record.leaf or record.xattr_block:
            _append(self.chained, ino)
        if record.leaf or record.target_length:
            return 0
        if record.extents > INLINE:
            raise Corrupt(f"inode {ino}: more inline extents than fit")
        for i in range(record.extents):
            self._run(extents[i].physical, extents[i].count)
        return 0

    cdef int _run(self, uint64_t start, uint64_t count) except -1:
        cdef Py_ssize_t n = len(self.starts)
        if n and count and self.starts.data.as_ulonglongs[n - 1] + self.counts.data.as_ulonglongs[n - 1] == start:
            self.counts.data.as_ulonglongs[n - 1] += count
            return 0
        _append(self.starts, start)
        return _append(self.counts, count)


cdef int _append(array.array words, uint64_t word) except -1:
    array.resize_smart(words, len(words) + 1)
    words.data.as_ulonglongs[len(words) - 1] = word
    return 0
