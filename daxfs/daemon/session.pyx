# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""The native session: between the kernel and pyfuse3, it sees every FUSE request first.

Owns the FUSE descriptor's reading side (fuseio.c), the file handles (hotpath.c), and the requests that Python answers
itself. A task (serving.py) waits for the descriptor and calls `drain`, which answers requests until none is left and waiting
a little for more does not pay (linger.c), or it is trio's turn:

    READ or WRITE on a hot handle   answered in C from the mapping (hotpath.c)
    an opcode with a quick handler  answered from what is in memory, if it can be (requests.pyx)
    an opcode with a callback       `callback(Request)`
    INTERRUPT                       `on_interrupt` of the request it names
    anything else                   left to libfuse, and so to pyfuse3, whose own loop waits for it

Rules
- Everything here runs on the trio thread, but for `Request.reply*`/`error` and the notifications.
- A request is answered exactly once. One that is dropped, or whose callback raises, answers EIO: never is a caller left.
- A caller or a mount that is gone is no error: the answer is lost, and counted.
- No stream of requests keeps the thread from trio for more than 2 ms and the last request, and no waiting does while trio has
  something to do: a task that could run (`Runnable`), a deadline, an event.
- Without memory (spare.h) a request that would make the daemon hold more is answered ENOMEM before anybody sees it. A failed
  allocation in here costs the request under way an EIO or ENOMEM, and nobody anything else.
- The module must be loaded before pyfuse3 (importing `daxfs.daemon` does it); the import fails otherwise.

States of a Request: new (in its callback), kept (unanswered behind it, listed by waiting()), answered.

Not here: the protocol's records (protocol.py), what any request means (raw.py, names.py).
"""

import logging
import sys

from cpython.buffer cimport (
    Py_buffer, PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, EIO, ENODEV, ENOENT, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close, dup, read

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

cdef extern from "fuseio.h" nogil:
    enum:
        FUSE_ASYNC_READ, FUSE_ATOMIC_O_TRUNC, FUSE_EXPORT_SUPPORT, FUSE_BIG_WRITES, FUSE_DONT_MASK, FUSE_HAS_IOCTL_DIR
        FUSE_DO_READDIRPLUS, FUSE_READDIRPLUS_AUTO, FUSE_ASYNC_DIO, FUSE_PARALLEL_DIROPS, FUSE_POSIX_ACL, FUSE_MAX_PAGES
        FUSE_CACHE_SYMLINKS, FUSE_WRITEBACK_CACHE, FUSE_HANDLE_KILLPRIV_V2, FUSE_SETXATTR_EXT, FUSE_INIT_EXT
        FUSE_FORGET, FUSE_READ, FUSE_WRITE, FUSE_INIT, FUSE_INTERRUPT, FUSE_SETXATTR, FUSE_BATCH_FORGET
        FUSE_NOTIFY_REPLY
        FUSE_NOTIFY_POLL, FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_INVAL_ENTRY, FUSE_NOTIFY_RETRIEVE
    const uint64_t FUSE_DIRECT_IO_ALLOW_MMAP
    struct fuse_write_in:
        pass
    struct fuse_interrupt_in:
        uint64_t unique
    struct fuse_notify_poll_wakeup_out:
        uint64_t kh
    struct fuse_notify_inval_inode_out:
        uint64_t ino
        int64_t off, len
    struct fuse_notify_retrieve_out:
        uint64_t notify_unique, nodeid, offset
        uint32_t size, padding
    struct fuse_notify_inval_entry_out:
        uint64_t parent
        uint32_t namelen, flags
    ctypedef struct dx_session:
        int fd
        uint64_t init_flags
        uint32_t max_write, max_background
    dx_session dx
    int dx_interpose()
    int dx_pass(const fuse_in_header *, size_t)
    int dx_passing()
    void dx_end()
    int dx_grows(const fuse_in_header *)
    int dx_answer(uint64_t, int, iovec *, int)
    int dx_notify(int, int, iovec *, int)

cdef extern from "hotpath.h" nogil:
    enum:
        DX_READABLE, DX_WRITABLE, DX_FILLS
    ctypedef struct dx_map:
        pass
    ctypedef struct dx_hot_state:
        int enabled, atime, pages
        uint64_t reads, writes, read_bytes, write_bytes
    dx_hot_state dx_hot
    uint64_t dx_attach(const dx_map *, unsigned)
    int dx_detach(uint64_t)
    int dx_try_hot(const fuse_in_header *, size_t)
    void dx_note_read(const dx_map *, uint32_t)
    void dx_end_write(const fuse_in_header *, const fuse_write_in *, const dx_map *)

cdef extern from "persist.h" nogil:
    void dx_store(void *, const void *, size_t)

cdef extern from "linger.h" nogil:
    ctypedef struct dx_linger_state:
        int64_t spin_ns, spun_ns
        uint64_t spins, spin_hits, naps, nap_hits
    dx_linger_state dx_linger
    ctypedef struct dx_turn:
        int64_t now, end
    int64_t dx_clock()
    void dx_begin(dx_turn *turn, int others, int64_t patience_ns)
    ssize_t dx_wait(int fd, void *buffer, size_t size, dx_turn *turn)
    void dx_dry()
    void dx_came()

cdef extern from "lostpages.h" nogil:
    enum:
        DX_LOST_END
    ctypedef struct dx_lost_state:
        int fresh, what
        uint64_t first, end
    dx_lost_state dx_lost
    int dx_guard(void *base, size_t size, int fd)
    void dx_look()

cdef extern from "spare.h" nogil:
    int dx_spare_keep(size_t)
    int dx_spare_gone()
    int dx_spare_give(size_t)
    int dx_spare_regain()
    void dx_spare_complain()

INIT_ASYNC_READ = FUSE_ASYNC_READ
INIT_ATOMIC_O_TRUNC = FUSE_ATOMIC_O_TRUNC
INIT_EXPORT_SUPPORT = FUSE_EXPORT_SUPPORT
INIT_BIG_WRITES = FUSE_BIG_WRITES
INIT_DONT_MASK = FUSE_DONT_MASK
INIT_HAS_IOCTL_DIR = FUSE_HAS_IOCTL_DIR
INIT_DO_READDIRPLUS = FUSE_DO_READDIRPLUS
INIT_READDIRPLUS_AUTO = FUSE_READDIRPLUS_AUTO
INIT_ASYNC_DIO = FUSE_ASYNC_DIO
INIT_PARALLEL_DIROPS = FUSE_PARALLEL_DIROPS
INIT_POSIX_ACL = FUSE_POSIX_ACL
INIT_MAX_PAGES = FUSE_MAX_PAGES
INIT_CACHE_SYMLINKS = FUSE_CACHE_SYMLINKS
INIT_HANDLE_KILLPRIV_V2 = FUSE_HANDLE_KILLPRIV_V2
INIT_SETXATTR_EXT = FUSE_SETXATTR_EXT
INIT_EXT = FUSE_INIT_EXT
INIT_DIRECT_IO_ALLOW_MMAP = FUSE_DIRECT_IO_ALLOW_MMAP
INIT_WRITEBACK_CACHE = FUSE_WRITEBACK_CACHE

# Not among them: AUTO_INVAL_DATA, as a new mtime would throw mapped pages away, and the kernel drops those that a direct
# write overtakes anyway; the lock flags, so that the kernel keeps locks itself; WRITEBACK_CACHE (caching.py).
INIT_DEFAULT = (
    INIT_ASYNC_READ | INIT_ATOMIC_O_TRUNC | INIT_BIG_WRITES | INIT_DONT_MASK | INIT_HAS_IOCTL_DIR | INIT_DO_READDIRPLUS
    | INIT_READDIRPLUS_AUTO | INIT_ASYNC_DIO | INIT_PARALLEL_DIROPS | INIT_POSIX_ACL | INIT_MAX_PAGES | INIT_CACHE_SYMLINKS
    | INIT_HANDLE_KILLPRIV_V2 | INIT_SETXATTR_EXT | INIT_EXT | INIT_DIRECT_IO_ALLOW_MMAP
)

SPIN_US = 100
SPIN_US_MAX = 1000

log = logging.getLogger(__name__)

cdef enum:
    OPCODES = 64
    HEADER = 40  # bytes of fuse_in_header
    COPY_MAX = 16384  # bytes of a request that are copied for Python; more is lent
    PIECES_MAX = 1000  # the kernel takes 1024
    HOT_BATCH = 16  # hot requests between two looks at the clock
    INSIST_MAX = 100  # how often what must not fail is tried again when memory is short
    SHORT_QUIET_NS = 10_000_000_000  # between two complaints about memory

cdef list _callbacks = [None] * OPCODES
cdef quick_handler[OPCODES] _quick_handlers
cdef dict _kept = {}  # unique -> address of a Request, which removes itself
cdef dict _keepers = {}  # fh -> what its owner wants held
cdef object _on_crash = None
cdef object _on_lost = None
cdef _Buffer _buffer = None  # where the next request is read into
cdef _Buffer _reserve = None  # stands in for it when there is no memory for a new one; never lent
cdef int _runnable = 0  # trio's tasks that wait for their turn
cdef bint _short = False  # whether requests are refused for want of memory
cdef int64_t _short_told = 0
cdef uint64_t _unanswered = 0  # the request that was read, until somebody answers for it
cdef uint64_t _quick = 0, _raw = 0, _passed = 0, _interrupts = 0, _drains = 0, _lost = 0, _refused = 0


# -- requests ---------------------------------------------------------------------------------------------------------


cdef class _Buffer:
    """Room for the largest request. A large body is lent to its Request; as long as somebody holds it, the session reads
    into another buffer. The data of a WRITE (behind 80 bytes) starts at a cache line."""

    cdef char *memory
    cdef char *start
    cdef size_t size
    cdef int exports

    def __cinit__(self, size_t size):
        cdef void *memory = NULL
        if posix_memalign(&memory, 4096, size + 64) and (
            not dx_spare_give(size) or posix_memalign(&memory, 4096, size + 64)
        ):
            raise MemoryError
        self.memory = <char *>memory
        self.start = self.memory + 48
        self.size = size

    def __dealloc__(self):
        free(self.memory)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, <Py_ssize_t>self.size, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1


cdef class Request:
    cdef readonly uint32_t opcode, uid, gid, pid
    cdef readonly uint64_t unique, nodeid
    cdef readonly object body
    cdef readonly bint answered
    cdef readonly bint interrupted
    cdef public object on_interrupt
    cdef object number  # its key in _kept: there must be one when it has to go

    def __init__(self):
        raise TypeError("requests come from the kernel")

    def __dealloc__(self):
        if self.answered:
            return
        self.finish()
        _send_error(self.unique, EIO)
        _say(log.error, "request %d (opcode %d) was dropped without an answer; answered EIO", (self.unique, self.opcode))

    def __repr__(self):
        return (f"<Request {self.unique} opcode={self.opcode} nodeid={self.nodeid} pid={self.pid}"
                f"{' answered' if self.answered else ''}>")

    cdef void finish(self) noexcept:
        self.answered = True
        if self.number is not None:
            _kept.pop(self.number, None)  # it has no need of memory: the key is there, with its hash

    cdef int begin_answer(self) except -1:
        if self.answered:
            raise RuntimeError(f"request {self.unique} (opcode {self.opcode}) is answered already")
        self.finish()
        self.on_interrupt = None
        return 0

    def reply(self, data=b""):
        cdef iovec iov[2]
        cdef Py_buffer view
        if PyBytes_CheckExact(data):
            self.begin_answer()
            iov[1].iov_base = PyBytes_AS_STRING(data)
            iov[1].iov_len = <size_t>PyBytes_GET_SIZE(data)
            _send(self.unique, iov, 2)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.begin_answer()
            iov[1].iov_base = view.buf
            iov[1].iov_len = <size_t>view.len
            _send(self.unique, iov, 2)
        finally:
            PyBuffer_Release(&view)

    def reply_parts(self, parts):
        cdef list pieces = list(parts)
        cdef Py_ssize_t count = len(pieces), held = 0, i
        cdef iovec *iov
        cdef Py_buffer *views
        if count > PIECES_MAX:
            self.reply(b"".join(pieces))
            return
        iov = <iovec *>malloc((count + 1) * sizeof(iovec))
        views = <Py_buffer *>malloc((count + 1) * sizeof(Py_buffer))
        try:
            if iov == NULL or views == NULL:
                raise MemoryError
            for i in range(count):
                PyObject_GetBuffer(pieces[i], &views[i], PyBUF_SIMPLE)
                held += 1
                iov[i + 1].iov_base = views[i].buf
                iov[i + 1].iov_len = <size_t>views[i].len
            self.begin_answer()
            _send(self.unique, iov, <int>count + 1)
        finally:
            for i in range(held):
                PyBuffer_Release(&views[i])
            free(views)
            free(iov)

    def error(self, int number):
        if not 0 < number < 512:
            raise ValueError(f"{number} is not an errno")
        self.begin_answer()
        _send_error(self.unique, number)


cdef void _say(report, text, tuple args=(), exc=None) noexcept:
    """Log it, if there is any way; that it cannot be logged is no reason to leave out what comes next."""
    cdef int tries = INSIST_MAX
    while tries > 0:
        tries -= 1
        try:
            report(text, *args, exc_info=exc)
            return
        except MemoryError:
            continue
        except BaseException:
            break
    dx_spare_complain()


cdef void _send_error(uint64_t unique, int number) noexcept:
    global _lost
    cdef iovec iov[1]
    if dx_answer(unique, number, iov, 1) < 0:
        _lost += 1


cdef int _send(uint64_t unique, iovec *iov, int count) except -1:
    """Answer with success. What the kernel refuses is answered EIO: the caller must not wait for ever."""
    global _lost
    cdef int res
    if dx_lost.fresh:  # it was made from pages that are gone
        _send_error(unique, EIO)
        return 0
    res = dx_answer(unique, 0, iov, count)
    if res == 0:
        return 0
    _lost += 1
    if res != -ENOENT and res != -ENODEV:
        log.error("the kernel refused the answer of request %d (errno %d); answered EIO", unique, -res)
        dx_answer(unique, EIO, iov, 1)
    return 0


cdef _crashed(Request request, exc):
    """A bug in a callback: say so, let the caller go, tell the daemon."""
    cdef int tries = INSIST_MAX
    if not request.answered:
        request.finish()
        request.on_interrupt = None
        _send_error(request.unique, EIO)
    while _on_crash is not None and tries > 0:
        tries -= 1
        try:
            _on_crash(exc)
            break
        except MemoryError:
            continue
        except BaseException:
            _say(log.exception, "on_crash failed")
            break
    _say(log.error, "request %d (opcode %d) failed with a bug; answered EIO", (request.unique, request.opcode), exc)


cdef inline bint _wants_answer(const fuse_in_header *header) noexcept:
    return header.opcode != FUSE_FORGET and header.opcode != FUSE_BATCH_FORGET and header.opcode != FUSE_NOTIFY_REPLY


cdef Request _new_request(const fuse_in_header *header, size_t length):
    global _unanswered
    cdef Request request = Request.__new__(Request)
    request.answered = True  # until it is whole
    request.opcode = header.opcode
    request.unique = header.unique
    request.nodeid = header.nodeid
    request.uid = header.uid
    request.gid = header.gid
    request.pid = header.pid
    if length <= COPY_MAX or _buffer is _reserve:
        request.body = memoryview(PyBytes_FromStringAndSize(<const char *>header + HEADER, <Py_ssize_t>length - HEADER))
    else:
        request.body = memoryview(_buffer)[HEADER:length]
    request.answered = not _wants_answer(header)
    _unanswered = 0
    return request


cdef void _without_memory(const fuse_in_header *header) noexcept:
    """No request could be made of it, or left to libfuse."""
    global _refused
    _refused += 1
    if _wants_answer(header):
        _send_error(header.unique, ENOMEM)


cdef Request _insist_on_request(const fuse_in_header *header, size_t length):
    """A RELEASE that is lost would never be repeated. None if there is no memory, however often one tries."""
    cdef int tries = INSIST_MAX
    while tries > 0:
        tries -= 1
        try:
            return _new_request(header, length)
        except MemoryError:
            continue
    return None


cdef _keep(Request request):
    """So that its caller can be interrupted; not being able to is no reason to fail."""
    cdef int tries = INSIST_MAX
    while tries > 0:
        tries -= 1
        try:
            number = request.unique
            _kept[number] = <uintptr_t><void *>request
            request.number = number
            return
        except MemoryError:
            continue


cdef _dispatch(const fuse_in_header *header, size_t length):
    cdef Request request = _insist_on_request(header, length)
    if request is None:
        _without_memory(header)
        return
    try:
        _callbacks[header.opcode](request)
    except BaseException as exc:
        _crashed(request, exc)
    if not request.answered:
        _keep(request)


cdef bint _answered_quickly(const fuse_in_header *header, size_t length) except -1:
    """A bug there is one of the request alone, as in a callback."""
    cdef Request request
    try:
        return _quick_handlers[header.opcode](header, length)
    except BaseException as exc:
        request = _insist_on_request(header, length)
        if request is None:
            raise
        _crashed(request, exc)
    return True


cdef _interrupt(const fuse_interrupt_in *arg):
    """One that names no kept request comes too late: it has been answered (or is pyfuse3's, which does not wait)."""
    global _interrupts
    cdef Request request
    address = _kept.get(arg.unique)
    if address is None:
        return
    _interrupts += 1
    request = <Request><void *><uintptr_t>address
    request.interrupted = True
    if request.on_interrupt is None:
        return
    try:
        request.on_interrupt()
    except BaseException as exc:
        _crashed(request, exc)


# -- lost pages -------------------------------------------------------------------------------------------------------


cdef _tell_lost():
    """The daemon hears of it, and answers accordingly from now on. Without a daemon to hear, all answers stay EIO."""
    if _on_lost is None:
        return
    try:
        _on_lost(dx_lost.first, dx_lost.end, dx_lost.what == DX_LOST_END)
        dx_lost.fresh = 0
    except BaseException:
        log.exception("on_lost failed")


def guard(uintptr_t address, size_t size, int fd):
    cdef int res = dx_guard(<void *>address, size, fd)
    if res < 0:
        raise OSError(-res, "cannot handle SIGBUS")


def unguard():
    guard(0, 0, -1)


def look():
    dx_look()
    if dx_lost.fresh:
        _tell_lost()
    return bool(dx_lost.what)


def lost():
    return bool(dx_lost.what)


# -- the drain --------------------------------------------------------------------------------------------------------


cdef _Buffer _new_buffer():
    return _Buffer(dx.max_write + 4096)


cdef void _renew_buffer() noexcept:
    """Somebody holds the body of a request that is in the buffer, or there was no memory for a new one last time."""
    global _buffer
    _buffer = _reserve
    try:
        _buffer = _new_buffer()
    except BaseException:
        pass


cdef void _mind_memory() noexcept:
    """The spare memory is gone: what makes the daemon hold more is refused until it is back."""
    global _short, _short_told
    cdef bint short = not dx_spare_regain()
    if short == _short:
        return
    _short = short
    if not short:
        _say(log.warning, "there is memory again: nothing is refused any more")
    elif dx_clock() > _short_told:
        _short_told = dx_clock() + SHORT_QUIET_NS
        _say(log.error, "out of memory: names, opens and writes are refused (ENOMEM) until there is more; raise the limit"
             " of the daemon (prlimit --as), or close files and drop the caches of the host")


cdef class Runnable:
    """A trio instrument: counts the tasks that could run."""

    def task_scheduled(self, task):
        global _runnable
        _runnable += 1

    def before_task_step(self, task):
        global _runnable
        if _runnable:  # it may have been scheduled before this was installed
            _runnable -= 1


def drain(int others=-1, double patience_s=0):
    global _drains
    cdef dx_turn turn
    _drains += 1
    dx_begin(&turn, others, <int64_t>(1e9 * min(max(patience_s, 0), 1)))
    try:
        return _drain(&turn)
    except BaseException as exc:  # each round has taken a request, so this does not go on for ever
        if _unanswered:
            _send_error(_unanswered, EIO)
        _say(log.critical, "the session failed", (), exc)
        return True


cdef bint _drain(dx_turn *turn) except -1:
    global _unanswered
    cdef bint first = True
    cdef int hot = 0
    cdef ssize_t n
    while turn.now < turn.end:
        _unanswered = 0
        if dx_lost.fresh:
            _tell_lost()
        if _buffer.exports or _buffer is _reserve:
            _renew_buffer()
        n = _next(first, turn)
        if n == -EAGAIN:
            break
        first = False
        if n == -ENOENT or n == -EINTR:  # the caller was killed before we got its request
            continue
        if n < 0:
            dx_end()
            if n != -ENODEV:
                _say(log.critical, "requests cannot be read any more (errno %d)", (-n,))
            return False
        if dx_spare_gone() or _short:
            _mind_memory()
        if _answer(<const fuse_in_header *>_buffer.start, <size_t>n):
            hot += 1
            if hot % HOT_BATCH:
                continue
        turn.now = dx_clock()
    return True


cdef ssize_t _next(bint first, dx_turn *turn) noexcept:
    """Read the next request, also one that comes a little later. Bytes or -errno, -EAGAIN: it is trio's turn."""
    cdef ssize_t n = read(dx.fd, _buffer.start, _buffer.size)
    if n >= 0:
        if first:
            dx_came()
    elif errno != EAGAIN:
        n = -errno
    elif _runnable or dx_passing():
        dx_dry()
        n = -EAGAIN
    else:
        with nogil:
            n = dx_wait(dx.fd, _buffer.start, _buffer.size, turn)
    return n


cdef bint _answer(const fuse_in_header *header, size_t length) except -1:
    """Whether it was hot."""
    global _quick, _raw, _passed, _refused, _unanswered
    if length < HEADER:
        _say(log.error, "a request of %d bytes; ignored", (length,))
        return False
    if (header.opcode == FUSE_READ or header.opcode == FUSE_WRITE) and dx_try_hot(header, length):
        return True
    _unanswered = header.unique
    if header.opcode == FUSE_INTERRUPT:
        _interrupt(<const fuse_interrupt_in *>(_buffer.start + HEADER))
    elif _short and dx_grows(header):
        _refused += 1
        _send_error(header.unique, ENOMEM)
    elif header.opcode < OPCODES and _quick_handlers[header.opcode] != NULL and _answered_quickly(header, length):
        _quick += 1
    elif header.opcode < OPCODES and _callbacks[header.opcode] is not None:
        _raw += 1
        _dispatch(header, length)
    elif dx_pass(header, length) and not (dx_spare_give(length) and dx_pass(header, length) == 0):
        _without_memory(header)
    else:
        _passed += 1
    return False


# -- what the daemon calls --------------------------------------------------------------------------------------------


def register(int opcode, callback):
    if not 0 < opcode < OPCODES or opcode == FUSE_INIT or opcode == FUSE_INTERRUPT:
        raise ValueError(f"opcode {opcode} cannot be taken")
    _callbacks[opcode] = callback


def configure(*, init_flags=INIT_DEFAULT, max_write=1 << 20, max_background=64, hotpath=True, atime=True, spin_us=SPIN_US,
              on_crash=None, on_lost=None):
    global _on_crash, _on_lost, _buffer, _reserve
    if not 4096 <= max_write <= 1 << 20 or max_write % 4096:
        raise ValueError(f"max_write {max_write}: must be a multiple of 4096, up to 1 MiB")
    if not 1 <= max_background <= 65535:
        raise ValueError(f"max_background {max_background}: must be from 1 to 65535")
    if not 0 <= spin_us <= SPIN_US_MAX:
        raise ValueError(f"spin_us {spin_us}: must be from 0 to {SPIN_US_MAX}")
    if dx.fd >= 0:
        raise RuntimeError("configure() must come before the mount")
    if _callbacks[FUSE_SETXATTR] is None:
        init_flags &= ~INIT_SETXATTR_EXT  # libfuse would not understand the longer record
    dx.init_flags = init_flags
    dx.max_write = max_write
    dx.max_background = max_background
    dx_hot.enabled = hotpath
    dx_hot.atime = atime
    dx_linger.spin_ns = <int64_t>spin_us * 1000
    _on_crash = on_crash
    _on_lost = on_lost
    _buffer = _new_buffer()
    _reserve = _new_buffer()


def attach(uintptr_t map_pointer=0, *, bint readable=True, bint writable=False, bint fills=True, keep=None):
    cdef unsigned access = (DX_READABLE if readable else 0) | (DX_WRITABLE if writable else 0) | (DX_FILLS if fills else 0)
    return attach_handle(<const void *>map_pointer, access, keep)


def detach(uint64_t fh):
    del _keepers[fh]
    dx_detach(fh)


def keeper(uint64_t fh):
    return _keepers[fh]


def keep_spare(size_t size):
    if dx_spare_keep(size) < 0:
        raise MemoryError


def give_spare():
    return bool(dx_spare_give(1))


def short():
    return _short


def mounted():
    return dx.fd >= 0


def fileno():
    if dx.fd < 0:
        raise ValueError("nothing is mounted")
    return dx.fd


def waiting():
    return [<Request><void *><uintptr_t>address for address in _kept.values()]


def counters():
    return {
        "hot_reads": dx_hot.reads,
        "hot_writes": dx_hot.writes,
        "hot_read_bytes": dx_hot.read_bytes,
        "hot_write_bytes": dx_hot.write_bytes,
        "quick": _quick,
        "raw": _raw,
        "passed": _passed,
        "interrupts": _interrupts,
        "drains": _drains,
        "spins": dx_linger.spins,
        "spin_hits": dx_linger.spin_hits,
        "spin_us": dx_linger.spun_ns // 1000,
        "naps": dx_linger.naps,
        "nap_hits": dx_linger.nap_hits,
        "lost": _lost,
        "refused": _refused,
    }


# -- what compiled modules call (session.pxd) --------------------------------------------------------------------------


cdef int set_quick(int opcode, quick_handler handler) except -1:
    _quick_handlers[opcode] = handler
    return 0


cdef void keep_pages(bint on) noexcept:
    dx_hot.pages = on


cdef int try_hot(const fuse_in_header *header, size_t length) noexcept:
    return dx_try_hot(header, length)


cdef void note_read(const void *map, uint32_t open_flags) noexcept:
    dx_note_read(<const dx_map *>map, open_flags)


cdef void end_write(const fuse_in_header *header, const void *map) noexcept:
    dx_end_write(header, <const fuse_write_in *>(<const char *>header + HEADER), <const dx_map *>map)


cdef void store(void *to, const void *data, size_t n) noexcept nogil:
    dx_store(to, data, n)


cdef int answer(uint64_t unique, const void *data, size_t length) except -1:
    cdef iovec iov[2]
    iov[1].iov_base = <void *>data
    iov[1].iov_len = length
    return _send(unique, iov, 2 if length else 1)


cdef int refuse(uint64_t unique, int number) except -1:
    _send_error(unique, number)
    return 0


cdef object attach_handle(const void *map_pointer, unsigned access, keep):
    cdef uint64_t fh = dx_attach(<const dx_map *>map_pointer, access)
    if fh == 0 and dx_spare_give(1):
        fh = dx_attach(<const dx_map *>map_pointer, access)
    if fh == 0:
        raise MemoryError
    try:
        number = fh
        _keepers[number] = keep
    except BaseException:
        dx_detach(fh)
        raise
    return number


cdef object held(fh):
    return _keepers.get(fh)


cdef int detach_handle(fh) except -1:
    del _keepers[fh]
    dx_detach(fh)
    return 0


# -- notifications ----------------------------------------------------------------------------------------------------


cdef int _notify(int code, iovec *iov, int count) except -1:
    """Without the GIL, as it can block. On a descriptor of its own, as the mount can go meanwhile."""
    cdef int fd, res
    if dx.fd < 0:
        return 0
    fd = dup(dx.fd)
    if fd < 0:
        raise OSError(errno, "cannot duplicate the descriptor of the mount")
    with nogil:
        res = dx_notify(fd, code, iov, count)
        close(fd)
    if res < 0 and res != -ENOENT and res != -ENODEV:
        raise OSError(-res, f"the kernel refused notification {code}")
    return 0


def inval_inode(uint64_t ino, int64_t offset=0, int64_t length=0):
    cdef fuse_notify_inval_inode_out out
    cdef iovec iov[2]
    out.ino = ino
    out.off = offset
    out.len = length
    iov[1].iov_base = &out
    iov[1].iov_len = sizeof(out)
    _notify(FUSE_NOTIFY_INVAL_INODE, iov, 2)


def retrieve(uint64_t unique, uint64_t ino, uint64_t offset, uint32_t size):
    cdef fuse_notify_retrieve_out out
    cdef iovec iov[2]
    memset(&out, 0, sizeof(out))
    out.notify_unique, out.nodeid, out.offset, out.size = unique, ino, offset, size
    iov[1].iov_base = &out
    iov[1].iov_len = sizeof(out)
    _notify(FUSE_NOTIFY_RETRIEVE, iov, 2)


def inval_entry(uint64_t parent, bytes name):
    cdef fuse_notify_inval_entry_out out
    cdef iovec iov[3]
    memset(&out, 0, sizeof(out))
    out.parent = parent
    out.namelen = <uint32_t>len(name)
    iov[1].iov_base = &out
    iov[1].iov_len = sizeof(out)
    iov[2].iov_base = PyBytes_AS_STRING(name)
    iov[2].iov_len = <size_t>len(name) + 1  # with its NUL
    _notify(FUSE_NOTIFY_INVAL_ENTRY, iov, 3)


def notify_poll(uint64_t kh):
    cdef fuse_notify_poll_wakeup_out out
    cdef iovec iov[2]
    out.kh = kh
    iov[1].iov_base = &out
    iov[1].iov_len = sizeof(out)
    _notify(FUSE_NOTIFY_POLL, iov, 2)


if "pyfuse3" in sys.modules:
    raise ImportError("import daxfs.daemon before pyfuse3: the session must come before libfuse")
if dx_interpose():
    raise ImportError("cannot place the session before libfuse: the dynamic linker refused")
configure()
