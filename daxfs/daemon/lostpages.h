/*
 * Pages of the image that are gone under its mapping: the file was truncated, or the host could not give a page (its disk is
 * full, or fails). The access raises SIGBUS, wherever it is: in the hot path, in a memoryview's store, in NumPy.
 *
 * The handler puts anonymous memory in the place of what is lost, so that the access ends and the daemon lives, and says so
 * in `dx_lost`. What is read there is zeros, what is stored there goes nowhere: hence no answer may say "done" from then on,
 * until the daemon has heard of it and shut the door (`fresh`). The holders' own mappings are not ours to mend.
 */
#ifndef DAXFS_LOSTPAGES_H
#define DAXFS_LOSTPAGES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define DX_LOST_END 1   /* the file ends before the mapping does */
#define DX_LOST_PAGE 2  /* a page within the file cannot be had */

typedef struct {
    int fresh;      /* something was lost that the daemon has not heard of */
    int what;       /* DX_LOST_*, of the latest loss; 0: none so far */
    uint64_t first; /* bytes: where the latest loss begins, */
    uint64_t end;   /* and ends */
} dx_lost_state;

extern volatile dx_lost_state dx_lost;

/* Watch the mapping of an image from now on; `size` 0: none. 0 or -errno. */
int dx_guard(void *base, size_t size, int fd);

/* Is the file as long as its mapping? If not, that is a loss. */
void dx_look(void);

/* Read a byte of every page of these pieces, as far as they are guarded: what the kernel could not reach is a loss now. */
void dx_touch(const struct iovec *pieces, int count);

#endif
