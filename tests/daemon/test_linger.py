"""When lingering pays, in a simulated world (linger_sim.c): what it does is decided by time alone, so time is made here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "daxfs" / "daemon"
REQUESTS = 10_000


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("linger") / "linger_sim"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, HERE / "linger_sim.c"], check=True)
    return program


def run(simulator: Path, scenario: str) -> dict[str, int]:
    words = subprocess.run([simulator, scenario], capture_output=True, text=True, check=True).stdout.split()
    return {name: int(number) for name, _, number in (word.partition("=") for word in words)}


def test_requests_in_quick_succession_are_met_by_spins(simulator: Path) -> None:
    did = run(simulator, "steady")
    assert did["spin_hits"] > 0.95 * REQUESTS
    assert did["turns"] == 1, "the event loop was asked although it had nothing to do"


@pytest.mark.parametrize("scenario", ["sparse", "never", "crowded"])
def test_no_spin(scenario: str, simulator: Path) -> None:
    """Requests are a millisecond apart; spin_us=0; more threads than CPUs."""
    did = run(simulator, scenario)
    assert did["spins"] == 0
    assert did["nap_hits"] > 0.99 * REQUESTS


def test_a_caller_on_the_same_cpu_is_left_to_run(simulator: Path) -> None:
    did = run(simulator, "same-cpu")
    assert did["spins"] < 0.01 * REQUESTS
    assert did["nap_hits"] > 0.99 * REQUESTS


def test_a_cpu_that_others_take_is_left_to_them(simulator: Path) -> None:
    assert run(simulator, "stolen")["spins"] < 0.01 * REQUESTS


def test_a_stream_without_a_gap_leaves_the_event_loop_its_turn(simulator: Path) -> None:
    assert run(simulator, "stream")["turns"] >= REQUESTS * 3.3 // 2000  # of 2 ms, 3.3 us each


def test_an_event_ends_the_wait(simulator: Path) -> None:
    assert run(simulator, "event")["late_us"] < 10


def test_a_nap_is_not_longer_than_the_deadline(simulator: Path) -> None:
    assert run(simulator, "deadline")["longest_nap_us"] <= 1000


def test_naps_are_short_when_events_cannot_be_heard(simulator: Path) -> None:
    assert run(simulator, "blind")["longest_nap_us"] <= 500


def test_when_all_callers_have_gone_there_is_one_nap(simulator: Path) -> None:
    did = run(simulator, "idle")
    assert did["naps"] == 1
    assert did["spun_us"] <= 100
