# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Ordered runs of blocks, compiled: the extent map of a file, and sets of runs (free space, busy extents).

One engine for both: a sorted array of leaves, each a sorted array of extents that never overlap (extents.h). A file's map has
extents logical -> physical; a set of runs is a map of the image onto itself. A change costs a binary search and the shift of
one leaf, whatever the size of the map. A leaf of a file's map is a leaf on media, so a transaction stores only the leaves
that changed.

Rules: extents never overlap, neighbours that could be one are one (within a leaf and across leaves, up to
EXTENT_COUNT_MAX blocks), no leaf is empty. `check()` proves it. Nothing here touches media: inode.py stores leaves.
Arguments come from callers that have checked them; a broken precondition raises ValueError and changes nothing.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

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
        uint64_t most
        uint32_t dirty
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
    const dx_extent *dx_find(const dx_map *m, uint64_t logical, uint32_t *leaf_at, uint32_t *extent_at)
    const dx_extent *dx_next(const dx_map *m, uint32_t *leaf_at, uint32_t *extent_at)

HOT_READ = DX_HOT_READ
HOT_WRITE = DX_HOT_WRITE

cdef uint64_t COUNT_MAX = 0xFFFFFFFF


cdef class RunMap:
    """The engine: place, remove, look up. `leaf_capacity` is how many extents a leaf holds."""

    cdef dx_map m
    cdef uint32_t leaf_capacity
    cdef list dropped_blocks

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
                right.most = leaf.most
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
        if count > leaf.most:
            leaf.most = count
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
        if right.most > left.most:
            left.most = right.most
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
                    if before.count > leaf.most:
                        leaf.most = before.count
                    self._remove(li, i)
                elif before.count > leaf.most:
                    leaf.most = before.count
            elif after != NULL:
                after.logical -= take
                after.physical -= take
                after.count += take
                leaf = &self.m.leaves[li]
                leaf.dirty = 1
                if after.count > leaf.most:
                    leaf.most = after.count
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
                if e.count > self.m.leaves[li].most:
                    raise ValueError(f"extent at {e.logical} is longer than its leaf believes")
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


cdef class ExtentMap(RunMap):
    """The blocks of one file. `pointer` is the address of the `dx_map` that the native session reads."""

    @property
    def pointer(self):
        return <uintptr_t>&self.m

    @property
    def size(self):
        """File size in bytes; the only copy in memory."""
        return self.m.size

    @size.setter
    def size(self, uint64_t value):
        self.m.size = value

    @property
    def hot(self):
        """What the native session may do by itself: HOT_READ, HOT_WRITE."""
        return self.m.hot

    @hot.setter
    def hot(self, uint32_t value):
        self.m.hot = value

    def attach(self, uintptr_t image, uintptr_t times):
        """Addresses of the mapped image and of the inode's time words; 0 detaches."""
        self.m.base = <uint8_t *>image
        self.m.times = <uint64_t *>times

    def find(self, uint64_t logical):
        """The extent that holds a block, as (logical, physical, count, unwritten), or None."""
        cdef const dx_extent *e = dx_find(&self.m, logical, NULL, NULL)
        if e == NULL or e.logical > logical:
            return None
        return e.logical, e.physical, e.count, bool(e.flags & DX_UNWRITTEN)

    def overlaps(self, uint64_t logical, uint64_t count):
        """What is mapped in a range: a list of (logical, physical, count, unwritten), clipped to it."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = logical + count, lo, hi
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        cdef list out = []
        while e != NULL and e.logical < end:
            lo = e.logical if e.logical > logical else logical
            hi = e.logical + e.count
            if hi > end:
                hi = end
            out.append((lo, e.physical + (lo - e.logical), hi - lo, bool(e.flags & DX_UNWRITTEN)))
            e = dx_next(&self.m, &li, &i)
        return out

    def extents_from(self, uint64_t logical, uint32_t limit):
        """At most `limit` whole extents from the one that holds `logical` on, as `overlaps` gives them."""
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        cdef list out = []
        while e != NULL and limit:
            out.append((e.logical, e.physical, e.count, bool(e.flags & DX_UNWRITTEN)))
            limit -= 1
            e = dx_next(&self.m, &li, &i)
        return out

    def gaps(self, uint64_t logical, uint64_t count):
        """The holes in a range: a list of (logical, count)."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = logical + count
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        cdef list out = []
        while logical < end:
            if e == NULL or e.logical >= end:
                out.append((logical, end - logical))
                break
            if e.logical > logical:
                out.append((logical, e.logical - logical))
            logical = e.logical + e.count
            e = dx_next(&self.m, &li, &i)
        return out

    def written(self, uint64_t logical, uint64_t count):
        """Whether the whole range is mapped and written: it can be overwritten in place."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = logical + count
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        while logical < end:
            if e == NULL or e.logical > logical or e.flags & DX_UNWRITTEN:
                return False
            logical = e.logical + e.count
            e = dx_next(&self.m, &li, &i)
        return True

    def blocks_from(self, uint64_t logical):
        """Whether anything is mapped at or behind a block."""
        return dx_find(&self.m, logical, NULL, NULL) != NULL

    def next_data(self, uint64_t logical):
        """First block at or behind `logical` that is written, or None."""
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        while e != NULL:
            if not e.flags & DX_UNWRITTEN:
                return e.logical if e.logical > logical else logical
            e = dx_next(&self.m, &li, &i)
        return None

    def next_hole(self, uint64_t logical):
        """First block at or behind `logical` that is not written."""
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        while e != NULL and e.logical <= logical and not e.flags & DX_UNWRITTEN:
            logical = e.logical + e.count
            e = dx_next(&self.m, &li, &i)
        return logical

    def insert(self, uint64_t logical, uint64_t physical, uint64_t count, bint unwritten=False):
        """Map a hole. ValueError if any of it is mapped."""
        cdef const dx_extent *e = dx_find(&self.m, logical, NULL, NULL)
        if count == 0 or (e != NULL and e.logical < logical + count):
            raise ValueError(f"blocks {logical}+{count} are empty or mapped already")
        self._insert(logical, physical, count, DX_UNWRITTEN if unwritten else 0)

    def carve(self, uint64_t logical, uint64_t count):
        """Unmap a range; returns the image's runs that it held, as (start, count)."""
        return self._carve(logical, count, None)

    def convert(self, uint64_t logical, uint64_t count, bint unwritten):
        """Make all that is mapped in a range written or unwritten."""
        cdef list pieces = []
        cdef uint32_t flags = DX_UNWRITTEN if unwritten else 0
        self._carve(logical, count, pieces)
        for at, physical, length, _ in pieces:
            self._insert(at, physical, length, flags)

    # -- to and from media (inode.py) --

    def append_leaf(self, const uint8_t[:] data, uint32_t count, uint64_t block, uint64_t next_block, uint64_t limit):
        """Load a leaf (or the inline extents: block 0) behind those loaded so far. `limit`: blocks of the image.
        ValueError if it is not sorted, overlaps, is empty, or leaves the image."""
        cdef dx_leaf *leaf
        cdef uint32_t i
        cdef uint64_t last = 0
        cdef dx_extent *e
        if count == 0:
            if block:
                raise ValueError("empty leaf")
            return
        if count > self.leaf_capacity or <uint64_t>data.shape[0] < count * sizeof(dx_extent):
            raise ValueError(f"{count} extents do not fit a leaf")
        if self.m.nleaves:
            leaf = &self.m.leaves[self.m.nleaves - 1]
            last = leaf.e[leaf.n - 1].logical + leaf.e[leaf.n - 1].count
        leaf = self._new_leaf(self.m.nleaves)
        try:
            self._room(leaf, count)
            memcpy(leaf.e, &data[0], count * sizeof(dx_extent))
            leaf.n = count
            for i in range(count):
                e = &leaf.e[i]
                if e.logical < last or e.count == 0 or e.flags & ~<uint32_t>DX_UNWRITTEN or e.logical >> 52:
                    raise ValueError(f"extent {i} is out of order, empty or strange")
                if e.physical < 2 or e.physical >= limit or limit - e.physical < e.count:
                    raise ValueError(f"extent {i} lies outside the image")
                last = e.logical + e.count
                if e.count > leaf.most:
                    leaf.most = e.count
        except ValueError:
            free(leaf.e)
            self.m.nleaves -= 1
            raise
        for i in range(count):
            self.m.blocks += leaf.e[i].count
        self.m.extents += count
        leaf.block = block
        leaf.next = next_block
        leaf.dirty = 0

    @property
    def leaves(self):
        """How many leaves there are in memory; a map of few extents has one, which is inline (block 0)."""
        return self.m.nleaves

    def leaf(self, uint32_t at):
        """Leaf `at`: (block on media or 0, extents in it, their bytes)."""
        if at >= self.m.nleaves:
            raise IndexError(at)
        cdef dx_leaf *leaf = &self.m.leaves[at]
        return leaf.block, leaf.n, (<const uint8_t *>leaf.e)[:leaf.n * sizeof(dx_extent)]

    def leaf_blocks(self):
        """Blocks on media of all leaves."""
        cdef uint32_t i
        return [self.m.leaves[i].block for i in range(self.m.nleaves) if self.m.leaves[i].block]

    def unplaced(self):
        """Leaves that have no block on media yet."""
        cdef uint32_t i
        return [i for i in range(self.m.nleaves) if not self.m.leaves[i].block]

    def place_leaf(self, uint32_t at, uint64_t block):
        """Give leaf `at` its block (0: inline)."""
        self.m.leaves[at].block = block
        self.m.leaves[at].dirty = 1

    def stale(self):
        """Leaves to store: (index, next block), because they changed or the leaf behind them moved."""
        cdef uint32_t i
        cdef uint64_t following
        cdef list out = []
        for i in range(self.m.nleaves):
            following = self.m.leaves[i + 1].block if i + 1 < self.m.nleaves else 0
            if self.m.leaves[i].dirty or self.m.leaves[i].next != following:
                out.append((i, following))
        return out

    def stored(self, uint32_t at, uint64_t next_block):
        """Leaf `at` is on media now."""
        self.m.leaves[at].dirty = 0
        self.m.leaves[at].next = next_block

    def dropped(self):
        """Blocks of leaves that went since the last call; the caller frees them."""
        out = self.dropped_blocks
        self.dropped_blocks = []
        return out


cdef class RunSet(RunMap):
    """A set of blocks of the image, as runs: free space, or busy extents."""

    def add(self, uint64_t start, uint64_t count):
        """Add a run that is not in the set. ValueError if any of it is."""
        cdef const dx_extent *e = dx_find(&self.m, start, NULL, NULL)
        if count == 0 or (e != NULL and e.logical < start + count):
            raise ValueError(f"blocks {start}+{count} are empty or in the set already")
        self._insert(start, start, count, 0)

    def remove(self, uint64_t start, uint64_t count):
        """Take out whatever of a run is in the set; returns that, as runs."""
        return self._carve(start, count, None)

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

    cdef bint _find_run(self, uint64_t want, uint64_t goal, uint64_t *start, uint64_t *count):
        """A run of at least `want` blocks: at the goal, else the first behind it, else the first of all."""
        cdef uint32_t li = 0, i = 0, k, first, step
        cdef uint64_t most
        cdef dx_leaf *leaf
        cdef const dx_extent *e = dx_find(&self.m, goal, &li, &i)
        if e == NULL:
            li = i = 0
        elif e.logical <= goal and e.logical + e.count - goal >= want:
            start[0] = goal
            count[0] = e.logical + e.count - goal
            return True
        first = li
        for step in range(self.m.nleaves + 1):
            li = (first + step) % self.m.nleaves
            leaf = &self.m.leaves[li]
            if leaf.most < want:
                continue
            most = 0
            for k in range(leaf.n):
                if leaf.e[k].count >= want and not (step == 0 and k < i):
                    start[0] = leaf.e[k].logical
                    count[0] = leaf.e[k].count
                    return True
                if leaf.e[k].count > most:
                    most = leaf.e[k].count
            if not (step == 0 and i):
                leaf.most = most
        return False

    def take(self, uint64_t want, uint64_t goal):
        """Take `want` blocks out of the set, in one run at or behind the goal if there is one, else in as many as it needs,
        in order from the goal on. Returns runs, or None (and changes nothing) if the set holds fewer."""
        cdef uint64_t start = 0, count = 0
        cdef uint32_t li = 0, i = 0
        cdef const dx_extent *e
        cdef list out = []
        if want == 0 or want > self.m.blocks:
            return None if want else []
        if self._find_run(want, goal, &start, &count):
            self._carve(start, want, None)
            return [(start, want)]
        while want:
            e = dx_find(&self.m, goal, &li, &i)
            if e == NULL:
                goal = 0
                continue
            start = e.logical if e.logical > goal else goal
            count = e.logical + e.count - start
            if count > want:
                count = want
            self._carve(start, count, None)
            out.append((start, count))
            goal = start + count
            want -= count
        return out


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
