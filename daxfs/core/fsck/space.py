"""Who owns each block: one owner at most, and on a clean image the snapshot's free space is exactly what is left.

Everything that refers to blocks tells `Owners` its runs; memory grows with the number of runs, not with the image.
"""

from __future__ import annotations

import numpy as np
from crc32c import crc32c

from daxfs import abi
from daxfs.core import layout
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.report import Array, Report
from daxfs.core.layout import CHUNK_INODES, LEDGER_BLOCK, LEDGER_ENTRY, LEDGER_ENTRY_MAGIC, SNAPSHOT
from daxfs.errors import Corrupt

REGION, CHUNK, DATA, LEAF, XATTR, LEDGER, FREE = range(7)
_NAMES = (
    "the fixed regions", "chunk {} of the inode table", "inode {}", "the extent leaves of inode {}",
    "the xattr blocks of inode {}", "the pin ledger", "the free space of the snapshot",
)  # fmt: skip
_KIND_SHIFT = 56
LEDGER_BLOCKS_MAX = 1 << 32  # of all pins together, as Volume has it


class Owners:
    """Runs of blocks, each with the kind of its owner and the owner's number."""

    def __init__(self) -> None:
        self._runs: list[tuple[Array, Array, Array]] = []
        self._single: list[tuple[int, int]] = []  # (block, tag)

    def add(self, kind: int, starts: Array, counts: Array, numbers: Array) -> None:
        self._runs.append((starts, counts, numbers | kind << _KIND_SHIFT))

    def add_block(self, kind: int, block: int, number: int = 0) -> None:
        self._single.append((block, number | kind << _KIND_SHIFT))

    def table(self) -> tuple[Array, Array, Array]:
        """(start, end, tag) of all runs, in order of start."""
        single = np.array(self._single, np.int64).reshape(-1, 2)
        runs = [*self._runs, (single[:, 0], np.ones(len(single), np.int64), single[:, 1])]
        starts, counts, tags = (np.concatenate([run[i] for run in runs]) for i in range(3))
        order = np.argsort(starts, kind="stable")
        starts = starts[order]
        return starts, starts + counts[order], tags[order]

    def metadata(self) -> tuple[Array, Array]:
        """(start, end) of the runs that are not data of files and directories, in order."""
        starts, ends, tags = self.table()
        which = tags >> _KIND_SHIFT != DATA
        return starts[which], ends[which]

    def covered(self) -> Array:
        """What has an owner at all: runs (start, end), apart and in order."""
        starts, ends, _ = self.table()
        return merged(starts, ends)


    def settle(self, image: Image, report: Report) -> int:
        """Report every block with two owners. How many blocks nobody owns."""
        starts, ends, tags = self.table()
        reach = np.maximum.accumulate(ends)  # how far the runs up to this one go
        # Which run it is that reaches so far: the last one that ends at the maximum.
        farthest = np.maximum.accumulate(np.where(ends == reach, np.arange(len(ends)), 0))
        twice = np.flatnonzero(starts[1:] < reach[:-1]) + 1
        for i in twice.tolist()[:1000]:
            first = int(farthest[i - 1])
            count = min(int(ends[i]), int(ends[first])) - int(starts[i])
            one, two = _name(int(tags[first])), _name(int(tags[i]))
            report.error(f"blocks {int(starts[i])}+{count} have two owners: {one} and {two}")
        if len(twice) > 1000:
            report.error(f"{len(twice) - 1000} more runs of blocks have two owners")
        gaps = np.maximum(starts[1:] - reach[:-1], 0).sum() + image.blocks - reach[-1]
        return int(gaps)


def merged(starts: Array, ends: Array) -> Array:
    """The union of runs that are in order of start: (start, end), apart and in order."""
    if not len(starts):
        return np.zeros((0, 2), np.int64)
    reach = np.maximum.accumulate(ends)
    at = np.concatenate(([0], np.flatnonzero(starts[1:] > reach[:-1]) + 1))
    last = np.concatenate((at[1:], [len(starts)])) - 1
    return np.stack((starts[at], reach[last]), axis=1)


def _name(tag: int) -> str:
    return _NAMES[tag >> _KIND_SHIFT].format(tag & (1 << _KIND_SHIFT) - 1)


def add_fixed(image: Image, owners: Owners) -> None:
    """What no file can have: the fixed regions and the inode table."""
    zero = np.zeros(1, np.int64)
    owners.add(REGION, zero, np.array([image.sb["data_start"]], np.int64), zero)
    chunks = image.chunk_blocks
    owners.add(CHUNK, chunks, np.full(len(chunks), image.per_chunk, np.int64), image.chunk_numbers)


def check_space(image: Image, owners: Owners, free_inodes: Array, damaged_inodes: Array, report: Report) -> None:
    """The last step: the fixed regions, the table, the ledger, the snapshot; then everybody's blocks at once."""
    add_fixed(image, owners)
    pins = check_ledger(image, owners, report)
    report.counts["pins"] = len(pins)
    if pins:
        report.note(f"{len(pins)} runs of blocks are pinned, or were when the daemon ended")
    snapshot = _read_snapshot(image, report)
    if snapshot is None:
        free = owners.settle(image, report)
    else:
        runs, numbers = snapshot
        owners.add(FREE, runs[:, 0], runs[:, 1], np.zeros(len(runs), np.int64))
        leaked = owners.settle(image, report)
        if leaked:
            report.error(f"{leaked} blocks are neither used nor in the snapshot of free space")
        free = int(runs[:, 1].sum()) + leaked
        used = np.setdiff1d(numbers, np.concatenate((free_inodes, damaged_inodes)))
        report.each("the snapshot says that inode {} is free, which it is not", used)
        missing = len(np.setdiff1d(free_inodes, numbers))
        if missing:
            report.error(f"{missing} free inodes are missing from the snapshot")
        if len(np.unique(numbers)) != len(numbers):
            report.error("the snapshot names a free inode twice")
    report.counts.update(blocks=image.blocks, free=free, used=image.blocks - free)


def check_ledger(image: Image, owners: Owners, report: Report) -> list[tuple[int, int]]:
    """The runs of the entries of the pin ledger that may still count. Busy blocks are those that no file owns."""
    block, seen, pins = image.sb["ledger"], set[int](), list[tuple[int, int]]()
    while block:
        if block not in image.data or block in seen or image.in_chunk(block):
            report.error(f"pin ledger: the chain is broken at block {block}")
            break
        seen.add(block)
        data = image.block(block)
        try:
            layout.verify(data[: LEDGER_BLOCK.size], layout.LEDGER_MAGIC, f"ledger block {block}")
        except Corrupt as e:
            report.error(e.why)
            break
        header = LEDGER_BLOCK.unpack(data)
        if header["address"] != block:
            report.error(f"ledger block {block}: it belongs elsewhere")
            break
        owners.add_block(LEDGER, block)
        if header["boot_id"] == image.sb["boot_id"] and any(image.sb["boot_id"]):
            pins += _check_entries(image, block, data, report)
        block = int(header["next"])
    if sum(count for _, count in pins) > LEDGER_BLOCKS_MAX:
        report.error("pin ledger: its pins cover more blocks than anybody could pin")
    return pins


def _check_entries(image: Image, block: int, data: bytes, report: Report) -> list[tuple[int, int]]:
    pins = []
    for at in range(LEDGER_ENTRY.size, len(data), LEDGER_ENTRY.size):
        record = data[at : at + LEDGER_ENTRY.size]
        try:
            layout.verify(record, LEDGER_ENTRY_MAGIC, "ledger entry")
        except Corrupt:
            continue  # void, or torn before its pin was granted
        entry = LEDGER_ENTRY.unpack(record)
        start, count = int(entry["start"]), int(entry["count"])
        if entry["address"] != block * image.block_size + at:
            report.error(f"ledger block {block}: the entry at {at} belongs elsewhere")
        elif start not in image.data or not 0 < count <= image.blocks - start:
            report.error(f"ledger block {block}: pin {entry['pin']!r} covers blocks outside the data region")
        elif int(entry["pin"]) >> 62 or int(entry["flags"]) & abi.FOLL_GET:
            report.error(f"ledger block {block}: the entry at {at} is of no pin that there could be")
        else:
            pins.append((start, count))
    return pins


def _read_snapshot(image: Image, report: Report) -> tuple[Array, Array] | None:
    """(runs, free inodes) of a clean image's snapshot; None without one that can be believed."""
    sb, size = image.sb, image.block_size
    start, blocks = sb["snapshot_start"], sb["snapshot_blocks"]
    if not image.clean or not start:
        return None
    what = "snapshot of free space"
    if start not in image.data or not 0 < blocks <= image.blocks - start:
        report.error(f"{what}: it lies outside the data region")
        return None
    data = image.pmem.view[start * size : (start + blocks) * size]
    try:
        layout.verify(data[: SNAPSHOT.size], layout.SNAPSHOT_MAGIC, what)
    except Corrupt as e:
        report.error(e.why)
        return None
    header = SNAPSHOT.unpack(data)
    count, inodes = int(header["runs"]), int(header["free_inodes"])
    end = SNAPSHOT.size + 16 * count + 8 * inodes
    if (header["sequence"], header["address"]) != (sb["sequence"], start) or end > len(data):
        report.error(f"{what}: it is not the superblock's")
        return None
    payload = bytes(data[SNAPSHOT.size : end])
    if crc32c(payload) != header["payload_crc"]:
        report.error(f"{what}: bad checksum")
        return None
    runs = np.frombuffer(payload, "<u8", 2 * count).reshape(-1, 2)
    numbers = np.frombuffer(payload, "<u8", inodes, 16 * count)
    first, last = np.uint64(image.data.start), np.uint64(image.blocks)
    sane = (runs[:, 0] >= first) & (runs[:, 0] < last) & (runs[:, 1] <= last - np.minimum(runs[:, 0], last))
    limit = np.uint64(sb["idir_blocks"] * size // 8 * CHUNK_INODES)
    if not sane.all() or (numbers >= limit).any():
        report.error(f"{what}: a number in it is out of range")
        return None
    return runs.astype(np.int64), numbers.astype(np.int64)
