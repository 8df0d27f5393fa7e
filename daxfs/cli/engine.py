"""A DMA engine in software: it keeps writing one byte into pinned blocks and watches for any other.

What it simulates is a device that got the blocks once and never asks again. If the file system gave the blocks to
somebody else, the engine would destroy their data, and would see theirs in place of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_PIECE = 1 << 20  # bytes written and compared at a time


@dataclass
class Seen:
    """What the engine saw: bytes that were not its own, and the first of them (offset in the view, value)."""

    passes: int = 0
    foreign: int = 0
    first: tuple[int, int] | None = None


class FillEngine:
    """Fills `view` with `byte` again and again."""

    def __init__(self, view: memoryview, byte: int) -> None:
        self.seen = Seen()
        self._view = view
        self._byte = byte
        self._pattern = bytes([byte]) * min(_PIECE, len(view))

    def _pieces(self) -> range:
        return range(0, len(self._view), _PIECE)

    def _look(self, at: int) -> None:
        found = bytes(self._view[at : at + _PIECE])
        if found != self._pattern[: len(found)]:
            foreign = found.translate(None, bytes([self._byte]))
            self.seen.foreign += len(foreign)
            if self.seen.first is None:
                self.seen.first = (at + found.index(foreign[0]), foreign[0])

    def _fill(self, at: int) -> None:
        room = min(_PIECE, len(self._view) - at)
        self._view[at : at + room] = self._pattern[:room]

    def run(self, stopped: Callable[[], bool]) -> Seen:
        """Write everything once, then look and write over and over till `stopped()`; look once more at the end."""
        for at in self._pieces():
            self._fill(at)
        while not stopped():
            for at in self._pieces():
                self._look(at)
                self._fill(at)
            self.seen.passes += 1
        for at in self._pieces():
            self._look(at)
        return self.seen
