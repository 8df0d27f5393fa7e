"""The common course of a scenario: pins on a file A of eight blocks, one call by somebody else, and what must be seen.

`Call` knows what it does to the file's bytes; `Sees` says how it meets the pins under a policy. The course: pins are
taken, each by a process of its own -> the call is made -> it returns, waits, fails or asks, as the table says -> the
file has its new bytes (or the old ones), the holders still have theirs -> what the table says is busy, and nobody can
get the holders' blocks -> the holders write by DMA, which shows in the file only where the block is still the file's ->
pins are given back -> the invariants.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from daxfs import abi
from daxfs.lab import acts
from daxfs.lab.processes import Unseen, errno_name, eventually
from daxfs.lab.scenario import BLOCK, EVERY, Held, Lab, Range, Scenario, Taken, register


@dataclass(frozen=True)
class Call:
    """A system call on A: its words, the function and its arguments after the path, and the file's bytes afterwards."""

    words: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: Callable[[bytes], bytes]


def truncate(size: float) -> Call:
    """truncate(2) to so many blocks."""
    length = int(size * BLOCK)
    return Call(f"truncate(A, {_blocks(length)})", acts.truncate, (length,), lambda old: old[:length].ljust(length, b"\0"))


def open_truncating(how: int = 0, words: str = "open(A, O_TRUNC)") -> Call:
    return Call(words, acts.open_truncating, (how,), lambda old: b"")


def punch(first: float, count: float) -> Call:
    return _fallocate("PUNCH_HOLE", acts.PUNCH_HOLE | acts.KEEP_SIZE, first, count, zero=True)


def zero_range(first: float, count: float, *, keep_size: bool = False) -> Call:
    return _fallocate("ZERO_RANGE", acts.ZERO_RANGE | (acts.KEEP_SIZE if keep_size else 0), first, count, zero=True)


def preallocate(first: float, count: float) -> Call:
    return _fallocate("0", 0, first, count, zero=False)


def _fallocate(words: str, mode: int, first: float, count: float, *, zero: bool) -> Call:
    start, length = int(first * BLOCK), int(count * BLOCK)

    def after(old: bytes) -> bytes:
        new = bytearray(old if mode & acts.KEEP_SIZE else old.ljust(start + length, b"\0"))
        if zero and start < len(new):
            new[start : start + length] = bytes(min(length, len(new) - start))
        return bytes(new)

    keep = "|KEEP_SIZE" if mode & acts.KEEP_SIZE else ""
    return Call(f"fallocate(A, {words}{keep}, {_blocks(start)}, {_blocks(length)})", acts.fallocate,
                (mode, start, length), after)  # fmt: skip


def _blocks(length: int) -> str:
    return f"{length / BLOCK:g} blocks" if length else "0"


class How(Enum):
    AT_ONCE = "returns at once"
    WAITS = "waits; returns after the unpin"
    FAILS = "fails, nothing changed"
    ASKS = "holders get LEASE_BREAK; returns after the unpin"
    REVOKES = "returns at once; holders get REVOKED"
    CORRUPTS = "returns at once; pinned blocks are given to others"


@dataclass(frozen=True)
class Sees:
    """What must be seen: `busy` blocks while the pins are held and the call is over."""

    how: How
    busy: int = 0
    errno: int = 0

    def __str__(self) -> str:
        code = f" ({errno_name(self.errno)})" if self.errno else ""
        return f"{self.how.value}{code}" + (f"; {self.busy} busy" if self.busy else "")


def breaks(busy: int) -> dict[str, Sees]:
    """The table of D6.3 for a call that takes pinned blocks away, so many of them."""
    return {
        "busy": Sees(How.AT_ONCE, busy),
        "wait": Sees(How.WAITS),
        "fail": Sees(How.FAILS, errno=errno.ETXTBSY),
        "lease": Sees(How.ASKS),
        "revoke": Sees(How.REVOKES, busy),
        "unsafe": Sees(How.CORRUPTS),
    }


BREAKS = breaks(1)


def at_once() -> dict[str, Sees]:
    """No pinned block is taken away: no policy has a say."""
    return dict.fromkeys(EVERY, Sees(How.AT_ONCE))


def case(
    name: str, title: str, *, source: str, call: Call, sees: Mapping[str, Sees], pins: Sequence[Range] = ((0, 1),)
) -> Scenario:
    """Declare a scenario that takes the common course."""
    words = "; ".join(f"{who}: A[{first},{first + count})" for who, (first, count) in zip("PQRSTU", pins, strict=False))

    def play(lab: Lab) -> None:
        _play(lab, pins, call, sees[lab.policy])

    return register(Scenario(name, title, source, words, call.words, {p: str(s) for p, s in sees.items()}, play))


def _play(lab: Lab, pins: Sequence[Range], call: Call, sees: Sees) -> None:
    path = lab.file("A")
    old = lab.read(path)
    held = [lab.holder(path).pin(*pinned) for pinned in pins]
    changed = meet(lab, path, call, sees, held)
    new = call.after(old) if changed else old
    lab.bytes_equal(lab.read(path), new, "A after the call")
    still = [pin for pin in held if not pin.released]
    if sees.how is How.CORRUPTS:
        _given_away(lab, still)
    else:
        kept(lab, path, old, new, still)
        lab.equal(lab.busy(), sees.busy, "busy blocks while the pins are held")
        lab.not_reused(*still)
    for pin in still:
        pin.unpin()


def meet(lab: Lab, path: str, call: Call, sees: Sees, held: list[Held]) -> bool:
    """Make the call; has it changed the file?"""
    before = lab.status(path)
    pending = lab.process().start(call.function, path, *call.arguments)
    if sees.how is How.FAILS:
        lab.fails(sees.errno, pending)
        lab.equal(lab.status(path), before, "size, blocks and links after the failure")
        return False
    if sees.how is How.ASKS:
        for pin in held:
            lab.equal(pin.holder.event().type, abi.EVENT_LEASE_BREAK, "event")
    if sees.how in (How.WAITS, How.ASKS):
        lab.waits(pending)
        lab.equal(lab.status(path), before, "size, blocks and links while it waits")
        for pin in held:
            pin.unpin()
    lab.returns(pending)
    if sees.how is How.REVOKES:
        for pin in held:
            lab.equal(pin.holder.event().type, abi.EVENT_REVOKED, "event")
    return True


def kept(lab: Lab, path: str, old: bytes, new: bytes, held: list[Held]) -> None:
    """The holders' bytes: a block that was taken away has the old ones, one that the file still has is the file's. Then the
    devices write, and only the file's own blocks may show it."""
    mine = lab.blocks(path)
    file = bytearray(new)
    block_has: dict[int, bytes] = {}
    for n, pin in enumerate(held):
        view, mark = pin.view(), f"<DMA of {'PQRSTU'[n]}>".encode()
        for index, block in enumerate(pin.in_order):
            at = (pin.first + index) * BLOCK
            before = bytes((file if block in mine else old)[at : at + BLOCK]).ljust(BLOCK, b"\0")
            wanted = block_has.get(block, before)
            lab.bytes_equal(view[index * BLOCK :][:BLOCK], wanted, f"block {pin.first + index} as its holder sees it")
            pin.dma(mark, index * BLOCK)
            block_has[block] = mark + wanted[len(mark) :]
            if block in mine:
                file[at : at + len(mark)] = mark
    lab.bytes_equal(lab.read(path), bytes(file[: len(new)]), "A after the devices have written")


def _given_away(lab: Lab, held: list[Held]) -> None:
    """Policy `unsafe`: the blocks are somebody's at once, and the device writes into his file."""
    eventually("the blocks are freed", lambda: lab.busy() <= 0)
    taken = lab.take_all(*held, write=True)
    lab.see(taken.lost, "under `unsafe` no pinned block was given away: the demonstration shows nothing")
    for pin in held:
        for index in range(pin.count):
            pin.dma(b"<DMA of P>", index * BLOCK)
    show_corruption(lab, taken)


def show_corruption(lab: Lab, taken: Taken) -> None:
    """The file that was written full of a pattern has something else in it."""
    found = lab.clerk.do(acts.foreign, taken.path, taken.full_of)
    if found is None:
        raise Unseen("the device wrote into a block of another file, but the file does not show it")
    lab.say(f"file B was written full of {taken.full_of[:11]!r}; at byte {found[0]} it now has {found[1]!r}")
