"""The explorer is proven: every flush, fence and commit that is left out, and every seeded bug, is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from daxfs.cli.app import run
from daxfs.core import fileops, format, superblock
from daxfs.core.journal import Journal
from daxfs.core.transaction import Transaction
from daxfs.core.volume import Volume
from daxfs.lab.crash import bugs, making, repairs
from daxfs.lab.crash.bugs import BUGS, changed
from daxfs.lab.crash.calls import ALPHABET
from daxfs.lab.crash.explore import Explorer, Options, Tally
from daxfs.lab.crash.images import Limits
from daxfs.lab.crash.medium import RecordingPmem
from daxfs.lab.crash.mutants import EQUIVALENT, MKFS, MUTANTS, REPAIR, applied, hunt, sites, workload_of

from .test_cli import no_tracker_is_left  # noqa: F401 - a fixture

FEW = Options(limits=Limits(all=64, lines=16, pairs=8, random=8), inner=Limits(all=16, lines=4, pairs=4, random=4))


@pytest.mark.parametrize("name", MUTANTS)
def test_found(name: str) -> None:
    assert hunt(name, FEW)


@pytest.mark.parametrize("name", EQUIVALENT)
def test_an_equivalent_is_not_found(name: str) -> None:
    assert hunt(name, FEW) == "", "this one can be told: it belongs to the others"


def test_there_are_enough_seeded_bugs_and_each_says_what_it_is() -> None:
    assert len(BUGS) >= 12
    assert all(bug.shape and bug.name == name for name, bug in BUGS.items())
    known = {*ALPHABET, *MKFS, REPAIR, *repairs.DAMAGES}
    assert all(set(workload_of(name)) <= known for name in [*MUTANTS, *EQUIVALENT])


def test_every_site_is_a_mutant_or_has_a_reason_not_to_be() -> None:
    names = {site.name for site in sites()}
    assert len(names) == len(sites()) > 30
    assert set(EQUIVALENT) < names, "a reason for a site that is not there any more"
    assert set(MUTANTS) == (names | set(BUGS)) - set(EQUIVALENT)
    assert all(len(reason) > 20 for reason in EQUIVALENT.values())


def test_sites_are_what_the_source_says() -> None:
    lines = {(site.file, site.line): site for site in sites()}
    expected = 0
    for file in {site.file for site in sites()}:
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            code = line.partition("#")[0]
            if "pmem." in code and any(f"pmem.{method}(" in code for method in ("flush", "fence", "store_word")):
                expected += 1
                assert (file, number) in lines
    commits = [site.name for site in sites() if site.kind == "commit"]
    assert [name for name in commits if not name.startswith("fsck.")] == [
        "format.format_image.commit1", "format.format_image.commit2", "ledger.Ledger.renew.commit1",
        "transaction.Transaction.__exit__.commit1", "volume.Volume._recover.commit1", "volume.Volume.close.commit1",
    ]  # fmt: skip
    assert len(sites()) == expected + len(commits)
    assert {"journal.Journal.commit.word1", "fileops._store.flush1"} <= {site.name for site in sites()}


def test_every_site_is_reached_by_its_workload() -> None:
    """A mutant whose site is never reached would prove nothing, and an equivalent one no reason."""
    reached: set[tuple[str, int]] = set()

    def noting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            reached.add((caller.f_code.co_filename, caller.f_lineno))
            return real(*args, **kwargs)

        return call

    noted = [(RecordingPmem, name, noting(vars(RecordingPmem)[name])) for name in ("flush", "fence", "store_word")]
    store = noting(superblock.store)
    commits = [(superblock, "store", store), (format, "store", store), (Journal, "commit", noting(Journal.commit))]
    explorer = Explorer()
    for workload in {workload_of(site.name) for site in sites()}:
        reached.clear()
        with changed([*noted, *commits]):
            if workload == MKFS:
                making.explore()
            elif workload[0] == REPAIR:
                repairs.record(workload[1])
            else:
                explorer.run(workload)
        for site in sites():
            if workload_of(site.name) == workload:
                assert (site.file, site.line) in reached, site.name


def test_afterwards_the_core_is_as_before() -> None:
    def functions() -> list[Any]:
        owners = (RecordingPmem, Journal, Transaction, Volume, fileops, superblock, format)
        return [dict(vars(owner)) for owner in owners]

    before = functions()
    for name in ("journal.Journal.commit.fence1", "format.format_image.commit1", *BUGS):
        with pytest.raises(ZeroDivisionError), applied(name):
            assert functions() != before or name in BUGS
            raise ZeroDivisionError
        assert functions() == before
    with pytest.raises(KeyError), applied("no such mutant"):
        pass


def test_the_sound_core_passes_where_bugs_are_found() -> None:
    """What is found is the bug: without it the same workloads have no violation."""
    tally = Tally()
    explorer = Explorer()
    for bug in list(BUGS.values())[2::7]:
        explorer.explore(bug.workload, tally)
    assert tally.found == []
    assert tally.images > 300


@pytest.mark.parametrize("name", repairs.DAMAGES)
def test_a_repair_is_cut_short(name: str) -> None:
    images, why = repairs.explore(name)
    assert why == ""
    assert images > 10


@pytest.mark.parametrize("domain", ["adr", "eadr"])
def test_mkfs_is_cut_short(domain: str) -> None:
    images, why = making.explore(domain)
    assert why == ""
    assert images > 40


def test_an_exception_of_a_mutant_that_is_none_of_the_core_is_not_a_finding() -> None:
    broken = bugs.Bug("broken", "it cannot even run", ("create",), lambda: [(fileops, "no_such_name", None)])
    with changed([(bugs, "BUGS", {**BUGS, "broken": broken})]), pytest.raises(KeyError):
        hunt("broken")


# -- by hand: daxfs lab crash --mutant --


def test_the_command_finds_a_mutant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "crash", "--mutant", "exchange-in-two-steps", "--seed", "3", "--cores", "1", "--json"]) == 1
    (violation,) = json.loads(capsys.readouterr().out)["violations"]
    assert violation["workload"] == "rename_exchange"
    again = "daxfs lab crash --workloads rename_exchange --domain adr --seed 3 --mutant exchange-in-two-steps"
    assert violation["command"] == again


@pytest.mark.parametrize("name", ["format.format_image.flush1", "fsck.layers.Repair._ledger.flush1"])
def test_the_command_finds_a_mutant_of_mkfs_or_a_repair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "crash", "--mutant", name]) == 1
    assert capsys.readouterr().out.startswith(f"violation: {' '.join(workload_of(name))}: ")


def test_the_command_lists_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "crash", "--mutant", "list", "--json"]) == 0
    assert [mutant["name"] for mutant in json.loads(capsys.readouterr().out)] == list(MUTANTS)
    assert run(["lab", "crash", "--mutant", "list"]) == 0
    assert "rename-loses-both-names" in capsys.readouterr().out
    assert run(["lab", "crash", "--mutant", "typo"]) == 1
    assert "daxfs lab crash --mutant list" in capsys.readouterr().err
