"""An empty volume on a small image, for tests that work below the verbs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.volume import Volume

NOW = 1_700_000_000_000_000_000


class Abort(Exception):
    """Ends a transaction that must leave nothing behind."""


@contextmanager
def fresh_volume(directory: Path, size: int = 8 << 20, block_size: int = 4096) -> Iterator[Volume]:
    path = directory / "image"
    format_image(path, size, block_size=block_size, now=NOW)
    volume = Volume.open(path, now=NOW)
    try:
        yield volume
    finally:
        volume.close(NOW)


def soil(volume: Volume) -> Volume:
    """Garbage in all free blocks: what shows without having been written is seen."""
    for start, count in volume.alloc.free.runs():
        volume.pmem.store(start * volume.block_size, b"\xee" * (count * volume.block_size))
    return volume


def new_inode(volume: Volume, mode: int) -> Inode:
    """An inode that no directory has."""
    with volume.transaction(NOW) as txn:
        return volume.new_inode(txn, mode, 0, 0, parent=1)
