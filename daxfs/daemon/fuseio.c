#define _GNU_SOURCE
#define FUSE_USE_VERSION 314

#include "fuseio.h"
#include "lostpages.h"
#include "spare.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

dx_session dx = {.fd = -1, .wake = -1, .max_write = 1 << 20, .max_background = 64};

/* -- answers ------------------------------------------------------------------------------------------------------- */

static int send_all(int fd, const struct iovec *iov, int count)
{
    if (fd < 0)
        return -ENODEV;
    while (writev(fd, iov, count) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

static int send_message(int fd, uint64_t unique, int error, struct iovec *iov, int count)
{
    struct fuse_out_header out = {.unique = unique, .error = error};
    size_t length = sizeof(out);
    int i;

    for (i = 1; i < count; i++)
        length += iov[i].iov_len;
    out.len = (uint32_t)length;
    iov[0].iov_base = &out;
    iov[0].iov_len = sizeof(out);
    return send_all(fd, iov, count);
}

int dx_answer(uint64_t unique, int error, struct iovec *iov, int count)
{
    return send_message(dx.fd, unique, -error, iov, count);
}

int dx_grows(const struct fuse_in_header *in)
{
    switch (in->opcode) {
    case FUSE_WRITE:
        return !(((const struct fuse_write_in *)(in + 1))->write_flags & FUSE_WRITE_CACHE);
    case FUSE_LOOKUP:
    case FUSE_READDIRPLUS:
    case FUSE_OPEN:
    case FUSE_OPENDIR:
    case FUSE_CREATE:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_SYMLINK:
    case FUSE_LINK:
    case FUSE_SETXATTR:
    case FUSE_FALLOCATE:
    case FUSE_COPY_FILE_RANGE:
    case FUSE_TMPFILE:
    case DX_COPY_FILE_RANGE_64:
        return 1;
    default:
        return 0;
    }
}

int dx_notify(int fd, int code, struct iovec *iov, int count)
{
    return send_message(fd, 0, code, iov, count);
}

/* -- INIT: libfuse 3.14 cannot ask for what we need ------------------------------------------------------------------ */

static void saw_init(const struct fuse_in_header *in, size_t length)
{
    struct fuse_init_in init;

    memset(&init, 0, sizeof(init));
    length -= sizeof(*in);
    memcpy(&init, in + 1, length < sizeof(init) ? length : sizeof(init));
    dx.init_unique = in->unique;
    dx.init_offered = init.flags;
    if (init.flags & FUSE_INIT_EXT)
        dx.init_offered |= (uint64_t)init.flags2 << 32;
}

static void complete_init(struct fuse_init_out *out)
{
    uint64_t granted = dx.init_flags & dx.init_offered;

    out->flags = (uint32_t)granted;
    out->flags2 = (uint32_t)(granted >> 32);
    out->max_write = dx.max_write;
    out->max_pages = (uint16_t)(dx.max_write / (uint32_t)sysconf(_SC_PAGESIZE));
    out->max_background = (uint16_t)dx.max_background;
    out->congestion_threshold = (uint16_t)(dx.max_background * 3 / 4);
    out->time_gran = 1;
}

/* -- requests that are libfuse's --------------------------------------------------------------------------------------- */

typedef struct passed {
    struct passed *next;
    void *memory;
    size_t length;
} passed;

static passed *first, **last = &first;

static void wake_libfuse(void)
{
    eventfd_write(dx.wake, 1);
}

int dx_pass(const struct fuse_in_header *in, size_t length)
{
    passed *one = malloc(sizeof(*one));
    void *memory = malloc(length);

    if (!one || !memory) {
        free(one);
        free(memory);
        return -ENOMEM;
    }
    if (in->opcode == FUSE_INIT)
        saw_init(in, length);
    memcpy(memory, in, length);
    *one = (passed){.memory = memory, .length = length};
    if (!first)
        wake_libfuse();
    *last = one;
    last = &one->next;
    return 0;
}

int dx_passing(void)
{
    return first != NULL;
}

void dx_end(void)
{
    dx.over = 1;
    wake_libfuse();
}

/* The oldest one, into `buf`, which frees it. Its length. */
static int receive(struct fuse_buf *buf)
{
    passed *one = first;
    int length = (int)one->length;
    eventfd_t count;

    free(buf->mem);
    *buf = (struct fuse_buf){.mem = one->memory, .size = one->length};
    first = one->next;
    free(one);
    if (!first) {
        last = &first;
        eventfd_read(dx.wake, &count);
    }
    return length;
}

static void forget_passed(void)
{
    struct fuse_buf buf = {.mem = NULL};

    while (first)
        receive(&buf);
    free(buf.mem);
}

/* -- what libfuse calls in place of read and writev -------------------------------------------------------------------- */

/* Never: fuse_session_receive_buf is ours. libfuse wants one. */
static ssize_t io_read(int fd, void *buffer, size_t size, void *userdata)
{
    (void)fd;
    (void)buffer;
    (void)size;
    (void)userdata;
    errno = EINTR;
    return -1;
}

/* May run on any thread, without the GIL (pyfuse3's notify thread). */
static ssize_t io_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    const struct fuse_out_header *out = iov[0].iov_base;
    const struct fuse_out_header lost = {.len = sizeof(lost), .error = -EIO, .unique = out->unique};
    struct fuse_init_out init;

    (void)fd;
    (void)userdata;
    if (out->unique && out->unique == dx.init_unique && !out->error) {
        dx.init_unique = 0;
        if (count == 2 && iov[1].iov_len == sizeof(init)) {
            memcpy(&init, iov[1].iov_base, sizeof(init));
            complete_init(&init);
            iov[1].iov_base = &init;
        }
    }
    if (dx_lost.fresh && out->unique && !out->error) { /* it was made from pages that are gone */
        iov[0] = (struct iovec){.iov_base = (void *)&lost, .iov_len = sizeof(lost)};
        count = 1;
    }
    return writev(dx.fd, iov, count);
}

/* -- in front of libfuse --------------------------------------------------------------------------------------------- */

/* The function of this name in the very libfuse that we are linked with. */
static void *libfuse_function(const char *name)
{
    Dl_info info;
    void *library;

    if (!dladdr((void *)fuse_session_exited, &info))
        return NULL;
    library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, name) : NULL;
}

int dx_interpose(void)
{
    Dl_info info;

    if (!libfuse_function("fuse_session_mount") || !dladdr((void *)dx_interpose, &info))
        return -1;
    /* Loaded already; this makes it global, where lookups of pyfuse3 come before libfuse itself. */
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_GLOBAL) ? 0 : -1;
}

static const struct fuse_custom_io io = {.read = io_read, .writev = io_writev};

__attribute__((visibility("default"))) int fuse_session_mount(struct fuse_session *se, const char *mountpoint)
{
    int (*mount)(struct fuse_session *, const char *) = libfuse_function("fuse_session_mount");
    void (*unmount)(struct fuse_session *) = libfuse_function("fuse_session_unmount");
    int fd, flags, res = mount(se, mountpoint);

    if (res)
        return res;
    fd = fuse_session_fd(se);
    flags = fcntl(fd, F_GETFL);
    dx.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 || fuse_session_custom_io(se, &io, dx.wake)) {
        unmount(se);
        close(dx.wake);
        return -1;
    }
    dx.fd = fd;
    dx.over = 0;
    return 0;
}

/* Its length, 0: the session has ended, -EINTR: there is none. */
__attribute__((visibility("default"))) int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
    if (dx.over)
        fuse_session_exit(se);
    if (fuse_session_exited(se))
        return 0;
    return first ? receive(buf) : -EINTR;
}

/* libfuse gets the descriptor of the mount back, to close it. Late answers must not go to whatever gets its number next. */
static void give_back(struct fuse_session *se)
{
    if (dx.fd < 0)
        return;
    fuse_session_custom_io(se, &io, dx.fd);
    dx.fd = -1;
    close(dx.wake);
    forget_passed();
}

__attribute__((visibility("default"))) void fuse_session_unmount(struct fuse_session *se)
{
    void (*unmount)(struct fuse_session *) = libfuse_function("fuse_session_unmount");

    give_back(se);
    unmount(se);
}

__attribute__((visibility("default"))) void fuse_session_destroy(struct fuse_session *se)
{
    void (*destroy)(struct fuse_session *) = libfuse_function("fuse_session_destroy");

    give_back(se);
    destroy(se);
}
