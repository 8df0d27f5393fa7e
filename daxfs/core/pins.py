"""Who holds which blocks: pin objects, their owners, and a count of pins for every block.

A pin belongs to an owner, which is an open file description (the daemon's file handle); the owner's last close releases
all its pins. A FOLL_GET reference is known and listed but keeps no block: it
gives no access to data. A pin keeps the runs that the range had when it was taken: blocks stay where they are while they are
pinned, whatever becomes of the file. Counts decide what a freed block becomes (PinCounts.split): idle or busy.

States: held -> revoked (by policy or an admin) or fenced (an on-demand holder that did not acknowledge) -> released (by
unpin, or by the owner's end). A revoked or fenced holder has no access through the simulated HCA, but may still have its
blocks mapped, so they count until it is released. An on-demand registration is not counted before it is fenced; while it is
held it must let go when it is told, and `invalid` says that it did. A survivor is a pin of a daemon that died, known from
the ledger only: it has no owner here and is released when its holder is gone or by an admin.

`generation` moves whenever something may have ceased to stand in somebody's way; waiters watch it.

Not here: which blocks a range has and whether it may be pinned (`pin`, in holding.py), and waiting.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from daxfs import abi
from daxfs.core.alloc import Run
from daxfs.core.inode import Inode
from daxfs.core.pincounts import PinCounts
from daxfs.errors import NoEntry

PINS_PER_OWNER_MAX = 1 << 18
# What pins cost the daemon, in pieces of about 150 bytes: a pin is some of them, and each of its runs is one.
PIECES_PER_PIN = 3
PIECES_PER_PROCESS_MAX = 1 << 20
PIECES_MAX = 1 << 22


class State(StrEnum):
    HELD = "held"
    INVALID = "invalid"  # an on-demand registration that let go
    REVOKED = "revoked"
    FENCED = "fenced"


@dataclass(frozen=True)
class Holder:
    """The process that took a pin: `started` is its start time in clock ticks since boot."""

    pid: int
    comm: str = ""
    started: int = 0

    def is_same(self, other: Holder) -> bool:
        """Whether this is the same process."""
        return (self.pid, self.started) == (other.pid, other.started)


@dataclass(slots=True, weakref_slot=True)
class Pin:
    """`offset` and `length` in bytes, `runs` in blocks of the image, `flags` FOLL_*, `taken` in ns since 1970."""

    id: int
    owner: int | None
    inode: Inode | None
    ino: int
    offset: int
    length: int
    flags: int
    runs: list[Run]
    holder: Holder
    taken: int
    on_demand: bool = False  # revocable: no pin, told before its blocks go
    state: State = State.HELD
    label: str = ""  # the holder's own name for it
    told: bool = False  # of the break that is under way
    entries: list[int] = field(default_factory=list, repr=False)  # of the ledger
    notifier: Callable[[Pin], None] | None = field(default=None, repr=False)
    """On demand, of a holder within the daemon (the simulated HCA): called in place of an event, acknowledges at once."""

    @property
    def counted(self) -> bool:
        """Whether its blocks are kept from everybody."""
        if self.on_demand:
            return self.state is State.FENCED
        return not self.flags & abi.FOLL_GET

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.runs)

    @property
    def pieces(self) -> int:
        return PIECES_PER_PIN + len(self.runs)


class PinTable:
    """All pins of a volume. `counts` says how many pins cover a block."""

    def __init__(self, blocks: int) -> None:
        self.counts = PinCounts(blocks)
        self.references = PinCounts(blocks)  # FOLL_GET: they keep nothing
        self._pins: dict[int, Pin] = {}
        self._owners: dict[int, dict[int, Pin]] = {}
        self._files: dict[int, dict[int, Pin]] = {}
        self._charged: dict[tuple[int, int], list[int]] = {}  # by process: blocks, pieces
        self.pieces = 0
        self._last_id = 0
        self.generation = 0

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._pins.values()))

    @property
    def owners(self) -> int:
        """How many open file descriptions have pins."""
        return len(self._owners)

    def owner_list(self) -> list[int]:
        return list(self._owners)

    def all(self) -> Iterable[Pin]:
        """All pins, oldest first, not to be kept: the table must not change meanwhile."""
        return self._pins.values()

    @property
    def blocks(self) -> int:
        """Blocks with at least one pin."""
        count: int = self.counts.pinned
        return count

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def insert(self, pin: Pin) -> None:
        if pin.counted:
            self.counts.add(pin.runs)
        elif pin.flags & abi.FOLL_GET:
            self.references.add(pin.runs)
        self._last_id = max(self._last_id, pin.id)
        self._pins[pin.id] = pin
        self._files.setdefault(pin.ino, {})[pin.id] = pin
        self._charge(pin, 1)
        if pin.owner is not None:
            self._owners.setdefault(pin.owner, {})[pin.id] = pin

    def has(self, pin: Pin) -> bool:
        """Whether it has not been released."""
        return pin.id in self._pins

    def owned(self, owner: int) -> int:
        """How many pins an owner has."""
        return len(self._owners.get(owner, ()))

    def of_owner(self, owner: int, most: int | None = None) -> list[Pin]:
        return list(islice(self._owners.get(owner, {}).values(), most))

    def get(self, owner: int, pin_id: int) -> Pin:
        """A pin of this owner; NoEntry for any other id."""
        pin = self._owners.get(owner, {}).get(pin_id)
        if pin is None:
            raise NoEntry(f"no pin {pin_id} on this open file")
        return pin

    def remove(self, pins: Iterable[Pin]) -> list[Run]:
        """Forget pins; returns the runs that no pin covers any more."""
        idle: list[Run] = []
        for pin in pins:
            del self._pins[pin.id]
            if pin.owner is not None:
                mine = self._owners[pin.owner]
                del mine[pin.id]
                if not mine:
                    del self._owners[pin.owner]
            same = self._files[pin.ino]
            del same[pin.id]
            if not same:
                del self._files[pin.ino]
            self._charge(pin, -1)
            if pin.counted:
                idle += self.counts.drop(pin.runs)
            elif pin.flags & abi.FOLL_GET:
                self.references.drop(pin.runs)
        self.generation += 1
        return idle

    def _charge(self, pin: Pin, sign: int) -> None:
        process = pin.holder.pid, pin.holder.started
        charged = self._charged.setdefault(process, [0, 0])
        charged[0] += sign * pin.blocks
        charged[1] += sign * pin.pieces
        self.pieces += sign * pin.pieces
        if not charged[1]:
            del self._charged[process]

    def charged(self, holder: Holder) -> tuple[int, int]:
        """What pins of one process cover, each pin for itself: (blocks, pieces)."""
        blocks, pieces = self._charged.get((holder.pid, holder.started), (0, 0))
        return blocks, pieces

    def files(self) -> list[int]:
        """The numbers of the files that have pins."""
        return list(self._files)

    def of_file(self, ino: int) -> list[Pin]:
        return list(self._files.get(ino, {}).values())

    def standing(self, ino: int, runs: list[Run]) -> list[Pin]:
        """The pins and registrations of a file that cover any block of its runs."""
        if not runs:
            return []
        ordered = sorted(runs)
        starts = [start for start, _ in ordered]

        def touches(run: Run) -> bool:
            at = bisect_right(starts, run[0] + run[1] - 1) - 1
            return at >= 0 and ordered[at][0] + ordered[at][1] > run[0]

        return [pin for pin in self.of_file(ino) if any(touches(run) for run in pin.runs)]

    def let_go(self, pin: Pin) -> None:
        """An on-demand holder has acknowledged: it refers to nothing any more."""
        pin.state = State.INVALID
        pin.told = False
        self.generation += 1

    def fence(self, pin: Pin) -> None:
        """An on-demand holder did not let go in time: from now on its blocks are kept as if it had pinned them."""
        self.counts.add(pin.runs)
        pin.state = State.FENCED
        self.generation += 1

    def any_id(self, pin_id: int) -> Pin:
        """A pin of whoever. NoEntry."""
        if pin_id not in self._pins:
            raise NoEntry(f"no pin {pin_id}")
        return self._pins[pin_id]

    def survivors(self) -> list[Pin]:
        return [pin for pin in self._pins.values() if pin.owner is None]

    def check(self) -> None:
        self.counts.check()
        again = PinCounts(self.counts.size)
        for pin in self._pins.values():
            if pin.counted:
                again.add(pin.runs)
            for start, count in pin.runs if pin.counted else []:
                for block in (start, start + count - 1):
                    if self.counts.count(block) < 1:
                        raise ValueError(f"pin {pin.id} covers block {block}, whose count is 0")
        if again.pinned != self.counts.pinned:
            raise ValueError(f"{self.counts.pinned} blocks are counted as pinned, {again.pinned} are")
        if sum(len(mine) for mine in self._owners.values()) + len(self.survivors()) != len(self._pins):
            raise ValueError("a pin is missing from its owner")
