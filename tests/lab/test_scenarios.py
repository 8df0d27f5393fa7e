"""Every declared scenario under every policy that it speaks of, on real mounts. `daxfs scenario show NAME` says what
it is."""

from __future__ import annotations

import re

import pytest

from daxfs.core.policy import POLICIES
from daxfs.lab import runner
from daxfs.lab.processes import Zygote
from daxfs.lab.runner import Rooms
from daxfs.lab.scenario import Scenario

pytestmark = [pytest.mark.mount, pytest.mark.root]

DECLARED = list(runner.load().values())
RUNS = [
    pytest.param(scenario, policy, id=f"{policy}-{scenario.name}")
    for policy in POLICIES
    for scenario in runner.in_order(DECLARED)
    if policy in scenario.sees
]

# Cases of the catalogue that no scenario is for, and why.
ELSEWHERE = {
    24: "collapse: daxfs has no call for it",
    25: "insert: daxfs has no call for it",
    35: "clone: a later issue",
    36: "clone: a later issue",
    37: "deduplication: a later issue",
    38: "moving extents: a later issue",
    40: "power cuts: tests of the core on the recording medium",
    41: "power cuts: tests of the core on the recording medium",
    42: "power cuts: tests of the core on the recording medium",
    44: "power cuts: tests of the core on the recording medium",
    51: "within one transaction: tests of the core",
    52: "the image is never discarded",
    67: "the exerciser of tests/mount, and the storm",
    68: "a C program: t_mmap_collision",
}


@pytest.mark.parametrize(("scenario", "policy"), RUNS)
def test_scenario(scenario: Scenario, policy: str, rooms: Rooms, zygote: Zygote) -> None:
    result = runner.run_one(scenario, policy, rooms, zygote)
    if result.outcome == runner.NOT_APPLICABLE:
        pytest.skip(result.reason)
    assert result.outcome == runner.PASS, result.reason


def test_the_catalogue_is_covered() -> None:
    covered = {int(number) for scenario in DECLARED for number in re.findall(r"\bS(\d+)\b", scenario.source)}
    assert covered | ELSEWHERE.keys() == set(range(1, 69))
    assert not covered & ELSEWHERE.keys()


def test_unsafe_shows_the_corruption(rooms: Rooms, zygote: Zygote) -> None:
    """... and the bytes."""
    (scenario,) = runner.select(runner.load(), ["corruption-2017"])
    result = runner.run_one(scenario, "unsafe", rooms, zygote)
    assert result.outcome == runner.PASS, result.reason
    assert "<new owner>" in result.log[0]
    assert "<the device was here>" in result.log[0]
