"""The inode table: every record, judged as arrays; every extent; xattrs, ACLs and symlinks one by one.

Python runs per inode only for its CRC, and for what few inodes have: leaf chains, xattrs, symlinks. What is kept in
memory is `Inodes`, some 40 bytes per inode, and the extents.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from daxfs.core import acl, layout, xattr
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.report import Array, Progress, Report
from daxfs.core.fsck.space import DATA, LEAF, XATTR, Owners
from daxfs.core.inode import read_leaf
from daxfs.core.layout import CHUNK_INODES, INLINE_EXTENTS, INODE_CRC_END, INODE_SIZE
from daxfs.core.scan import EXTENT_DTYPE, INODE_DTYPE
from daxfs.errors import Corrupt, FsError

FREE, LIVE, DAMAGED = range(3)

_BATCH_CHUNKS = 512
_TYPES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
_NANOS = np.uint64(0x3FFF_FFFF)
_KEPT = {"mode": np.uint32, "nlink": np.uint32, "size": np.int64, "parent": np.int64, "blocks": np.int64}


@dataclass
class Inodes:
    """One row per inode slot of the table, in order of inode number."""

    chunk_numbers: Array
    state: Array
    mode: Array
    nlink: Array
    size: Array
    parent: Array
    blocks: Array

    @classmethod
    def empty(cls, chunk_numbers: Array) -> Inodes:
        rows = len(chunk_numbers) * CHUNK_INODES
        return cls(chunk_numbers, np.zeros(rows, np.uint8), *(np.zeros(rows, kind) for kind in _KEPT.values()))

    def ino(self, rows: Array) -> Array:
        numbers: Array = self.chunk_numbers[rows // CHUNK_INODES] * CHUNK_INODES + rows % CHUNK_INODES
        return numbers

    def rows(self, inos: Array) -> Array:
        """Row of each inode number, -1 where the table has none. The numbers are signed, so huge ones are negative."""
        if not len(self.chunk_numbers):
            return np.full(len(inos), -1, np.int64)
        numbers = inos // CHUNK_INODES
        at = np.minimum(np.searchsorted(self.chunk_numbers, numbers), len(self.chunk_numbers) - 1)
        return np.where(self.chunk_numbers[at] == numbers, at * CHUNK_INODES + inos % CHUNK_INODES, -1)

    def in_state(self, state: int) -> Array:
        """Numbers of the inodes in this state, without 0, which no inode has."""
        inos = self.ino(np.flatnonzero(self.state == state))
        numbers: Array = inos[inos != 0]
        return numbers

    def is_type(self, kind: int) -> Array:
        """Which rows are live inodes of this type (S_IFDIR, ...)."""
        which: Array = (self.state == LIVE) & (self.mode & 0o170000 == kind)
        return which


@dataclass
class Extents:
    """All extents of files, directories and symlinks, by row and place in the file."""

    row: Array
    logical: Array
    physical: Array
    count: Array
    unwritten: Array


class TableCheck:
    """Reads the whole table: `inodes`, `extents`; runs go to `owners`, findings to the report.

    For repairs: `flagged` are the numbers of all inodes that something is wrong with, `foreign` the chunks that hold
    records, but none of their own.
    """

    def __init__(self, image: Image, owners: Owners, report: Report, progress: Progress) -> None:
        self._image = image
        self._owners = owners
        self._report = report
        self.inodes = Inodes.empty(image.chunk_numbers)
        self.flagged: set[int] = set()
        self.foreign: list[int] = []
        self._pieces: list[tuple[Array, Array]] = []  # rows, EXTENT_DTYPE
        for first in range(0, len(image.chunk_numbers), _BATCH_CHUNKS):
            progress("inodes", first * CHUNK_INODES, len(image.chunk_numbers) * CHUNK_INODES)
            self._batch(first)
        self.extents = self._settle_extents()
        self._check_coverage()

    def _blame(self, text: str, inos: Array, *columns: Array) -> None:
        """One error per inode; the columns fill the other placeholders."""
        self._report.each(text, inos, *columns)
        self.flagged.update(inos.tolist())

    def _blame_one(self, ino: int, text: str) -> None:
        self._report.error(f"inode {ino}: {text}")
        self.flagged.add(ino)

    # -- records --

    def _batch(self, first: int) -> None:
        image, inodes = self._image, self.inodes
        starts = image.chunk_blocks[first : first + _BATCH_CHUNKS]
        blocks = (starts[:, None] + np.arange(image.per_chunk)).reshape(-1)
        raw = image.pmem.gather(blocks, image.block_size).reshape(len(starts), -1)[:, : CHUNK_INODES * INODE_SIZE]
        raw = np.ascontiguousarray(raw).reshape(-1, INODE_SIZE)
        rows = np.arange(len(raw)) + first * CHUNK_INODES
        used = np.flatnonzero(raw.view(np.uint64).any(axis=1))  # a slot that never had an inode is all zeros
        damaged = self._damaged(raw, used, rows)
        inodes.state[rows[used[damaged]]] = DAMAGED
        used = used[~damaged]
        records = raw.reshape(-1).view(INODE_DTYPE)[used]
        live = records["mode"] != 0
        records, rows = records[live], rows[used[live]]
        none = inodes.ino(rows) == 0
        self._blame("inode {} is in use, a number that means none", inodes.ino(rows[none]))
        inodes.state[rows] = LIVE
        for name in _KEPT:
            column = getattr(inodes, name)
            column[rows] = np.minimum(records[name], np.iinfo(column.dtype).max).astype(column.dtype)
        sane = self._judge(records, inodes.ino(rows))
        self._extents_of(records[sane], rows[sane])
        self._singles(records, inodes.ino(rows))

    def _damaged(self, raw: Array, used: Array, rows: Array) -> Array:
        """Which of the used slots hold no inode record, a record of another number, or one with a wrong checksum."""
        records = raw.reshape(-1).view(INODE_DTYPE)
        inos = self.inodes.ino(rows[used])
        strange = (records["magic"][used] != layout.INODE_MAGIC) | (records["ino"][used] != inos.astype(np.uint64))
        self._blame("inode {}: the record is not this inode's", inos[strange])
        chunks = used // CHUNK_INODES
        whole = np.setdiff1d(chunks[strange], chunks[~strange])
        self.foreign += self.inodes.chunk_numbers[rows[whole * CHUNK_INODES] // CHUNK_INODES].tolist()
        view = raw.reshape(-1).data
        stored = records["crc"]
        broken = np.zeros(len(used), bool)
        for i, slot in enumerate(used.tolist()):
            at = slot * INODE_SIZE
            broken[i] = crc32c(view[at + 8 : at + INODE_CRC_END], crc32c(view[at : at + 4])) != stored[slot]
        broken &= ~strange
        self._blame("inode {}: bad checksum", inos[broken])
        damaged: Array = strange | broken
        return damaged

    def _judge(self, records: Array, inos: Array) -> Array:
        """Check every field of live records; which of them have extents that can be looked at."""
        mode, size, nlink = records["mode"], records["size"], records["nlink"]
        kind = mode & 0o170000
        known = np.isin(kind, _TYPES) & (mode >> 16 == 0)
        link, directory = kind == stat.S_IFLNK, kind == stat.S_IFDIR
        inline = records["target_length"]
        times = np.stack([records[name] for name in ("btime", "mtime", "ctime", "atime")])
        extents, leaf = records["extents"], records["leaf"]
        no_blocks = ~(link | directory | (kind == stat.S_IFREG))
        crowded = (leaf == 0) & (extents > INLINE_EXTENTS) | (leaf != 0) & (extents == 0)
        confused = (inline > layout.INLINE_TARGET_MAX) | (inline != 0) & ((extents != 0) | (leaf != 0))
        for wrong, text, *columns in (
            (~known, "inode {}: mode {:#o} is of no known type", mode),
            (size > layout.FILE_SIZE_MAX, "inode {}: size {} is impossible", size),
            (nlink > layout.LINK_MAX, "inode {}: {} links are too many", nlink),
            (records["rdev"] >> 32 != 0, "inode {}: device number {:#x} is impossible", records["rdev"]),
            (records["flags"] != 0, "inode {}: flags {:#x} are not known", records["flags"]),
            (((times & _NANOS) >= 1_000_000_000).any(axis=0), "inode {}: a time is not valid"),
            (records["xattr_length"] > layout.INLINE_XATTR_MAX, "inode {}: more inline xattrs than fit"),
            ((records["xattr_length"] != 0) & (records["xattr_block"] != 0), "inode {}: xattrs in two places"),
            (crowded, "inode {}: {} extents cannot be where it says", extents),
            ((inline != 0) & ~link, "inode {}: a symlink's target, but it is none"),
            (confused, "inode {}: a symlink's target and extents at once"),
            (link & ((size == 0) | (size > layout.SYMLINK_MAX)), "inode {}: symlink of {} bytes", size),
            (link & (inline != 0) & (inline != size), "inode {}: symlink of {} bytes holds another number", size),
            (link & (inline == 0) & (size <= layout.INLINE_TARGET_MAX) & (size != 0),
             "inode {}: symlink of {} bytes without its target", size),
            (no_blocks & (extents != 0), "inode {}: it has blocks, which its type never has"),
            (directory & (size % self._image.block_size != 0), "inode {}: directory of {} bytes", size),
        ):
            self._blame(text, inos[wrong], *(column[wrong] for column in columns))
        mapped: Array = known & ~crowded & ~confused & ~no_blocks & (inline == 0) & (extents != 0)
        return mapped

    # -- extents --

    def _extents_of(self, records: Array, rows: Array) -> None:
        inline = records["leaf"] == 0
        wanted = np.arange(INLINE_EXTENTS) < records["extents"][inline][:, None]
        at, which = np.nonzero(wanted)
        self._pieces.append((rows[inline][at], records["body"][inline][at, which]))
        for record, row in zip(records[~inline], rows[~inline].tolist(), strict=True):
            self._leaves_of(record, row)

    def _leaves_of(self, record: Array, row: int) -> None:
        """Walk a chain of leaves, up to the first that cannot be believed."""
        image = self._image
        ino, generation, block = int(record["ino"]), int(record["generation"]), int(record["leaf"])
        expected, found, seen = int(record["extents"]), 0, set[int]()
        while block:
            if block not in image.data or block in seen or image.in_chunk(block):
                self._blame_one(ino, f"its chain of extent leaves is broken at block {block}")
                return
            seen.add(block)
            try:
                header, entries = read_leaf(image.pmem.view, block, image.block_size, ino, generation)
            except Corrupt as e:
                self._blame_one(ino, e.why)
                return
            if not header["count"]:
                self._blame_one(ino, f"the extent leaf at block {block} is empty")
            self._owners.add_block(LEAF, block, ino)
            extents = np.frombuffer(bytes(entries), EXTENT_DTYPE)
            self._pieces.append((np.full(len(extents), row, np.int64), extents))
            found += header["count"]
            block = header["next"]
        if found != expected:
            self._blame_one(ino, f"{found} extents found, {expected} expected")

    def _settle_extents(self) -> Extents:
        """All extents that make sense; the others are reported."""
        image = self._image
        rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in self._pieces)])
        table = np.concatenate([np.zeros(0, EXTENT_DTYPE), *(table for _, table in self._pieces)])
        self._pieces.clear()
        order = np.argsort(rows, kind="stable")
        rows, table = rows[order], table[order]
        first, last = np.uint64(image.data.start), np.uint64(image.blocks)
        physical, logical, count = table["physical"], table["logical"], table["count"]
        inside = (physical >= first) & (physical < last) & (count <= last - np.minimum(physical, last))
        inos = self.inodes.ino(rows)
        self._blame("inode {}: extent at {}+{} lies outside the data region",
                    inos[~inside], physical[~inside], count[~inside])  # fmt: skip
        limit = np.uint64(layout.FILE_SIZE_MAX // image.block_size + 1)
        strange = (count == 0) | (table["flags"] > layout.EXTENT_UNWRITTEN)
        strange |= (logical >= limit) | (count > limit - np.minimum(logical, limit))
        self._blame("inode {}: extent at file block {} is empty or not valid", inos[strange], logical[strange])
        good = inside & ~strange
        rows, table = rows[good], table[good]
        logical, physical, count = (table[name].astype(np.int64) for name in ("logical", "physical", "count"))
        extents = Extents(rows, logical, physical, count, table["flags"] != 0)
        ends = extents.logical + extents.count
        wrong = np.flatnonzero((rows[1:] == rows[:-1]) & (extents.logical[1:] < ends[:-1])) + 1
        self._blame("inode {}: extents overlap or are out of order at file block {}",
                    self.inodes.ino(rows[wrong]), extents.logical[wrong])  # fmt: skip
        self._owners.add(DATA, extents.physical, extents.count, self.inodes.ino(rows))
        self._report.counts["extents"] = len(rows)
        return extents

    def _check_coverage(self) -> None:
        """Extents against sizes: directories and symlinks are full, files have nothing written beyond their end."""
        inodes, extents, size = self.inodes, self.extents, self._image.block_size
        blocks = np.minimum(inodes.size, layout.FILE_SIZE_MAX) // size + (inodes.size % size != 0)
        beyond = ~extents.unwritten & (extents.logical + extents.count > blocks[extents.row])
        self._blame("inode {}: written blocks beyond its end, at file block {}",
                    inodes.ino(extents.row[beyond]), extents.logical[beyond])  # fmt: skip
        held = np.bincount(extents.row[~extents.unwritten], extents.count[~extents.unwritten], len(inodes.state))
        full = inodes.is_type(stat.S_IFDIR) | inodes.is_type(stat.S_IFLNK) & (inodes.size > layout.INLINE_TARGET_MAX)
        wrong = np.flatnonzero(full & (held.astype(np.int64) != blocks))
        self._blame("inode {}: {} bytes, but {} blocks", inodes.ino(wrong), inodes.size[wrong],
                    held[wrong].astype(np.int64))  # fmt: skip
        full &= (inodes.size <= layout.SYMLINK_MAX) & (held == blocks)
        links = np.flatnonzero(full & inodes.is_type(stat.S_IFLNK))
        first = extents.physical[np.searchsorted(extents.row, links)] if len(links) else links
        for block, length, ino in zip(first.tolist(), inodes.size[links].tolist(), inodes.ino(links).tolist(), strict=True):
            if b"\0" in self._image.pmem.load(block * size, length):
                self._blame_one(ino, "the target of the symlink has a zero byte")
        mapped = np.bincount(extents.row, extents.count, len(inodes.state)).astype(np.int64)
        wrong = np.flatnonzero(mapped > len(self._image.data))
        self._blame("inode {}: it maps {} blocks, more than there are", inodes.ino(wrong), mapped[wrong])
        wrong = np.flatnonzero((inodes.state == LIVE) & (mapped != inodes.blocks))
        wrong = wrong[[ino not in self.flagged for ino in inodes.ino(wrong).tolist()]]  # what is cut out is not counted
        self._blame("inode {}: it says that it maps {} blocks, but maps {}", inodes.ino(wrong), inodes.blocks[wrong],
                    mapped[wrong])  # fmt: skip

    # -- what few inodes have --

    def _singles(self, records: Array, inos: Array) -> None:
        has_xattrs = (records["xattr_length"] != 0) | (records["xattr_block"] != 0)
        for record, ino in zip(records[has_xattrs], inos[has_xattrs].tolist(), strict=True):
            try:
                self._xattrs(record, ino)
            except FsError as e:
                self._blame_one(ino, e.why.removeprefix(f"inode {ino}: "))
        inline = records["target_length"]
        targets = (inline != 0) & (inline <= layout.INLINE_TARGET_MAX)
        bodies = np.ascontiguousarray(records["body"][targets]).view(np.uint8).reshape(-1, layout.INLINE_TARGET_MAX)
        for body, length, ino in zip(bodies, inline[targets].tolist(), inos[targets].tolist(), strict=True):
            if not body[:length].all():
                self._blame_one(ino, "the target of the symlink has a zero byte")

    def _xattrs(self, record: Array, ino: int) -> None:
        image = self._image
        first = int(record["xattr_block"])
        data = bytes(record["xattrs"])[: int(record["xattr_length"])]
        if first:
            parts = []
            chain = xattr.read_chain(image.pmem.load, image.block_size, image.data, first, ino,
                                     int(record["generation"]))  # fmt: skip
            for block, payload in chain:
                if image.in_chunk(block):
                    raise Corrupt(f"xattr block {block} lies in the inode table")
                self._owners.add_block(XATTR, block, ino)
                parts.append(payload)
            data = b"".join(parts)
        found = xattr.decode(data, f"inode {ino}")
        mode = int(record["mode"])
        if acl.ACCESS in found and acl.equivalent_mode(found[acl.ACCESS])[0] != mode & 0o777:
            self._blame_one(ino, f"its access ACL and its mode {mode & 0o7777:#o} differ")
        if acl.DEFAULT in found:
            acl.parse(found[acl.DEFAULT])
            if not stat.S_ISDIR(mode):
                self._blame_one(ino, "a default ACL, but it is no directory")
