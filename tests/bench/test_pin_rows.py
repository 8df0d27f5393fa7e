"""The benchmark's own code, at a scale that measures nothing: what is compared is really done, and what is said follows."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daxfs import abi
from daxfs.bench import pins
from daxfs.bench.bed import Bed, Fragmented
from daxfs.bench.pins import Cell, PinRow, PinRows, PinScale
from daxfs.bench.result import Result
from daxfs.client import calls
from daxfs.core.volume import Volume

TINY = PinScale(extents=(1, 4, 256), blocks=256, few=3, many=40, busy=20, calls=40)
ROOT = Path(__file__).parents[2]


def test_a_laid_out_image_is_sound_and_as_fragmented_as_said(tmp_path: Path) -> None:
    bed = Bed(tmp_path, {"one": Fragmented(1, 64), "many": Fragmented(300)})
    bed.mount.mkdir(parents=True)
    bed.prepare()
    volume = Volume.open(bed.scratch / "image", now=1)
    try:
        volume.check()
        by_name = {name: volume.inode(entry) for name, entry in _entries(volume).items()}
        for name, file in bed.files.items():
            assert len(by_name[name].map.runs(0, 1 << 40)) == file.extents
            assert by_name[name].size == by_name[name].blocks * 4096 == file.size
    finally:
        volume.close(2)


def _entries(volume: Volume) -> dict[str, int]:
    from daxfs.core import namespace

    names = ("one", "many")
    found = {name: namespace.lookup(volume, volume.root, name.encode()) for name in names}
    return {name: inode.ino for name, inode in found.items() if inode is not None}


@pytest.mark.mount
def test_every_row_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = PinRows(TINY)
    rows.measure(tmp_path / "first")
    rows.measure(tmp_path / "second")
    for row in rows.rows:
        assert len(row.cells) == 2, row.name
        assert row.seconds > 0, row.name
        assert (row.ratio is not None) == bool(row.beside), row.name
    assert not [mount for mount in Path("/proc/mounts").read_text().splitlines() if str(tmp_path) in mount]
    json.dumps(Result("daxfs", ["daxfs"], [], pins=rows.rows).as_dict())


@pytest.mark.mount
def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    rows = PinRows(TINY, "truncate")
    rows.measure(tmp_path)
    assert [row.name for row in rows.rows if row.cells] == [row.name for row in PinRows(TINY).rows if "truncate" in row.name]
    nothing = PinRows(TINY, "no such row")
    nothing.measure(tmp_path / "never made")
    assert not (tmp_path / "never made").exists()


@pytest.mark.mount
def test_the_two_sides_of_a_round_trip(tmp_path: Path) -> None:
    """PIN and UNPIN succeed and leave no pin; the empty ioctl reaches the daemon and is refused there."""
    bed = Bed(tmp_path, {"one": Fragmented(1, 4)})
    try:
        bed.start()
        fd = bed.open("one")
        before = calls.report(fd, abi.REPORT_INFO)["requests"]
        pins.pin_and_unpin(fd, 10)
        pins.empty_ioctls(fd, 10)
        after = calls.report(fd, abi.REPORT_INFO)
        assert sum(after["requests"][way] - before[way] for way in ("quick", "raw")) >= 30
        assert after["pinned"] == 0
        with pytest.raises(calls.PinError) as refused:
            calls._call(fd, pins.EMPTY, bytearray(abi.PIN.size))
        assert refused.value.errno == errno.ENOTTY
        os.close(fd)
    finally:
        bed.end()


def test_goals_follow_from_the_rounds() -> None:
    row = PinRow("some", "something", 1.3, cells=[Cell(2, 1), Cell(1, 1), Cell(1.2, 1)])
    assert (row.ratio, row.met) == (1.2, True)
    row.cells.append(Cell(3, 1))
    row.cells.append(Cell(3, 1))
    assert (row.ratio, row.met) == (2, False)
    long = PinRow("long", stall_most=0.01, cells=[Cell(1, stall=0.02), Cell(1, stall=0.005), Cell(1, stall=0.004)])
    assert (long.stall, long.met) == (0.005, True)
    assert PinRow("without a goal", cells=[Cell(1)]).met is None


@pytest.mark.mount
def test_the_command_measures_a_row(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "daxfs.cli", "bench", "--quick", "--rounds", "1", "--only", "load 4k"]
    command += ["--peers", "daxfs", "--json", "--history", str(tmp_path / "history")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)["pins"]] == ["load 4k"]
