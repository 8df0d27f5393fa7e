"""Blocks with two owners: who keeps them, and what the other gets.

The order of claims: the fixed regions and the inode table; leaves, xattr and ledger blocks, which know whose they are;
directory blocks that know it, too; then files, the one that was changed last (ctime) before the others, of equals the
lower inode number; then directory blocks that do not say whose they are. Of two files the loser gets a copy of the block,
since nobody can tell whose bytes they are, and a hole if there is no room for it. Who loses to metadata gets a hole: the
bytes are not a file's. A directory loses its block, and the names in it.

Claims that nobody contests never leave the arrays.
"""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from daxfs.core import layout
from daxfs.core.alloc import without
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.report import Array, Report
from daxfs.core.fsck.space import Owners, merged
from daxfs.core.fsck.table import Extents, Inodes
from daxfs.core.layout import DIRBLOCK_MAGIC, INODE
from daxfs.core.runs import RunSet
from daxfs.core.volume import Volume
from daxfs.errors import NoSpace

_PEEK_FACTOR = 4  # directory blocks looked at, in images: more claims than that are not honest


@dataclass
class Cut:
    """A piece of a file that it loses; `copy`: it gets the bytes in a block of its own."""

    logical: int
    physical: int
    count: int
    unwritten: bool
    copy: bool


def contested(owners: Owners, extents: Extents) -> tuple[Array, Array]:
    """Which extents overlap anything, and the metadata that is overlapped: runs (start, end), apart and in order."""
    meta_starts, meta_ends = owners.metadata()
    starts = np.concatenate((meta_starts, extents.physical))
    ends = np.concatenate((meta_ends, extents.physical + extents.count))
    order = np.argsort(starts, kind="stable")
    first = np.concatenate(([True], starts[order][1:] >= np.maximum.accumulate(ends[order])[:-1]))
    cluster = np.cumsum(first)
    crowded = (np.bincount(cluster) > 1)[cluster]
    members = order[crowded]
    metadata = members[members < len(meta_starts)]
    data = members[members >= len(meta_starts)] - len(meta_starts)
    return np.sort(data), merged(meta_starts[metadata], meta_ends[metadata])


def losses(image: Image, inodes: Inodes, extents: Extents, which: Array,
           metadata: Array) -> Iterator[tuple[int, list[Cut]]]:  # fmt: skip
    """(inode, what it loses) of everybody who loses something."""
    fixed, files = RunSet(), RunSet()  # claimed so far
    fixed.load(np.ascontiguousarray(metadata[:, 0], np.uint64),
               np.ascontiguousarray(metadata[:, 1] - metadata[:, 0], np.uint64))  # fmt: skip
    directory = (inodes.mode[extents.row[which]] & 0o170000) == stat.S_IFDIR
    budget = _PEEK_FACTOR * image.blocks
    doubtful: list[tuple[int, int, int, int]] = []  # blocks of directories that do not say whose they are
    lost: dict[int, list[Cut]] = {}
    for i in which[directory].tolist():
        ino, logical, physical, count = _extent(inodes, extents, i)
        budget -= count
        knows = _own_blocks(image, ino, physical, count) if budget > 0 else np.zeros(count, bool)
        for start, n, right in _stretches(knows):
            piece = ino, logical + start, physical + start, n
            if right:
                _claim(fixed, piece, lost)
            else:
                doubtful.append(piece)
    yield from _file_losses(image, inodes, extents, which[~directory], fixed, files)
    for start, count in files.runs():
        fixed.add(start, count)
    for piece in doubtful:
        _claim(fixed, piece, lost)
    yield from lost.items()


def _claim(owned: RunSet, piece: tuple[int, int, int, int], lost: dict[int, list[Cut]]) -> None:
    """A directory (inode, logical, physical, count) takes what nobody has, and loses the rest."""
    ino, logical, physical, count = piece
    taken = owned.within(physical, count)
    for free in without((physical, count), taken):
        owned.add(*free)
    for start, n in taken:
        lost.setdefault(ino, []).append(Cut(logical + start - physical, start, n, False, False))


def _file_losses(image: Image, inodes: Inodes, extents: Extents, which: Array, fixed: RunSet,
                 files: RunSet) -> Iterator[tuple[int, list[Cut]]]:  # fmt: skip
    """Files take what neither metadata nor another file has; `files` is what they took."""
    rows = np.unique(extents.row[which])
    inos, ctime = inodes.ino(rows), _ctime(image, rows)
    at = np.searchsorted(rows, extents.row[which])
    order = np.lexsort((extents.logical[which], inos[at], ~ctime[at]))
    cuts: list[Cut] = []
    last = -1
    for i in which[order].tolist():
        ino, logical, physical, count = _extent(inodes, extents, i)
        if ino != last and cuts:
            yield last, cuts
            cuts = []
        last = ino
        taken = [(run, False) for run in fixed.within(physical, count)]
        taken = sorted(taken + [(run, True) for run in files.within(physical, count)])
        for piece in without((physical, count), [run for run, _ in taken]):
            files.add(*piece)
        unwritten = bool(extents.unwritten[i])
        cuts += [Cut(logical + start - physical, start, n, unwritten, copy) for (start, n), copy in taken]
    if cuts:
        yield last, cuts


def settle(volume: Volume, now: int, ino: int, cuts: list[Cut], report: Report) -> None:
    """Take the blocks away from the inode, which is sound, in one transaction."""
    try:
        copied = _settle(volume, now, ino, cuts)
    except NoSpace:
        try:
            copied = _settle(volume, now, ino, [Cut(c.logical, c.physical, c.count, c.unwritten, False) for c in cuts])
        except NoSpace as e:
            report.leave(f"inode {ino}: it shares blocks with others, and there is no room to part them ({e.why})")
            return
    total = sum(cut.count for cut in cuts)
    got = "it has copies of them now" if copied == total else "they are holes now"
    if 0 < copied < total:
        got = f"it has copies of {copied} now, the others are holes"
    report.fix(f"inode {ino}: {total} of its blocks belong to others, the first is {cuts[0].physical}; {got}")


def _settle(volume: Volume, now: int, ino: int, cuts: list[Cut]) -> int:
    """How many blocks were copied."""
    size, pmem, copied = volume.block_size, volume.pmem, 0
    inode = volume.inode(ino)
    try:
        with volume.transaction(now) as txn:
            txn.dirty(inode)
            for cut in cuts:
                inode.map.carve(cut.logical, cut.count)
                if not cut.copy:
                    continue
                logical, physical = cut.logical, cut.physical
                for start, count in txn.take(cut.count):
                    pmem.copy(physical * size, start * size, count * size)
                    pmem.flush(start * size, count * size)
                    inode.map.insert(logical, start, count, cut.unwritten)
                    logical, physical, copied = logical + count, physical + count, copied + count
    finally:
        volume.drop(inode)
    return copied


def _extent(inodes: Inodes, extents: Extents, i: int) -> tuple[int, int, int, int]:
    row = int(extents.row[i])
    ino = int(inodes.chunk_numbers[row // layout.CHUNK_INODES]) * layout.CHUNK_INODES + row % layout.CHUNK_INODES
    return ino, int(extents.logical[i]), int(extents.physical[i]), int(extents.count[i])


def _own_blocks(image: Image, ino: int, physical: int, count: int) -> Array:
    """Which blocks of a run say that they are this directory's."""
    words = np.concatenate([
        image.pmem.gather(np.arange(at, min(at + 1024, physical + count)), image.block_size).view("<u8")[:, :4]
        for at in range(physical, physical + count, 1024)
    ])  # fmt: skip
    magic = words[:, 0] & np.uint64(0xFFFF_FFFF) == DIRBLOCK_MAGIC
    right: Array = magic & (words[:, 1] == np.arange(physical, physical + count, dtype=np.uint64)) & (words[:, 2] == ino)
    return right


def _stretches(flags: Array) -> Iterator[tuple[int, int, bool]]:
    """(start, length, flag) of the stretches of equal flags."""
    edges = np.concatenate(([0], np.flatnonzero(flags[1:] != flags[:-1]) + 1, [len(flags)])).tolist()
    for start, end in itertools.pairwise(edges):
        yield start, end - start, bool(flags[start])


def _ctime(image: Image, rows: Array) -> Array:
    at = image.chunk_blocks[rows // layout.CHUNK_INODES] * image.block_size + rows % layout.CHUNK_INODES * layout.INODE_SIZE
    return np.array([image.pmem.load_word(a + INODE.offset["ctime"]) for a in at.tolist()], np.uint64)
