/*
 * The hot path: READ and WRITE of a mapped file, answered from the mapping without Python.
 *
 * A handle is the number that the kernel brings back with every request on an open file. A hot handle points at the extent
 * map that the core keeps (extents.h): the same memory, on the same thread, under the GIL, so what is seen here is what the
 * core sees. Whatever is not simple is left to Python by answering "not mine": a write that allocates, extends or appends,
 * a file whose hot bits are off, pages of a pinned file. An overwrite is flushed and fenced before it is answered (persist.h); a medium whose fence
 * does more than that (hostsync, a recording one) must keep DX_HOT_WRITE off.
 */
#ifndef DAXFS_HOTPATH_H
#define DAXFS_HOTPATH_H

#include "extents.h"
#include "fuseio.h"

#define DX_READABLE 1u
#define DX_WRITABLE 2u
#define DX_FILLS 4u /* READs of the kernel's page cache, not only of read(2), are served */

typedef struct {
    int enabled;
    int atime; /* keep access times, as relatime does */
    int pages; /* keep account of the pages that the kernel gets (kernelpages.h) */
    uint64_t reads, writes, read_bytes, write_bytes;
} dx_hot_state;

extern dx_hot_state dx_hot;

/* A new handle's number (never 0), or 0 when there is no memory. `map` NULL: nothing on it is hot. */
uint64_t dx_attach(const dx_map *map, unsigned access);
/* 0, or -1 if it is not attached. */
int dx_detach(uint64_t fh);

/* 1: answered. 0: not mine, nothing was done. */
int dx_try_hot(const struct fuse_in_header *in, size_t length);

/* What every read and overwrite ends with, for the compiled handlers that answer some themselves (twins.pyx). */
void dx_note_read(const dx_map *map, uint32_t open_flags);
void dx_end_write(const struct fuse_in_header *in, const struct fuse_write_in *arg, const dx_map *map);

#endif
