# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Ordered runs of blocks, compiled: the engine of extent maps, and sets of runs (free space, busy extents).

A sorted array of leaves, each a sorted array of extents that never overlap (extents.h). A file's map has extents
logical -> physical (extents.pyx); a set of runs is a map of the image onto itself. A change costs a binary search and the
shift of one leaf, whatever the size of the map.

Rules: extents never overlap, neighbours that could be one are one (within a leaf and across leaves, up to
EXTENT_COUNT_MAX blocks), no leaf is empty. `check()` proves it. Nothing here touches media.
Arguments come from callers that have checked them; a broken precondition raises ValueError and changes nothing.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

cdef uint64_t COUNT_MAX = 0xFFFFFFFF


cdef class RunMap:
    """The engine: place, remove, look up. `leaf_capacity` is how many extents a leaf holds."""

    def __cinit__(self, uint32_t leaf_capacity=168, uint32_t block_shift=12):
        if leaf_capacity < 4:
            raise ValueError("a leaf holds at least 4 extents")
        memset(&self.m, 0, sizeof(self.m))
        self.m.block_shift = block_shift
        self.leaf_capacity = leaf_capacity
        self.dropped_blocks = []

    def __dealloc__(self):
        self._free()

    cdef void _free(self) noexcept:
        cdef uint32_t i
        for i in range(self.m.nleaves):
            free(self.m.leaves[i].e)
        free(self.m.leaves)
        self.m.leaves = NULL
        self.m.nleaves = self.m.cap = 0
        self.m.extents = self.m.blocks = 0

    def clear(self):
        """Forget all extents, and the leaves that were dropped."""
        self._free()
        self.dropped_blocks = []

    def __len__(self):
        return self.m.extents

    @property
    def blocks(self):
        """How many blocks the extents hold."""
        return self.m.blocks

    # -- leaves --

    cdef dx_leaf *_new_leaf(self, uint32_t at) except NULL:
        cdef dx_leaf *grown
        cdef uint32_t cap
        if self.m.nleaves == self.m.cap:
            cap = self.m.cap * 2 if self.m.cap else 1
            grown = <dx_leaf *>realloc(self.m.leaves, cap * sizeof(dx_leaf))
            if grown == NULL:
                raise MemoryError()
            self.m.leaves = grown
            self.m.cap = cap
        memmove(&self.m.leaves[at + 1], &self.m.leaves[at], (self.m.nleaves - at) * sizeof(dx_leaf))
        memset(&self.m.leaves[at], 0, sizeof(dx_leaf))
        self.m.leaves[at].dirty = 1
        self.m.nleaves += 1
        return &self.m.leaves[at]

    cdef int _room(self, dx_leaf *leaf, uint32_t n) except -1:
        """Memory for `n` extents in the leaf."""
        cdef dx_extent *grown
        cdef uint32_t cap = leaf.cap if leaf.cap else 2
        while cap < n:
            cap *= 2
        if cap > self.leaf_capacity:
            cap = self.leaf_capacity
        if cap > leaf.cap:
            grown = <dx_extent *>realloc(leaf.e, cap * sizeof(dx_extent))
            if grown == NULL:
                raise MemoryError()
            leaf.e = grown
            leaf.cap = cap
        return 0

    cdef int _drop_leaf(self, uint32_t at) except -1:
        cdef dx_leaf *leaf = &self.m.leaves[at]
        if leaf.block:
            self.dropped_blocks.append(leaf.block)
        free(leaf.e)
        self.m.nleaves -= 1
        memmove(leaf, leaf + 1, (self.m.nleaves - at) * sizeof(dx_leaf))
        return 0

    cdef int _place(self, uint32_t li, uint32_t i, uint64_t logical, uint64_t physical, uint32_t count,
                    uint32_t flags) except -1:
        """Put an extent before position (li, i); splits a full leaf."""
        cdef dx_leaf *leaf
        cdef dx_leaf *right
        cdef uint32_t half
        if self.m.nleaves == 0:
            self._new_leaf(0)
            li = i = 0
        if self.m.leaves[li].n == self.leaf_capacity:
            if i == self.leaf_capacity and li + 1 == self.m.nleaves:
                self._new_leaf(li + 1)  # appended to: leave the full leaf full
                li += 1
                i = 0
            else:
                half = self.leaf_capacity // 2
                right = self._new_leaf(li + 1)
                leaf = &self.m.leaves[li]
                self._room(right, leaf.n - half)
                memcpy(right.e, leaf.e + half, (leaf.n - half) * sizeof(dx_extent))
                right.n = leaf.n - half
                leaf.n = half
                leaf.dirty = 1
                if i > half:
                    li += 1
                    i -= half
        leaf = &self.m.leaves[li]
        self._room(leaf, leaf.n + 1)
        memmove(leaf.e + i + 1, leaf.e + i, (leaf.n - i) * sizeof(dx_extent))
        leaf.e[i].logical = logical
        leaf.e[i].physical = physical
        leaf.e[i].count = count
        leaf.e[i].flags = flags
        leaf.n += 1
        leaf.dirty = 1
        self.m.extents += 1
        return 0

    cdef int _remove(self, uint32_t li, uint32_t i) except -1:
        """Take out extent (li, i)."""
        cdef dx_leaf *leaf = &self.m.leaves[li]
        leaf.n -= 1
        memmove(leaf.e + i, leaf.e + i + 1, (leaf.n - i) * sizeof(dx_extent))
        leaf.dirty = 1
        self.m.extents -= 1
        if leaf.n == 0:
            self._drop_leaf(li)
        return 0

    cdef int _fold(self, uint32_t li) except -1:
        """Join a leaf that has become small with its neighbour, so that chains stay short."""
        cdef dx_leaf *left
        cdef dx_leaf *right
        if li >= self.m.nleaves or self.m.leaves[li].n * 4 >= self.leaf_capacity:
            return 0
        if li + 1 == self.m.nleaves:
            if li == 0:
                return 0
            li -= 1
        left = &self.m.leaves[li]
        right = left + 1
        if (left.n + right.n) * 4 > self.leaf_capacity * 3:
            return 0
        self._room(left, left.n + right.n)
        memcpy(left.e + left.n, right.e, right.n * sizeof(dx_extent))
        left.n += right.n
        left.dirty = 1
        self._drop_leaf(li + 1)
        return 0

    # -- runs --

    cdef int _insert(self, uint64_t logical, uint64_t physical, uint64_t count, uint32_t flags) except -1:
        cdef uint32_t li = 0, i = 0, pl = 0, pi = 0, take
        cdef const dx_extent *following
        cdef dx_extent *before = NULL
        cdef dx_extent *after = NULL
        cdef dx_leaf *leaf
        while count:
            take = <uint32_t>(count if count <= COUNT_MAX else COUNT_MAX)
            following = dx_find(&self.m, logical, &li, &i)
            if following == NULL:
                if self.m.nleaves:
                    li = self.m.nleaves - 1
                    i = self.m.leaves[li].n
            elif following.logical < logical + take:
                raise ValueError(f"blocks {logical}+{take} are mapped already")
            before = after = NULL
            if following != NULL:
                after = &self.m.leaves[li].e[i]
            if i > 0:
                pl, pi = li, i - 1
                before = &self.m.leaves[pl].e[pi]
            elif li > 0:
                pl = li - 1
                pi = self.m.leaves[pl].n - 1
                before = &self.m.leaves[pl].e[pi]
            if before != NULL and not (before.flags == flags and before.logical + before.count == logical
                                       and before.physical + before.count == physical
                                       and <uint64_t>before.count + take <= COUNT_MAX):
                before = NULL
            if after != NULL and not (after.flags == flags and logical + take == after.logical
                                      and physical + take == after.physical
                                      and <uint64_t>after.count + take <= COUNT_MAX):
                after = NULL
            if before != NULL:
                before.count += take
                leaf = &self.m.leaves[pl]
                leaf.dirty = 1
                if after != NULL and <uint64_t>before.count + after.count <= COUNT_MAX:
                    before.count += after.count
                    self._remove(li, i)
            elif after != NULL:
                after.logical -= take
                after.physical -= take
                after.count += take
                leaf = &self.m.leaves[li]
                leaf.dirty = 1
            else:
                if i == 0 and li > 0 and self.m.leaves[li - 1].n < self.leaf_capacity:
                    li -= 1
                    i = self.m.leaves[li].n
                self._place(li, i, logical, physical, take, flags)
            self.m.blocks += take
            logical += take
            physical += take
            count -= take
        return 0

    cdef list _carve(self, uint64_t logical, uint64_t count, list pieces):
        """Unmap a range. Returns the (physical, count) that were mapped, adjacent ones joined; `pieces`, if a list, gets
        each as (logical, physical, count, flags)."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = logical + count, lo, hi, start = 0, length = 0
        cdef dx_extent e
        cdef dx_extent *at
        cdef list out = []
        while dx_find(&self.m, logical, &li, &i) != NULL:
            at = &self.m.leaves[li].e[i]
            e = at[0]
            if e.logical >= end:
                break
            lo = e.logical if e.logical > logical else logical
            hi = e.logical + e.count
            if hi > end:
                hi = end
            if pieces is not None:
                pieces.append((lo, e.physical + (lo - e.logical), hi - lo, e.flags))
            if length and start + length == e.physical + (lo - e.logical):
                length += hi - lo
            else:
                if length:
                    out.append((start, length))
                start = e.physical + (lo - e.logical)
                length = hi - lo
            self.m.blocks -= hi - lo
            self.m.leaves[li].dirty = 1
            if lo == e.logical and hi == e.logical + e.count:
                self._remove(li, i)
            elif lo == e.logical:
                at.logical = hi
                at.physical += hi - lo
                at.count -= <uint32_t>(hi - lo)
            else:
                at.count = <uint32_t>(lo - e.logical)
                if hi < e.logical + e.count:
                    self._place(li, i + 1, hi, e.physical + (hi - e.logical),
                                <uint32_t>(e.logical + e.count - hi), e.flags)
            logical = hi
            if logical >= end:
                break
        if length:
            out.append((start, length))
        if self.m.nleaves:
            if dx_find(&self.m, end, &li, &i) == NULL:
                li = self.m.nleaves - 1
            self._fold(li)
        return out

    def __iter__(self):
        """All extents in order as (logical, physical, count, flags)."""
        cdef uint32_t li, i
        cdef dx_extent e
        cdef list out = []
        for li in range(self.m.nleaves):
            for i in range(self.m.leaves[li].n):
                e = self.m.leaves[li].e[i]
                out.append((e.logical, e.physical, e.count, e.flags))
        return iter(out)

    def check(self):
        """Raise ValueError if the structure breaks one of its rules."""
        cdef uint32_t li, i
        cdef uint64_t extents = 0, blocks = 0
        cdef dx_extent *e
        cdef dx_extent *last = NULL
        for li in range(self.m.nleaves):
            if self.m.leaves[li].n == 0 or self.m.leaves[li].n > self.leaf_capacity:
                raise ValueError(f"leaf {li} holds {self.m.leaves[li].n} extents")
            for i in range(self.m.leaves[li].n):
                e = &self.m.leaves[li].e[i]
                if e.count == 0:
                    raise ValueError(f"empty extent at {e.logical}")
                if last != NULL and last.logical + last.count > e.logical:
                    raise ValueError(f"extents overlap at {e.logical}")
                if (last != NULL and last.logical + last.count == e.logical and last.flags == e.flags
                        and last.physical + last.count == e.physical
                        and <uint64_t>last.count + e.count <= COUNT_MAX):
                    raise ValueError(f"neighbours at {e.logical} are not joined")
                extents += 1
                blocks += e.count
                last = e
        if extents != self.m.extents or blocks != self.m.blocks:
            raise ValueError(f"counts {self.m.extents}, {self.m.blocks} are not {extents}, {blocks}")


cdef class RunSet(RunMap):
    """A set of blocks of the image, as runs: free space, or busy extents."""

    cpdef add(self, uint64_t start, uint64_t count):
        """Add a run that is not in the set. ValueError if any of it is."""
        cdef const dx_extent *e = dx_find(&self.m, start, NULL, NULL)
        if count == 0 or (e != NULL and e.logical < start + count):
            raise ValueError(f"blocks {start}+{count} are empty or in the set already")
        self._insert(start, start, count, 0)

    def add_all(self, list runs):
        """Add runs, each as `add` does."""
        cdef uint64_t start, count
        for start, count in runs:
            self.add(start, count)

    def remove(self, uint64_t start, uint64_t count):
        """Take out whatever of a run is in the set; returns that, as runs."""
        return self._carve(start, count, None)

    def holds(self, uint64_t start, uint64_t count):
        """Whether any block of a run is in the set."""
        cdef const dx_extent *e = dx_find(&self.m, start, NULL, NULL)
        return e != NULL and e.logical < start + count

    def within(self, uint64_t start, uint64_t count):
        """What of a run is in the set, as runs."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = start + count, lo, hi
        cdef const dx_extent *e = dx_find(&self.m, start, &li, &i)
        cdef list out = []
        while e != NULL and e.logical < end:
            lo = e.logical if e.logical > start else start
            hi = e.logical + e.count
            if hi > end:
                hi = end
            out.append((lo, hi - lo))
            e = dx_next(&self.m, &li, &i)
        return out

    def runs(self, uint64_t start=0, uint64_t limit=0xFFFFFFFFFFFFFFFF):
        """At most `limit` runs from the first that ends behind `start`, as (start, count)."""
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e = dx_find(&self.m, start, &li, &i)
        cdef list out = []
        while e != NULL and limit:
            out.append((e.logical, e.count))
            limit -= 1
            e = dx_next(&self.m, &li, &i)
        return out

    def load(self, const uint64_t[:] starts, const uint64_t[:] counts):
        """Fill an empty set from sorted arrays of runs."""
        cdef Py_ssize_t i
        for i in range(starts.shape[0]):
            self._insert(starts[i], starts[i], counts[i], 0)
