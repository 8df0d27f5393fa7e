"""One served volume: what the kernel holds of it, and what its requests share.

Owns the open files (the `keep` objects of the session's handles), the lookup counts of inodes, and the names by which
the kernel knows them (for reports). An inode leaves memory when the kernel has forgotten it and no description is open;
if it has no link left, it dies then.

Rules
- Everything here is synchronous and runs on the trio thread; a request that waits is the business of its handler.
- A failure that nobody expected makes the volume read-only: `crashed`.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable

import trio

from daxfs.core import fileops, holding
from daxfs.core.inode import Inode
from daxfs.core.layout import ROOT_INO
from daxfs.core.volume import Volume
from daxfs.core.waiting import DUE
from daxfs.daemon import requests, session, twins
from daxfs.daemon.caching import Caching
from daxfs.daemon.coherence import COHERENCE_MS, Coherence
from daxfs.daemon.dying import Dying
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.waiting import Waiting
from daxfs.errors import BadDescriptor, BadHandle, FsError, NoMemory

log = logging.getLogger("daxfs")

RELEASE_BATCH = 64  # pins that are released between two looks at the mount
FREE_BATCH = 64  # runs that the delayed free gives back between two looks at the mount
INSIST_MAX = 100  # how often what must be done is tried again
UNEXPECTED = "an unexpected failure"
WORK_S = 0.005  # how long one handler may go on before others get their turn


def now() -> int:
    return time.time_ns()


class Turns:
    """For long work of a task: it stops now and then, so that requests get their turn."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def pause(self) -> None:
        if time.monotonic() - self._since > WORK_S:
            await trio.lowlevel.checkpoint()
            self._since = time.monotonic()


class Reports:
    """Texts of reports that are being read, by handle: a text stays the same from its first page to its last. Together they
    are bounded, so that nobody fills the daemon's memory with reports that he does not read: the oldest goes first."""

    BYTES_MAX = 64 << 20

    def __init__(self) -> None:
        self._texts: dict[int, bytes] = {}
        self.bytes = 0

    def keep(self, fh: int, text: bytes) -> None:
        self.drop(fh)
        self._texts[fh] = text
        self.bytes += len(text)
        while self.bytes > self.BYTES_MAX and len(self._texts) > 1:
            self.drop(next(iter(self._texts)))

    def text(self, fh: int) -> bytes:
        """BadHandle (ESTALE) if it had to go."""
        if fh not in self._texts:
            raise BadHandle("the report was dropped, as too many are being read: open it again")
        return self._texts[fh]

    def drop(self, fh: int) -> None:
        self.bytes -= len(self._texts.pop(fh, b""))


class Service:
    def __init__(self, volume: Volume, mountpoint: str, dax: str = "always", coherence_ms: int = COHERENCE_MS) -> None:
        self.volume = volume
        self.mountpoint = mountpoint
        self.device = self.mount_id = ""  # major:minor of the mount and its number, once it is `served`
        self.served = trio.Event()
        self._gone = False
        self.gone_errno = errno.ENODEV
        self.opened: dict[int, dict[int, OpenFile]] = {}  # regular files by inode and handle
        self.unpinned = trio.Event()  # the delayed free has work
        self.waiting = Waiting(volume, self.start)
        self.waiting.on_break = Dying(self).watch
        self.caching = Caching(self, dax, self.start)
        self.coherence = Coherence(self, on=not self.caching.on, coherence_ms=coherence_ms, start=self.start)
        self.waiting.on_end = self.coherence.ended
        self.reports = Reports()
        self.pollers: dict[int, set[int]] = {}  # handle -> what the kernel wants to hear when an event comes
        volume.events.on_event = self.wake_pollers
        volume.on_moved = self._moved
        self.on_release: Callable[[int], None] = lambda fh: None  # the HCA's, called before the pins of a description go
        self._nursery: trio.Nursery
        self.names: dict[int, tuple[int, bytes]] = {}  # inode -> (parent, name), as last heard
        volume.root.nlookup = 1  # the mount's own, never forgotten

    @property
    def gone(self) -> bool:
        """The device was removed, or lost: see removal.py."""
        return self._gone

    @gone.setter
    def gone(self, gone: bool) -> None:
        self._gone = gone
        requests.remove()
        twins.remove()

    # -- lookups --

    def know(self, inode: Inode, parent: int, name: bytes) -> Inode:
        """The kernel is about to learn of an inode by this name: one more lookup."""
        inode.nlookup += 1
        if name not in (b".", b".."):
            self.names[inode.ino] = (parent, name)
        return inode

    def forget(self, ino: int, count: int) -> None:
        if ino == ROOT_INO:
            return
        inode = self.volume.inode(ino)
        inode.nlookup = left = max(0, inode.nlookup - count)
        if not left:
            self.names.pop(ino, None)
            if not inode.opens:
                self._settle(inode)

    def remove(self, verb: Callable[[Volume, int, Inode, bytes], Inode], parent: int, name: bytes) -> None:
        """unlink and rmdir."""
        self.unnamed(verb(self.volume, now(), self.volume.inode(parent), name), parent, name)

    def unnamed(self, inode: Inode, parent: int, name: bytes) -> None:
        """A name is gone. An inode without any keeps its last one for reports."""
        if inode.nlink and self.names.get(inode.ino) == (parent, name):
            del self.names[inode.ino]
        if not (inode.nlookup or inode.opens):
            self._settle(inode)

    def renamed(self, inode: Inode, parent: int, name: bytes) -> None:
        if inode.ino in self.names:
            self.names[inode.ino] = (parent, name)

    def path(self, inode: Inode) -> str:
        """Where people find a file, as the kernel would say it."""
        parts: list[bytes] = []
        ino = inode.ino
        while ino != ROOT_INO:
            if ino not in self.names:
                return f"(inode {inode.ino})"
            ino, name = self.names[ino]
            parts.append(name)
        text = os.path.join(self.mountpoint, *(os.fsdecode(part) for part in reversed(parts)))
        return text if inode.nlink else f"{text} (deleted)"

    # -- open files --

    def open(self, inode: Inode, flags: int, task: int = 0) -> int:
        """A handle for the kernel. `task`: the thread that opens."""
        cached = self.caching.admits(inode, flags)
        fh = requests.open_file(inode, flags, task, cached=cached, fills=cached or not self.caching.on)
        if self.caching.on and inode.is_file:
            self.caching.opened(self.file(fh))
        return fh

    def file(self, fh: int) -> OpenFile:
        try:
            file = session.keeper(fh)
        except KeyError:
            raise BadDescriptor(f"no open file {fh}") from None
        assert isinstance(file, OpenFile)
        return file

    def release(self, fh: int) -> None:
        """The last close of a description: its pins end with it."""
        if self.volume.pins.owned(fh) > RELEASE_BATCH:
            self.start(self._release_slowly, fh)
        else:
            self._end(fh)

    async def _release_slowly(self, fh: int) -> None:
        """One with very many pins, so that the others get their turn. The handle is not given to anybody meanwhile."""
        self.on_release(fh)
        while not self.gone and holding.release_some(self.volume, fh, RELEASE_BATCH):
            await trio.lowlevel.checkpoint()
        self._end(fh)

    def _end(self, fh: int) -> None:
        inode = self.forget_handle(fh)
        inode.opens -= 1
        if not self.gone:
            self._settle(inode)

    def forget_handle(self, fh: int) -> Inode:
        """The kernel has no such handle any more. Its inode."""
        file = self.file(fh)
        self.on_release(fh)
        requests.close_file(file)
        self.pollers.pop(fh, None)
        self.reports.drop(fh)
        self.caching.closed(file)
        holding.release_owner(self.volume, fh)
        return file.inode

    def _settle(self, inode: Inode) -> None:
        """Let go of an inode that nobody refers to; without a link it dies."""
        if not (inode.nlookup or inode.opens):
            self.coherence.forget(inode.ino)
        try:
            fileops.reap(self.volume, now(), inode)
        except FsError as e:  # it stays an orphan, which the next mount frees
            log.error("inode %d is not freed now: %s", inode.ino, e.why)

    # -- what the kernel does not do by itself --

    def accessed(self, inode: Inode) -> None:
        if not (self.volume.readonly or self.volume.failed):
            fileops.note_access(inode, now())

    def stale(self, inode: Inode) -> None:
        """Attributes have changed behind the kernel's back."""
        session.inval_inode(inode.ino, -1)

    def stale_data(self, inode: Inode) -> None:
        """So have the bytes: mappings shall see them soon."""
        self.stale(inode)
        self.coherence.drop(inode.ino)

    def wake_pollers(self, fh: int) -> None:
        for kh in self.pollers.pop(fh, ()):
            session.notify_poll(kh)

    # -- work besides requests --

    def work_in(self, nursery: trio.Nursery) -> None:
        """The mount is served from now on, as long as the nursery."""
        self._nursery = nursery
        self.start(self._free_worker)

    def start(self, work: Callable[..., Awaitable[object]], *args: object) -> None:
        """A task whose failure does not end the mount."""

        async def task() -> None:
            try:
                await work(*args)
            except NoMemory as e:
                log.error("%s: %s", getattr(work, "__qualname__", work), e.why)
            except Exception as e:
                self.crashed(e)

        self._nursery.start_soon(task)

    def _moved(self, what: int) -> None:
        """The core's hook (core/waiting.py): who waits for this is woken."""
        if what == DUE:
            self.unpinned.set()
            return
        self.waiting.moved(what)
        if what > 0:
            self.coherence.moved(what)

    async def _free_worker(self) -> None:
        """Give busy blocks back once their last pin is gone, a batch at a time."""
        while True:
            await self.unpinned.wait()
            self.unpinned = trio.Event()
            while self.volume.free_unpinned(now(), FREE_BATCH):
                await trio.lowlevel.checkpoint()

    # -- failures --

    def crashed(self, problem: BaseException) -> None:
        """Something failed that should not: nothing is changed any more, so that nothing gets worse."""
        volume, tries = self.volume, INSIST_MAX
        known = volume.failed
        volume.failed = known or UNEXPECTED  # this needs no memory, should that be the problem; the rest is tried again
        while tries:
            tries -= 1
            try:
                volume.failed = known or repr(problem)
                volume.fail(volume.failed)
                log.critical("unexpected failure, the volume is read-only from now on", exc_info=problem)
                return
            except MemoryError:
                pass
