/*
 * The line to the kernel: how requests are read from the FUSE descriptor and how answers are written to it.
 *
 * fuseio.c puts itself between pyfuse3 and libfuse by exporting four of libfuse's functions (mount, receive_buf, unmount,
 * destroy), and gives libfuse its own read and writev (fuse_session_custom_io). Everything the kernel says passes dx_take() in
 * session.pyx first, which answers a request or hands it on to libfuse; everything libfuse says passes here, where the INIT
 * answer is completed. Nothing here knows Python.
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
    uint64_t passed;       /* the request that libfuse has and has not answered, 0: none */
    uint64_t init_unique;  /* the INIT request that libfuse is answering, 0: none */
    uint64_t init_offered; /* the kernel's flags */
    uint64_t init_flags;   /* what to grant of them */
    uint32_t max_write;    /* bytes */
    uint32_t max_background;
    /* Takes the next request that is libfuse's into `buffer`; bytes or -errno, -EINTR when there is none. */
    ssize_t (*take)(void *buffer, size_t size);
} dx_session;

extern dx_session dx;

/* So that the dynamic linker finds our functions before libfuse's. 0, or -1 with dlerror(). */
int dx_interpose(void);

/* Remember what the kernel offers; called with an INIT request. */
void dx_saw_init(const struct fuse_in_header *in, size_t length);

/* Whether a request makes the daemon hold more than before: names, open files, extents. Dirty pages that
 * the kernel writes back (dax=never) do not count: they are acknowledged. */
int dx_grows(const struct fuse_in_header *in);

/* Answer a request: 0 or -errno. `iov[0]` is for the header, the payload is iov[1..count). `error`: 0 or a positive errno. */
int dx_answer(uint64_t unique, int error, struct iovec *iov, int count);

/* Tell the kernel something it did not ask for (FUSE_NOTIFY_*), on a descriptor that is surely ours. 0 or -errno. */
int dx_notify(int fd, int code, struct iovec *iov, int count);

#endif
