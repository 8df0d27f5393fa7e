"""A released pin of many runs leaves bit by bit: its blocks are nobody's till the delayed free has come to them."""

from __future__ import annotations

import pytest

from daxfs import abi
from daxfs.core import fileops, holding, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import PIECES_PER_PIN, RUNS_AT_ONCE, Holder
from daxfs.core.volume import Volume
from daxfs.errors import NoMemory

from .image import NOW

B = 4096
RUNS = 3 * RUNS_AT_ONCE
ME = Holder(100, "test", 5)
WRITE = abi.FOLL_PIN | abi.FOLL_WRITE


@pytest.fixture
def file(vol: Volume) -> Inode:
    """As many runs as blocks: written from its end to its start."""
    inode = namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))
    for block in reversed(range(RUNS)):
        fileops.write(vol, NOW, inode, block * B, bytes([block % 251 + 1]) * B)
    inode.opens += 1
    assert len(inode.map.runs(0, RUNS)) == RUNS
    return inode


def pin(vol: Volume, inode: Inode, flags: int = WRITE, owner: int = 1) -> int:
    return holding.pin(vol, NOW, inode, 0, RUNS * B, flags, owner, ME, writable=True).id


def test_busy_blocks_come_back_a_step_at_a_time(vol: Volume, file: Inode) -> None:
    one = pin(vol, file)
    fileops.truncate(vol, NOW, file, 0)
    free = vol.free
    assert (vol.busy, vol.pins.charged(ME)) == (RUNS, (RUNS, PIECES_PER_PIN + RUNS))
    holding.unpin(vol, NOW, 1, one)
    vol.check()
    assert vol.pins.owned(1) == 0
    assert (vol.busy, vol.pinned) == (RUNS, RUNS)
    assert vol.pins.charged(ME) == (0, RUNS), "what it costs the daemon is charged till it is gone"
    left = RUNS
    while vol.free_unpinned(NOW, 7):
        left -= 7
        vol.check()
        assert (vol.busy, vol.pinned, vol.pins.charged(ME)) == (left, left, (0, left))
    vol.check()
    assert (vol.busy, vol.pinned, len(vol.pins), vol.pins.charged(ME)) == (0, 0, 0, (0, 0))
    assert vol.free == free + RUNS


def test_blocks_that_another_pin_has_stay(vol: Volume, file: Inode) -> None:
    one, _ = pin(vol, file), pin(vol, file, owner=2)
    fileops.truncate(vol, NOW, file, 0)
    holding.unpin(vol, NOW, 1, one)
    while vol.free_unpinned(NOW, 5):
        vol.check()
    assert (vol.busy, vol.pinned) == (RUNS, RUNS)
    holding.release_owner(vol, 2)
    while vol.free_unpinned(NOW, 5):
        vol.check()
    assert vol.busy == 0


def test_nobody_waits_for_a_pin_that_leaves(vol: Volume, file: Inode) -> None:
    vol.settings.policy = "wait"
    holding.unpin(vol, NOW, 1, pin(vol, file))
    assert vol.pins.leaving
    fileops.truncate(vol, NOW, file, 0)  # else LayoutBusy
    vol.check()
    while vol.free_unpinned(NOW, 5):
        vol.check()


def test_what_leaves_does_not_count_against_a_new_pin(vol: Volume, file: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "PIECES_PER_PROCESS_MAX", PIECES_PER_PIN + RUNS)
    holding.unpin(vol, NOW, 1, pin(vol, file))
    assert vol.pins.leaving
    pin(vol, file)
    assert not vol.pins.leaving
    vol.check()
    with pytest.raises(NoMemory):
        pin(vol, file, owner=2)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_ledger_has_what_has_not_left(vol: Volume, file: Inode, steps: int) -> None:
    holding.unpin(vol, NOW, 1, pin(vol, file))
    for _ in range(steps):
        assert vol.free_unpinned(NOW, 10)
    entries = [entry for block in vol.ledger.blocks for entry in vol.ledger._entries(block)]
    assert sum(entry.count for entry in entries) == RUNS - 10 * steps
