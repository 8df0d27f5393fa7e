"""The tree of directories: every entry leads to an inode of its type, every inode has as many names as it says, every
directory hangs under the root exactly once.

Entries are read directory by directory, in Python; what they add up to is judged as arrays.
"""

from __future__ import annotations

import stat
from array import array

import numpy as np

from daxfs.core.directory import parse_block
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.report import Array, Progress, Report
from daxfs.core.fsck.table import DAMAGED, FREE, LIVE, Extents, Inodes
from daxfs.core.layout import CHUNK_INODES, ROOT_INO
from daxfs.errors import Corrupt

_DAMAGED_BLOCKS_MAX = 100  # of one directory; then the rest of it is not read
_INO_END = 1 << 63
_INO_LIKELY_END = 1 << 48


class TreeCheck:
    """For repairs: the entries as arrays, `damaged` blocks (the directory's row and number, block, place in the directory),
    and pairs of entries of a directory that have the same name (`twice`). `chunks_end`: entries name chunks up to there
    that the table does not have. `thorough`: read on however much is damaged."""

    def __init__(self, image: Image, inodes: Inodes, extents: Extents, report: Report, progress: Progress, *,
                 thorough: bool = False) -> None:  # fmt: skip
        self._image = image
        self._inodes = inodes
        self._extents = extents
        self._report = report
        # One per entry: the directory's row, the inode it leads to, its type, its address on the image.
        self._parent, self._target, self._at = array("q"), array("q"), array("q")
        self._type = bytearray()
        self.damaged: list[tuple[int, int, int, int]] = []
        self.twice: list[tuple[int, int]] = []
        self._thorough = thorough
        self._read(progress)
        self._check()

    # -- reading --

    def _read(self, progress: Progress) -> None:
        inodes, extents = self._inodes, self._extents
        directories = np.flatnonzero(inodes.is_type(stat.S_IFDIR))
        first = np.searchsorted(extents.row, directories, "left").tolist()
        last = np.searchsorted(extents.row, directories, "right").tolist()
        inos = inodes.ino(directories).tolist()
        for i, row in enumerate(directories.tolist()):
            if i % 1000 == 0:
                progress("directories", i, len(inos))
            self._read_directory(row, inos[i], range(first[i], last[i]))

    def _read_directory(self, row: int, ino: int, which: range) -> None:
        names: dict[bytes, int] = {}
        damaged = 0
        for i in which:
            start, logical = int(self._extents.physical[i]), int(self._extents.logical[i])
            for step in range(int(self._extents.count[i])):
                try:
                    self._read_block(row, ino, start + step, logical + step, names)
                except Corrupt as e:
                    self._report.error(e.why)
                    self.damaged.append((row, ino, start + step, logical + step))
                    damaged += 1
                if damaged > _DAMAGED_BLOCKS_MAX and not self._thorough:
                    self._report.error(f"directory {ino}: too many damaged blocks, the rest of it is not read")
                    return

    def _read_block(self, row: int, ino: int, block: int, index: int, names: dict[bytes, int]) -> None:
        base = block * self._image.block_size
        for at, _, target, dtype, name in parse_block(self._image.block(block), block, ino, index, _INO_END):
            if target:
                entry = len(self._at)
                first = names.setdefault(name, entry)
                if first != entry:
                    self._report.error(f"directory {ino}: the name {name!r} is in it twice")
                    self.twice.append((first, entry))
                self._parent.append(row)
                self._target.append(target)
                self._type.append(dtype)
                self._at.append(base + at)

    @property
    def parent(self) -> Array:
        """Row of each entry's directory."""
        return np.array(self._parent, np.int64)

    @property
    def target(self) -> Array:
        """The inode number that each entry leads to."""
        return np.array(self._target, np.int64)

    @property
    def at(self) -> Array:
        """Address of each entry, in bytes."""
        return np.array(self._at, np.int64)

    @property
    def types(self) -> Array:
        return np.frombuffer(bytes(self._type), np.uint8)

    def _name(self, entry: int) -> str:
        """How an entry is called in a sentence."""
        at = self._at[entry]
        length = self._image.pmem.load(at + 14, 1)[0]
        ino = self._inodes.ino(np.array([self._parent[entry]]))[0]
        return f"directory {ino}: entry {self._image.pmem.load(at + 16, length)!r}"

    # -- judging --

    def _check(self) -> None:
        inodes, report = self._inodes, self._report
        parent, target, types = self.parent, self.target, self.types
        rows = inodes.rows(target)
        absent = target[(rows < 0) & (target < _INO_LIKELY_END)]
        self.chunks_end = int(absent.max(initial=-1)) // CHUNK_INODES + 1
        state = np.where(rows < 0, FREE, inodes.state[rows]) if len(inodes.state) else np.zeros(len(rows), np.uint8)
        self._entries(np.flatnonzero(state == FREE), target, "leads to inode {}, which does not exist")
        self._entries(np.flatnonzero(state == DAMAGED), target, "leads to inode {}, which is damaged")
        sound = np.flatnonzero(state == LIVE)
        wrong = sound[inodes.mode[rows[sound]] >> 12 != types[sound]]
        self._entries(wrong, target, "is of another type than inode {}")
        parent, rows = parent[sound], rows[sound]
        self._links(parent, rows)
        self._hierarchy(parent, rows)
        live = inodes.state == LIVE
        report.counts.update(
            inodes=int(live.sum()), files=int(inodes.is_type(stat.S_IFREG).sum()),
            directories=int(inodes.is_type(stat.S_IFDIR).sum()), symlinks=int(inodes.is_type(stat.S_IFLNK).sum()),
            entries=len(target), unlinked=int((live & (inodes.nlink == 0)).sum()),
        )  # fmt: skip

    def _entries(self, which: Array, target: Array, text: str) -> None:
        for entry in which[:1000].tolist():
            self._report.error(f"{self._name(entry)} {text.format(target[entry])}")
        if len(which) > 1000:
            self._report.error(f"{len(which) - 1000} more entries like the last one")

    def _links(self, parent: Array, rows: Array) -> None:
        """Exact link counts: names of a file; of a directory its name, itself, and its subdirectories."""
        inodes, report, count = self._inodes, self._report, len(self._inodes.state)
        live, directory = inodes.state == LIVE, inodes.is_type(stat.S_IFDIR)
        names = np.bincount(rows, minlength=count)
        below = np.bincount(parent[directory[rows]], minlength=count)
        unlinked = live & (inodes.nlink == 0)
        expected = np.where(directory & ~unlinked, 2 + below, names)
        wrong = np.flatnonzero(live & (expected != inodes.nlink))
        lost = live & ~directory & (names == 0) & ~unlinked
        report.each("inode {}: no directory has it, but its link count is {}",
                    inodes.ino(np.flatnonzero(lost)), inodes.nlink[lost])  # fmt: skip
        wrong = wrong[~lost[wrong]]
        report.each("inode {}: link count {} should be {}", inodes.ino(wrong), inodes.nlink[wrong], expected[wrong])
        filled = np.flatnonzero(unlinked & directory & (np.bincount(parent, minlength=count) != 0))
        report.each("directory {}: unlinked, but not empty", inodes.ino(filled))
        orphans = inodes.ino(np.flatnonzero(unlinked & (names == 0)))
        if self._image.clean:
            report.each("inode {}: unlinked, but still there on a clean volume", orphans)
        elif len(orphans):
            report.note(f"{len(orphans)} unlinked inodes were in use; the next mount frees them")

    def _hierarchy(self, parent: Array, rows: Array) -> None:
        """One parent each, the one it names itself, and a way up to the root."""
        inodes, report = self._inodes, self._report
        directory = inodes.is_type(stat.S_IFDIR)
        root = int(inodes.rows(np.array([ROOT_INO]))[0])
        if root < 0 or not directory[root] or inodes.nlink[root] == 0:
            report.error("the root inode is not a directory")
            return
        below = directory[rows]
        parent, rows = parent[below], rows[below]
        names = np.bincount(rows, minlength=len(directory))
        names[root] += 1
        many = np.flatnonzero(directory & (names > 1))
        report.each("directory {}: it is in {} places of the tree", inodes.ino(many), names[many])
        up = np.full(len(directory), -1, np.int64)
        up[rows] = parent
        up[root] = root
        named = np.flatnonzero(directory & (up >= 0) & (inodes.ino(up) != inodes.parent))
        report.each("directory {}: its parent is said to be {}, but is {}", inodes.ino(named), inodes.parent[named],
                    inodes.ino(up[named]))  # fmt: skip
        # Ever longer steps up: twice as far each round, so a cycle of any length ends it after 64 rounds.
        linked = directory & (inodes.nlink != 0)
        for _ in range(len(directory).bit_length()):
            up = np.where(up >= 0, up[up], -1)
        adrift = np.flatnonzero(linked & (up != root))
        report.each("directory {}: it does not hang under the root", inodes.ino(adrift))
