/*
 * Records on media as C structs, for the compiled encoders, and CRC32C. layout.py has the tables and says what each field
 * means; records.pyx refuses to load if the two differ. Hosts are little-endian, as the images are.
 */
#ifndef DAXFS_RECORDS_H
#define DAXFS_RECORDS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "daxfs needs a little-endian host"
#endif

#define DX_PACKED __attribute__((packed))

typedef struct DX_PACKED {
    uint32_t magic, crc;
    uint64_t ino;
    uint32_t generation, mode, uid, gid, nlink, flags;
    uint64_t rdev, size, parent, btime, xattr_block, leaf;
    uint32_t extents;
    uint16_t target_length, xattr_length;
    uint8_t body[144], xattrs[240];
    uint64_t blocks, times[3];
} dx_inode_record;

typedef struct DX_PACKED {
    uint64_t ino;
    uint32_t crc;
    uint16_t length;
    uint8_t name_length, type;
} dx_entry_record;

typedef struct DX_PACKED {
    uint32_t magic, crc;
    uint64_t sequence, length, records;
} dx_txn_header;

typedef struct DX_PACKED {
    uint64_t address, length;
} dx_txn_record;

_Static_assert(sizeof(dx_inode_record) == 512, "inode");
_Static_assert(sizeof(dx_entry_record) == 16, "directory entry");
_Static_assert(sizeof(dx_txn_header) == 32 && sizeof(dx_txn_record) == 16, "transaction");

/* CRC32C (Castagnoli), as RFC 3720 has it; `crc` is that of the bytes before. */

static uint32_t dx_crc_table[8][256]; /* by eight bytes at once, for CPUs without the instruction */

static void dx_crc_init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
        dx_crc_table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            dx_crc_table[k][i] = dx_crc_table[k - 1][i] >> 8 ^ dx_crc_table[0][dx_crc_table[k - 1][i] & 0xFF];
}

static uint32_t dx_crc_by_table(uint32_t crc, const uint8_t *at, size_t n)
{
    crc = ~crc;
    for (; n >= 8; n -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++)
            crc ^= dx_crc_table[7 - k][word >> 8 * k & 0xFF];
    }
    while (n--)
        crc = crc >> 8 ^ dx_crc_table[0][(crc ^ *at++) & 0xFF];
    return ~crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t dx_crc_by_cpu(uint32_t crc, const uint8_t *at, size_t n)
{
    uint64_t wide = (uint32_t)~crc;
    for (; n >= 8; n -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    while (n--)
        crc = __builtin_ia32_crc32qi(crc, *at++);
    return ~crc;
}
#define DX_HAS_CRC() __builtin_cpu_supports("sse4.2")
#else
#define dx_crc_by_cpu dx_crc_by_table
#define DX_HAS_CRC() 0
#endif

static int dx_has_crc;

static inline uint32_t dx_crc(uint32_t crc, const void *at, size_t n)
{
    return dx_has_crc ? dx_crc_by_cpu(crc, at, n) : dx_crc_by_table(crc, at, n);
}

#endif
