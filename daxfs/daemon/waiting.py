"""Calls that wait: for pins to go, for holders to acknowledge, for busy space, and what else there is in core/waiting.py.
The core says what has to come first (`LayoutBusy`), this module waits until it hears that something moved (the core's hook
`Volume.on_moved`, by way of service.py) and runs the handler again. How long each wait may last is the table `LIMITS`.

Rules
- Nothing is held while waiting: no lock, no transaction, no pyfuse3 worker; each waiter is a task of the daemon's nursery.
- A handler that raised LayoutBusy has changed nothing, so it can be run again as often as it takes; but not as long as the
  pin that it named still stands in the way: a look may be long where a file has very many pins.
- A wait ends with the handler's own answer, with EINTR when the caller is interrupted or killed (nothing changed), or by its
  time limit, after which the handler is told that this kind of wait is overdue and decides.
- While a layout change waits it is in `volume.breaks`, so that new pins of its range wait behind it, and `on_break` is told,
  so that holders that are dying are found (dying.py).

(The kernel holds the file's own lock during truncate(2) and fallocate(2), also while they wait here: another write or
truncate of the same file queues up in the kernel. Reads, stat, ioctls and all other files go on.)
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from daxfs.core.breaking import Break
from daxfs.core.policy import Settings
from daxfs.core.volume import Volume
from daxfs.core.waiting import EVERYTHING, SPACE, Awaited, LayoutBusy
from daxfs.daemon.session import Request
from daxfs.errors import FsError, NoSpace

Handler = Callable[[Request], None]
FORGET_WAIT_S = 0.1  # the kernel sends it when unlink(2) is over, unless somebody uses the file (O_PATH)
RELEASE_WAIT_S = 0.02  # the kernel sends it when the last page is written, which may be a little behind close(2)
_CHANGES = {Awaited.PINS, Awaited.LEASES, Awaited.ACKNOWLEDGEMENT}  # of the layout: what waits behind them may not pass

LIMITS: dict[Awaited, Callable[[Settings], float]] = {
    Awaited.ACKNOWLEDGEMENT: lambda settings: settings.invalidate_s,
    Awaited.PINS: lambda settings: settings.wait_s,
    Awaited.LEASES: lambda settings: settings.lease_break_s,
    Awaited.LAYOUT: lambda _: 0,  # which has a limit of its own
    Awaited.SPACE: lambda settings: settings.enospc_wait_s,
    Awaited.FORGET: lambda _: FORGET_WAIT_S,
    Awaited.RELEASE: lambda _: RELEASE_WAIT_S,
    Awaited.PAGES: lambda _: 0,  # a drop ends, with or without success
    Awaited.TWINS: lambda _: 0,  # so do those that make room
}
"""How long a call waits, in seconds; 0: until it comes."""


class Waiting:
    """The waiters of one volume. `start` runs a task in the daemon's nursery."""

    def __init__(self, volume: Volume, start: Callable[..., None]) -> None:
        self._volume = volume
        self._start = start
        self._lots: dict[int, trio.lowlevel.ParkingLot] = {}
        self._overdue: dict[int, set[Awaited]] = {}
        self.on_break: Callable[[], None] = lambda: None
        self.on_end: Callable[[Request], None] = lambda request: None  # a request that waited is answered

    def __len__(self) -> int:
        return len(self._overdue)

    def overdue(self, request: Request) -> frozenset[Awaited]:
        """The kinds of wait that have lasted long enough for this request."""
        return frozenset(self._overdue.get(request.unique, ()))

    def moved(self, what: int) -> None:
        """What calls on an inode wait for, or calls for SPACE, or all calls (EVERYTHING), may have come: they look again,
        when the caller is through."""
        lots = list(self._lots.values()) if what == EVERYTHING else [self._lots.get(what)]
        for lot in lots:
            if lot:
                lot.unpark_all()

    def wait(self, request: Request, handler: Handler) -> None:
        """Answer the request later: when `handler(request)` no longer raises LayoutBusy."""
        self._overdue[request.unique] = set()
        self._start(self._wait, request, handler)

    def space_to_come(self, request: Request) -> LayoutBusy | None:
        """What an allocation that found no space shall wait for: a FORGET that is on its way, then busy space."""
        overdue, volume = self.overdue(request), self._volume
        if Awaited.FORGET not in overdue and volume.about_to_free():
            return LayoutBusy(Awaited.FORGET, 0, SPACE)
        if Awaited.SPACE not in overdue and volume.settings.enospc_wait_s > 0 and volume.busy_list.blocks > 0:
            return LayoutBusy(Awaited.SPACE, 0, SPACE)
        return None

    async def _wait(self, request: Request, handler: Handler) -> None:
        scope = trio.CancelScope()
        request.on_interrupt = scope.cancel
        if request.interrupted:
            scope.cancel()
        since: dict[Awaited, float] = {}
        announced: set[int] = set()
        done = False
        try:
            with scope:
                while busy := self._attempt(request, handler):  # and no checkpoint until it is parked
                    if busy.kind in _CHANGES:
                        announced.add(busy.ino)
                    started, rules = since.setdefault(busy.kind, time.monotonic()), self._volume.rules
                    end = started + self._limit(busy.kind)
                    with self._announced(busy):
                        while moved := await self._moved_before(busy, end):
                            if rules != self._volume.rules or not self._volume.pins.stands(busy.pin):
                                break
                        if not moved:
                            self._overdue[request.unique].add(busy.kind)
                done = True  # the handler has answered, or will
        except FsError as e:
            request.error(e.errno)
        finally:
            del self._overdue[request.unique]
            if not (request.answered or done):
                request.error(errno.EINTR)
            self.on_end(request)
            for ino in announced:
                self.moved(ino)  # pins that were held back; not before the end: it would wake itself for ever

    def _attempt(self, request: Request, handler: Handler) -> LayoutBusy | None:
        """Run the handler; what has to come first, if anything does. Nothing if the request was answered meanwhile."""
        if request.answered:  # the device was removed, just when this was woken
            return None
        try:
            handler(request)
        except LayoutBusy as busy:
            return busy
        except NoSpace:
            if to_come := self.space_to_come(request):
                return to_come
            raise
        return None

    async def _moved_before(self, busy: LayoutBusy, end: float) -> bool:
        """False when the time was over first."""
        lot = self._lots.setdefault(busy.ino, trio.lowlevel.ParkingLot())
        left = max(0.0, end - time.monotonic())
        with trio.move_on_after(left) as limit:
            await lot.park()
        if not lot and self._lots.get(busy.ino) is lot:  # another one may have begun a new lot meanwhile
            del self._lots[busy.ino]
        return not limit.cancelled_caught

    def _limit(self, kind: Awaited) -> float:
        return LIMITS[kind](self._volume.settings) or float("inf")

    @contextmanager
    def _announced(self, busy: LayoutBusy) -> Iterator[None]:
        if busy.kind not in _CHANGES:
            yield
            return
        waiting = Break(busy.first, busy.count)
        breaks = self._volume.breaks.setdefault(busy.ino, [])
        breaks.append(waiting)
        self.on_break()
        try:
            yield
        finally:
            breaks.remove(waiting)
            if not breaks:
                self._volume.breaks.pop(busy.ino, None)
