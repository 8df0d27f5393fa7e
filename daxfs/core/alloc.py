"""Free space: which blocks nothing refers to. In memory only; the mount scan or a clean unmount's snapshot fills it.

A block is free only while it is in this set. Pinned and busy blocks never enter it, so they cannot be handed out; whatever
comes back goes through `Volume.release`, which looks at the pins. The last `reserve` blocks are for metadata alone: an
operation that gives space back may need a block first (a split extent leaf).

A file that grows gets the blocks behind its last one, in a window that is kept free for it: as long as what it took so far,
within limits. So files that grow side by side stay in one piece each. A window is no more than a hint: its blocks are free
in every respect but that others are served from elsewhere while there is an elsewhere. It ends when the file is closed or
forgotten, when it grows somewhere else, when space gets low, or when somebody looks at `free`.

Whatever does not fit at its goal takes the shortest run that is long enough, and if there is none, the longest ones: large
runs stay whole for large requests, small holes are filled by small ones. Each costs a search, however many runs there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from daxfs.core.freeset import FreeSet
from daxfs.core.runs import RunSet
from daxfs.errors import NoSpace

Run = tuple[int, int]


def without(run: Run, taken: Iterable[Run]) -> list[Run]:
    """What of a run is not in these, which are in order."""
    out = []
    at, end = run[0], run[0] + run[1]
    for start, count in taken:
        if start + count <= at or start >= end:
            continue
        if start > at:
            out.append((at, start - at))
        at = start + count
    if at < end:
        out.append((at, end - at))
    return out


WINDOW_MIN, WINDOW_MAX = 64, 1024  # blocks
WINDOWS_SHARE = 4  # all windows together are at most this part of what is free


class Window(NamedTuple):
    """`blocks` from `start` on, behind the end of a file, are kept for it; `taken` is what it took since it was opened."""

    start: int
    blocks: int
    taken: int


class Allocator:
    """`reserve` is how many free blocks are kept for metadata."""

    def __init__(self, data_start: int, blocks: int) -> None:
        self.data_start = data_start
        self.reserve = min(max(8, (blocks - data_start) // 64), 256, (blocks - data_start) // 4)
        self._free = FreeSet()  # without the windows
        self._kept = RunSet()  # the windows
        self._windows: dict[int, Window] = {}  # by owner

    @property
    def free(self) -> FreeSet:
        """The set of free blocks, all of them: the windows end."""
        if self._windows:
            self._settle()
        return self._free

    @property
    def blocks(self) -> int:
        """How many blocks are free."""
        count: int = self._free.blocks + self._kept.blocks
        return count

    @property
    def available(self) -> int:
        """Blocks that data may still take."""
        return max(0, self.blocks - self.reserve)

    def runs(self) -> list[Run]:
        """All free runs, in order; those of windows apart."""
        return sorted([*self._free.runs(), *self._kept.runs()])

    def first_held(self, runs: list[Run]) -> Run | None:
        """The first of these runs of which any block is free; None if there is none."""
        return self._free.first_held(runs) or self._kept.first_held(runs)

    def take(self, count: int, goal: int = 0, *, meta: bool = False, owner: int = 0) -> list[Run]:
        """`count` blocks, in one run at the goal if possible, else in as few as there are. `owner`: the number of the file
        that grows by them, if it may grow on. NoSpace if there are too few."""
        if not meta and count > self.available:
            raise NoSpace("no space left on the volume")
        if count > self.blocks:
            raise NoSpace("no space left on the volume, not even for metadata")
        if owner and count:
            return self._grow(owner, count, goal)
        if self._windows and count > self._free.blocks:
            self._settle()
        return self._gather(count, goal)

    def take_lowest(self, count: int, *, meta: bool = False) -> list[Run]:
        """The first free blocks of the volume. NoSpace as for `take`."""
        if count > (self.blocks if meta else self.available):
            raise NoSpace("no space left on the volume")
        out: list[Run] = []
        for start, n in self.free.runs(0, count):
            if count:
                out += self._free.remove(start, min(n, count))
                count -= min(n, count)
        return out

    def take_chunk(self, count: int) -> int:
        """One run of exactly `count` blocks for metadata; its start. NoSpace if no run is as long."""
        runs = self.take(count)
        if len(runs) > 1 and self._windows:
            self.give(runs)
            self._settle()
            runs = self.take(count)
        if len(runs) > 1:
            self.give(runs)
            raise NoSpace(f"free space is too scattered: no {count} blocks in a row")
        return runs[0][0]

    def give(self, runs: list[Run]) -> None:
        self._free.add_all(runs)

    def let_go(self, owner: int) -> None:
        """A file does not grow any more: its window ends."""
        window = self._windows.pop(owner, None)
        if window is not None:
            self._end(window)

    def _end(self, window: Window) -> None:
        if window.blocks:
            self._kept.remove(window.start, window.blocks)
            self._free.add(window.start, window.blocks)

    def _settle(self) -> None:
        """All windows end."""
        for owner in list(self._windows):
            self.let_go(owner)

    def _gather(self, count: int, goal: int, ahead: int = 0) -> list[Run]:
        """Take blocks at the goal, and the others where they fit best; with up to `ahead` more in the last run."""
        out: list[Run] = []
        while count > 0:
            start, n = self._place(count, goal, ahead)
            self._free.remove(start, n)
            out.append((start, n))
            count -= n
            goal = start + n
        return out

    def _place(self, count: int, goal: int, ahead: int) -> Run:
        """The next run to take."""
        here = self._free.at(goal) if goal else 0
        if here:
            return goal, min(here, count + ahead)
        while True:
            start = self._free.best(count + ahead)
            if start is not None:
                return start, count + ahead
            if not ahead:
                if not self._windows:
                    return self._free.longest()
                self._settle()
            ahead //= 2

    def _grow(self, owner: int, count: int, goal: int) -> list[Run]:
        """Take blocks for a file, out of its window if they are to lie there, and keep a window behind them."""
        window = self._windows.get(owner, _NONE)
        taken = window.taken + count
        if window.start == goal and count < window.blocks:
            self._kept.remove(goal, count)
            self._windows[owner] = Window(goal + count, window.blocks - count, taken)
            return [(goal, count)]
        self.let_go(owner)
        ahead = min(max(WINDOW_MIN, taken), WINDOW_MAX, self.available // WINDOWS_SHARE - self._kept.blocks)
        if count > self._free.blocks:
            self._settle()
        runs = self._gather(count, goal, max(0, ahead))
        start, n = runs[-1]
        extra = sum([n for _, n in runs]) - count
        if extra:
            runs[-1] = start, n - extra
            self._kept.add(start + n - extra, extra)
        self._windows[owner] = Window(start + n - extra, extra, taken)
        return runs

    def check(self, blocks: int) -> None:
        """ValueError if the structures break a rule, or a free run lies outside the data region."""
        self._free.check()
        self._kept.check()
        windows = RunSet()
        windows.add_all([(window.start, window.blocks) for window in self._windows.values() if window.blocks])
        if windows.runs() != self._kept.runs():
            raise ValueError("the blocks kept for growing files are not those of the windows")
        for start, count in self.runs():
            if start < self.data_start or start + count > blocks:
                raise ValueError(f"free run {start}+{count} is outside the data region")
        for start, count in self._kept.runs():
            if self._free.holds(start, count):
                raise ValueError(f"free run {start}+{count} is kept for a file, and is not")


_NONE = Window(0, 0, 0)
