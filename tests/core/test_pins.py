"""The pin table, and the verbs of pins: who may pin what, and what becomes of blocks then."""

from __future__ import annotations

from typing import Any

import pytest

from daxfs import abi
from daxfs.core import fileops, holding, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder, Pin
from daxfs.core.volume import Volume
from daxfs.core.waiting import LayoutBusy
from daxfs.errors import (
    AccessDenied,
    BadAddress,
    BadArgument,
    FsError,
    IsDirectory,
    NoEntry,
    NoMemory,
    NoSuchAddress,
    TextBusy,
)

from .image import NOW

B = 4096
ME = Holder(100, "test", 5)
PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
READ, WRITE = abi.FOLL_PIN, abi.FOLL_PIN | abi.FOLL_WRITE


@pytest.fixture
def file(vol: Volume) -> Inode:
    """Eight blocks of different bytes, open once."""
    inode = namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))
    fileops.write(vol, NOW, inode, 0, b"".join(bytes([65 + i]) * B for i in range(8)))
    inode.opens += 1
    return inode


def pin(vol: Volume, inode: Inode, first: int, count: int, flags: int = READ, owner: int = 1, **more: Any) -> Pin:
    return holding.pin(vol, NOW, inode, first * B, count * B, flags, owner, ME, **{"writable": True, **more})


def held(one: Pin) -> list[int]:
    return [b for start, count in one.runs for b in range(start, start + count)]


def unpin(vol: Volume, one: Pin) -> None:
    assert one.owner is not None
    holding.unpin(vol, NOW, one.owner, one.id)
    vol.check()


def drain(vol: Volume) -> None:
    while vol.free_unpinned(NOW, 1):
        vol.check()
    vol.check()


# -- what is refused --

BAD = {
    "no length": ({"count": 0}, BadArgument),
    "beyond the end": ({"first": 7, "count": 2}, NoSuchAddress),
    "behind the end": ({"first": 8, "count": 1}, NoSuchAddress),
    "no kind": ({"flags": abi.FOLL_WRITE}, BadArgument),
    "both kinds": ({"flags": abi.FOLL_PIN | abi.FOLL_GET}, BadArgument),
    "a long-term reference": ({"flags": abi.FOLL_GET | abi.FOLL_LONGTERM}, BadArgument),
    "an unknown flag": ({"flags": READ | 2}, BadArgument),
    "a write pin of a reader": ({"flags": WRITE, "writable": False}, AccessDenied),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pin_is_refused(vol: Volume, file: Inode, what: str) -> None:
    arguments, error = BAD[what]
    with pytest.raises(error):
        pin(vol, file, **{"first": 0, "count": 1, **arguments})
    assert len(vol.pins) == vol.pinned == 0


@pytest.mark.parametrize(("offset", "length"), [(1, B), (0, B + 1), (B - 1, 1), (0, 100)])
def test_a_misaligned_pin_is_refused(vol: Volume, file: Inode, offset: int, length: int) -> None:
    with pytest.raises(BadArgument, match="multiples of 4096"):
        holding.pin(vol, NOW, file, offset, length, READ, 1, ME, writable=True)


def test_only_files_have_blocks(vol: Volume) -> None:
    with pytest.raises(IsDirectory):
        pin(vol, vol.root, 0, 1)
    link = namespace.symlink(vol, NOW, vol.root, b"l", b"x" * 3000, Caller(0, 0))
    with pytest.raises(BadArgument):
        pin(vol, link, 0, 1)


def test_the_block_of_the_end_of_file_can_be_pinned(vol: Volume, file: Inode) -> None:
    fileops.truncate(vol, NOW, file, 7 * B + 1)
    assert pin(vol, file, 7, 1).blocks == 1
    with pytest.raises(NoSuchAddress):
        pin(vol, file, 8, 1)
    fileops.truncate(vol, NOW, file, 0)
    with pytest.raises(NoSuchAddress):
        pin(vol, file, 0, 1)


def test_there_is_a_limit(vol: Volume, file: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "PINS_PER_OWNER_MAX", 2)
    first, second = pin(vol, file, 0, 1), pin(vol, file, 0, 1)
    with pytest.raises(NoMemory, match="2 pins already"):
        pin(vol, file, 0, 1)
    pin(vol, file, 0, 1, owner=2)
    unpin(vol, first)
    pin(vol, file, 0, 1)
    assert second in vol.pins.of_owner(1)


# -- holes --


def test_a_read_pin_of_a_hole(vol: Volume, file: Inode) -> None:
    fileops.fallocate(vol, NOW, file, PUNCH, B, B)
    fileops.fallocate(vol, NOW, file, fileops.FALLOC_ZERO_RANGE, 3 * B, B)
    for first, count in ((1, 1), (0, 3), (3, 1), (2, 2)):
        with pytest.raises(BadAddress):
            pin(vol, file, first, count)
    assert pin(vol, file, 4, 3).blocks == 3


def test_a_write_pin_fills_holes_with_zeros(vol: Volume, file: Inode) -> None:
    fileops.fallocate(vol, NOW, file, PUNCH, B, B)
    fileops.fallocate(vol, NOW, file, fileops.FALLOC_ZERO_RANGE, 3 * B, B)
    before = fileops.read(vol, file, 0, 8 * B)
    for block in range(vol.sb["data_start"], vol.blocks):  # what free blocks hold must not show
        if vol.alloc.free.within(block, 1):
            vol.pmem.store(block * B, b"\xee" * B)
    one = pin(vol, file, 0, 8, WRITE)
    assert file.map.written(0, 8)
    assert fileops.read(vol, file, 0, 8 * B) == before
    assert b"".join(vol.pmem.load(b * B, B) for b in held(one)) == before
    assert file.mtime == file.ctime == NOW


def test_a_write_pin_of_a_hole_on_a_full_volume(vol: Volume, file: Inode) -> None:
    fileops.fallocate(vol, NOW, file, PUNCH, 0, 2 * B)
    fileops.fallocate(vol, NOW, file, 1, 8 * B, vol.alloc.available * B)
    assert vol.alloc.available == 0
    with pytest.raises(FsError) as refused:
        pin(vol, file, 0, 2, WRITE)
    assert refused.value.errno == 28
    assert len(vol.pins) == 0
    assert pin(vol, file, 2, 2, WRITE).blocks == 2


# -- counts --


def test_two_pins_of_a_block(vol: Volume, file: Inode) -> None:
    """S9: freed after the second, and a third release is an error."""
    one, two = pin(vol, file, 0, 1), pin(vol, file, 0, 1, owner=2)
    block = held(one)[0]
    fileops.truncate(vol, NOW, file, 0)
    unpin(vol, one)
    drain(vol)
    assert vol.busy_runs() == [(block, 1)]
    unpin(vol, two)
    drain(vol)
    assert vol.busy == 0
    assert vol.alloc.free.within(block, 1)
    with pytest.raises(NoEntry):
        unpin(vol, two)


def test_overlapping_pins(vol: Volume, file: Inode) -> None:
    """S10: [0,4) and [2,6): six busy blocks once, then the first two go."""
    one, two = pin(vol, file, 0, 4), pin(vol, file, 2, 4)
    blocks = sorted({*held(one), *held(two)})
    fileops.truncate(vol, NOW, file, 0)
    assert vol.busy == 6
    unpin(vol, one)
    drain(vol)
    assert [b for start, n in vol.busy_runs() for b in range(start, start + n)] == blocks[2:]
    unpin(vol, two)
    drain(vol)
    assert vol.busy == vol.pinned == 0


def test_another_owner_cannot_unpin(vol: Volume, file: Inode) -> None:
    one = pin(vol, file, 0, 1)
    with pytest.raises(NoEntry):
        holding.unpin(vol, NOW, 2, one.id)
    with pytest.raises(NoEntry):
        holding.unpin(vol, NOW, 1, one.id + 1)
    assert vol.pinned == 1


def test_an_owner_ends(vol: Volume, file: Inode) -> None:
    for first in range(4):
        pin(vol, file, first, 2)
    other = pin(vol, file, 0, 1, owner=2)
    assert holding.release_owner(vol, 1) == 4
    assert holding.release_owner(vol, 1) == 0
    assert list(vol.pins) == [other]
    vol.check()


def test_dirty_touches_the_file(vol: Volume, file: Inode) -> None:
    for flags, dirty, touched in ((WRITE, True, True), (WRITE, False, False), (READ, True, False)):
        one = pin(vol, file, 0, 1, flags)
        before = file.mtime
        later = before + 5
        holding.unpin(vol, later, 1, one.id, dirty=dirty)
        assert (file.mtime == file.ctime == later) == touched
    one = pin(vol, file, 0, 1, WRITE)
    fileops.truncate(vol, NOW, file, 0)
    holding.unpin(vol, NOW + 99, 1, one.id, dirty=True)
    assert file.mtime == NOW + 99


# -- layout changes --


def test_truncate_keeps_pinned_blocks_from_everybody(vol: Volume, file: Inode) -> None:
    """S1, S2, S6: the holder keeps its bytes, a filled-up volume does not get them, the file gets new blocks."""
    one = pin(vol, file, 0, 1)
    block, free = held(one)[0], vol.free
    fileops.truncate(vol, NOW, file, 0)
    assert (vol.busy, vol.free - free, file.size) == (1, 7, 0)
    fileops.truncate(vol, NOW, file, 8 * B)
    assert fileops.read(vol, file, 0, 8 * B) == bytes(8 * B)
    fileops.write(vol, NOW, file, 0, b"x" * (vol.alloc.available * B))
    assert vol.alloc.available == 0
    assert all(not start <= block < start + n for _, start, n, _ in file.map)
    assert vol.pmem.load(block * B, B) == b"A" * B
    unpin(vol, one)
    drain(vol)
    assert vol.alloc.available == 1


def test_only_the_range_counts(vol: Volume, file: Inode) -> None:
    """S4, S7, S20: what does not take the pinned block leaves it where it is."""
    one = pin(vol, file, 2, 1)
    for change in (
        lambda: fileops.truncate(vol, NOW, file, 5 * B),
        lambda: fileops.truncate(vol, NOW, file, 9 * B),
        lambda: fileops.fallocate(vol, NOW, file, PUNCH, 3 * B, 2 * B),
        lambda: fileops.fallocate(vol, NOW, file, 0, 0, 12 * B),
        lambda: fileops.fallocate(vol, NOW, file, fileops.FALLOC_ZERO_RANGE | 1, 20 * B, 2 * B),
    ):
        change()
        vol.check()
        assert vol.busy == 0
        assert file.block(2) == held(one)[0]
        assert vol.pmem.load(held(one)[0] * B, B) == b"C" * B


def test_partial_blocks_are_zeroed_in_place(vol: Volume, file: Inode) -> None:
    """S5, S19: the holder sees the zeros, as on a DAX page."""
    one = pin(vol, file, 2, 1)
    at = held(one)[0] * B
    fileops.fallocate(vol, NOW, file, PUNCH, 2 * B + 100, 50)
    assert vol.pmem.load(at, B) == b"C" * 100 + bytes(50) + b"C" * (B - 150)
    fileops.truncate(vol, NOW, file, 2 * B + 2000)
    assert vol.pmem.load(at, B) == b"C" * 100 + bytes(50) + b"C" * 1850 + bytes(B - 2000)
    assert vol.busy == 0


def test_punch_and_write_part_file_and_holder(vol: Volume, file: Inode) -> None:
    """S17, S21: the hole reads zero, gets a new block when it is written; neither sees the other any more."""
    one = pin(vol, file, 1, 1, WRITE)
    at = held(one)[0] * B
    fileops.fallocate(vol, NOW, file, PUNCH, B, B)
    assert fileops.read(vol, file, B, B) == bytes(B)
    assert file.map.blocks == 7
    fileops.write(vol, NOW, file, B, b"new" * 1000)
    vol.pmem.store(at, b"dma" * 1000)
    assert fileops.read(vol, file, B, 3000) == b"new" * 1000
    assert vol.pmem.load(at, 3000) == b"dma" * 1000
    assert vol.busy == 1


@pytest.mark.parametrize("keep_size", [0, fileops.FALLOC_KEEP_SIZE])
def test_zero_range_over_a_pin(vol: Volume, file: Inode, keep_size: int) -> None:
    """S22: pinned blocks stay and are zeroed, idle ones become unwritten; the size follows the mode."""
    one = pin(vol, file, 2, 2)
    fileops.fallocate(vol, NOW, file, fileops.FALLOC_ZERO_RANGE | keep_size, B, 9 * B)
    assert held(one) == [file.block(2), file.block(3)]
    assert all(vol.pmem.load(b * B, B) == bytes(B) for b in held(one))
    assert [(logical, n, bool(u)) for logical, _, n, u in file.map] == [(0, 1, False), (1, 1, True), (2, 2, False),
                                                                        (4, 6, True)]  # fmt: skip
    assert file.size == (8 if keep_size else 10) * B
    assert fileops.read(vol, file, 0, 10 * B) == (b"A" * B).ljust(file.size, b"\0")
    assert vol.busy == 0


def test_unlink_with_an_open_holder(vol: Volume, file: Inode) -> None:
    """S28, S29: pinned blocks of an unlinked file count as busy, and are freed once, after close and unpin."""
    one = pin(vol, file, 0, 3, owner=1)
    file.opens += 1  # another descriptor, whose holder is owner 2
    two = pin(vol, file, 2, 3, owner=2)
    free = vol.free
    namespace.unlink(vol, NOW, vol.root, b"f")
    fileops.reap(vol, NOW, file)
    assert (vol.busy, vol.free) == (5, free)
    assert fileops.read(vol, file, 0, 1) == b"A"
    vol.check()
    holding.release_owner(vol, 1)
    file.opens -= 1
    fileops.reap(vol, NOW, file)
    assert (vol.busy, vol.free) == (3, free)
    holding.release_owner(vol, 2)
    file.opens -= 1
    fileops.reap(vol, NOW, file)
    drain(vol)
    assert (vol.busy, vol.free, file.dead) == (0, free + 8, True)
    assert (one.blocks, two.blocks) == (3, 3)


def test_a_pin_without_a_descriptor_keeps_blocks_at_the_end_of_an_inode(vol: Volume, file: Inode) -> None:
    """S30, S31: rename over the file, after which a hard link still has it; busy when the last name goes."""
    one = pin(vol, file, 0, 2)
    file.opens = 0
    namespace.link(vol, NOW, file, vol.root, b"other")
    source = namespace.create(vol, NOW, vol.root, b"new", 0o644, Caller(0, 0))
    fileops.write(vol, NOW, source, 0, b"n" * B)
    namespace.rename(vol, NOW, vol.root, b"new", vol.root, b"f")
    assert vol.busy == 0
    namespace.unlink(vol, NOW, vol.root, b"other")
    fileops.reap(vol, NOW, file)
    vol.check()
    assert (vol.busy, vol.pinned) == (2, 2)
    assert [vol.pmem.load(b * B, 1) for b in held(one)] == [b"A", b"B"]
    unpin(vol, one)
    drain(vol)
    assert vol.busy == 0


def test_eight_hundred_alternate_busy_blocks(vol: Volume) -> None:
    """S49, smaller: every second block of a file pinned, then the file goes; what is left is still allocated."""
    inode = namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))
    fileops.write(vol, NOW, inode, 0, b"x" * 800 * B)
    inode.opens = 1
    for block in range(0, 800, 2):
        pin(vol, inode, block, 1)
    fileops.truncate(vol, NOW, inode, 0)
    assert (vol.busy, len(vol.busy_runs())) == (400, 400)
    fileops.write(vol, NOW, inode, 0, b"y" * (vol.alloc.available * B))
    vol.check()
    assert vol.alloc.available == 0
    holding.release_owner(vol, 1)
    drain(vol)
    assert vol.alloc.available == 400 - len(inode.map.leaf_blocks())  # which came out of the reserve


# -- the table --


def test_check_sees_a_count_that_is_wrong(vol: Volume, file: Inode) -> None:
    one = pin(vol, file, 0, 2)
    vol.pins.counts.drop([(held(one)[1], 1)])
    with pytest.raises(ValueError, match="count is 0"):
        vol.pins.check()
    vol.pins.counts.add([(held(one)[1], 1), (vol.blocks - 1, 1)])
    with pytest.raises(ValueError, match="3 blocks are counted as pinned, 2 are"):
        vol.pins.check()
    vol.pins.counts.drop([(vol.blocks - 1, 1)])
    vol.pins.check()


def test_a_block_that_is_lost_is_seen(vol: Volume, file: Inode) -> None:
    """Used blocks are counted, not what the others leave: so the sum says whether all are still there."""
    pin(vol, file, 0, 4)
    fileops.truncate(vol, NOW, file, 2 * B)
    assert vol.free + vol.used + vol.busy == vol.blocks
    vol.check()
    lost = vol.alloc.take(1)
    assert vol.free + vol.used + vol.busy == vol.blocks - 1
    vol.alloc.give(lost)
    vol.check()


def test_leases_are_told_whatever_the_policy(vol: Volume, file: Inode) -> None:
    """A lease beside a pin: broken with the layout, told when the change begins to wait, left alone when it fails."""
    for policy, error, left, told in (
        ("busy", None, 0, 1), ("wait", LayoutBusy, 1, 1), ("fail", TextBusy, 1, 0), ("lease", LayoutBusy, 1, 2),
        ("revoke", None, 0, 2),
    ):  # fmt: skip
        vol.settings.policy = policy
        fileops.write(vol, NOW, file, 0, bytes(B))
        holding.take_lease(vol, file, 0, 0, 1)
        one = pin(vol, file, 0, 1)
        if error is None:
            fileops.truncate(vol, NOW, file, 0)
        else:
            with pytest.raises(error):
                fileops.truncate(vol, NOW, file, 0)
        events = []
        while found := vol.events.pop(1):
            events.append(found[0].type)
        assert (policy, len(vol.leases), len(events)) == (policy, left, told)
        unpin(vol, one)
        vol.leases.release(1)
        drain(vol)
