/*
 * Stores that reach the medium: as libpmem has them, without a library.
 *
 * What was stored through here is out of the caches after the next dx_fence(), so that on persistent memory (ADR) it survives
 * a power cut. Whole cache lines are streamed past the caches, which is also the fastest way to overwrite them; the rest of
 * them is stored, and its lines are flushed by what the CPU has: clwb, clflushopt or clflush. CPUs other than x86-64 get
 * plain stores and a full fence: order, no more.
 */
#ifndef DAXFS_PERSIST_H
#define DAXFS_PERSIST_H

#include <stddef.h>

/* Store and flush; aligned 8-byte words are never torn. */
void dx_store(void *to, const void *from, size_t n);

/* Flush what was stored by other means. */
void dx_flush(const void *at, size_t n);

/* Everything that was stored and flushed before is on the medium. */
void dx_fence(void);

#endif
