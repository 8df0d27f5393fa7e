"""Repair of what a volume stands on: the superblock's copies, the journal, the directory of chunks.

The good copy of the superblock is written over the other one, never over itself. A journal that cannot be believed is
emptied; its header follows from the superblock. A chunk of inodes whose word in the inode directory is lost is found by
its records, which know their numbers; where none is found the word is cleared or gets a new chunk (layers.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from daxfs.core import layout, superblock
from daxfs.core.fsck.batch import Batch
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.mend import mended, mended_word
from daxfs.core.fsck.report import Array, Report, Step
from daxfs.core.fsck.superblocks import check_superblocks
from daxfs.core.journal import Journal
from daxfs.core.layout import (
    CHUNK_INODES,
    INODE_CRC_END,
    INODE_SIZE,
    JOURNAL_COMMIT_AT,
    JOURNAL_HEADER,
    TXN_HEADER,
)
from daxfs.core.pmem import Pmem
from daxfs.core.superblock import Superblock
from daxfs.errors import Corrupt

_SCAN_BYTES = 16 << 20
_MEND_BYTES_MAX = 1 << 16
_HOLES_MAX = 64


def disarm(pmem: Pmem, sb: Superblock) -> None:
    """Both copies of the superblock anew, the good one last, without the snapshot: it will not be true for long."""
    if sb["copy"] != sb["sequence"] % 2:
        sb["sequence"] += 1  # so that the next store goes to the other copy
    sb["snapshot_start"] = sb["snapshot_blocks"] = 0
    superblock.store(pmem, sb)
    superblock.store(pmem, sb)


def copies_agree(pmem: Pmem, sb: Superblock) -> bool:
    """Whether the other copy of the superblock is sound and of the same volume."""
    unheard = Report(pmem.path)
    check_superblocks(pmem, sb, unheard)
    return not unheard.errors


def open_journal(pmem: Pmem, sb: Superblock) -> Journal:
    size = sb["block_size"]
    return Journal(pmem, sb["journal_start"], sb["journal_blocks"], size, sb["blocks"] * size)


def repair_journal(pmem: Pmem, sb: Superblock, report: Report) -> Journal:
    """Apply a committed transaction, or drop one that cannot be believed. The journal is idle afterwards."""
    size, start = sb["block_size"], sb["journal_start"] * sb["block_size"]
    header = layout.seal(JOURNAL_HEADER.pack(magic=layout.JOURNAL_MAGIC, crc=0, address=start, reserved=0,
                                             body_blocks=sb["journal_blocks"] - 1))  # fmt: skip
    if pmem.load(start, len(header)) != header:
        pmem.store(start, header)
        pmem.flush(start, len(header))
        pmem.fence()
        report.fix("journal: its header was written anew")
    journal = open_journal(pmem, sb)
    word_at = start + JOURNAL_COMMIT_AT
    if pmem.load_word(word_at):
        _mend_transaction(pmem, start + size, journal.capacity, report)
    try:
        if journal.replay():
            report.fix("journal: a committed transaction was applied")
    except Corrupt as e:
        pmem.store_word(word_at, 0)
        pmem.flush(word_at, 8)
        pmem.fence()
        report.fix(f"{e.why}: the transaction was dropped")
        journal.pending()  # it takes up the sequence
    return journal


def _mend_transaction(pmem: Pmem, at: int, capacity: int, report: Report) -> None:
    length = TXN_HEADER.unpack(pmem.load(at, TXN_HEADER.size))["length"]
    if length > min(capacity, _MEND_BYTES_MAX):
        return
    record = pmem.load(at, TXN_HEADER.size + length)
    better = mended(record)
    if better is None or better == record:
        return
    byte = next(i for i in range(len(record)) if record[i] != better[i])
    pmem.store(at + byte, better[byte : byte + 1])
    pmem.flush(at + byte, 1)
    pmem.fence()
    report.fix("journal: a flipped bit of the committed transaction was put right")


# -- chunks -------------------------------------------------------------------------------------------------------------


def missing_chunks(image: Image, foreign: Iterable[int] = (), end: int = 0) -> Array:
    """Numbers below `end` or the last word of the inode directory that have no chunk that can be read."""
    used, _ = image.idir_used()
    end = min(max(1, end, int(used[-1]) + 1 if len(used) else 1), len(image.idir()))
    found = np.setdiff1d(image.chunk_numbers, np.array(list(foreign), np.int64))
    missing: Array = np.setdiff1d(np.arange(end), found)
    return missing


def find_chunks(image: Image, missing: Array, owned: Array, batch: Batch, report: Report, step: Step) -> int:
    """Look for the chunks of these numbers, and put them into the inode directory. How many were found.

    First at the blocks that a flipped bit of the word may have meant, then in the whole image. `owned`: runs (start, end)
    of blocks that inodes have; no chunk is looked for there, where a file may hold what looks like one.
    """
    words = image.idir()
    taken = image.chunk_blocks[~np.isin(image.chunk_numbers, missing)]
    found: dict[int, int] = {}
    damaged = missing[words[missing] != 0]
    for index, word in zip(damaged.tolist(), words[damaged].tolist(), strict=True):
        for block in (*mended_word(index, word), word & 0xFFFF_FFFF_FFFF):
            if index not in found and _valid_slots(image, index, block):
                found[index] = block
    left = np.setdiff1d(missing, np.array(list(found), np.int64))
    if len(left):
        _search(image, left, found, owned, step)
    used, count = _Places(image, taken), 0
    for index, block in sorted(found.items()):
        if used.add(block):
            batch.add([(image.idir_at(index), layout.idir_word(index, block).to_bytes(8, "little"))])
            report.fix(f"inode directory: chunk {index} was found again, at block {block}")
            count += 1
    batch.commit()
    return count


def holes_and_tail(numbers: Array, missing: Array) -> tuple[Array, Array]:
    """Which of the missing numbers get a chunk because others follow, and from which of all on the words are cleared.

    Chunks are made one after another: one that stands behind far more holes than there are chunks is forged.
    """
    before = np.arange(len(numbers))  # chunks before each
    honest = np.flatnonzero(numbers - before <= before + _HOLES_MAX)
    end = int(numbers[honest[-1]]) + 1 if len(honest) else 1
    return missing[missing < end], np.concatenate((missing[missing >= end], numbers[numbers >= end]))


class _Places:
    """Chunks that do not overlap."""

    def __init__(self, image: Image, starts: Array) -> None:
        self._size = image.per_chunk
        self._starts = set(starts.tolist())

    def add(self, start: int) -> bool:
        free = self._starts.isdisjoint(range(start - self._size + 1, start + self._size))
        if free:
            self._starts.add(start)
        return free


def _valid_slots(image: Image, index: int, block: int) -> int:
    """How many sound records of a chunk's inodes lie at a block; 0 if more records of others do."""
    if block not in image.data or block + image.per_chunk > image.blocks:
        return 0
    data = image.pmem.load(block * image.block_size, CHUNK_INODES * INODE_SIZE)
    valid = foreign = 0
    for slot in range(CHUNK_INODES):
        record = data[slot * INODE_SIZE : (slot + 1) * INODE_SIZE]
        ino = int.from_bytes(record[8:16], "little")
        if record[:4] == layout.INODE_MAGIC.to_bytes(4, "little") and ino != index * CHUNK_INODES + slot:
            foreign += 1
        sound = layout.checksum(record, end=INODE_CRC_END) == int.from_bytes(record[4:8], "little")
        valid += sound and ino == index * CHUNK_INODES + slot
    return valid if valid > foreign else 0


def _search(image: Image, missing: Array, found: dict[int, int], owned: Array, step: Step) -> None:
    """Go through the whole data region for records of these chunks; the place with the most of them wins."""
    size, per_slot = image.block_size, INODE_SIZE // 4
    wanted = missing.astype(np.uint64)
    at_once = _SCAN_BYTES // size
    places: dict[int, tuple[int, int]] = {}  # index -> (sound records, block)
    for first, end in image.pmem.written(image.data.start * size, image.blocks * size):
        for block in range(first // size, -(-end // size), at_once):
            step("chunks", block, image.blocks)
            count = min(at_once, image.blocks - block)
            words = image.pmem.gather(np.arange(block, block + count), size).reshape(-1).view("<u4").reshape(-1, per_slot)
            slots = np.flatnonzero(words[:, 0] == layout.INODE_MAGIC)
            ino = words[slots, 2].astype(np.uint64) | words[slots, 3].astype(np.uint64) << np.uint64(32)
            address = slots * INODE_SIZE + block * size - (ino % CHUNK_INODES).astype(np.int64) * INODE_SIZE
            ours = np.isin(ino // CHUNK_INODES, wanted) & (address % size == 0)
            pairs = np.unique(np.stack([(ino[ours] // CHUNK_INODES).astype(np.int64), address[ours] // size]), axis=1)
            for index, start in pairs.T.tolist():
                if _overlaps(owned, start, start + image.per_chunk):
                    continue
                records = _valid_slots(image, index, start)
                if records > places.get(index, (0, 0))[0]:
                    places[index] = records, start
    found.update((index, block) for index, (_, block) in places.items())


def _overlaps(runs: Array, start: int, end: int) -> bool:
    at = int(np.searchsorted(runs[:, 0], end)) - 1
    return at >= 0 and bool(runs[at, 1] > start)
