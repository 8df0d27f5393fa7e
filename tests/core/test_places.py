"""Which pins stand on which blocks, beside a naive look at all of them: overlapping, nested, of many lengths and runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daxfs import abi
from daxfs.core import pins
from daxfs.core.pins import Holder, Pin, PinTable

BLOCKS = 3000
FLAGS = (abi.FOLL_PIN, abi.FOLL_PIN | abi.FOLL_WRITE, abi.FOLL_GET, abi.PIN_ON_DEMAND)
starts = st.one_of(st.integers(0, 40), st.integers(0, 2000))
runs_of = st.lists(st.tuples(starts, st.sampled_from((1, 2, 3, 8, 9, 64, 500))), min_size=1, max_size=4)
Step = tuple[bool, int, list[tuple[int, int]], int]
steps = st.lists(st.tuples(st.booleans(), st.integers(0, 5), runs_of, st.sampled_from(FLAGS)), max_size=60)


def apart(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A pin's runs do not overlap."""
    kept: list[tuple[int, int]] = []
    for start, count in sorted(runs):
        if not kept or start >= sum(kept[-1]):
            kept.append((start, count))
    return kept


def make(number: int, owner: int, runs: list[tuple[int, int]], flags: int) -> Pin:
    blocks = sum(count for _, count in runs)
    return Pin(number, owner, None, 2 + owner % 2, 0, blocks * 4096, flags, runs, blocks, Holder(owner), 0,
               bool(flags & abi.PIN_ON_DEMAND))  # fmt: skip


@given(steps, runs_of)
def test_beside_a_look_at_all(steps: list[Step], asked: list[tuple[int, int]]) -> None:
    table, held, few = PinTable(BLOCKS), dict[int, Pin](), pins.FEW
    try:
        pins.FEW = 0
        for number, (leaves, owner, runs, flags) in enumerate(steps, 1):
            if leaves and held:
                table.remove([held.pop(sorted(held)[owner % len(held)])])
            else:
                held[number] = make(number, owner, apart(runs), flags)
                table.insert(held[number])
            table.check()
        wanted = {b for start, count in asked for b in range(start, start + count)}
        for ino in (2, 3):
            for whose in (None, 0, 1):
                expected = [
                    number for number, pin in held.items()
                    if (pin.ino == ino if whose is None else pin.owner == whose)
                    and any(b in wanted for start, count in pin.runs for b in range(start, start + count))
                ]  # fmt: skip
                assert sorted(pin.id for pin in table.standing(ino, asked, whose)) == sorted(expected)
    finally:
        pins.FEW = few


def test_ids_that_look_alike() -> None:
    """Numbers that are equal modulo 2**24, and neighbours, on one block: each is found, and each leaves by itself."""
    table = PinTable(10)
    numbers = (1, (1 << 24) + 1, 2, (1 << 24) - 1, 1 << 24, (1 << 25) + 1, 3, *range(100, 120))
    many = [make(number, 1, [(5, 1)], abi.FOLL_PIN) for number in numbers]
    for pin in many:
        table.insert(pin)
        table.check()
    for pin in many[::2] + many[1::2]:
        assert sorted(one.id for one in table.standing(3, [(5, 1)])) == sorted(one.id for one in table.all())
        table.remove([pin])
        table.check()
    assert list(table.standing(3, [(5, 1)])) == []
