"""One page, three views: a mapping of the mount, the block, and a holder that has the block mapped. With `dax=always`.

The kernel keeps pages of files that are mapped (or spliced), tells nobody when one gets dirty, and writes them back when it
likes. This module decides when pages are dropped, which writes the dirty ones back first, so that both sides see each other
and no byte of either is lost; twins.pyx keeps apart what the kernel has and what a holder wrote.

Owns the `Pages` of all files, the drops that are under way, and the task that bounds the age of pages.

When pages are dropped
- Before a pin or registration is granted: those of its range that have no twin. Pages handed out meanwhile have one.
- Every `coherence_ms`: those with twins that an application or a device has changed since. So a holder sees a store, and a
  mapping sees the device, within that time. All passes together take a twentieth of one CPU: those over the files of a user
  who needs more than an equal part of that become rarer, the others' do not; `daxfs info` shows the real periods.
- When the device wrote (UNPIN_DIRTY), when the last pin of a file is gone, and when twins need the room.
- Before SEEK_DATA and SEEK_HOLE look at blocks, and before a copy reads its source: the kernel does not write back first.
- Around a change of blocks of which the kernel hears nothing, or too late (punch, copy, our own ioctls).
- The page of the old end, when a file grows.

Rules
- A drop waits in the kernel for write-back, so a thread does it, and requests are served meanwhile.
- While the kernel waits for the answer to a truncate(2) it holds all write-back of the file back. So nothing that a truncate
  may wait for waits for a drop then: a pin that finds pages takes twins of the blocks as they are (Kara's deadlock of 2017
  would be back), and passes leave the file out. The kernel itself drops all pages when the size has changed.
- A user who has no room for more twins waits alone, until pages of the same user are dropped. Only pages that are being
  dropped, or whose file's size is being changed, may pass the bound: nothing else would end that wait.

What cannot be had: of a byte that an application and a device both write one is kept, and a store of the value that was
there is not seen as a store. A page that the kernel itself holds (an O_DIRECT read into the mapping) is detached by a drop,
and what comes later goes nowhere; such buffers belong into `Pin.map`.

Not here: files in the page cache of a mount with `dax=never` (caching.py); those are never pinned.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import trio

from daxfs import abi
from daxfs.core import fileops
from daxfs.core.waiting import SPACE, Awaited, LayoutBusy
from daxfs.daemon import session, twins
from daxfs.daemon.protocol import RETRIEVED_IN
from daxfs.daemon.threads import in_thread
from daxfs.daemon.twins import PAGE, Budget, Pages
from daxfs.errors import FsError, NoMemory, NoSpace

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.volume import Volume
    from daxfs.daemon.service import Service
    from daxfs.daemon.session import Request

log = logging.getLogger("daxfs")

COHERENCE_MS = 100
COHERENCE_MS_MAX = 60_000
TWINS_BYTES_MAX = 64 << 20
SHARE = 4  # a user may have this part of the twins
PASS_SHARE = 1 / 20  # of one CPU, that all passes together may take
PERIOD_SHARE = 0.8  # passes begin so early that the time bound holds with what they take
DROP_PAGES_MAX = 256  # that one call of the kernel drops
ALL = 1 << 40  # more pages than a file has
LOOKS = 8  # at a range, until the rest of it is dropped unseen: the kernel has pages with gaps
QUIET_LOOKS = 10  # a page that nobody has changed for so long is dropped, so that nobody need look again
LOOK_S = 1.0  # for the kernel to send what it has
FAILED_S = 0.1  # between two tries when the kernel cannot drop pages for want of memory
# Of CPU: what it costs to compare a page, and to drop it, with write-back and handing it out again.
_LOOK_S, _PAGE_S = 1e-6, 20e-6
_TEST_TWINS = "DAXFS_TEST_TWINS"


@dataclass(eq=False)
class _Drop:
    """Ranges of pages that are to be dropped. `exact`: no page beside them. `over`: they are, or a size change has begun
    that they have to wait for."""

    ranges: list[tuple[int, int]]
    exact: bool
    over: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class _Reply:
    """Of the kernel, when asked for pages."""

    data: memoryview | None = None
    came: trio.Event = field(default_factory=trio.Event)


class Claim(Protocol):
    """A pin, or a change, on its way: it is as long as it is not answered."""

    @property
    def answered(self) -> bool: ...


class Granting:
    """A claim for a pin that is not asked for by a request of its own."""

    answered: bool = False


class Coherence:
    """`start` runs a task in the daemon's nursery. `on`: the mount has `dax=always`."""

    def __init__(self, service: Service, *, on: bool, coherence_ms: int, start: Callable[..., None]) -> None:
        self.on = on
        self._service = service
        self._pins = service.volume.pins
        self._start = start
        self.bound_s = coherence_ms / 1000
        self._periods: dict[int, float] = {}  # between two passes, by user, of those with a task
        self._costs: dict[int, float] = {}  # of the last pass, in seconds of CPU
        self._files: dict[int, Pages] = {}
        most = TWINS_BYTES_MAX // PAGE
        self.budget = Budget(most, most // SHARE)
        self._drops: dict[int, deque[_Drop]] = {}  # by inode: of each the first is under way
        self._changes: dict[int, set[Request]] = {}  # by inode: changes of its size that are kept
        self._waited_for: dict[tuple[Claim, int, int], trio.Event] = {}  # drops, by claim, inode and first page
        self._replies: dict[int, _Reply] = {}
        self._looks = 0
        self._is_starved = False  # fills wait for room
        self._threads = trio.CapacityLimiter(math.inf)  # one for a file at most
        self.passes = self.dropped = 0

    def install(self, *, quick: bool) -> None:
        """Answer requests from now on; see twins.install."""
        if self.on:
            twins.install(self._files, self._of, quick=quick, off=os.environ.get(_TEST_TWINS) == "off")

    def _of(self, inode: Inode) -> Pages:
        found = self._files.get(inode.ino)
        if found is None:
            found = self._files[inode.ino] = Pages(inode, self._pins, self.budget, self._has_twins)
        return found

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more, so it has no pages."""
        pages = self._files.pop(ino, None)
        if pages is not None:
            pages.forget()

    # -- dropping --

    def drop(self, ino: int, ranges: list[tuple[int, int]] | None = None, *, exact: bool = False) -> trio.Event:
        """Have dirty pages of some ranges written back and all of them dropped (without ranges: those that have twins). The
        event is set when that is over, or has to wait for a size change. `exact`: for the sake of twins alone, so pages
        beside the ranges are left to the kernel."""
        pages = self._files.get(ino)
        wanted = [] if pages is None else pages.ranges(DROP_PAGES_MAX) if ranges is None else ranges
        present = [one for one in wanted if pages is not None and pages.has_any(*one)]
        drop = _Drop(present, exact or ranges is None)
        if pages is None or not drop.ranges:
            drop.over.set()
            return drop.over
        queue = self._drops.get(ino)
        if queue is None:
            self._drops[ino] = deque([drop])
            self._start(self._drop_all, pages)
        else:
            queue.append(drop)
        if self.is_changing(ino):
            drop.over.set()
        return drop.over

    async def _drop_all(self, pages: Pages) -> None:
        ino = pages.inode.ino
        queue = self._drops[ino]
        try:
            while queue:
                for one in queue[0].ranges:
                    await self._drop_range(pages, *one, exact=queue[0].exact)
                queue.popleft().over.set()
                self._settle(pages)
        finally:
            del self._drops[ino]
            for drop in queue:
                drop.over.set()
            self._settle(pages)

    async def _drop_range(self, pages: Pages, first: int, end: int, *, exact: bool) -> None:
        if exact:  # some of them may have been dropped, and handed out anew, since this was asked for
            for one in pages.ranges(DROP_PAGES_MAX, (first, end)):
                await self._drop_pages(pages, *one, exact=True)
        elif pages.has_any(first, end):
            await self._drop_pages(pages, first, end, exact=False)

    async def _drop_pages(self, pages: Pages, first: int, end: int, *, exact: bool) -> None:
        if self._service.gone:
            return
        first, end, began = pages.begin_drop(first, end, exact)
        if self._is_starved:  # fills of these very pages, which the drop would wait for, and they for it
            self._service.waiting.moved(SPACE)
        length = 0 if end >= ALL else (end - first) * PAGE
        before, dropped = len(pages), False
        try:
            await in_thread(session.inval_inode, pages.inode.ino, first * PAGE, length, limiter=self._threads)
            dropped = True
        except (OSError, NoMemory) as e:
            log.error("pages of inode %d are not dropped now: %s", pages.inode.ino, e)
            await trio.sleep(FAILED_S)
        finally:
            pages.end_drop(first, end, began, dropped)
        self.dropped += max(0, before - len(pages))

    def _settle(self, pages: Pages) -> None:
        """A drop is over: waiters look again."""
        self._service.waiting.moved(pages.inode.ino)
        if self._is_starved:
            self._is_starved = False
            self._service.waiting.moved(SPACE)

    # -- pins --

    def before_pin(self, inode: Inode, offset: int, length: int, flags: int, uid: int, claim: Claim | None) -> None:
        """A pin of a range of bytes is about to be granted. LayoutBusy while pages of it are dropped; with `claim` None they
        are not yet. NoMemory if they are more than there may be twins, and the size is being changed."""
        pages = self._files.get(inode.ino)
        if pages is None or flags & abi.FOLL_GET:
            return
        first, end = offset // PAGE, (offset + length) // PAGE
        pages.be_careful()
        if not pages.may_have(first, end):
            return
        if self.is_changing(inode.ino):
            if end - first > self.budget.share:
                raise NoMemory("the range has more pages than there may be twins, and the size of the file is being changed")
            pages.snapshot(first, end, uid)
            return
        if claim is not None:
            over = self._waited_for.get((claim, inode.ino, first))
            if over is None or over.is_set():  # a drop can have failed, or had to wait for a size change
                pages.claim(claim, first, end)
                self._waited_for[claim, inode.ino, first] = self.drop(inode.ino, [(first, end)])
        raise LayoutBusy(Awaited.PAGES, 0, inode.ino)

    def moved(self, ino: int) -> None:
        """A pin of a file has gone."""
        pages = self._files.get(ino)
        if pages is not None and len(pages) and not self.bound_s and not self._pins.has_file(ino):
            self.drop(ino)

    # -- changes --

    def clear(self, request: Request, inode: Inode, start: int, end: int) -> None:
        """A request is about to look at the blocks of a range of bytes, or to change them before the kernel drops its pages:
        LayoutBusy till they are dropped. Those that come back meanwhile are merged until the request is answered."""
        pages = self._files.get(inode.ino)
        first, behind = start // PAGE, -(-end // PAGE)
        over = self._waited_for.get((request, inode.ino, first))
        if over is None and pages is not None and pages.has_any(first, behind):
            pages.claim(request, first, behind)
            over = self._waited_for[request, inode.ino, first] = self.drop(inode.ino, [(first, behind)])
        if over is not None and not over.is_set():
            raise LayoutBusy(Awaited.PAGES, 0, inode.ino)

    def grew(self, inode: Inode, old_size: int) -> trio.Event | None:
        """A file has become longer: what mappings have stored behind its old end must not show. The event of a drop that has
        to be over before the caller goes on and looks at the file through a mapping, if there is any."""
        pages = self._files.get(inode.ino)
        if pages is None or inode.size <= old_size or not pages.mask(old_size):
            return None
        if self.is_changing(inode.ino):
            return None
        page = old_size // PAGE
        return self.drop(inode.ino, [(page, page + 1)])

    def changed(self, inode: Inode, old_size: int, start: int, end: int) -> trio.Event:
        """A range of bytes has changed, and the kernel does not know. The event of the drop of its pages."""
        self.masked(inode, old_size)
        return self.drop(inode.ino, [(min(start, old_size) // PAGE, -(-end // PAGE))])

    def masked(self, inode: Inode, old_size: int) -> None:
        """The same in a truncate(2): the kernel drops all pages when it has our answer."""
        pages = self._files.get(inode.ino)
        if pages is not None and inode.size > old_size:
            pages.mask(old_size)

    def is_changing(self, ino: int) -> bool:
        """Whether the kernel waits for the answer to a change of the file's size, and holds write-back back."""
        return ino in self._changes

    def change_kept(self, ino: int, request: Request) -> None:
        """A change of the size is not answered yet. Whoever waits for a drop of the file must not wait for it."""
        kept = self._changes.setdefault(ino, set())
        if request not in kept:
            kept.add(request)
            for drop in self._drops.get(ino, ()):
                drop.over.set()
            self._start(self._wake, ino)  # not from within: its own wait has not begun

    async def _wake(self, ino: int) -> None:
        self._service.waiting.moved(ino)

    def claim_ended(self, claim: Claim) -> None:
        """A claim is answered."""
        for key in [key for key in self._waited_for if key[0] is claim]:
            del self._waited_for[key]

    def ended(self, request: Request) -> None:
        """A request that waited is answered, or will be without further waiting."""
        ino = request.nodeid
        self.claim_ended(request)
        kept = self._changes.get(ino)
        if kept is None or request not in kept:
            return
        kept.discard(request)
        if not kept:
            del self._changes[ino]
            if not self._service.gone:
                self.drop(ino)

    # -- data --

    def fill(self, request: Request, inode: Inode, offset: int, size: int) -> bytes:
        """The bytes for pages that the kernel fills. LayoutBusy while there is no room for their twins; Poisoned."""
        pages = self._of(inode)
        if self._service.volume.poison:
            fileops.read(self._service.volume, inode, offset, size)
        first, end = offset // PAGE, -(-(offset + size) // PAGE)
        insist = self.is_changing(inode.ino) or pages.is_dropping(first, end)
        data = pages.fill(offset, size, request.uid, insist)
        if data is None:
            self._starve(request.uid)
        return data

    def _starve(self, uid: int) -> NoReturn:
        """There is no room for twins of a user."""
        self._is_starved = True
        self._make_room(uid)
        raise LayoutBusy(Awaited.TWINS, 0, SPACE)

    def _make_room(self, uid: int) -> None:
        """Start to drop pages of a user, or of all if it is not this one's own share that is used up."""
        full = self.budget.of_user(uid) < self.budget.share // 2
        for ino, pages in list(self._files.items()):
            if len(pages) and ino not in self._drops and (full or uid in pages.users()):
                self.drop(ino)

    def before_write(self, request: Request, inode: Inode, offset: int, size: int) -> None:
        """A write is about to go past pages that the kernel may have to the blocks. LayoutBusy while there is no room for
        their twins."""
        pages = self._files.get(inode.ino)
        first, end = offset // PAGE, -(-(offset + size) // PAGE)
        if pages is None or not pages.may_have(first, end):
            return
        if not pages.snapshot(first, end, request.uid, pages.is_dropping(first, end)):
            self._starve(request.uid)

    def write_back(self, inode: Inode, offset: int, data: memoryview, now: int) -> None:
        """Dirty pages of the kernel, up to the end of file. NoSpace if not all could be stored."""
        data = data[: max(0, inode.size - offset)]
        pages, volume = self._files.get(inode.ino), self._service.volume
        try:
            if pages is None or not len(pages):
                _store(volume, inode, offset, data, now)
                return
            volume.check_writable()
            if not (volume.pmem.hostsync or volume.poison) and pages.take_back(offset, data):
                inode.touch_in_place(mtime=now, ctime=now)  # with a fence, for the data as well
                return
            for at, piece, in_place in pages.pieces(offset, data):
                if in_place:
                    fileops.overwrite(volume, now, inode, at, piece)
                else:
                    _store(volume, inode, at, memoryview(piece), now)
            pages.written(offset, data)
        except FsError:
            if pages is not None:
                pages.refused(offset, len(data))
            raise

    # -- age --

    def _has_twins(self, uid: int) -> None:
        """A file of a user has twins where it had none."""
        if self.bound_s and uid not in self._periods and not self._service.gone:
            self._periods[uid] = self.bound_s
            self._start(self._bound_age, uid)

    async def _bound_age(self, uid: int) -> None:
        """The task that drops pages which have twins, of a user's files, as long as there are any."""
        try:
            while not self._service.gone:
                await trio.sleep(self._periods[uid] * PERIOD_SHARE)
                files = [pages for pages in self._files.values() if len(pages) and pages.inode.uid == uid]
                if not files:
                    break
                await self._pass(uid, files)
        finally:
            del self._periods[uid]
            self._costs.pop(uid, None)
        for pages in list(self._files.values()):  # some may have another owner now
            if len(pages):
                self._has_twins(pages.inode.uid)

    async def _pass(self, uid: int, files: list[Pages]) -> None:
        """Look at all files of a user, and say when the next look is due."""
        cost = 0.0
        for pages in files:
            ino = pages.inode.ino
            if self.is_changing(ino) or self._files.get(ino) is not pages:
                continue
            stale = await self._stale(pages)
            cost += len(pages) * _LOOK_S + sum(end - first for first, end in stale) * _PAGE_S
            await self.drop(ino, stale, exact=True).wait()
        self.passes += 1
        self._costs[uid] = cost
        self._periods[uid] = max(self.bound_s, cost / self._allowed())

    def _allowed(self) -> float:
        """What part of a CPU each user's passes may take: as much as leaves all of them within PASS_SHARE. A user who needs
        less than an equal part leaves the rest to the others."""
        left, wanted = PASS_SHARE, sorted(cost / self.bound_s for cost in self._costs.values())
        for n, part in enumerate(wanted):
            if part > left / (len(wanted) - n):
                return left / (len(wanted) - n)
            left -= part
        return PASS_SHARE

    async def _stale(self, pages: Pages) -> list[tuple[int, int]]:
        """The pages with twins that have to be dropped: an application, a device, or neither for a while, has changed them.
        One that is left stays what it is for what the kernel itself does with it (a direct read into the mapping)."""
        found: list[tuple[int, int]] = []
        for first, end in pages.ranges(DROP_PAGES_MAX):
            for _ in range(LOOKS):
                if first >= end:
                    break
                data = await self._retrieve(pages.inode.ino, first * PAGE, (end - first) * PAGE)
                flags = pages.stale(first, end, data, QUIET_LOOKS) if data is not None else []
                flags.append(True)  # a gap
                for page, changed in enumerate(flags[: end - first], first):
                    if changed and found and found[-1][1] == page:
                        found[-1] = (found[-1][0], page + 1)
                    elif changed:
                        found.append((page, page + 1))
                first += len(flags)
            if first < end:
                found.append((first, end))
        return found

    async def _retrieve(self, ino: int, offset: int, size: int) -> memoryview | None:
        """What the kernel has of a file from `offset` on, up to a gap; None if it does not say. It may be of a page that is
        only being filled, so it can be compared, and no more."""
        self._looks += 1
        number, reply = self._looks, _Reply()
        self._replies[number] = reply
        try:
            session.retrieve(number, ino, offset, size)
            with trio.move_on_after(LOOK_S):
                await reply.came.wait()
        except OSError:
            pass
        finally:
            del self._replies[number]
        return reply.data

    def retrieved(self, request: Request) -> None:
        """The kernel has sent pages (NOTIFY_REPLY)."""
        reply = self._replies.get(request.unique)
        if reply is not None:
            reply.data = request.body[RETRIEVED_IN.size :]
            reply.came.set()

    def facts(self) -> dict[str, Any]:
        """For `info`: milliseconds and counts."""
        return {
            "coherence_ms": round(self.bound_s * 1000),
            "period_ms": round(max(self._periods.values(), default=self.bound_s) * 1000),
            "twins": self.budget.used,
            "twins_max": self.budget.most,
            "users": [
                {"uid": uid, "twins": twins, "period_ms": round(self._periods.get(uid, self.bound_s) * 1000)}
                for uid, twins in sorted(self.budget.users().items())
            ],
            "passes": self.passes,
            "dropped": self.dropped,
        }

    def check(self) -> None:
        """ValueError if the books are wrong."""
        for pages in self._files.values():
            pages.check()
        if sum(pages.with_bytes() for pages in self._files.values()) != self.budget.used:
            raise ValueError(f"{self.budget.used} twins are counted, there are others")


def _store(volume: Volume, inode: Inode, offset: int, data: memoryview, now: int) -> None:
    if len(data) and fileops.write(volume, now, inode, offset, data) < len(data):
        raise NoSpace("the volume is full")
