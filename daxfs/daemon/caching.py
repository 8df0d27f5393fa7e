"""Which opens of a file go through the kernel's page cache: none with `-o dax=always`, most with `-o dax=never`.

A mount with `dax=never` has FUSE_WRITEBACK_CACHE: dirty pages are written back later, and the kernel owns the size and the
times of a file; what it does not ask for again by itself it is told here (`grown`), and what it does not write back by
itself is fetched (`drop`).

States of a regular file of such a mount: closed; cached (open, every handle through the cache); direct (open, no handle
through the cache: FOPEN_DIRECT_IO). The first open decides: direct with abi.O_PIN, or when a pin of a dead daemon is left
on the file, else cached; later ones follow. So a file is never both, and has no dirty pages when it is direct. (O_DIRECT
alone is the kernel's business, as on any file system with a page cache.)

A holder changes the blocks behind the kernel's back, and nobody knows when: a pinned file must have no pages.

The kernel does not say how long a file is before it has written that back. So whatever the daemon is asked that depends
on the end of a file: a fallocate or a copy that may make it longer comes after what lies behind the end, as the volume
has it, is written back and the pages from there on are dropped (`settle`). While a truncate is being answered the kernel
holds write-back back: it is asked how long the file is (kernelsize.py), and gets zeros for the rest of the page of the
end (`zero_behind`). So blocks that were preallocated behind the true end are given back, and bytes that a mapping stored
behind it do not show in a file that grows. A write(2), be it to the cache or around it, makes a file longer without any
of this.

Rules
- A pin needs a direct file: `before_pin` refuses one through a cached handle (EBUSY). As a pin lives no longer than its
  handle, a pinned file is direct, and read(2) and write(2) of everybody reach the blocks.
- What else makes pages of a direct file (private mappings, splice; shared ones are ENODEV, as the mount does not grant
  FUSE_DIRECT_IO_ALLOW_MMAP) are READs without a lock owner: refused under a write pin (EINVAL), remembered otherwise, and
  dropped before a write pin is granted.
- A reference (FOLL_GET) gives no access to the data, and needs nothing of this.
- With `dax=always` every handle is direct and nothing is refused; docs/pins.md says what mappings see.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from daxfs import abi
from daxfs.core.waiting import Awaited, LayoutBusy
from daxfs.daemon import kernelsize, protocol, requests, session
from daxfs.daemon.threads import in_thread
from daxfs.daemon.times import Times
from daxfs.errors import BadArgument, Busy, NoMemory, NoSpace

log = logging.getLogger("daxfs")

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.daemon.requests import OpenFile
    from daxfs.daemon.service import Service
    from daxfs.daemon.session import Request

DAX = ("always", "never")
PAGE = mmap.PAGESIZE
ZERO_S = 1.0  # the kernel may hold the page for somebody who waits for it to be written back
DIRECT_FLAGS = protocol.FOPEN_DIRECT_IO | protocol.FOPEN_PARALLEL_DIRECT_WRITES | protocol.FOPEN_NOFLUSH
"""Without NOFLUSH close(2) would write the dirty pages of mappings back, and wait: for a truncate that waits for pins, among
them those that the close would give back. The kernel ignores it on a mount with a write-back cache."""


def init_flags(dax: str) -> int:
    """What a mount grants of what the kernel offers (INIT)."""
    # Not O_TRUNC in OPEN: the kernel sends that before it finds that the file is a running program (ETXTBSY).
    flags = session.INIT_DEFAULT & ~session.INIT_ATOMIC_O_TRUNC | session.INIT_EXPORT_SUPPORT
    if dax == "never":
        flags = flags & ~session.INIT_DIRECT_IO_ALLOW_MMAP | session.INIT_WRITEBACK_CACHE
    return flags


def _to_pin(flags: int) -> bool:
    return flags & abi.O_PIN == abi.O_PIN


class Caching:
    """The open files of one mount, as far as the kernel's cache goes. `start` runs a task in the daemon's nursery."""

    def __init__(self, service: Service, dax: str, start: Callable[..., None]) -> None:
        self.on = dax == "never"
        self.times = Times(service)
        self._service = service
        self._start = start
        self._cached: dict[int, list[int]] = {}  # by inode: handles through the cache, and how many of them can write
        self._filled: set[int] = set()  # direct files that have pages
        self._dropping: set[int] = set()
        self._full: set[int] = set()  # cached files of which pages could not be written back

    # -- opening and closing --

    def await_release(self, request: Request, inode: Inode, flags: int) -> None:
        """Who opens to pin may have closed a cached handle just now: LayoutBusy while that is on its way here."""
        if _to_pin(flags) and inode.ino in self._cached and Awaited.RELEASE not in self._service.waiting.overdue(request):
            raise LayoutBusy(Awaited.RELEASE, 0, inode.ino)

    def admits(self, inode: Inode, flags: int) -> bool:
        """Whether an open, which is about to be counted, goes through the cache."""
        if not self.on or not inode.is_file:
            return False
        if inode.ino in self._cached:
            return True
        return not (inode.opens or _to_pin(flags) or self._service.volume.pins.has_file(inode.ino))

    def opened(self, file: OpenFile) -> None:
        if file.cached:
            counts = self._cached.setdefault(file.inode.ino, [0, 0])
            counts[0] += 1
            counts[1] += file.writable
        elif self.on:
            self.times.opened(file.inode)

    def flags(self, file: OpenFile) -> int:
        """FOPEN_* of the reply. Pages are kept, as nobody but the kernel changes a file that is cached."""
        if not file.cached:
            return requests.file_flags(file.inode.ino)
        return 0 if file.inode.ino in self._filled else protocol.FOPEN_KEEP_CACHE

    def closed(self, file: OpenFile) -> None:
        ino = file.inode.ino
        if file.cached:
            counts = self._cached[ino]
            counts[0] -= 1
            counts[1] -= file.writable
            if not counts[0]:
                del self._cached[ino]
                self._full.discard(ino)
                self._service.waiting.moved(ino)
        elif self.on:
            last = file.inode.opens == 1
            if last and ino in self._filled:
                self._drop_filled(ino)
            self.times.closed(file.inode, last=last)

    # -- pages --

    def fill(self, inode: Inode) -> None:
        """The kernel wants bytes for a page of its own. BadArgument (EINVAL: who splices shall read) if a device may change
        them meanwhile."""
        ino, pins = inode.ino, self._service.volume.pins
        if not self.on or ino in self._cached:
            return
        if ino in self._dropping or any(pin.flags & abi.FOLL_WRITE for pin in pins.of_file(ino)):
            raise BadArgument("a device writes the file: no pages of it in the kernel's cache")
        self._filled.add(ino)

    def before_pin(self, file: OpenFile, flags: int) -> None:
        """Busy if the file is cached; LayoutBusy while pages are dropped."""
        if not self.on or flags & abi.FOLL_GET or not file.inode.is_file:
            return
        ino = file.inode.ino
        if file.cached:
            raise Busy("the file is open through the page cache: close it everywhere, then open it with O_PIN")
        if flags & abi.FOLL_WRITE and ino in self._filled:
            self._drop_filled(ino)
            raise LayoutBusy(Awaited.PAGES, 0, ino)

    def _drop_filled(self, ino: int) -> None:
        if ino not in self._dropping:
            self._dropping.add(ino)
            self._start(self._drop, ino)

    async def _drop(self, ino: int) -> None:
        try:
            await self.drop(ino)
        finally:
            self._dropping.discard(ino)
        self._filled.discard(ino)
        self._service.waiting.moved(ino)

    def drop(self, ino: int) -> Awaitable[None]:
        """Have dirty pages written and all pages forgotten. It can take its time, so a thread waits for the kernel."""
        return in_thread(session.inval_inode, ino)

    def settle(self, inode: Inode) -> Awaitable[None]:
        """Have what the kernel knows of the end of a file written, and the page of it forgotten: what a mapping stored
        behind the end is nowhere then."""
        return in_thread(session.inval_inode, inode.ino, inode.size)

    async def size_in_kernel(self, inode: Inode) -> int:
        """How long the kernel says that a file is; at least as long as the volume has it."""
        service = self._service
        try:
            return max(inode.size, await in_thread(kernelsize.of, service.mountpoint, inode.ino, inode.generation))
        except (OSError, NoMemory) as e:
            log.debug("inode %d: the kernel does not say how long it is (%s)", inode.ino, e)
            return int(inode.size)

    async def zero_behind(self, inode: Inode, end: int, size: int) -> None:
        """Zeros in the kernel's page of the end of a file, which is to have this size."""
        length = min(size - end, -end % PAGE)
        if not length:
            return
        with trio.move_on_after(ZERO_S):
            try:
                store = partial(session.notify_store, inode.ino, end, bytes(length))
                await in_thread(store, abandon_on_cancel=True)
            except OSError as e:
                log.warning("inode %d: bytes that a mapping stored behind its end may show (%s)", inode.ino, e)

    # -- what the kernel keeps to itself --

    def may_be_dirty(self, inode: Inode) -> bool:
        """Whether the kernel may have bytes of a file that have not been written yet. (A close writes them.)"""
        return inode.ino in self._cached and self._cached[inode.ino][1] > 0

    def grown(self, inode: Inode) -> None:
        """Writing back took blocks: st_blocks is another one, which the kernel does not ask for by itself."""
        if self.on:
            self._service.stale(inode)

    def full(self, inode: Inode) -> None:
        """Writing back found no space. Who writes on shall hear it from write(2), not only from fsync and close."""
        if inode.ino in self._cached:
            self._full.add(inode.ino)
            self._service.stale(inode)  # so that write(2) asks for the mode first, through its handle

    def before_write(self, ino: int) -> None:
        """The kernel asks for attributes through a handle. NoSpace if that is a write(2) which nobody could write back."""
        if ino in self._full:
            if not self._service.volume.alloc.available:
                raise NoSpace("the volume is full")
            self._full.discard(ino)

    def check(self) -> None:
        """ValueError if a file is both, or pinned and cached, or counts are wrong."""
        files = self._service.opened
        for ino, opened in files.items():
            cached = [file for file in opened.values() if file.cached]
            writable = sum(file.writable for file in cached)
            if self._cached.get(ino, [0, 0]) != [len(cached), writable]:
                raise ValueError(f"inode {ino}: {len(cached)} cached handles, counted {self._cached.get(ino)}")
            if 0 < len(cached) < len(opened):
                raise ValueError(f"inode {ino} is open directly and through the cache")
            if cached and any(not pin.flags & abi.FOLL_GET for pin in self._service.volume.pins.of_file(ino)):
                raise ValueError(f"inode {ino} is pinned and cached")
        if self._cached.keys() - files.keys():
            raise ValueError("closed files are counted as cached")
