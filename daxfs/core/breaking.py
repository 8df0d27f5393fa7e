"""Breaking a layout: what stands in the way of an operation that takes blocks from a file, and what is done about it.

`clear_way` is called before the transaction of a truncate or punch. It returns when the operation may go ahead, and raises
    LayoutBusy   when somebody must be waited for: the daemon waits until something moves and calls again, with `overdue`
                 once the time is over; nothing is held meanwhile (Kara, 2017)
    TextBusy, Deadlock, Busy, TryAgain   when the operation fails; nothing has changed
The core does not wait and has no clock: who waits, how long, and who is interrupted is daemon/waiting.py.

Order: on-demand holders are told first, since they must let go under every policy but `unsafe`; then pins, by the policy.
A holder that does not acknowledge in time is fenced: its registration becomes a pin of state `fenced`, so that its blocks
are busy for as long as its descriptor is open, and the simulated HCA refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from daxfs import abi
from daxfs.core import policy, xattr
from daxfs.core.pins import Holder, Pin, State
from daxfs.core.policy import Operation, Outcome
from daxfs.errors import Busy, Deadlock, LayoutBusy, TextBusy, TryAgain

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.volume import Volume

ALL = 1 << 52  # more blocks than a file has


@dataclass(frozen=True, slots=True)
class Breaker:
    """Who breaks: the descriptor it comes through, if any; whether it would rather fail than wait; and which kind of wait
    has lasted long enough ("invalidate", or the policy's outcome)."""

    owner: int | None = None
    nowait: bool = False
    overdue: frozenset[str] = frozenset()


NOBODY = Breaker()


class Wanted(NamedTuple):
    """The blocks that an operation would take."""

    ino: int
    first: int
    blocks: int


@dataclass(eq=False, slots=True)
class Break:
    """A layout change that waits: blocks [first, first + count) of a file, and the ids of the pins it waits for."""

    first: int
    count: int
    pins: list[int]


def check_hold(volume: Volume, ino: int, first: int, count: int, owner: int, holder: Holder, *, nowait: bool) -> None:
    """A new pin waits behind a layout change that waits for its range, so that the change cannot starve. Whoever the change
    waits for may still pin: it could not let go otherwise. LayoutBusy, or TryAgain."""
    for waiting in volume.breaks.get(ino, []):
        if first < waiting.first + waiting.count and waiting.first < first + count:
            waited_for = [pin for pin in volume.pins.of_file(ino) if pin.id in waiting.pins]
            if not any(pin.owner == owner or pin.holder.is_same(holder) for pin in waited_for):
                if nowait:
                    raise TryAgain("a layout change waits for the range")
                raise LayoutBusy("hold", [], ino, first, count)


def policy_of(volume: Volume, inode: Inode) -> str:
    """The policy of a file: its own, or the mount's. One that makes no sense does not count."""
    if inode.xattr_inline or inode.xattr_block:
        own = xattr.find(volume, inode, policy.POLICY_XATTR)
        if own is not None and own.decode("ascii", "replace") in policy.POLICIES:
            return own.decode()
    return volume.policy


def outcome_of(volume: Volume, inode: Inode, operation: Operation) -> Outcome:
    return policy.POLICIES[policy_of(volume, inode)][operation]


def clear_way(volume: Volume, inode: Inode, operation: Operation, first: int, count: int, breaker: Breaker) -> Outcome:
    """May whole blocks [first, first + count) be taken from the file now? See the module. The outcome that applies."""
    if not (volume.pins.counts.pinned or volume.pins.of_file(inode.ino) or volume.leases.of_file(inode.ino)):
        return Outcome.DETACH
    outcome = outcome_of(volume, inode, operation)
    if outcome is Outcome.IGNORE or not count:
        return outcome
    runs = [(physical, n) for _, physical, n, _ in inode.map.overlaps(first, count)]
    standing = volume.pins.standing(inode.ino, runs)
    wanted = Wanted(inode.ino, first, count)
    _invalidate(volume, [pin for pin in standing if pin.on_demand and pin.state is State.HELD], wanted, breaker)
    pins = [pin for pin in standing if pin.counted and pin.state is State.HELD]
    leases = volume.leases.overlapping(inode.ino, first, count)
    if pins or (leases and outcome is Outcome.LEASE):
        _by_outcome(volume, outcome, pins, wanted, breaker)
    else:
        volume.leases.break_all(leases)
    return outcome


def _invalidate(volume: Volume, holders: list[Pin], wanted: Wanted, breaker: Breaker) -> None:
    if not holders:
        return
    for pin in holders:
        if not pin.told:
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
    if "invalidate" not in breaker.overdue:
        raise LayoutBusy("invalidate", [pin.id for pin in holders], *wanted)
    for pin in holders:
        volume.pins.fence(pin)


def _by_outcome(volume: Volume, outcome: Outcome, pins: list[Pin], wanted: Wanted, breaker: Breaker) -> None:
    own = breaker.owner is not None and any(pin.owner == breaker.owner for pin in pins)
    if outcome is Outcome.REVOKE:
        revoke(volume, pins)
    elif outcome is Outcome.DETACH:
        return
    elif own:
        raise Deadlock("the pins in the way are this descriptor's own: give them back first")
    elif outcome is Outcome.FAIL:
        raise TextBusy(f"the range is pinned, and the policy of the file is to fail: see daxfs pins ({_names(pins)})")
    elif breaker.nowait:
        raise TryAgain("the range is pinned")
    elif outcome is Outcome.LEASE:
        _by_lease(volume, pins, wanted, breaker)
    elif Outcome.WAIT in breaker.overdue:
        raise Busy(f"the range is still pinned after the time limit: see daxfs pins ({_names(pins)})")
    else:
        raise LayoutBusy(Outcome.WAIT, [pin.id for pin in pins], *wanted)


def _by_lease(volume: Volume, pins: list[Pin], wanted: Wanted, breaker: Breaker) -> None:
    if Outcome.LEASE not in breaker.overdue:
        for pin in pins:
            if not pin.told:
                pin.told = True
                volume.tell(pin, abi.EVENT_LEASE_BREAK)
        volume.leases.tell(volume.leases.overlapping(*wanted))
        raise LayoutBusy(Outcome.LEASE, [pin.id for pin in pins], *wanted)
    if volume.settings.lease_then == "fail":
        raise TextBusy(f"the holders did not let go in time: see daxfs pins ({_names(pins)})")
    revoke(volume, pins)
    volume.leases.break_all(volume.leases.overlapping(*wanted))


def revoke(volume: Volume, pins: Iterable[Pin]) -> None:
    """Take the access of holders away. Their blocks are still counted: a raw mapping may reach them until the owner ends."""
    for pin in pins:
        if pin.state is State.HELD:
            pin.state = State.REVOKED
            volume.tell(pin, abi.EVENT_REVOKED)


def _names(pins: list[Pin]) -> str:
    shown = ", ".join(f"pin {pin.id} of process {pin.holder.pid}" for pin in pins[:3])
    return f"{shown} and {len(pins) - 3} more" if len(pins) > 3 else shown
