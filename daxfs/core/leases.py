"""Layout leases: a holder's wish to hear before the layout of a range changes.

A lease belongs to an open file description, as a pin does (what sank the kernel's 2019 series was that pins escaped from
the lease of the process that had taken it). It gives no right to the blocks. Under `longterm=lease` a long-term pin
needs one; under policy `lease` a layout change waits for it; under the others it is told and broken at once.

States: held -> told (a break is under way) -> released (by its owner) or broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Lease:
    """A range of blocks [first, first + count) of a file."""

    owner: int
    ino: int
    first: int
    count: int
    told: bool = False


class Leases:
    """All leases of a volume. `tell(lease)` is called when one is to be given back."""

    def __init__(self, tell: Callable[[Lease], None]) -> None:
        self._tell = tell
        self._files: dict[int, list[Lease]] = {}

    def take(self, owner: int, ino: int, first: int, count: int) -> None:
        self._files.setdefault(ino, []).append(Lease(owner, ino, first, count))

    def release(self, owner: int, ino: int) -> int:
        """Give back all leases of an owner on a file. How many there were."""
        mine = [lease for lease in self._files.get(ino, []) if lease.owner == owner]
        self._drop(mine)
        return len(mine)

    def of_file(self, ino: int) -> list[Lease]:
        return list(self._files.get(ino, []))

    def of_owner(self, owner: int) -> bool:
        """Whether an owner has any lease."""
        return any(lease.owner == owner for leases in self._files.values() for lease in leases)

    def overlapping(self, ino: int, first: int, count: int) -> list[Lease]:
        return [x for x in self._files.get(ino, []) if x.first < first + count and first < x.first + x.count]

    def covers(self, owner: int, ino: int, first: int, count: int) -> bool:
        """Whether one lease of this owner, not being broken, has the whole range."""
        return any(
            x.owner == owner and not x.told and x.first <= first and first + count <= x.first + x.count
            for x in self._files.get(ino, [])
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
            rest = self._files.get(lease.ino, [])
            if lease in rest:
                rest.remove(lease)
            if not rest:
                self._files.pop(lease.ino, None)
