"""The storm in small: nothing wrong under any policy but `unsafe`, and there it must find something.
A long one: `daxfs scenario storm --steps 1000000`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daxfs.lab import storm
from tests.mount.harness import daxfs

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.mark.parametrize(
    ("policy", "steps"), [("busy", 8000), ("wait", 6000), ("fail", 6000), ("lease", 6000), ("revoke", 6000)]
)
def test_storm(policy: str, steps: int, base: Path) -> None:
    report = storm.run(policy, steps)
    assert report.violations == [], f"seed {report.seed}"
    assert report.steps >= steps
    for must in ("pin", "dma", "unpin", "truncate", "punch", "fill ENOSPC", "own read", "audit"):
        assert report.calls.get(must), f"no {must}: {report.calls}"
    if policy == "fail":
        assert report.calls.get("truncate ETXTBSY") or report.calls.get("punch ETXTBSY")
    if policy == "busy":
        assert report.calls["busy blocks at most"] > 0


def test_the_oracle_sees(base: Path) -> None:
    """Policy `unsafe` is the bug of 2017; within a few hundred steps somebody's bytes are not his."""
    report = storm.run("unsafe", 20_000)
    assert report.violations, f"seed {report.seed}: nothing found in {report.steps} steps"
    assert report.steps < 20_000
    assert report.as_expected


def test_the_command() -> None:
    report = json.loads(daxfs("scenario", "storm", "--steps", "400", "--seed", "7", "--json").stdout)
    assert (report["policy"], report["seed"], report["violations"], report["as_expected"]) == ("busy", 7, [], True)
    assert report["steps"] >= 400
