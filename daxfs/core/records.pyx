# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Records that every change of a volume encodes, compiled: inodes, directory entries, transactions, with their CRC32C.

Bytes in, bytes out: nothing here touches media. What the fields mean is in layout.py, which also has the tables that fsck
and rare records go by; a record of the same name is the same, or this module refuses to load.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from daxfs.core.runs cimport RunMap, dx_extent, dx_find, dx_leaf

from daxfs.core import layout
from daxfs.errors import BadHandle, Corrupt, NoSpace

dx_crc_init()
dx_has_crc = DX_HAS_CRC()

cdef uint32_t INODE_MAGIC = layout.INODE_MAGIC
cdef uint32_t TXN_MAGIC = layout.TXN_MAGIC
cdef uint32_t INODE_CRC_END = layout.INODE_CRC_END
cdef uint64_t TIMES_AT = layout.INODE_TIMES_AT
cdef uint32_t INLINE = layout.INLINE_EXTENTS
cdef uint32_t TARGET_MAX = layout.INLINE_TARGET_MAX
cdef uint32_t XATTR_MAX = layout.INLINE_XATTR_MAX
cdef uint64_t SIZE_MAX = layout.FILE_SIZE_MAX
cdef uint32_t LINK_MAX = layout.LINK_MAX
cdef uint32_t GRANULE = layout.DIRENT_ALIGN
cdef int64_t NS = 1_000_000_000
cdef int64_t SECONDS_MIN = layout.TIME_MIN
cdef object _time_word = layout.time_word
cdef object _time_ns = layout.time_ns


def _check_layout():
    """That the structs are what the tables say."""
    cdef dx_inode_record inode
    cdef dx_entry_record entry
    cdef dx_txn_header head
    cdef uint8_t *i = <uint8_t *>&inode
    cdef uint8_t *e = <uint8_t *>&entry
    cdef uint8_t *h = <uint8_t *>&head
    found = {
        "ino": <uint8_t *>&inode.ino - i, "generation": <uint8_t *>&inode.generation - i,
        "mode": <uint8_t *>&inode.mode - i, "uid": <uint8_t *>&inode.uid - i, "gid": <uint8_t *>&inode.gid - i,
        "nlink": <uint8_t *>&inode.nlink - i, "flags": <uint8_t *>&inode.flags - i, "rdev": <uint8_t *>&inode.rdev - i,
        "size": <uint8_t *>&inode.size - i, "parent": <uint8_t *>&inode.parent - i, "btime": <uint8_t *>&inode.btime - i,
        "xattr_block": <uint8_t *>&inode.xattr_block - i, "leaf": <uint8_t *>&inode.leaf - i,
        "extents": <uint8_t *>&inode.extents - i, "target_length": <uint8_t *>&inode.target_length - i,
        "xattr_length": <uint8_t *>&inode.xattr_length - i, "body": <uint8_t *>&inode.body - i,
        "xattrs": <uint8_t *>&inode.xattrs - i, "blocks": <uint8_t *>&inode.blocks - i,
        "mtime": <uint8_t *>&inode.times - i,
    }
    for name, at in found.items():
        if layout.INODE.offset[name] != at:
            raise ImportError(f"layout of an inode: {name} is at {at}")
    found = {"ino": <uint8_t *>&entry.ino - e, "crc": <uint8_t *>&entry.crc - e, "length": <uint8_t *>&entry.length - e,
             "name_length": <uint8_t *>&entry.name_length - e, "type": <uint8_t *>&entry.type - e}
    if layout.DIRENT.offset != found:
        raise ImportError("layout of a directory entry")
    found = {"magic": <uint8_t *>&head.magic - h, "crc": <uint8_t *>&head.crc - h,
             "sequence": <uint8_t *>&head.sequence - h, "length": <uint8_t *>&head.length - h,
             "records": <uint8_t *>&head.records - h}
    if layout.TXN_HEADER.offset != found:
        raise ImportError("layout of a transaction")


_check_layout()


def crc32c(data, uint32_t crc=0, *, bint by_table=False):
    """CRC32C; `crc` is that of the bytes before. `by_table`: as on a CPU that has no instruction for it."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    try:
        if by_table:
            return dx_crc_by_table(crc, <const uint8_t *>buffer.buf, buffer.len)
        return dx_crc(crc, buffer.buf, buffer.len)
    finally:
        PyBuffer_Release(&buffer)


# -- times --


cpdef uint64_t time_word(ns) except? 1:
    """layout.time_word."""
    cdef int64_t at, seconds
    try:
        at = ns
    except OverflowError:
        return _time_word(ns)
    seconds = at // NS
    if seconds * NS > at:  # C rounds to zero
        seconds -= 1
    if seconds < SECONDS_MIN:
        return 0
    return <uint64_t>(seconds - SECONDS_MIN) << 30 | <uint64_t>(at - seconds * NS)


cpdef time_ns(uint64_t word):
    """layout.time_ns."""
    cdef int64_t seconds = <int64_t>(word >> 30) + SECONDS_MIN
    cdef int64_t rest = word & 0x3FFF_FFFF
    if seconds > 9_000_000_000:  # of what 63 bits of ns can say
        return _time_ns(word)
    return seconds * NS + (rest if rest < NS else NS - 1)


# -- inodes --


cdef class Record:
    """The fields of an inode's record: what inode.Inode is on media. `mtime`, `ctime`, `atime` and `btime` are ns since 1970;
    the first three are words on media that `_load_word(address)` reads, unless they are held for the next store."""

    cdef public uint64_t ino, at, rdev, parent, xattr_block, _leaf, _extents, _blocks
    cdef public uint32_t generation, mode, uid, gid, flags
    cdef public int64_t nlink
    cdef public bytes target, xattr_inline, _inline
    cdef readonly object _map
    cdef object _load_word
    cdef uint64_t _birth
    cdef uint64_t[3] _times
    cdef bint _held

    def __init__(self, load_word, uint64_t ino, uint64_t at, RunMap extents):
        self._load_word = load_word
        self.ino = ino
        self.at = at
        self._map = extents
        self._clear()

    def _clear(self):
        self.generation = self.mode = self.uid = self.gid = self.flags = 0
        self.rdev = self.parent = self.xattr_block = self._leaf = self._extents = self._blocks = self._birth = 0
        self.nlink = 0
        self.target = self.xattr_inline = self._inline = b""
        self._held = False

    # -- kinds --

    @property
    def is_dir(self):
        return self.mode & 0o170000 == 0o040000

    @property
    def is_file(self):
        return self.mode & 0o170000 == 0o100000

    @property
    def is_symlink(self):
        return self.mode & 0o170000 == 0o120000

    # -- size, times, blocks --

    @property
    def size(self):
        return (<RunMap>self._map).m.size

    @size.setter
    def size(self, uint64_t value):
        (<RunMap>self._map).m.size = value

    @property
    def blocks(self):
        """Blocks that the file's extents map; leaves and xattr blocks are not counted."""
        return self._blocks if self._extents else (<RunMap>self._map).m.blocks

    cdef object _time(self, int which):
        if self._held:
            return time_ns(self._times[which])
        return time_ns(self._load_word(self.at + TIMES_AT + 8 * which))

    cdef int _read_times(self, uint64_t *words) except -1:
        cdef int which
        if self._held:
            memcpy(words, self._times, 24)
        else:
            for which in range(3):
                words[which] = self._load_word(self.at + TIMES_AT + 8 * which)
        return 0

    cdef int _set_time(self, int which, ns) except -1:
        if not self._held:
            self._read_times(self._times)
            self._held = True
        self._times[which] = time_word(ns)
        return 0

    @property
    def mtime(self):
        return self._time(0)

    @mtime.setter
    def mtime(self, ns):
        """Within a transaction that stores this inode, as for the others."""
        self._set_time(0, ns)

    @property
    def ctime(self):
        return self._time(1)

    @ctime.setter
    def ctime(self, ns):
        self._set_time(1, ns)

    @property
    def atime(self):
        return self._time(2)

    @atime.setter
    def atime(self, ns):
        self._set_time(2, ns)

    @property
    def btime(self):
        return time_ns(self._birth)

    @btime.setter
    def btime(self, ns):
        self._birth = time_word(ns)

    def _born(self, ns):
        """All times of a new inode."""
        self._birth = self._times[0] = self._times[1] = self._times[2] = time_word(ns)
        self._held = True

    def _stored(self):
        """The held times are on media."""
        self._held = False

    # -- from and to media --

    def _parse(self, data, uint64_t volume_blocks):
        """Take the fields from a record. BadHandle if the inode is free, Corrupt if it cannot be believed; nothing has
        changed then."""
        cdef Py_buffer buffer
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            if buffer.len < <Py_ssize_t>sizeof(dx_inode_record):
                raise Corrupt(f"inode {self.ino}: the record is cut off")
            self._take(<const dx_inode_record *>buffer.buf, volume_blocks)
        finally:
            PyBuffer_Release(&buffer)

    cdef int _take(self, const dx_inode_record *r, uint64_t volume_blocks) except -1:
        cdef const uint8_t *raw = <const uint8_t *>r
        cdef uint32_t crc = dx_crc(dx_crc(0, raw, 4), raw + 8, INODE_CRC_END - 8)
        cdef uint32_t kind = r.mode & 0o170000
        cdef size_t i
        if r.magic == 0:
            for i in range(sizeof(dx_inode_record)):
                if raw[i]:
                    break
            else:
                raise BadHandle(f"inode {self.ino} is free")
        if r.magic != INODE_MAGIC:
            raise Corrupt(f"inode {self.ino}: magic {r.magic:#010x} is not {INODE_MAGIC:#010x}")
        if crc != r.crc:
            raise Corrupt(f"inode {self.ino}: bad checksum")
        if r.ino != self.ino:
            raise Corrupt(f"inode {self.ino}: the record belongs to inode {r.ino}")
        if r.mode == 0:
            raise BadHandle(f"inode {self.ino} is free")
        if r.mode >> 16 or kind not in (0o100000, 0o040000, 0o120000, 0o020000, 0o060000, 0o010000, 0o140000):
            raise Corrupt(f"inode {self.ino}: mode {r.mode:#o} is of no known type")
        if r.size > SIZE_MAX or r.target_length > TARGET_MAX:
            raise Corrupt(f"inode {self.ino}: size {r.size} is impossible")
        if r.blocks > volume_blocks or r.rdev >> 32:
            raise Corrupt(f"inode {self.ino}: {r.blocks} blocks or the device {r.rdev:#x} are impossible")
        if r.xattr_length > XATTR_MAX or (not r.leaf and r.extents > INLINE):
            raise Corrupt(f"inode {self.ino}: more inline than fits")
        self.generation, self.mode = r.generation, r.mode
        self.uid, self.gid, self.nlink, self.flags = r.uid, r.gid, r.nlink, r.flags
        self.rdev, self.parent, self.xattr_block = r.rdev, r.parent, r.xattr_block
        self._birth, self._leaf, self._blocks = r.btime, r.leaf, r.blocks
        self._extents = 0 if r.target_length else r.extents
        self.target = PyBytes_FromStringAndSize(<const char *>r.body, r.target_length)
        self._inline = b"" if r.target_length or r.leaf else PyBytes_FromStringAndSize(<const char *>r.body, 144)
        self.xattr_inline = PyBytes_FromStringAndSize(<const char *>r.xattrs, r.xattr_length)
        self._held = False
        (<RunMap>self._map).m.size = r.size
        return 0

    @property
    def _settled(self):
        """Whether no leaf has to be stored, moved or given back before the record can be packed. Extents that were not read
        did not change."""
        cdef RunMap extents = <RunMap>self._map
        cdef dx_leaf *leaf
        cdef uint32_t i, n = extents.m.nleaves
        if self._extents:
            return True
        if extents.dropped_blocks:
            return False
        if n == 1 and extents.m.extents <= INLINE:
            return extents.m.leaves[0].block == 0
        for i in range(n):
            leaf = &extents.m.leaves[i]
            if leaf.dirty or not leaf.block or leaf.next != (extents.m.leaves[i + 1].block if i + 1 < n else 0):
                return False
        return True

    def _physical(self, uint64_t logical):
        """The image's block behind a logical one, 0 if there is none. The extents are in memory."""
        cdef RunMap extents = <RunMap>self._map
        cdef const dx_extent *e = dx_find(&extents.m, logical, NULL, NULL)
        return 0 if e == NULL or e.logical > logical else e.physical + (logical - e.logical)

    def _pack(self):
        """The record, with extents (or the first leaf) as the map has them now, or as they were on media while it is not
        loaded. Corrupt if the link count makes no sense."""
        cdef dx_inode_record r
        cdef uint64_t[3] times
        cdef RunMap extents = <RunMap>self._map
        if not 0 <= self.nlink <= LINK_MAX:
            raise Corrupt(f"inode {self.ino}: its link count was wrong")
        if PyBytes_GET_SIZE(self.target) > TARGET_MAX or PyBytes_GET_SIZE(self.xattr_inline) > XATTR_MAX:
            raise Corrupt(f"inode {self.ino}: more inline than fits")
        memset(&r, 0, sizeof(r))
        r.magic = INODE_MAGIC
        r.ino = self.ino
        r.generation, r.mode, r.uid, r.gid = self.generation, self.mode, self.uid, self.gid
        r.nlink, r.flags = <uint32_t>self.nlink, self.flags
        r.rdev, r.parent, r.btime, r.xattr_block = self.rdev, self.parent, self._birth, self.xattr_block
        r.size = extents.m.size
        r.blocks = extents.m.blocks
        if PyBytes_GET_SIZE(self.target):
            r.target_length = <uint16_t>PyBytes_GET_SIZE(self.target)
            memcpy(r.body, PyBytes_AS_STRING(self.target), r.target_length)
        elif self._extents:
            r.leaf, r.extents, r.blocks = self._leaf, <uint32_t>self._extents, self._blocks
            memcpy(r.body, PyBytes_AS_STRING(self._inline), PyBytes_GET_SIZE(self._inline))
        elif extents.m.nleaves:
            r.extents = <uint32_t>extents.m.extents
            r.leaf = extents.m.leaves[0].block
            if not r.leaf:
                if extents.m.nleaves > 1 or extents.m.extents > INLINE:
                    raise ValueError(f"inode {self.ino}: its extents have no leaf")
                memcpy(r.body, extents.m.leaves[0].e, extents.m.leaves[0].n * sizeof(dx_extent))
        r.xattr_length = <uint16_t>PyBytes_GET_SIZE(self.xattr_inline)
        memcpy(r.xattrs, PyBytes_AS_STRING(self.xattr_inline), r.xattr_length)
        self._read_times(times)
        memcpy(r.times, times, 24)
        return _sealed(&r)

    def _pack_free(self):
        """The record of a free inode: number and generation."""
        cdef dx_inode_record r
        memset(&r, 0, sizeof(r))
        r.magic = INODE_MAGIC
        r.ino = self.ino
        r.generation = self.generation
        return _sealed(&r)


cdef bytes _sealed(dx_inode_record *r):
    cdef uint8_t *raw = <uint8_t *>r
    r.crc = dx_crc(dx_crc(0, raw, 4), raw + 8, INODE_CRC_END - 8)
    return PyBytes_FromStringAndSize(<char *>r, sizeof(dx_inode_record))


# -- directory entries --


cdef inline void _seal_entry(dx_entry_record *e) noexcept:
    e.crc = dx_crc(dx_crc(0, e, 8), <uint8_t *>e + 12, 4 + e.name_length)


def pack_entry(uint64_t ino, uint16_t length, uint8_t dtype, bytes name, uint16_t rest=0):
    """An entry (or, with ino 0, a free slot) of `length` granules, without its padding; or, padded, and with a free slot of
    `rest` granules behind it."""
    cdef Py_ssize_t n = PyBytes_GET_SIZE(name)
    cdef Py_ssize_t size = <Py_ssize_t>length * GRANULE + 16 if rest else 16 + n
    cdef bytes out
    cdef dx_entry_record *e
    if n > 255 or (rest and 16 + n > <Py_ssize_t>length * GRANULE):
        raise ValueError(f"a name of {n} bytes in {length} granules")
    out = PyBytes_FromStringAndSize(NULL, size)
    e = <dx_entry_record *>PyBytes_AS_STRING(out)
    e.ino = ino
    e.length = length
    e.name_length = <uint8_t>n
    e.type = dtype
    memcpy(e + 1, PyBytes_AS_STRING(name), n)
    _seal_entry(e)
    if rest:
        memset(<uint8_t *>e + 16 + n, 0, size - 32 - n)
        e = <dx_entry_record *>(PyBytes_AS_STRING(out) + size - 16)
        memset(e, 0, 16)
        e.length = rest
        _seal_entry(e)
    return out


# -- transactions --


def pack_transaction(uint64_t sequence, records, uint64_t capacity):
    """The body of the journal for (address, bytes) records: header, then each record with its padding. NoSpace if the
    records take more than `capacity`."""
    cdef list parts = records if type(records) is list else list(records)
    cdef uint64_t length = 0
    cdef Py_ssize_t n
    cdef bytes data, out
    cdef dx_txn_header *head
    cdef dx_txn_record *r
    cdef uint8_t *at
    for _, data in parts:
        length += sizeof(dx_txn_record) + ((PyBytes_GET_SIZE(data) + 7) & ~<Py_ssize_t>7)
    if length > capacity:
        raise NoSpace(f"a transaction of {length} bytes does not fit the journal of {capacity}")
    out = PyBytes_FromStringAndSize(NULL, sizeof(dx_txn_header) + length)
    head = <dx_txn_header *>PyBytes_AS_STRING(out)
    head.magic = TXN_MAGIC
    head.sequence = sequence
    head.length = length
    head.records = len(parts)
    at = <uint8_t *>(head + 1)
    for address, data in parts:
        n = PyBytes_GET_SIZE(data)
        r = <dx_txn_record *>at
        r.address = address
        r.length = n
        at += sizeof(dx_txn_record)
        memcpy(at, PyBytes_AS_STRING(data), n)
        memset(at + n, 0, -n & 7)
        at += (n + 7) & ~<Py_ssize_t>7
    head.crc = dx_crc(dx_crc(0, head, 4), <uint8_t *>head + 8, sizeof(dx_txn_header) - 8 + length)
    return out
