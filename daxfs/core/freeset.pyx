# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Free space as a set of runs that are found by place and by length, compiled.

Beside the runs in order of place stands a second map, of keys made of length and start, so that the shortest run that is
long enough, and the longest of all, cost one search, however many runs there are. It is made at the first such question
(a read-only mount never asks) and kept from then on: 24 bytes a run more, and a change costs four searches instead of one.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort

from daxfs.core.runs cimport RunMap, RunSet, dx_extent, dx_find, dx_leaf, dx_next

cdef uint64_t _LENGTH_MAX = (1 << 24) - 1, _START = (<uint64_t>1 << 40) - 1


cdef class FreeSet(RunSet):
    """Blocks of the image, as runs. `best`, `longest`: by length."""

    cdef RunMap _lengths
    cdef bint _known  # whether `_lengths` is kept

    def __cinit__(self, uint32_t leaf_capacity=168):
        self._lengths = RunMap(leaf_capacity)

    cdef int _index(self, uint64_t start, uint64_t end, bint there) except -1:
        """Enter the lengths of the runs that touch [start, end), or take them out."""
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e
        if not self._known:
            return 0
        e = dx_find(&self.m, start - 1 if start else 0, &li, &i)
        while e != NULL and e.logical <= end:
            if there:
                self._lengths._insert(_key(e), 0, 1, 0)
            else:
                self._lengths._carve(_key(e), 1, None)
            e = dx_next(&self.m, &li, &i)
        return 0

    cdef int _learn(self) except -1:
        """Make the map of lengths."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t n = 0, at
        cdef uint64_t *keys
        cdef const dx_extent *e = dx_find(&self.m, 0, &li, &i)
        if self._known:
            return 0
        keys = <uint64_t *>malloc(self.m.extents * sizeof(uint64_t) + 1)
        if keys == NULL:
            raise MemoryError()
        try:
            while e != NULL:
                keys[n] = _key(e)
                n += 1
                e = dx_next(&self.m, &li, &i)
            qsort(keys, n, sizeof(uint64_t), _compare)
            for at in range(n):
                self._lengths._insert(keys[at], 0, 1, 0)
        finally:
            free(keys)
        self._known = True
        return 0

    def clear(self):
        RunSet.clear(self)
        self._lengths.clear()
        self._known = False

    def load(self, const uint64_t[:] starts, const uint64_t[:] counts):
        cdef Py_ssize_t i
        for i in range(starts.shape[0]):
            _must_fit(starts[i], counts[i])
        self._lengths.clear()
        self._known = False
        RunSet.load(self, starts, counts)

    cpdef add(self, uint64_t start, uint64_t count):
        _must_fit(start, count)
        if count == 0 or self.holds(start, count):
            raise ValueError(f"blocks {start}+{count} are empty or in the set already")
        self._index(start, start + count, False)
        self._insert(start, start, count, 0)
        self._index(start, start + count, True)

    def remove(self, uint64_t start, uint64_t count):
        self._index(start, start + count, False)
        found = self._carve(start, count, None)
        self._index(start, start + count, True)
        return found

    def at(self, uint64_t block):
        """How many blocks in a row, this one the first, are in the set."""
        cdef const dx_extent *e = dx_find(&self.m, block, NULL, NULL)
        return e.logical + e.count - block if e != NULL and e.logical <= block else 0

    def best(self, uint64_t want):
        """Where the shortest run of at least so many blocks begins, the first of equals; None without one. Beyond 2**24
        blocks, any that is long enough."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t key = (want if want < _LENGTH_MAX else _LENGTH_MAX) << 40
        cdef const dx_extent *e
        self._learn()
        e = dx_find(&self._lengths.m, key, &li, &i)
        while e != NULL:
            if want < _LENGTH_MAX or self.at(e.logical & _START) >= want:
                return e.logical & _START
            e = dx_next(&self._lengths.m, &li, &i)
        return None

    def longest(self):
        """The longest run (beyond 2**24 blocks: one of those) as (start, count). ValueError if the set is empty."""
        cdef const dx_leaf *leaf
        self._learn()
        if self.m.nleaves == 0:
            raise ValueError("an empty set has no longest run")
        leaf = &self._lengths.m.leaves[self._lengths.m.nleaves - 1]
        start = leaf.e[leaf.n - 1].logical & _START
        return start, self.at(start)

    def check(self):
        RunSet.check(self)
        self._lengths.check()
        if self._known and [key for key, _, _, _ in self._lengths] != sorted([
            min(count, _LENGTH_MAX) << 40 | start for start, count in self.runs()
        ]):
            raise ValueError("the lengths are not those of the runs")


cdef int _must_fit(uint64_t start, uint64_t count) except -1:
    if start > _START or _START - start < count:
        raise ValueError(f"blocks {start}+{count} are behind the largest image")
    return 0


cdef inline uint64_t _key(const dx_extent *e) noexcept:
    return <uint64_t>(e.count if e.count < _LENGTH_MAX else _LENGTH_MAX) << 40 | e.logical


cdef int _compare(const void *a, const void *b) noexcept nogil:
    cdef uint64_t one = (<const uint64_t *>a)[0], two = (<const uint64_t *>b)[0]
    return (one > two) - (one < two)
