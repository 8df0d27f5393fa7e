"""The allocator: runs near the goal, a reserve for metadata, and nothing taken when there is too little."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core.alloc import Allocator
from daxfs.errors import NoSpace

START, END = 20, 1044


@pytest.fixture
def alloc() -> Allocator:
    allocator = Allocator(START, END)
    allocator.free.add(START, END - START)
    return allocator


def test_the_reserve_is_for_metadata(alloc: Allocator) -> None:
    assert alloc.reserve == 16
    assert alloc.available == END - START - 16
    alloc.take(alloc.available)
    assert alloc.available == 0
    with pytest.raises(NoSpace, match="no space left"):
        alloc.take(1)
    for _ in range(16):
        alloc.take(1, meta=True)
    with pytest.raises(NoSpace, match="not even for metadata"):
        alloc.take(1, meta=True)
    with pytest.raises(NoSpace):
        alloc.take_chunk(1)
    assert alloc.free.blocks == 0


@pytest.mark.parametrize(("blocks", "reserve"), [(10, 2), (256, 8), (1024, 16), (1 << 14, 256), (1 << 30, 256)])
def test_how_large_the_reserve_is(blocks: int, reserve: int) -> None:
    assert Allocator(0, blocks).reserve == reserve


def test_a_refused_call_takes_nothing(alloc: Allocator) -> None:
    before = alloc.free.runs()
    with pytest.raises(NoSpace):
        alloc.take(alloc.available + 1)
    assert alloc.free.runs() == before


def test_goal(alloc: Allocator) -> None:
    assert alloc.take(4, 500) == [(500, 4)]
    assert alloc.take(4, 504) == [(504, 4)]
    assert alloc.take(600, 900) == [(900, 144), (START, 456)], "as much as is free at the goal"


def test_without_a_goal_files_follow_each_other(alloc: Allocator) -> None:
    assert [alloc.take(3)[0][0] for _ in range(3)] == [START, START + 3, START + 6]


def test_the_shortest_run_that_is_long_enough(alloc: Allocator) -> None:
    alloc.take(END - START, meta=True)
    alloc.give([(30, 2), (40, 5), (50, 20), (80, 5)])
    assert [alloc.take(n, meta=True) for n in (4, 5, 2)] == [[(40, 4)], [(80, 5)], [(30, 2)]]
    assert alloc.take(2, 50, meta=True) == [(50, 2)], "the goal comes first"
    assert alloc.take(1, meta=True) == [(44, 1)]


def test_in_few_pieces_if_it_must_be(alloc: Allocator) -> None:
    alloc.take(END - START, meta=True)
    alloc.give([(30, 2), (40, 3), (50, 20)])
    assert alloc.take(24, 31, meta=True) == [(31, 1), (50, 20), (40, 3)]
    alloc.give([(40, 3)])
    with pytest.raises(NoSpace, match="scattered"):
        Allocator.take_chunk(small(alloc), 4)


def test_the_lowest_blocks(alloc: Allocator) -> None:
    alloc.take(END - START, meta=True)
    alloc.give([(30, 2), (40, 3), (50, 20)])
    with pytest.raises(NoSpace):
        alloc.take_lowest(20)
    assert alloc.take_lowest(7, meta=True) == [(30, 2), (40, 3), (50, 2)]
    assert alloc.take_lowest(1) == [(52, 1)]
    alloc.check(END)


def small(alloc: Allocator) -> Allocator:
    alloc.reserve = 0
    return alloc


def test_a_chunk_is_one_run_or_nothing(alloc: Allocator) -> None:
    small(alloc).take(END - START)
    alloc.give([(30, 3), (40, 3), (50, 4)])
    before = alloc.free.runs()
    with pytest.raises(NoSpace, match="no 5 blocks in a row"):
        alloc.take_chunk(5)
    assert alloc.free.runs() == before
    assert alloc.take_chunk(4) == 50


def test_check_sees_what_lies_outside(alloc: Allocator) -> None:
    alloc.check(END)
    with pytest.raises(ValueError, match="outside the data region"):
        alloc.check(END - 1)
    alloc.free.add(3, 1)
    with pytest.raises(ValueError, match="outside the data region"):
        alloc.check(END)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, END), st.booleans()), max_size=60))
def test_what_is_taken_is_nobody_elses(steps: list[tuple[bool, int, int, bool]]) -> None:
    alloc = Allocator(START, 300)
    alloc.free.add(START, 300 - START)
    held: list[list[tuple[int, int]]] = []
    owned: set[int] = set()
    for give, count, goal, meta in steps:
        if give and held:
            runs = held.pop(goal % len(held))
            alloc.give(runs)
            owned -= {b for start, n in runs for b in range(start, start + n)}
            continue
        left = alloc.free.blocks if meta else alloc.available
        try:
            runs = alloc.take(count, goal, meta=meta)
        except NoSpace:
            assert count > left
            continue
        assert count <= left
        taken = [b for start, n in runs for b in range(start, start + n)]
        assert len(taken) == count
        assert owned.isdisjoint(taken)
        owned.update(taken)
        held.append(runs)
        alloc.check(300)
        assert alloc.free.blocks == 300 - START - len(owned)


# -- windows of files that grow --


def test_files_that_grow_side_by_side_stay_in_one_piece_each(alloc: Allocator) -> None:
    ends = {1: 0, 2: 0, 3: 0}
    for _ in range(8):
        for owner in ends:
            ((start, count),) = alloc.take(2, ends[owner], owner=owner)
            assert ends[owner] in (0, start)
            ends[owner] = start + count
            alloc.check(END)
    assert alloc.blocks == END - START - 48, "what is kept for a file is free"
    assert alloc.runs() != alloc.free.runs(), "until somebody looks at all of it"
    alloc.check(END)


def test_a_window_ends_with_its_file(alloc: Allocator) -> None:
    alloc.take(4, owner=7)
    assert alloc.take(4, owner=8) != [(START + 4, 4)]
    alloc.let_go(7)
    alloc.let_go(7)
    alloc.let_go(99)
    assert alloc.take(4) == [(START + 4, 4)]
    alloc.check(END)


def test_windows_give_way_when_space_is_low(alloc: Allocator) -> None:
    for owner in range(1, 9):
        alloc.take(4, owner=owner)
        alloc.check(END)
    left = alloc.available
    assert sum(count for _, count in alloc.take(left)) == left
    alloc.check(END)
    with pytest.raises(NoSpace):
        alloc.take(1, owner=1)


def test_a_chunk_may_lie_in_a_window(alloc: Allocator) -> None:
    alloc.take(END - START - 100)
    alloc.take(4, owner=1)
    alloc.give([(500, 2)])
    assert alloc.take_chunk(78)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30), st.booleans()), max_size=80), st.randoms())
def test_growing_files_among_others(steps: list[tuple[int, int, bool]], dice: random.Random) -> None:
    """Files grow, are closed, are deleted; every block has one owner and nothing is lost."""
    alloc = Allocator(START, 700)
    alloc.free.add(START, 700 - START)
    held: dict[int, list[tuple[int, int]]] = {}
    for owner, count, ends in steps:
        if ends:
            alloc.let_go(owner)
            if dice.random() < 0.5:
                alloc.give(held.pop(owner, []))
        else:
            goal = sum(held[owner][-1]) if owner in held else 0
            try:
                runs = alloc.take(count, goal, owner=owner)
            except NoSpace:
                assert count > alloc.available
                continue
            assert sum(n for _, n in runs) == count
            held.setdefault(owner, []).extend(runs)
        alloc.check(700)
        owned = [b for runs in held.values() for start, n in runs for b in range(start, start + n)]
        free = [b for start, n in alloc.runs() for b in range(start, start + n)]
        assert sorted(owned + free) == list(range(START, 700))
        assert len(free) == alloc.blocks
