"""Poison: blocks of the medium that have failed, and what may still be done with them (Linux: badblocks, memory_failure).

A poisoned block of a file cannot be read (Poisoned, EIO), nor be written in part, since what stays of it could not be
read. A write of the whole block clears it, as a device clears an error when the line is written anew; a truncate or a
punch takes it out of the file. A block whose last owner goes is retired instead of freed: it is nobody's and is never
handed out until somebody clears it. Poisoned metadata makes the volume read-only.

States of a poisoned block: owned or busy -> sound (by a whole-block write, or an admin), or -> retired -> free (cleared).
A free block is retired at once. Retired blocks are the fifth kind of block in (I1); they count as used.

Volatile: a mount knows what was injected into it, and forgets it at its end. The bytes of a block are left alone: a
holder that has mapped it from the image reads and writes it as before, but is told (EVENT_POISON).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from daxfs import abi
from daxfs.core import layout, scan
from daxfs.core.alloc import Run, without
from daxfs.core.events import Event
from daxfs.core.inode import Inode, read_leaves
from daxfs.core.runs import RunSet
from daxfs.errors import BadArgument, Poisoned

if TYPE_CHECKING:
    from daxfs.core.volume import Volume


class Poison:
    """All poisoned blocks of a volume; `retired` are those among them that nobody owns, `metadata` the volume's own."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.blocks = RunSet()
        self.retired = RunSet()
        self.metadata = RunSet()
        self._generation = 0  # moves when there is less poison
        self._files: dict[int, int] = {}  # inode number of a poisoned file -> generation at which it last was one

    def __bool__(self) -> bool:
        return bool(self.blocks.blocks)

    def within(self, runs: Iterable[Run]) -> list[Run]:
        """What of some runs is poisoned."""
        return [hit for start, count in runs for hit in self.blocks.within(start, count)] if self else []

    def refuse(self, at: int, length: int) -> None:
        """Poisoned if any block of a range of bytes of the image is."""
        if self:
            first = at // self._block_size
            self.refuse_runs([(first, (at + length - 1) // self._block_size - first + 1)])

    def refuse_runs(self, runs: Iterable[Run]) -> None:
        hits = self.within(runs)
        if hits:
            raise Poisoned(f"block {hits[0][0]} of the image is poisoned: write all of it anew, or punch it out")

    def holds(self, inode: Inode) -> bool:
        """Whether a file has any poisoned block."""
        seen = self._files.get(inode.ino)
        if seen is None:
            return False
        if seen != self._generation:
            if not self.within((physical, count) for _, physical, count, _ in inode.map):
                del self._files[inode.ino]
                return False
            self._files[inode.ino] = self._generation
        return True

    def add(self, first: int, count: int) -> None:
        for start, n in outside(self.blocks, (first, count)):
            self.blocks.add(start, n)

    def mark(self, ino: int) -> None:
        """This file has poisoned blocks."""
        self._files[ino] = self._generation

    def overwritten(self, runs: Iterable[Run]) -> bool:
        """Whole blocks were written anew: they are sound. Whether any of them was not."""
        hits = self.within(runs)
        for start, count in hits:
            self.blocks.remove(start, count)
        self._generation += bool(hits)
        return bool(hits)

    def retire(self, runs: list[Run]) -> list[Run]:
        """Of blocks that nobody owns any more: keep the poisoned ones; the others come back."""
        if not self:
            return runs
        for start, count in self.within(runs):
            self.retired.add(start, count)
            self._generation += 1
        return [sound for run in runs for sound in outside(self.blocks, run)]

    def clear(self, first: int, count: int) -> list[Run]:
        """These blocks are sound again; those that come back are nobody's."""
        self.blocks.remove(first, count)
        self.metadata.remove(first, count)
        self._generation += 1
        back: list[Run] = self.retired.remove(first, count)
        return back

    def check(self) -> None:
        for runs in (self.blocks, self.retired, self.metadata):
            runs.check()
            for start, count in runs.runs():
                if self.blocks.within(start, count) != [(start, count)]:
                    raise ValueError(f"run {start}+{count} is retired or bad metadata, but not poisoned")


def inject(vol: Volume, first: int, count: int) -> list[int]:
    """Poison blocks of the image; the numbers of the files that have them. Holders are told. BadArgument.

    It looks through the whole inode table, as a mount does: the price of having no map from blocks to files.
    """
    _check_range(vol, first, count)
    poison = vol.poison
    poison.add(first, count)
    found = RunSet()  # what of the range is not metadata
    for start, n in vol.alloc.free.remove(first, count):
        poison.retired.add(start, n)
    for start, n in [*poison.retired.within(first, count), *vol.busy_list.search(first, count)]:
        found.add(start, n)
    files = set()
    for ino, run in _owners(vol, first, count):
        files.add(ino)
        poison.mark(ino)
        found.add(*run)
    for start, n in outside(found, (first, count)):
        for bad in outside(poison.metadata, (start, n)):
            poison.metadata.add(*bad)
    vol.set_hot(files)
    _tell(vol, first, count)
    if poison.metadata.blocks:
        start, n = poison.metadata.runs()[0]
        vol.fail(f"metadata of the volume is poisoned (block {start}, {n} in a row)")
    return sorted(files)


def clear(vol: Volume, first: int, count: int) -> list[int]:
    """Take poison away; the bytes are what they were. The numbers of files that are sound again. A volume that has become
    read-only stays so till it is mounted anew. BadArgument."""
    _check_range(vol, first, count)
    files = {ino for ino, _ in _owners(vol, first, count)} if vol.poison.within([(first, count)]) else set()
    vol.give(vol.poison.clear(first, count))
    vol.set_hot(files)
    return sorted(files)


def _check_range(vol: Volume, first: int, count: int) -> None:
    if first < 0 or count < 1 or first + count > vol.blocks:
        raise BadArgument(f"blocks {first} to {first + count - 1} are no range of the image's {vol.blocks} blocks")


def _tell(vol: Volume, first: int, count: int) -> None:
    """Every holder of a block in the range hears which bytes of its file they are."""
    end, size = first + count, vol.block_size
    for pin in vol.pins:
        offset = pin.offset
        for start, n in pin.runs:
            low, high = max(start, first), min(start + n, end)
            if low < high and pin.owner is not None:
                hit = Event(abi.EVENT_POISON, pin.id, offset + (low - start) * size, (high - low) * size)
                vol.events.push(pin.owner, hit)
            offset += n * size


def _owners(vol: Volume, first: int, count: int) -> Iterator[tuple[int, Run]]:
    """The regular files that have blocks in a range, and which of them: (inode number, run)."""
    end, number = first + count, 0
    for batch in scan.inode_batches(vol):
        numbers = np.arange(number, number + len(batch))
        number += len(batch)
        files = (batch["mode"] & 0o170000) == stat.S_IFREG
        batch, numbers = batch[files], numbers[files]
        for i in range(layout.INLINE_EXTENTS):
            mapped = (batch["leaf"] == 0) & (batch["extents"] > i)
            yield from _touching(numbers[mapped], batch["body"][mapped][:, i], first, end)
        for record in batch[batch["leaf"] != 0]:
            ino, generation, leaf = int(record["ino"]), int(record["generation"]), int(record["leaf"])
            for _, _, entries in read_leaves(vol.pmem.view, vol.block_size, vol.data_blocks, leaf, ino, generation):
                extents = np.frombuffer(entries, scan.EXTENT_DTYPE)
                yield from _touching(np.full(len(extents), ino), extents, first, end)


def _touching(numbers: Any, extents: Any, first: int, end: int) -> Iterator[tuple[int, Run]]:
    low = np.maximum(extents["physical"], np.uint64(first))
    high = np.minimum(extents["physical"] + extents["count"], np.uint64(end))
    for i in np.flatnonzero(low < high):
        yield int(numbers[i]), (int(low[i]), int(high[i] - low[i]))


def outside(runs: RunSet, run: Run) -> list[Run]:
    """What of a run is not in the set."""
    return without(run, runs.within(*run))
