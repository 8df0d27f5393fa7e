# cython: language_level=3, boundscheck=False, wraparound=False, binding=False, cdivision=True
"""The requests that need nothing but memory, compiled: they come in the greatest numbers, and a round trip is all they are.

Owns the packing of attributes, entries and listings for replies (any object with the attributes of an inode will do), and
`OpenFile`. Quick are, once `install` was called:

    LOOKUP      a name of a directory that is in memory, there or not
    GETATTR     of any inode in memory
    GETXATTR    of a name that the kernel itself asks for, where there are no attributes at all
    OPEN, OPENDIR, RELEASE, RELEASEDIR
    IOCTL       PIN and UNPIN that succeed (control.py has the calls)
    POLL        of a descriptor that is no holder's
    FSYNC       there is nothing to do

Rules
- A handler here answers a request as its counterpart in Python does (raw.py, names.py), or leaves it to that one before
  anything has changed: whatever fails, waits, reads media, or is rare.
- What is asked of an inode goes through its attributes and methods, so the rules stay in the core.

Not here: when a handler is asked (session.pyx), anything that changes the volume.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport ENODATA
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset, strlen

from daxfs.core.runs cimport DX_HOT_READ, RunMap
from daxfs.daemon.session cimport (
    answer, attach_handle, detach_handle, fuse_in_header, held, refuse, set_quick,
)

from daxfs.daemon import session
from daxfs.errors import FsError

cdef extern from "fuseio.h" nogil:
    enum:
        FUSE_LOOKUP, FUSE_GETATTR, FUSE_GETXATTR, FUSE_OPEN, FUSE_RELEASE, FUSE_OPENDIR, FUSE_RELEASEDIR, FUSE_IOCTL, FUSE_POLL, FUSE_FSYNC
        FUSE_POLL_SCHEDULE_NOTIFY
        FOPEN_KEEP_CACHE
    struct fuse_attr:
        uint64_t ino, size, blocks, atime, mtime, ctime
        uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags
    struct fuse_attr_out:
        uint64_t attr_valid
        fuse_attr attr
    struct fuse_entry_out:
        uint64_t nodeid, generation, entry_valid, attr_valid
        fuse_attr attr
    struct fuse_open_in:
        uint32_t flags
    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags
    struct fuse_release_in:
        uint64_t fh
    struct fuse_getxattr_in:
        pass
    struct fuse_dirent:
        uint64_t ino, off
        uint32_t namelen, type

    struct fuse_ioctl_in:
        uint64_t fh
        uint32_t flags, cmd
        uint64_t arg
        uint32_t in_size, out_size
    struct fuse_ioctl_out:
        pass

    struct fuse_poll_in:
        uint64_t fh, kh
        uint32_t flags, events
    struct fuse_poll_out:
        uint32_t revents

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN, POLLRDNORM, POLLOUT, POLLWRNORM

cdef extern from "daxfs.h" nogil:
    enum:
        DAXFS_IOC_PIN, DAXFS_IOC_UNPIN
    struct daxfs_pin:
        uint64_t offset, length
        uint32_t flags, zero
        uint64_t id, runs, blocks
    struct daxfs_unpin:
        uint64_t id
        uint32_t flags, zero

cdef extern from "hotpath.h" nogil:
    enum:
        DX_READABLE, DX_WRITABLE, DX_FILLS

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_ACCMODE, O_TRUNC

cdef unsigned[4] _ACCESS = [DX_READABLE, DX_WRITABLE, DX_READABLE | DX_WRITABLE, 0]  # by O_ACCMODE

cdef enum:
    NAME_MAX = 255
    SECTOR = 512
    S_IFMT = 0o170000
    S_IFREG = 0o100000
    S_IFDIR = 0o040000
    HEADER = 40  # bytes of fuse_in_header
    DIRENT = 24  # bytes of fuse_dirent

cdef int64_t NS = 1_000_000_000
cdef uint64_t VIRTUAL = 0x7DAF_0000_0000_0000  # what has this number or a greater one is virtual.py's

VALID_S = 86400
"""The daemon is the one authority: an answer holds until the kernel, or the daemon, changes something."""
FIRST_VIRTUAL = VIRTUAL

cdef uint64_t _valid = VALID_S
cdef uint32_t _block_size = 4096
cdef object _inode = None  # Volume.inode
cdef dict _names = None  # Service's
cdef dict _opened = None
cdef object _pin = None, _unpin = None  # Control's
cdef dict _breaks = {}  # Volume.breaks
cdef uint32_t _file_flags = 0, _directory_flags = 0  # FOPEN_*


# -- open files -------------------------------------------------------------------------------------------------------


cdef class OpenFile:
    """An open file description of the kernel. `flags`: of open(2); `task`: the thread that opened it; `cached`: it goes through
    the kernel's page cache; `used`: it has met more than reads and writes (an ioctl, poll), so it may have pins, leases, events, pollers,
    reports or an HCA."""

    # The fields are in requests.pxd.

    def __init__(self, inode, int flags, uint32_t task=0, bint cached=False):
        self.inode = inode
        self.flags = flags
        self.task = task
        self.cached = cached
        self.fh = 0
        self.used = False

    @property
    def readable(self):
        return bool(_ACCESS[self.flags & O_ACCMODE] & DX_READABLE)

    @property
    def writable(self):
        return bool(_ACCESS[self.flags & O_ACCMODE] & DX_WRITABLE)


cdef object _open(inode, int flags, uint32_t task, bint is_file, bint cached, bint fills):
    """See `open_file`."""
    cdef OpenFile file = OpenFile.__new__(OpenFile)
    cdef RunMap extents
    cdef unsigned access = _ACCESS[flags & O_ACCMODE] | (DX_FILLS if fills else 0)
    file.inode, file.flags, file.task, file.cached = inode, flags, task, cached
    if cached:
        access |= DX_READABLE  # pages are read through any handle
    inode.opens += 1
    try:
        if is_file:
            extents = inode.map
            if not extents.m.hot & DX_HOT_READ:
                inode.set_hot()
            file.fh = attach_handle(&extents.m, access, file)
            ino = inode.ino
            same = _opened.get(ino)
            if same is None:
                _opened[ino] = {file.fh: file}
            else:
                same[file.fh] = file
        else:
            file.fh = attach_handle(NULL, 0, file)
    except BaseException:
        inode.opens -= 1
        if file.fh is not None:
            detach_handle(file.fh)
        raise
    return file.fh


def open_file(inode, int flags, uint32_t task=0, *, bint cached=False, bint fills=True):
    """A handle for the kernel. The description is in `opened` if it is that of a file. `fills`: of session.attach."""
    return _open(inode, flags, task, inode.is_file, cached, fills)


cdef int _close(OpenFile file) except -1:
    """The handle is gone."""
    cdef dict same
    fh, ino = file.fh, file.inode.ino
    detach_handle(fh)
    same = _opened.get(ino)
    if same is not None:
        same.pop(fh, None)
        if not same:
            del _opened[ino]
    return 0


def close_file(OpenFile file):
    _close(file)


# -- records ----------------------------------------------------------------------------------------------------------


cdef int _fill(fuse_attr *a, inode) except -1:
    memset(a, 0, sizeof(a[0]))
    a.ino = inode.ino
    a.size = inode.size
    a.blocks = <uint64_t>inode.blocks * (_block_size // SECTOR)
    a.mode = inode.mode
    a.nlink = inode.nlink
    a.uid = inode.uid
    a.gid = inode.gid
    a.rdev = inode.rdev
    a.blksize = _block_size
    _split(inode.atime, &a.atime, &a.atimensec)
    _split(inode.mtime, &a.mtime, &a.mtimensec)
    _split(inode.ctime, &a.ctime, &a.ctimensec)
    return 0


cdef int _split(ns, uint64_t *seconds, uint32_t *rest) except -1:
    """ns since 1970 as struct fuse_attr has it; the rest is never negative."""
    cdef int64_t all_, whole
    try:
        all_ = ns
    except OverflowError:  # not before 2262
        seconds[0], rest[0] = divmod(ns, NS)
        return 0
    whole = all_ // NS
    if whole * NS > all_:
        whole -= 1
    seconds[0] = <uint64_t>whole
    rest[0] = <uint32_t>(all_ - whole * NS)
    return 0


cdef int _fill_entry(fuse_entry_out *e, inode) except -1:
    memset(e, 0, sizeof(e[0]))
    e.nodeid = inode.ino
    e.generation = inode.generation
    e.entry_valid = e.attr_valid = _valid
    return _fill(&e.attr, inode)


def attr_out(inode):
    """struct fuse_attr_out."""
    cdef fuse_attr_out out
    memset(&out, 0, sizeof(out))
    out.attr_valid = _valid
    _fill(&out.attr, inode)
    return PyBytes_FromStringAndSize(<char *>&out, sizeof(out))


def entry_out(inode):
    """struct fuse_entry_out: what makes the kernel know an inode. Whoever sends it counts a lookup."""
    cdef fuse_entry_out out
    _fill_entry(&out, inode)
    return PyBytes_FromStringAndSize(<char *>&out, sizeof(out))


cdef class Listing:
    """The answer to a READDIR or, with `plus`, a READDIRPLUS: records up to the size that the kernel asked for."""

    cdef bytes room
    cdef Py_ssize_t size, used, head
    cdef bint plus

    def __init__(self, Py_ssize_t size, *, bint plus):
        self.room = PyBytes_FromStringAndSize(NULL, size)
        self.size = size
        self.plus = plus
        self.head = DIRENT + (<Py_ssize_t>sizeof(fuse_entry_out) if plus else 0)

    def has_room(self, bytes name):
        return self.used + ((self.head + PyBytes_GET_SIZE(name) + 7) & ~7) <= self.size

    def add(self, bytes name, uint64_t ino, uint32_t dtype, uint64_t following, inode=None):
        """False if it does not fit. `following` is where the next listing starts. Without an `inode`, READDIRPLUS says nothing
        about it, and no lookup counts: `.` and `..` must have it so."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(name), end
        cdef char *at = PyBytes_AS_STRING(self.room) + self.used
        cdef fuse_dirent *entry = <fuse_dirent *>(at + self.head - DIRENT)
        end = self.used + ((self.head + n + 7) & ~7)
        if end > self.size:
            return False
        if self.plus:
            if inode is None:
                memset(at, 0, sizeof(fuse_entry_out))
            else:
                _fill_entry(<fuse_entry_out *>at, inode)
        entry.ino, entry.off, entry.namelen, entry.type = ino, following, <uint32_t>n, dtype
        memcpy(at + self.head, PyBytes_AS_STRING(name), n)
        memset(at + self.head + n, 0, end - self.used - self.head - n)
        self.used = end
        return True

    def data(self):
        return memoryview(self.room)[:self.used]


# -- handlers ---------------------------------------------------------------------------------------------------------


cdef object _known(uint64_t ino):
    """The inode; None if it is not to be had, which is for Python to say."""
    if ino >= VIRTUAL:
        return None
    try:
        return _inode(ino)
    except FsError:
        return None


cdef int _getattr(const fuse_in_header *header, size_t length) except -1:
    cdef fuse_attr_out out
    inode = _known(header.nodeid)
    if inode is None:
        return 0
    memset(&out, 0, sizeof(out))
    out.attr_valid = _valid
    _fill(&out.attr, inode)
    answer(header.unique, &out, sizeof(out))
    return 1


cdef int _lookup(const fuse_in_header *header, size_t length) except -1:
    cdef const char *text = <const char *>header + HEADER
    cdef size_t n = length - HEADER - 1
    cdef fuse_entry_out out
    if length <= HEADER + 1 or n > NAME_MAX or text[0] == b'.':
        return 0
    parent = _known(header.nodeid)
    if parent is None or parent.directory is None:
        return 0
    name = PyBytes_FromStringAndSize(text, n)
    try:
        found = parent.directory.lookup(name)
    except FsError:
        return 0
    if found is None:
        memset(&out, 0, sizeof(out))
        out.entry_valid = _valid
        answer(header.unique, &out, sizeof(out))
        return 1
    inode = _known(found[0])
    if inode is None:
        return 0
    _fill_entry(&out, inode)
    inode.nlookup += 1
    _names[inode.ino] = (header.nodeid, name)
    answer(header.unique, &out, sizeof(out))
    return 1


cdef int _getxattr(const fuse_in_header *header, size_t length) except -1:
    """`security.capability` before each truncate, and the ACLs."""
    cdef const char *name = <const char *>header + HEADER + sizeof(fuse_getxattr_in)
    if length <= HEADER + sizeof(fuse_getxattr_in):
        return 0
    if not (_is(name, length, b"security.capability") or _is(name, length, b"system.posix_acl_access")
            or _is(name, length, b"system.posix_acl_default")):
        return 0
    inode = _known(header.nodeid)
    if inode is None or inode.xattr_inline or inode.xattr_block:
        return 0
    refuse(header.unique, ENODATA)
    return 1


cdef inline bint _is(const char *name, size_t length, const char *other) noexcept:
    cdef size_t n = strlen(other) + 1
    return length == HEADER + sizeof(fuse_getxattr_in) + n and not memcmp(name, other, n)


cpdef uint32_t file_flags(ino):
    """FOPEN_* of a file that bypasses the cache. An open drops the kernel's pages, and waits until dirty ones are written back,
    but not while a layout change waits: that holds write-back back."""
    return _file_flags | FOPEN_KEEP_CACHE if ino in _breaks else _file_flags


cdef int _open_any(const fuse_in_header *header, size_t length) except -1:
    cdef const fuse_open_in *arg = <const fuse_open_in *>(<const char *>header + HEADER)
    cdef fuse_open_out out
    cdef bint is_file = header.opcode == FUSE_OPEN
    cdef uint32_t mode
    if length < HEADER + sizeof(fuse_open_in) or arg.flags & O_TRUNC:
        return 0
    inode = _known(header.nodeid)
    if inode is None:
        return 0
    mode = inode.mode
    if mode & S_IFMT != (S_IFREG if is_file else S_IFDIR):
        return 0
    try:
        fh = _open(inode, <int>arg.flags, header.pid if is_file else 0, is_file, False, True)
    except (FsError, MemoryError):
        return 0
    memset(&out, 0, sizeof(out))
    out.fh = fh
    out.open_flags = file_flags(header.nodeid) if is_file else _directory_flags
    answer(header.unique, &out, sizeof(out))
    return 1


cdef int _release(const fuse_in_header *header, size_t length) except -1:
    cdef const fuse_release_in *arg = <const fuse_release_in *>(<const char *>header + HEADER)
    cdef OpenFile file
    if length < HEADER + sizeof(fuse_release_in):
        return 0
    keep = held(arg.fh)
    if type(keep) is not OpenFile:
        return 0
    file = <OpenFile>keep
    inode = file.inode
    if file.used or not inode.nlookup:  # the last reference: it may die
        return 0
    _close(file)
    inode.opens -= 1
    answer(header.unique, NULL, 0)
    return 1


cdef int _fsync(const fuse_in_header *header, size_t length) except -1:
    """What was written back is durable. The kernel shall ask all the same: a dead daemon cannot answer."""
    answer(header.unique, NULL, 0)
    return 1


cdef int _poll(const fuse_in_header *header, size_t length) except -1:
    """What no holder has is always ready. (io_uring asks before each of its reads.)"""
    cdef const fuse_poll_in *arg = <const fuse_poll_in *>(<const char *>header + HEADER)
    cdef fuse_poll_out out
    if length < HEADER + sizeof(fuse_poll_in) or arg.flags & FUSE_POLL_SCHEDULE_NOTIFY:
        return 0
    keep = held(arg.fh)
    if type(keep) is not OpenFile or (<OpenFile>keep).used:
        return 0
    memset(&out, 0, sizeof(out))
    out.revents = POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM
    answer(header.unique, &out, sizeof(fuse_poll_out))
    return 1


cdef int _ioctl(const fuse_in_header *header, size_t length) except -1:
    cdef const fuse_ioctl_in *arg = <const fuse_ioctl_in *>(<const char *>header + HEADER)
    cdef size_t size = length - HEADER - sizeof(fuse_ioctl_in)
    if length < HEADER + sizeof(fuse_ioctl_in) or arg.in_size > size:
        return 0
    keep = held(arg.fh)
    if type(keep) is not OpenFile:
        return 0
    if arg.cmd == DAXFS_IOC_PIN and arg.in_size == sizeof(daxfs_pin):
        return _ioctl_pin(header, <const daxfs_pin *>(arg + 1), keep)
    if arg.cmd == DAXFS_IOC_UNPIN and arg.in_size == sizeof(daxfs_unpin):
        return _ioctl_unpin(header, <const daxfs_unpin *>(arg + 1), keep)
    return 0


cdef struct _pinned:
    fuse_ioctl_out out
    daxfs_pin pin


cdef struct _unpinned:
    fuse_ioctl_out out
    daxfs_unpin unpin


cdef int _ioctl_pin(const fuse_in_header *header, const daxfs_pin *wanted, OpenFile file) except -1:
    cdef _pinned answered
    if wanted.zero:
        return 0
    memset(&answered, 0, sizeof(answered))
    file.used = True
    try:
        pin = _pin(file, wanted.offset, wanted.length, wanted.flags, header.pid, header.uid)
    except FsError:  # it has changed nothing
        return 0
    answered.pin = wanted[0]
    answered.pin.id = pin.id
    answered.pin.runs = len(pin.runs)
    answered.pin.blocks = pin.blocks
    answer(header.unique, &answered, sizeof(answered))
    return 1


cdef int _ioctl_unpin(const fuse_in_header *header, const daxfs_unpin *given, OpenFile file) except -1:
    cdef _unpinned answered
    if given.flags or given.zero:
        return 0
    memset(&answered, 0, sizeof(answered))
    try:
        _unpin(file, given.id)
    except FsError:
        return 0
    answered.unpin = given[0]
    answer(header.unique, &answered, sizeof(answered))
    return 1


def install(inode, dict names, dict opened, pin, unpin, *, dict breaks, uint32_t block_size, uint32_t file_flags,
            uint32_t directory_flags, bint quick, bint direct):
    """What the service has. `inode`: Volume.inode. `pin(file, offset, length, flags, task, uid)` gives a Pin, `unpin(file, id)`
    takes it back. `breaks`: Volume's. The flags are those of the replies to OPEN and OPENDIR. Without `quick` Python answers
    everything. `direct`: no file goes through the kernel's cache; else caching.py looks at each open and stat."""
    global _inode, _names, _opened, _breaks, _pin, _unpin, _block_size, _file_flags, _directory_flags
    _inode, _names, _opened, _breaks, _pin, _unpin = inode, names, opened, breaks, pin, unpin
    _block_size, _file_flags, _directory_flags = block_size, file_flags, directory_flags
    remove()
    if quick:
        set_quick(FUSE_LOOKUP, _lookup)
        set_quick(FUSE_GETXATTR, _getxattr)
        set_quick(FUSE_OPENDIR, _open_any)
        set_quick(FUSE_RELEASEDIR, _release)
    if quick and direct:
        set_quick(FUSE_GETATTR, _getattr)
        set_quick(FUSE_OPEN, _open_any)
        set_quick(FUSE_RELEASE, _release)
        set_quick(FUSE_IOCTL, _ioctl)
        set_quick(FUSE_POLL, _poll)
        set_quick(FUSE_FSYNC, _fsync)


def remove():
    """The device is gone: Python answers everything from now on."""
    for opcode in (
        FUSE_LOOKUP, FUSE_GETATTR, FUSE_GETXATTR, FUSE_OPEN, FUSE_OPENDIR, FUSE_RELEASE, FUSE_RELEASEDIR, FUSE_IOCTL,
        FUSE_POLL, FUSE_FSYNC,
    ):
        set_quick(opcode, NULL)
