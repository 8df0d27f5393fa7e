"""The mount scan: which blocks of an image are in use, found by looking at everything that refers to a block.

Free space is what nothing refers to, so nothing can leak across a mount, and a block with two owners is seen before any harm
is done. The inode table is read by inodescan.pyx; Python runs only for inodes that have leaves or xattr blocks, and the runs
of all are put in order as arrays. What cannot be believed raises Corrupt: the caller refuses to mount and points to fsck.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from daxfs.core import layout, xattr
from daxfs.core.inode import read_leaves
from daxfs.core.inodescan import TableScan
from daxfs.errors import Corrupt

if TYPE_CHECKING:
    from daxfs.core.volume import Volume

Array = npt.NDArray[Any]

_CODES = {"I": "<u4", "Q": "<u8", "H": "<u2", "B": "u1"}
EXTENT_DTYPE = np.dtype([(f.name, _CODES[f.code]) for f in layout.EXTENT.fields])
INODE_DTYPE = np.dtype({
    "names": [f.name for f in layout.INODE.fields],
    "formats": [(EXTENT_DTYPE, layout.INLINE_EXTENTS) if f.name == "body" else _CODES.get(f.code, f"V{f.code[:-1]}")
                for f in layout.INODE.fields],
    "offsets": [layout.INODE.offset[f.name] for f in layout.INODE.fields],
    "itemsize": layout.INODE_SIZE,
})  # fmt: skip
_BATCH_CHUNKS = 2048
_BATCH_RECORDS = 1024


@dataclass
class Survey:
    """`starts`, `counts`: all runs in use, sorted. `free_inodes`: numbers that a chunk has room for, falling. `orphans`:
    nlink 0."""

    starts: Array
    counts: Array
    free_inodes: array[int]
    orphans: list[int]

    def gaps(self, blocks: int) -> tuple[Array, Array]:
        """The runs that nothing refers to."""
        ends = self.starts + self.counts
        starts = np.concatenate(([np.uint64(0)], ends))
        stops = np.concatenate((self.starts, [np.uint64(blocks)]))
        keep = stops > starts
        return starts[keep], (stops - starts)[keep]


def chunk_starts(words: Array) -> Array:
    """The first block of each chunk, out of the inode directory's entries from number 0 on. Corrupt."""
    blocks = words & np.uint64(0xFFFF_FFFF_FFFF)
    numbers = np.arange(len(words), dtype=np.uint64)
    check = np.full(len(words), crc32c(bytes(16)) & 0xFFFF, np.uint64)
    for part in range(3):  # a CRC is linear, so the check of an entry is the sum of what its 16-bit parts contribute
        for at, values in ((2 * part, numbers), (8 + 2 * part, blocks)):
            digits = values >> np.uint64(16 * part) & np.uint64(0xFFFF)
            if digits.any():
                check ^= _crc_parts(at)[digits]
    wrong = np.flatnonzero((check != words >> np.uint64(48)) | (words == 0))
    if len(wrong):
        index = int(wrong[0])
        raise Corrupt(f"inode directory: entry {index} is {'damaged' if words[index] else 'missing'}")
    return blocks


@cache
def _crc_parts(at: int) -> Array:
    """What the two bytes from `at` on add to the lower half of the CRC of 16 bytes, for each value of theirs."""
    base = crc32c(bytes(16))
    parts = np.zeros(1, np.uint64)
    for bit in range(16):
        one = crc32c((1 << (8 * at + bit)).to_bytes(16, "little")) ^ base
        parts = np.concatenate((parts, parts ^ np.uint64(one & 0xFFFF)))
    return parts


def inode_batches(volume: Volume) -> Iterator[Array]:
    """The inode table in batches of records, from inode 0 on."""
    size = volume.block_size
    per_chunk = layout.chunk_blocks(size)
    used = layout.CHUNK_INODES * layout.INODE_SIZE
    chunks = np.array(volume.chunks, dtype=np.int64)
    for first in range(0, len(chunks), _BATCH_CHUNKS):
        starts = chunks[first : first + _BATCH_CHUNKS]
        blocks = (starts[:, None] + np.arange(per_chunk)).reshape(-1)
        raw = volume.pmem.gather(blocks, size).reshape(len(starts), per_chunk * size)[:, :used]
        yield np.ascontiguousarray(raw).reshape(-1).view(INODE_DTYPE)


def survey(volume: Volume) -> Survey:
    """Look at the whole volume. Corrupt if something cannot be believed or a block has two owners."""
    runs: list[tuple[Array, Array]] = []
    per_chunk = layout.chunk_blocks(volume.block_size)
    runs.append((np.zeros(1, "<u8"), np.array([volume.sb["data_start"]], "<u8")))
    runs.append((np.array(volume.chunks, "<u8"), np.full(len(volume.chunks), per_chunk, "<u8")))
    runs.append((np.array(volume.ledger.blocks, "<u8"), np.ones(len(volume.ledger.blocks), "<u8")))
    table = TableScan()
    image = volume.pmem.reading(np.array(volume.chunks, np.int64), per_chunk, volume.block_size)
    table.look(image, array("Q", volume.chunks), 0, volume.block_size)
    runs.append((np.frombuffer(table.starts, "<u8"), np.frombuffer(table.counts, "<u8")))
    for batch in _records(volume, table.chained):
        runs += _chained_runs(volume, batch)
    starts = np.concatenate([s for s, _ in runs])
    counts = np.concatenate([c for _, c in runs])
    return _settle(volume, starts, counts, np.frombuffer(table.free, "<u8"), table.orphans.tolist())


def _records(volume: Volume, inos: Sequence[int]) -> Iterator[Array]:
    """The records of these inodes, some at a time."""
    for first in range(0, len(inos), _BATCH_RECORDS):
        places = (volume.inode_at(ino) for ino in inos[first : first + _BATCH_RECORDS])
        yield np.concatenate([np.frombuffer(volume.pmem.load(at, layout.INODE_SIZE), INODE_DTYPE) for at in places])


def _settle(volume: Volume, starts: Array, counts: Array, free_inodes: Array, orphans: list[int]) -> Survey:
    order = np.argsort(starts, kind="stable")
    starts, counts = starts[order], counts[order]
    ends = starts + counts
    wrong = np.flatnonzero(ends[:-1] > starts[1:])
    if len(wrong):
        raise Corrupt(f"block {int(starts[wrong[0] + 1])} has two owners")
    if len(ends) and (int(ends[-1]) > volume.blocks or bool((ends < starts).any())):
        raise Corrupt("a file has blocks outside the image")
    return Survey(starts, counts, array("Q", free_inodes[::-1].tobytes()), orphans)


def _chained_runs(volume: Volume, batch: Array) -> Iterator[tuple[Array, Array]]:
    view, size = volume.pmem.view, volume.block_size
    for record in batch:
        ino, generation = int(record["ino"]), int(record["generation"])
        for block, _, entries in read_leaves(view, size, volume.data_blocks, int(record["leaf"]), ino, generation):
            extents = np.frombuffer(entries, EXTENT_DTYPE)
            yield np.array([block], "<u8"), np.ones(1, "<u8")
            yield extents["physical"].astype("<u8"), extents["count"].astype("<u8")
        first = int(record["xattr_block"])
        chain = xattr.read_chain(volume.pmem.load, size, volume.data_blocks, first, ino, generation)
        blocks = [block for block, _ in chain]
        yield np.array(blocks, "<u8"), np.ones(len(blocks), "<u8")
