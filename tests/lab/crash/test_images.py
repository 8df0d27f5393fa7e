"""What a power cut can leave: the rules of images.py, one by one, and against a model that tries every order."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest

from daxfs.lab.crash.images import (
    AdrTracker,
    Choice,
    EadrTracker,
    Limits,
    Tracker,
    digest_of,
    digest_with,
    tracker,
)  # fmt: skip
from daxfs.lab.crash.medium import LINE, Event, Fence, Flush, Return, Store

SIZE = 8 * LINE
ALL = np.ones(SIZE // LINE, np.bool_)
A, B, C = (bytes([letter]) * 8 for letter in b"ABC")


def after(domain: str, *events: Event) -> Tracker:
    out = tracker(domain, bytes(SIZE))
    for event in events:
        out.feed(event)
    return out


def image(base: Tracker, choice: Choice) -> bytes:
    out = bytearray(base.durable)
    for line, content in choice.items():
        out[line * LINE : (line + 1) * LINE] = content
    return bytes(out)


def left(base: Tracker, seen: np.ndarray = ALL, limits: Limits = Limits()) -> set[bytes]:  # noqa: B008
    return {image(base, choice) for choice in base.images(seen, Random(1), limits)}


def words(*numbers: tuple[int, bytes]) -> bytes:
    """An image of zeros with these words."""
    out = bytearray(SIZE)
    for at, word in numbers:
        out[at : at + len(word)] = word
    return bytes(out)


def test_a_word_is_whole_or_absent() -> None:
    assert left(after("adr", Store(64, A))) == {words(), words((64, A))}


def test_a_larger_store_may_be_torn_into_any_of_its_words() -> None:
    found = left(after("adr", Store(64, A + B + C)))
    assert found == {words(*some) for some in subsets([(64, A), (72, B), (80, C)])}


def test_part_of_a_word_is_one_store() -> None:
    base = after("adr", Store(66, b"xyz"), Store(78, b"1234"))
    second = {words((66, b"xyz"), *some) for some in subsets([(78, b"12"), (80, b"34")])}
    assert left(base) == {words(), *second}


def test_stores_to_one_line_are_left_in_order() -> None:
    assert left(after("adr", Store(64, A), Store(72, B), Store(64, C))) == {
        words(), words((64, A)), words((64, A), (72, B)), words((64, C), (72, B)),
    }  # fmt: skip


def test_lines_are_independent() -> None:
    base = after("adr", Store(0, A), Store(64, B), Store(128, C))
    assert left(base) == {words(*some) for some in subsets([(0, A), (64, B), (128, C)])}


def test_flush_and_fence_make_durable() -> None:
    base = after("adr", Store(0, A), Store(64, B), Flush(0, 8), Fence(), Store(0, C))
    assert base.durable == words((0, A))
    assert left(base) == {words((0, x), *rest) for x in (A, C) for rest in ([], [(64, B)])}


@pytest.mark.parametrize("missing", ["flush", "fence"])
def test_neither_alone_does(missing: str) -> None:
    events: list[Event] = [Store(0, A), Flush(0, 8), Fence()]
    base = after("adr", *(event for event in events if type(event).__name__.lower() != missing))
    assert left(base) == {words(), words((0, A))}


def test_what_comes_after_the_flush_is_not_flushed() -> None:
    base = after("adr", Store(0, A), Flush(0, 8), Store(8, B), Fence())
    assert left(base) == {words((0, A)), words((0, A), (8, B))}


def test_a_flush_covers_whole_lines() -> None:
    base = after("adr", Store(0, A), Store(48, B), Store(64, C), Flush(60, 1), Fence())
    assert left(base) == {words((0, A), (48, B)), words((0, A), (48, B), (64, C))}


def test_a_streamed_store_needs_only_the_fence() -> None:
    assert left(after("adr", Store(0, A, True))) == {words(), words((0, A))}
    assert left(after("adr", Store(0, A, True), Fence())) == {words((0, A))}


def test_a_store_that_changes_nothing_is_none() -> None:
    base = after("adr", Store(0, A), Flush(0, 8), Fence(), Store(0, A + bytes(8)))
    assert base.pending() == []
    assert left(base) == {words((0, A))}


def test_what_did_nothing_is_told() -> None:
    base = tracker("adr", bytes(SIZE))
    events = [Store(0, A), Flush(0, 8), Flush(0, 8), Fence(), Fence(), Flush(64, 8), Store(0, A), Flush(0, 8), Fence(),
              Store(64, B, True), Fence()]  # fmt: skip
    assert [base.feed(event) for event in events] == [True, True, False, True, False, False, True, True, True, True, True]


def test_only_lines_that_are_read_are_varied() -> None:
    base = after("adr", Store(0, A), Store(64, B), Store(128, C))
    seen = np.zeros(SIZE // LINE, np.bool_)
    seen[1] = True
    assert left(base, seen) == {words(), words((64, B)), words((0, A), (64, B), (128, C))}


def test_too_many_are_sampled() -> None:
    """None, all, each alone, all but one, pairs; some torn, some mixed; nothing that cannot be."""
    events = [Store(line * 64, A + B) for line in range(8)]
    base = after("adr", *events)
    whole = [words((line * 64, A + B)) for line in range(8)]
    found = left(base, limits=Limits(all=256, lines=8, pairs=28, random=50))
    everything = words(*((line * 64, A + B) for line in range(8)))
    assert {words(), everything, *whole} <= found
    for line in range(8):
        assert words(*((other * 64, A + B) for other in range(8) if other != line)) in found
        assert {words((line * 64, A)), words((line * 64 + 8, B))} & found
        for other in range(line):
            assert words((line * 64, A + B), (other * 64, A + B)) in found
    assert len(found) > 1 + 1 + 8 + 8 + 8 + 28
    for one in found:
        for at in range(0, SIZE, 8):
            assert one[at : at + 8] in (bytes(8), {0: A, 8: B}.get(at % 64, bytes(8)))


def test_the_seed_decides() -> None:
    base = after("adr", *(Store(line * 64, A + B + C) for line in range(8)))

    def drawn(seed: int) -> list[Choice]:
        return list(base.images(ALL, Random(seed), Limits(lines=4, pairs=3, random=9)))

    assert drawn(5) == drawn(5) != drawn(6)


def test_eadr_leaves_a_prefix_of_the_stores() -> None:
    base = after("eadr", Store(64, A), Store(0, B + C), Store(64, C))
    assert left(base) == {
        words(), words((64, A)), words((64, A), (0, B)), words((64, A), (0, B + C)), words((64, C), (0, B + C)),
    }  # fmt: skip
    assert left(after("eadr", Store(64, A), Fence(), Store(0, B))) == {words((64, A)), words((64, A), (0, B))}


@pytest.mark.parametrize("domain", ["adr", "eadr"])
def test_the_latest_is_all_stores(domain: str) -> None:
    base = after(domain, Store(0, A), Fence(), Store(64, B), Flush(64, 8), Store(64, C))
    assert image(base, base.latest()) == words((0, A), (64, C))
    assert base.latest() in list(base.images(ALL, Random(1), Limits()))


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="adr, eadr"):
        tracker("dram", bytes(SIZE))


@pytest.mark.parametrize("seed", range(20))
def test_digests_are_those_of_the_images(seed: int) -> None:
    rng = Random(seed)
    base = tracker(rng.choice(["adr", "eadr"]), rng.randbytes(SIZE))
    for _ in range(30):
        base.feed(anything(rng))
        assert base.digest == digest_of(base.durable), f"seed {seed}"
        for choice in base.images(ALL, rng, Limits(all=8, lines=2, pairs=1, random=2)):
            assert digest_with(base, choice) == digest_of(image(base, choice)), f"seed {seed}"


@pytest.mark.parametrize("seed", range(60))
def test_adr_is_what_a_model_of_the_caches_leaves(seed: int) -> None:
    """The model does every store word by word in every order that the rules allow, and evicts after each what it likes."""
    rng = Random(seed)
    base, model = AdrTracker(bytes(SIZE), 0), Caches()
    for _ in range(rng.randrange(1, 7)):
        event = anything(rng, lines=2, most=20)
        base.feed(event)
        model.feed(event)
    limits = Limits(all=1 << 20)
    assert left(base, limits=limits) == model.images(), f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_eadr_leaves_no_more_than_adr(seed: int) -> None:
    """Persistent caches can only lose what volatile ones could lose, too."""
    rng = Random(seed)
    adr, eadr = AdrTracker(bytes(SIZE), 0), EadrTracker(bytes(SIZE), 0)
    for _ in range(rng.randrange(1, 5)):
        event = Store(rng.randrange(0, 100), rng.randbytes(rng.randrange(1, 12)))
        adr.feed(event)
        eadr.feed(event)
    limits = Limits(all=1 << 20)
    assert left(eadr, limits=limits) <= left(adr, limits=limits), f"seed {seed}"


def anything(rng: Random, lines: int = SIZE // LINE, most: int = 100) -> Event:
    at = rng.randrange(lines * LINE)
    n = min(rng.randrange(1, most), lines * LINE - at)
    kind = rng.choice("SSSSTFFE")
    if kind in "ST":
        return Store(at, rng.randbytes(n), kind == "T")
    return Flush(at, n) if kind == "F" else rng.choice([Fence(), Return(0)])


def subsets(items: list[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    return [[item for item, there in zip(items, mask, strict=True) if there]
            for mask in product((False, True), repeat=len(items))]  # fmt: skip


class Caches:
    """All that each line can hold on the medium, as sets of contents; no cleverness."""

    def __init__(self) -> None:
        self.now = [bytes(LINE)] * (SIZE // LINE)
        self.floor = [{bytes(LINE)} for _ in self.now]  # what may be on the medium
        self.flushed: list[set[bytes] | None] = [None] * len(self.now)  # what may be once the fence has come

    def feed(self, event: Event) -> None:
        if isinstance(event, Store):
            for line in range(event.at // LINE, (event.at + len(event.data) - 1) // LINE + 1):
                self._store(line, event)
        elif isinstance(event, Flush):
            for line in range(event.at // LINE, (event.at + event.n - 1) // LINE + 1):
                self.flushed[line] = {self.now[line]}
        elif isinstance(event, Fence):
            for line, kept in enumerate(self.flushed):
                if kept is not None:
                    self.floor[line] = kept
            self.flushed = [None] * len(self.now)

    def _store(self, line: int, event: Store) -> None:
        parts = []
        for at in range(line * LINE, (line + 1) * LINE, 8):
            low, high = max(at, event.at), min(at + 8, event.at + len(event.data))
            if low < high:
                parts.append((low - line * LINE, event.data[low - event.at : high - event.at]))
        torn = {self._with(line, some) for some in subsets(parts)}
        self.now[line] = self._with(line, parts)
        self.floor[line] = self.floor[line] | torn
        if event.streamed:
            self.flushed[line] = {self.now[line]}
        elif self.flushed[line] is not None:
            self.flushed[line] = self.flushed[line] | torn  # type: ignore[operator]

    def _with(self, line: int, parts: list[tuple[int, bytes]]) -> bytes:
        out = bytearray(self.now[line])
        for offset, data in parts:
            out[offset : offset + len(data)] = data
        return bytes(out)

    def images(self) -> set[bytes]:
        return {b"".join(mix) for mix in product(*self.floor)}
