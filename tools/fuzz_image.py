"""Small images to break: a bit of everything on 1 MiB, in the states that a mount can meet, and a chart of their records.

An attacker knows the checksums as well as we do. So a mutation changes fields of records, and `Target.seal` makes the
checksums of that record right again with whatever lengths it claims now: the checks behind the checksum are reached.

States: clean (with a snapshot of free space), armed (the daemon died: an orphan, pins in the ledger), journal (the same with
a committed transaction that was not applied), coarse (clean, 64 KiB blocks, 2 MiB: numbers of blocks overflow earlier).
Not here: what to change (fuzz_mutate.py), what to do with the result (fuzz_use.py).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crc32c import crc32c

from daxfs import abi
from daxfs.core import acl, attributes, fileops, holding, layout, namespace
from daxfs.core.format import format_image
from daxfs.core.layout import (
    DIRBLOCK,
    DIRENT,
    EXTENT,
    INODE,
    JOURNAL_HEADER,
    LEAF,
    LEDGER_BLOCK,
    LEDGER_ENTRY,
    SNAPSHOT,
    SUPERBLOCK,
    TXN_HEADER,
    TXN_RECORD,
    XATTR,
    XATTR_BLOCK,
    Table,
)
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume

SIZE = 1 << 20
NOW = 1_700_000_000_000_000_000
BOOT = b"fuzz's boot id.."
ROOT = Caller(0, 0, 0o022)
STATES = {"clean": 4096, "armed": 4096, "journal": 4096, "coarse": 65536}  # and the block size of each


@dataclass(frozen=True)
class Target:
    """A record: where it is, its fields as (name, offset in the image, struct code), and how it is sealed."""

    kind: str
    at: int
    fields: tuple[tuple[str, int, str], ...]
    seal: Callable[[bytearray], None] = field(repr=False, compare=False)
    length: int = 0


@dataclass(frozen=True)
class Seed:
    """An image, its records, and the numbers of blocks and inodes that mean something on it."""

    state: str
    data: bytes
    block_size: int
    targets: tuple[Target, ...]
    numbers: tuple[int, ...]
    metadata: tuple[tuple[int, int], ...]
    """The ranges of bytes that a mount or fsck may read as metadata: (start, length)."""


def make(state: str, path: Path) -> Seed:
    """An image of this state, made at `path`, which is left there."""
    block_size = STATES[state]
    format_image(path, max(SIZE, 32 * block_size), block_size=block_size, label="fuzz", uuid=bytes(range(16)), now=NOW)
    volume = Volume.open(path, now=NOW, boot_id=BOOT)
    populate(volume)
    chart = Chart(volume)
    if state in ("clean", "coarse"):
        volume.close(NOW)
        data = path.read_bytes()
        chart.snapshot(data)
    else:
        if state == "journal":
            namespace.mkdir(volume, NOW, volume.root, b"late", 0o755, ROOT)
        data = path.read_bytes()
        if state == "journal":
            data = _uncommit(data, volume)
            chart.transaction(data)
        volume.readonly = True  # so that closing changes nothing
        volume.close(NOW)
    path.write_bytes(data)
    return Seed(state, data, block_size, tuple(chart.targets), tuple(sorted(chart.numbers)), tuple(chart.ranges(data)))


def populate(volume: Volume) -> None:
    """Directories, files with inline extents and with leaves, holes, unwritten blocks, links, symlinks, xattrs, an ACL, a
    pipe, pins, and an unlinked file that is open."""
    root, size = volume.root, volume.block_size
    folder = namespace.mkdir(volume, NOW, root, b"dir", 0o755, ROOT)
    below = namespace.mkdir(volume, NOW, folder, b"sub", 0o755, ROOT)
    namespace.mkdir(volume, NOW, below, b"deep", 0o700, ROOT)
    small = namespace.create(volume, NOW, root, b"small", 0o644, ROOT)
    fileops.write(volume, NOW, small, 0, b"hello" * 100)
    leafy = namespace.create(volume, NOW, folder, b"leafy", 0o644, ROOT)
    if size == 4096:
        for i in range(9):
            fileops.write(volume, NOW, leafy, 2 * i * size, b"%d" % i * 100)
    holes = namespace.create(volume, NOW, below, b"holes", 0o4755, ROOT)
    fileops.write(volume, NOW, holes, 0, b"start")
    fileops.fallocate(volume, NOW, holes, fileops.FALLOC_KEEP_SIZE, 4 * size, 2 * size if size == 4096 else 1)
    fileops.truncate(volume, NOW, holes, 40 * size)
    namespace.link(volume, NOW, small, below, b"hard")
    namespace.symlink(volume, NOW, root, b"short", b"dir/sub", ROOT)
    if size == 4096:
        namespace.symlink(volume, NOW, folder, b"long", b"../" * 90 + b"small", ROOT)
        attributes.setxattr(volume, NOW, leafy, b"user.big", bytes(range(256)) * 20)
    namespace.create(volume, NOW, root, b"pipe", stat.S_IFIFO | 0o600, ROOT)
    attributes.setxattr(volume, NOW, small, b"user.note", b"inline")
    attributes.setxattr(volume, NOW, folder, acl.DEFAULT, acl.from_mode(0o750))
    if size == 4096:
        open_file = namespace.create(volume, NOW, root, b"gone", 0o600, ROOT)
        fileops.write(volume, NOW, open_file, 0, b"x" * 5000)
        open_file.opens = 1
        namespace.unlink(volume, NOW, root, b"gone")
        flags = abi.FOLL_PIN | abi.FOLL_LONGTERM
        holding.pin(volume, NOW, small, 0, size, flags, 1, Holder(1, "init", 1), writable=False)


def _uncommit(data: bytes, volume: Volume) -> bytes:
    """The image as if the daemon had died right behind the commit of its last transaction."""
    out = bytearray(data)
    body = _journal_at(volume) + volume.block_size
    sequence = TXN_HEADER.unpack(memoryview(out), body)["sequence"]
    struct.pack_into("<Q", out, _journal_at(volume) + layout.JOURNAL_COMMIT_AT, sequence)
    return bytes(out)


def _journal_at(volume: Volume) -> int:
    return int(volume.sb["journal_start"]) * volume.block_size


class Chart:
    """The records of a volume, found while it is open and sound."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.size = volume.block_size
        self.targets: list[Target] = []
        self.blocks: set[int] = set(volume.ledger.blocks)  # of metadata, in the data region
        self.numbers = {0, 1, 2, volume.blocks, volume.blocks - 1, volume.data_blocks.start, self.size}
        for copy in (0, 1):
            self.add("superblock", SUPERBLOCK, copy * self.size)
        self.add("journal header", JOURNAL_HEADER, _journal_at(volume))
        self._commit_word()
        for index, block in enumerate(volume.chunks):
            self._idir(index)
            self.blocks.update(range(block, block + layout.chunk_blocks(self.size)))
        for ino in range(1, volume.ino_end):
            if ino not in volume.free_inodes:
                self._inode(ino)
        self._free_inode()
        for block in volume.ledger.blocks:
            self.add("ledger block", LEDGER_BLOCK, block * self.size)
            for at in range(block * self.size + 64, block * self.size + 64 * 4, 64):
                self.add("ledger entry", LEDGER_ENTRY, at)
        self.numbers |= self.blocks

    def add(self, kind: str, table: Table, at: int, *, crc_at: int = 4, end: Callable[[bytearray], int] | None = None,
            length: int | None = None, more: tuple[tuple[str, int, str], ...] = ()) -> None:  # fmt: skip
        """A record of `table`, sealed over `end(image)` bytes (its own size if not said)."""
        size = length or table.size

        def seal(image: bytearray) -> None:
            stop = min(end(image) if end else size, len(image) - at)
            struct.pack_into("<I", image, at + crc_at, layout.checksum(image[at : at + stop], crc_at))

        self.targets.append(Target(kind, at, _fields(table, at) + more, seal, size))

    def _commit_word(self) -> None:
        at = _journal_at(self.volume) + layout.JOURNAL_COMMIT_AT
        self.targets.append(Target("commit word", at, (("word", at, "Q"),), lambda image: None, 8))

    def _idir(self, index: int) -> None:
        at = self.volume.sb["idir_start"] * self.size + 8 * index

        def seal(image: bytearray) -> None:
            (word,) = struct.unpack_from("<Q", image, at)
            struct.pack_into("<Q", image, at, layout.idir_word(index, word & 0xFFFF_FFFF_FFFF))

        self.targets.append(Target("idir word", at, (("block", at, "Q"),), seal, 8))

    def _free_inode(self) -> None:
        at = self.volume.inode_at(self.volume.free_inodes[-1])
        self.add("free inode", INODE, at, length=layout.INODE_SIZE, end=lambda image: layout.INODE_CRC_END)

    def _inode(self, ino: int) -> None:
        inode = self.volume.inode(ino)
        self.numbers.add(ino)
        body = inode.at + INODE.offset["body"]
        more: tuple[tuple[str, int, str], ...] = ()
        if not inode.target:
            for i in range(layout.INLINE_EXTENTS):
                more += _fields(EXTENT, body + 24 * i)
        if inode.xattr_inline:
            more += _fields(XATTR, inode.at + INODE.offset["xattrs"])
        self.add("inode", INODE, inode.at, end=lambda image: layout.INODE_CRC_END, more=more)
        for block in inode.map.leaf_blocks():
            self._leaf(block)
        if inode.xattr_block:
            self._xattr_blocks(inode.xattr_block)
        for _, physical, count, _ in inode.map:
            self.numbers.add(physical)
            if inode.is_dir:
                for block in range(physical, physical + count):
                    self._directory_block(block)

    def _leaf(self, block: int) -> None:
        at = block * self.size
        self.blocks.add(block)

        def end(image: bytearray) -> int:
            count: int = struct.unpack_from("<I", image, at + LEAF.offset["count"])[0]
            return LEAF.size + EXTENT.size * min(count, layout.leaf_capacity(self.size))

        count = int(LEAF.unpack(self.volume.pmem.load(at, LEAF.size))["count"])
        more = tuple(f for i in range(count) for f in _fields(EXTENT, at + LEAF.size + EXTENT.size * i))
        self.add("leaf", LEAF, at, end=end, more=more, length=LEAF.size + EXTENT.size * count)

    def _xattr_blocks(self, block: int) -> None:
        while block:
            at = block * self.size
            self.blocks.add(block)

            def end(image: bytearray, at: int = at) -> int:
                length: int = struct.unpack_from("<I", image, at + XATTR_BLOCK.offset["length"])[0]
                return XATTR_BLOCK.size + min(length, self.size - XATTR_BLOCK.size)

            head = XATTR_BLOCK.unpack(self.volume.pmem.load(at, XATTR_BLOCK.size))
            self.add("xattr block", XATTR_BLOCK, at, end=end, more=_fields(XATTR, at + XATTR_BLOCK.size),
                     length=XATTR_BLOCK.size + int(head["length"]))  # fmt: skip
            block = int(head["next"])

    def _directory_block(self, block: int) -> None:
        base = block * self.size
        self.blocks.add(block)
        self.add("directory block", DIRBLOCK, base)
        data = self.volume.pmem.load(base, self.size)
        at = DIRBLOCK.size
        while at < self.size:
            _, _, length, name_length, _ = DIRENT.struct.unpack_from(data, at)
            self._entry(base + at, name_length)
            at += length * layout.DIRENT_ALIGN

    def _entry(self, at: int, name_length: int) -> None:
        def seal(image: bytearray) -> None:
            stop = at + 16 + image[at + 14]
            crc = crc32c(bytes(image[at + 12 : stop]), crc32c(bytes(image[at : at + 8])))
            struct.pack_into("<I", image, at + layout.DIRENT_CRC_AT, crc)

        name = tuple(("name", at + 16 + i, "B") for i in range(name_length))
        self.targets.append(Target("entry", at, _fields(DIRENT, at) + name, seal, 16 + name_length))

    def snapshot(self, data: bytes) -> None:
        """The record that is only there once the volume is closed."""
        newest = max((SUPERBLOCK.unpack(data, copy * self.size) for copy in (0, 1)), key=lambda sb: int(sb["sequence"]))
        block = int(newest["snapshot_start"])
        at = block * self.size
        self.blocks.add(block)
        self.numbers.add(block)
        runs, free = (int(SNAPSHOT.unpack(data, at)[name]) for name in ("runs", "free_inodes"))

        def seal(image: bytearray) -> None:
            head = SNAPSHOT.unpack(bytes(image[at : at + SNAPSHOT.size]))
            length = min(16 * head["runs"] + 8 * head["free_inodes"], len(image) - at - SNAPSHOT.size)
            payload = bytes(image[at + SNAPSHOT.size : at + SNAPSHOT.size + length])
            struct.pack_into("<I", image, at + SNAPSHOT.offset["payload_crc"], crc32c(payload))
            struct.pack_into("<I", image, at + 4, layout.checksum(image[at : at + SNAPSHOT.size]))

        words = tuple((f"word {i}", at + SNAPSHOT.size + 8 * i, "Q") for i in range(2 * runs + free))
        self.targets.append(Target("snapshot", at, _fields(SNAPSHOT, at) + words, seal, SNAPSHOT.size + 8 * len(words)))

    def transaction(self, data: bytes) -> None:
        """The committed transaction in the journal."""
        at = _journal_at(self.volume) + self.size
        room = self.volume.journal.capacity
        head = TXN_HEADER.unpack(data, at)
        fields = _fields(TXN_HEADER, at)
        place = at + TXN_HEADER.size
        for _ in range(int(head["records"])):
            fields += _fields(TXN_RECORD, place)
            length = int(TXN_RECORD.unpack(data, place)["length"])
            fields += (("data", place + TXN_RECORD.size + length // 2, "Q"),)
            place += TXN_RECORD.size + length + -length % 8

        def seal(image: bytearray) -> None:
            (length,) = struct.unpack_from("<Q", image, at + TXN_HEADER.offset["length"])
            stop = at + TXN_HEADER.size + min(length, room)
            crc = layout.checksum(image[at:stop])
            struct.pack_into("<I", image, at + 4, crc)

        self.targets.append(Target("transaction", at, fields, seal, place - at))

    def ranges(self, data: bytes) -> list[tuple[int, int]]:
        """All that is metadata, with what may become a record: every slot of the inode table, two more words of the inode
        directory. Not what nothing looks at: the padding behind names, the rest of a block behind its last record."""
        volume = self.volume
        found = {(t.at, t.length) for t in self.targets if "inode" not in t.kind}
        found.add((int(volume.sb["idir_start"]) * self.size, 8 * (len(volume.chunks) + 2)))
        table = layout.CHUNK_INODES * layout.INODE_SIZE
        return sorted(found | {(block * self.size, table) for block in volume.chunks})


def _fields(table: Table, at: int) -> tuple[tuple[str, int, str], ...]:
    """Its fields that are numbers; of byte strings, the first byte."""
    return tuple((f.name, at + table.offset[f.name], "B" if f.code.endswith("s") else f.code) for f in table.fields)
