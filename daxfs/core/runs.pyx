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


cdef class _Carved:
    """What was taken out of a map: runs of the image, adjacent ones joined, and `pieces`, if a list, one by one."""

    def __cinit__(self, list pieces):
        self.runs = []
        self.pieces = pieces

    cdef int add(self, uint64_t logical, uint64_t physical, uint64_t count, uint32_t flags) except -1:
        if self.pieces is not None:
            self.pieces.append((logical, physical, count, flags))
        if self.start + self.length == physical and self.length:
            self.length += count
        else:
            self.end()
            self.start, self.length = physical, count
        return 0

    cdef list end(self):
        if self.length:
            self.runs.append((self.start, self.length))
        self.length = 0
        return self.runs


cdef class RunMap:
    """The engine: place, remove, look up. `leaf_capacity` is how many extents a leaf holds."""

    # Leaves [first, behind) are all that may differ from what is on media, so that nobody looks at the others.

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
        self.first = self.behind = 0

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

    cdef void _touch(self, uint32_t at) noexcept:
        """Leaf `at` is changed."""
        self.m.leaves[at].dirty = 1
        self._widen(at)

    cdef void _widen(self, uint32_t at) noexcept:
        if self.first == self.behind:
            self.first, self.behind = at, at + 1
        elif at < self.first:
            self.first = at
        elif at >= self.behind:
            self.behind = at + 1

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
        self.m.nleaves += 1
        self.first += at < self.first
        self.behind += at < self.behind
        self._touch(at)
        if at:
            self._widen(at - 1)  # whose next is another leaf now
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

    cdef int _drop_leaves(self, uint32_t at, uint32_t n) except -1:
        """Take out `n` leaves."""
        cdef uint32_t i
        for i in range(at, at + n):
            if self.m.leaves[i].block:
                self.dropped_blocks.append(self.m.leaves[i].block)
            free(self.m.leaves[i].e)
        self.m.nleaves -= n
        memmove(&self.m.leaves[at], &self.m.leaves[at + n], (self.m.nleaves - at) * sizeof(dx_leaf))
        self.first = self._without(self.first, at, n)
        self.behind = self._without(self.behind, at, n)
        if at:
            self._widen(at - 1)
        return 0

    cdef uint32_t _without(self, uint32_t place, uint32_t at, uint32_t n) noexcept:
        """Where a place in the array is once `n` leaves have gone from `at` on."""
        return place if place <= at else at if place < at + n else place - n

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
                self._touch(li)
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
        self._touch(li)
        self.m.extents += 1
        return 0

    cdef int _remove(self, uint32_t li, uint32_t i) except -1:
        """Take out extent (li, i)."""
        cdef dx_leaf *leaf = &self.m.leaves[li]
        leaf.n -= 1
        memmove(leaf.e + i, leaf.e + i + 1, (leaf.n - i) * sizeof(dx_extent))
        self._touch(li)
        self.m.extents -= 1
        if leaf.n == 0:
            self._drop_leaves(li, 1)
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
        self._touch(li)
        self._drop_leaves(li + 1, 1)
        return 0

    # -- runs --

    cdef int _insert(self, uint64_t logical, uint64_t physical, uint64_t count, uint32_t flags) except -1:
        cdef uint32_t li = 0, i = 0, pl = 0, pi = 0, take
        cdef const dx_extent *following
        cdef dx_extent *before = NULL
        cdef dx_extent *after = NULL
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
                self._touch(pl)
                if after != NULL and <uint64_t>before.count + after.count <= COUNT_MAX:
                    before.count += after.count
                    self._remove(li, i)
            elif after != NULL:
                after.logical -= take
                after.physical -= take
                after.count += take
                self._touch(li)
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
        cdef uint32_t li = 0, i = 0, k
        cdef uint64_t end = logical + count, hi
        cdef dx_extent e
        cdef dx_extent *at
        cdef dx_leaf *leaf
        cdef _Carved carved = _Carved(pieces)
        while dx_find(&self.m, logical, &li, &i) != NULL:
            leaf = &self.m.leaves[li]
            at = &leaf.e[i]
            if at.logical >= end:
                break
            if i == 0 and at.logical >= logical and leaf.e[leaf.n - 1].logical + leaf.e[leaf.n - 1].count <= end:
                logical = self._carve_leaves(li, end, carved)
                continue
            e = at[0]
            if e.logical > logical:
                logical = e.logical
            hi = e.logical + e.count
            if hi > end:
                hi = end
            carved.add(logical, e.physical + (logical - e.logical), hi - logical, e.flags)
            self.m.blocks -= hi - logical
            self._touch(li)
            if logical == e.logical and hi == e.logical + e.count:
                self._remove(li, i)
            elif logical == e.logical:
                at.logical = hi
                at.physical += hi - logical
                at.count -= <uint32_t>(hi - logical)
            else:
                at.count = <uint32_t>(logical - e.logical)
                if hi < e.logical + e.count:
                    self._place(li, i + 1, hi, e.physical + (hi - e.logical),
                                <uint32_t>(e.logical + e.count - hi), e.flags)
            logical = hi
            if logical >= end:
                break
        if self.m.nleaves:
            if dx_find(&self.m, end, &li, &i) == NULL:
                li = self.m.nleaves - 1
            self._fold(li)
        return carved.end()

    cdef uint64_t _carve_leaves(self, uint32_t li, uint64_t end, _Carved carved) except 0:
        """Take out this leaf and those behind it that end before `end`, all at once; where they end."""
        cdef uint32_t n = 0, i
        cdef dx_leaf *leaf
        cdef dx_extent *e = NULL
        while li + n < self.m.nleaves:
            leaf = &self.m.leaves[li + n]
            if leaf.e[leaf.n - 1].logical + leaf.e[leaf.n - 1].count > end:
                break
            for i in range(leaf.n):
                e = &leaf.e[i]
                carved.add(e.logical, e.physical, e.count, e.flags)
                self.m.blocks -= e.count
            self.m.extents -= leaf.n
            n += 1
        end = e.logical + e.count
        self._drop_leaves(li, n)
        return end

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

    def first_held(self, list runs):
        """The first of these runs of which any block is in the set; None if there is none."""
        cdef uint64_t start, count
        cdef const dx_extent *e
        if self.m.nleaves:
            for run in runs:
                start, count = run
                e = dx_find(&self.m, start, NULL, NULL)
                if e != NULL and e.logical < start + count:
                    return run
        return None

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


def first_astray(list ordered, uint64_t first, uint64_t end):
    """The first of some runs, in order, that overlaps the one before it or leaves [first, end); None if there is none."""
    cdef uint64_t start, count
    for run in ordered:
        start, count = run
        if start < first or start > end or end - start < count:
            return run
        first = start + count
    return None
