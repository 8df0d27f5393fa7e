"""Random damage to the metadata of an image, and which files it did not touch.

A file depends on the bytes of its inode record, its extent leaves, its xattr blocks and its data. Damage anywhere else (the
superblock, the journal, the inode directory, directories, other files, the ledger, the snapshot) must not cost it a byte,
though it may cost it its name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daxfs.core import fileops, layout, namespace, scan, xattr
from daxfs.core.layout import INODE, INODE_CRC_END, INODE_SIZE
from daxfs.core.volume import Volume

from .image import NOW

VALUES = (0, 1, 2, 3, 0xFF, 0xFFFF, 0xFFFF_FFFF, 1 << 31, 1 << 32, 1 << 52, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@dataclass
class Known:
    """An image as it was: where its metadata are, what each file is made of (block -> bytes that count) and says."""

    image: bytes
    block_size: int
    metadata: list[tuple[int, int]]  # (address, length)
    records: list[int]  # addresses of inode records
    parts: dict[int, list[tuple[int, int]]]  # inode number -> (address, length) of what it is made of
    files: dict[int, tuple[Any, ...]]  # inode number -> what it says

    def untouched(self, now: bytes) -> set[int]:
        """The files that depend on no byte that was changed."""
        changed = np.flatnonzero(np.frombuffer(self.image, np.uint8) != np.frombuffer(now, np.uint8))

        def hit(at: int, length: int) -> bool:
            return bool(np.searchsorted(changed, at) != np.searchsorted(changed, at + length))

        return {ino for ino, parts in self.parts.items() if not any(hit(*part) for part in parts)}


def know(path: Path) -> Known:
    image = path.read_bytes()
    volume = Volume.open(path, readonly=True, now=NOW, lock=False)
    size, sb = volume.block_size, volume.sb
    known = Known(image, size, [], [], {}, {})
    known.metadata = [(0, 512), (size, 512), (sb["journal_start"] * size, 512), (sb["idir_start"] * size, 8 * 8)]
    known.metadata += [(sb["ledger"] * size, size), (sb["snapshot_start"] * size, 512)]
    known.metadata += [(block * size, 32 * INODE_SIZE) for block in volume.chunks]
    number = 0
    for batch in scan.inode_batches(volume):
        for i, record in enumerate(batch):
            if record["mode"]:
                _know(volume, known, number + i)
        number += len(batch)
    volume.close(NOW)
    return known


def _know(volume: Volume, known: Known, ino: int) -> None:
    size, inode = volume.block_size, volume.inode(ino)
    leaves = [(block * size, size) for block in inode.map.leaf_blocks()]
    blocks = xattr.read_chain(volume.pmem.load, size, volume.data_blocks, inode.xattr_block, ino, inode.generation)
    attributes = [(block * size, size) for block, _ in blocks]
    data = [(physical * size, count * size) for _, physical, count, _ in inode.map]
    known.metadata += leaves + attributes
    known.records.append(inode.at)
    if inode.is_dir:
        known.metadata += data
        return
    known.parts[ino] = [(inode.at, INODE_SIZE), *leaves, *attributes, *data]
    known.files[ino] = says(volume, ino)


def says(volume: Volume, ino: int) -> tuple[Any, ...]:
    """All of a file but its names."""
    inode = volume.inode(ino)
    content = namespace.readlink(volume, inode) if inode.is_symlink else b""
    if inode.is_file:
        content = fileops.read(volume, inode, 0, inode.size)
    attributes = {name: xattr.get(volume, inode, name) for name in xattr.names(volume, inode)}
    return inode.generation, inode.mode, inode.uid, inode.gid, inode.size, inode.mtime, content, attributes


# -- damage -------------------------------------------------------------------------------------------------------------


def damage(image: bytearray, known: Known, dice: random.Random) -> list[str]:
    """Hurt the image in a few places; what was done, for whoever reads the failure."""
    kinds: list[Callable[[bytearray, Known, random.Random], str]] = [
        _flip, _flip, _scribble, _scribble, _field, _field, _copy_block, _tear, _extent
    ]  # fmt: skip
    return [dice.choice(kinds)(image, known, dice) for _ in range(dice.randint(1, 5))]


def _place(known: Known, dice: random.Random, *, but_superblocks: bool = False) -> tuple[int, int]:
    """Somewhere in the metadata, and how many bytes there are from there on. One superblock always survives."""
    while True:
        at, length = dice.choice(known.metadata)
        if at != 0 and not (but_superblocks and at == known.block_size):
            within = dice.randrange(length)
            return at + within, length - within


def _flip(image: bytearray, known: Known, dice: random.Random) -> str:
    at, _ = _place(known, dice)
    bits = dice.choice((1, 1, 2, 3))
    for _ in range(bits):
        image[at] ^= 1 << dice.randrange(8)
    return f"{bits} bits at {at} ({at // known.block_size}+{at % known.block_size})"


def _scribble(image: bytearray, known: Known, dice: random.Random) -> str:
    at, room = _place(known, dice, but_superblocks=True)
    length = min(room, dice.choice((2, 8, 64, 300, 512, 4096)))
    image[at : at + length] = dice.choice((bytes(length), b"\xff" * length, dice.randbytes(length)))
    return f"{length} bytes at {at} ({at // known.block_size}+{at % known.block_size})"


def _tear(image: bytearray, known: Known, dice: random.Random) -> str:
    """Half of a record is that of another."""
    one, two = dice.sample(known.records, 2)
    half = dice.randrange(8, INODE_SIZE, 8)
    image[one + half : one + INODE_SIZE] = image[two + half : two + INODE_SIZE]
    return f"bytes from {half} on of the record at {one} are those of {two}"


def _field(image: bytearray, known: Known, dice: random.Random) -> str:
    """A value that makes no sense, under a checksum that is right."""
    at = dice.choice(known.records)
    field = dice.choice([f for f in INODE.fields if f.code in "QIH" and f.name not in ("magic", "crc", "generation")])
    bits = {"Q": 64, "I": 32, "H": 16}[field.code]
    value = dice.choice((dice.choice(VALUES), dice.getrandbits(64), dice.randrange(4096))) % (1 << bits)
    values = INODE.unpack(bytes(image[at : at + INODE_SIZE]))
    was, values[field.name] = values[field.name], value
    image[at : at + INODE_SIZE] = layout.seal(INODE.pack(**values), end=INODE_CRC_END)
    return f"{field.name} of the record at {at}: {value:#x}, was {was:#x}"


def _extent(image: bytearray, known: Known, dice: random.Random) -> str:
    """An inode maps what may be anybody's, and all its checksums are right."""
    at = dice.choice(known.records)
    values = INODE.unpack(bytes(image[at : at + INODE_SIZE]))
    extents = [
        (dice.randrange(8), dice.choice((dice.randrange(len(image) // known.block_size), dice.choice(known.metadata)[0] //
                                         known.block_size)), dice.choice((1, 1, 3, 100)), dice.randrange(2))
        for _ in range(dice.randint(1, 6))
    ]  # fmt: skip
    body = b"".join(layout.EXTENT.struct.pack(*e) for e in extents)
    values.update(extents=len(extents), leaf=0, target_length=0, body=body)
    image[at : at + INODE_SIZE] = layout.seal(INODE.pack(**values), end=INODE_CRC_END)
    return f"extents {extents} in the record at {at}"


def _copy_block(image: bytearray, known: Known, dice: random.Random) -> str:
    """A block of metadata lies where another one should be."""
    size = known.block_size
    blocks = [at // size for at, _ in known.metadata if at > size]
    source, target = dice.choice(blocks), dice.choice(blocks)
    image[target * size : (target + 1) * size] = image[source * size : (source + 1) * size]
    return f"block {target} is a copy of block {source}"
