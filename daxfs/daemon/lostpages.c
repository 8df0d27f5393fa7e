#define _GNU_SOURCE

#include "lostpages.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

volatile dx_lost_state dx_lost;

static uint8_t *guarded; /* page-aligned: it comes from mmap */
static size_t guarded_size;
static int guarded_fd = -1;
static size_t page_size;
static struct sigaction before;

/* Where the file ends now, in whole pages. */
static size_t file_end(void)
{
    struct stat status;
    size_t end;

    if (fstat(guarded_fd, &status) < 0)
        return guarded_size;
    end = ((size_t)status.st_size + page_size - 1) & -page_size;
    return end < guarded_size ? end : guarded_size;
}

/* Anonymous memory in the place of [first, end). Only what may be called in a signal handler. 0 or -1. */
static int replace(size_t first, size_t end, int what)
{
    if (mmap(guarded + first, end - first, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
        return -1;
    dx_lost.what = what;
    dx_lost.first = first;
    dx_lost.end = end;
    dx_lost.fresh = 1;
    return 0;
}

static size_t guarded_pages(void)
{
    return (guarded_size + page_size - 1) & -page_size;
}

static void on_bus(int signal, siginfo_t *info, void *context)
{
    int saved = errno, done = -1;
    uintptr_t at = (uintptr_t)info->si_addr & -page_size, base = (uintptr_t)guarded;

    (void)context;
    if (guarded_size && at >= base && at - base < guarded_size) {
        size_t offset = at - base, end = file_end();

        done = offset >= end ? replace(end, guarded_pages(), DX_LOST_END)
                             : replace(offset, offset + page_size, DX_LOST_PAGE);
    }
    if (done < 0) /* not ours, or no help: the access is repeated, and meets whoever was here before us */
        sigaction(signal, &before, NULL);
    errno = saved;
}

int dx_guard(void *base, size_t size, int fd)
{
    struct sigaction action;

    page_size = (size_t)sysconf(_SC_PAGESIZE);
    guarded_size = 0;
    guarded = base;
    guarded_fd = fd;
    guarded_size = size;
    memset((void *)&dx_lost, 0, sizeof(dx_lost));
    if (!size)
        return 0;
    if (sigaction(SIGBUS, NULL, &action) < 0)
        return -errno;
    if (action.sa_sigaction == on_bus && action.sa_flags & SA_SIGINFO)
        return 0;
    before = action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_bus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL) < 0 ? -errno : 0;
}

void dx_look(void)
{
    size_t end;

    if (!guarded_size || (dx_lost.what == DX_LOST_END && !dx_lost.fresh))
        return;
    end = file_end();
    if (end < guarded_size)
        replace(end, guarded_pages(), DX_LOST_END);
}

void dx_touch(const struct iovec *pieces, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        const volatile uint8_t *at = pieces[i].iov_base, *end = at + pieces[i].iov_len;

        if (at < guarded || at >= guarded + guarded_size)
            continue;
        for (; at < end; at = (const uint8_t *)(((uintptr_t)at & -page_size) + page_size))
            (void)*at;
    }
}
