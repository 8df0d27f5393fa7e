"""Who holds which blocks: pin objects, their owners, and a count of pins for every block.

A pin belongs to an owner, which is an open file description (the daemon's file handle); the owner's last close releases
all its pins. A pin keeps the runs that the range had when it was taken: blocks stay where they are while they are
pinned, whatever becomes of the file. Counts decide what a freed block becomes (PinCounts.split): idle or busy.

States of a pin: held -> released (by unpin, by the owner's end). A survivor is a pin of a daemon that died, known from the
ledger only: it has no owner here and is released when its holder is gone or by an admin.

Not here: which blocks a range has and whether it may be pinned (`pin`, in holding.py), and waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from daxfs.core.alloc import Run
from daxfs.core.inode import Inode
from daxfs.core.pincounts import PinCounts
from daxfs.errors import NoEntry

PINS_PER_OWNER_MAX = 1 << 20


@dataclass(frozen=True)
class Holder:
    """The process that took a pin: `started` is its start time in clock ticks since boot; `path` is for people."""

    pid: int
    comm: str = ""
    started: int = 0
    path: str = ""


@dataclass
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
    entries: list[int] = field(default_factory=list, repr=False)  # of the ledger

    @property
    def blocks(self) -> int:
        return sum(count for _, count in self.runs)


class PinTable:
    """All pins of a volume. `counts` says how many pins cover a block."""

    def __init__(self, blocks: int) -> None:
        self.counts = PinCounts(blocks)
        self._pins: dict[int, Pin] = {}
        self._owners: dict[int, dict[int, Pin]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._pins.values()))

    @property
    def blocks(self) -> int:
        """Blocks with at least one pin."""
        count: int = self.counts.pinned
        return count

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def insert(self, pin: Pin) -> None:
        self.counts.add(pin.runs)
        self._last_id = max(self._last_id, pin.id)
        self._pins[pin.id] = pin
        if pin.owner is not None:
            self._owners.setdefault(pin.owner, {})[pin.id] = pin

    def count_of(self, owner: int) -> int:
        """How many pins an owner has."""
        return len(self._owners.get(owner, ()))

    def of_owner(self, owner: int) -> list[Pin]:
        return list(self._owners.get(owner, {}).values())

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
            idle += self.counts.drop(pin.runs)
        return idle

    def survivors(self) -> list[Pin]:
        return [pin for pin in self._pins.values() if pin.owner is None]

    def check(self) -> None:
        self.counts.check()
        again = PinCounts(self.counts.size)
        for pin in self._pins.values():
            again.add(pin.runs)
            for start, count in pin.runs:
                for block in (start, start + count - 1):
                    if self.counts.count(block) < 1:
                        raise ValueError(f"pin {pin.id} covers block {block}, whose count is 0")
        if again.pinned != self.counts.pinned:
            raise ValueError(f"{self.counts.pinned} blocks are counted as pinned, {again.pinned} are")
        if sum(len(mine) for mine in self._owners.values()) + len(self.survivors()) != len(self._pins):
            raise ValueError("a pin is missing from its owner")
