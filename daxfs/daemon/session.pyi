"""The native session; see session.pyx. The protocol's numbers and records are in protocol.py."""

from collections.abc import Callable, Sequence

from trio.abc import Instrument

INIT_ASYNC_READ: int
INIT_ATOMIC_O_TRUNC: int
INIT_EXPORT_SUPPORT: int
INIT_BIG_WRITES: int
INIT_DONT_MASK: int
INIT_HAS_IOCTL_DIR: int
INIT_DO_READDIRPLUS: int
INIT_READDIRPLUS_AUTO: int
INIT_ASYNC_DIO: int
INIT_PARALLEL_DIROPS: int
INIT_POSIX_ACL: int
INIT_MAX_PAGES: int
INIT_CACHE_SYMLINKS: int
INIT_HANDLE_KILLPRIV_V2: int
INIT_SETXATTR_EXT: int
INIT_EXT: int
INIT_DIRECT_IO_ALLOW_MMAP: int
INIT_WRITEBACK_CACHE: int
INIT_DEFAULT: int
"""All of them but EXPORT_SUPPORT (which needs a LOOKUP of `.` and `..` that works) and WRITEBACK_CACHE."""

class Request:
    """One FUSE request that Python answers, exactly once, now or later, from any thread.
    Dropped unanswered, it answers EIO and logs an error."""

    @property
    def opcode(self) -> int: ...
    @property
    def unique(self) -> int: ...
    @property
    def nodeid(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def body(self) -> memoryview:
        """The payload behind the request's header; valid for as long as somebody holds it."""
    @property
    def answered(self) -> bool: ...
    @property
    def interrupted(self) -> bool:
        """The caller was interrupted while the request was kept: look before waiting, `on_interrupt` is called once."""
    on_interrupt: Callable[[], object] | None
    """Called on the trio thread when the caller was interrupted or killed while this is unanswered. It usually ends
    the work and answers EINTR. Without one the caller goes on waiting. Dropped once the request is answered."""

    def reply(self, data: bytes | bytearray | memoryview = b"") -> None:
        """Answer with success and these bytes. RuntimeError if already answered. A caller that is gone is no error."""
    def reply_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """The same with the bytes in pieces, sent without joining them (pieces of the mapping, say)."""
    def error(self, number: int) -> None:
        """Answer with this errno, a positive number."""

def register(opcode: int, callback: Callable[[Request], object] | None) -> None:
    """Take requests of this opcode away from pyfuse3: `callback(request)` runs on the trio thread, must not block,
    and answers at once or keeps the request (a nursery task may answer it). An exception is a bug: it is logged,
    answered with EIO and given to `on_crash`. None gives the opcode back to pyfuse3. FORGET and BATCH_FORGET have no
    answer: their requests count as answered from the start."""

def configure(
    *,
    init_flags: int = ...,
    max_write: int = 1 << 20,
    max_background: int = 64,
    hotpath: bool = True,
    atime: bool = True,
    spin_us: int = 100,
    on_crash: Callable[[BaseException], object] | None = None,
    on_lost: Callable[[int, int, bool], object] | None = None,
) -> None:
    """Before pyfuse3.init(), after register(). `init_flags` (INIT_DEFAULT) are granted as far as the kernel offers
    them, and no others. `atime=False` (a read-only volume, noatime): hot reads leave the atime word alone.
    `spin_us`: how long at most to poll for a next request that is expected soon; 0: never. `on_lost(first, end,
    truncated)`: bytes [first, end) of the image are lost, as the file ends there (`truncated`) or the host cannot give
    a page of it."""

def guard(address: int, size: int, fd: int) -> None:
    """Watch the mapping of the image of descriptor `fd`. When pages of it are gone, memory takes their place (lostpages.h),
    and every answer is EIO until the `on_lost` of `configure` has returned."""

def unguard() -> None:
    """The image is closed."""

def look() -> bool:
    """Find out now whether the image is shorter than its mapping. `lost()`."""

def lost() -> bool:
    """Whether pages of the image were lost since `guard`."""

def attach(
    map_pointer: int = 0, *, readable: bool = True, writable: bool = False, fills: bool = True, keep: object = None
) -> int:
    """A file handle for the kernel: the `fh` of an OPEN, CREATE or OPENDIR reply. With the address of a `dx_map`
    (ExtentMap.pointer) it is hot: reads and in-place writes are answered in C as far as the map's hot bits allow; 0
    makes a cold handle. Without `fills`, READs for pages of the kernel (no lock owner) are left to the callback. `keep` is
    held until detach(): give the object that owns the map, which must stay where it is until then. Handles are small
    numbers, used again after detach()."""

def detach(fh: int) -> None:
    """The kernel has released the handle. KeyError if it is not attached."""

def keeper(fh: int) -> object:
    """The `keep` object of a handle. KeyError if it is not attached: answer EBADF."""

def keep_spare(size: int) -> None:
    """Keep so many bytes of address space back for when allocations fail (spare.h). MemoryError if they are not there."""

def give_spare() -> bool:
    """An allocation that is not Python's has failed: whether trying again is worth it."""

def short() -> bool:
    """Whether what makes the daemon hold more is refused, as there is no memory."""

SPIN_US: int
SPIN_US_MAX: int

class Runnable(Instrument):
    """To be installed (trio.lowlevel.add_instrument) while `drain` is called: it does not wait while a task could run."""

def drain(others: int = -1, patience_s: float = 0) -> bool:
    """Answer requests until it is trio's turn: after 2 ms, or when there is no request, none comes soon, and trio has
    something to do or has to look for it. `patience_s`: how far trio's next deadline is. `others`: a descriptor that is
    readable when trio has an event. False: the mount is gone. On the trio thread only; never raises."""

def fileno() -> int:
    """The descriptor of the mount, to wait for. ValueError when nothing is mounted."""

def mounted() -> bool:
    """True from pyfuse3.init() to pyfuse3.close(), if it is this extension that serves the mount."""

def waiting() -> list[Request]:
    """The requests that Python keeps and has not answered."""

def counters() -> dict[str, int]:
    """Since the import: hot_reads, hot_writes, hot_read_bytes, hot_write_bytes, quick (answered by requests.pyx), raw (to
    callbacks), passed (to pyfuse3), interrupts, drains (calls of `drain`), spins and spin_hits, spin_us (time in spins),
    naps and nap_hits (see linger.h), lost (answers that the kernel did not take: caller or mount gone), refused (for want
    of memory)."""

def inval_inode(ino: int, offset: int = 0, length: int = 0) -> None:
    """Drop the kernel's cached attributes of an inode and its cached pages of a range (length 0: to the end; offset
    < 0: attributes only). Unless offset < 0 it can block on dirty pages: from a worker thread only. An inode that the
    kernel does not know is no error."""

def retrieve(unique: int, ino: int, offset: int, size: int) -> None:
    """Have the kernel send what it has of a file in its page cache, as a request NOTIFY_REPLY of this number: pages from
    `offset` on, up to the first that it does not have. Nothing is sent when the inode is not known. Does not wait."""

def inval_entry(parent: int, name: bytes) -> None:
    """Drop a cached name. Waits for the kernel's lock of the directory: from a worker thread only."""

def notify_poll(kh: int) -> None:
    """Wake the pollers of a POLL request's `kh`."""
