#define _GNU_SOURCE

#include "linger.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define US 1000
#define MS 1000000
#define TURN_NS (2 * MS)       /* the event loop never waits longer for its turn than this and the last request */
#define NAP_NS (20 * MS)       /* ticks are 10 ms at most */
#define NAP_BLIND_NS (MS / 2)  /* when the event loop cannot wake us */
#define MEAN_OF 4              /* gaps */
#define GAP_MAX (2 * MS)       /* longer ones are idleness, and count as this */
#define SPIN_LEAST (5 * US)    /* on top of twice the mean gap */
#define MISSES_MAX 4
#define REST_MIN 64            /* dry queues */
#define REST_MAX 8192
#define TAKEN_NS (50 * US)     /* so much time between two looks at the clock: somebody else ran */
#define LOOK_NS (10 * MS)      /* between two looks at how many threads want to run */
#define PAUSES 16              /* between two looks at the queue */

dx_linger_state dx_linger = {.spin_ns = 100 * US};

static int64_t mean_gap = GAP_MAX;
static int64_t dry_since;  /* 0: it is not */
static unsigned misses;    /* spins in a row */
static unsigned rest_left; /* dry queues without a spin to come */
static unsigned rest = REST_MIN;

int64_t dx_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void relax(void)
{
    int i;

    for (i = 0; i < PAUSES; i++)
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#else
        __asm__ volatile("" : : : "memory");
#endif
}

/* -- is it worth it? ------------------------------------------------------------------------------------------------- */

/* Whether more threads want to run than there are CPUs: the fourth word of /proc/loadavg, as in "3/160". */
static int look_crowded(void)
{
    static int fd = -2;
    static long cpus;
    char text[128], *word;
    ssize_t n;

    if (fd == -2) {
        fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
        cpus = sysconf(_SC_NPROCESSORS_ONLN);
    }
    if (cpus == 1)
        return 1;
    n = fd < 0 ? -1 : pread(fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    word = strchr(text, '/');
    while (word && word > text && word[-1] != ' ')
        word--;
    return word && strtol(word, NULL, 10) > cpus;
}

static int crowded(int64_t now)
{
    static int64_t looked;
    static int found;

    if (now - looked > LOOK_NS) {
        looked = now;
        found = look_crowded();
    }
    return found;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* How long to spin now. */
static int64_t window(int64_t now)
{
    if (mean_gap >= dx_linger.spin_ns)
        return 0;
    if (rest_left) {
        rest_left--;
        return 0;
    }
    if (crowded(now))
        return 0;
    return least(dx_linger.spin_ns, 2 * mean_gap + SPIN_LEAST);
}

static void take_rest(void)
{
    misses = 0;
    rest_left = rest;
    if (rest < REST_MAX)
        rest *= 2;
}

static void came_after(int64_t gap)
{
    mean_gap += (least(gap, GAP_MAX) - mean_gap) / MEAN_OF;
    dry_since = 0;
}

void dx_dry(void)
{
    dry_since = dx_clock();
}

void dx_came(void)
{
    if (dry_since)
        came_after(dx_clock() - dry_since);
}

/* -- waiting --------------------------------------------------------------------------------------------------------- */

void dx_begin(dx_turn *turn, int others, int64_t patience_ns)
{
    turn->others = others;
    turn->now = dx_clock();
    turn->deadline = turn->now + patience_ns;
    turn->end = least(turn->now + TURN_NS, turn->deadline);
}

/* Both: bytes, or -errno of read(2); -EAGAIN when there was no request. */

static ssize_t spin(int fd, void *buffer, size_t size, dx_turn *turn, int64_t length)
{
    const int64_t start = turn->now, end = least(start + length, turn->end);
    int64_t before;
    int taken;
    ssize_t n;

    dx_linger.spins++;
    do {
        relax();
        n = read(fd, buffer, size);
        n = n < 0 ? -errno : n;
        before = turn->now;
        turn->now = dx_clock();
    } while (n == -EAGAIN && turn->now < end && turn->now - before < TAKEN_NS);
    dx_linger.spun_ns += turn->now - start;
    taken = turn->now - before >= TAKEN_NS;
    if (n != -EAGAIN) {
        dx_linger.spin_hits++;
        came_after(turn->now - start);
        misses = 0;
        if (!taken)
            rest = REST_MIN;
    } else if (end == start + length) {
        misses++;
    }
    if (taken || misses == MISSES_MAX)
        take_rest();
    return n;
}

static ssize_t nap(int fd, void *buffer, size_t size, dx_turn *turn)
{
    struct pollfd polled[] = {{.fd = fd, .events = POLLIN}, {.fd = turn->others, .events = POLLIN}};
    struct timespec limit = {0};
    ssize_t n = -EAGAIN;

    limit.tv_nsec = least(turn->others < 0 ? NAP_BLIND_NS : NAP_NS, turn->deadline - turn->now);
    dx_linger.naps++;
    if (ppoll(polled, 2, &limit, NULL) > 0 && polled[0].revents) {
        n = read(fd, buffer, size);
        n = n < 0 ? -errno : n;
    }
    turn->now = dx_clock();
    if (n == -EAGAIN)
        return n;
    dx_linger.nap_hits++;
    came_after(turn->now - dry_since);
    turn->end = polled[1].revents ? turn->now : least(turn->now + TURN_NS, turn->deadline);
    return n;
}

ssize_t dx_wait(int fd, void *buffer, size_t size, dx_turn *turn)
{
    int64_t length;
    ssize_t n = -EAGAIN;

    turn->now = dry_since = dx_clock();
    length = window(turn->now);
    if (length > 0 && turn->now < turn->end)
        n = spin(fd, buffer, size, turn, length);
    if (n == -EAGAIN && turn->now < turn->deadline)
        n = nap(fd, buffer, size, turn);
    return n;
}
