# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""How many pins cover each block of an image, compiled. `split` decides what a freed block becomes: idle or busy."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef class PinCounts:
    """How many pins cover each block: 4 bytes a block, of which the host gives memory only where pins were."""

    cdef uint32_t *counts
    cdef readonly uint64_t size
    cdef readonly uint64_t pinned  # blocks with a count

    def __cinit__(self, uint64_t blocks):
        self.counts = <uint32_t *>calloc(blocks if blocks else 1, sizeof(uint32_t))
        if self.counts == NULL:
            raise MemoryError()
        self.size = blocks

    def __dealloc__(self):
        free(self.counts)

    cdef int _range(self, uint64_t start, uint64_t count) except -1:
        if start > self.size or self.size - start < count:
            raise ValueError(f"blocks {start}+{count} are outside the image")
        return 0

    def count(self, uint64_t block):
        self._range(block, 1)
        return self.counts[block]

    def any(self, uint64_t start, uint64_t count):
        """Whether any block of a run is pinned."""
        cdef uint64_t b
        self._range(start, count)
        if self.pinned:
            for b in range(start, start + count):
                if self.counts[b]:
                    return True
        return False

    def add(self, list runs):
        """One more pin on all blocks of the runs."""
        cdef uint64_t start, count, b
        for start, count in runs:
            self._range(start, count)
        for start, count in runs:
            for b in range(start, start + count):
                if self.counts[b] == 0:
                    self.pinned += 1
                self.counts[b] += 1

    def drop(self, list runs):
        """One pin fewer; returns the runs of which no pin is left. ValueError if a block has none."""
        cdef uint64_t start, count, b, first, n
        cdef list idle = []
        for start, count in runs:
            self._range(start, count)
            for b in range(start, start + count):
                if self.counts[b] == 0:
                    raise ValueError(f"block {b} is not pinned")
        for start, count in runs:
            first = n = 0
            for b in range(start, start + count):
                self.counts[b] -= 1
                if self.counts[b] == 0:
                    self.pinned -= 1
                    if n == 0:
                        first = b
                    n += 1
                elif n:
                    idle.append((first, n))
                    n = 0
            if n:
                idle.append((first, n))
        return idle

    def split(self, list runs):
        """The runs as (idle, pinned): those without a pin, and those with."""
        cdef uint64_t start, count, b, first
        cdef bint held, now
        cdef list idle = []
        cdef list pinned = []
        if not self.pinned:
            return list(runs), pinned
        for start, count in runs:
            self._range(start, count)
            first = start
            held = self.counts[start] != 0 if count else False
            for b in range(start, start + count):
                now = self.counts[b] != 0
                if now != held:
                    (pinned if held else idle).append((first, b - first))
                    first = b
                    held = now
            if count:
                (pinned if held else idle).append((first, start + count - first))
        return idle, pinned

    def check(self):
        cdef uint64_t b, n = 0
        for b in range(self.size):
            n += self.counts[b] != 0
        if n != self.pinned:
            raise ValueError(f"{self.pinned} blocks are said to be pinned, {n} are")
