"""Twins without a mount: a kernel of a few lines that keeps pages and writes them back when it likes, an application that
stores through them, and a device that writes the blocks it has pinned, all on one real volume. Each writes bytes of its own,
and none may be lost."""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daxfs import abi
from daxfs.core import attributes, fileops, holding, namespace
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.daemon import twins
from daxfs.daemon.twins import PAGE, Budget, Pages
from tests.core.image import NOW, fresh_volume

PAGES = 6
ODD = 97  # bytes of a page that one writes: so far apart that runs of each differ in place and length


@dataclass
class Claim:
    answered: bool = False


@dataclass
class Cached:
    """A page of the kernel's."""

    data: bytearray
    dirty: bool = False


@dataclass
class Stage:
    """One file. `stored`, `written`: what the application and the device last put where (in bytes of the file)."""

    volume: Volume
    random: random.Random
    size: int
    cache: dict[int, Cached] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    pins: dict[int, tuple[int, int]] = field(default_factory=dict)  # pages, by id
    drops: list[tuple[int, int, int, Any]] = field(default_factory=list)
    compiled: bool = True

    def __post_init__(self) -> None:
        root = self.volume.root
        self.inode = namespace.create(self.volume, NOW, root, b"f", stat.S_IFREG | 0o600, Caller(0, 0, 0))
        fileops.write(self.volume, NOW, self.inode, 0, bytes(self.size))
        self.budget = Budget(64, 64)
        self.pages = Pages(self.inode, self.volume.pins, self.budget, lambda uid: None)
        self.holder = Holder(os.getpid(), "test", 1)

    def check(self) -> None:
        self.pages.check()
        assert self.pages.with_bytes() == self.budget.used
        for page in self.cache:  # a page of a pinned block that is cached has a twin
            if any(first <= page < end for first, end in self.pins.values()):
                assert page in {p for a, b in self.pages.ranges(1) for p in range(a, b)}, page

    # -- the kernel --

    def fault(self) -> None:
        page = self.random.randrange(PAGES)
        if page * PAGE >= self.inode.size or page in self.cache:
            return
        data = self.pages.fill(page * PAGE, PAGE, 1000)
        assert data is not None
        self.cache[page] = Cached(bytearray(data.ljust(PAGE, b"\0")))

    def write_back(self) -> None:
        dirty = [page for page, cached in self.cache.items() if cached.dirty]
        if dirty:
            self._write_back(self.random.choice(dirty))

    def _write_back(self, page: int, *, refuse: bool = False) -> bool:
        cached, at = self.cache[page], page * PAGE
        data = bytes(cached.data[: max(0, min(PAGE, self.inode.size - at))])
        if refuse:
            self.pages.refused(at, len(data))
            return False
        if not (self.compiled and self.pages.take_back(at, data)):
            for offset, piece, in_place in self.pages.pieces(at, data):
                if in_place:
                    fileops.overwrite(self.volume, NOW, self.inode, offset, piece)
                else:
                    assert fileops.write(self.volume, NOW, self.inode, offset, piece) == len(piece)
            self.pages.written(at, data)
        cached.dirty = False
        return True

    def reclaim(self) -> None:
        """Memory is short: clean pages go, and nobody is told."""
        for page in [page for page, cached in self.cache.items() if not cached.dirty and self.random.random() < 0.5]:
            del self.cache[page]

    # -- the application --

    def store(self) -> None:
        if not self.cache:
            return
        page = self.random.choice(list(self.cache))
        at = self.random.randrange(ODD) * 2 * (PAGE // ODD // 2) % PAGE
        if page * PAGE + at >= self.inode.size:
            return
        value = self.random.randrange(1, 128)
        self.cache[page].data[at] = value
        self.cache[page].dirty = True
        self.stored[page * PAGE + at] = value

    # -- the device --

    def dma(self) -> None:
        if not self.pins:
            return
        first, end = self.random.choice(list(self.pins.values()))
        page = self.random.randrange(first, end)
        at = (self.random.randrange(ODD) * 2 + 1) * (PAGE // ODD // 2) % PAGE | 1
        block = self.inode.block(page)
        value = self.random.randrange(128, 256)
        if block and page * PAGE + at < self.inode.size:
            self.volume.pmem.store(block * PAGE + at, bytes([value]))
            self.written[page * PAGE + at] = value

    # -- pins and drops --

    def begin_pin(self) -> None:
        if len(self.drops) > 2 or len(self.pins) > 3:
            return
        first = self.random.randrange(PAGES)
        end = self.random.randint(first + 1, PAGES)
        claim = Claim()
        self.pages.be_careful()
        if not self.pages.may_have(first, end):
            self._pin(first, end)
            return
        self.pages.claim(claim, first, end)
        self.drops.append((*self.pages.begin_drop(first, end), (claim, first, end)))

    def _pin(self, first: int, end: int) -> None:
        if end * PAGE > -(-self.inode.size // PAGE) * PAGE:
            return
        flags = abi.FOLL_PIN | abi.FOLL_WRITE
        taken = holding.pin(
            self.volume, NOW, self.inode, first * PAGE, (end - first) * PAGE, flags, 7, self.holder, writable=True
        )
        self.pins[taken.id] = first, end

    def unpin(self) -> None:
        if self.pins:
            number = self.random.choice(list(self.pins))
            del self.pins[number]
            holding.unpin(self.volume, NOW, 7, number)

    def begin_drop(self) -> None:
        if len(self.drops) < 3:
            self.drops.append((*self.pages.begin_drop(0, PAGES), None))

    def end_drop(self) -> None:
        """The kernel drops what it has of a range; sometimes it cannot write a page back, and keeps it."""
        if not self.drops:
            return
        first, end, began, pin = self.drops.pop(self.random.randrange(len(self.drops)))
        for page in [page for page in self.cache if first <= page < end]:
            cached = self.cache[page]
            if not cached.dirty or self._write_back(page, refuse=pin is None and self.random.random() < 0.1):
                del self.cache[page]
        self.pages.end_drop(first, end, began, True)
        if pin is not None:
            claim, first, end = pin
            if not self.pages.may_have(first, end):
                self._pin(first, end)
            claim.answered = True

    def punch(self) -> None:
        """A block leaves the file; its page does not, before the kernel hears of it."""
        page = self.random.randrange(PAGES)
        if any(first <= page < end for first, end in self.pins.values()) or (page + 1) * PAGE > self.inode.size:
            return
        mode = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
        fileops.fallocate(self.volume, NOW, self.inode, mode, page * PAGE, PAGE)
        self.cache.pop(page, None)
        for at in range(page * PAGE, (page + 1) * PAGE):
            self.stored.pop(at, None)
            self.written.pop(at, None)

    def finish(self) -> None:
        while self.drops:
            self.end_drop()
        for page in [page for page, cached in self.cache.items() if cached.dirty]:
            self._write_back(page)
        data = fileops.read(self.volume, self.inode, 0, self.inode.size)
        for at, value in {**self.stored, **self.written}.items():
            assert data[at] == value, f"byte {at} (page {at // PAGE}) has {data[at]}, {value} was put there"
        assert {at for at in range(len(data)) if data[at]} == {*self.stored, *self.written}


STEPS = (
    "fault", "fault", "store", "store", "store", "dma", "dma", "write_back", "reclaim", "begin_pin", "unpin", "begin_drop",
    "end_drop", "end_drop", "punch",
)  # fmt: skip


def play(volume: Volume, seed: int, steps: int, *, compiled: bool) -> None:
    choices = random.Random(seed)
    stage = Stage(volume, choices, PAGES * PAGE - choices.choice((0, 0, 1, 100, 4095)), compiled=compiled)
    for _ in range(steps):
        getattr(stage, choices.choice(STEPS))()
        stage.check()
    stage.finish()


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    yield
    twins.install({}, lambda inode: pytest.fail("no file has pages"), quick=False)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pieces"])
def test_no_byte_is_lost(tmp_path: Path, compiled: bool) -> None:
    base = int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))
    for seed in range(base, base + 25):
        print(f"DAXFS_TEST_SEED={seed} plays the same steps first")
        (tmp_path / str(seed)).mkdir()
        with fresh_volume(tmp_path / str(seed)) as volume:
            play(volume, seed, 300, compiled=compiled)


def test_without_twins_bytes_are_lost(tmp_path: Path) -> None:
    """The model can see it."""
    twins.install({}, lambda inode: pytest.fail("no file has pages"), quick=False, off=True)
    lost = 0
    for seed in range(10):
        (tmp_path / str(seed)).mkdir()
        with fresh_volume(tmp_path / str(seed)) as volume:
            try:
                play(volume, seed, 300, compiled=True)
            except AssertionError:
                lost += 1
    assert lost == 10


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with fresh_volume(tmp_path) as volume:
        yield Stage(volume, random.Random(1), PAGES * PAGE)


def test_budget(stage: Stage) -> None:
    budget = Budget(4, 2)
    pages = Pages(stage.inode, stage.volume.pins, budget, lambda uid: None)
    stage._pin(0, PAGES)
    pages.be_careful()
    assert pages.fill(0, 2 * PAGE, 1000) is not None
    assert pages.fill(2 * PAGE, PAGE, 1000) is None  # the share of a user
    assert pages.fill(2 * PAGE, PAGE, 1001) is not None
    assert pages.fill(0, PAGE, 1000) is not None  # again: the kernel has dropped it
    assert pages.fill(3 * PAGE, PAGE, 1000, True) is not None  # insisting
    assert budget.used == 4 == pages.with_bytes()
    assert pages.users() == {1000, 1001}
    assert budget.users() == {1000: 3, 1001: 1}
    assert budget.beyond == 1
    assert pages.fill(4 * PAGE, PAGE, 1001) is not None  # what another has beyond its share takes no room
    pages.end_drop(*pages.begin_drop(0, PAGES), True)
    assert budget.used == 0 == budget.of_user(1000)
    pages.check()


def test_a_page_that_grew_is_masked_until_it_is_handed_out_anew(stage: Stage) -> None:
    volume, inode, pages = stage.volume, stage.inode, stage.pages
    attributes.setattr(volume, NOW, inode, attributes.Attributes(size=100))
    data = pages.fill(0, PAGE, 1000)
    assert data == bytes(100)
    page = bytes(100) + b"x" * (PAGE - 100)
    attributes.setattr(volume, NOW, inode, attributes.Attributes(size=PAGE))
    assert pages.mask(100)
    assert pages.take_back(0, b"ab" + page[2:])
    assert fileops.read(volume, inode, 0, PAGE) == b"ab" + bytes(PAGE - 2)
    assert pages.fill(0, PAGE, 1000) == b"ab" + bytes(PAGE - 2)
    assert pages.take_back(0, page)
    assert fileops.read(volume, inode, 0, PAGE) == page
    assert not pages.mask(2 * PAGE)  # no part of a page
    pages.check()


def test_stale(stage: Stage) -> None:
    stage._pin(0, 3)
    stage.pages.be_careful()
    data = stage.pages.fill(0, 3 * PAGE, 1000)
    assert data == bytes(3 * PAGE)
    assert stage.pages.stale(0, 3, data, 2) == [False, False, False]
    stage.volume.pmem.store(stage.inode.block(1) * PAGE + 5, b"device")
    assert stage.pages.stale(0, 3, b"stored" + data[6:], 2) == [True, True, False]
    assert stage.pages.stale(0, 3, data[: 2 * PAGE], 9) == [False, True]  # a gap
    assert stage.pages.stale(0, 3, data, 2) == [True, True, True]  # quiet for long enough


def test_long_files_have_coarse_bits(stage: Stage) -> None:
    inode, pages = stage.inode, stage.pages
    attributes.setattr(stage.volume, NOW, inode, attributes.Attributes(size=1 << 40))
    far = (1 << 40) // PAGE - 1
    pages.fill(far * PAGE, PAGE, 0)
    pages.fill(0, PAGE, 0)
    assert pages.may_have(0, 1)
    assert pages.may_have(far, far + 1)
    assert not pages.may_have(far // 2, far // 2 + 1)
    first, end, began = pages.begin_drop(1, 2)
    assert first == 0
    assert end > 2  # what shares its bit goes with it
    assert pages.may_have(0, 1)
    pages.end_drop(first, end, began, True)
    assert not pages.may_have(0, 1)
    first, end, began = pages.begin_drop(far, far + 1)
    pages.end_drop(first, end, began, False)
    assert pages.may_have(far, far + 1)  # the kernel could not


def test_claims_end_with_their_requests(stage: Stage) -> None:
    claim = SimpleNamespace(answered=False)
    stage.pages.claim(claim, 0, 2)
    stage.pages.fill(0, 3 * PAGE, 0)
    assert stage.pages.ranges(9) == [(0, 2)]
    claim.answered = True
    stage.pages.fill(0, 3 * PAGE, 0)
    assert stage.pages.ranges(9) == []
    assert stage.pages.may_have(0, 1)
