"""The storm in small: nothing wrong under any policy but `unsafe`, and there it must find something.
A long one: `daxfs scenario storm --steps 1000000`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from daxfs.lab import storm
from daxfs.lab.storm_actors import BLOCK, Violation
from daxfs.lab.storm_stripes import DEVICE, MAPPERS, STRIPES, UNKNOWN, Known, value
from tests.mount.harness import daxfs

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.mark.parametrize(
    ("policy", "steps"), [("busy", 8000), ("wait", 6000), ("fail", 6000), ("lease", 6000), ("revoke", 6000)]
)
def test_storm(policy: str, steps: int, base: Path) -> None:
    report = storm.run(policy, steps)
    assert report.violations == [], f"seed {report.seed}"
    assert report.steps >= steps
    shared = ("device dma", "device pin", "mapper store", "mapper msync", "mapper write", "mapper munmap", "child _exit")
    for must in ("pin", "dma", "unpin", "truncate", "punch", "fill ENOSPC", "own read", "audit", *shared):
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


def test_the_oracle_sees_lost_stores(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without twins a page of the kernel is written back as a whole, over what the device wrote beside."""
    monkeypatch.setenv("DAXFS_TEST_TWINS", "off")
    report = storm.run("busy", 30_000)
    assert report.violations, f"seed {report.seed}: nothing found in {report.steps} steps"
    assert report.seconds < 20
    assert any("of device was" in line or "of mapper" in line for line in report.violations), report.violations


def block_of(*owners: int, version: int = 1) -> bytearray:
    """A block with what these owners stored in all their stripes."""
    block = bytearray(BLOCK)
    for owner in owners:
        for n, stripe in enumerate(STRIPES[owner]):
            block[stripe] = value(owner, n, version)
    return block


def test_stripes_divide_a_block() -> None:
    every = sorted((stripe for owner in (DEVICE, *MAPPERS) for stripe in STRIPES[owner]), key=lambda stripe: stripe.start)
    assert [stripe.start for stripe in every] == [0, *(stripe.stop for stripe in every[:-1])]
    assert every[-1].stop == BLOCK
    versions = [block_of(DEVICE, *MAPPERS, version=n) for n in range(1, 90)]
    for old, new in itertools.pairwise(versions):
        assert all(x != y for x, y in zip(old, new, strict=True))


def test_an_owner_misses_one_byte_of_any_stripe() -> None:
    """An older one, a foreign one, or zero; and what others store is not its business."""
    old, full = block_of(DEVICE, version=1), block_of(DEVICE, version=2)
    other = block_of(*MAPPERS)
    for n, stripe in enumerate(STRIPES[DEVICE]):
        known = Known(DEVICE, 0)
        known.check(bytes(BLOCK), 0, "here")
        for m in range(len(STRIPES[DEVICE])):
            known.stored(m, value(DEVICE, m, 2), 0)
        known.check(bytes(x | y for x, y in zip(full, other, strict=True)), 0, "here")
        for wrong, words in ((old[stripe.stop - 1], "an older byte"), (0, "zero"), (150, "a byte of mapper 1")):
            damaged = bytearray(full)
            damaged[stripe.stop - 1] = wrong
            with pytest.raises(Violation, match=f"byte {stripe.stop - 1} of device was .*{words}" if wrong else "byte"):
                known.check(bytes(damaged), 0, f"stripe {n}")


def test_a_layout_change_makes_zeros_but_no_older_bytes() -> None:
    known = Known(DEVICE, 0)
    for n in range(len(STRIPES[DEVICE])):
        known.stored(n, value(DEVICE, n, 2), 4)
    zero, old = bytes(BLOCK), bytes(block_of(DEVICE, version=1))
    with pytest.raises(Violation):
        known.check(zero, 4, "no change since")
    for changes in (6, UNKNOWN):
        with pytest.raises(Violation):
            known.check(old, changes, "an older byte")
        with pytest.raises(Violation):
            known.check(bytes(block_of(MAPPERS[0]))[1:] + b"\0", changes, "foreign bytes")
    known.check(zero, UNKNOWN, "while it changes")
    known.check(bytes(block_of(DEVICE, version=2))[:100], UNKNOWN, "it was still there; the rest is behind the end")
    known.check(zero, 6, "after a change")
    with pytest.raises(Violation):
        known.check(bytes(block_of(DEVICE, version=2)), 6, "zeros stay")


def test_the_command() -> None:
    report = json.loads(daxfs("scenario", "storm", "--steps", "400", "--seed", "7", "--json").stdout)
    assert (report["policy"], report["seed"], report["violations"], report["as_expected"]) == ("busy", 7, [], True)
    assert report["steps"] >= 400
