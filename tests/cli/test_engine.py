"""The fill engine: it writes its byte everywhere, and sees every other byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from daxfs.cli.engine import FillEngine

LENGTH = (2 << 20) + 4096  # more than one piece, and not a multiple of one


def times(count: int, meanwhile: Callable[[int], None] = lambda n: None) -> Callable[[], bool]:
    """A `stopped` that lets `count` passes happen and calls `meanwhile(n)` before each."""
    state = iter(range(count + 1))

    def stopped() -> bool:
        n = next(state)
        meanwhile(n)
        return n == count

    return stopped


def test_it_fills_everything_and_sees_nothing_else() -> None:
    memory = bytearray(b"?" * LENGTH)
    seen = FillEngine(memoryview(memory), 0xA5).run(times(3))
    assert (seen.passes, seen.foreign, seen.first) == (3, 0, None)
    assert memory == b"\xa5" * LENGTH


@pytest.mark.parametrize("at", [0, (1 << 20) - 1, 1 << 20, LENGTH - 1])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_it_sees_a_single_foreign_byte(at: int, when: int) -> None:
    memory = bytearray(LENGTH)

    def meanwhile(n: int) -> None:
        if n == when:
            memory[at] = 7

    seen = FillEngine(memoryview(memory), 0).run(times(2, meanwhile))
    assert (seen.foreign, seen.first) == (1, (at, 7))


def test_it_remembers_the_first_of_many() -> None:
    memory = bytearray(LENGTH)

    def meanwhile(n: int) -> None:
        memory[100:110] = b"abcdefghij"

    seen = FillEngine(memoryview(memory), 0).run(times(2, meanwhile))
    assert (seen.foreign, seen.first) == (30, (100, ord("a")))
