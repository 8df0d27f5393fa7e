"""Ageing: files come, grow side by side, are rewritten and go until a volume has been turned over several times; then how
many extents have they? The same operations, from one seed, on daxfs and on ext4.

A file gets its size when it is born, 4 KiB to 4 MiB, evenly by its logarithm. Some are written at once, in pieces of 1 MiB
as a FUSE mount sees them; the others grow by appends of 4 to 256 KiB, `WRITERS` of them in turns. Whenever the volume is as
full as asked for, files chosen at random are deleted. Now and then one is overwritten in place, grows once more, or is
emptied and written anew.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daxfs.core import fileops, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume

BLOCK = 4096
SIZE_MIN, SIZE_MAX = 4 << 10, 4 << 20
APPEND_MIN, APPEND_MAX = 4 << 10, 256 << 10
PIECE = 1 << 20
WRITERS = 4
DIRECTORIES = 16
_FIEMAP = 0xC020660B
_FIEMAP_SYNC = 1
_DATA = os.urandom(PIECE)


class Place(Protocol):
    """A file system under test; files have numbers, and are open from `create` or `open` to `close`."""

    def room(self) -> int: ...
    def create(self, file: int) -> None: ...
    def open(self, file: int, *, empty: bool) -> None: ...
    def write(self, file: int, at: int, length: int) -> None: ...
    def close(self, file: int) -> None: ...
    def delete(self, file: int) -> None: ...
    def extents(self, file: int) -> int: ...


@dataclass(frozen=True)
class Course:
    """One run: how full the volume shall be, how many times its room is written, and the seed."""

    fill: float = 0.87
    turnovers: float = 6
    seed: int = 1
    at_once: float = 0.4  # of the files are written without a pause


@dataclass
class Aged:
    """What came of it: extents of each file that is left, by size in blocks."""

    files: dict[int, int]
    extents: dict[int, int]
    written: int
    seconds: float
    cpu_s: float

    def summary(self) -> dict[str, float]:
        counts = sorted(self.extents.values())
        large = sorted(n for file, n in self.extents.items() if self.files[file] >= 1 << 20)
        return {
            "files": len(counts),
            "mean": round(sum(counts) / len(counts), 3),
            "median": counts[len(counts) // 2],
            "p99": counts[len(counts) * 99 // 100],
            "max": counts[-1],
            "large mean": round(sum(large) / max(1, len(large)), 3),
            "MiB/s": round(self.written / self.seconds / (1 << 20)),
        }


class Ageing:
    """The run itself: `steps` yields after each operation."""

    def __init__(self, place: Place, course: Course) -> None:
        self._place = place
        self._dice = random.Random(course.seed)
        self._course = course
        self.files: dict[int, int] = {}  # number -> bytes
        self._order: list[int] = []  # of those that are complete
        self._growing: list[tuple[int, int, int]] = []  # (number, bytes to come, bytes of an append)
        self._next = 0
        self.live = self.written = 0
        self._limit = int(place.room() * course.fill)
        self._total = int(place.room() * course.turnovers)

    def steps(self) -> Iterator[float]:
        """How far it is, 0 to 1."""
        while self.written < self._total:
            self._step()
            yield self.written / self._total
        while self._growing:
            self._grow()
            yield 1.0

    def _size(self) -> int:
        return int(SIZE_MIN * (SIZE_MAX / SIZE_MIN) ** self._dice.random()) + BLOCK - 1 & -BLOCK

    def _step(self) -> None:
        dice = self._dice.random()
        if len(self._growing) >= WRITERS or (dice < 0.8 and self._growing):
            self._grow()
        elif dice < 0.9 or not self._order:
            self._born()
        elif dice < 0.94:
            self._overwrite()
        elif dice < 0.97:
            self._again(empty=False)
        else:
            self._again(empty=True)

    def _born(self) -> None:
        size = self._size()
        self._make_room(size)
        file, self._next = self._next, self._next + 1
        self.files[file] = 0
        self._place.create(file)
        if self._dice.random() < self._course.at_once:
            self._fill(file, size)
        else:
            self._start(file, size)

    def _fill(self, file: int, size: int) -> None:
        while size:
            size -= self._write(file, min(PIECE, size))
        self._done(file)

    def _start(self, file: int, size: int) -> None:
        piece = int(APPEND_MIN * (APPEND_MAX / APPEND_MIN) ** self._dice.random()) & -BLOCK
        self._growing.append((file, size, piece))

    def _grow(self) -> None:
        at = self._dice.randrange(len(self._growing))
        file, left, piece = self._growing[at]
        left -= self._write(file, min(piece, left))
        self._growing[at] = file, left, piece
        if not left:
            del self._growing[at]
            self._done(file)

    def _write(self, file: int, length: int) -> int:
        self._place.write(file, self.files[file], length)
        self.files[file] += length
        self.live += length
        self.written += length
        return length

    def _done(self, file: int) -> None:
        self._place.close(file)
        self._order.append(file)

    def _take(self) -> int:
        """Some complete file; it is not one any more."""
        at = self._dice.randrange(len(self._order))
        self._order[at], self._order[-1] = self._order[-1], self._order[at]
        return self._order.pop()

    def _make_room(self, size: int) -> None:
        coming = sum(left for _, left, _ in self._growing)
        while self.live + coming + size > self._limit and self._order:
            file = self._take()
            self._place.delete(file)
            self.live -= self.files.pop(file)

    def _overwrite(self) -> None:
        file = self._dice.choice(self._order)
        size = self.files[file]
        at = self._dice.randrange(size) & -BLOCK
        self._place.open(file, empty=False)
        self._place.write(file, at, min(size - at, PIECE))
        self._place.close(file)

    def _again(self, *, empty: bool) -> None:
        file = self._take()
        size = self._size()
        if empty:
            self.live -= self.files[file]
            self.files[file] = 0
        elif self.files[file] + size > SIZE_MAX:
            self._order.append(file)
            return
        self._make_room(size)
        self._place.open(file, empty=empty)
        if self._dice.random() < 0.5:
            self._fill(file, size)
        else:
            self._start(file, size)


def age(place: Place, course: Course) -> Aged:
    run, began, cpu = Ageing(place, course), time.perf_counter(), time.process_time()
    for _ in run.steps():
        pass
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    return Aged(run.files, {file: place.extents(file) for file in run.files}, run.written, seconds, spent)


class Core:
    """A volume of this process."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._now = 1
        root = Caller(0, 0)
        self._directories = [namespace.mkdir(volume, 1, volume.root, b"d%d" % i, 0o755, root) for i in range(DIRECTORIES)]
        self._caller = root
        self._open: dict[int, Inode] = {}

    def room(self) -> int:
        return self._volume.alloc.available * self._volume.block_size

    def _name(self, file: int) -> tuple[Inode, bytes]:
        return self._directories[file % DIRECTORIES], b"f%d" % file

    def create(self, file: int) -> None:
        parent, name = self._name(file)
        inode = namespace.create(self._volume, self._now, parent, name, 0o644, self._caller)
        inode.opens = 1
        self._open[file] = inode

    def open(self, file: int, *, empty: bool) -> None:
        inode = namespace.lookup(self._volume, *self._name(file))
        assert inode is not None
        inode.opens = 1
        self._open[file] = inode
        if empty:
            fileops.truncate(self._volume, self._now, inode, 0)

    def write(self, file: int, at: int, length: int) -> None:
        done = fileops.write(self._volume, self._now, self._open[file], at, memoryview(_DATA)[:length])
        assert done == length

    def close(self, file: int) -> None:
        inode = self._open.pop(file)
        inode.opens = 0
        fileops.reap(self._volume, self._now, inode)

    def delete(self, file: int) -> None:
        parent, name = self._name(file)
        inode = namespace.lookup(self._volume, parent, name)
        assert inode is not None
        namespace.unlink(self._volume, self._now, parent, name)
        fileops.reap(self._volume, self._now, inode)

    def extents(self, file: int) -> int:
        inode = namespace.lookup(self._volume, *self._name(file))
        assert inode is not None
        return len(inode.map.runs(0, 1 << 52))


class Mounted:
    """A directory of any mounted file system; extents by FIEMAP, neighbours joined."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[int, int] = {}
        for i in range(DIRECTORIES):
            (root / f"d{i}").mkdir()

    def room(self) -> int:
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize

    def path(self, file: int) -> Path:
        return self._root / f"d{file % DIRECTORIES}" / f"f{file}"

    def create(self, file: int) -> None:
        self._open[file] = os.open(self.path(file), os.O_CREAT | os.O_EXCL | os.O_RDWR)

    def open(self, file: int, *, empty: bool) -> None:
        self._open[file] = os.open(self.path(file), os.O_RDWR | (os.O_TRUNC if empty else 0))

    def write(self, file: int, at: int, length: int) -> None:
        done = os.pwrite(self._open[file], memoryview(_DATA)[:length], at)
        assert done == length

    def close(self, file: int) -> None:
        os.close(self._open.pop(file))

    def delete(self, file: int) -> None:
        self.path(file).unlink()

    def extents(self, file: int) -> int:
        fd = os.open(self.path(file), os.O_RDONLY)
        try:
            return fiemap(fd)
        finally:
            os.close(fd)


def fiemap(fd: int) -> int:
    """How many extents a file has that are not neighbours on the disk."""
    count = start = 0
    behind: int = -1
    while True:
        room = 512
        buffer = bytearray(struct.pack("<QQIIII", start, (1 << 64) - 1 - start, _FIEMAP_SYNC, 0, room, 0) + bytes(56 * room))
        fcntl.ioctl(fd, _FIEMAP, buffer)
        (mapped,) = struct.unpack_from("<I", buffer, 20)
        for i in range(mapped):
            logical, physical, length = struct.unpack_from("<QQQ", buffer, 32 + 56 * i)
            (flags,) = struct.unpack_from("<I", buffer, 32 + 56 * i + 40)
            count += int(physical != behind)
            behind, start = physical + length, logical + length
            if flags & 1:  # FIEMAP_EXTENT_LAST
                return count
        if not mapped:
            return count
