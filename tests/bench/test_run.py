"""Real runs, as short as they can be: every peer that is here, every kind of row, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daxfs.bench import rows
from daxfs.bench.peers import Fuse2fs, MinimalLL, Missing, NullFS, Tmpfs
from daxfs.bench.run import Plan, Run
from tests.mount.harness import Mounted

ROOT = Path(__file__).parents[2]
TINY = rows.Scale(seconds=0.05, rounds=1, data_bytes=1 << 20, files=100, entries=50)


@pytest.fixture
def shm(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs of this process mount their peers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("daxfs.bench.run.TMPFS", base)
    return base


def bench(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "daxfs.cli", "bench", "--json", "--history", tmp_path / "history", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def nothing_left(shm: Path) -> bool:
    mounts = Path("/proc/mounts").read_text()
    return f"{shm}/daxfs-bench" not in mounts and not list(shm.glob("daxfs-bench*"))


@pytest.mark.mount
def test_every_row_on_daxfs_and_the_minimal_server(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daxfs.bench.run.Run._pin_rows", lambda self: None)  # they are in test_pin_rows.py
    result = Run(Plan(TINY, ("daxfs", "minimal_ll"))).measure()
    assert result.missing == {}
    for samples in result.rows:
        assert samples.failures == {}, samples.row.name
        for target in ("daxfs", "minimal_ll"):
            median = samples.median(target)
            assert median is not None, samples.row.name
            assert median > 0, samples.row.name
    assert {verdict.peer for verdict in result.verdicts()} == {"minimal_ll"}
    assert set(result.memory) == set(result.targets) == {"daxfs", "minimal_ll"}
    assert nothing_left(shm)


@pytest.mark.mount
def test_the_null_file_system_beside_tmpfs_in_turn(shm: Path) -> None:
    said: list[str] = []
    plan = Plan(replace(TINY, rounds=2), ("nullfs", "tmpfs"), only="names")
    result = Run(plan, lambda what, done, total: said.append(what)).measure()
    turns = [what.removeprefix("names: ") for what in said if what.startswith("names:")]
    assert turns == ["nullfs", "tmpfs", "tmpfs", "nullfs"]
    assert result.is_daxfs is False
    for samples in result.rows:
        assert samples.failures == {}, samples.row.name
        assert [len(samples.measured(target)) for target in result.targets] == [2, 2]
    assert nothing_left(shm)


@pytest.mark.mount
def test_a_directory_of_a_mount_beside_a_peer(mount: Mounted, tmp_path: Path) -> None:
    answer = bench(
        tmp_path, mount.path, "--quick", "--rounds", "1", "--seconds", "0.05", "--only", "4k random read QD1",
        "--peers", "minimal_ll",
    )  # fmt: skip
    here = str(mount.path)
    assert (answer["subject"], answer["is_daxfs"], answer["targets"]) == (here, True, [here, "minimal_ll"])
    row = next(row for row in answer["rows"] if row["name"] == "4k random read QD1")
    assert row["median"][here] > 0
    assert row["cpu_us"][here][0] > 0  # of the daemon that serves the directory
    assert [goal["peer"] for goal in row["goals"]] == ["minimal_ll"]
    assert os.listdir(mount.path) == []


def test_any_directory_will_do(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    answer = bench(tmp_path, place, "--quick", "--rounds", "1", "--only", "create")
    assert (answer["is_daxfs"], answer["targets"]) == (False, [str(place)])
    assert [row["name"] for row in answer["rows"]] == ["create"]  # no server, no CPU of it
    assert list(place.iterdir()) == []
    assert len((tmp_path / "history").read_text().splitlines()) == 1


def test_a_peer_that_cannot_run_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    for kind, said in ((Fuse2fs, "apt-get install fuse2fs"), (MinimalLL, "apt-get install pkg-config")):
        peer = kind(tmp_path, 1 << 20)
        with pytest.raises(Missing, match=said):
            peer.start()
        peer.end()
    with pytest.raises(Missing, match="fuse2fs: fuse2fs is not installed"):
        Run(Plan(TINY, ("fuse2fs",), only="data")).measure()


@pytest.mark.mount
def test_one_cpu_is_for_both_and_ends(tmp_path: Path) -> None:
    peer, tmpfs = NullFS(tmp_path, 1 << 20), Tmpfs(tmp_path, 1 << 20)
    usual = os.sched_getaffinity(0)
    try:
        peer.start()
        assert peer.server
        with peer.on_one_cpu():
            assert os.sched_getaffinity(peer.server) == os.sched_getaffinity(0) == {max(usual)}
        assert os.sched_getaffinity(peer.server) == os.sched_getaffinity(0) == usual
        with tmpfs.on_one_cpu():
            assert os.sched_getaffinity(0) == {max(usual)}
        assert os.sched_getaffinity(0) == usual
    finally:
        peer.end()
