# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""How many pins cover each block of an image, compiled. `split` decides what a freed block becomes: idle or busy.

A map of runs, each with its count, on the engine of runs.pyx: neighbours with the same count are one run. So a pin of a run
costs a search or two however long it is, and memory is that of the pins, not of the image or of what they cover.
"""

from libc.stdint cimport uint32_t, uint64_t

from daxfs.core.runs cimport RunMap, dx_extent, dx_find, dx_next


cdef class PinCounts:
    """How many pins cover each block; `size` is how many blocks the image has."""

    cdef RunMap _map
    cdef readonly uint64_t size

    def __cinit__(self, uint64_t blocks, uint32_t leaf_capacity=168):
        self._map = RunMap(leaf_capacity)
        self.size = blocks

    @property
    def pinned(self):
        """Blocks with a count."""
        return self._map.m.blocks

    cdef int _range(self, uint64_t start, uint64_t count) except -1:
        if start > self.size or self.size - start < count:
            raise ValueError(f"blocks {start}+{count} are outside the image")
        return 0

    def count(self, uint64_t block):
        cdef const dx_extent *e
        self._range(block, 1)
        e = dx_find(&self._map.m, block, NULL, NULL)
        return e.flags if e != NULL and e.logical <= block else 0

    def any(self, uint64_t start, uint64_t count):
        """Whether any block of a run is pinned."""
        cdef const dx_extent *e
        self._range(start, count)
        e = dx_find(&self._map.m, start, NULL, NULL)
        return e != NULL and e.logical < start + count

    def add(self, list runs):
        """One more pin on all blocks of the runs."""
        cdef uint64_t start, count
        for start, count in runs:
            self._range(start, count)
        for start, count in runs:
            self._add(start, count)

    cdef int _add(self, uint64_t start, uint64_t count) except -1:
        cdef uint64_t end = start + count, at, n
        cdef uint32_t pins
        cdef const dx_extent *e = dx_find(&self._map.m, start, NULL, NULL)
        cdef list pieces
        if e == NULL or e.logical >= end:
            self._map._insert(start, start, count, 1)
            return 0
        pieces = []
        self._map._carve(start, count, pieces)
        for at, _, n, pins in pieces:
            if start < at:
                self._map._insert(start, start, at - start, 1)
            self._map._insert(at, at, n, pins + 1)
            start = at + n
        if start < end:
            self._map._insert(start, start, end - start, 1)
        return 0

    def drop(self, list runs):
        """One pin fewer; returns the runs of which no pin is left. ValueError if a block has none."""
        cdef uint64_t start, count, at, n, end, first
        cdef uint32_t pins
        cdef list idle = []
        cdef list pieces
        for start, count in runs:
            self._range(start, count)
            self._must_cover(start, start + count)
        for start, count in runs:
            pieces = []
            self._map._carve(start, count, pieces)
            first = end = 0  # of idle pieces in a row
            for at, _, n, pins in pieces:
                if pins > 1:
                    self._map._insert(at, at, n, pins - 1)
                elif end > first and end == at:
                    end += n
                else:
                    if end > first:
                        idle.append((first, end - first))
                    first, end = at, at + n
            if end > first:
                idle.append((first, end - first))
        return idle

    cdef int _must_cover(self, uint64_t at, uint64_t end) except -1:
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e = dx_find(&self._map.m, at, &li, &i)
        while at < end:
            if e == NULL or e.logical > at:
                raise ValueError(f"block {at} is not pinned")
            at = e.logical + e.count
            e = dx_next(&self._map.m, &li, &i)
        return 0

    def split(self, list runs):
        """The runs as (idle, pinned): those without a pin, and those with."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t start, count, end, hi, first
        cdef const dx_extent *e
        cdef list idle = []
        cdef list pinned = []
        if self._map.m.extents == 0:
            return list(runs), pinned
        for start, count in runs:
            self._range(start, count)
            end = start + count
            e = dx_find(&self._map.m, start, &li, &i)
            while start < end:
                if e == NULL or e.logical >= end:
                    idle.append((start, end - start))
                    break
                if start < e.logical:
                    idle.append((start, e.logical - start))
                    start = e.logical
                first = start
                while e != NULL and e.logical <= start and start < end:  # pinned in a row, by however many
                    hi = e.logical + e.count
                    start = hi if hi < end else end
                    if hi <= end:
                        e = dx_next(&self._map.m, &li, &i)
                pinned.append((first, start - first))
        return idle, pinned

    def check(self):
        self._map.check()
        for start, physical, count, pins in self._map:
            if start != physical or pins == 0 or start + count > self.size:
                raise ValueError(f"blocks {start}+{count} cannot have {pins} pins")
