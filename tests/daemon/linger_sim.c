/*
 * linger.c in a world of its own: a clock that moves only by what is called, a queue whose requests come when a scenario
 * says. `linger_sim SCENARIO` prints what lingering did, as name=number words, for test_linger.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MILLISECOND 1000000L
#define NEVER (1L << 60)

static long now = 1000 * MILLISECOND;     /* ns */
static long next_request;        /* comes at this time, */
static long gap;                 /* so long after the answer, */
static int same_cpu;             /* if the caller gets the CPU for that */
static long next_event = NEVER;  /* of the event loop */
static long stolen_after = -1;   /* polls of a spin after which somebody else has the CPU for a while */
static int running = 2;          /* threads */
static long longest_nap, polls;

static int sim_clock_gettime(int clock, struct timespec *t)
{
    (void)clock;
    now += 30;
    *t = (struct timespec){now / 1000000000, now % 1000000000};
    return 0;
}

static ssize_t sim_read(int fd, void *buffer, size_t size)
{
    (void)fd;
    (void)buffer;
    now += 300;
    if (stolen_after >= 0 && ++polls % (stolen_after + 1) == stolen_after)
        now += MILLISECOND;
    if (same_cpu && next_request != NEVER)
        next_request += 300;
    if (now < next_request) {
        errno = EAGAIN;
        return -1;
    }
    return (ssize_t)size;
}

static int sim_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *limit, const void *mask)
{
    long end = now + limit->tv_nsec;

    (void)n;
    (void)mask;
    if (limit->tv_nsec > longest_nap)
        longest_nap = limit->tv_nsec;
    now = next_request < end ? next_request : end;
    if (fds[1].fd >= 0 && next_event < now)
        now = next_event;
    now += 1000;
    fds[0].revents = now >= next_request ? POLLIN : 0;
    fds[1].revents = fds[1].fd >= 0 && now >= next_event ? POLLIN : 0;
    return fds[0].revents || fds[1].revents;
}

static ssize_t sim_pread(int fd, void *buffer, size_t size, long at)
{
    (void)fd;
    (void)at;
    return snprintf(buffer, size, "0.10 0.20 0.30 %d/99 1234\n", running);
}

#define clock_gettime sim_clock_gettime
#define read sim_read
#define ppoll sim_ppoll
#define pread sim_pread
#define sysconf(name) 2L
#include "linger.c"

static char buffer[100];
static long turns, served;

/* As the session serves: `count` requests, or for so long. */
static void serve(int count, int others, long patience)
{
    while (served < count) {
        dx_turn turn;
        int first = 1;
        ssize_t n = -EAGAIN;

        turns++;
        dx_begin(&turn, others, patience);
        while (turn.now < turn.end && served < count) {
            n = sim_read(3, buffer, sizeof(buffer));
            if (n > 0 && first)
                dx_came();
            if (n < 0)
                n = dx_wait(3, buffer, sizeof(buffer), &turn);
            if (n < 0)
                break;
            first = 0;
            served++;
            now += 3000;
            next_request = now + gap;
            turn.now = dx_clock();
        }
        if (n < 0) { /* through the event loop */
            if (next_event <= now)
                next_event = NEVER;
            if (next_request == NEVER)
                return;
            now = (now < next_request ? next_request : now) + 20000;
        }
    }
}

int main(int count, char **words)
{
    const char *scenario = count > 1 ? words[1] : "";
    int others = 5;
    long patience = 1000 * MILLISECOND, event_at;

    next_request = now;
    gap = 20000;
    if (!strcmp(scenario, "sparse"))
        gap = MILLISECOND;
    else if (!strcmp(scenario, "never"))
        dx_linger.spin_ns = 0;
    else if (!strcmp(scenario, "crowded"))
        running = 3;
    else if (!strcmp(scenario, "same-cpu"))
        same_cpu = 1;
    else if (!strcmp(scenario, "stolen"))
        stolen_after = 10;
    else if (!strcmp(scenario, "blind"))
        others = -1, gap = MILLISECOND / 4;
    else if (!strcmp(scenario, "deadline"))
        patience = MILLISECOND, gap = 300000;
    else if (!strcmp(scenario, "stream"))
        gap = 0;
    else if (strcmp(scenario, "steady") && strcmp(scenario, "idle") && strcmp(scenario, "event"))
        return 2;
    serve(10000, others, patience);
    if (!strcmp(scenario, "idle")) { /* all callers have gone */
        next_request = NEVER;
        dx_linger.spins = dx_linger.naps = 0;
        dx_linger.spun_ns = 0;
        served = turns = 0;
        longest_nap = 0;
        serve(1, others, patience);
    }
    if (!strcmp(scenario, "event")) { /* none is there, but the event loop has something */
        next_request = NEVER;
        next_event = now + MILLISECOND;
        served = turns = 0;
        event_at = next_event;
        serve(1, others, patience);
        printf("late_us=%ld ", (now - event_at) / 1000);
    }
    printf("served=%ld turns=%ld spins=%lu spin_hits=%lu spun_us=%ld naps=%lu nap_hits=%lu longest_nap_us=%ld\n", served, turns,
           (unsigned long)dx_linger.spins, (unsigned long)dx_linger.spin_hits, (long)dx_linger.spun_ns / 1000,
           (unsigned long)dx_linger.naps, (unsigned long)dx_linger.nap_hits, longest_nap / 1000);
    return 0;
}
