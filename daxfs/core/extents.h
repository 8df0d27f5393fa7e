/*
 * The extent map of one file, shared by the core (through extents.pyx) and the native session's hot path.
 *
 * Owned by extents.pyx, which alone changes it; the session reads it on the same thread, under the GIL, and so always sees
 * what the core sees: there is no copy that could go stale. The map is a sorted array of leaves, each a sorted array of
 * extents that never overlap; a leaf in memory is a leaf on media. Extents never overlap, counts are never 0, and no leaf
 * is empty unless the map is.
 */
#ifndef DAXFS_EXTENTS_H
#define DAXFS_EXTENTS_H

#include <stdint.h>
#include <stddef.h>

#define DX_UNWRITTEN 1u

typedef struct {
    uint64_t logical;  /* first block of the file */
    uint64_t physical; /* first block of the image */
    uint32_t count;    /* blocks */
    uint32_t flags;    /* DX_UNWRITTEN */
} dx_extent;

typedef struct {
    dx_extent *e;
    uint32_t n, cap;
    uint64_t block; /* where the leaf is on media, 0: nowhere yet, or inline in the inode */
    uint64_t next;  /* the `next` field that it has on media */
    uint32_t dirty; /* changed since it was stored */
    uint32_t pad;
} dx_leaf;

/* What the hot path may do without asking the core. The core clears bits (read-only volume, poison, suid, sharing). */
#define DX_HOT_READ 1u
#define DX_HOT_WRITE 2u  /* overwrite in place of written blocks below `size` */

struct dx_pages;

typedef struct dx_map {
    dx_leaf *leaves;
    uint32_t nleaves, cap;
    uint64_t extents, blocks; /* how many extents, how many blocks they hold */
    uint64_t size;            /* file size in bytes: the only copy in memory */
    uint8_t *base;            /* address of byte 0 of the mapped image, NULL: not mapped */
    uint64_t *times;          /* the inode's three time words on media: mtime, ctime, atime (layout.py time_word) */
    uint32_t block_shift;
    uint32_t hot;
    struct dx_pages *pages;   /* the daemon's: what the kernel may have of the file in its page cache, NULL: nothing */
} dx_map;

/* The extent that holds block `logical`, or else the first one behind it; NULL when there is neither. */
static inline const dx_extent *dx_find(const dx_map *m, uint64_t logical, uint32_t *leaf_at, uint32_t *extent_at)
{
    uint32_t lo = 0, hi = m->nleaves, li, i;
    const dx_leaf *leaf;

    while (lo < hi) { /* last leaf that starts at or before `logical` */
        uint32_t mid = lo + (hi - lo) / 2;
        if (m->leaves[mid].e[0].logical <= logical)
            lo = mid + 1;
        else
            hi = mid;
    }
    li = lo ? lo - 1 : 0;
    if (li >= m->nleaves)
        return NULL;
    leaf = &m->leaves[li];
    lo = 0;
    hi = leaf->n;
    while (lo < hi) { /* first extent that ends behind `logical` */
        uint32_t mid = lo + (hi - lo) / 2;
        if (leaf->e[mid].logical + leaf->e[mid].count <= logical)
            lo = mid + 1;
        else
            hi = mid;
    }
    i = lo;
    if (i == leaf->n) {
        if (++li == m->nleaves)
            return NULL;
        leaf = &m->leaves[li];
        i = 0;
    }
    if (leaf_at)
        *leaf_at = li;
    if (extent_at)
        *extent_at = i;
    return &leaf->e[i];
}

/* The extent behind (*leaf_at, *extent_at), moving both; NULL at the end. */
static inline const dx_extent *dx_next(const dx_map *m, uint32_t *leaf_at, uint32_t *extent_at)
{
    if (++*extent_at == m->leaves[*leaf_at].n) {
        if (++*leaf_at == m->nleaves)
            return NULL;
        *extent_at = 0;
    }
    return &m->leaves[*leaf_at].e[*extent_at];
}

#endif
