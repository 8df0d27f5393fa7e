"""The busy-extent list: insert, unpin, clear; never two entries for a block, never a block back before its last pin went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core.busy import BusyList
from daxfs.core.waiting import DUE


def test_the_life_of_a_busy_run() -> None:
    moves: list[int] = []
    busy = BusyList(moves.append)
    busy.insert([(10, 6)])
    assert (busy.blocks, busy.clear(10), moves) == (6, [], [])
    busy.unpinned([(8, 4)])  # of which only the last two were busy
    assert moves == [DUE]
    busy.check()
    assert busy.search(0, 100) == [(10, 6)]
    assert busy.clear(10) == [(10, 2)]
    assert busy.blocks == 4
    busy.unpinned([(12, 4)])
    assert busy.clear(10) == [(12, 4)]
    assert (busy.blocks, moves) == (0, [DUE, DUE])


def test_there_is_work_only_when_runs_become_due() -> None:
    moves: list[int] = []
    busy = BusyList(moves.append)
    busy.insert([(1, 1), (3, 1), (5, 1)])
    assert busy.clear(5) == []
    busy.unpinned([(2, 1)])
    assert moves == []
    busy.unpinned([(1, 5)])
    assert busy.clear(2) == [(1, 1), (3, 1)]
    assert busy.clear(2) == [(5, 1)]
    assert moves == [DUE]


def test_a_block_is_busy_once() -> None:
    busy = BusyList()
    busy.insert([(10, 5)])
    with pytest.raises(ValueError, match="in the set already"):
        busy.insert([(14, 3)])


def test_check_sees_due_blocks_that_are_not_busy() -> None:
    busy = BusyList()
    busy.due.add(3, 1)
    with pytest.raises(ValueError, match="due but not busy"):
        busy.check()


runs = st.tuples(st.integers(0, 60), st.integers(1, 6))


@given(st.lists(st.tuples(st.sampled_from(["insert", "unpinned", "clear", "search"]), runs), max_size=50))
def test_against_sets(steps: list[tuple[str, tuple[int, int]]]) -> None:
    busy = BusyList()
    held: set[int] = set()
    due: set[int] = set()
    for verb, (start, count) in steps:
        blocks = set(range(start, start + count))
        if verb == "insert" and not blocks & held:
            busy.insert([(start, count)])
            held |= blocks
        elif verb == "unpinned" and not blocks & due:
            busy.unpinned([(start, count)])
            due |= blocks & held
        elif verb == "clear":
            freed = {b for first, n in busy.clear(count) for b in range(first, first + n)}
            assert freed <= due
            assert bool(freed) == bool(due)
            held -= freed
            due -= freed
        found = {b for first, n in busy.search(start, count) for b in range(first, first + n)}
        assert found == blocks & held
        assert busy.blocks == len(held)
        busy.check()
