# records.h for the compiled modules that read records. Each of them calls dx_crc_init() and sets dx_has_crc once.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "records.h" nogil:
    ctypedef struct dx_inode_record:
        uint32_t magic, crc
        uint64_t ino
        uint32_t generation, mode, uid, gid, nlink, flags
        uint64_t rdev, size, parent, btime, xattr_block, leaf
        uint32_t extents
        uint16_t target_length, xattr_length
        uint8_t body[144]
        uint8_t xattrs[240]
        uint64_t blocks
        uint64_t times[3]
    ctypedef struct dx_entry_record:
        uint64_t ino
        uint32_t crc
        uint16_t length
        uint8_t name_length
        uint8_t type
    ctypedef struct dx_txn_header:
        uint32_t magic, crc
        uint64_t sequence, length, records
    ctypedef struct dx_txn_record:
        uint64_t address, length
    int dx_has_crc
    int DX_HAS_CRC()
    void dx_crc_init()
    uint32_t dx_crc(uint32_t crc, const void *at, size_t n)
    uint32_t dx_crc_by_table(uint32_t crc, const uint8_t *at, size_t n)
