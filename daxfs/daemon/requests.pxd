# cython: language_level=3
"""What other compiled modules of the daemon know of open files."""

from libc.stdint cimport uint32_t


cdef class OpenFile:
    cdef readonly object inode
    cdef readonly int flags
    cdef readonly uint32_t task
    cdef readonly bint cached
    cdef public object fh
    cdef public bint used
