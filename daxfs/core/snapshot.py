"""The free-space snapshot of a clean unmount: the next mount reads it instead of scanning the inode table.

It lies in free blocks and is not marked as used anywhere: the superblock of a clean volume points to it, and the first
mount disarms that pointer before anything is allocated. If it is missing or damaged the mount scans; nothing is lost.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from daxfs.core import layout
from daxfs.core.layout import SNAPSHOT
from daxfs.errors import Corrupt, NoSpace

if TYPE_CHECKING:
    from daxfs.core.volume import Volume

Array = npt.NDArray[Any]


def store(volume: Volume) -> None:
    """Write the allocator's state into free space, and say so in `volume.sb` (which the caller stores)."""
    sb, alloc = volume.sb, volume.alloc
    runs = np.array(alloc.free.runs(), dtype="<u8").reshape(-1, 2)
    payload = runs.tobytes() + np.array(volume.free_inodes, dtype="<u8").tobytes()
    blocks = -(-(SNAPSHOT.size + len(payload)) // volume.block_size)
    sb["snapshot_start"] = sb["snapshot_blocks"] = 0
    if volume.busy_list.blocks or blocks > alloc.blocks:
        return
    place = alloc.take(blocks, volume.sb["data_start"], meta=True)
    alloc.give(place)
    if len(place) > 1:
        return
    start = place[0][0]
    try:
        volume.pmem.reserve(start * volume.block_size, blocks * volume.block_size)
    except NoSpace:
        return
    head = layout.seal(SNAPSHOT.pack(
        magic=layout.SNAPSHOT_MAGIC, crc=0, address=start, sequence=sb["sequence"] + 1, runs=len(runs),
        free_inodes=len(volume.free_inodes), payload_crc=crc32c(payload), reserved=b""))  # fmt: skip
    at = start * volume.block_size
    volume.pmem.store(at, head)
    volume.pmem.store(at + len(head), payload)
    volume.pmem.flush(at, len(head) + len(payload))
    volume.pmem.fence()
    sb["snapshot_start"], sb["snapshot_blocks"] = start, blocks


def load(volume: Volume) -> bool:
    """Fill allocator and free inodes from the snapshot of a clean volume. False if the volume must be scanned."""
    sb = volume.sb
    start, blocks = sb["snapshot_start"], sb["snapshot_blocks"]
    if sb["state"] != layout.STATE_CLEAN or start not in volume.data_blocks or not 0 < blocks <= volume.blocks - start:
        return False
    data = volume.pmem.view[start * volume.block_size : (start + blocks) * volume.block_size]
    try:
        layout.verify(data[: SNAPSHOT.size], layout.SNAPSHOT_MAGIC, "snapshot")
    except Corrupt:
        return False
    head = SNAPSHOT.unpack(data)
    count, inodes = head["runs"], head["free_inodes"]
    end = SNAPSHOT.size + 16 * count + 8 * inodes
    payload = data[SNAPSHOT.size : end]
    if head["sequence"] != sb["sequence"] or head["address"] != start or end > len(data):
        return False
    if crc32c(payload) != head["payload_crc"]:
        return False
    runs = np.frombuffer(payload, "<u8", 2 * count).reshape(-1, 2)
    if not _is_free(volume, runs[:, 0], runs[:, 1]):
        return False
    numbers = np.frombuffer(payload, "<u8", inodes, 16 * count)
    if inodes and not (numbers.min() > 0 and numbers.max() < len(volume.chunks) * layout.CHUNK_INODES):
        return False
    volume.alloc.free.load(np.ascontiguousarray(runs[:, 0], np.uint64), np.ascontiguousarray(runs[:, 1], np.uint64))
    volume.free_inodes = array("Q", numbers.tobytes())
    return True


def _is_free(volume: Volume, starts: Array, counts: Array) -> bool:
    """Whether the runs can be free space: in order, apart, within the data region, and clear of the inode table and the
    ledger. What files own only a scan would tell."""
    ends = starts + counts
    if bool((ends <= starts).any() or (ends[:-1] >= starts[1:]).any()):
        return False
    if len(starts) and (starts[0] < volume.data_blocks.start or ends[-1] > volume.blocks):
        return False
    per_chunk = layout.chunk_blocks(volume.block_size)
    taken = np.concatenate((np.array(volume.chunks, np.uint64), np.array(volume.ledger.blocks, np.uint64)))
    last = taken + np.repeat(np.array([per_chunk, 1], np.uint64), [len(volume.chunks), len(volume.ledger.blocks)])
    return bool((np.searchsorted(ends, taken, "right") == np.searchsorted(starts, last, "left")).all())
