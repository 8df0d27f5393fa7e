"""The lab itself: that it can fail, the command line, a person's own scenarios, somebody's mount."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from daxfs.lab import acts, naive, runner
from daxfs.lab.course import How, Sees, breaks, case, truncate
from daxfs.lab.processes import Died, Unseen, Zygote
from daxfs.lab.runner import Rooms
from daxfs.lab.scenario import SCENARIOS, Lab, Scenario, story
from tests.conftest import Maker
from tests.mount.harness import daxfs

pytestmark = [pytest.mark.mount, pytest.mark.root]

OWN = Path(__file__).parent / "own_scenarios.py"
COLUMNS = {"name", "policy", "outcome", "errno", "seconds", "reason", "log"}


def outcome(scenario: Scenario, policy: str, rooms: Rooms, zygote: Zygote) -> tuple[str, str]:
    del SCENARIOS[scenario.name]  # it is only for this test
    result = runner.run_one(scenario, policy, rooms, zygote)
    return result.outcome, result.reason


@pytest.mark.parametrize(
    ("policy", "sees", "why"),
    [
        ("unsafe", breaks(1)["busy"], "busy blocks while the pins are held: 0 instead of 1"),
        ("unsafe", Sees(How.AT_ONCE), "as its holder sees it|pinned blocks that were given away"),
        ("busy", breaks(1)["unsafe"], "not within 3 s: the blocks are freed"),
        ("busy", breaks(1)["wait"], "did not wait"),
        ("busy", breaks(1)["fail"], "instead of ETXTBSY"),
        ("busy", breaks(1)["revoke"], "no event came"),
        ("fail", breaks(1)["busy"], "failed with ETXTBSY"),
        ("busy", Sees(How.AT_ONCE, 2), "1 instead of 2"),
    ],
)
def test_a_scenario_can_fail(policy: str, sees: Sees, why: str, rooms: Rooms, zygote: Zygote) -> None:
    """A wrong expectation is not met: policies are told apart, and a block that is given away is seen."""
    import re

    wrong = case("wrong", "wrong", source="none", call=truncate(0), sees={policy: sees})
    found, reason = outcome(wrong, policy, rooms, zygote)
    assert found == runner.FAIL
    assert re.search(why, reason)


def test_a_change_of_other_files_is_seen(rooms: Rooms, zygote: Zygote) -> None:
    @story(
        "wrong", "a file changes that nobody was told to change", source="none", pins="nobody", call="write", sees="failure"
    )
    def wrong(lab: Lab) -> None:
        lab.clerk.do(acts.write, lab.path("W"), 4096 * 3 + 7, b"!")

    found, reason = outcome(wrong, "busy", rooms, zygote)
    assert found == runner.FAIL
    assert "W, which nobody was told to change: byte 12295 (block 3): b'!" in reason


def test_processes(zygote: Zygote) -> None:
    process = zygote.process()
    assert process.do(os.getpid) == process.pid
    with pytest.raises(FileNotFoundError):
        process.do(os.unlink, "/nowhere/at/all")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        process.do(divmod, 1, 0)
    waiting = process.start(acts.receive_file, b"\0daxfs-test-of-the-lab")
    with pytest.raises(Unseen, match=r"receive_file.* did not return within 0\.05 s"):
        waiting.result(0.05)
    process.kill()
    with pytest.raises(Died):
        waiting.result(2)
    process.end()


def test_the_naive_wait_deadlocks() -> None:
    _, way = naive.explore(naive.DESIGNS["naive"])
    assert way == ["GUP faults on page A and refers to it", "punch takes the lock"]
    states, way = naive.explore(naive.DESIGNS["daxfs"])
    assert way is None
    assert states > 5


def test_the_matrix_as_json() -> None:
    done = daxfs("scenario", "run", "truncate", "wait-limit", "--policy", "fail,lease", "--json")
    cells = json.loads(done.stdout)
    assert all(set(cell) == COLUMNS for cell in cells)
    assert {(cell["name"], cell["policy"]): (cell["outcome"], cell["errno"]) for cell in cells} == {
        ("truncate", "fail"): ("pass", "ETXTBSY"),
        ("truncate", "lease"): ("pass", ""),
        ("wait-limit", "fail"): ("n/a", ""),
        ("wait-limit", "lease"): ("n/a", ""),
    }
    assert all(bool(cell["reason"]) == (cell["outcome"] == "n/a") for cell in cells)


def test_on_somebodys_mount(make_mount: Maker) -> None:
    """Policies are set file by file; what the mount lacks is not applicable; nothing is left behind."""
    mounted = make_mount(size="64M")
    names = ["truncate", "corruption-2017", "daemon-dies", "pins-max"]
    done = daxfs("scenario", "run", *names, "--policy", "busy,fail,unsafe", "--mount", mounted.path, "--json", check=False)
    outcomes = {(cell["name"], cell["policy"]): cell["outcome"] for cell in json.loads(done.stdout)}
    for policy in ("busy", "fail", "unsafe"):
        assert outcomes["truncate", policy] == "pass"
        assert outcomes["corruption-2017", policy] == "pass"
        assert outcomes["daemon-dies", policy] == outcomes["pins-max", policy] == "n/a"
    assert os.listdir(mounted.path) == []
    assert mounted.info()["busy"] == 0


def test_somebodys_mount_has_the_options_that_it_has(make_mount: Maker) -> None:
    """What a scenario needs is compared with the mount's settings, of which `info` tells."""
    mounted = make_mount(size="32M", options="longterm=deny,wait_s=1.0,pins_max=0")
    assert mounted.info()["settings"] == {
        "policy": "busy", "longterm": "deny", "wait_s": 1.0, "lease_break_s": 45.0, "lease_then": "fail",
        "invalidate_s": 5.0, "enospc_wait_s": 0.0, "pins_max": 0,
    }  # fmt: skip
    names = ["longterm-deny", "wait-limit", "longterm-lease"]
    done = daxfs("scenario", "run", *names, "--policy", "busy,wait", "--mount", mounted.path, "--json", check=False)
    cells = {(cell["name"], cell["policy"]): cell for cell in json.loads(done.stdout)}
    assert cells["longterm-deny", "busy"]["outcome"] == cells["wait-limit", "wait"]["outcome"] == "pass", cells
    assert cells["longterm-lease", "busy"]["reason"] == "it needs a mount with -o longterm=lease"


def test_a_persons_own_scenarios() -> None:
    done = daxfs("scenario", "run", "own-case", "own-story", "--file", OWN, "--policy", "busy", "--json", check=False)
    cells = {cell["name"]: cell for cell in json.loads(done.stdout)}
    assert cells["own-case"]["outcome"] == "pass", cells
    assert cells["own-story"]["outcome"] == "fail", cells
    assert cells["own-story"]["reason"] == "the moon is not made of cheese"
    assert done.returncode == 1
    listed = json.loads(daxfs("scenario", "list", "own-case", "own-story", "--file", OWN, "--json").stdout)
    assert [one["name"] for one in listed] == ["own-case", "own-story"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["run", "nonsense"], 1, "no scenario 'nonsense'"),
        (["run", "truncat"], 1, "truncate"),
        (["run"], 2, "--all"),
        (["run", "truncate", "--policy", "maybe"], 1, "unknown policy 'maybe'"),
        (["run", "truncate", "--mount", "/"], 1, "not on a daxfs mount"),
        (["list", "--file", "/nowhere.py"], 1, "no scenario file"),
        (["show", "nonsense"], 1, "no scenario"),
    ],
)
def test_what_cannot_be_run(words: list[str], code: int, text: str) -> None:
    done = daxfs("scenario", *words, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_person_sees_what_a_scenario_is() -> None:
    shown = daxfs("scenario", "show", "truncate").stdout
    assert "fails, nothing changed (ETXTBSY)" in shown
    assert "Hellwig and Kara" in shown
    assert "corruption-2017" in daxfs("scenario", "list").stdout
