# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The stores of the medium, compiled: what every call of the core does most often. pmem.py says what they mean.

A medium of another kind (one that records, or dies at a chosen store) is a Python subclass that overrides these methods:
the core calls them by name, so that nothing it does escapes it. Ranges are checked, as compiled code would run over them.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset


cdef class Memory:
    """Bytes [0, length) from an address on, once `_place` has said which. `_dirty`: what was flushed and awaits a fence,
    as (at, n), with `hostsync`."""

    cdef uint8_t *_base
    cdef uint64_t _length
    cdef public bint hostsync, readonly
    cdef public list _dirty

    def __init__(self):
        self._dirty = []

    def _place(self, uintptr_t address, uint64_t length):
        self._base = <uint8_t *>address
        self._length = length

    cdef inline int _check(self, uint64_t at, uint64_t n) except -1:
        if n > self._length or at > self._length - n:
            raise ValueError(f"bytes {at}+{n} are not in the image")
        return 0

    def store(self, uint64_t at, data):
        """Put bytes at an address."""
        cdef Py_buffer buffer
        if PyBytes_CheckExact(data):
            self._check(at, PyBytes_GET_SIZE(data))
            memcpy(self._base + at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            return
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            self._check(at, buffer.len)
            memcpy(self._base + at, buffer.buf, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    def fill_zero(self, uint64_t at, uint64_t n):
        self._check(at, n)
        memset(self._base + at, 0, n)

    def copy(self, uint64_t source, uint64_t target, uint64_t n):
        """Copy within the image; the ranges may overlap."""
        self._check(source, n)
        self._check(target, n)
        memmove(self._base + target, self._base + source, n)

    def store_word(self, uint64_t at, uint64_t value):
        """One aligned 8-byte store, which is atomic."""
        self._check(at, 8)
        if at & 7:
            raise ValueError(f"address {at} is not that of a word")
        (<volatile uint64_t *>(self._base + at))[0] = value

    def load_word(self, uint64_t at):
        self._check(at, 8)
        return (<uint64_t *>(self._base + (at & ~<uint64_t>7)))[0]

    def flush(self, at, n):
        """Begin to make a range durable."""
        if self.hostsync and not self.readonly:
            self._dirty.append((at, n))

    def fence(self):
        """What was flushed is durable when this returns."""
        if self._dirty:
            self._sync_dirty()
