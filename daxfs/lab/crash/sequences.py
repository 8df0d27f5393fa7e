"""Which sequences of calls are explored: all short ones, a sample of the next length, and long random ones.

A sequence is a tuple of names of calls.ALPHABET. The same arguments give the same sequences on every machine, so a seed
and a position are enough to find one again. `shrink` makes a failing sequence as short as it can be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice, product

from daxfs.lab.crash.calls import ALPHABET

Sequence = tuple[str, ...]

SAMPLED_LENGTH, SAMPLED = 3, 5000
_SWARM = 12  # calls that a generated sequence is made of


def exhaustive(length: int) -> Iterator[Sequence]:
    """All sequences of a length, in the order of the alphabet."""
    return product(ALPHABET, repeat=length)


def sampled(length: int, count: int, seed: int) -> Iterator[Sequence]:
    """`count` different sequences of a length, drawn evenly from all. Fewer if there are no more."""
    names = tuple(ALPHABET)
    total = len(names) ** length
    rng = random.Random(f"sampled {length} {seed}")
    for number in rng.sample(range(total), min(count, total)):
        sequence = []
        for _ in range(length):
            number, letter = divmod(number, len(names))
            sequence.append(names[letter])
        yield tuple(sequence)


def generated(seed: int, shortest: int = 4, longest: int = 12) -> Iterator[Sequence]:
    """Random sequences without end. Each is made of a few calls only, drawn anew for it (swarm testing, Groce 2012), so
    that these meet again and again."""
    names = tuple(ALPHABET)
    rng = random.Random(f"generated {seed}")
    while True:
        swarm = rng.sample(names, min(_SWARM, len(names)))
        yield tuple(rng.choices(swarm, k=rng.randint(shortest, longest)))


def shrink(sequence: Sequence, fails: Callable[[Sequence], bool]) -> Sequence:
    """The shortest sequence found that still fails, by leaving out calls: longest pieces first, until none can go."""
    piece = len(sequence)
    while piece:
        at = 0
        while at < len(sequence):
            shorter = sequence[:at] + sequence[at + piece :]
            if shorter and fails(shorter):
                sequence = shorter
            else:
                at += piece
        piece //= 2
    return sequence


def campaign(seed: int, longer: int | None = None) -> Iterator[Sequence]:
    """What a whole run explores: lengths 1 and 2 exhausted, a sample of length 3, then `longer` generated ones."""
    yield from exhaustive(1)
    yield from exhaustive(2)
    yield from sampled(SAMPLED_LENGTH, SAMPLED, seed)
    yield from islice(generated(seed), longer)
