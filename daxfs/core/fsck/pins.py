"""Repair of the pin ledger: what live holders may have mapped must not be forgotten.

A damaged header is written anew where the block stands, for the last boot that mounted the volume: entries carry checksums
and addresses of their own, so those that are sound still count. A block that is somebody else's ends the chain; if it is
the first one, the ledger starts anew. An entry that makes no sense is voided.
"""

from __future__ import annotations

from daxfs import abi
from daxfs.core import layout
from daxfs.core.fsck.batch import Batch
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.mend import mended
from daxfs.core.fsck.report import Report
from daxfs.core.fsck.space import LEDGER_BLOCKS_MAX
from daxfs.core.layout import LEDGER_BLOCK, LEDGER_ENTRY
from daxfs.core.ledger import block_header
from daxfs.core.runs import RunSet
from daxfs.errors import Corrupt


def repair_ledger(image: Image, free: RunSet, batch: Batch, report: Report) -> int:
    """Walk the chain and make it one. The block that the ledger must start at: 0 if it needs a new one.

    `free`: blocks that nobody has; the ledger's own are not in it if they were sound.
    """
    block, previous, seen, covered = int(image.sb["ledger"]), 0, set[int](), 0
    while block:
        usable = block in image.data and block not in seen and not image.in_chunk(block)
        header = _header(image, block, free, report) if usable else None
        if header is None:
            if not previous:
                return 0
            batch.add([(previous * image.block_size, block_header(previous, image.sb["boot_id"]))])
            report.fix(f"pin ledger: its chain of blocks ends before block {block}, which is not one of it")
            break
        seen.add(block)
        following = int(LEDGER_BLOCK.unpack(header)["next"])
        if LEDGER_BLOCK.unpack(header)["boot_id"] == image.sb["boot_id"] and any(image.sb["boot_id"]):
            covered = _void(image, block, covered, batch, report)
        if image.pmem.load(block * image.block_size, len(header)) != header:
            batch.add([(block * image.block_size, header)])
        previous, block = block, following
    batch.commit()
    return int(image.sb["ledger"])


def _header(image: Image, block: int, free: RunSet, report: Report) -> bytes | None:
    """The header of a ledger block, put right; None if the block is not one."""
    record = image.pmem.load(block * image.block_size, LEDGER_BLOCK.size)
    better = mended(record)
    fields = LEDGER_BLOCK.unpack(better or record)
    if better is not None and (fields["magic"], fields["address"]) == (layout.LEDGER_MAGIC, block):
        if better != record:
            report.fix(f"pin ledger: a flipped bit of block {block} was put right")
        return better
    if not free.holds(block, 1):
        return None
    report.fix(f"pin ledger: the header of block {block} was written anew; its sound entries count")
    return block_header(block, image.sb["boot_id"])


def _void(image: Image, block: int, covered: int, batch: Batch, report: Report) -> int:
    """Void the entries of a block that make no sense. How many blocks all pins cover so far."""
    size = image.block_size
    for at in range(block * size + LEDGER_ENTRY.size, (block + 1) * size, LEDGER_ENTRY.size):
        record = image.pmem.load(at, LEDGER_ENTRY.size)
        try:
            layout.verify(record, layout.LEDGER_ENTRY_MAGIC, "ledger entry")
        except Corrupt:
            continue  # void, or torn before its pin was granted
        entry = LEDGER_ENTRY.unpack(record)
        start, count = int(entry["start"]), int(entry["count"])
        sane = entry["address"] == at and not int(entry["pin"]) >> 62 and not int(entry["flags"]) & abi.FOLL_GET
        if sane and start in image.data and 0 < count <= image.blocks - start and covered + count <= LEDGER_BLOCKS_MAX:
            covered += count
            continue
        batch.add([(at, bytes(8))])
        report.fix(f"pin ledger: an entry of block {block} that makes no sense was voided")
    return covered
