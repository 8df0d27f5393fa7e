"""Where the pin rows are measured: a daxfs mount of its own, on an image that is laid out before it is mounted.

A file of many extents would take as many calls to make, so the core makes it in one transaction: its extents and those of a
second file take turns on the image. Nothing is written into them, so an image of many GiB is small on tmpfs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daxfs import abi
from daxfs.bench.peers import Daxfs
from daxfs.client import calls
from daxfs.core import namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pmem import Pmem
from daxfs.core.volume import Volume

BLOCK = 4096
POLL_S = 0.002
SPARE_BYTES = 256 << 20  # for everything but the files' blocks


@dataclass(frozen=True)
class Fragmented:
    """A file of so many extents, each of so many blocks, none of them neighbours on the image."""

    extents: int
    blocks: int = 1

    @property
    def size(self) -> int:
        return self.extents * self.blocks * BLOCK


class Bed(Daxfs):
    """One mount with these files, and an empty one, `watched`, for somebody else."""

    name = "daxfs with pins"

    def __init__(self, scratch: Path, files: dict[str, Fragmented]) -> None:
        super().__init__(scratch, SPARE_BYTES + sum(2 * (file.size + file.extents * 64) for file in files.values()))
        self.files = files

    def prepare(self) -> list[str]:
        command = super().prepare()
        lay_out(self.scratch / "image", self.files)
        return command

    def path(self, name: str) -> Path:
        return self.mount / name

    def open(self, name: str) -> int:
        return os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def info(self) -> dict[str, Any]:
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            answer: dict[str, Any] = calls.report(fd, abi.REPORT_INFO)
            return answer
        finally:
            os.close(fd)

    def await_free(self) -> None:
        """Until no block is pinned or busy."""
        while (info := self.info())["busy"] or info["pinned"]:
            time.sleep(POLL_S)


class _Sparse(Pmem):
    """Blocks are taken that nobody writes: the host need not have memory for them."""

    def reserve(self, at: int, n: int) -> None:
        pass


def lay_out(image: Path, files: dict[str, Fragmented]) -> None:
    volume = Volume.open(_Sparse(image), now=time.time_ns())
    try:
        for name, file in files.items():
            _make(volume, name, file)
        _create(volume, "watched")
    finally:
        volume.close(time.time_ns())


def _create(volume: Volume, name: str) -> Inode:
    return namespace.create(volume, time.time_ns(), volume.root, name.encode(), 0o644, Caller(os.getuid(), os.getgid()))


def _make(volume: Volume, name: str, file: Fragmented) -> None:
    one, other = _create(volume, name), _create(volume, f"{name}.between")
    now, blocks = time.time_ns(), file.blocks
    with volume.transaction(now) as txn:
        txn.dirty(one)
        txn.dirty(other)
        start = txn.take_chunk(2 * file.extents * blocks)
        for logical in range(0, file.extents * blocks, blocks):
            one.map.insert(logical, start + 2 * logical, blocks)
            other.map.insert(logical, start + 2 * logical + blocks, blocks)
        one.size = other.size = file.size
