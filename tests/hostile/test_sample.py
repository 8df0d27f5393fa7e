"""A sample of what `python -m tools.fuzz` does in bulk: flipped bits and random mutations, from a seed.

DAXFS_FUZZ_SEED chooses another sample. A failure names the case and the command that does it again."""

from __future__ import annotations

import os
import random
from itertools import islice
from pathlib import Path

import pytest

from tools import fuzz, fuzz_mutate
from tools.fuzz_image import STATES

SEED = os.environ.get("DAXFS_FUZZ_SEED", "1")
FLIPS, MUTATIONS = 120, 250  # of each state


def survives(case: fuzz.Case, kind: str, place: Path) -> str:
    outcome, failure = fuzz.try_one(case, place, brief=kind == "flips")
    if failure:
        pytest.fail(f"{case.what}\n{failure.trace}again: {fuzz.again_with(kind, SEED, case.state, case.number)}")
    return outcome


@pytest.mark.parametrize("state", STATES)
def test_flipped_bits(place: Path, state: str) -> None:
    seed = fuzz.seed_image(state)
    bits = sum(8 * length for _, length in seed.metadata)
    for number in sorted(random.Random(SEED).sample(range(bits), FLIPS)):
        survives(fuzz.flip(seed, number), "flips", place)


@pytest.mark.parametrize("state", STATES)
def test_mutations(place: Path, state: str) -> None:
    seed = fuzz.seed_image(state)
    outcomes = {survives(fuzz.mutation(seed, SEED, number), "mutations", place) for number in range(MUTATIONS)}
    assert outcomes >= {"mounted", "refused"}  # else the mutations are not what they should be


def test_a_case_is_the_same_again() -> None:
    seed = fuzz.seed_image("armed")
    assert fuzz.mutation(seed, "x", 5) == fuzz.mutation(seed, "x", 5)
    assert fuzz.mutation(seed, "x", 5).data != fuzz.mutation(seed, "x", 6).data
    at, mask = next(islice(fuzz_mutate.flips(seed), 1000, None))
    flipped = fuzz.flip(seed, 1000).data
    assert [i for i in range(len(flipped)) if flipped[i] != seed.data[i]] == [at]
    assert flipped[at] ^ seed.data[at] == mask
