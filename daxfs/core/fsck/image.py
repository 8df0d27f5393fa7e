"""The image under check: a private mapping, its superblock, its journal, and the chunks of its inode table.

Nothing is written to the image: a read-only medium is a private mapping. A transaction that was committed but not
applied is replayed into it, so what is checked is what the next mount will see.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from daxfs.core import layout
from daxfs.core.fsck.report import Array, Report
from daxfs.core.fsck.superblocks import check_superblocks, choose_superblock
from daxfs.core.journal import Journal
from daxfs.core.layout import JOURNAL_HEADER
from daxfs.core.pmem import Pmem
from daxfs.errors import Corrupt

if TYPE_CHECKING:
    from daxfs.core.superblock import Superblock

_WORDS_AT_ONCE = 1 << 20


class Image:
    """`chunk_numbers` and `chunk_blocks`: the chunks of the inode table that can be read, in order of number."""

    def __init__(self, pmem: Pmem, sb: Superblock, report: Report) -> None:
        self.pmem = pmem
        self.sb = sb
        self.block_size: int = sb["block_size"]
        self.blocks: int = sb["blocks"]
        self.data = range(sb["data_start"], self.blocks)
        self.clean = sb["state"] == layout.STATE_CLEAN
        self.per_chunk = layout.chunk_blocks(self.block_size)
        check_superblocks(pmem, sb, report)
        self._replayed = _replay(pmem, sb, report)
        self.chunk_numbers, self.chunk_blocks = self._chunks(report)
        self._chunk_starts: list[int] = np.sort(self.chunk_blocks).tolist()

    def block(self, number: int) -> bytes:
        return self.pmem.load(number * self.block_size, self.block_size)

    def idir(self) -> Array:
        """The words of the inode directory. There is one for every chunk that would fit the image, so that of a large sparse
        image is large itself: `idir_used` looks at no more of it than its file has."""
        start, count = self.sb["idir_start"] * self.block_size, self.sb["idir_blocks"] * self.block_size
        words: Array = self.pmem.bytes[start : start + count].view("<u8")
        return words

    def idir_used(self) -> tuple[Array, Array]:
        """(index, word) of the words of the inode directory that are not 0."""
        words, start = self.idir(), int(self.sb["idir_start"]) * self.block_size
        end = start + 8 * len(words)
        written = [*self.pmem.written(start, end), *((max(at, start), min(to, end)) for at, to in self._replayed)]
        indexes = [np.zeros(0, np.int64)]
        for first, last in written:  # a hole of the file is zeros, and is not touched
            for at in range(first - start >> 3, last - start + 7 >> 3, _WORDS_AT_ONCE):
                indexes.append(np.flatnonzero(words[at : min(at + _WORDS_AT_ONCE, last - start + 7 >> 3)]) + at)
        used = np.unique(np.concatenate(indexes))
        return used, words[used]

    def idir_at(self, index: int) -> int:
        """Address of a word of the inode directory."""
        return int(self.sb["idir_start"]) * self.block_size + 8 * index

    def in_chunk(self, block: int) -> bool:
        """Whether a block is one of the inode table."""
        at = bisect.bisect_right(self._chunk_starts, block) - 1
        return at >= 0 and block < self._chunk_starts[at] + self.per_chunk

    def _chunks(self, report: Report) -> tuple[Array, Array]:
        numbers, blocks = [], []
        used, words = self.idir_used()
        for index, word in zip(used.tolist(), words.tolist(), strict=True):
            try:
                block = layout.idir_block(index, word)
            except Corrupt as e:
                report.error(f"{e.why}; its {layout.CHUNK_INODES} inodes are lost")
                continue
            if block not in self.data or block + self.per_chunk > self.blocks:
                report.error(f"inode directory: chunk {index} lies outside the data region")
                continue
            numbers.append(index)
            blocks.append(block)
        if len(used) and int(used[-1]) != len(used) - 1:
            report.error("inode directory: an entry in the middle is missing")
        return self._apart(np.array(numbers, np.int64), np.array(blocks, np.int64), report)

    def _apart(self, numbers: Array, blocks: Array, report: Report) -> tuple[Array, Array]:
        """Only chunks that do not overlap: so what is read stays within the size of the image."""
        order = np.argsort(blocks, kind="stable")
        close = np.diff(blocks[order]) < self.per_chunk
        bad = order[1:][close]
        report.each("inode directory: chunk {} lies on another chunk, at block {}", numbers[bad], blocks[bad])
        return np.delete(numbers, bad), np.delete(blocks, bad)


@contextmanager
def open_image(target: str | os.PathLike[str] | Pmem, report: Report) -> Iterator[Image]:
    """The image of a path (locked against mounts meanwhile), or the one that a volume has open. ImageError if it cannot
    be checked at all."""
    pmem = target.private() if isinstance(target, Pmem) else Pmem(report.path, readonly=True)
    try:
        yield Image(pmem, choose_superblock(pmem, report), report)
    finally:
        pmem.close()


def _replay(pmem: Pmem, sb: Superblock, report: Report) -> list[tuple[int, int]]:
    """Ranges (first byte, end) that a replay has changed: in a private copy the image's file does not know of them."""
    size, start, blocks = sb["block_size"], sb["journal_start"], sb["journal_blocks"]
    journal = Journal(pmem, start, blocks, size, sb["blocks"] * size)
    try:
        if JOURNAL_HEADER.unpack(pmem.load(start * size, JOURNAL_HEADER.size))["body_blocks"] != blocks - 1:
            report.error("journal header: its size is not the superblock's")
        changed = [(at, at + len(data)) for at, data in journal.pending()]
        if journal.replay():
            text = "a committed transaction waits in the journal: checked as if it were applied"
            if sb["state"] == layout.STATE_CLEAN:
                report.error(f"{text}, but the volume is marked clean")
            else:
                report.note(text)
    except Corrupt as e:
        report.error(e.why)
        return []
    return changed
