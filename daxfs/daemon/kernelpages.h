/*
 * What the kernel may have of one file in its page cache, as far as it matters: a set of pages, and whether pages of the file
 * are handed out with twins (twins.pyx, which owns it; the hot path only adds pages).
 *
 * The kernel tells nobody when it drops a page, so the set says what it may have, never less. Its size is fixed: a bit stands
 * for one page of a file of up to 16 MiB, and for 2, 4, 8 ... pages of a longer one. The price of a coarse bit is a drop of
 * pages that would not have been needed. A page is 4096 bytes here, whatever the kernel's or the block's size: both are multiples.
 */
#ifndef DAXFS_KERNELPAGES_H
#define DAXFS_KERNELPAGES_H

#include <stdint.h>

#define DX_PAGE_SHIFT 12
#define DX_PAGE 4096u
#define DX_PAGES_BITS 4096u

typedef struct dx_pages {
    uint32_t careful; /* pages are handed out, and may be taken back, by twins.pyx only */
    uint32_t twins;   /* how many there are: a write-back is the hot path's only when there are none */
    uint32_t shift;   /* a bit stands for 1 << shift pages */
    uint64_t bits[DX_PAGES_BITS / 64];
} dx_pages;

static inline uint64_t dx_pages_bit(const dx_pages *p, uint64_t page)
{
    return page >> p->shift;
}

/* A bit for twice as many pages from now on. */
static inline void dx_pages_coarsen(dx_pages *p)
{
    uint64_t bit;

    for (bit = 0; bit < DX_PAGES_BITS / 2; bit++) {
        uint64_t pair = p->bits[bit / 32] >> (bit % 32 * 2) & 3;

        if (pair)
            p->bits[bit / 64] |= UINT64_C(1) << (bit % 64);
        else
            p->bits[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
    }
    for (bit = DX_PAGES_BITS / 128; bit < DX_PAGES_BITS / 64; bit++)
        p->bits[bit] = 0;
    p->shift++;
}

/* The kernel gets pages [first, end). */
static inline void dx_pages_add(dx_pages *p, uint64_t first, uint64_t end)
{
    uint64_t bit, last;

    if (first >= end)
        return;
    while (dx_pages_bit(p, end - 1) >= DX_PAGES_BITS)
        dx_pages_coarsen(p);
    last = dx_pages_bit(p, end - 1);
    for (bit = dx_pages_bit(p, first); bit <= last; bit++)
        p->bits[bit / 64] |= UINT64_C(1) << (bit % 64);
}

/* Whether the kernel may have one of the pages [first, end). */
static inline int dx_pages_any(const dx_pages *p, uint64_t first, uint64_t end)
{
    uint64_t bit = dx_pages_bit(p, first), last;

    if (first >= end || bit >= DX_PAGES_BITS)
        return 0;
    last = dx_pages_bit(p, end - 1);
    if (last >= DX_PAGES_BITS)
        last = DX_PAGES_BITS - 1;
    for (; bit <= last; bit++) {
        if (bit % 64 == 0 && last - bit >= 63 && !p->bits[bit / 64])
            bit += 63;
        else if (p->bits[bit / 64] >> (bit % 64) & 1)
            return 1;
    }
    return 0;
}

/* The kernel has none of the pages [first, end) any more; both are multiples of what a bit stands for. */
static inline void dx_pages_remove(dx_pages *p, uint64_t first, uint64_t end)
{
    uint64_t bit = dx_pages_bit(p, first), behind = dx_pages_bit(p, end);

    for (; bit < behind && bit < DX_PAGES_BITS; bit++)
        p->bits[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
}

#endif
