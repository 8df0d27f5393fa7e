"""Hostile images in bulk: `python -m tools.fuzz COMMAND`, where COMMAND is

    flips       every single bit of the metadata of every seed image, turned
    mutations   --count images, each broken in one to eight ways by a seed (fuzz_mutate.py)
    replay      one case again: --state S --case N of a campaign with --seed, or --image FILE

Coverage-guided fuzzing is a program of its own: tools/fuzz_coverage.py.

Each image goes through fuzz_use.ordeal in /dev/shm. All cores, at low priority. A failure prints what was done to the image
and the command that does it again; --keep DIR keeps the images. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tools import fuzz_mutate
from tools.fuzz_image import STATES, Seed, make
from tools.fuzz_use import ordeal

MEMORY_MAX = 512 << 20  # bytes that all images of a run may add to what a process has at its start
_BATCH = 200
_STUCK_S = 600  # for a batch


@dataclass(frozen=True)
class Case:
    """One broken image: of which state, which number, how it came about."""

    state: str
    number: int
    data: bytes
    what: str


@dataclass(frozen=True)
class Failure:
    state: str
    number: int
    what: str
    trace: str

    @property
    def place(self) -> str:
        """Where it happened: failures of one place are one."""
        return "\n".join(line for line in self.trace.splitlines() if line.startswith("  File") and "daxfs" in line)[-300:]


def mutation(seed: Seed, campaign: str, number: int) -> Case:
    data, what = fuzz_mutate.mutate(seed, random.Random(f"{campaign}/{seed.state}/{number}"))
    return Case(seed.state, number, data, what)


def flip(seed: Seed, number: int) -> Case:
    at, mask = next(islice(fuzz_mutate.flips(seed), number, None))
    return _flipped(seed, number, at, mask)


def _flipped(seed: Seed, number: int, at: int, mask: int) -> Case:
    data = bytearray(seed.data)
    data[at] ^= mask
    return Case(seed.state, number, bytes(data), f"bit {mask:#04x} of byte {at}")


def try_one(case: Case, place: Path, *, brief: bool = False) -> tuple[str, Failure | None]:
    """What became of it."""
    place.write_bytes(case.data)
    try:
        return ordeal(place, brief=brief), None
    except Exception:
        return "HARMED", Failure(case.state, case.number, case.what, traceback.format_exc())


# -- campaigns --------------------------------------------------------------------------------------------------------


@functools.cache
def seed_image(state: str) -> Seed:
    with tempfile.TemporaryDirectory(prefix="daxfs-fuzz-", dir=_scratch()) as home:
        return make(state, Path(home) / "image")


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Batch:
    """A part of a campaign that one process does: cases [first, last) of a state."""

    kind: str
    campaign: str
    state: str
    first: int
    last: int

    def cases(self) -> Iterator[Case]:
        seed = seed_image(self.state)
        if self.kind == "mutations":
            yield from (mutation(seed, self.campaign, n) for n in range(self.first, self.last))
        else:
            bits = islice(fuzz_mutate.flips(seed), self.first, self.last)
            yield from (_flipped(seed, self.first + i, *bit) for i, bit in enumerate(bits))


@dataclass
class Result:
    outcomes: collections.Counter[str]
    failures: list[Failure]
    memory: int  # bytes that the process has grown


def run(batch: Batch) -> Result:
    os.nice(max(0, 10 - os.nice(0)))
    before = _memory()
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    faulthandler.dump_traceback_later(_STUCK_S, exit=True)  # stuck in compiled code, which the limit does not interrupt
    with tempfile.TemporaryDirectory(prefix="daxfs-fuzz-", dir=_scratch()) as home:
        for case in batch.cases():
            outcome, failure = try_one(case, Path(home) / "image", brief=batch.kind == "flips")
            outcomes[outcome] += 1
            if failure:
                failures.append(failure)
    faulthandler.cancel_dump_traceback_later()
    return Result(outcomes, failures, _memory() - before)


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def batches(kind: str, campaign: str, count: int, states: Sequence[str]) -> list[Batch]:
    """The states in turn. `count`: mutations in all, or at most so many flips of each state (0: all)."""
    out = []
    for state in states:
        if kind == "mutations":
            total = count // len(states)
        else:
            total = sum(8 * length for _, length in seed_image(state).metadata)
            total = min(total, count) if count else total
        out += [Batch(kind, campaign, state, first, min(first + _BATCH, total)) for first in range(0, total, _BATCH)]
    return sorted(out, key=lambda batch: batch.first)


def campaign(work: list[Batch], jobs: int, keep: Path | None) -> int:
    """Do all of it; the exit code."""
    outcomes: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    memory, began, said = 0, time.monotonic(), 0.0
    # A process for each core, renewed now and then: what is not given back must not add up to something else's failure.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=50) as pool:
        for result in pool.imap_unordered(run, work):
            outcomes += result.outcomes
            memory = max(memory, result.memory)
            for failure in result.failures:
                places[failure.place] += 1
                if places[failure.place] == 1:
                    _tell(failure, work[0], keep)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{sum(outcomes.values())} images in {said - began:.0f} s: {dict(outcomes)}", file=sys.stderr)
    seconds = time.monotonic() - began
    total = sum(outcomes.values())
    print(f"{total} images in {seconds:.0f} s ({total / seconds / jobs:.0f} per second and core): {dict(outcomes)};"
          f" at most {memory >> 20} MiB of memory in a process")  # fmt: skip
    if memory > MEMORY_MAX:
        print(f"FAILED: memory grew by more than {MEMORY_MAX >> 20} MiB")
    for place, count in places.most_common():
        print(f"FAILED {count} times:\n{place}")
    return 1 if places or memory > MEMORY_MAX else 0


def _tell(failure: Failure, batch: Batch, keep: Path | None) -> None:
    again = again_with(batch.kind, batch.campaign, failure.state, failure.number)
    print(f"\n{failure.what}\n{failure.trace}again: {again}", flush=True)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        name = f"{batch.kind}-{batch.campaign}-{failure.state}-{failure.number}"
        (keep / name).write_bytes(_case(batch.kind, batch.campaign, failure.state, failure.number).data)


def again_with(kind: str, campaign: str, state: str, number: int) -> str:
    """The command that does a case again."""
    return f"python -m tools.fuzz replay --kind {kind} --seed {campaign} --state {state} --case {number}"


def _case(kind: str, campaign: str, state: str, number: int) -> Case:
    seed = seed_image(state)
    return mutation(seed, campaign, number) if kind == "mutations" else flip(seed, number)


# -- the command ------------------------------------------------------------------------------------------------------


def replay(arguments: argparse.Namespace) -> int:
    if arguments.image:
        case = Case("file", 0, arguments.image.read_bytes(), str(arguments.image))
    else:
        case = _case(arguments.kind, arguments.seed, arguments.state, arguments.case)
    print(case.what)
    with tempfile.TemporaryDirectory(prefix="daxfs-fuzz-", dir=_scratch()) as home:
        outcome, failure = try_one(case, Path(home) / "image")
    print(failure.trace if failure else outcome)
    return int(failure is not None)


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    does: dict[str, Callable[[argparse.Namespace], int]] = {
        "flips": lambda a: campaign(batches("flips", a.seed, a.count, a.states), a.jobs, a.keep),
        "mutations": lambda a: campaign(batches("mutations", a.seed, a.count or 100_000, a.states), a.jobs, a.keep),
        "replay": replay,
    }
    for name in does:
        command = commands.add_parser(name)
        command.add_argument("--seed", default="1")
        command.add_argument("--keep", type=Path)
        if name in ("flips", "mutations"):
            command.add_argument("--count", type=int, default=0)
            command.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
            command.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
        else:
            command.add_argument("--kind", choices=("flips", "mutations"), default="mutations")
            command.add_argument("--state", choices=STATES, default="clean")
            command.add_argument("--case", type=int, default=0)
            command.add_argument("--image", type=Path)
    arguments = parser.parse_args(list(words) if words is not None else None)
    return does[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
