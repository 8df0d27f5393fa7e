"""The storm: holders with DMA, truncaters, punchers, renamers, mappers, writers and a filler at random, and an oracle.

`python -m daxfs.lab.storm --steps 1000000`, or `daxfs scenario storm`. Each process is one actor of storm_actors.py and
knows what its bytes must be: holders what they last wrote into each block that they hold, writers and the filler what
is in their files. Others share pages: a device and two processes with mappings of the mount store in the same blocks, see
storm_sharing.py. An auditor looks at free + used + busy. The first that sees a foreign byte, or misses one of its own,
writes it down and stops the run.

What must hold: no byte of another file changes, no pinned byte changes under its holder, no store into a shared page is
lost, no block is lost. Under policy `unsafe` the same run must find corruption: that is how one knows that the oracle can
see. A daemon with DAXFS_TEST_TWINS=off in its environment loses stores, and the run must find that too.

A seed repeats what each process wants to do, not how they interleave.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from daxfs import client
from daxfs.core.policy import POLICIES
from daxfs.lab import acts, storm_actors, storm_sharing
from daxfs.lab.place import Place, temporary
from daxfs.lab.processes import Died, Pending, Process, Unseen, Zygote, eventually

SIZE = 32 << 20
# wait_s: unlink and rename of a file that somebody waits for queue up in the kernel with the directory's lock, and so do
# holders that open another file there; see the scenario wait-and-directory-lock.
SETTINGS = {"lease_break_s": "0.2", "invalidate_s": "0.2", "wait_s": "1"}
HOLDERS = storm_actors.HOLDERS
CAST = (*["hold"] * HOLDERS, "shape", "shape", "write", "write", "fill", "audit", *storm_sharing.PARTS)
STALL_S = 60.0  # without one step by anybody
FINISH_S = 60.0


@dataclass
class Report:
    """`violations`: what the oracle saw, one line each; `calls`: how often which call ended how."""

    policy: str
    seed: int
    steps: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def as_expected(self) -> bool:
        return bool(self.violations) == (self.policy == "unsafe")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "as_expected": self.as_expected}

    def lines(self) -> list[str]:
        rate = self.steps / self.seconds if self.seconds else 0
        calls = ", ".join(f"{name} {count}" for name, count in sorted(self.calls.items()))
        found = self.violations[:5] or [
            "no byte of another file changed, no pinned byte changed, no store to a shared page and no block was lost"
        ]
        wanted = " (as it must be: the oracle sees)" if self.policy == "unsafe" and self.violations else ""
        return [
            f"policy {self.policy}, seed {self.seed}: {self.steps} steps in {self.seconds:.1f} s ({rate:.0f}/s)",
            f"calls: {calls}",
            *(line + wanted for line in found),
        ]


class Board:
    """A shared page: how many steps each process has made, whether to stop, and how often the layout of files changed.

    Words of 8 bytes, each written by one process alone: whoever reads one has it whole.
    """

    _SLOTS, _MARKS, _CHANGES, _IDENTITIES = 1, 64, 128, 192

    def __init__(self, path: str, create: bool = False) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._page = mmap.mmap(fd, mmap.PAGESIZE)
            self._words = memoryview(self._page).cast("Q")
        finally:
            os.close(fd)

    def set(self, slot: int, steps: int) -> None:
        self._words[self._SLOTS + slot] = steps

    @property
    def steps(self) -> int:
        return sum(self._words[self._SLOTS : self._SLOTS + len(CAST)])

    @property
    def holders_steps(self) -> float:
        """The mean of the holders'."""
        return sum(self._words[self._SLOTS : self._SLOTS + HOLDERS]) / HOLDERS

    def changes(self, file: int) -> int:
        """How often the layout of a file changed, twice; odd while it does."""
        return self._words[self._CHANGES + file]

    def identity(self, file: int) -> int:
        """How often a file was replaced by a new one of its name."""
        return self._words[self._IDENTITIES + file]

    @contextmanager
    def changing(self, file: int) -> Iterator[Callable[[], None]]:
        """The layout of a file changes inside. What it gives is called when the file has been replaced."""

        def replaced() -> None:
            self._words[self._IDENTITIES + file] += 1

        self._words[self._CHANGES + file] += 1
        try:
            yield replaced
        finally:
            self._words[self._CHANGES + file] += 1

    def mark(self, slot: int) -> None:
        """A process has come to a point that others wait for."""
        self._words[self._MARKS + slot] = 1

    def marked(self, slot: int) -> bool:
        return self._words[self._MARKS + slot] != 0

    def stop(self) -> None:
        self._words[0] = 1

    @property
    def stopped(self) -> bool:
        return self._words[0] != 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._words.release()
        self._page.close()
        os.unlink(self.path)


def run(policy: str, steps: int, seed: int | None = None) -> Report:
    """One storm on a temporary mount. Unseen if the mount ends badly."""
    seed = random.randrange(1 << 32) if seed is None else seed
    report = Report(policy, seed)
    try:
        with (
            Zygote() as zygote,
            temporary(policy, SETTINGS, size=SIZE) as place,
            Board(f"{os.path.dirname(place.path)}/board", create=True) as board,
        ):
            _play(place, zygote, board, steps, report)
    except Unseen as problem:  # how it ended matters less than what was seen before
        if not report.violations:
            raise
        report.violations.append(str(problem))
    return report


def _play(place: Place, zygote: Zygote, board: Board, steps: int, report: Report) -> None:
    clerk = zygote.process()
    blocks = clerk.do(client.info, place.path)["blocks"]
    for name in ("arena", "own", "shared"):
        clerk.do(os.mkdir, f"{place.path}/{name}")
    for name in storm_sharing.FILES:
        clerk.do(acts.create, f"{place.path}/shared/{name}", bytes(storm_sharing.BLOCKS * mmap.PAGESIZE))
    started = time.monotonic()
    cast: list[tuple[Process, Pending[storm_actors.Seen]]] = []
    for slot, role in enumerate(CAST):
        process = zygote.process()
        part = storm_actors.Part(role, slot, place.path, place.image, board.path, steps, blocks, report.seed)
        cast.append((process, process.start(storm_actors.play, part)))
    try:
        _wait(cast, board, report)
        report.steps, report.seconds = board.steps, round(time.monotonic() - started, 2)
        if not report.violations:
            eventually("nothing is busy or pinned at the end", lambda: _idle(clerk.do(client.info, place.path)), 10)
    finally:
        for process, _ in cast:
            process.end()
        clerk.end()


def _idle(info: dict[str, Any]) -> bool:
    if info["free"] + info["used"] + info["busy"] != info["blocks"] or info["failed"]:
        raise Unseen(f"free + used + busy is wrong, or the volume failed: {info}")
    return not info["busy"] and not info["pinned"]


def _wait(cast: Sequence[tuple[Process, Pending[storm_actors.Seen]]], board: Board, report: Report) -> None:
    """Until all have ended. Whoever waits in a system call when all others have ended has a wait that nobody ends."""
    calls: Counter[str] = Counter()
    left = list(cast)
    steps, moved = -1, time.monotonic()
    while left:
        for one in list(left):
            if one[1].done(0.02):
                left.remove(one)
                _take(one[1], report, calls)
                board.stop() if report.violations else None
        if board.steps != steps:
            steps, moved = board.steps, time.monotonic()
        elif time.monotonic() - moved > STALL_S:
            raise Unseen(f"no step for {STALL_S:g} s: {', '.join(pending.what for _, pending in left)[:300]}")
    report.calls = dict(calls)


def _take(pending: Pending[storm_actors.Seen], report: Report, calls: Counter[str]) -> None:
    try:
        seen = pending.result(FINISH_S)
    except (OSError, Died) as problem:
        if report.policy != "unsafe":
            raise
        report.violations.append(f"a call failed with {problem}: the device has destroyed metadata")
        return
    report.violations += seen.violations
    calls.update(seen.calls)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m daxfs.lab.storm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--policy", choices=sorted(POLICIES), default="busy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    try:
        report = run(chosen.policy, chosen.steps, chosen.seed)
    except (Unseen, Died) as problem:
        print(f"daxfs: {problem}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_json(), indent=2) if chosen.json else "\n".join(report.lines()))
    return 0 if report.as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
