"""`daxfs lab crash`, on cores and on Dask, and the smoke: many images, none of them a violation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from distributed import LocalCluster

from daxfs.cli.app import run
from daxfs.errors import BadArgument
from daxfs.lab.crash import parallel, report
from daxfs.lab.crash.calls import ALPHABET
from daxfs.lab.crash.explore import Crash, Found, Options, Tally
from daxfs.lab.crash.parallel import Limit, tasks
from daxfs.lab.crash.reproduce import Violation

# The smoke ends with so many images, or after so long; the time is for machines that are slow, or busy.
SMOKE_IMAGES = int(os.environ.get("DAXFS_SMOKE_IMAGES", "12000"))
SMOKE_S = int(os.environ.get("DAXFS_SMOKE_S", "60"))
ENOUGH = 5000


@pytest.fixture(scope="module", autouse=True)
def no_tracker_is_left() -> Iterator[None]:
    """What multiprocessing leaves running until this process ends; others look for processes that a test left."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made.scheduler_address


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["lab", "crash", "--seconds", str(SMOKE_S), "--images", str(SMOKE_IMAGES), "--json"])
    out = capsys.readouterr().out
    found = json.loads(out)
    assert code == 0, out
    assert found["violations"] == []
    assert found["distinct"] >= min(ENOUGH, SMOKE_IMAGES), f"{found['distinct']} in {found['seconds']} s"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "crash", "--workloads", "link, mkdir+rmdir", "--seed", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] >= found["distinct"] > 100
    assert found["images_per_s_per_core"] > 0
    assert (found["workloads"], found["violations"], found["seed"], found["domain"]) == (2, [], 5, "adr")


def test_a_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "crash", "--workloads", "link", "--seed", "5", "--domain", "eadr", "--cores", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 workloads, " in out
    assert "on 1 core" in out
    assert out.splitlines()[-1] == "no violations (domain eadr, seed 5)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--domain", "dram"], ["dram", "adr, eadr"]),
        (["--workloads", "create+jump"], ["'jump'", "generated", "unlink_file"]),
        (["--workloads", ","], ["workloads"]),
        (["--workloads", "link", "--scheduler", "tcp://127.0.0.1:1"], ["tcp://127.0.0.1:1"]),
        (["--scheduler", "nonsense://"], ["nonsense://"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "DASK_TIMEOUT", "500ms")
    assert run(["lab", "crash", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_on_dask(cluster: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same campaign on a scheduler's workers finds what it finds here."""
    monkeypatch.setenv("DAXFS_DEBUG", "1")  # a failure of Dask's own shows where
    assert run(["lab", "crash", "--workloads", "link,mkdir,read", "--seed", "2", "--scheduler", cluster, "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert run(["lab", "crash", "--workloads", "link,mkdir,read", "--seed", "2", "--cores", "1", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert there["cores"] == 2
    assert (there["workloads"], there["points"], there["violations"]) == (here["workloads"], here["points"], [])
    assert there["distinct"] >= here["distinct"] > 100  # each worker crashes the recoveries that are new to it


def test_without_dask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert run(["lab", "crash", "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert "pip install distributed" in capsys.readouterr().err


def test_sets_of_workloads() -> None:
    one = list(tasks(["1"], 1))
    assert [workload for workload, _ in one] == [(name,) for name in ALPHABET]
    two = list(tasks(["2"], 1))
    assert len(two) == len(ALPHABET) ** 2
    assert all(first == 1 for _, first in two), "what the first call does is explored with sequences of one"
    assert len(list(tasks(["3"], 1))) == 5000
    endless = tasks(["link", "generated"], 1)
    assert next(endless) == (("link",), 0)
    assert len(next(endless)[0]) >= 4
    with pytest.raises(BadArgument):
        tasks(["4"], 1)


def test_a_campaign_ends_with_time_images_or_violations() -> None:
    options = Options(seed=1)
    some = parallel.run(options, tasks(["read", "link", *["unlink_short"] * 100], 1), Limit(images=100), cores=1)
    assert len(some.tally.digests) >= 100
    assert some.tally.workloads < 102
    none = parallel.run(options, tasks(["generated"], 1), Limit(seconds=0), cores=1)
    assert none.tally.workloads == 0
    tally = Tally(found=[Found(("link",), Crash(0, 0, False, {}), "why")] * parallel.FOUND_MAX)
    assert parallel.over(parallel.Campaign(options, tally=tally), Limit())


def test_violations_in_the_report() -> None:
    tally = Tally(workloads=3, images=50, digests={1, 2}, found=[Found(("link",), Crash(0, 0, False, {}), "why")] * 5)
    tally.redundant["link", "fence"] = 4
    campaign = parallel.Campaign(Options(seed=9), 2, 10.0, 5.0, tally)
    shown = Violation("link", "at the return of link", "it is gone", ("lost: inode 5, byte 0",), "daxfs lab crash ...")
    text = "\n".join(report.lines(campaign, [shown]))
    for words in (
        "violation 1: link: at the return of link: it is gone", "lost: inode 5, byte 0", "again: daxfs lab crash",
        "and 4 more violations", "2 distinct images", "10 in a second of CPU time", "fences that did nothing: link",
        "5 violations (domain adr, seed 9)",
    ):  # fmt: skip
        assert words in text
    assert report.as_json(campaign, [shown])["redundant"] == [{"call": "link", "what": "fence", "count": 4}]


def test_make_soak_runs_a_million() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert "lab crash --images 1000000" in makefile
