"""Layout leases: a holder's wish to hear before the layout of a range changes.

A lease belongs to an open file description, as a pin does (what sank the kernel's 2019 series was that pins escaped from
the lease of the process that had taken it). It gives no right to the blocks. Under `longterm=lease` a long-term pin
needs one; under policy `lease` a layout change waits for it; under the others it is told and broken at once, or told when
the change begins to wait for pins.

States: held -> told (a break is under way) -> released (by its owner) or broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from daxfs.core.waiting import Moved, unheard
from daxfs.errors import NoMemory

LEASES_PER_OWNER_MAX = 256
LEASES_MAX = 1 << 14


@dataclass(eq=False, slots=True)
class Lease:
    """A range of blocks [first, first + count) of a file."""

    owner: int
    ino: int
    first: int
    count: int
    told: bool = False


class Leases:
    """All leases of a volume. `tell(lease)` is called when one is to be given back, `moved` with the numbers of the files
    that have lost some."""

    def __init__(self, tell: Callable[[Lease], None], moved: Moved = unheard) -> None:
        self._tell = tell
        self._moved = moved
        self._files: dict[int, dict[Lease, None]] = {}
        self._owners: dict[int, dict[Lease, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def take(self, owner: int, ino: int, first: int, count: int) -> None:
        """NoMemory beyond what an owner, or all of them, may have."""
        if len(self._owners.get(owner, ())) >= LEASES_PER_OWNER_MAX or self._count >= LEASES_MAX:
            raise NoMemory(f"an open file has at most {LEASES_PER_OWNER_MAX} leases, a volume {LEASES_MAX}")
        lease = Lease(owner, ino, first, count)
        self._files.setdefault(ino, {})[lease] = None
        self._owners.setdefault(owner, {})[lease] = None
        self._count += 1

    def release(self, owner: int) -> int:
        """Give back all leases of an owner. How many there were."""
        mine = list(self._owners.get(owner, ()))
        self._drop(mine)
        return len(mine)

    def has_file(self, ino: int) -> bool:
        return ino in self._files

    def has_owner(self, owner: int) -> bool:
        return owner in self._owners

    def overlapping(self, ino: int, first: int, count: int) -> list[Lease]:
        return [x for x in self._files.get(ino, ()) if x.first < first + count and first < x.first + x.count]

    def covers(self, owner: int, ino: int, first: int, count: int) -> bool:
        """Whether one lease of this owner, not being broken, has the whole range."""
        return any(
            x.ino == ino and not x.told and x.first <= first and first + count <= x.first + x.count
            for x in self._owners.get(owner, ())
        )

    def tell(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            if not lease.told:
                lease.told = True
                self._tell(lease)

    def break_all(self, leases: Iterable[Lease]) -> None:
        leases = list(leases)
        self.tell(leases)
        self._drop(leases)

    def _drop(self, leases: list[Lease]) -> None:
        for lease in leases:
            for index, key in ((self._files, lease.ino), (self._owners, lease.owner)):
                rest = index[key]
                del rest[lease]
                if not rest:
                    del index[key]
            self._count -= 1
        for ino in {lease.ino for lease in leases}:
            self._moved(ino)
