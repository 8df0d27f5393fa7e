"""Images forged on purpose: records of a small sound image are changed field by field, with right checksums."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crc32c import crc32c

from daxfs.core import layout, namespace
from daxfs.core.layout import DIRENT, EXTENT, INODE, INODE_CRC_END, TXN_HEADER, TXN_RECORD, Table
from daxfs.core.records import pack_entry
from daxfs.core.volume import Volume
from tools import fuzz
from tools.fuzz_image import NOW, Seed, Target

Harm = Callable[["Forge"], object]

B = 4096
TABLES = {
    "superblock": layout.SUPERBLOCK, "journal header": layout.JOURNAL_HEADER, "leaf": layout.LEAF,
    "directory block": layout.DIRBLOCK, "xattr block": layout.XATTR_BLOCK, "ledger block": layout.LEDGER_BLOCK,
    "ledger entry": layout.LEDGER_ENTRY, "snapshot": layout.SNAPSHOT, "entry": DIRENT, "transaction": TXN_HEADER,
}  # fmt: skip


@functools.cache
def _inodes(state: str) -> dict[str, int]:
    """By path: the address of the inode's record."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "image"
        path.write_bytes(fuzz.seed_image(state).data)
        volume = Volume.open(path, readonly=True, now=NOW)
        found, todo = {"": volume.root.at}, [("", volume.root)]
        while todo:
            prefix, directory = todo.pop()
            for name, ino, _, _ in namespace.entries(volume, directory, 0):
                inode = volume.inode(ino)
                found[prefix + name.decode()] = inode.at
                if inode.is_dir:
                    todo.append((prefix + name.decode() + "/", inode))
        volume.close(NOW)
    return found


class Forge:
    """An image in the making. States are those of tools/fuzz_image.py."""

    def __init__(self, state: str = "clean") -> None:
        self.seed: Seed = fuzz.seed_image(state)
        self.size = self.seed.block_size
        self.inodes = _inodes(state)
        self.data = bytearray(self.seed.data)
        copies = [layout.SUPERBLOCK.unpack(self.seed.data, copy * self.size) for copy in (0, 1)]
        self.sb: dict[str, Any] = max(copies, key=lambda sb: int(sb["sequence"]))

    # -- records --

    def get(self, table: Table, at: int, field: str) -> int:
        """A field that is a number."""
        value = table.unpack(bytes(self.data[at : at + table.size]))[field]
        assert isinstance(value, int)
        return value

    def put(self, table: Table, at: int, **fields: int | bytes) -> None:
        record = table.unpack(bytes(self.data[at : at + table.size]))
        assert record.keys() >= fields.keys()
        self.data[at : at + table.size] = table.pack(**{**record, **fields})

    def target(self, kind: str, nth: int = 0) -> Target:
        return [t for t in self.seed.targets if t.kind == kind][nth]

    def record(self, kind: str, nth: int = 0, /, **fields: int | bytes) -> None:
        """Change fields of the n-th record of a kind and seal it."""
        target = self.target(kind, nth)
        self.put(TABLES[kind], target.at, **fields)
        target.seal(self.data)

    def superblocks(self, **fields: int | bytes) -> None:
        for copy in (0, 1):
            self.record("superblock", copy, **fields)

    def raw(self, at: int, data: bytes) -> None:
        self.data[at : at + len(data)] = data

    def word(self, index: int, block: int) -> None:
        """An entry of the inode directory."""
        at = self.sb["idir_start"] * self.size + 8 * index
        struct.pack_into("<Q", self.data, at, layout.idir_word(index, block))

    # -- inodes --

    def inode(self, path: str, **fields: int | bytes) -> None:
        at = self.inodes[path]
        self.put(INODE, at, **fields)
        record = layout.seal(self.data[at : at + layout.INODE_SIZE], end=INODE_CRC_END)
        self.data[at : at + layout.INODE_SIZE] = record

    def number(self, path: str, field: str = "ino") -> int:
        return self.get(INODE, self.inodes[path], field)

    def block(self, path: str, nth: int = 0) -> int:
        """The first block of an inline extent."""
        return self.get(EXTENT, self.inodes[path] + INODE.offset["body"] + 24 * nth, "physical")

    def extents(self, path: str, *extents: tuple[int, int, int, int]) -> None:
        """(logical, physical, count, flags) of each, inline."""
        body = b"".join(EXTENT.struct.pack(*extent) for extent in extents)
        self.inode(path, extents=len(extents), leaf=0, body=body)

    def leaf_extent(self, nth: int, **fields: int) -> None:
        target = self.target("leaf")
        self.put(EXTENT, target.at + layout.LEAF.size + 24 * nth, **fields)
        target.seal(self.data)

    # -- directories --

    def entry(self, directory: str, name: bytes, **fields: int | bytes) -> None:
        """Change the entry of this name; `name` among the fields must fit its padding."""
        at = self.entry_at(directory, name)
        new = fields.pop("new_name", None)
        if isinstance(new, bytes):
            self.data[at + 16 : at + 16 + len(new)] = new
            fields["name_length"] = len(new)
        self.put(DIRENT, at, **fields)
        stop = at + 16 + self.data[at + 14]
        crc = crc32c(bytes(self.data[at + 12 : stop]), crc32c(bytes(self.data[at : at + 8])))
        struct.pack_into("<I", self.data, at + layout.DIRENT_CRC_AT, crc)

    def entry_at(self, directory: str, name: bytes) -> int:
        at = self.block(directory) * self.size + layout.DIRBLOCK.size
        while bytes(self.data[at + 16 : at + 16 + self.data[at + 14]]) != name:
            at += self.get(DIRENT, at, "length") * layout.DIRENT_ALIGN
        return at

    def add_entry(self, directory: str, name: bytes, ino: int, dtype: int) -> None:
        """One more, at the start of the free slot at the end of the block."""
        base = self.block(directory) * self.size
        at = base + layout.DIRBLOCK.size
        while self.get(DIRENT, at, "ino"):
            at += self.get(DIRENT, at, "length") * layout.DIRENT_ALIGN
        length = (16 + len(name) + 15) // 16
        rest = self.get(DIRENT, at, "length") - length
        self.raw(at, pack_entry(ino, length, dtype, name).ljust(16 * length, b"\0") + pack_entry(0, rest, 0, b""))

    # -- journal --

    def transaction(self, *records: tuple[int, int, bytes], count: int | None = None, length: int | None = None) -> None:
        """A committed transaction with a right checksum, whatever its records claim: (address, length, bytes)."""
        start = self.sb["journal_start"] * self.size
        data = b"".join(TXN_RECORD.struct.pack(at, n) + b + bytes(-len(b) % 8) for at, n, b in records)
        header = TXN_HEADER.struct.pack(layout.TXN_MAGIC, 0, 77, len(data) if length is None else length,
                                        len(records) if count is None else count)  # fmt: skip
        crc = crc32c(data, crc32c(header[8:], crc32c(header[:4])))
        self.raw(start + self.size, header[:4] + crc.to_bytes(4, "little") + header[8:] + data)
        struct.pack_into("<Q", self.data, start + layout.JOURNAL_COMMIT_AT, 77)

    # -- snapshot --

    def snapshot_word(self, nth: int, value: int) -> None:
        """The n-th 8-byte word behind the snapshot's header: start and count of each run, then free inodes (-1: last)."""
        target = self.target("snapshot")
        nth %= (target.length - layout.SNAPSHOT.size) // 8
        struct.pack_into("<Q", self.data, target.at + layout.SNAPSHOT.size + 8 * nth, value)
        target.seal(self.data)
