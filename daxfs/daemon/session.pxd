# cython: language_level=3
"""What other compiled modules of the daemon share with the session: answering a request before Python sees it."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "fuseio.h" nogil:
    struct fuse_in_header:
        uint32_t len, opcode
        uint64_t unique, nodeid
        uint32_t uid, gid, pid

# 1: answered. 0: not mine, and nothing was done. An exception is a bug, as in a callback.
ctypedef int (*quick_handler)(const fuse_in_header *header, size_t length) except -1

# Of hotpath.h and persist.h, for handlers that answer some reads and writes themselves.
cdef void keep_pages(bint on) noexcept
cdef int try_hot(const fuse_in_header *header, size_t length) noexcept
cdef void note_read(const void *map, uint32_t open_flags) noexcept
cdef void end_write(const fuse_in_header *header, const void *map) noexcept
cdef void store(void *to, const void *data, size_t n) noexcept nogil

cdef int set_quick(int opcode, quick_handler handler) except -1
cdef int answer(uint64_t unique, const void *data, size_t length) except -1
cdef int refuse(uint64_t unique, int number) except -1
cdef object attach_handle(const void *map_pointer, unsigned access, keep)
cdef object held(fh)
cdef int detach_handle(fh) except -1
