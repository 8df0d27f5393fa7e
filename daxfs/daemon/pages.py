"""What struct page would say: for each block of a pin or of a file its place on the image, its pins and its references.

A block's references are counted as those of a folio that has a pin count of its own: one for each pin, one for each FOLL_GET
holder, and one for the file as long as the block is the file's. So a pinned block that was truncated away has as many
references as pins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from daxfs import abi
from daxfs.core.inode import Inode
from daxfs.core.pins import Pin
from daxfs.core.volume import Volume
from daxfs.daemon.requests import OpenFile

_RECORDS = (abi.PAGE_BYTES - abi.PAGE.size) // abi.PAGE_STATE.size  # in one answer

Block = tuple[int, int, bool]  # index, place on the image, whether the file has it


def answer(volume: Volume, file: OpenFile, argument: bytes) -> bytes:
    """One page of IOC_PAGES. NoEntry if the pin is not one of this open file."""
    key, first, *_ = abi.PAGE.unpack_from(argument)
    pin = volume.pins.get(file.fh, key) if key else None
    if pin is not None:
        blocks, total = _of_pin(pin, first, volume.block_size), pin.blocks
    else:
        blocks, total = _of_file(file.inode, first), 0
    records = [_record(volume, *block) for block in islice(blocks, _RECORDS)]
    return (abi.PAGE.pack(key, first, len(records), total) + b"".join(records)).ljust(abi.PAGE_BYTES, b"\0")


def _record(volume: Volume, index: int, block: int, owned: bool) -> bytes:
    pins = volume.pins.counts.count(block)
    references = pins + volume.pins.references.count(block) + owned
    return abi.PAGE_STATE.pack(index, block, pins, references)


def _of_file(inode: Inode, logical: int) -> Iterator[Block]:
    if inode.is_file:
        for at, physical, count, _ in inode.map.extents_from(logical, _RECORDS):
            skipped = max(0, logical - at)
            for n in range(skipped, count):
                yield at + n, physical + n, True


def _of_pin(pin: Pin, first: int, block_size: int) -> Iterator[Block]:
    index = 0
    for start, count in pin.runs:
        for n in range(max(0, first - index), count):
            at = index + n
            extent = pin.inode.map.find(pin.offset // block_size + at) if pin.inode else None
            owned = extent is not None and extent[1] + (pin.offset // block_size + at - extent[0]) == start + n
            yield at, start + n, owned
        index += count
