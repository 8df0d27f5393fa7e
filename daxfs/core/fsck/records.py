"""Repair of one inode: its record, its extents and leaves, its xattrs, its target. No block is allocated for it.

What is believed
- A record or leaf of which one bit is flipped is put right exactly (mend.py).
- One that is damaged more, but has the right magic and number, is believed as far as each of its values makes sense. Its
  extents give way to those of sound inodes, and it loses set-user-ID and set-group-ID.
- Any other record is cleared; any other leaf ends its chain there.
- A file grows to its last written block. A directory's blocks move together. An inode whose type nobody can tell, or a
  symlink without a target, is cleared.

The record and the leaves that changed go into the journal as one group.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from daxfs.core import acl, layout, xattr
from daxfs.core.fsck.batch import Batch, Records
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.mend import mended
from daxfs.core.fsck.report import Array, Report
from daxfs.core.layout import (
    CHUNK_INODES,
    DIRBLOCK,
    EXTENT,
    EXTENT_UNWRITTEN,
    FILE_SIZE_MAX,
    INLINE_EXTENTS,
    INLINE_TARGET_MAX,
    INLINE_XATTR_MAX,
    INODE,
    INODE_CRC_END,
    INODE_SIZE,
    LEAF,
    ROOT_INO,
    XATTR_BLOCK,
)
from daxfs.errors import FsError

_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}
_TIMES = ("btime", "mtime", "ctime", "atime")
_NANOS, _NANOS_MAX = 0x3FFF_FFFF, 999_999_999

_DIRBLOCK_MAGIC = layout.DIRBLOCK_MAGIC.to_bytes(4, "little")

Values = dict[str, Any]
Extent = tuple[int, int, int, int]  # logical, physical, count, flags


@dataclass
class Leaf:
    """A leaf block of a chain (0: the inode's body), as it was read and as it will be."""

    block: int
    next: int
    sound: bool
    extents: list[Extent]
    doubtful: bool = False
    was: list[Extent] = field(default_factory=list)


class InodeRepair:
    """`owned`: runs (start, end) that sound inodes have, apart and in order."""

    def __init__(self, image: Image, owned: Array, batch: Batch, report: Report) -> None:
        self._image = image
        self._pmem = image.pmem
        self._owned = owned
        self._batch = batch
        self._report = report
        self._chunks = dict(zip(image.chunk_numbers.tolist(), image.chunk_blocks.tolist(), strict=True))

    def address(self, ino: int) -> int:
        chunk, slot = divmod(ino, CHUNK_INODES)
        return int(self._chunks[chunk]) * self._image.block_size + slot * INODE_SIZE

    def repair(self, ino: int) -> None:
        """Make the inode one that can be believed, or clear it."""
        record = self._pmem.load(self.address(ino), INODE_SIZE)
        values, sound = self._read(record, ino)
        if ino == 0 or values is None or values["mode"] & 0o170000 not in _TYPES or values["mode"] >> 16:
            known = "no file is like that" if values is None or values["mode"] else "it is free"
            self.clear(ino, "its record cannot be read" if values is None else known)
            return
        leaves = self._fields(ino, values, sound)
        if leaves is None:
            self.clear(ino, "the target of the symlink is lost")
            return
        changed = self._xattrs(ino, values) + self._store_leaves(values, leaves)
        group = [*changed, (self.address(ino), layout.seal(INODE.pack(**values), end=INODE_CRC_END))]
        if not self._batch.fits(group):  # each leaf is right by itself
            for one in changed:
                self._batch.add([one])
            group = group[-1:]
        self._batch.add(group)

    def clear(self, ino: int, why: str) -> None:
        """Free the number; its blocks are nobody's then."""
        record = self._pmem.load(self.address(ino), INODE_SIZE)
        generation = int.from_bytes(record[16:20], "little")
        values: Values = dict.fromkeys(INODE.names, 0)
        values.update(magic=layout.INODE_MAGIC, ino=ino, generation=generation, body=b"", xattrs=b"")
        free = layout.seal(INODE.pack(**values), end=INODE_CRC_END)
        self._batch.add([(self.address(ino), free if ino else bytes(INODE_SIZE))])
        self._report.fix(f"inode {ino}: {why}; it is cleared")

    def make_root(self, now: int) -> None:
        """A root directory: with its blocks, if the record still leads to them, else an empty one that root owns."""
        time = layout.time_word(now)
        values: Values = dict.fromkeys(INODE.names, 0)
        values.update(magic=layout.INODE_MAGIC, ino=ROOT_INO, generation=1, mode=stat.S_IFDIR | 0o755, nlink=2,
                      parent=ROOT_INO, body=b"", xattrs=b"", btime=time, mtime=time, ctime=time, atime=time)  # fmt: skip
        was = INODE.unpack(self._pmem.load(self.address(ROOT_INO), INODE_SIZE))
        if self._leads_to_root(was):
            values.update((name, was[name]) for name in ("generation", "uid", "gid", "leaf", "extents", "body", *_TIMES))
            self._report.fix("inode 1: the root directory was none; its blocks are there, so it is one again")
        else:
            self._report.fix("inode 1: the root directory was lost; a new one is made, and what was in it is in lost+found")
        self._batch.add([(self.address(ROOT_INO), layout.seal(INODE.pack(**values), end=INODE_CRC_END))])

    def _leads_to_root(self, values: Values) -> bool:
        """Whether the first block of this inode says that it is the root directory's."""
        leaf = self._leaf(ROOT_INO, values["generation"], values["leaf"]) if values["leaf"] in self._image.data else None
        extents = leaf.extents if leaf else self._inline(values).extents
        first = [self._image.block(physical) for logical, physical, _, _ in extents if physical in self._image.data][:1]
        return any(DIRBLOCK.unpack(block)["ino"] == ROOT_INO for block in first if block[:4] == _DIRBLOCK_MAGIC)

    # -- the record --

    def _read(self, record: bytes, ino: int) -> tuple[Values | None, bool]:
        """Its fields, and whether they can be trusted."""
        better = mended(record, end=INODE_CRC_END)
        values = INODE.unpack(better or record)
        if (values["magic"], values["ino"]) != (layout.INODE_MAGIC, ino):
            return None, False
        if better is None:
            if not stat.S_ISDIR(values["mode"]):
                values["mode"] &= ~(stat.S_ISUID | stat.S_ISGID)
            self._report.fix(f"inode {ino}: its record is damaged; what makes sense of it is kept")
        elif better != record:
            self._report.fix(f"inode {ino}: a flipped bit of its record was put right")
        return values, better is not None

    def _fields(self, ino: int, values: Values, sound: bool) -> list[Leaf] | None:
        """Put the fields right; the leaves to be. None for a symlink without a target."""
        kind = values["mode"] & 0o170000
        self._simple(ino, values)
        leaves: list[Leaf] = []
        length = values["target_length"]
        if kind == stat.S_IFLNK and length:
            target = values["body"][:length]
            if length > INLINE_TARGET_MAX or b"\0" in target:
                return None
            if values["size"] != length:
                self._report.fix(f"inode {ino}: the size of the symlink is {length}")
                values["size"] = length
            values["body"] = target
        elif kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            if length:
                self._report.fix(f"inode {ino}: it has no target, and now does not say so")
                values.update(target_length=0, extents=0, leaf=0)
            leaves = self._extents(ino, values, sound)
        elif values["extents"] or values["leaf"] or length or values["blocks"]:
            self._report.fix(f"inode {ino}: its type has no blocks; they are cut out")
            values["target_length"] = 0
        extents = [extent for leaf in leaves for extent in leaf.extents]
        values.update(extents=len(extents), blocks=sum(extent[2] for extent in extents))
        if not extents:
            values["leaf"] = 0
            values["body"] = values["body"] if values["target_length"] else b""
        if kind == stat.S_IFLNK and not length:
            return leaves if self._long_target(values, extents) else None
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            self._size(ino, values, extents, kind == stat.S_IFDIR)
        return leaves

    def _simple(self, ino: int, values: Values) -> None:
        wrong = []
        for name in _TIMES:
            if values[name] & _NANOS > _NANOS_MAX:
                values[name] = values[name] & ~_NANOS | _NANOS_MAX
                wrong.append(name)
        if values["flags"]:
            values["flags"] = 0
            wrong.append("flags")
        if values["rdev"] >> 32:
            values["rdev"] &= 0xFFFF_FFFF
            wrong.append("device number")
        if values["nlink"] > layout.LINK_MAX:
            values["nlink"] = 1
            wrong.append("link count")
        if wrong:
            self._report.fix(f"inode {ino}: not valid and set right: {', '.join(wrong)}")

    def _long_target(self, values: Values, extents: list[Extent]) -> bool:
        """Whether a symlink's target is where it should be."""
        size = values["size"]
        if not INLINE_TARGET_MAX < size <= layout.SYMLINK_MAX or len(extents) != 1:
            return False
        logical, physical, count, flags = extents[0]
        if (logical, count, flags) != (0, 1, 0):
            return False
        return b"\0" not in self._pmem.load(physical * self._image.block_size, size)

    def _size(self, ino: int, values: Values, extents: list[Extent], directory: bool) -> None:
        size = self._image.block_size
        was = values["size"]
        written = max((e[0] + e[2] for e in extents if not e[3] & EXTENT_UNWRITTEN), default=0)
        if directory:
            values["size"] = written * size
        elif was > FILE_SIZE_MAX or -(-was // size) < written:
            values["size"] = min(written * size, FILE_SIZE_MAX)
        if values["size"] != was:
            self._report.fix(f"inode {ino}: its size was {was} bytes, its blocks make it {values['size']}")

    # -- extents --

    def _extents(self, ino: int, values: Values, sound: bool) -> list[Leaf]:
        """The leaves with the extents that are kept; a directory's are moved together."""
        leaves = list(self._leaves(ino, values)) if values["leaf"] else [self._inline(values)]
        for leaf in leaves:
            leaf.was = leaf.extents
            leaf.extents = [e for e in leaf.extents if self._plausible(e, doubtful=leaf.doubtful or not sound)]
        if not values["leaf"]:
            leaves[0].extents.sort()
        self._untangle(leaves)
        if stat.S_ISDIR(values["mode"]):
            at = 0
            for leaf in leaves:
                moved = []
                for _, physical, count, _ in leaf.extents:
                    moved.append((at, physical, count, 0))
                    at += count
                leaf.extents = moved
        cut = sum(len(leaf.was) for leaf in leaves) - sum(len(leaf.extents) for leaf in leaves)
        if cut:
            self._report.fix(f"inode {ino}: {cut} extents that cannot be right are cut out")
        kept = sum(len(leaf.extents) for leaf in leaves)
        if kept != values["extents"] and not cut:
            self._report.fix(f"inode {ino}: it has {kept} extents, not {values['extents']}")
        return [leaf for leaf in leaves if leaf.extents]

    def _inline(self, values: Values) -> Leaf:
        count = min(values["extents"], INLINE_EXTENTS)
        return Leaf(0, 0, True, [EXTENT.struct.unpack_from(values["body"], i * EXTENT.size) for i in range(count)])

    def _leaves(self, ino: int, values: Values) -> Iterator[Leaf]:
        """Along the chain, up to the first block that is no leaf of this inode."""
        image, block, seen = self._image, values["leaf"], set[int]()
        while block:
            leaf = None
            if block in image.data and block not in seen and not image.in_chunk(block):
                leaf = self._leaf(ino, values["generation"], block)
            if leaf is None:
                self._report.fix(f"inode {ino}: its chain of extent leaves ends before block {block}, which is not one")
                return
            seen.add(block)
            yield leaf
            block = leaf.next

    def _leaf(self, ino: int, generation: int, block: int) -> Leaf | None:
        data = self._image.block(block)
        better, sound = self._mended_leaf(data)
        head = LEAF.unpack(better)
        if (head["magic"], head["address"], head["ino"], head["generation"]) != (layout.LEAF_MAGIC, block, ino, generation):
            return None
        count = min(head["count"], layout.leaf_capacity(len(data)))
        extents = [EXTENT.struct.unpack_from(better, LEAF.size + i * EXTENT.size) for i in range(count)]
        if not sound:
            self._report.fix(f"inode {ino}: the extent leaf at block {block} is damaged; what makes sense of it is kept")
        elif better != data:
            self._report.fix(f"inode {ino}: a flipped bit of the extent leaf at block {block} was put right")
        return Leaf(block, head["next"], sound and better == data, extents, doubtful=not sound)

    def _mended_leaf(self, data: bytes) -> tuple[bytes, bool]:
        """The leaf, and whether its checksum is right now. The flipped bit may be one of the count itself."""
        count = LEAF.unpack(data)["count"]
        for guess in (count, *(count ^ 1 << bit for bit in range(16))):
            if guess <= layout.leaf_capacity(len(data)):
                better = mended(data, end=LEAF.size + guess * EXTENT.size)
                if better and LEAF.unpack(better)["count"] == guess:
                    return better, True
        return data, False

    def _plausible(self, extent: Extent, *, doubtful: bool) -> bool:
        logical, physical, count, flags = extent
        image = self._image
        end = FILE_SIZE_MAX // image.block_size + 1
        if not 0 < count <= end - min(logical, end) or flags & ~EXTENT_UNWRITTEN:
            return False
        if physical not in image.data or count > image.blocks - physical:
            return False
        if not doubtful:
            return True
        at = int(np.searchsorted(self._owned[:, 0], physical + count)) - 1
        return at < 0 or bool(self._owned[at, 1] <= physical)

    def _untangle(self, leaves: list[Leaf]) -> None:
        """Drop the extents that are out of order (of two that contradict each other the one that others contradict, too)
        and what is more than the image has blocks."""
        flat = [(e, leaf) for leaf in leaves for e in leaf.extents]
        for leaf in leaves:
            leaf.extents = []
        end, room = 0, len(self._image.data)
        for i, (extent, leaf) in enumerate(flat):
            behind = extent[0] + extent[2]
            if extent[0] < end or extent[2] > room:
                continue
            if i + 2 < len(flat) and behind > flat[i + 1][0][0] >= end and flat[i + 1][0][0] < flat[i + 2][0][0] < behind:
                continue
            leaf.extents.append(extent)
            end = behind
            room -= extent[2]

    def _store_leaves(self, values: Values, leaves: list[Leaf]) -> Records:
        """The record's body, or redo records of the leaves that are not on media like this."""
        if not leaves:
            return []
        if leaves[0].block == 0:
            values["body"] = b"".join(EXTENT.struct.pack(*e) for e in leaves[0].extents)
            return []
        values.update(leaf=leaves[0].block, body=b"")
        records = []
        for leaf, following in zip(leaves, [*(leaf.block for leaf in leaves[1:]), 0], strict=True):
            if leaf.sound and leaf.extents == leaf.was and leaf.next == following:
                continue
            head = LEAF.pack(magic=layout.LEAF_MAGIC, crc=0, address=leaf.block, ino=values["ino"], next=following,
                             count=len(leaf.extents), generation=values["generation"], reserved=b"")  # fmt: skip
            data = layout.seal(head + b"".join(EXTENT.struct.pack(*e) for e in leaf.extents))
            records.append((leaf.block * self._image.block_size, data))
        return records

    # -- xattrs --

    def _xattrs(self, ino: int, values: Values) -> Records:
        """Keep the attributes up to the first that cannot be read; an ACL that is none goes."""
        blocks, data, whole = self._xattr_data(ino, values)
        found, end = _decode(data)
        kept = dict(found)
        self._acls(ino, values, kept)
        if whole and end == len(data) and kept == found:
            if blocks and values["xattr_length"]:
                self._report.fix(f"inode {ino}: its xattrs are in blocks; what the record has besides is cleared")
                values.update(xattr_length=0, xattrs=b"")
            return []
        lost = "" if whole and end == len(data) else ", those that can be read"
        self._report.fix(f"inode {ino}: its extended attributes were written anew: {len(kept)}{lost}")
        while True:
            data = xattr.encode(kept)
            if len(data) <= INLINE_XATTR_MAX:
                values.update(xattr_block=0, xattr_length=len(data), xattrs=data)
                return []
            records = self._xattr_chain(values, blocks, data)
            if records is not None and self._batch.fits([*records, (0, bytes(INODE_SIZE))]):
                values.update(xattr_block=blocks[0], xattr_length=0, xattrs=b"")
                return records
            kept.popitem()

    def _xattr_data(self, ino: int, values: Values) -> tuple[list[int], bytes, bool]:
        """(blocks, bytes, whether media have just that) of the chain, or of the record's own area."""
        image, blocks, parts = self._image, [], []
        if not values["xattr_block"]:
            length = values["xattr_length"]
            return [], values["xattrs"][: min(length, INLINE_XATTR_MAX)], length <= INLINE_XATTR_MAX
        try:
            chain = xattr.read_chain(self._load_xattr, image.block_size, image.data, values["xattr_block"], ino,
                                     values["generation"])  # fmt: skip
            for block, payload in chain:
                if image.in_chunk(block):
                    break
                blocks.append(block)
                parts.append(payload)
            else:
                mended_too = all(self._load_xattr(b * image.block_size, image.block_size) == image.block(b) for b in blocks)
                return blocks, b"".join(parts), mended_too
        except FsError:
            pass
        if not blocks and values["xattr_length"] <= INLINE_XATTR_MAX:
            return [], values["xattrs"][: values["xattr_length"]], False
        return blocks, b"".join(parts), False

    def _load_xattr(self, at: int, size: int) -> bytes:
        """An xattr block with its flipped bit put right."""
        data = self._pmem.load(at, size)
        length = XATTR_BLOCK.unpack(data)["length"]
        for guess in (length, *(length ^ 1 << bit for bit in range(17))):
            if guess <= size - XATTR_BLOCK.size:
                better = mended(data, end=XATTR_BLOCK.size + guess)
                if better and XATTR_BLOCK.unpack(better)["length"] == guess:
                    return better
        return data

    def _xattr_chain(self, values: Values, blocks: list[int], data: bytes) -> Records | None:
        """The blocks of the chain with this content; None if it needs more of them."""
        size = self._image.block_size
        room = size - XATTR_BLOCK.size
        pieces = [data[at : at + room] for at in range(0, len(data), room)]
        if len(pieces) > len(blocks):
            return None
        records = []
        for i, piece in enumerate(pieces):
            following = blocks[i + 1] if i + 1 < len(pieces) else 0
            head = XATTR_BLOCK.pack(magic=layout.XATTR_BLOCK_MAGIC, crc=0, address=blocks[i], ino=values["ino"],
                                    next=following, length=len(piece), generation=values["generation"],
                                    reserved=0)  # fmt: skip
            block = layout.seal(head + piece)
            if self._pmem.load(blocks[i] * size, len(block)) != block:
                records.append((blocks[i] * size, block))
        return records

    def _acls(self, ino: int, values: Values, kept: dict[bytes, bytes]) -> None:
        for name in (acl.ACCESS, acl.DEFAULT):
            if name in kept:
                try:
                    acl.parse(kept[name])
                    bits = acl.equivalent_mode(kept[name])[0]
                except FsError:
                    del kept[name]
                    which = "access" if name == acl.ACCESS else "default"
                    self._report.fix(f"inode {ino}: its {which} ACL is none; it goes")
                    continue
                if name == acl.ACCESS and values["mode"] & 0o777 != bits:
                    values["mode"] = values["mode"] & ~0o777 | bits
                    self._report.fix(f"inode {ino}: its mode is {values['mode'] & 0o7777:#o} now, as its ACL says")
        if acl.DEFAULT in kept and not stat.S_ISDIR(values["mode"]):
            del kept[acl.DEFAULT]
            self._report.fix(f"inode {ino}: it is no directory; its default ACL goes")


def _decode(data: bytes) -> tuple[dict[bytes, bytes], int]:
    """The attributes up to the first that cannot be read, and where that is."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        end = at + layout.XATTR.size
        if end > len(data):
            break
        length, name_length, _ = layout.XATTR.struct.unpack_from(data, at)
        end += name_length + length
        try:
            one = xattr.decode(data[at:end], "")
        except FsError:
            break
        if end > len(data) or len(one) != 1 or not one.keys().isdisjoint(found):
            break
        found.update(one)
        at = end
    return found, at
