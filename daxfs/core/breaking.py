"""Breaking a layout: what stands in the way of an operation that takes blocks from a file, and what is done about it.

A truncate or punch breaks first and then begins:

    cleared = clear_way(...)              # behind all checks of the call that can fail, before its transaction
    with volume.transaction(now) as txn:
        ...                               # takes the blocks, by `cleared.outcome`
    cleared.carry_out(volume)             # the change is made: holders lose their access and their leases, and hear of it

`clear_way` returns when the operation may go ahead, and raises
    LayoutBusy   when a holder must be waited for: the daemon waits until something moves and calls again, with `overdue`
                 once the time is over; nothing is held meanwhile (Kara, 2017)
    TextBusy, Deadlock, Busy, TryAgain   when the operation fails
Nothing has changed then: no transaction has begun, so none is aborted and nothing is read anew; no access was taken and no
lease broken. The same is true when the transaction fails. A holder may have been asked to let go, and one that did not in
time is fenced, whatever becomes of the change.
The core does not wait and has no clock: who waits, how long, and who is interrupted is daemon/waiting.py.

Order: on-demand holders are told first, since they must let go under every policy but `unsafe`; then pins, by the policy.
A holder that does not acknowledge in time is fenced: its registration becomes a pin of state `fenced`, so that its blocks
are busy for as long as its descriptor is open, and the simulated HCA refuses it.

A file may have very many pins. Who waits is told one of them that stands in the way, and need not look again before that
one has gone: a scattered choice where all are looked at anyway, so that a few looks do in whatever order they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from daxfs import abi
from daxfs.core import policy, xattr
from daxfs.core.alloc import Run
from daxfs.core.pins import Holder, Pin, State
from daxfs.core.policy import Operation, Outcome
from daxfs.core.waiting import Awaited, LayoutBusy
from daxfs.errors import Busy, Deadlock, TextBusy, TryAgain

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.leases import Lease
    from daxfs.core.volume import Volume

ALL = 1 << 52  # more blocks than a file has


class Breaker(NamedTuple):
    """Who breaks: the descriptor it comes through, if any; whether it would rather fail than wait; and which kind of wait
    has lasted long enough."""

    owner: int | None = None
    nowait: bool = False
    overdue: frozenset[Awaited] = frozenset()


NOBODY = Breaker()


class Wanted(NamedTuple):
    """The blocks that an operation would take."""

    ino: int
    first: int
    blocks: int


class Cleared(NamedTuple):
    """The way of an operation is clear: the outcome that applies, and what its change takes from holders."""

    outcome: Outcome = Outcome.DETACH
    pins: Sequence[Pin] = ()
    leases: Sequence[Lease] = ()

    def carry_out(self, volume: Volume) -> None:
        """The change is made: its holders lose their access and their leases, and are told."""
        if self.pins:
            revoke(volume, self.pins)
        if self.leases:
            volume.leases.break_all(self.leases)


CLEAR = Cleared()


@dataclass(eq=False, slots=True)
class Break:
    """A layout change that waits: blocks [first, first + count) of a file."""

    first: int
    count: int


def check_hold(volume: Volume, ino: int, first: int, count: int, owner: int, holder: Holder, *, nowait: bool) -> None:
    """A new pin waits behind a layout change that waits for its range, so that the change cannot starve. Whoever has a pin
    that the change may wait for can pin all the same: it could not let go otherwise. LayoutBusy, or TryAgain."""
    for waiting in volume.breaks.get(ino, []):
        if first < waiting.first + waiting.count and waiting.first < first + count:
            start, end = waiting.first * volume.block_size, (waiting.first + waiting.count) * volume.block_size
            if not volume.pins.holds(owner, holder, ino, start, end):
                if nowait:
                    raise TryAgain("a layout change waits for the range")
                raise LayoutBusy(Awaited.LAYOUT, 0, ino, first, count)


def policy_of(volume: Volume, inode: Inode) -> str:
    """The policy of a file: its own, or the mount's. One that makes no sense does not count."""
    if inode.xattr_inline or inode.xattr_block:
        own = xattr.find(volume, inode, policy.POLICY_XATTR)
        if own is not None and own.decode("ascii", "replace") in policy.POLICIES:
            return own.decode()
    return volume.policy


def outcome_of(volume: Volume, inode: Inode, operation: Operation) -> Outcome:
    return policy.POLICIES[policy_of(volume, inode)][operation]


def clear_way(volume: Volume, inode: Inode, operation: Operation, first: int, count: int, breaker: Breaker) -> Cleared:
    """May whole blocks [first, first + count) be taken from the file now? See the module.

    Raises: LayoutBusy; TextBusy, Deadlock, Busy, TryAgain. RuntimeError, a bug: within a transaction.
    """
    if volume.open_transactions:
        raise RuntimeError("a layout is broken before the transaction that changes it, not within one")
    if not (volume.pins.counts.pinned or volume.pins.has_file(inode.ino) or volume.leases.has_file(inode.ino)):
        return CLEAR
    outcome = outcome_of(volume, inode, operation)
    if outcome is Outcome.IGNORE or not count:
        return Cleared(outcome)
    wanted = Wanted(inode.ino, first, count)
    if outcome is Outcome.DETACH and not volume.pins.on_demand(inode.ino):
        return Cleared(outcome, (), volume.leases.overlapping(*wanted))
    runs = inode.map.runs(first, count)
    if volume.pins.on_demand(inode.ino):
        _invalidate(volume, [pin for pin in volume.pins.standing(inode.ino, runs) if pin.on_demand], wanted, breaker)
    way = Way(volume, wanted, runs)
    if outcome is not Outcome.DETACH and (way.is_pinned or (outcome is Outcome.LEASE and way.leases)):
        return _by_outcome(way, outcome, breaker)
    return Cleared(outcome, (), way.leases)


class Way:
    """What an operation would take, and who stands in its way."""

    def __init__(self, volume: Volume, wanted: Wanted, runs: list[Run]) -> None:
        self.volume = volume
        self.wanted = wanted
        self._runs = runs
        self.leases = volume.leases.overlapping(*wanted)

    def pins(self, owner: int | None = None) -> Iterator[Pin]:
        """Those that hold some of the blocks; of one owner, or all."""
        standing = self.volume.pins.standing(self.wanted.ino, self._runs, owner)
        return (pin for pin in standing if pin.counted and pin.state is State.HELD)

    @property
    def is_pinned(self) -> bool:
        counts = self.volume.pins.counts
        return any(counts.any(*run) for run in self._runs) and any(True for _ in self.pins())

    def is_own(self, owner: int | None, *, leases: bool) -> bool:
        """Whether an owner would have to wait for its own pins, or for its own leases."""
        if owner is None:
            return False
        return any(True for _ in self.pins(owner)) or (leases and any(lease.owner == owner for lease in self.leases))


def _invalidate(volume: Volume, holders: list[Pin], wanted: Wanted, breaker: Breaker) -> None:
    for pin in holders:
        if pin.state is State.HELD and not pin.told:
            pin.told = True
            if pin.notifier is not None:
                pin.notifier(pin)
            else:
                volume.tell(pin, abi.EVENT_INVALIDATE)
    holders = [pin for pin in holders if pin.state is State.HELD]
    if not holders:
        return
    if breaker.nowait:
        raise TryAgain("an on-demand holder has to let go first")
    if Awaited.ACKNOWLEDGEMENT not in breaker.overdue:
        raise LayoutBusy(Awaited.ACKNOWLEDGEMENT, _any(holders).id, *wanted)
    for pin in holders:
        volume.pins.fence(pin)


def _by_outcome(way: Way, outcome: Outcome, breaker: Breaker) -> Cleared:
    """What can be taken from the holders. An error if they have to be waited for, or the operation fails."""
    if outcome is Outcome.REVOKE:
        return Cleared(outcome, list(way.pins()), way.leases)
    if way.is_own(breaker.owner, leases=outcome is Outcome.LEASE):
        raise Deadlock("the pins or leases in the way are this descriptor's own: give them back first")
    if outcome is Outcome.FAIL:
        raise TextBusy(f"the range is pinned, and the policy of the file is to fail: see daxfs pins ({_names(way)})")
    if breaker.nowait:
        raise TryAgain("the range is pinned")
    if outcome is Outcome.LEASE:
        return _by_lease(way, breaker)
    if Awaited.PINS in breaker.overdue:
        raise Busy(f"the range is still pinned after the time limit: see daxfs pins ({_names(way)})")
    way.volume.leases.tell(way.leases)
    raise LayoutBusy(Awaited.PINS, next(way.pins()).id, *way.wanted)


def _by_lease(way: Way, breaker: Breaker) -> Cleared:
    volume = way.volume
    if Awaited.LEASES not in breaker.overdue:
        pins = list(way.pins())
        for pin in pins:
            if not pin.told:
                pin.told = True
                volume.tell(pin, abi.EVENT_LEASE_BREAK)
        volume.leases.tell(way.leases)
        raise LayoutBusy(Awaited.LEASES, _any(pins).id if pins else 0, *way.wanted)
    if volume.settings.lease_then == "fail":
        raise TextBusy(f"the holders did not let go in time: see daxfs pins ({_names(way)})")
    return Cleared(Outcome.LEASE, list(way.pins()), way.leases)


def revoke(volume: Volume, pins: Iterable[Pin]) -> None:
    """Take the access of holders away. Their blocks are still counted: a raw mapping may reach them until the owner ends."""
    for pin in pins:
        if pin.state is State.HELD:
            volume.pins.revoke(pin)
            volume.tell(pin, abi.EVENT_REVOKED)


def _any(pins: list[Pin]) -> Pin:
    """One of them, neither the first nor the last as a rule (Fibonacci hashing of how many there are)."""
    return pins[len(pins) * 0x9E3779B1 % (1 << 32) % len(pins)]


def _names(way: Way) -> str:
    pins = list(islice(way.pins(), 4))
    shown = ", ".join(f"pin {pin.id} of process {pin.holder.pid}" for pin in pins[:3]) or "leases only"
    return f"{shown} and others" if len(pins) > 3 else shown
