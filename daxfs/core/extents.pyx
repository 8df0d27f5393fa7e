# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The extent map of a file, compiled, on the engine of runs.pyx.

A leaf in memory is a leaf on media, so a transaction stores only the leaves that changed; inode.py stores and loads them.
The native session reads the same map (`pointer`): size, extents and what it may do by itself (`hot`) have no second copy.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from daxfs.core.runs cimport (
    DX_HOT_READ, DX_HOT_WRITE, DX_UNWRITTEN, RunMap, dx_extent, dx_find, dx_leaf, dx_next,
)

HOT_READ = DX_HOT_READ
HOT_WRITE = DX_HOT_WRITE


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

    def runs(self, uint64_t logical, uint64_t count):
        """The image's runs behind a range in file order, as (start, count); neighbours are joined, holes left out."""
        cdef uint32_t li = 0, i = 0
        cdef uint64_t end = logical + count, lo, hi, at, start = 0, length = 0
        cdef const dx_extent *e = dx_find(&self.m, logical, &li, &i)
        cdef list out = []
        while e != NULL and e.logical < end:
            lo = e.logical if e.logical > logical else logical
            hi = e.logical + e.count
            if hi > end:
                hi = end
            at = e.physical + (lo - e.logical)
            if length and start + length == at:
                length += hi - lo
            else:
                if length:
                    out.append((start, length))
                start = at
                length = hi - lo
            e = dx_next(&self.m, &li, &i)
        if length:
            out.append((start, length))
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

    def append_leaf(self, const uint8_t[:] data, uint32_t count, uint64_t block, uint64_t next_block, uint64_t first,
                    uint64_t limit):
        """Load a leaf (or the inline extents: block 0) behind those loaded so far. The blocks of files are
        [first, limit) of the image. ValueError if it is not sorted, overlaps, is empty, leaves them, or has a byte of the
        file at 2**63 or behind: the hot path counts in bytes, and must not come round to 0."""
        cdef dx_leaf *leaf
        cdef uint32_t i
        cdef uint64_t last = 0, end = (<uint64_t>1 << 63) >> self.m.block_shift
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
                if e.logical < last or e.count == 0 or e.flags & ~<uint32_t>DX_UNWRITTEN:
                    raise ValueError(f"extent {i} is out of order, empty or strange")
                if e.logical > end or end - e.logical < e.count:
                    raise ValueError(f"extent {i} is behind the largest file")
                if e.physical < first or e.physical >= limit or limit - e.physical < e.count:
                    raise ValueError(f"extent {i} lies outside the image")
                last = e.logical + e.count
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
