"""Repair of the tree: blocks of directories, entries, link counts, parents, and what no directory has.

Rules
- An entry that leads to no inode goes; one of the wrong type gets its inode's.
- A name that is in a directory twice stays where it is first. A directory with several names keeps the one in its `parent`.
- Of a cycle of directories, the lowest number loses its name.
- What no name leads to goes to /lost+found as `#` and its number, a directory with all that is below it.
- Link counts and parents follow from what is left.

Entries and records are changed in place, through the journal; /lost+found is filled by the verbs of the core.
"""

from __future__ import annotations

import itertools
import stat
from dataclasses import dataclass

import numpy as np

from daxfs.core import layout, namespace
from daxfs.core.directory import parse_block
from daxfs.core.fsck.batch import Batch
from daxfs.core.fsck.dirblocks import INO_END, Entry, build, salvage
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.records import InodeRepair
from daxfs.core.fsck.report import Array, Report
from daxfs.core.fsck.table import FREE, LIVE, Inodes
from daxfs.core.fsck.tree import TreeCheck
from daxfs.core.inode import Inode
from daxfs.core.layout import CHUNK_INODES, INODE, INODE_CRC_END, INODE_SIZE, ROOT_INO
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume
from daxfs.errors import FsError

LOST_AND_FOUND = b"lost+found"
_AT_ONCE = 16  # inodes connected per transaction
_ROOT = Caller(0, 0, 0)


def repair_blocks(image: Image, inodes: Inodes, tree: TreeCheck, batch: Batch, report: Report) -> None:
    """Each damaged block of a directory anew, with the entries that can be read."""
    names = _names(inodes, tree.target, tree.types)
    for _, ino, block, _ in tree.damaged:
        for entry in salvage(image.block(block), block, ino):
            row = _row(inodes, entry)
            if row >= 0 and not entry.doubtful:
                names[row] += 1
    for _, ino, block, index in tree.damaged:
        kept = []
        for entry in salvage(image.block(block), block, ino):
            row = _row(inodes, entry)
            directory = entry.dtype == stat.S_IFDIR >> 12
            if entry.doubtful:
                if row < 0 or names[row] >= (1 if directory else inodes.nlink[row]):
                    continue
                if directory and inodes.parent[row] != ino:
                    continue
                names[row] += 1
            kept.append(entry)
        batch.add([(block * image.block_size, build(block, ino, index, image.block_size, kept))])
        report.fix(f"directory {ino}: block {index} was damaged; {len(kept)} entries of it are kept")


def _names(inodes: Inodes, target: Array, types: Array) -> Array:
    """How many names each row has, of its type."""
    rows = inodes.rows(target)
    right = (rows >= 0) & (inodes.state[rows] == LIVE) & (inodes.mode[rows] >> 12 == types)
    counts: Array = np.bincount(rows[right], minlength=len(inodes.state))
    return counts


def _row(inodes: Inodes, entry: Entry) -> int:
    """Row of a live inode that goes with the entry, -1 if there is none."""
    row = int(inodes.rows(np.array([entry.ino]))[0])
    if row < 0 or inodes.state[row] != LIVE or inodes.mode[row] >> 12 != entry.dtype:
        return -1
    return row


# -- entries, links, parents ---------------------------------------------------------------------------------------------


@dataclass
class Lost:
    """Inode numbers that no name leads to: they go to /lost+found."""

    directories: list[int]
    files: list[int]

    def __bool__(self) -> bool:
        return bool(self.directories or self.files)


class NameRepair:
    """Decides on all entries at once, as arrays; `repair` stores what follows."""

    def __init__(self, image: Image, inodes: Inodes, tree: TreeCheck, records: InodeRepair, batch: Batch,
                 report: Report) -> None:  # fmt: skip
        self._image, self._inodes, self._records, self._batch, self._report = image, inodes, records, batch, report
        self._parent, self._target, self._at, self._types = tree.parent, tree.target, tree.at, tree.types
        self._twice = tree.twice
        self._rows = inodes.rows(self._target)
        self._drop: dict[int, str] = {}  # entry -> why it goes

    def repair(self) -> Lost:
        inodes = self._inodes
        live = (self._rows >= 0) & (inodes.state[self._rows] == LIVE)
        self._drop_all(np.flatnonzero(~live), "leads to no inode")
        self._drop_all(np.flatnonzero(self._target == ROOT_INO), "leads to the root directory")
        for first, second in self._twice:
            if first not in self._drop:
                self._drop.setdefault(second, "is there twice")
        retype = np.flatnonzero(live & (inodes.mode[self._rows] >> 12 != self._types))
        self._directory = inodes.is_type(stat.S_IFDIR)
        self._one_name_each()
        lost = self._hierarchy()
        self._store_entries(retype)
        self._store_links(lost)
        return lost

    def _drop_all(self, entries: Array, why: str) -> None:
        for entry in entries.tolist():
            self._drop.setdefault(entry, why)

    def _kept(self) -> Array:
        keep = np.ones(len(self._target), bool)
        keep[list(self._drop)] = False
        return np.flatnonzero(keep)

    def _one_name_each(self) -> None:
        entries = self._kept()
        entries = entries[self._directory[self._rows[entries]]]
        rows, inodes = self._rows[entries], self._inodes
        said = inodes.ino(self._parent[entries]) == inodes.parent[rows]
        order = np.lexsort((entries, ~said, rows))
        again = np.flatnonzero(rows[order][1:] == rows[order][:-1]) + 1
        self._drop_all(entries[order[again]], "is another name of a directory")

    def _hierarchy(self) -> Lost:
        inodes, directory, count = self._inodes, self._directory, len(self._inodes.state)
        entries = self._kept()
        rows, parent = self._rows[entries], self._parent[entries]
        root = int(inodes.rows(np.array([ROOT_INO]))[0])
        filled = np.bincount(parent, minlength=count) > 0
        named = np.bincount(rows, minlength=count) > 0
        live = inodes.state == LIVE
        self._orphan = live & (inodes.nlink == 0) & ~named & ~(directory & filled)
        self._orphan[root] = False
        below = directory[rows]
        up, name_of = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
        up[rows[below]], name_of[rows[below]] = parent[below], entries[below]
        up[root] = root
        far = up
        for _ in range(count.bit_length()):
            far = np.where(far >= 0, far[far], -1)
        adrift = directory & ~self._orphan & (far != root)
        for row in self._cycles(up, np.unique(far[adrift & (far >= 0)])):
            self._drop[int(name_of[row])] = "is part of a cycle of directories"
            up[row] = -1
        self._up = up
        tops = np.flatnonzero(adrift & (up < 0))
        files = np.flatnonzero(live & ~directory & ~named & ~self._orphan)
        return Lost(inodes.ino(tops).tolist(), inodes.ino(files).tolist())

    def _cycles(self, up: Array, on_cycles: Array) -> list[int]:
        """The lowest row of each cycle; `on_cycles` has at least one row of each."""
        found, seen = [], set[int]()
        for row in on_cycles.tolist():
            cycle = []
            while row not in seen:
                seen.add(row)
                cycle.append(row)
                row = int(up[row])
            if cycle:
                found.append(min(cycle))
        return found

    def _store_entries(self, retype: Array) -> None:
        """Every block of a directory that loses an entry, or in which one changes its type, anew."""
        image, size = self._image, self._image.block_size
        changes = {int(self._at[i]): 0 for i in self._drop}
        types = self._inodes.mode[self._rows[retype]] >> 12
        changes |= {int(self._at[i]): int(t) for i, t in zip(retype.tolist(), types.tolist(), strict=True)
                    if i not in self._drop}  # fmt: skip
        of_block = {int(self._at[i]) // size: int(self._parent[i]) for i in itertools.chain(self._drop, retype.tolist())}
        reasons = {int(self._at[i]): why for i, why in self._drop.items()}
        for block, row in of_block.items():
            header = layout.DIRBLOCK.unpack(image.block(block))
            ino = self._ino(row)
            kept = []
            for at, _, target, dtype, name in parse_block(image.block(block), block, ino, header["index"], INO_END):
                address = block * size + at
                new = changes.get(address, dtype)
                if target and new:
                    kept.append(Entry(at, target, new, name))
                if target and new != dtype:
                    what = f"is of type {new:#o} now, as inode {target}" if new else f"{reasons[address]}; it is removed"
                    self._report.fix(f"directory {ino}: the entry {name!r} {what}")
            self._batch.add([(block * size, build(block, ino, header["index"], size, kept))])
        self._batch.commit()

    def _store_links(self, lost: Lost) -> None:
        inodes, directory, count = self._inodes, self._directory, len(self._inodes.state)
        entries = self._kept()
        rows = self._rows[entries]
        names = np.bincount(rows, minlength=count)
        below = np.bincount(self._parent[entries][directory[rows]], minlength=count)
        expected = np.where(directory, 2 + below, names)
        live = (inodes.state == LIVE) & ~self._orphan
        expected[inodes.rows(np.array(lost.files, np.int64))] = 1  # the name that it gets in lost+found
        parent = np.where(self._up >= 0, inodes.ino(np.maximum(self._up, 0)), inodes.parent)
        moved = directory & (parent != inodes.parent)
        for row in np.flatnonzero(live & (moved | (expected != inodes.nlink))).tolist():
            self._store(row, int(expected[row]), int(parent[row]), moved=bool(moved[row]))
        if self._image.clean:
            for row in np.flatnonzero(self._orphan).tolist():
                self._records.clear(self._ino(row), "it was unlinked")
        self._batch.commit()

    def _ino(self, row: int) -> int:
        return int(self._inodes.chunk_numbers[row // CHUNK_INODES]) * CHUNK_INODES + row % CHUNK_INODES

    def _store(self, row: int, nlink: int, parent: int, *, moved: bool) -> None:
        ino, was = self._ino(row), int(self._inodes.nlink[row])
        address = self._records.address(ino)
        record = bytearray(self._image.pmem.load(address, INODE_SIZE))
        at = INODE.offset["nlink"]
        record[at : at + 4] = nlink.to_bytes(4, "little")
        if nlink != was:
            self._report.fix(f"inode {ino}: its link count is {nlink}, not {was}")
        if moved:
            at = INODE.offset["parent"]
            record[at : at + 8] = parent.to_bytes(8, "little")
            self._report.fix(f"directory {ino}: its parent is {parent}, not {self._inodes.parent[row]}")
        self._batch.add([(address, layout.seal(record, end=INODE_CRC_END))])


# -- lost+found ---------------------------------------------------------------------------------------------------------


def connect(volume: Volume, now: int, lost: Lost, report: Report) -> None:
    """Give everything that is lost a name in /lost+found."""
    try:
        place, called = _place(volume, now)
    except FsError as e:
        count = len(lost.directories) + len(lost.files)
        report.leave(f"there is no room for /lost+found ({e.why}); {count} inodes stay lost")
        return
    inos = [*lost.directories, *lost.files]
    for at in range(0, len(inos), _AT_ONCE):
        some = inos[at : at + _AT_ONCE]
        try:
            given = _connect(volume, now, place, some)
        except FsError as e:
            report.leave(f"inodes {some[0]} to {inos[-1]}: no name in /lost+found can be made ({e.why})")
            return
        for ino, name in zip(some, given, strict=True):
            report.fix(f"inode {ino}: no directory has it; it is in /{called.decode()}/{name.decode()} now")


def _place(volume: Volume, now: int) -> tuple[Inode, bytes]:
    """The directory /lost+found, and its name: lost+found.1 and so on if something else has it."""
    for name in itertools.chain([LOST_AND_FOUND], (LOST_AND_FOUND + b".%d" % i for i in itertools.count(1))):
        found = namespace.index(volume, volume.root).lookup(name)
        if found is None:
            return namespace.mkdir(volume, now, volume.root, name, 0o700, _ROOT), name
        inode = volume.inode(found[0])
        if inode.is_dir:
            return inode, name
    raise AssertionError


def _connect(volume: Volume, now: int, place: Inode, inos: list[int]) -> list[bytes]:
    """The names that they got."""
    index = namespace.index(volume, place)
    names = []
    with volume.transaction(now) as txn:
        for ino in inos:
            inode = volume.inode(ino)
            others = (b"#%d.%d" % (ino, i) for i in itertools.count(1))
            name = next(n for n in itertools.chain([b"#%d" % ino], others) if not index.lookup(n))
            index.insert(txn, name, ino, inode.mode >> 12)
            names.append(name)
            if inode.is_dir:
                inode.parent = place.ino
                place.nlink += 1
                txn.dirty(inode)
        place.mtime = place.ctime = now
        txn.dirty(place)
    for ino in inos:
        volume.drop(volume.inode(ino))
    return names


def free_numbers(inodes: Inodes) -> list[int]:
    """Inode numbers that can be used, the lowest one last."""
    numbers: list[int] = inodes.in_state(FREE)[::-1].tolist()
    return numbers
