"""Costs and memory that must not grow with what a call does not touch: the image, the file, other files, pins.

Growth is asserted, never a time: the CPU time of the same calls at a size and at ten times that size, side by side in turns,
and the best of several rounds. python -m tools.scale measures the same in full.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daxfs import abi
from daxfs.core import layout
from daxfs.core.extents import ExtentMap
from daxfs.core.format import format_image
from daxfs.core.freeset import FreeSet
from daxfs.core.fsck import check
from daxfs.core.journal import Journal
from daxfs.core.pincounts import PinCounts
from daxfs.core.pins import Holder, Pin, PinTable
from daxfs.core.volume import Volume
from tools.scale.ageing import Ageing, Core, Course

NOW = 1_700_000_000_000_000_000
TIB = 1 << 40
ROUNDS = 7

Call = Callable[[int], object]


def growth(small: Call, large: Call, calls: int = 50) -> float:
    """What `large` costs per call against `small`; each gets a number that is new."""
    best = {small: float("inf"), large: float("inf")}
    for turn in range(ROUNDS):
        for call in best:
            began = time.process_time_ns()
            for i in range(calls):
                call(turn * calls + i)
            best[call] = min(best[call], time.process_time_ns() - began)
    return best[large] / max(1, best[small])


def extent_map(extents: int) -> ExtentMap:
    """Every other block, stored once."""
    found = ExtentMap()
    for i in range(extents):
        found.insert(2 * i, 4 * i, 1)
    for i in found.unplaced():
        found.place_leaf(i, 1 + i)
    store(found)
    return found


def store(found: ExtentMap) -> int:
    """As inode.py does it. How many leaves went to media."""
    for i in found.unplaced():
        found.place_leaf(i, 1 + i)
    stale = found.stale()
    for i, following in stale:
        found.stored(i, following)
    return len(stale)


def test_a_change_of_a_file_of_many_extents() -> None:
    """Punch, fill, and find what is to be stored: not all leaves are looked at."""

    def change(extents: int) -> Call:
        mapped = extent_map(extents)

        def call(i: int) -> None:
            at = i * 7919 % extents * 2
            (run,) = mapped.carve(at, 1)
            assert store(mapped) == 1
            mapped.insert(at, run[0], 1)
            assert store(mapped) == 1

        return call

    assert growth(change(1000), change(500_000)) < 5


def test_a_file_of_many_extents_goes_at_a_steady_pace() -> None:
    """From the front, a piece after another: the array of leaves is not moved for each."""

    def empty(extents: int) -> Call:
        def call(i: int) -> None:
            mapped = ExtentMap()
            mapped.insert(0, 0, 1)
            for at in range(1, extents):
                mapped.insert(2 * at, 4 * at, 1)
            began = time.process_time_ns()
            assert len(mapped.carve(0, 2 * extents)) == extents
            took.setdefault(extents, []).append((time.process_time_ns() - began) / extents)

        return call

    took: dict[int, list[float]] = {}
    for extents in (4000, 400_000):
        for i in range(3):
            empty(extents)(i)
    assert min(took[400_000]) < 4 * min(took[4000])


def test_an_allocation_among_many_free_runs() -> None:
    def allocate(runs: int) -> Call:
        free = FreeSet()
        starts = np.arange(1, 1 + 4 * runs, 4, dtype=np.uint64)
        free.load(starts, np.full(runs, 1, np.uint64))
        free.add(8 * runs, 1000)
        assert free.best(1) == 1

        def call(i: int) -> None:
            for want in (1, 2):
                start = free.best(want)
                assert start is not None
                free.remove(start, want)
                free.add(start, want)

        return call

    assert growth(allocate(1000), allocate(500_000)) < 5


def test_a_pin_costs_the_same_however_long_its_run_is() -> None:
    counts = PinCounts(1 << 40)
    counts.add([(5, 1)])

    def pin(blocks: int) -> Call:
        def call(i: int) -> None:
            counts.add([(1 << 20, blocks)])
            assert counts.split([(0, 1 << 36)])[1]
            assert counts.drop([(1 << 20, blocks)]) == [(1 << 20, blocks)]

        return call

    assert growth(pin(1), pin(1 << 30)) < 5


def table_of(pins: int, owner: int = 1) -> PinTable:
    table = PinTable(1 << 30)
    for i in range(1, pins + 1):
        table.insert(Pin(i, owner, None, 2, 0, 4096, abi.FOLL_PIN, [(2 * i, 1)], 1, Holder(1), 0))
    return table


def test_who_stands_in_the_way_among_many_pins() -> None:
    def ask(pins: int) -> Call:
        table = table_of(pins)

        def call(i: int) -> None:
            at = 1 + i * 7919 % pins
            assert [pin.id for pin in table.standing(2, [(2 * at, 2)])] == [at]

        return call

    assert growth(ask(1000), ask(40_000)) < 5


def test_a_close_gives_many_pins_back_at_a_steady_pace() -> None:
    """In slices, the newest first: a slice does not look through what the ones before it took."""
    took = {}
    for pins in (3000, 60_000):
        table = table_of(pins)
        began = time.process_time_ns()
        while slice_ := table.of_owner(1, 64):
            table.remove(slice_)
        took[pins] = (time.process_time_ns() - began) / pins
        assert len(table) == 0
        assert table.blocks == 0
    assert took[60_000] < 3 * took[3000]


_MEMORY = """
from daxfs.core.extents import ExtentMap

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

before, kept = own(), []
for backwards in (False, True):
    found = ExtentMap()
    for i in range(200_000):
        found.insert(400_000 - 2 * i if backwards else 2 * i, 7 + 3 * i, 1)
    kept.append(found)
print((own() - before) / 400_000)
"""


def test_memory_of_an_extent() -> None:
    """At most 200 bytes, in whatever order a file was written."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) < 100


@pytest.mark.parametrize("seed", [1, 2])
def test_an_aged_volume(tmp_path: Path, seed: int) -> None:
    """Files come, grow side by side and go, until all space was used four times over: they stay in few pieces, and at every
    moment each block has one owner, whatever is kept for files that grow."""
    image = tmp_path / "image"
    format_image(image, 48 << 20, now=NOW)
    volume = Volume.open(image, now=NOW)
    place = Core(volume)
    run = Ageing(place, Course(0.87, 4, seed))
    for step, _ in enumerate(run.steps()):
        if step % 50 == 0:
            assert volume.free == sum(count for _, count in volume.alloc.runs())
            volume.check()
    pieces = sorted(place.extents(file) for file in run.files)
    assert sum(pieces) / len(pieces) < 4, f"seed {seed}: {pieces}"
    volume.check()
    volume.close(NOW)
    assert check(image).findings == []

_PEAK = """
import sys
from daxfs.core.fsck import check
from daxfs.core.volume import Volume

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = peak()
volume = Volume.open(sys.argv[1], now=1)
volume.close(1)
assert check(sys.argv[1]).exit_code == 0
print(peak() - before)
"""


def test_memory_of_a_sparse_image_is_that_of_what_is_in_it(tmp_path: Path) -> None:
    """Mount, unmount and fsck of an empty TiB: neither memory nor the host's disk pays for what is not there."""
    image = tmp_path / "image"
    format_image(image, TIB, now=NOW)
    done = subprocess.run([sys.executable, "-c", _PEAK, image], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10, "KiB"
    assert os.stat(image).st_blocks * 512 < 16 << 20


def test_fsck_sees_what_a_replay_wrote_into_a_hole(tmp_path: Path) -> None:
    """The inode directory is read where its file has data, and where a committed transaction is about to put some."""
    image = tmp_path / "image"
    format_image(image, TIB, now=NOW)
    volume = Volume.open(image, now=NOW)
    sb, index = volume.sb, 1 << 22
    at = sb["idir_start"] * volume.block_size + 8 * index
    journal = Journal(volume.pmem, sb["journal_start"], sb["journal_blocks"], volume.block_size, TIB)
    journal.pending()
    journal._apply = lambda records: None  # type: ignore[method-assign]
    journal.commit([(at, layout.idir_word(index, volume.data_blocks.stop - 64).to_bytes(8, "little"))])
    volume.fail("the machine stops here")
    volume.close(NOW)
    assert not any(first <= at < end for first, end in written(image))
    report = check(image)
    assert [finding.text for finding in report.findings if "middle" in finding.text] == [
        "inode directory: an entry in the middle is missing"
    ]


def written(image: Path) -> list[tuple[int, int]]:
    from daxfs.core.pmem import Pmem

    pmem = Pmem(image, readonly=True)
    try:
        return list(pmem.written(0, TIB))
    finally:
        pmem.close()
