"""Truncate over, beside and inside pinned blocks; O_TRUNC; several pins of one block; the corruption of 2017."""

from __future__ import annotations

import errno
import os

from daxfs import abi
from daxfs.lab import acts
from daxfs.lab.course import at_once, breaks, case, open_truncating, show_corruption, truncate
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, SAFE, Lab, everywhere, pattern, story

OCT_2017 = "Hellwig and Kara, October 2017"

case(
    "truncate",
    "truncate to nothing, one block pinned",
    source=f"S1, S3; {OCT_2017}",
    pins=[(0, 1)],
    call=truncate(0),
    sees=breaks(busy=1),
)

case(
    "truncate-all-pinned",
    "truncate to nothing, every block pinned",
    source="S1",
    pins=[(0, 8)],
    call=truncate(0),
    sees=breaks(busy=8),
)

case(
    "truncate-beside",
    "the pinned block stays in the file: nobody waits (ext4 and XFS do, for the whole file)",
    source="S4",
    pins=[(2, 1)],
    call=truncate(5),
    sees=at_once(),
)

case(
    "truncate-mid-block",
    "to the middle of a pinned block: its tail is zeroed in place, and the holder sees that",
    source="S5",
    pins=[(2, 1)],
    call=truncate(2.5),
    sees=at_once(),
)

case("truncate-grow", "growing takes no block away", source="S7", pins=[(0, 8)], call=truncate(20), sees=at_once())

case("truncate-same", "to the size that it has", source="S7", pins=[(0, 8)], call=truncate(8), sees=at_once())

case(
    "truncate-partly-pinned",
    "a pin over the new end: half of it stays in the file",
    source="S1, S4",
    pins=[(2, 4)],
    call=truncate(4),
    sees=breaks(busy=2),
)

case(
    "open-trunc",
    "open with O_TRUNC is a truncate, and fails as one",
    source="S8",
    pins=[(0, 1)],
    call=open_truncating(),
    sees=breaks(busy=1),
)

case(
    "creat",
    "creat of a file that exists is a truncate",
    source="S8",
    pins=[(0, 1)],
    call=open_truncating(os.O_CREAT, "creat(A)"),
    sees=breaks(busy=1),
)

case(
    "two-holders",
    "two processes pin the same block",
    source="S9",
    pins=[(0, 1), (0, 1)],
    call=truncate(0),
    sees=breaks(busy=1),
)

case(
    "overlapping-pins",
    "overlapping pins make one busy extent",
    source="S10",
    pins=[(0, 4), (2, 4)],
    call=truncate(0),
    sees=breaks(busy=6),
)

BOTH = {
    **everywhere("busy until the last one lets go", ("busy", "revoke")),
    **everywhere("returns after the last one lets go", ("wait", "lease")),
}


@story(
    "unpin-one-of-two",
    "pins are counted: the block is free after the last unpin, and a third unpin is an error",
    source="S9, S10",
    pins="P, Q: A[0,4), A[2,6)",
    call="truncate(A, 0); unpin P, unpin Q, unpin Q again",
    sees=BOTH,
)
def unpin_one_of_two(lab: Lab) -> None:
    path = lab.file()
    p, q = lab.holder(path).pin(0, 4), lab.holder(path).pin(2, 4)
    pending = lab.process().start(acts.truncate, path, 0)
    if lab.policy in ("busy", "revoke"):
        lab.returns(pending)
        lab.equal(lab.busy_blocks() & (p.blocks | q.blocks), p.blocks | q.blocks, "busy blocks")
        lab.equal(lab.busy(), 6, "busy blocks")
        p.unpin()
        eventually("the first unpin frees what only P had", lambda: lab.busy() == 4)
        lab.equal(lab.busy_blocks() & p.blocks, p.blocks & q.blocks, "busy blocks that P had")
        lab.bytes_equal(q.view(), b"".join(pattern("A", n) for n in range(2, 6)), "Q's blocks")
    else:
        lab.waits(pending)
        p.unpin()
        lab.waits(pending)
    q.unpin()
    if not lab.policy.startswith(("busy", "revoke")):
        lab.returns(pending)
    eventually("nothing is busy", lambda: lab.busy() == 0)
    lab.refuses(errno.ENOENT, q.holder, acts.unpin_any, q.holder.file, q.id)


@story(
    "truncate-then-fill",
    "who fills the volume after the truncate gets every block but the pinned one",
    source=f"S2; {OCT_2017}",
    pins="P: A[0,1)",
    call="truncate(A, 0); write(B) until ENOSPC",
    sees=everywhere("B has none of P's blocks; after the unpin there is one block more", ("busy", "revoke")),
)
def truncate_then_fill(lab: Lab) -> None:
    lab.needs(lab.place.own, "it fills the volume: run it without --mount")
    path = lab.file()
    p = lab.holder(path).pin()
    lab.returns(lab.process().start(acts.truncate, path, 0))
    b = lab.fill()
    lab.equal(lab.blocks(b) & p.blocks, set(), "B's blocks that P has pinned")
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    b2 = lab.path("B2")
    lab.clerk.do(acts.create, b2, b"")
    lab.refuses(errno.ENOSPC, lab.clerk, acts.write, b2, 0, b"more")
    p.unpin()
    eventually("the block is free", lambda: lab.busy() == 0)
    lab.clerk.do(acts.write, b2, 0, b"more")
    lab.equal(len(lab.blocks(b2)), 1, "blocks that are free again")


@story(
    "corruption-2017",
    "the device goes on writing after the truncate: into whose file?",
    source=f"S3; {OCT_2017}",
    pins="P: A[0,8), and writes by DMA all the time",
    call="truncate(A, 0) (where the policy lets it); write(B) over all free space",
    sees={
        "busy": "B is untouched",
        "wait": "the truncate waits for P; B is untouched",
        "fail": "ETXTBSY; B is untouched",
        "lease": "P does not let go: ETXTBSY; B is untouched",
        "revoke": "B is untouched",
        "unsafe": "P writes into B: the bytes are shown",
    },
)
def corruption_2017(lab: Lab) -> None:
    lab.needs(lab.can_fill(), "it fills the volume, which is too large for that: run it without --mount")
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    pending = lab.process().start(acts.truncate, path, 0)
    if lab.policy == "wait":
        lab.waits(pending)
    elif lab.policy in ("fail", "lease"):
        lab.fails(errno.ETXTBSY, pending)
    else:
        lab.returns(pending)
    if lab.policy == "unsafe":
        eventually("the blocks are freed", lambda: lab.busy() <= 0)
    taken = lab.take_all(p, write=True)
    p.dma(b"<the device was here>" * 1000)
    if lab.policy == "unsafe":
        show_corruption(lab, taken)
    else:
        lab.equal(lab.clerk.do(acts.foreign, taken.path, taken.full_of), None, "what B has that is not its own")
        lab.equal(lab.busy(), 8 if lab.policy in ("busy", "revoke") else 0, "busy blocks")
    p.unpin()
    if lab.policy == "wait":
        lab.returns(pending)


@story(
    "truncate-down-up",
    "down and up again: the new range reads zero, gets new blocks, and the holder keeps the old one",
    source="S6",
    pins="P: A[2,3)",
    call="truncate(A, 0), truncate(A, 8 blocks), write(A)",
    sees=everywhere("reads zero; new blocks; P and A do not see each other", ("busy", "revoke")),
)
def truncate_down_up(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(2, 1)
    caller = lab.process()
    lab.returns(caller.start(acts.truncate, path, 0))
    lab.returns(caller.start(acts.truncate, path, 8 * BLOCK))
    lab.bytes_equal(lab.read(path), bytes(8 * BLOCK), "A")
    caller.do(acts.write, path, 2 * BLOCK, b"new" * 100)
    lab.equal(lab.blocks(path) & p.blocks, set(), "blocks that A got back from P")
    lab.bytes_equal(p.view(), pattern("A", 2), "P's block")
    p.dma(b"<DMA>")
    lab.bytes_equal(lab.read(path)[2 * BLOCK : 2 * BLOCK + 300], b"new" * 100, "A")


@story(
    "truncate-own-pin",
    "the holder truncates its own file through the pinned descriptor",
    source="S61; Weiny, August 2019",
    pins="P: A[0,1)",
    call="ftruncate(P's descriptor, 0)",
    sees={
        "busy": "returns; 1 busy",
        "revoke": "returns; 1 busy",
        "wait": "EDEADLK: it would wait for itself",
        "fail": "EDEADLK",
        "lease": "EDEADLK",
    },
)
def truncate_own_pin(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    pending = p.holder.start(acts.ftruncate, p.holder.file, 0)
    if lab.policy in ("busy", "revoke"):
        lab.returns(pending)
        lab.equal(lab.busy(), 1, "busy blocks")
    else:
        lab.fails(errno.EDEADLK, pending)
        lab.equal(lab.status(path).size, 8 * BLOCK, "size")
    p.unpin()


@story(
    "nowait",
    "a layout change that would rather fail than wait",
    source="S15",
    pins="P: A[0,1)",
    call="ioctl CHANGE with NOWAIT: truncate to 0, punch [0,1)",
    sees={
        **everywhere("returns at once; 1 busy", ("busy", "revoke")),
        **everywhere("EAGAIN, nothing changed", ("wait", "lease")),
        "fail": "ETXTBSY, nothing changed",
    },
)
def nowait(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    other = lab.holder(path)
    code = errno.ETXTBSY if lab.policy == "fail" else errno.EAGAIN
    for op, length in ((abi.CHANGE_PUNCH, BLOCK), (abi.CHANGE_TRUNCATE, 0)):
        pending = other.start(acts.change, other.file, op, 0, length, abi.CHANGE_NOWAIT)
        if lab.policy in ("busy", "revoke"):
            lab.returns(pending)
            lab.equal(lab.busy(), 1, "busy blocks")
        else:
            lab.fails(code, pending)
            lab.bytes_equal(lab.read(path), b"".join(pattern("A", n) for n in range(8)), "A")
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")


@story(
    "pin-races-truncate",
    "PIN and truncate at the same moment: the pin has the old block or is refused, never a freed one",
    source="S16; Piggin and KOSAKI, April 2009",
    pins="P: A[0,1), again and again",
    call="truncate(A, 0) and up again, 250 times each (10,000 with --full)",
    sees=everywhere("each pin is of the block that A had, which nobody else gets, or fails with ENXIO or EFAULT", SAFE),
)
def pin_races_truncate(lab: Lab) -> None:
    path = lab.file("A", blocks=1)
    holder, other = lab.holder(path), lab.process()
    rounds, limit_s = (10_000, 1200) if lab.full else (250, 60)
    pins = holder.start(race_pins, holder.file, rounds)
    cuts = other.start(race_truncates, path, rounds)
    codes, wrong = pins.result(limit_s)
    refused = cuts.result(limit_s)
    lab.equal(wrong, [], "pins of blocks that were not A's any more")
    lab.see(set(codes) <= {0, errno.ENXIO, errno.EFAULT}, f"errnos of PIN: {codes}")
    lab.see(set(refused) <= {0, errno.ETXTBSY}, f"errnos of truncate: {refused}")
    lab.say(f"{codes.get(0, 0)} of {sum(codes.values())} pins were granted")


def race_pins(file: int, rounds: int) -> tuple[dict[int, int], list[bytes]]:
    """Pin, look, unpin. How often which errno came, and views that are neither A's bytes nor zeros."""
    codes: dict[int, int] = {}
    wrong: list[bytes] = []
    for _ in range(rounds):
        code = 0
        try:
            held = acts.pin(file, 0, BLOCK, abi.FOLL_PIN)
            seen = acts.view(held.id)
            if seen not in (pattern("A", 0), bytes(BLOCK)):
                wrong.append(seen[:32])
            acts.unpin(held.id)
        except OSError as problem:
            code = problem.errno or errno.EIO
        codes[code] = codes.get(code, 0) + 1
        while (event := acts.next_event(file)) is not None:
            assert event.type in (abi.EVENT_LEASE_BREAK, abi.EVENT_REVOKED)
    return codes, wrong


def race_truncates(path: str, rounds: int) -> dict[int, int]:
    """Truncate, let somebody else have the block, write A again. How often which errno came."""
    codes: dict[int, int] = {}
    data, other = pattern("A", 0), path + ".other"
    for _ in range(rounds):
        code = 0
        try:
            acts.truncate(path, 0)
            with open(other, "wb", buffering=0) as file:
                file.write(b"<another file>" * 292)
            os.unlink(other)
            acts.write(path, 0, data)
        except OSError as problem:
            code = problem.errno or errno.EIO
        codes[code] = codes.get(code, 0) + 1
    return codes
