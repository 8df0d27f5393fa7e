"""Extent maps, run sets and pin counts against naive models that keep one entry per block.

Leaves hold few extents here, so that they split, fold and go all the time. `check()` runs after every step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daxfs.core.extents import ExtentMap
from daxfs.core.layout import EXTENT, EXTENT_COUNT_MAX
from daxfs.core.pincounts import PinCounts
from daxfs.core.runs import RunSet

SPAN = 96  # blocks that the models range over
LIMIT = 1 << 20  # blocks of the image that leaves are checked against

Mapped = dict[int, tuple[int, bool]]  # logical -> physical, unwritten
Media = dict[int, tuple[int, int, bytes]]  # block -> next, count, extents

blocks = st.integers(0, SPAN - 1)
lengths = st.one_of(st.integers(1, 3), st.integers(1, 20))
capacities = st.integers(4, 6)


def runs_of(held: Iterable[int]) -> list[tuple[int, int]]:
    """Blocks as runs."""
    runs: list[tuple[int, int]] = []
    for block in sorted(held):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def extents_of(model: Mapped) -> list[tuple[int, int, int, bool]]:
    """The only way to write the model as extents when neighbours are joined."""
    out: list[tuple[int, int, int, bool]] = []
    for logical in sorted(model):
        physical, unwritten = model[logical]
        if out:
            first, start, count, flag = out[-1]
            if first + count == logical and start + count == physical and flag == unwritten:
                out[-1] = (first, start, count + 1, flag)
                continue
        out.append((logical, physical, 1, unwritten))
    return out


# -- the extent map --


class MapAndModel:
    """An extent map, what it should hold, and media that get only the leaves it calls stale."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.map = ExtentMap(capacity)
        self.model: Mapped = {}
        self.media: Media = {}
        self.next_block = 5000

    def insert(self, logical: int, count: int, shift: int, unwritten: bool) -> None:
        wanted = range(logical, logical + count)
        if any(b in self.model for b in wanted):
            with pytest.raises(ValueError, match="mapped already"):
                self.map.insert(logical, logical + shift, count, unwritten)
            return
        self.map.insert(logical, logical + shift, count, unwritten)
        self.model.update((b, (b + shift, unwritten)) for b in wanted)

    def carve(self, logical: int, count: int) -> None:
        held = [self.model.pop(b)[0] for b in range(logical, logical + count) if b in self.model]
        runs: list[tuple[int, int]] = []
        for physical in held:  # in the order of the file, adjacent ones joined
            if runs and sum(runs[-1]) == physical:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((physical, 1))
        assert self.map.carve(logical, count) == runs

    def convert(self, logical: int, count: int, unwritten: bool) -> None:
        self.map.convert(logical, count, unwritten)
        for b in range(logical, logical + count):
            if b in self.model:
                self.model[b] = (self.model[b][0], unwritten)

    def store(self) -> None:
        """What inode.py does at a commit."""
        for block in self.map.dropped():
            del self.media[block]
        for i in self.map.unplaced():
            self.map.place_leaf(i, self.next_block)
            self.next_block += 1
        for i, following in self.map.stale():
            block, count, data = self.map.leaf(i)
            self.media[block] = (following, count, bytes(data))
            self.map.stored(i, following)
        assert self.map.stale() == []
        assert sorted(self.media) == sorted(self.map.leaf_blocks())

    def loaded(self) -> ExtentMap:
        """The map that media say."""
        again = ExtentMap(self.capacity)
        block = self.map.leaf(0)[0] if self.map.leaves else 0
        while block:
            following, count, data = self.media[block]
            again.append_leaf(data, count, block, following, 2, LIMIT)
            block = following
        return again

    def check(self) -> None:
        self.map.check()
        assert [(*e[:3], bool(e[3])) for e in self.map] == extents_of(self.model)
        assert self.map.blocks == len(self.model)
        assert self.map.leaves <= len(self.map)

    def ask(self, logical: int, count: int) -> None:
        """Every question about a range."""
        m, model = self.map, self.model
        inside = [b for b in range(logical, logical + count) if b in model]
        found = m.find(logical)
        assert (found is not None) == (logical in model)
        if found:
            assert found in extents_of(model)
            assert found[0] <= logical < found[0] + found[2]
        answer = m.overlaps(logical, count)
        expanded = [(lo + i, p + i, u) for lo, p, n, u in answer for i in range(n)]
        assert expanded == [(b, *model[b]) for b in inside]
        assert m.gaps(logical, count) == runs_of(set(range(logical, logical + count)) - set(inside))
        assert m.written(logical, count) == (len(inside) == count and not any(model[b][1] for b in inside))
        assert m.blocks_from(logical) == any(b >= logical for b in model)
        assert m.next_data(logical) == min((b for b in model if b >= logical and not model[b][1]), default=None)
        hole = logical
        while hole in model and not model[hole][1]:
            hole += 1
        assert m.next_hole(logical) == hole
        behind = [e for e in extents_of(model) if e[0] + e[2] > logical]
        assert m.extents_from(logical, count) == behind[:count]


map_steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), blocks, lengths, st.sampled_from((1000, 3000)), st.booleans()),
        st.tuples(st.just("carve"), blocks, lengths),
        st.tuples(st.just("convert"), blocks, lengths, st.booleans()),
        st.tuples(st.just("store")),
    ),
    max_size=60,
)
# Every second block mapped: as many extents as there can be, before the random steps tear at them.
combs = st.sampled_from([(), range(0, SPAN, 2), range(SPAN - 2, -1, -2), range(1, 60, 3)])


@given(capacities, combs, map_steps, blocks, lengths)
def test_extent_map(capacity: int, comb: range, steps: list[tuple[object, ...]], logical: int, count: int) -> None:
    world = MapAndModel(capacity)
    for b in comb:
        world.insert(b, 1, 1000, False)
    world.store()
    for verb, *arguments in steps:
        getattr(world, verb)(*arguments)  # type: ignore[call-overload]
        world.check()
    world.ask(logical, count)
    world.store()
    assert list(world.loaded()) == list(world.map)
    world.loaded().check()


def test_a_map_is_carved_down_to_nothing() -> None:
    world = MapAndModel(4)
    for b in range(0, SPAN, 2):
        world.insert(b, 1, 1000, False)
    world.store()
    assert world.map.leaves > SPAN // 2 // 4 - 1
    for b in range(0, SPAN, 6):
        world.carve(b, 3)
        world.check()
        world.store()
    world.carve(0, SPAN)
    world.check()
    world.store()
    assert (world.map.leaves, world.media) == (0, {})


def test_leaves_that_are_appended_to_stay_full() -> None:
    world = MapAndModel(6)
    for b in range(0, SPAN, 2):
        world.insert(b, 1, 1000, False)
    assert [world.map.leaf(i)[1] for i in range(world.map.leaves)] == [6] * 8


def test_only_leaves_that_changed_are_stored() -> None:
    world = MapAndModel(6)
    for b in range(0, SPAN, 2):
        world.insert(b, 1, 1000, False)
    world.store()
    world.convert(48, 1, True)
    assert len(world.map.stale()) == 1
    world.carve(0, 1)
    assert len(world.map.stale()) == 2
    world.store()
    moved = world.map.leaf(3)[0]
    world.map.place_leaf(3, 9000)  # the leaf before it has to say so
    assert [i for i, _ in world.map.stale()] == [2, 3]
    del world.media[moved]
    world.store()
    assert list(world.loaded()) == list(world.map)


def test_runs_longer_than_an_extent_can_say() -> None:
    m = ExtentMap(4)
    m.insert(0, 100, EXTENT_COUNT_MAX + 10)
    m.check()
    assert list(m) == [(0, 100, EXTENT_COUNT_MAX, 0), (EXTENT_COUNT_MAX, 100 + EXTENT_COUNT_MAX, 10, 0)]
    assert m.carve(EXTENT_COUNT_MAX - 5, 10) == [(100 + EXTENT_COUNT_MAX - 5, 10)]
    m.insert(EXTENT_COUNT_MAX - 5, 100 + EXTENT_COUNT_MAX - 5, 10)
    m.check()
    assert m.blocks == EXTENT_COUNT_MAX + 10
    assert m.carve(0, 1 << 52) == [(100, EXTENT_COUNT_MAX + 10)]
    assert len(m) == 0


def test_empty_insert_is_refused() -> None:
    m = ExtentMap(4)
    with pytest.raises(ValueError, match="empty"):
        m.insert(3, 3, 0)
    with pytest.raises(ValueError, match="at least 4"):
        ExtentMap(3)
    assert list(m) == []


# -- hostile leaves --

fields = st.integers(0, 40)
hostile_extents = st.lists(
    st.tuples(
        st.one_of(fields, st.sampled_from([1 << 51, 1 << 52, (1 << 64) - 1])),
        st.one_of(fields, st.sampled_from([LIMIT - 1, LIMIT, (1 << 64) - 1, (1 << 64) - 3])),
        st.one_of(st.integers(0, 5), st.sampled_from([LIMIT, (1 << 32) - 1])),
        st.sampled_from([0, 0, 0, 1, 2, 1 << 31]),
    ),
    max_size=7,
)


def sound(extents: list[tuple[int, int, int, int]], last: int) -> bool:
    """Whether a leaf may hold these extents behind block `last` of the file."""
    for logical, physical, count, flags in extents:
        if logical < last or logical + count > 1 << 51 or count == 0 or flags > 1:
            return False
        if physical < 2 or physical + count > LIMIT:
            return False
        last = logical + count
    return True


@given(hostile_extents, hostile_extents, st.integers(0, 8))
@example([(0, 2, 1, 0)], [(0, 3, 1, 0)], 1)
def test_hostile_leaves(first: list[tuple[int, int, int, int]], second: list[tuple[int, int, int, int]], claim: int) -> None:
    """Any leaf is either taken or refused with ValueError, and refusal changes nothing."""
    m = ExtentMap(6)
    taken: list[tuple[int, int, int, int]] = []
    for extents, count in ((first, len(first)), (second, claim)):
        data = b"".join(EXTENT.struct.pack(*e) for e in extents)
        last = taken[-1][0] + taken[-1][2] if taken else 0
        good = 0 < count <= min(6, len(extents)) and sound(extents[:count], last)
        if good:
            m.append_leaf(data, count, 77, 0, 2, LIMIT)
            taken += extents[:count]
        else:
            with pytest.raises(ValueError, match=r"leaf|extent"):
                m.append_leaf(data, count, 77, 0, 2, LIMIT)
        assert list(m) == taken
        assert m.blocks == sum(e[2] for e in taken)


@given(st.binary(max_size=200), st.integers(0, 6))
def test_any_bytes_as_a_leaf(data: bytes, count: int) -> None:
    m = ExtentMap(6)
    try:
        m.append_leaf(data, count, 0, 0, 2, LIMIT)
    except ValueError:
        assert list(m) == []
    else:
        assert len(m) == count


def test_inline_extents_may_be_none() -> None:
    m = ExtentMap(4)
    m.append_leaf(b"", 0, 0, 0, 2, LIMIT)
    assert (m.leaves, list(m)) == (0, [])


# -- run sets --


class SetAndModel:
    def __init__(self, capacity: int) -> None:
        self.set = RunSet(capacity)
        self.model: set[int] = set()

    def add(self, start: int, count: int) -> None:
        wanted = set(range(start, start + count))
        if wanted & self.model:
            with pytest.raises(ValueError, match="in the set already"):
                self.set.add(start, count)
        else:
            self.set.add(start, count)
            self.model |= wanted

    def remove(self, start: int, count: int) -> None:
        gone = self.model & set(range(start, start + count))
        assert self.set.remove(start, count) == runs_of(gone)
        self.model -= gone

    def check(self) -> None:
        self.set.check()
        assert self.set.runs() == runs_of(self.model)
        assert self.set.blocks == len(self.model)

    def ask(self, start: int, count: int) -> None:
        assert self.set.within(start, count) == runs_of(self.model & set(range(start, start + count)))
        behind = [run for run in runs_of(self.model) if sum(run) > start]
        assert self.set.runs(start, count) == behind[:count]


set_steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), blocks, lengths),
        st.tuples(st.just("remove"), blocks, lengths),
    ),
    max_size=60,
)


@given(capacities, combs, set_steps, blocks, lengths)
def test_run_set(capacity: int, comb: range, steps: list[tuple[object, ...]], start: int, count: int) -> None:
    world = SetAndModel(capacity)
    for b in comb:
        world.add(b, 1 + b % 2)
    for verb, *arguments in steps:
        getattr(world, verb)(*arguments)  # type: ignore[call-overload]
        world.check()
    world.ask(start, count)


@given(st.sets(blocks))
def test_a_set_is_loaded_from_arrays(held: set[int]) -> None:
    runs = np.array(runs_of(held), dtype=np.uint64).reshape(-1, 2)
    loaded = RunSet(4)
    loaded.load(np.ascontiguousarray(runs[:, 0]), np.ascontiguousarray(runs[:, 1]))
    loaded.check()
    assert loaded.runs() == runs_of(held)


# -- pin counts --

pin_runs = st.lists(st.tuples(blocks, st.integers(1, 12)), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.booleans(), pin_runs), max_size=30), pin_runs)
def test_pin_counts(steps: list[tuple[bool, list[tuple[int, int]]]], question: list[tuple[int, int]]) -> None:
    counts = PinCounts(SPAN + 12, 4)
    model = dict.fromkeys(range(SPAN + 12), 0)
    for add, runs in steps:
        runs = disjoint(runs)
        touched = [b for start, count in runs for b in range(start, start + count)]
        if add:
            counts.add(runs)
            for b in touched:
                model[b] += 1
        elif all(model[b] for b in touched):
            for b in touched:
                model[b] -= 1
            idle = counts.drop(runs)
            gone = sorted(b for start, n in idle for b in range(start, start + n))
            assert gone == sorted(b for b in touched if not model[b])
        else:
            with pytest.raises(ValueError, match="is not pinned"):
                counts.drop(runs)
        counts.check()
        assert counts.pinned == sum(1 for n in model.values() if n)
    assert [counts.count(b) for b in model] == list(model.values())
    for start, count in question:
        assert counts.any(start, count) == any(model[b] for b in range(start, start + count))
    idle, pinned = counts.split(question)
    asked = [b for start, count in question for b in range(start, start + count)]
    assert sorted(b for s, n in idle for b in range(s, s + n)) == sorted(b for b in asked if not model[b])
    assert sorted(b for s, n in pinned for b in range(s, s + n)) == sorted(b for b in asked if model[b])


def disjoint(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A pin's runs never overlap."""
    return runs_of({b for start, count in runs for b in range(start, start + count)})


@pytest.mark.parametrize("run", [(90, 11), (101, 1), (1 << 63, 1), (0, 1 << 63)])
def test_counts_outside_the_image_are_refused(run: tuple[int, int]) -> None:
    counts = PinCounts(100)
    counts.add([(50, 1)])
    for call in (counts.add, counts.drop, counts.split):
        with pytest.raises(ValueError, match="outside the image"):
            call([run])
    with pytest.raises(ValueError, match="outside the image"):
        counts.any(*run)
    assert counts.pinned == 1


def test_a_refused_drop_changes_nothing() -> None:
    counts = PinCounts(16)
    counts.add([(0, 4)])
    with pytest.raises(ValueError, match="block 4 is not pinned"):
        counts.drop([(0, 5)])
    assert [counts.count(b) for b in range(5)] == [1, 1, 1, 1, 0]


def test_extents_are_what_the_header_says() -> None:
    """The bytes of a leaf are those of layout.EXTENT."""
    m = ExtentMap(4)
    m.insert(7, 9, 3, True)
    assert bytes(m.leaf(0)[2]) == struct.pack("<QQII", 7, 9, 3, 1) == EXTENT.pack(logical=7, physical=9, count=3, flags=1)
