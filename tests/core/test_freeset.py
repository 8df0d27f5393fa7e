"""Free space by place and by length, beside a naive model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core.freeset import FreeSet

SPAN = 120
places, lengths = st.integers(0, SPAN), st.integers(1, 30)


def runs_of(held: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for b in sorted(held):
        if runs and sum(runs[-1]) == b:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((b, 1))
    return runs


def compare(free: FreeSet, held: set[int]) -> None:
    free.check()
    runs = runs_of(held)
    assert free.runs() == runs
    for want in (1, 2, 3, 5, 8, 13, 200):
        fitting = [(count, start) for start, count in runs if count >= want]
        assert free.best(want) == (min(fitting)[1] if fitting else None)
    if runs:
        assert free.longest() == max(runs, key=lambda run: (run[1], run[0]))
    for block in range(0, SPAN, 7):
        assert free.at(block) == next((start + n - block for start, n in runs if start <= block < start + n), 0)


@given(st.sampled_from((4, 5, 168)), st.lists(st.tuples(st.booleans(), places, lengths), max_size=60), st.integers(0, 60))
def test_beside_a_model(capacity: int, steps: list[tuple[bool, int, int]], asked: int) -> None:
    """`asked`: when the lengths are asked for the first time."""
    free, held = FreeSet(capacity), set[int]()
    for at, (give, start, count) in enumerate(steps):
        blocks = set(range(start, start + count))
        if not give:
            assert free.remove(start, count) == runs_of(held & blocks)
            held -= blocks
        elif held & blocks:
            with pytest.raises(ValueError, match="in the set already"):
                free.add(start, count)
        else:
            free.add(start, count)
            held |= blocks
        if at >= asked:
            compare(free, held)
    compare(free, held)


@given(st.sets(places), st.sets(places))
def test_loaded_from_arrays(held: set[int], others: set[int]) -> None:
    free = FreeSet(4)
    for b in (held, others):
        runs = np.array(runs_of(b), dtype=np.uint64).reshape(-1, 2)
        free.load(np.ascontiguousarray(runs[:, 0]), np.ascontiguousarray(runs[:, 1]))
        compare(free, b)
        free.clear()
        compare(free, set())


def test_an_empty_set() -> None:
    assert FreeSet().best(1) is None
    with pytest.raises(ValueError, match="empty"):
        FreeSet().longest()


def test_very_long_runs() -> None:
    """Beyond 2**24 blocks the keys do not tell lengths apart."""
    free = FreeSet()
    free.add(1, 1 << 24)
    free.add(1 << 25, (1 << 25) + 5)
    free.add(1 << 27, 1 << 33)
    assert free.best(1 << 24) == 1
    assert free.best((1 << 24) + 1) == 1 << 25
    assert free.best((1 << 25) + 6) == 1 << 27
    assert free.best(1 << 40) is None
    assert free.longest()[1] > 1 << 24
    free.check()
    assert free.remove(0, 1 << 40)
    free.check()
    assert free.best(1) is None


@pytest.mark.parametrize("run", [(1 << 40, 1), (5, 1 << 40), ((1 << 64) - 1, 1), (1, (1 << 64) - 1)])
def test_no_image_is_as_large(run: tuple[int, int]) -> None:
    """A key has no room for such places: a search would never end."""
    free = FreeSet()
    with pytest.raises(ValueError, match="behind the largest image"):
        free.add(*run)
    with pytest.raises(ValueError, match="behind the largest image"):
        free.load(np.array(run[:1], np.uint64), np.array(run[1:], np.uint64))
    assert free.best(1) is None
