# cython: language_level=3
"""What compiled modules share: the structures of extents.h and the engine's class."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "extents.h" nogil:
    enum:
        DX_UNWRITTEN
        DX_HOT_READ
        DX_HOT_WRITE
    ctypedef struct dx_extent:
        uint64_t logical
        uint64_t physical
        uint32_t count
        uint32_t flags
    ctypedef struct dx_leaf:
        dx_extent *e
        uint32_t n
        uint32_t cap
        uint64_t block
        uint64_t next
        uint32_t dirty
    struct dx_pages:
        pass
    ctypedef struct dx_map:
        dx_leaf *leaves
        uint32_t nleaves
        uint32_t cap
        uint64_t extents
        uint64_t blocks
        uint64_t size
        uint8_t *base
        uint64_t *times
        uint32_t block_shift
        uint32_t hot
        dx_pages *pages
    const dx_extent *dx_find(const dx_map *m, uint64_t logical, uint32_t *leaf_at, uint32_t *extent_at)
    const dx_extent *dx_next(const dx_map *m, uint32_t *leaf_at, uint32_t *extent_at)


cdef class _Carved:
    cdef list runs, pieces
    cdef uint64_t start, length

    cdef int add(self, uint64_t logical, uint64_t physical, uint64_t count, uint32_t flags) except -1
    cdef list end(self)


cdef class RunMap:
    cdef dx_map m
    cdef uint32_t leaf_capacity
    cdef list dropped_blocks
    cdef uint32_t first, behind

    cdef void _free(self) noexcept
    cdef dx_leaf *_new_leaf(self, uint32_t at) except NULL
    cdef int _room(self, dx_leaf *leaf, uint32_t n) except -1
    cdef void _touch(self, uint32_t at) noexcept
    cdef void _widen(self, uint32_t at) noexcept
    cdef int _drop_leaves(self, uint32_t at, uint32_t n) except -1
    cdef int _place(self, uint32_t li, uint32_t i, uint64_t logical, uint64_t physical, uint32_t count,
                    uint32_t flags) except -1
    cdef int _remove(self, uint32_t li, uint32_t i) except -1
    cdef int _fold(self, uint32_t li) except -1
    cdef int _insert(self, uint64_t logical, uint64_t physical, uint64_t count, uint32_t flags) except -1
    cdef uint32_t _without(self, uint32_t place, uint32_t at, uint32_t n) noexcept
    cdef uint64_t _carve_leaves(self, uint32_t li, uint64_t end, _Carved carved) except 0
    cdef list _carve(self, uint64_t logical, uint64_t count, list pieces)


cdef class RunSet(RunMap):
    cpdef add(self, uint64_t start, uint64_t count)
