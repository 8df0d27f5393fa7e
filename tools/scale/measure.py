"""What a row of the report is, and how its costs and memory are measured.

A cost is CPU time (user and system) of this process per call, the best of some rounds: a wall clock would measure the
machine's other users. Memory is the process's own (RssAnon): pages of the mapped image are the host's to take back.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from daxfs.core import namespace
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume

BLOCK = 4096
NOW = 1_700_000_000_000_000_000
ROOT = Caller(0, 0)
ROUNDS = 5
MANY = 100_000  # of fewer things than this the memory is not measured


@dataclass
class Row:
    """`values` by size, in `unit`. `flat`: whether they should stay as they are while the size grows."""

    name: str
    unit: str
    flat: bool = True
    values: dict[int, float] = field(default_factory=dict)

    @property
    def growth(self) -> float | None:
        """The last value against the first."""
        found = list(self.values.values())
        return found[-1] / found[0] if len(found) > 1 and found[0] else None


class Rows:
    """The rows of a group, in the order in which they first get a value."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def put(self, name: str, unit: str, size: int, value: float, *, flat: bool = True) -> None:
        self.rows.setdefault(name, Row(name, unit, flat)).values[size] = value

    def cost(self, name: str, size: int, call: Callable[[int], object], calls: int = 200) -> None:
        """CPU time of a call in µs; `call` gets a number that is new each time."""
        self.put(name, "µs", size, cpu_us(call, calls))


def cpu_us(call: Callable[[int], object], calls: int) -> float:
    best, number = float("inf"), 0
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            began = time.process_time()
            for _ in range(calls):
                call(number)
                number += 1
            best = min(best, time.process_time() - began)
    finally:
        gc.enable()
    return best / calls * 1e6


def once_us(call: Callable[[], object]) -> float:
    """CPU time of one call, in µs."""
    began = time.process_time()
    call()
    return (time.process_time() - began) * 1e6


def memory(pid: int | None = None, what: str = "RssAnon") -> int:
    """Bytes of a process's own memory."""
    with open(f"/proc/{pid or os.getpid()}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


@contextmanager
def volume(place: Path, size: int) -> Iterator[Volume]:
    """A fresh volume in an image of `place`."""
    image = place / "image"
    format_image(image, size, now=NOW)
    opened = Volume.open(image, now=NOW)
    try:
        yield opened
    finally:
        opened.close(NOW)
        image.unlink()


def new_file(vol: Volume, name: bytes) -> Inode:
    """An empty file that is open."""
    inode = namespace.create(vol, NOW, vol.root, name, 0o644, ROOT)
    inode.opens = 1
    return inode


def scattered(vol: Volume, name: bytes, extents: int) -> Inode:
    """A file of so many extents of a block each, every other block of its stretch of the image; the others are free."""
    inode = new_file(vol, name)
    with vol.transaction(NOW) as txn:
        txn.dirty(inode)
        start = txn.take_chunk(2 * extents)
        for i in range(extents):
            inode.map.insert(i, start + 2 * i, 1)
        txn.free([(start + 2 * i + 1, 1) for i in range(extents)])
        inode.size = extents * BLOCK
    return inode
