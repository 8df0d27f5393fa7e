# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, cdivision=True
"""Twins: what the kernel last had of a page whose block somebody else may write at the same time. Compiled: it answers page
faults and write-backs.

On persistent memory a page of a mapping is the block. Here the kernel keeps a copy, and writes it back whole: over the bytes
that a device has written to the block meanwhile. A twin is what tells the two apart (as in TreadMarks, a distributed shared
memory of 1994): of a page that is written back only those bytes are stored that differ from it.

Owns `Pages`, one for each file of which the kernel has had pages since it knows the file: which pages the kernel may have
(kernelpages.h) and the twins among them; `Budget`, what twins cost by user; and the compiled handlers of READ for a page and of
WRITE of a page. `coherence.py` decides when pages are dropped.

Rules
- A page is handed out with a twin when a pin or registration has its block, or when it is claimed: a pin of it is on its way.
- A twin is first what was handed out, then what was written back last. It stays until the kernel cannot have the page any
  more: until it is handed out anew, or a drop that began after that has ended. Pins may come and go meanwhile.
- A write-back that is refused leaves its page with the kernel, so it counts as handed out again.
- Bytes behind the end of file are zeros in a twin, as they are in the kernel's page. When the file grows, what a mapping has
  stored behind the old end is masked: it is not stored at write-back, till the page is handed out anew.
- A write(2) goes past the kernel's page to the block, so a page that the kernel may have gets a twin before: the block as it
  was. Pages of other files have no twin, and are written back whole: their blocks do not change behind the kernel's back.
- Stores are of single bytes: nothing is read and put back that a device may change in between.

Not here: asking the kernel for anything (coherence.py), which block somebody has (core/pins.pyx).
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from daxfs.core.runs cimport DX_HOT_READ, DX_HOT_WRITE, DX_UNWRITTEN, RunMap, dx_extent, dx_find, dx_map, dx_next
from daxfs.daemon.requests cimport OpenFile
from daxfs.daemon.session cimport (
    answer, end_write, fuse_in_header, held, keep_pages, note_read, set_quick, store, try_hot,
)

cdef extern from "fuseio.h" nogil:
    enum:
        FUSE_READ, FUSE_WRITE, FUSE_READ_LOCKOWNER, FUSE_WRITE_CACHE
    struct fuse_read_in:
        uint64_t fh, offset
        uint32_t size, read_flags
        uint64_t lock_owner
        uint32_t flags
    struct fuse_write_in:
        uint64_t fh, offset
        uint32_t size, write_flags
        uint64_t lock_owner
        uint32_t flags

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_APPEND

cdef extern from "kernelpages.h" nogil:
    enum:
        DX_PAGE, DX_PAGE_SHIFT
    ctypedef struct dx_pages:
        uint32_t careful, twins, shift
    void dx_pages_add(dx_pages *, uint64_t first, uint64_t end)
    int dx_pages_any(const dx_pages *, uint64_t first, uint64_t end)
    void dx_pages_remove(dx_pages *, uint64_t first, uint64_t end)

PAGE = DX_PAGE

cdef enum:
    HEADER = 40  # bytes of fuse_in_header
    READ_MAX = 1 << 20

cdef uint8_t[4096] _ZEROS
memset(_ZEROS, 0, sizeof(_ZEROS))
cdef uint64_t _now = 0  # moves with every page that is handed out
cdef dict _files = None  # the Pages of the mount, by inode
cdef object _make = None  # makes one for an inode


# -- twins ------------------------------------------------------------------------------------------------------------


cdef class Budget:
    """How many twins there may be, and how many of one user's. What a user has beyond that share takes no room from others."""

    cdef readonly uint64_t most, share, used, beyond
    cdef dict _users

    def __init__(self, uint64_t most, uint64_t share):
        self.most = most
        self.share = share
        self._users = {}

    def has_room(self, uint32_t uid, uint64_t twins):
        return self.used - self.beyond + twins <= self.most and <uint64_t>self._users.get(uid, 0) + twins <= self.share

    def of_user(self, uint32_t uid):
        return self._users.get(uid, 0)

    def users(self):
        """How many twins each user has."""
        return dict(self._users)

    cdef int take(self, uint32_t uid, uint64_t twins) except -1:
        if twins:
            self._set(uid, <uint64_t>self._users.get(uid, 0) + twins)
        return 0

    cdef int give(self, uint32_t uid) except -1:
        return self._set(uid, <uint64_t>self._users[uid] - 1)

    cdef int _set(self, uint32_t uid, uint64_t twins) except -1:
        cdef uint64_t before = self._users.get(uid, 0)
        if twins:
            self._users[uid] = twins
        else:
            del self._users[uid]
        self.used += twins - before
        self.beyond += (twins - self.share if twins > self.share else 0) - (before - self.share if before > self.share else 0)
        return 0


cdef enum:
    SPARE_MAX = 1024

cdef (uint8_t *)[SPARE_MAX] _spare  # memory of twins that are gone, for the next ones
cdef uint32_t _spares = 0


cdef uint8_t *_new_bytes() except NULL:
    global _spares
    cdef uint8_t *bytes
    if _spares:
        _spares -= 1
        return _spare[_spares]
    bytes = <uint8_t *>malloc(DX_PAGE)
    if bytes == NULL:
        raise MemoryError
    return bytes


@cython.final
@cython.freelist(256)
cdef class _Twin:
    """`bytes` NULL: the page has a mask only. `handed`: when. `end`: bytes from here on are masked. `quiet`: how often in a
    row nothing was found to have changed."""

    cdef uint8_t *bytes
    cdef uint64_t handed
    cdef uint32_t end, uid, quiet

    def __dealloc__(self):
        global _spares
        if self.bytes != NULL and _spares < SPARE_MAX:
            _spare[_spares] = self.bytes
            _spares += 1
        else:
            free(self.bytes)


cdef inline size_t _differing(const uint8_t *one, const uint8_t *other, size_t at, size_t end) noexcept nogil:
    """The first place from `at` on where they differ, or `end`."""
    while at + 8 <= end and memcmp(one + at, other + at, 8) == 0:
        at += 8
    while at < end and one[at] == other[at]:
        at += 1
    return at


cdef inline size_t _same(const uint8_t *one, const uint8_t *other, size_t at, size_t end) noexcept nogil:
    while at < end and one[at] != other[at]:
        at += 1
    return at


cdef void _store_differing(uint8_t *block, const uint8_t *page, const uint8_t *twin, size_t n) noexcept nogil:
    cdef size_t at = _differing(page, twin, 0, n), end
    while at < n:
        end = _same(page, twin, at, n)
        store(block + at, page + at, end - at)
        at = _differing(page, twin, end, n)


cdef void _copy_out(const dx_map *m, uint64_t at, uint8_t *to, uint64_t length) noexcept nogil:
    """Bytes of the file as the blocks have them, zeros where there are none. `to` is zeros."""
    cdef uint32_t li = 0, i = 0, shift = m.block_shift
    cdef uint64_t first = at, end = at + length, start, stop
    cdef const dx_extent *e = dx_find(m, at >> shift, &li, &i)
    while e != NULL and (e.logical << shift) < end:
        start = e.logical << shift
        stop = (e.logical + e.count) << shift
        if start < at:
            start = at
        if stop > end:
            stop = end
        if not e.flags & DX_UNWRITTEN and start < stop:
            memcpy(to + (start - first), m.base + (e.physical << shift) + (start - (e.logical << shift)), stop - start)
        e = dx_next(m, &li, &i)


cdef uint8_t *_block_at(const dx_map *m, uint64_t at) noexcept nogil:
    """Where the byte `at` of the file is on the medium; NULL: nowhere, or it reads zero."""
    cdef uint32_t shift = m.block_shift
    cdef const dx_extent *e = dx_find(m, at >> shift, NULL, NULL)
    if e == NULL or e.logical > at >> shift or e.flags & DX_UNWRITTEN:
        return NULL
    return m.base + (e.physical << shift) + (at - (e.logical << shift))


# -- the pages of a file ----------------------------------------------------------------------------------------------


cdef class Pages:
    """What the kernel may have of a file. `inode`: the file's; `pins`: the PinTable of its volume. Ranges are of pages of PAGE
    bytes, [first, end)."""

    cdef dx_pages p
    cdef RunMap map
    cdef readonly object inode
    cdef object _pins
    cdef Budget _budget
    cdef dict _twins  # by page
    cdef list _claims  # of (claim, first, end)
    cdef readonly list dropping  # ranges of pages that are being dropped: (first, end, whether some have no twin)
    cdef object _on_first  # called when there is a twin where there was none

    def __init__(self, inode, pins, Budget budget, on_first):
        self.inode = inode
        self.map = inode.map
        self._pins = pins
        self._budget = budget
        self._twins = {}
        self._claims = []
        self.dropping = []
        self._on_first = on_first
        self.p.careful = pins.has_file(inode.ino)
        self.map.m.pages = &self.p

    def __dealloc__(self):
        if self.map is not None:
            self.map.m.pages = NULL

    def forget(self):
        """The kernel knows the file no more."""
        for page in list(self._twins):
            self._remove(page)
        self.map.m.pages = NULL

    def __len__(self):
        """How many twins there are."""
        return len(self._twins)

    @property
    def careful(self):
        """Whether pages are handed out with twins, if it takes any."""
        return bool(self.p.careful)

    def be_careful(self):
        """Hand out pages with twins, if they take any: till there are neither pins nor claims nor twins."""
        self.p.careful = 1

    def may_have(self, uint64_t first, uint64_t end):
        """Whether the kernel may have pages of the range that have no twin."""
        if dx_pages_any(&self.p, first, end):
            return True
        return any([a < end and first < b for a, b, untwinned in self.dropping if untwinned])

    def is_dropping(self, uint64_t first, uint64_t end):
        """Whether pages of the range are being dropped."""
        return any([a < end and first < b for a, b, _ in self.dropping])

    def has_any(self, uint64_t first, uint64_t end):
        """Whether it may have any pages of the range."""
        if self.may_have(first, end):
            return True
        if end - first <= <uint64_t>len(self._twins):
            return any([page in self._twins for page in range(first, end)])
        return any([first <= page < end for page in self._twins])

    def claim(self, claim, uint64_t first, uint64_t end):
        """A pin of the range is on its way. It is as long as `claim.answered` is false."""
        self._claims = [one for one in self._claims if not one[0].answered and one != (claim, first, end)]
        self._claims.append((claim, first, end))
        self.p.careful = 1

    cdef bytearray _covered(self, uint64_t first, uint64_t end):
        """For each page of a range, whether it takes a twin."""
        cdef bytearray flags = bytearray(end - first)
        cdef uint8_t *flag = flags
        cdef uint32_t per_block = self.map.m.block_shift - DX_PAGE_SHIFT
        cdef uint64_t a, b, at, logical, physical, n, start, count, shift
        if _OFF:
            return flags
        if self._claims:
            self._claims = [one for one in self._claims if not one[0].answered]
            for _, a, b in self._claims:
                for at in range(max(a, first), min(b, end)):
                    flag[at - first] = 1
        for logical, physical, n, unwritten in self.map.overlaps(
            first >> per_block, ((end - 1) >> per_block) + 1 - (first >> per_block)
        ):
            if unwritten:
                continue
            for start, count in self._pins.held(self.inode.ino, physical, n):
                a = (logical + start - physical) << per_block
                b = a + (count << per_block)
                for at in range(max(a, first), min(b, end)):
                    flag[at - first] = 1
        return flags

    cdef int _remove(self, page) except -1:
        cdef _Twin twin = self._twins.pop(page)
        if twin.bytes != NULL:
            self._budget.give(twin.uid)
        self.p.twins = <uint32_t>len(self._twins)
        return 0

    cdef int _remove_range(self, uint64_t first, uint64_t end) except -1:
        cdef uint64_t page
        for page in range(first, end):
            number = page
            if number in self._twins:
                self._remove(number)
        return 0

    cdef _Twin _new(self, page, bint with_bytes, uint32_t uid):
        """Its bytes are not in the budget yet."""
        cdef _Twin twin = _Twin.__new__(_Twin)
        twin.end = DX_PAGE
        twin.uid = uid
        if with_bytes:
            twin.bytes = _new_bytes()
        if not self._twins:
            self._on_first(self.inode.uid)
        self._twins[page] = twin
        self.p.twins = <uint32_t>len(self._twins)
        self.p.careful = 1  # who fills the page anew has to hear of it
        return twin

    # -- handing out --

    def fill(self, uint64_t offset, uint64_t size, uint32_t uid, bint insist=False):
        """The bytes for pages that the kernel fills, fewer at the end of file. None if there is no room for the twins that it
        takes, unless one insists. `uid`: of the user whose pages they are."""
        global _now
        cdef const dx_map *m = &self.map.m
        cdef uint64_t length = m.size - offset if offset < m.size else 0
        cdef uint64_t first = offset >> DX_PAGE_SHIFT, end = (offset + size + DX_PAGE - 1) >> DX_PAGE_SHIFT, page, at, n
        cdef uint64_t wanted = 0, made = 0
        cdef bytes data
        cdef uint8_t *to
        cdef bytearray covered
        cdef const uint8_t *flag
        cdef _Twin twin
        self.inode.map  # is loaded
        if length > size:
            length = size
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        to = <uint8_t *>PyBytes_AS_STRING(data)
        memset(to, 0, length)
        _copy_out(m, offset, to, length)
        covered = self._covered(first, end)
        flag = covered
        if self._twins:
            self._remove_range(first, end)  # the kernel has none of these pages
        if not (self._twins or self._claims or self._pins.has_file(self.inode.ino)):
            self.p.careful = 0
        wanted = covered.count(1)
        if wanted and not insist and not self._budget.has_room(uid, wanted):
            return None
        _now += 1
        try:
            for page in range(first, end):
                if not flag[page - first]:
                    dx_pages_add(&self.p, page, page + 1)
                    continue
                twin = self._new(page, True, uid)
                made += 1
                twin.handed = _now
                at = (page << DX_PAGE_SHIFT) - offset
                n = 0 if at >= length else length - at if length - at < DX_PAGE else DX_PAGE
                memcpy(twin.bytes, to + at, n)
                memset(twin.bytes + n, 0, DX_PAGE - n)
        finally:
            self._budget.take(uid, made)
        return data

    def snapshot(self, uint64_t first, uint64_t end, uint32_t uid, bint insist=True):
        """Twins of the pages of a range that the kernel may have, as the blocks are now: they are about to change, and the pages
        are not dropped before. False if there is no room for them, unless one insists."""
        global _now
        cdef uint64_t page
        cdef _Twin twin
        cdef list wanted = [page for page in range(first, end) if page not in self._twins and self.may_have(page, page + 1)]
        if not wanted or _OFF:
            return True
        if not insist and not self._budget.has_room(uid, len(wanted)):
            return False
        self.inode.map  # is loaded
        _now += 1
        for page in wanted:
            twin = self._new(page, True, uid)
            self._budget.take(uid, 1)
            twin.handed = _now
            memset(twin.bytes, 0, DX_PAGE)
            if page << DX_PAGE_SHIFT < self.map.m.size:
                _copy_out(&self.map.m, page << DX_PAGE_SHIFT, twin.bytes,
                          min(<uint64_t>DX_PAGE, self.map.m.size - (page << DX_PAGE_SHIFT)))
        return True

    def mask(self, uint64_t old_size):
        """The file has grown from here: what a mapping has stored behind it must not show. Whether the kernel may have the
        page."""
        global _now
        cdef uint64_t page = old_size >> DX_PAGE_SHIFT
        cdef uint32_t end = old_size & (DX_PAGE - 1)
        cdef _Twin twin
        if not end or not self.has_any(page, page + 1):
            return False
        twin = self._twins.get(page)
        if twin is None:
            twin = self._new(page, False, 0)
        _now += 1
        twin.handed = _now
        twin.end = min(twin.end, end)
        return True

    # -- taking back --

    cdef bint _in_place(self, uint64_t offset, uint64_t size) noexcept:
        """Whether a range is within the file and has written blocks everywhere."""
        cdef const dx_map *m = &self.map.m
        cdef uint32_t li = 0, i = 0
        cdef uint64_t block = offset >> m.block_shift, end = (offset + size + (1 << m.block_shift) - 1) >> m.block_shift
        cdef const dx_extent *e
        if offset > m.size or size > m.size - offset:
            return False
        e = dx_find(m, block, &li, &i)
        while block < end:
            if e == NULL or e.logical > block or e.flags & DX_UNWRITTEN:
                return False
            block = e.logical + e.count
            e = dx_next(m, &li, &i)
        return True

    def take_back(self, uint64_t offset, const uint8_t[::1] data):
        """Store and flush a write-back, if all of it is over written blocks within the file; else nothing is done. A fence, and
        the times, are the caller's."""
        if data.shape[0] == 0 or not self._in_place(offset, data.shape[0]):
            return False
        self._store(offset, &data[0], data.shape[0])
        return True

    cdef int _store(self, uint64_t offset, const uint8_t *data, uint64_t size) except -1:
        """A write-back of a range that is `_in_place`."""
        cdef uint64_t at, n, within
        cdef _Twin twin
        cdef uint8_t *block
        while size:
            within = offset & (DX_PAGE - 1)
            n = min(size, DX_PAGE - within)
            block = _block_at(&self.map.m, offset)
            twin = self._twins.get(offset >> DX_PAGE_SHIFT)
            at = n
            if twin is not None:
                at = min(n, twin.end - within) if within < twin.end else 0
            if twin is None or twin.bytes == NULL:
                store(block, data, at)
            else:
                _store_differing(block, data, twin.bytes + within, at)
                memcpy(twin.bytes + within, data, n)
            offset, data, size = offset + n, data + n, size - n
        return 0

    cdef int _store_through(self, uint64_t offset, const uint8_t *data, uint64_t size) except -1:
        """A write(2) to a range that is `_in_place`."""
        cdef uint64_t n
        while size:
            n = min(size, DX_PAGE - (offset & (DX_PAGE - 1)))
            store(_block_at(&self.map.m, offset), data, n)
            offset, data, size = offset + n, data + n, size - n
        return 0

    def pieces(self, uint64_t offset, const uint8_t[::1] data):
        """What of a write-back is to be stored, as (offset, bytes, whether it is an overwrite in place) in order: for a caller that
        stores in some other way than `take_back`. Then comes `written`, or `refused`."""
        cdef uint64_t size = data.shape[0], at = 0, n, within, start, stop, end
        cdef _Twin twin
        cdef list out = []
        cdef bytearray page
        cdef uint64_t plain = 0  # where the last run of pages without a twin begins
        while at < size:
            within = (offset + at) & (DX_PAGE - 1)
            n = min(size - at, DX_PAGE - within)
            twin = self._twins.get((offset + at) >> DX_PAGE_SHIFT)
            if twin is None:
                at += n
                continue
            if plain < at:
                out.append((offset + plain, bytes(data[plain:at]), False))
            end = min(n, twin.end - within) if within < twin.end else 0
            if twin.bytes == NULL:
                if end:
                    out.append((offset + at, bytes(data[at : at + end]), False))
            elif _block_at(&self.map.m, offset + at) == NULL:  # it reads zero, and nobody has a block of it
                page = bytearray(end)
                start = _differing(&data[at], twin.bytes + within, 0, end)
                if start < end:
                    while start < end:
                        page[start] = data[at + start]
                        start = _differing(&data[at], twin.bytes + within, start + 1, end)
                    out.append((offset + at, bytes(page), False))
            else:
                start = _differing(&data[at], twin.bytes + within, 0, end)
                while start < end:
                    stop = _same(&data[at], twin.bytes + within, start, end)
                    out.append((offset + at + start, bytes(data[at + start : at + stop]), True))
                    start = _differing(&data[at], twin.bytes + within, stop, end)
            at += n
            plain = at
        if plain < size:
            out.append((offset + plain, bytes(data[plain:]), False))
        return out

    def written(self, uint64_t offset, const uint8_t[::1] data):
        """A write-back is stored: this is what the kernel has of its pages."""
        cdef uint64_t size = data.shape[0], at = 0, n, within
        cdef _Twin twin
        while at < size:
            within = (offset + at) & (DX_PAGE - 1)
            n = min(size - at, DX_PAGE - within)
            twin = self._twins.get((offset + at) >> DX_PAGE_SHIFT)
            if twin is not None and twin.bytes != NULL:
                memcpy(twin.bytes + within, &data[at], n)
            at += n

    def refused(self, uint64_t offset, uint64_t size):
        """A write-back is not stored, so the kernel keeps its pages."""
        global _now
        cdef uint64_t first = offset >> DX_PAGE_SHIFT, end = (offset + size + DX_PAGE - 1) >> DX_PAGE_SHIFT, page
        _now += 1
        for page in range(first, end):
            twin = self._twins.get(page)
            if twin is None:
                dx_pages_add(&self.p, page, page + 1)
            else:
                (<_Twin>twin).handed = _now

    # -- dropping --

    def begin_drop(self, uint64_t first, uint64_t end, bint exact=False):
        """Pages of a range are about to be dropped, unless `exact` with those beside it that share its bits: what to drop, as
        (first, end, token) for `end_drop`."""
        cdef uint64_t grain = <uint64_t>1 << self.p.shift, whole, behind
        if not exact:
            first -= first % grain
            end += (grain - end % grain) % grain
        self.dropping.append((first, end, bool(dx_pages_any(&self.p, first, end))))
        whole, behind = first + (grain - first % grain) % grain, end - end % grain
        if whole < behind:
            dx_pages_remove(&self.p, whole, behind)
        return first, end, _now

    def end_drop(self, uint64_t first, uint64_t end, uint64_t began, bint dropped):
        """The kernel has dropped them, so that all that it has of them it was handed since; or it has not."""
        self.dropping = [one for one in self.dropping if one[0] != first or one[1] != end]
        if not dropped:
            dx_pages_add(&self.p, first, end)
        if not dropped or not self._twins:
            return
        pages = range(first, end) if end - first < <uint64_t>len(self._twins) else list(self._twins)
        for page in pages:
            twin = self._twins.get(page)
            if twin is not None and first <= page < end and (<_Twin>twin).handed <= began:
                self._remove(page)

    def ranges(self, uint64_t most, within=None):
        """The pages that have twins, of all or `within` a range, as ranges of at most so many pages in order."""
        cdef list out = []
        cdef uint64_t page, first = 0, end = 0
        if within is None or within[1] - within[0] > len(self._twins):
            found = sorted(self._twins)
        else:
            found = [page for page in range(within[0], within[1]) if page in self._twins]
        for page in found:
            if within is not None and not within[0] <= page < within[1]:
                continue
            if page == end and page - first < most and end:
                end += 1
                continue
            if end:
                out.append((first, end))
            first, end = page, page + 1
        if end:
            out.append((first, end))
        return out

    def stale(self, uint64_t first, uint64_t end, const uint8_t[::1] data, uint32_t patience):
        """Compare pages of a range, as the kernel has them now, with their twins and blocks; `data` ends where the kernel has a gap.
        Whether each page must be dropped: one side has changed, or neither has for `patience` looks. Fewer flags than pages:
        the kernel does not have the next one."""
        cdef uint64_t page, at = 0, n, size = data.shape[0]
        cdef const dx_map *m = &self.map.m
        cdef const uint8_t *block
        cdef _Twin twin
        cdef list out = []
        for page in range(first, end):
            if page << DX_PAGE_SHIFT >= m.size:
                break
            n = min(<uint64_t>DX_PAGE, m.size - (page << DX_PAGE_SHIFT))
            if at + n > size:
                break
            twin = self._twins.get(page)
            if twin is None or twin.bytes == NULL:
                out.append(True)
            else:
                block = _block_at(m, page << DX_PAGE_SHIFT)
                twin.quiet += 1
                out.append(twin.quiet > patience or memcmp(&data[at], twin.bytes, n) != 0
                           or memcmp(block if block != NULL else _ZEROS, twin.bytes, n) != 0)
            at += DX_PAGE
        return out

    def users(self):
        """The users who have twins here."""
        return {(<_Twin>twin).uid for twin in self._twins.values() if (<_Twin>twin).bytes != NULL}

    def check(self):
        """ValueError if the counts are wrong."""
        cdef _Twin twin
        if self.p.twins != len(self._twins):
            raise ValueError(f"inode {self.inode.ino}: {len(self._twins)} twins, counted {self.p.twins}")
        for page, twin in self._twins.items():
            if twin.end > DX_PAGE or (twin.bytes == NULL and twin.end == DX_PAGE):
                raise ValueError(f"inode {self.inode.ino}, page {page}: a twin of nothing")
        if (self._twins or self._pins.has_file(self.inode.ino)) and not self.p.careful:
            raise ValueError(f"inode {self.inode.ino} is pinned or has twins, and its pages are handed out by the hot path")

    def with_bytes(self):
        """How many twins count in the budget."""
        return sum([(<_Twin>twin).bytes != NULL for twin in self._twins.values()])


# -- handlers ---------------------------------------------------------------------------------------------------------


cdef int _read(const fuse_in_header *header, size_t length) except -1:
    """A READ for pages of a mapping or a splice."""
    cdef const fuse_read_in *arg = <const fuse_read_in *>(<const char *>header + HEADER)
    cdef Pages pages
    if length < HEADER + sizeof(fuse_read_in) or arg.read_flags & FUSE_READ_LOCKOWNER or arg.size > READ_MAX:
        return 0
    pages = _files.get(header.nodeid)
    if pages is None:
        keep = held(arg.fh)
        if type(keep) is not OpenFile or not (<OpenFile>keep).inode.is_file:
            return 0
        pages = _make((<OpenFile>keep).inode)
    if not pages.p.careful:
        return try_hot(header, length)
    if not pages.map.m.hot & DX_HOT_READ:
        return 0
    data = pages.fill(arg.offset, arg.size, header.uid)
    if data is None:
        return 0
    note_read(&pages.map.m, arg.flags)
    answer(header.unique, PyBytes_AS_STRING(data), <size_t>len(data))
    return 1


cdef int _write(const fuse_in_header *header, size_t length) except -1:
    """A write-back of pages of which some have twins, or a write past pages that the kernel may have."""
    cdef const fuse_write_in *arg = <const fuse_write_in *>(<const char *>header + HEADER)
    cdef size_t head = HEADER + _WRITE_IN
    cdef Pages pages
    if length < head or not arg.size or arg.size > length - head or arg.flags & O_APPEND:
        return 0
    pages = _files.get(header.nodeid)
    if pages is None or not pages.map.m.hot & DX_HOT_WRITE or pages.map.m.times == NULL:
        return 0
    if not pages._in_place(arg.offset, arg.size):
        return 0
    if arg.write_flags & FUSE_WRITE_CACHE:
        pages._store(arg.offset, <const uint8_t *>header + head, arg.size)
    elif pages.snapshot(arg.offset >> DX_PAGE_SHIFT, ((arg.offset + arg.size - 1) >> DX_PAGE_SHIFT) + 1, header.uid, False):
        pages._store_through(arg.offset, <const uint8_t *>header + head, arg.size)
    else:
        return 0
    end_write(header, &pages.map.m)
    return 1


cdef enum:
    _WRITE_IN = 40  # bytes of struct fuse_write_in

cdef bint _OFF = False


def install(dict files, make, *, bint quick, bint off=False):
    """`files`: the Pages of the mount by inode, `make(inode)` gives a new one. `quick`: what can be answered compiled is. `off`:
    no twins, so that bytes are lost (for tests that must see it)."""
    global _files, _make, _OFF
    _files, _make, _OFF = files, make, off
    keep_pages(True)
    remove()
    if quick:
        set_quick(FUSE_READ, _read)
        set_quick(FUSE_WRITE, _write)


def remove():
    """The device is gone: Python answers everything from now on."""
    set_quick(FUSE_READ, NULL)
    set_quick(FUSE_WRITE, NULL)
