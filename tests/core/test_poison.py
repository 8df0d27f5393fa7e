"""Poison below the verbs: who may read, who may write, what becomes of freed blocks, and that (I1) holds at each step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs import abi
from daxfs.core import fileops, holding, namespace, poison
from daxfs.core.fsck import check
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.errors import BadArgument, NoSpace, Poisoned, ReadOnly
from tests.core.image import NOW, fresh_volume

BLOCK = 4096
ME = Holder(1, "me", 1)
PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE


@pytest.fixture
def vol(tmp_path: Path) -> Iterator[Volume]:
    with fresh_volume(tmp_path, 2 << 20) as volume:
        yield volume
        volume.check()


def a_file(vol: Volume, blocks: int, name: bytes = b"file") -> Inode:
    inode = namespace.create(vol, NOW, vol.root, name, 0o100644, Caller(0, 0))
    fileops.write(vol, NOW, inode, 0, b"x" * blocks * BLOCK)
    return inode


def block_of(inode: Inode, logical: int) -> int:
    return inode.block(logical)


def blocks_used(vol: Volume) -> set[int]:
    return set(range(vol.blocks)) - {start + n for start, count in vol.alloc.free.runs() for n in range(count)}


def test_reads_and_partial_writes_fail_and_a_whole_write_heals(vol: Volume) -> None:
    inode = a_file(vol, 4)
    assert poison.inject(vol, block_of(inode, 1), 1) == [inode.ino]
    vol.check()
    assert fileops.read(vol, inode, 0, BLOCK) == b"x" * BLOCK
    for offset, length in ((BLOCK, 1), (2 * BLOCK - 1, 1), (0, 4 * BLOCK)):
        with pytest.raises(Poisoned):
            fileops.read(vol, inode, offset, length)
    for offset, length in ((BLOCK + 1, BLOCK), (BLOCK, BLOCK - 1), (0, BLOCK + 1)):
        with pytest.raises(Poisoned):
            fileops.write(vol, NOW, inode, offset, b"y" * length)
    assert fileops.read(vol, inode, 0, BLOCK) == b"x" * BLOCK  # what failed has changed nothing
    assert vol.poison.holds(inode)
    fileops.write(vol, NOW, inode, BLOCK - 1, b"y" * (BLOCK + 2))
    assert fileops.read(vol, inode, 0, 3 * BLOCK) == b"x" * (BLOCK - 1) + b"y" * (BLOCK + 2) + b"x" * (BLOCK - 1)
    assert not vol.poison
    assert not vol.poison.holds(inode)


def test_a_poisoned_file_is_not_hot(vol: Volume) -> None:
    inode = a_file(vol, 2)
    inode.opens = 1
    inode.set_hot()
    hot = inode.map.hot
    assert hot
    poison.inject(vol, block_of(inode, 0), 1)
    assert inode.map.hot == 0
    fileops.write(vol, NOW, inode, 0, b"y" * BLOCK)
    assert inode.map.hot == hot
    poison.inject(vol, block_of(inode, 1), 1)
    poison.clear(vol, block_of(inode, 1), 1)
    assert inode.map.hot == hot
    inode.opens = 0


@pytest.mark.parametrize("how", ["punch", "truncate", "unlink"])
def test_freed_poison_is_retired_until_it_is_cleared(vol: Volume, how: str) -> None:
    inode = a_file(vol, 4)
    bad = block_of(inode, 2)
    poison.inject(vol, bad, 1)
    free = vol.free
    if how == "punch":
        fileops.fallocate(vol, NOW, inode, PUNCH, 2 * BLOCK, BLOCK)
        assert fileops.read(vol, inode, 2 * BLOCK, BLOCK) == bytes(BLOCK)
    elif how == "truncate":
        fileops.truncate(vol, NOW, inode, 2 * BLOCK)
    else:
        namespace.unlink(vol, NOW, vol.root, b"file")
        fileops.reap(vol, NOW, inode)
    vol.check()
    assert vol.poison.retired.runs() == [(bad, 1)]
    assert vol.free == free + {"punch": 0, "truncate": 1, "unlink": 3}[how]
    with pytest.raises(NoSpace):  # nobody gets it, however full the volume is
        for n in range(1000):
            a_file(vol, 8, b"filler %d" % n)
    vol.check()
    before = vol.free
    assert poison.clear(vol, bad, 1) == []
    assert vol.free == before + 1
    assert not vol.poison.retired.blocks


def test_free_poison_is_retired_at_once(vol: Volume) -> None:
    free, end = vol.free, vol.blocks
    assert poison.inject(vol, end - 8, 8) == []
    assert vol.free == free - 8
    vol.check()
    assert vol.free + vol.used + vol.busy == vol.blocks
    poison.clear(vol, end - 8, 4)
    assert vol.poison.retired.runs() == [(end - 4, 4)]


def test_a_pinned_poisoned_block_is_busy_then_retired(vol: Volume) -> None:
    """S66."""
    inode = a_file(vol, 4)
    pin = holding.pin(vol, NOW, inode, 0, 4 * BLOCK, abi.FOLL_PIN, 7, ME, writable=False)
    bad = block_of(inode, 1)
    poison.inject(vol, bad, 2)
    event, _ = vol.events.pop(7) or (None, 0)
    assert event == (abi.EVENT_POISON, pin.id, BLOCK, 2 * BLOCK)
    fileops.truncate(vol, NOW, inode, 0)
    vol.check()
    assert vol.busy == 4
    holding.unpin(vol, NOW, 7, pin.id)
    while vol.free_unpinned(NOW, 1):
        vol.check()
    assert vol.busy == 0
    assert vol.poison.retired.runs() == [(bad, 2)]


def test_a_poisoned_range_is_not_pinned(vol: Volume) -> None:
    inode = a_file(vol, 4)
    poison.inject(vol, block_of(inode, 3), 1)
    holding.pin(vol, NOW, inode, 0, 3 * BLOCK, abi.FOLL_PIN, 7, ME, writable=False)
    with pytest.raises(Poisoned):
        holding.pin(vol, NOW, inode, 0, 4 * BLOCK, abi.FOLL_PIN, 7, ME, writable=False)
    assert len(vol.pins) == 1


def test_zeroing_heals_whole_blocks_and_refuses_parts(vol: Volume) -> None:
    inode = a_file(vol, 4)
    poison.inject(vol, block_of(inode, 1), 2)
    with pytest.raises(Poisoned):
        fileops.fallocate(vol, NOW, inode, fileops.FALLOC_ZERO_RANGE, BLOCK + 1, 10)
    with pytest.raises(Poisoned):
        fileops.truncate(vol, NOW, inode, BLOCK + 1)
    assert inode.size == 4 * BLOCK
    vol.check()
    fileops.fallocate(vol, NOW, inode, fileops.FALLOC_ZERO_RANGE, BLOCK, 2 * BLOCK)
    assert not vol.poison
    assert fileops.read(vol, inode, BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)


def test_unwritten_poison_reads_zero_and_heals_with_the_first_write(vol: Volume) -> None:
    inode = a_file(vol, 1)
    fileops.fallocate(vol, NOW, inode, 0, BLOCK, BLOCK)
    poison.inject(vol, block_of(inode, 1), 1)
    assert fileops.read(vol, inode, BLOCK, BLOCK) == bytes(BLOCK)
    fileops.write(vol, NOW, inode, BLOCK + 5, b"five")
    assert fileops.read(vol, inode, BLOCK, BLOCK) == bytes(5) + b"five" + bytes(BLOCK - 9)
    assert not vol.poison


@pytest.mark.parametrize("what", ["superblock", "journal", "table", "directory", "leaf", "ledger"])
def test_poisoned_metadata_makes_the_volume_read_only(tmp_path: Path, what: str) -> None:
    with fresh_volume(tmp_path, 2 << 20) as vol:
        inode = a_file(vol, 1)
        for n in range(1, 40, 2):
            fileops.write(vol, NOW, inode, n * 2 * BLOCK, b"y")
        assert inode.map.leaf_blocks()
        block = {
            "superblock": 0,
            "journal": vol.sb["journal_start"],
            "table": vol.chunks[0],
            "directory": vol.root.block(0),
            "leaf": inode.map.leaf_blocks()[0],
            "ledger": vol.ledger.blocks[0],
        }[what]
        assert poison.inject(vol, block, 1) == []
        assert vol.poison.metadata.runs() == [(block, 1)]
        assert "poisoned" in vol.failed
        with pytest.raises(ReadOnly):
            fileops.write(vol, NOW, inode, 0, b"y")
        assert fileops.read(vol, inode, 0, 1) == b"x"
        vol.check()


@pytest.mark.parametrize(("first", "count"), [(0, 0), (512, 1), (511, 2), (1 << 63, 1 << 63), (-1, 1)])
def test_ranges_outside_the_image(vol: Volume, first: int, count: int) -> None:
    assert vol.blocks == 512
    for verb in (poison.inject, poison.clear):
        with pytest.raises(BadArgument):
            verb(vol, first, count)


def test_poison_ends_with_the_mount(tmp_path: Path) -> None:
    with fresh_volume(tmp_path, 2 << 20) as vol:
        inode = a_file(vol, 4)
        poison.inject(vol, block_of(inode, 0), 2)
        fileops.fallocate(vol, NOW, inode, PUNCH, 0, BLOCK)
        used = vol.used
        poison.inject(vol, vol.blocks - 3, 3)
        path = vol.pmem.path
    assert not check(path).errors
    again = Volume.open(path, now=NOW)
    try:
        again.check()
        assert again.used == used - 1
        assert fileops.read(again, again.inode(inode.ino), BLOCK, BLOCK) == b"x" * BLOCK
    finally:
        again.close(NOW)


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "punch", "truncate", "inject", "clear", "pin", "unpin", "free"]),
        st.integers(0, 15),
        st.integers(1, 6),
    ),
    max_size=25,
)


@given(_STEPS)
def test_a_poisoned_block_is_never_handed_out(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """At random: no extent that appears in a file was poisoned before, and the volume is sound after each step."""
    with fresh_volume(tmp_path_factory.mktemp("poison"), 1 << 20) as vol:
        inode = a_file(vol, 8)
        for what, at, count in steps:
            bad = {start + n for start, length in vol.poison.blocks.runs() for n in range(length)}
            had = {physical + n for _, physical, length, _ in inode.map for n in range(length)}
            with contextlib.suppress(Poisoned, NoSpace):
                _step(vol, inode, what, at, count)
            has = {physical + n for _, physical, length, _ in inode.map for n in range(length)}
            assert not (has - had) & bad
            assert vol.free + vol.used + vol.busy == vol.blocks
            vol.check()


def _step(vol: Volume, inode: Inode, what: str, at: int, count: int) -> None:
    if what == "write":
        fileops.write(vol, NOW, inode, at * BLOCK, b"w" * count * BLOCK)
    elif what == "punch":
        fileops.fallocate(vol, NOW, inode, PUNCH, at * BLOCK, count * BLOCK)
    elif what == "truncate":
        fileops.truncate(vol, NOW, inode, at * BLOCK)
    elif what == "inject":
        metadata = {*vol.ledger.blocks, vol.root.block(0), *inode.map.leaf_blocks()}
        first = vol.ledger.blocks[0] + at
        for block in set(range(first, first + count)) - metadata:
            poison.inject(vol, block, 1)
    elif what == "clear":
        poison.clear(vol, vol.data_blocks.start, vol.blocks - vol.data_blocks.start)
    elif what == "pin" and inode.map.written(at, 1) and at * BLOCK < inode.size:
        holding.pin(vol, NOW, inode, at * BLOCK, BLOCK, abi.FOLL_PIN, 7, ME, writable=False)
    elif what == "unpin":
        holding.release_owner(vol, 7)
    elif what == "free":
        vol.free_unpinned(NOW, count)
