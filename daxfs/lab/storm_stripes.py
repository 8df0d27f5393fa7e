"""Stripes: how the owners of a shared block of the storm divide it, and what each knows of its own.

Each block is cut into stripes of odd lengths, which belong to the device and the two mappers in turn. An owner alone writes
its stripes, each owner with bytes that no other one uses, and each store changes every byte of a stripe. So whoever looks at
its stripes knows what must be there, and a byte that is not says where it comes from: an older one is a lost store, one of
another owner is foreign, zero is a hole.
"""

from __future__ import annotations

from daxfs.lab.storm_actors import BLOCK, Violation

DEVICE, MAPPERS = 0, (1, 2)
NAMES = ("device", "mapper 1", "mapper 2")
UNKNOWN, CHANGED = -1, -2

_LENGTHS = (1, 3, 13, 64, 5, 127, 31, 257)
_VALUES = 83  # bytes that an owner uses; prime
_ALPHABETS = [bytes(range(1 + _VALUES * n, 1 + _VALUES * (n + 1))) for n in range(len(NAMES))]
_WHEELS = [alphabet * (max(_LENGTHS) // _VALUES + 2) for alphabet in _ALPHABETS]


def _cut() -> list[list[slice]]:
    """The stripes of a block, owner by owner."""
    found: list[list[slice]] = [[] for _ in NAMES]
    at = n = 0
    while at < BLOCK:
        end = min(at + _LENGTHS[n % len(_LENGTHS)], BLOCK)
        found[n % len(NAMES)].append(slice(at, end))
        at, n = end, n + 1
    return found


STRIPES = _cut()


def value(owner: int, n: int, version: int) -> bytes:
    """What an owner stores in its n-th stripe. No byte is as in the version before."""
    stripe, start = STRIPES[owner][n], version % _VALUES
    return _WHEELS[owner][start : start + stripe.stop - stripe.start]


def is_of(owner: int, found: bytes) -> bool:
    """Whether an owner can have stored these bytes, or nobody."""
    return not found.translate(None, _ALPHABETS[owner] + b"\0")


class Known:
    """What an owner knows of its stripes in one block. `since`: the count of layout changes of the file at which a stripe
    surely had its bytes; CHANGED: the layout changed since; UNKNOWN: they may be any of the owner's, and zero."""

    def __init__(self, owner: int, since: int = UNKNOWN) -> None:
        self.owner = owner
        self.bytes = bytearray(BLOCK)
        self.since = [since] * len(STRIPES[owner])
        self.versions = [0] * len(STRIPES[owner])

    def next(self, n: int) -> bytes:
        """What the owner stores next in a stripe."""
        return value(self.owner, n, self.versions[n] + 1)

    def made(self, n: int, since: int) -> None:
        """... and has stored."""
        self.stored(n, self.next(n), since)
        self.versions[n] += 1

    def stored(self, n: int, data: bytes, since: int) -> None:
        self.bytes[STRIPES[self.owner][n]] = data
        self.since[n] = since

    def lost_count(self, n: int) -> None:
        """A store that may have been made or not."""
        self.since[n] = UNKNOWN
        self.versions[n] += 1

    def doubt(self) -> None:
        """All may have become zero."""
        self.since = [since if since == UNKNOWN else CHANGED for since in self.since]

    def check(self, found: bytes, changes: int, where: str) -> None:
        """`found` is the block, or less if the file ends there; `changes`: the layout changes if there was none meanwhile,
        or UNKNOWN. Violation for a byte that is lost, or foreign."""
        for n, stripe in enumerate(STRIPES[self.owner]):
            if stripe.stop > len(found):
                break
            got, wanted = found[stripe], self.bytes[stripe]
            if got != wanted and not self._may_be(n, got, wanted, changes):
                raise Violation(f"{where}: {difference(self.owner, stripe.start, got, wanted)}")
            if changes != UNKNOWN:
                self.stored(n, got, changes)

    def _may_be(self, n: int, got: bytes, wanted: bytearray, changes: int) -> bool:
        if self.since[n] == UNKNOWN:
            return is_of(self.owner, got)
        if changes == self.since[n]:
            return False
        return all(x in (0, y) for x, y in zip(got, wanted, strict=True))


def difference(owner: int, start: int, got: bytes | bytearray, wanted: bytes | bytearray) -> str:
    """The first byte that is not as it was stored, in words."""
    at = next((n for n, (x, y) in enumerate(zip(got, wanted, strict=True)) if x != y and x), 0)
    origin = next((f"a byte of {NAMES[n]}" for n in range(len(NAMES)) if n != owner and got[at] in _ALPHABETS[n]), "")
    kind = origin or ("zero" if not got[at] else "an older byte" if got[at] in _ALPHABETS[owner] else "nobody's byte")
    return f"byte {start + at} of {NAMES[owner]} was {wanted[at]:#04x}, now {got[at]:#04x} ({kind})"
