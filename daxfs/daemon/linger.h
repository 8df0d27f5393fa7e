/*
 * Lingering: when the queue of requests runs dry, to wait at the descriptor itself before the event loop gets its turn. The
 * way through the event loop costs more than a hot request, and a CPU that went to sleep is slow to wake.
 *
 * First a spin: polling, for callers on another CPU that come back at once. Only as long as it pays, which the gaps tell, the
 * times from a dry queue to the next request: their running mean says whether to expect one within the spin. And none
 *
 *   - when more threads want to run than there are CPUs, looked up at most every 10 ms
 *   - for a rest of many requests, twice as many each time, once MISSES_MAX spins in a row were in vain, or somebody took the
 *     CPU from a spin: mostly the caller, who shares it
 *
 * Then a nap: sleeping in poll(2) until a request comes, or the event loop has something to do. It is longer than the timer's
 * tick, as a timer in front of the tick costs as much as the request, where the CPU is virtual.
 *
 * An idle mount does neither. Runs on the thread that serves, without the GIL. Nothing here knows Python.
 */
#ifndef DAXFS_LINGER_H
#define DAXFS_LINGER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct {
    int64_t spin_ns; /* a spin is never longer; 0: no spins */
    uint64_t spins, spin_hits, naps, nap_hits;
    int64_t spun_ns; /* in all spins */
} dx_linger_state;

extern dx_linger_state dx_linger;

/* A turn at serving, until it is the event loop's. Times are of dx_clock(). */
typedef struct {
    int64_t now;      /* about */
    int64_t end;      /* of the turn; put off when the event loop turns out to have nothing to do */
    int64_t deadline; /* of the event loop: the end is never later */
    int others;       /* a descriptor that is readable when the event loop has something to do; -1: unknown */
} dx_turn;

int64_t dx_clock(void); /* CLOCK_MONOTONIC, ns */

/* A turn begins; the event loop's next deadline is so far away. */
void dx_begin(dx_turn *turn, int others, int64_t patience_ns);

/* The queue is dry. Wait for the next request and read it; bytes or -errno, -EAGAIN: none, it is the event loop's turn. */
ssize_t dx_wait(int fd, void *buffer, size_t size, dx_turn *turn);

/* The queue is dry, and there is other work to do than waiting. */
void dx_dry(void);

/* A request came to a queue that was dry, and not in dx_wait. */
void dx_came(void);

#endif
