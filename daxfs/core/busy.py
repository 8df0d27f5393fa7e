"""Busy extents: blocks that no file owns any more but that a pin still covers, and their delayed free.

A busy block enters when a layout change takes it from its file while it is pinned, and leaves through the delayed free once
its last pin is gone; in between it belongs to nobody and is given to nobody (Hellwig 2017; xfs_extent_busy.c has the
same verbs). Extents in the list never overlap.

States of a block here: busy and pinned -> busy and due (its last pin went) -> free. The step to free is the worker's
(`Volume.free_unpinned`), so that the last unpin of a large range does not hold up the mount.
"""

from __future__ import annotations

from daxfs.core.alloc import Run
from daxfs.core.runs import RunSet
from daxfs.core.waiting import DUE, Moved, unheard


class BusyList:
    """`moved(DUE)` is called when there are more due blocks."""

    def __init__(self, moved: Moved = unheard) -> None:
        self.extents = RunSet()
        self.due = RunSet()
        self._moved = moved

    @property
    def blocks(self) -> int:
        count: int = self.extents.blocks
        return count

    def insert(self, runs: list[Run]) -> None:
        """Pinned runs that have just lost their file."""
        self.extents.add_all(runs)

    def unpinned(self, runs: list[Run]) -> None:
        """Runs of which the last pin went; those that are busy become due."""
        before = self.due.blocks
        for run in runs if self.extents.blocks else ():
            self.due.add_all(self.extents.within(*run))
        if self.due.blocks > before:
            self._moved(DUE)

    def clear(self, limit: int) -> list[Run]:
        """Take up to `limit` due runs off the list; the caller frees them."""
        runs: list[Run] = self.due.runs(0, limit)
        for start, count in runs:
            self.due.remove(start, count)
            self.extents.remove(start, count)
        return runs

    def search(self, start: int, count: int) -> list[Run]:
        """What of a run is busy."""
        found: list[Run] = self.extents.within(start, count)
        return found

    def check(self) -> None:
        self.extents.check()
        self.due.check()
        for start, count in self.due.runs():
            if self.extents.within(start, count) != [(start, count)]:
                raise ValueError(f"run {start}+{count} is due but not busy")
