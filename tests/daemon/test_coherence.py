"""When pages are dropped, and whose passes become rare: the books of coherence.py, without a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daxfs import abi
from daxfs.core.waiting import Awaited, LayoutBusy
from daxfs.daemon import coherence, twins
from daxfs.daemon.coherence import PASS_SHARE, Coherence
from daxfs.daemon.twins import PAGE, Budget
from tests.core.image import fresh_volume
from tests.daemon.test_caching import WRITE, Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with fresh_volume(tmp_path) as volume:
        made = Bench(volume, monkeypatch, "always")
        made.service.coherence.install(quick=False)
        yield made
    twins.install({}, lambda inode: pytest.fail("no file has pages"), quick=False)


@dataclass(eq=False)
class Asked:
    """A request, as far as this goes."""

    uid: int = 1000
    nodeid: int = 0
    answered: bool = False


def request(uid: int = 1000) -> Any:
    return Asked(uid)


def before_pin(bench: Bench, inode: Any, claim: Any) -> None:
    bench.service.coherence.before_pin(inode, 0, 2 * PAGE, WRITE, 1000, claim)


def test_a_pin_waits_for_pages_without_twins_and_for_no_others(bench: Bench) -> None:
    books, inode = bench.service.coherence, bench.file()
    before_pin(bench, inode, request())  # nothing was handed out
    assert books.fill(request(), inode, 0, 2 * PAGE) == b"x" * 2 * PAGE
    claim = request()
    for _ in range(2):  # it is asked for one drop, however often it looks
        with pytest.raises(LayoutBusy) as caught:
            before_pin(bench, inode, claim)
        assert caught.value.kind is Awaited.PAGES
    assert len(bench.tasks) == 1
    books.before_pin(inode, 0, PAGE, abi.FOLL_GET, 1000, request())  # a reference touches no data
    books.fill(request(), inode, 0, 2 * PAGE)  # claimed: with twins
    assert books.budget.used == 2
    books.check()
    books.forget(inode.ino)
    assert books.budget.used == 0
    books.check()


def test_while_the_size_changes_a_pin_waits_for_no_drop(bench: Bench) -> None:
    books, inode = bench.service.coherence, bench.file()
    books.fill(request(), inode, 0, 2 * PAGE)
    truncate: Any = Asked(0, inode.ino)
    books.change_kept(inode.ino, truncate)
    before_pin(bench, inode, request())
    assert books.budget.of_user(1000) == 2  # the blocks as they are
    books.check()
    books.ended(truncate)
    assert not books.is_changing(inode.ino)


def test_a_user_without_room_waits(bench: Bench) -> None:
    books = bench.service.coherence
    inode, other = bench.file(), bench.file(b"g")
    books.budget = Budget(3, 1)
    for file in (inode, other):
        bench.pin(bench.open(file))
        books.fill(request(1001), file, 0, 0)  # its pages are made with this budget
    books.fill(request(), inode, 0, PAGE)
    before = len(bench.tasks)
    with pytest.raises(LayoutBusy) as caught:
        books.fill(request(), other, 0, PAGE)
    assert caught.value.kind is Awaited.TWINS
    assert len(bench.tasks) == before + 1  # what is there is dropped
    assert books.fill(request(1001), other, 0, PAGE)
    books.check()


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ({}, PASS_SHARE),
        ({0: 0.001}, PASS_SHARE),  # 1 % of a CPU: who needs little gets what there is
        ({0: 0.001, 1: 1.0}, 0.04),
        ({0: 1.0, 1: 1.0}, PASS_SHARE / 2),
        ({0: 0.0001, 1: 1.0, 2: 2.0, 3: 3.0}, (PASS_SHARE - 0.001) / 3),
    ],
)
def test_users_share_the_time(bench: Bench, costs: dict[int, float], wanted: float) -> None:
    books: Coherence = bench.service.coherence
    assert books.bound_s == coherence.COHERENCE_MS / 1000
    books._costs = costs
    assert books._allowed() == pytest.approx(wanted)
