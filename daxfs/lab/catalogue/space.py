"""Space: what busy blocks cost, who gets what when the volume is full, and that the sums are right."""

from __future__ import annotations

import errno
import os
import random
import time

from daxfs import abi
from daxfs.lab import acts
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, SAFE, Held, Lab, everywhere, story

FREEING = ("busy", "revoke")  # policies under which a truncate makes blocks busy at once


def all_busy(lab: Lab) -> Held:
    """A file over all space, pinned and then truncated: what is left is metadata's."""
    path = lab.path("A")
    lab.clerk.do(acts.take_space, path, lab.info()["free"] * BLOCK)
    lab.set_policy(path)
    count = lab.status(path).size // BLOCK
    held = lab.holder(path).pin(0, count)
    lab.returns(lab.process().start(acts.truncate, path, 0))
    lab.equal(lab.busy(), count, "busy blocks")
    return held


@story(
    "all-space-busy",
    "all free space is busy: a write fails at once and does not hang; after the unpin it succeeds",
    source="S46; Kara: invisible used blocks",
    pins="P: all space",
    call="truncate; write(C) before and after the unpin",
    sees=everywhere("ENOSPC within 1 s; df shows the volume full; then success", FREEING),
)
def all_space_busy(lab: Lab) -> None:
    lab.needs(lab.place.own, "it takes all space: run it without --mount")
    other = lab.path("C")
    lab.clerk.do(acts.create, other, b"")
    p = all_busy(lab)
    caller, started = lab.process(), time.monotonic()
    lab.refuses(errno.ENOSPC, caller, acts.write, other, 0, bytes(BLOCK))
    lab.see(time.monotonic() - started < 1, "the write took its time to fail")
    lab.identity()
    p.unpin()
    eventually("the blocks are free", lambda: lab.busy() == 0)
    lab.returns(caller.start(acts.write, other, 0, bytes(BLOCK)))


@story(
    "write-waits-for-busy-space",
    "enospc_wait_s: an allocation that finds only busy space waits for it",
    source="S46, D6.4",
    pins="P: all space",
    call="truncate; write(C)",
    options={"enospc_wait_s": "5"},
    sees={"busy": "the write waits; it returns after the unpin"},
)
def write_waits_for_busy_space(lab: Lab) -> None:
    lab.needs(lab.place.own, "it takes all space: run it without --mount")
    other = lab.path("C")
    lab.clerk.do(acts.create, other, b"")
    p = all_busy(lab)
    pending = lab.process().start(acts.write, other, 0, b"x" * BLOCK)
    lab.waits(pending)
    p.unpin()
    lab.returns(pending)
    lab.bytes_equal(lab.read(other), b"x" * BLOCK, "C")


@story(
    "space-identity",
    "free + used + busy is the same at every step, and df agrees",
    source="S47",
    pins="P: ranges of A, at random",
    call="truncate, punch, write, pin, unpin, unlink at random, 100 steps",
    sees=everywhere("the sums are right after each step", FREEING),
)
def space_identity(lab: Lab) -> None:
    path = lab.file()
    holder, caller = lab.holder(path), lab.process()
    dice, held = random.Random(47), list[Held]()
    for _ in range(100):
        first, count = dice.randrange(8), dice.randint(1, 8)
        move = dice.randrange(5)
        if move == 0:
            caller.do(acts.truncate, path, first * BLOCK)
        elif move == 1:
            caller.do(acts.punch, path, first * BLOCK, count * BLOCK)
        elif move == 2:
            caller.do(acts.write, path, first * BLOCK, b"x" * (count * BLOCK))
        elif move == 3 and holder.errno_of(os.fstat, holder.file) == 0 and lab.status(path).size >= 8 * BLOCK:
            held.append(holder.pin(first, min(count, 8 - first)))
        elif held:
            held.pop(dice.randrange(len(held))).unpin()
        lab.identity()
    for pin in held:
        pin.unpin()


@story(
    "busy-fragments",
    "every second block busy: who writes then gets the others, and does not wait",
    source="S49",
    pins="P: every second block of A, 8000 pins",
    call="truncate(A, 0); write(C, 8000 blocks), most of them into the gaps",
    sees=everywhere("C has none of P's blocks; no write is refused, none waits", FREEING),
    size=80 << 20,
)
def busy_fragments(lab: Lab) -> None:
    count = 8000
    lab.needs(lab.place.own or lab.info()["free"] > 3 * count, "it needs 24,000 free blocks")
    path, other = lab.file("A", blocks=2 * count), lab.file("C", blocks=0)
    holder = lab.holder(path)
    pinned = lab.returns(holder.start(pin_every_second, holder.file, count), 60)
    lab.returns(lab.process().start(acts.truncate, path, 0))
    lab.equal(lab.busy(), count, "busy blocks")
    caller = lab.process()
    for n in range(0, count, 100):
        lab.returns(caller.start(acts.write, other, n * BLOCK, b"c" * (100 * BLOCK)))
    lab.equal(lab.blocks(other) & set(pinned), set(), "P's blocks in C")
    holder.process.kill()
    eventually("all are free again", lambda: lab.busy() == 0)


def pin_every_second(file: int, count: int) -> list[int]:
    """The blocks."""
    return [acts.pin(file, 2 * n * BLOCK, BLOCK, abi.FOLL_PIN).runs[0][0] for n in range(count)]


@story(
    "unlink-when-full",
    "at 100 % unlink, truncate and punch still work: busy blocks do not eat the metadata reserve",
    source="S50",
    pins="P: A[0,8)",
    call="fill the volume; unlink(A), punch in the middle of B, truncate(B)",
    sees=everywhere("all succeed", SAFE),
)
def unlink_when_full(lab: Lab) -> None:
    lab.needs(lab.can_fill(), "it fills the volume, which is too large for that: run it without --mount")
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    taken = lab.take_all(p)
    caller = lab.process()
    lab.returns(caller.start(os.unlink, path))
    for n in range(1, 20, 2):
        lab.returns(caller.start(acts.punch, taken.path, n * BLOCK, BLOCK))
    lab.returns(caller.start(acts.truncate, taken.path, 8 * BLOCK))
    p.unpin()
