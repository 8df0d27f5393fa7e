"""Free space: which blocks nothing refers to. In memory only; the mount scan or a clean unmount's snapshot fills it.

A block is free only while it is in this set. Pinned and busy blocks never enter it, so they cannot be handed out; whatever
comes back goes through `Volume.release`, which looks at the pins. The last `reserve` blocks are for metadata alone: an
operation that gives space back may need a block first (a split extent leaf).
"""

from __future__ import annotations

from daxfs.core.runs import RunSet
from daxfs.errors import NoSpace

Run = tuple[int, int]


class Allocator:
    """`free` is the set of free blocks, `reserve` how many of them are kept for metadata."""

    def __init__(self, data_start: int, blocks: int) -> None:
        self.free = RunSet()
        self.data_start = data_start
        self.reserve = min(max(8, (blocks - data_start) // 64), 256, (blocks - data_start) // 4)
        self._cursor = data_start

    @property
    def available(self) -> int:
        """Blocks that data may still take."""
        return max(0, self.free.blocks - self.reserve)

    def take(self, count: int, goal: int = 0, *, meta: bool = False) -> list[Run]:
        """`count` blocks, in one run at the goal if possible, else nearby, else in pieces. NoSpace if there are too few."""
        if not meta and count > self.available:
            raise NoSpace("no space left on the volume")
        runs: list[Run] | None = self.free.take(count, goal or self._cursor)
        if runs is None:
            raise NoSpace("no space left on the volume, not even for metadata")
        if not goal and runs:
            self._cursor = runs[-1][0] + runs[-1][1]
        return runs

    def take_chunk(self, count: int) -> int:
        """One run of exactly `count` blocks for metadata; its start. NoSpace if no run is as long."""
        runs = self.take(count, self._cursor)
        if len(runs) > 1:
            self.give(runs)
            raise NoSpace(f"free space is too scattered: no {count} blocks in a row")
        return runs[0][0]

    def give(self, runs: list[Run]) -> None:
        self.free.add_all(runs)

    def check(self, blocks: int) -> None:
        self.free.check()
        for start, count in self.free.runs():
            if start < self.data_start or start + count > blocks:
                raise ValueError(f"free run {start}+{count} is outside the data region")
