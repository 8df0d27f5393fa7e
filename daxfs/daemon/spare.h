/*
 * Memory that is kept back for when there is no more (RLIMIT_AS, ulimit -v, a host without overcommit).
 *
 * What is kept is address space, which costs nothing until it is used. An allocation of Python that fails gives it up and is
 * tried again, so the request under way ends like any other, instead of with a MemoryError at some line of it. From then on
 * requests that make the daemon hold more are refused with ENOMEM (session.pyx, dx_grows) until as much could be had again.
 * An allocation that is larger than what is kept fails as ever, and gives nothing up.
 *
 * Covered is what Python's allocators get from the host, and who asks dx_spare_give() by himself. Any thread, no GIL needed.
 */
#ifndef DAXFS_SPARE_H
#define DAXFS_SPARE_H

#include <stddef.h>

/* Keep so many bytes from now on. 0, or -errno and nothing is kept. Once in a process. */
int dx_spare_keep(size_t size);

/* Whether it was given up. */
int dx_spare_gone(void);

/* An allocation of `size` has failed: give up what is kept. Whether there was anything, so that trying again is worth it. */
int dx_spare_give(size_t size);

/* Keep it again, if there is memory. Whether it is kept now. */
int dx_spare_regain(void);

/* One line on stderr, which needs no memory: something could not be logged. */
void dx_spare_complain(void);

#endif
