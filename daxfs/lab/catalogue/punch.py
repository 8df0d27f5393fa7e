"""Punch, zero-range and preallocation over, beside and inside pinned blocks; copies in place; what the kernel refuses."""

from __future__ import annotations

import errno

from daxfs.lab import acts
from daxfs.lab.course import at_once, breaks, case, preallocate, punch, zero_range
from daxfs.lab.scenario import BLOCK, Lab, everywhere, pattern, story

case("punch", "punch one pinned block", source="S17", pins=[(1, 1)], call=punch(1, 1), sees=breaks(busy=1))

case(
    "punch-all",
    "punch the whole file, half of it pinned",
    source="S17, S18",
    pins=[(2, 4)],
    call=punch(0, 8),
    sees=breaks(busy=4),
)

case(
    "punch-sub-block",
    "within a pinned block: zeroed in place, and the holder sees that",
    source="S19",
    pins=[(1, 1)],
    call=punch(1.25, 0.5),
    sees=at_once(),
)

case("punch-beside", "other blocks of the file: nobody waits", source="S20", pins=[(0, 1)], call=punch(4, 2), sees=at_once())

case(
    "zero-range",
    "pinned blocks are zeroed where they are, and the holder sees that",
    source="S22",
    pins=[(2, 2)],
    call=zero_range(1, 5),
    sees=at_once(),
)

case(
    "zero-range-beyond",
    "zero-range beyond the end grows the file, or not with KEEP_SIZE",
    source="S22, S23",
    pins=[(7, 1)],
    call=zero_range(8, 4),
    sees=at_once(),
)

case(
    "zero-range-keep-size",
    "zero-range beyond the end with KEEP_SIZE",
    source="S23",
    pins=[(7, 1)],
    call=zero_range(6, 10, keep_size=True),
    sees=at_once(),
)

case(
    "preallocate",
    "fallocate over and behind pinned blocks",
    source="S26",
    pins=[(0, 4)],
    call=preallocate(0, 16),
    sees=at_once(),
)


@story(
    "punch-then-write",
    "a write into the hole gets a new block; holder and file do not see each other",
    source="S21",
    pins="P: A[1,2)",
    call="punch(A, [1,2)), write(A, block 1)",
    sees=everywhere("A has the new bytes, P the old ones; later writes of either reach only their own", ("busy", "revoke")),
)
def punch_then_write(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(1, 1)
    caller = lab.process()
    lab.returns(caller.start(acts.punch, path, BLOCK, BLOCK))
    caller.do(acts.write, path, BLOCK, b"n" * BLOCK)
    p.dma(b"<DMA>")
    lab.bytes_equal(lab.read(path)[BLOCK : 2 * BLOCK], b"n" * BLOCK, "block 1 of A")
    lab.bytes_equal(p.view(), b"<DMA>" + pattern("A", 1)[5:], "P's block")
    lab.equal(lab.blocks(path) & p.blocks, set(), "P's block in A")


@story(
    "punch-under-writes",
    "punches of the whole file while a holder streams writes: never an error to it, the size stays",
    source="S18; t_mmap_collision",
    pins="P: A[0,8), again and again, writing by DMA",
    call="punch(A, all) 100 times",
    sees=everywhere("P sees no error but EFAULT for a hole; the size is constant", ("busy", "revoke", "wait", "fail")),
)
def punch_under_writes(lab: Lab) -> None:
    path = lab.file()
    holder, other = lab.holder(path), lab.process()
    streaming = holder.start(stream_writes, holder.file, 150)
    punching = other.start(punch_again, path, 100)
    wrong = streaming.result(60)
    codes = punching.result(60)
    lab.equal(wrong, [], "blocks that lost the device's bytes while they were pinned")
    lab.see(codes <= {errno.ETXTBSY}, f"errnos of the punches: {codes}")
    lab.equal(lab.status(path).size, 8 * BLOCK, "size")


def stream_writes(file: int, rounds: int) -> list[str]:
    """Pin all, write by DMA, look, unpin; what was not as written."""
    from daxfs import abi

    wrong = []
    for n in range(rounds):
        held = acts.pin(file, 0, 8 * BLOCK, abi.FOLL_PIN | abi.FOLL_WRITE)
        data = bytes([n % 251]) * (8 * BLOCK)
        acts.dma(held.id, 0, data)
        if acts.view(held.id) != data:
            wrong.append(f"round {n}")
        acts.unpin(held.id)
        while acts.next_event(file) is not None:
            continue
    return wrong


def punch_again(path: str, rounds: int) -> set[int]:
    """Punch the whole file so many times; the errnos that came."""
    codes = set()
    for _ in range(rounds):
        try:
            acts.punch(path, 0, 8 * BLOCK)
        except OSError as problem:
            codes.add(problem.errno or errno.EIO)
    return codes


@story(
    "collapse-refused",
    "the kernel's FUSE client lets no COLLAPSE_RANGE through: this tells us when it does",
    source="S27",
    pins="nobody",
    call="fallocate(A, COLLAPSE_RANGE)",
    sees="EOPNOTSUPP",
)
def collapse_refused(lab: Lab) -> None:
    path = lab.file()
    lab.refuses(errno.EOPNOTSUPP, lab.process(), acts.fallocate, path, acts.COLLAPSE_RANGE, 0, BLOCK)


@story(
    "write-in-place",
    "write(2) and copy_file_range into a pinned block: in place, and the holder sees the bytes",
    source="S34; oracle",
    pins="P: A[0,2)",
    call="write(A, block 0), copy_file_range(C to A, block 1)",
    sees="at once; P sees the new bytes; nothing busy",
)
def write_in_place(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p = lab.holder(path).pin(0, 2)
    caller = lab.process()
    caller.do(acts.write, path, 0, b"w" * BLOCK)
    caller.do(acts.copy_range, other, path, 3 * BLOCK, BLOCK, BLOCK)
    lab.bytes_equal(p.view(), b"w" * BLOCK + pattern("C", 3), "P's blocks")
    lab.equal(lab.busy(), 0, "busy blocks")
    lab.see(p.blocks <= lab.blocks(path), "pinned blocks have moved")
    p.unpin()


@story(
    "copy-from-pinned",
    "copy_file_range from pinned blocks copies what is there now",
    source="S34",
    pins="P: A[0,1), has written by DMA",
    call="copy_file_range(A to C)",
    sees="C has P's bytes",
)
def copy_from_pinned(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p = lab.holder(path).pin()
    p.dma(b"<DMA>")
    lab.process().do(acts.copy_range, path, other, 0, 0, BLOCK)
    lab.bytes_equal(lab.read(other)[:BLOCK], b"<DMA>" + pattern("A", 0)[5:], "C")
    p.dma(b"<DMA, later>")
    lab.bytes_equal(lab.read(other)[:BLOCK], b"<DMA>" + pattern("A", 0)[5:], "C")
    p.unpin()
