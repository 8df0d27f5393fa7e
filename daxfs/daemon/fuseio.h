/*
 * The line to the kernel: how requests reach libfuse and how answers are written to the FUSE descriptor.
 *
 * fuseio.c puts itself between pyfuse3 and libfuse by exporting four of libfuse's functions (mount, receive_buf, unmount,
 * destroy). The session (session.pyx) reads the descriptor of the mount; libfuse gets an eventfd in its place, which pyfuse3
 * waits for, and finds in receive_buf the requests that the session has left to it (dx_pass). What libfuse answers passes
 * here, where the answer to INIT is completed. Nothing here knows Python. All but the answers is for one thread.
 */
#ifndef DAXFS_FUSEIO_H
#define DAXFS_FUSEIO_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Newer than the headers of Linux 6.1. */
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#endif
#define DX_COPY_FILE_RANGE_64 53

typedef struct {
    int fd;                /* of the mount, -1: none */
    int wake;              /* the eventfd: readable when there is something for libfuse to receive */
    int over;              /* the mount is gone, which libfuse has to hear */
    uint64_t init_unique;  /* the INIT request that libfuse is answering, 0: none */
    uint64_t init_offered; /* the kernel's flags */
    uint64_t init_flags;   /* what to grant of them */
    uint32_t max_write;    /* bytes */
    uint32_t max_background;
} dx_session;

extern dx_session dx;

/* So that the dynamic linker finds our functions before libfuse's. 0, or -1 with dlerror(). */
int dx_interpose(void);

/* Leave a request to libfuse. 0, or -ENOMEM. */
int dx_pass(const struct fuse_in_header *in, size_t length);

/* Whether libfuse has requests to receive. */
int dx_passing(void);

/* The mount is gone: so is libfuse's session. */
void dx_end(void);

/* Whether a request makes the daemon hold more than before: names, open files, extents. Dirty pages that
 * the kernel writes back (dax=never) do not count: they are acknowledged. */
int dx_grows(const struct fuse_in_header *in);

/* Answer a request: 0 or -errno. `iov[0]` is for the header, the payload is iov[1..count). `error`: 0 or a positive errno. */
int dx_answer(uint64_t unique, int error, struct iovec *iov, int count);

/* Tell the kernel something it did not ask for (FUSE_NOTIFY_*), on a descriptor that is surely ours. 0 or -errno. */
int dx_notify(int fd, int code, struct iovec *iov, int count);

#endif
