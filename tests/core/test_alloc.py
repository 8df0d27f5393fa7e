"""The allocator: runs near the goal, a reserve for metadata, and nothing taken when there is too little."""

from __future__ import annotations

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
    assert alloc.take(4, 502) == [(508, 4)]


def test_without_a_goal_files_follow_each_other(alloc: Allocator) -> None:
    assert [alloc.take(3)[0][0] for _ in range(3)] == [START, START + 3, START + 6]
    alloc.take(5, 900)
    assert alloc.take(1) == [(START + 9, 1)]


def test_in_pieces_if_it_must_be(alloc: Allocator) -> None:
    alloc.take(END - START, meta=True)
    alloc.give([(30, 2), (40, 3), (50, 20)])
    assert alloc.take(22, 31, meta=True) == [(31, 1), (40, 3), (50, 18)]
    alloc.give([(40, 3)])
    with pytest.raises(NoSpace, match="scattered"):
        Allocator.take_chunk(small(alloc), 4)


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
