"""What the pin tests share: file A of 8 distinct blocks on a fresh mount, a holder P, and questions about both."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from daxfs import client
from tests.mount import syscalls
from tests.mount.harness import Mounted, eventually
from tests.mount.holder import Holder

BLOCK = 4096
PUNCH = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE


def pattern(block: int, seed: int = 0) -> bytes:
    return bytes((i * 3 + block * 17 + seed * 101) % 251 + 1 for i in range(BLOCK))


DATA = b"".join(map(pattern, range(8)))


class Case:
    """File A of 8 distinct blocks on a fresh mount, a holder P, and what to ask about them."""

    def __init__(self, mount: Mounted, holder: Holder) -> None:
        self.mount, self.p = mount, holder
        self.a = mount.path / "A"
        self.a.write_bytes(DATA)

    def info(self) -> dict[str, Any]:
        found = client.info(self.mount.path)
        assert found["free"] + found["used"] + found["busy"] == found["blocks"], found
        return found

    def busy(self) -> list[tuple[int, int]]:
        """Busy runs; those that are held are held by pins that exist (the others are about to be freed)."""
        found = client.busy(self.mount.path)
        ids = {pin["id"] for pin in client.pins(self.mount.path)}
        ends = 0
        for extent in sorted(found, key=lambda extent: extent["start"]):
            assert extent["start"] >= ends, f"busy extents overlap: {found}"  # I2
            ends = extent["start"] + extent["count"]
            assert set(extent["pins"]) <= ids, (extent, ids)
        return sorted((extent["start"], extent["count"]) for extent in found)

    def busy_blocks(self) -> set[int]:
        return {block for start, count in self.busy() for block in range(start, start + count)}

    def settled(self, free: int | None = None) -> None:
        """No pin is held any more: nothing stays busy, and (if told) so many blocks are free again."""
        eventually("nothing is busy", lambda: self.info()["busy"] == 0 and self.info()["pinned"] == 0, 1.0)
        assert self.busy() == []
        if free is not None:
            assert self.info()["free"] == free

    def blocks_of(self, path: Path) -> set[int]:
        with client.open(path) as file:
            return {e.physical + n for e in file.extents() for n in range(e.count)}

    def image(self, block: int, count: int = 1) -> bytes:
        with open(self.mount.image, "rb", buffering=0) as image:
            return os.pread(image.fileno(), count * BLOCK, block * BLOCK)

    def fill(self, name: str = "filler") -> Path:
        """A file that takes all space there is."""
        path = self.mount.path / name
        with open(path, "wb", buffering=0) as file:
            for size in (1 << 20, BLOCK):
                chunk = b"\xee" * size
                try:
                    while True:
                        if file.write(chunk) < size and size == BLOCK:
                            break
                except OSError as problem:
                    if problem.errno != errno.ENOSPC:
                        raise
        return path


def fallocate(path: Path, mode: int, at: int, length: int) -> None:
    with open(path, "r+b") as file:
        syscalls.fallocate(file.fileno(), mode, at, length)
