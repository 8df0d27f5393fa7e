#define _GNU_SOURCE

#include "hotpath.h"
#include "kernelpages.h"
#include "lostpages.h"
#include "persist.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>

#define READ_MAX (1u << 20) /* bytes that one read can ask for: 256 pages */
#define PIECES_MAX 512      /* of one read or write; a block has 4096 bytes, so 1 MiB has 257 at most */

#define DAY_S (24 * 60 * 60)
#define TIME_MIN (-(INT64_C(1) << 31)) /* layout.py: a time word counts from here */
#define WORD_SECONDS_SHIFT 30

dx_hot_state dx_hot = {.enabled = 1, .atime = 1};

/* -- handles --------------------------------------------------------------------------------------------------------- */

typedef struct {
    const dx_map *map;
    unsigned access;
    int used;
    uint64_t next_free;
} handle;

static handle *handles;
static uint64_t handles_count, handles_free; /* a list through next_free; 0 ends it: handle 0 is never given out */

static int grow(void)
{
    uint64_t count = handles_count ? handles_count * 2 : 64, fh;
    handle *more = realloc(handles, count * sizeof(*more));

    if (!more)
        return -1;
    for (fh = count; fh-- > handles_count;) { /* lowest number first */
        more[fh] = (handle){.next_free = handles_free};
        if (fh)
            handles_free = fh;
    }
    handles = more;
    handles_count = count;
    return 0;
}

uint64_t dx_attach(const dx_map *map, unsigned access)
{
    uint64_t fh;

    if (!handles_free && grow())
        return 0;
    fh = handles_free;
    handles_free = handles[fh].next_free;
    handles[fh] = (handle){.map = map, .access = access, .used = 1};
    return fh;
}

int dx_detach(uint64_t fh)
{
    if (fh >= handles_count || !handles[fh].used)
        return -1;
    handles[fh] = (handle){.next_free = handles_free};
    handles_free = fh;
    return 0;
}

/* The map to serve a request from, NULL: Python's. */
static const dx_map *hot_map(uint64_t fh, unsigned access, uint32_t hot)
{
    const dx_map *map;

    if (fh >= handles_count || (handles[fh].access & access) != access)
        return NULL;
    map = handles[fh].map;
    return map && map->base && map->times && (map->hot & hot) ? map : NULL;
}

/* -- times: words on media, one aligned store each -------------------------------------------------------------------- */

static uint64_t now_word(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)(now.tv_sec - TIME_MIN) << WORD_SECONDS_SHIFT | (uint64_t)now.tv_nsec;
}

static void store_word(uint64_t *at, uint64_t word)
{
    __atomic_store_n(at, word, __ATOMIC_RELAXED);
}

/* Not flushed: an access time may be lost, it is only ever too old. */
static void touch_read(const dx_map *map)
{
    uint64_t *times = map->times, now = now_word(), atime = times[2]; /* mtime, ctime, atime */

    if (atime <= times[0] || atime <= times[1] ||
        (now > atime && (now - atime) >> WORD_SECONDS_SHIFT >= DAY_S))
        store_word(&times[2], now);
}

static void touch_write(const dx_map *map)
{
    uint64_t now = now_word();

    store_word(&map->times[0], now);
    store_word(&map->times[1], now);
    dx_flush(map->times, 2 * sizeof(now));
}

/* -- pieces ---------------------------------------------------------------------------------------------------------- */

static uint8_t zeros[READ_MAX];

static int follows(const struct iovec *piece, const uint8_t *from)
{
    return (const uint8_t *)piece->iov_base + piece->iov_len == from;
}

/*
 * The bytes [at, at + length) of the file as pieces of the mapping, joined where they touch. `gaps`: holes and unwritten
 * extents are pieces of `zeros`; else they are refused. How many pieces, or -1: refused, or too many.
 */
static int collect(const dx_map *map, uint64_t at, uint64_t length, int gaps, struct iovec *pieces)
{
    const unsigned shift = map->block_shift;
    const uint64_t end = at + length;
    uint32_t leaf = 0, index = 0;
    const dx_extent *e = dx_find(map, at >> shift, &leaf, &index);
    int count = 0, zero_last = 0;

    while (at < end) {
        uint64_t start = e ? e->logical << shift : end, stop;
        int zero = start > at || (e->flags & DX_UNWRITTEN);
        uint8_t *from = zeros;

        if (zero && !gaps)
            return -1;
        if (start > at) {
            stop = start;
        } else {
            stop = (e->logical + e->count) << shift;
            if (!zero)
                from = map->base + (e->physical << shift) + (at - start);
            e = dx_next(map, &leaf, &index);
        }
        if (stop > end)
            stop = end;
        if (count && zero == zero_last && (zero || follows(&pieces[count - 1], from))) {
            pieces[count - 1].iov_len += stop - at;
        } else {
            if (count == PIECES_MAX)
                return -1;
            pieces[count++] = (struct iovec){.iov_base = from, .iov_len = stop - at};
        }
        zero_last = zero;
        at = stop;
    }
    return count;
}

/* -- requests -------------------------------------------------------------------------------------------------------- */

void dx_note_read(const dx_map *map, uint32_t open_flags)
{
    if (dx_hot.atime && !(open_flags & O_NOATIME))
        touch_read(map);
}

/* Whether the kernel may get these pages from here; it is noted that it has them, before it does. */
static int may_fill(const dx_map *map, const struct fuse_read_in *arg)
{
    if (!dx_hot.pages)
        return 1;
    if (!map->pages || map->pages->careful)
        return 0;
    dx_pages_add(map->pages, arg->offset >> DX_PAGE_SHIFT, (arg->offset + arg->size + DX_PAGE - 1) >> DX_PAGE_SHIFT);
    return 1;
}

static int hot_read(const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    const unsigned fills = arg->read_flags & FUSE_READ_LOCKOWNER ? 0 : DX_FILLS;
    const dx_map *map = hot_map(arg->fh, DX_READABLE | fills, DX_HOT_READ);
    struct iovec iov[1 + PIECES_MAX];
    uint64_t length;
    int count;

    if (!map)
        return 0;
    length = arg->offset < map->size ? map->size - arg->offset : 0;
    if (length > arg->size)
        length = arg->size;
    if (length > READ_MAX || (fills && !may_fill(map, arg)))
        return 0;
    count = collect(map, arg->offset, length, 1, iov + 1);
    if (count < 0)
        return 0;
    if (dx_answer(in->unique, 0, iov, 1 + count) == -EFAULT) {
        /* A page of the image is gone. Mostly the kernel has ended the request with EIO by now. */
        dx_answer(in->unique, EIO, iov, 1);
        dx_touch(iov + 1, count);
        return 1;
    }
    dx_note_read(map, arg->flags);
    dx_hot.reads++;
    dx_hot.read_bytes += length;
    return 1;
}

void dx_end_write(const struct fuse_in_header *in, const struct fuse_write_in *arg, const dx_map *map)
{
    struct fuse_write_out out = {.size = arg->size};
    struct iovec iov[2];

    if (!(arg->write_flags & FUSE_WRITE_CACHE && dx.init_flags & FUSE_WRITEBACK_CACHE)) /* then the kernel keeps times */
        touch_write(map);
    dx_fence(); /* data and times are on the medium before the caller hears of it */
    if (dx_lost.fresh) { /* what was stored may have gone nowhere */
        dx_answer(in->unique, EIO, iov, 1);
        return;
    }
    iov[1] = (struct iovec){.iov_base = &out, .iov_len = sizeof(out)};
    dx_answer(in->unique, 0, iov, 2);
    dx_hot.writes++;
    dx_hot.write_bytes += arg->size;
}

static int hot_write(const struct fuse_in_header *in, const struct fuse_write_in *arg)
{
    const dx_map *map = hot_map(arg->fh, DX_WRITABLE, DX_HOT_WRITE);
    const uint8_t *data = (const uint8_t *)(arg + 1);
    struct iovec pieces[PIECES_MAX];
    int count, i;

    if (!map || (arg->flags & O_APPEND) || !arg->size)
        return 0;
    if (arg->write_flags & FUSE_WRITE_CACHE && map->pages && map->pages->twins)
        return 0;
    if (arg->offset > map->size || arg->size > map->size - arg->offset)
        return 0;
    count = collect(map, arg->offset, arg->size, 0, pieces);
    if (count < 0)
        return 0;
    for (i = 0; i < count; i++) {
        dx_store(pieces[i].iov_base, data, pieces[i].iov_len);
        data += pieces[i].iov_len;
    }
    dx_end_write(in, arg, map);
    return 1;
}

int dx_try_hot(const struct fuse_in_header *in, size_t length)
{
    const struct fuse_read_in *read = (const void *)(in + 1);
    const struct fuse_write_in *write = (const void *)(in + 1);

    if (!dx_hot.enabled || dx_lost.what)
        return 0;
    if (in->opcode == FUSE_READ && length >= sizeof(*in) + sizeof(*read))
        return hot_read(in, read);
    if (in->opcode == FUSE_WRITE && length >= sizeof(*in) + sizeof(*write) &&
        length - sizeof(*in) - sizeof(*write) >= write->size)
        return hot_write(in, write);
    return 0;
}
