"""What pins cost: rows of times, each beside what it has to be compared with, and with what it made another client wait.

    PIN+UNPIN           of one block, beside two empty ioctls: of a number that nobody knows, so that the server does nothing
                        but say so (ENOTTY). Those of the same mount, and those of the null pyfuse3 file system
    nothing             how long another client waits at most while nobody asks for anything: what the machine itself does
    pin ...             one PIN of a file of so many extents (its UNPIN is not counted)
    truncate ...        one truncate to nothing of a file of so many extents, so many of them pinned (policy `busy`)
    allocate ...        4 KiB more of a file, with that many busy extents, beside none
    free ...            from the UNPIN (or the close) until the last busy block is free
    load, store ...     through Pin.map, beside the same between two pieces of anonymous memory

Short runs of both sides take turns, so that they meet the same machine. A round has a mount of its own (bed.py).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from daxfs import abi
from daxfs import client as daxfs
from daxfs.bench.bed import BLOCK, Bed, Fragmented
from daxfs.bench.watch import Watcher, watching
from daxfs.client import calls

EMPTY = 3 << 30 | abi.PIN.size << 16 | abi.IOC_TYPE << 8 | 0xFF  # carries as much as PIN, both ways; nobody knows it
WRITE = abi.FOLL_PIN | abi.FOLL_WRITE
STALL_MAX_S = 0.010  # what one request may keep the daemon's loop
ROUND_TRIP_MOST = 1.2  # PIN+UNPIN, beside two empty ioctls
COPIES: tuple[tuple[str, int, float | None, float | None], ...] = (  # bytes, how much longer than memcpy, so many per second
    ("4k", 4096, None, 1e6),
    ("1M", 1 << 20, 1 / 0.9, None),
)
NOTHING_S = 0.3
COPY_BYTES = 256 << 20  # that one cell of a copying row moves at most


@dataclass(frozen=True)
class PinScale:
    """How much work a round is. Extents of the rows, and calls of the short runs."""

    extents: tuple[int, int, int]  # of files of `blocks` blocks
    blocks: int
    few: int
    many: int
    busy: int
    calls: int


FULL = PinScale(extents=(1, 1000, 262_144), blocks=262_144, few=1000, many=100_000, busy=1_000_000, calls=2000)
QUICK = PinScale(extents=(1, 100, 16_384), blocks=16_384, few=100, many=10_000, busy=20_000, calls=500)


@dataclass(frozen=True)
class Cell:
    """One round of a row: seconds, those of what it is compared with, and the longest wait of another client meanwhile."""

    seconds: float
    beside: float | None = None
    stall: float | None = None


@dataclass
class PinRow:
    name: str
    beside: str = ""  # what it is compared with
    most: float | None = None  # how much longer than that it may take
    extents: int = 0  # that it touches
    stall_most: float | None = None
    least_per_s: float | None = None
    cells: list[Cell] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(cell.seconds for cell in self.cells)

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' own ratios."""
        ratios = [cell.seconds / cell.beside for cell in self.cells if cell.beside]
        return statistics.median(ratios) if ratios else None

    @property
    def stall(self) -> float | None:
        stalls = [cell.stall for cell in self.cells if cell.stall is not None]
        return statistics.median(stalls) if stalls else None

    @property
    def met(self) -> bool | None:
        """Whether it reaches its goal; None if it has none."""
        if self.least_per_s is not None:
            return 1 / self.seconds >= self.least_per_s
        if self.most is not None and self.ratio is not None:
            return self.ratio <= self.most
        if self.stall_most is not None and self.stall is not None:
            return self.stall <= self.stall_most
        return None

    @property
    def goal(self) -> str:
        """What it should be; empty if it has no goal."""
        if self.least_per_s is not None:
            return f"at least {self.least_per_s:,.0f}/s"
        if self.most is not None:
            return f"at most {self.most:.3g}x {self.beside}"
        if self.stall_most is not None:
            return f"nobody waits {self.stall_most * 1e3:g} ms"
        return ""


class PinRows:
    """All rows, and how they are measured. `null`: a file of the null file system, if that is mounted."""

    def __init__(self, scale: PinScale, wanted: str = "", null: Path | None = None) -> None:
        self.scale = scale
        self._wanted = wanted
        self._null = null
        self._rows: dict[str, PinRow] = {}
        self._measures: list[Callable[[Bed, Watcher], None]] = []
        self._declare()

    @property
    def rows(self) -> list[PinRow]:
        """Those that were asked for."""
        return [row for row in self._rows.values() if self._wants(row)]

    def _wants(self, row: PinRow) -> bool:
        return self._wanted in f"pins: {row.name}"

    def measure(self, scratch: Path) -> None:
        """One round."""
        if not self.rows:
            return
        bed = Bed(scratch, self._files())
        try:
            bed.start()
            with watching(bed.path("watched")) as watcher:
                for measure in self._measures:
                    measure(bed, watcher)
                    bed.await_free()
        finally:
            bed.end()

    def _files(self) -> dict[str, Fragmented]:
        scale = self.scale
        files = {f"pin-{n}": Fragmented(n, scale.blocks // n) for n in scale.extents}
        for extents, pinned in self._truncates():
            files[f"truncate-{extents}-{pinned}"] = Fragmented(extents)
        return files | {"busy": Fragmented(scale.busy), "free": Fragmented(scale.many), "close": Fragmented(scale.many)}

    def _truncates(self) -> list[tuple[int, int]]:
        """(extents, how many of them are pinned)"""
        few, many = self.scale.few, self.scale.many
        return [(few, 0), (few, few), (many, 0), (many, few), (many, many)]

    def _add(self, row: PinRow, measure: Callable[[Bed, Watcher], Cell]) -> None:
        self._rows[row.name] = row
        if self._wants(row):
            self._measures.append(lambda bed, watcher: row.cells.append(measure(bed, watcher)))

    def _declare(self) -> None:
        scale = self.scale
        self._add(PinRow("PIN+UNPIN", "two empty ioctls", ROUND_TRIP_MOST), self._round_trip)
        if self._null is not None:
            row = PinRow("PIN+UNPIN beside nullfs", "two empty ioctls of nullfs", ROUND_TRIP_MOST)
            self._add(row, self._round_trip_beside_null)
        self._add(PinRow("nothing"), lambda bed, watcher: Cell(NOTHING_S, stall=watcher.idle(NOTHING_S)))
        size = f"{scale.blocks * BLOCK >> 20:,} MiB"
        for n in scale.extents:
            self._add(PinRow(f"pin {size} in {n:,} extents", extents=n), self._pin(f"pin-{n}"))
        for extents, pinned in self._truncates():
            name = f"truncate {extents:,} extents, {pinned:,} pinned"
            self._add(PinRow(name, extents=extents), self._truncate(f"truncate-{extents}-{pinned}", pinned))
        self._add(PinRow(f"allocate, {scale.busy:,} extents busy", "none busy", 1.2), self._allocate)
        unpin = PinRow(f"free {scale.many:,} extents of a pin", extents=scale.many)
        unpin.stall_most = STALL_MAX_S
        self._add(unpin, self._free)
        close = PinRow(f"free {scale.many:,} pins of an extent each", extents=scale.many)
        close.stall_most = STALL_MAX_S
        self._add(close, self._close)
        for text, n, most, least in COPIES:
            for verb in ("load", "store"):
                row = PinRow(f"{verb} {text}", "memcpy", most, least_per_s=least)
                self._add(row, self._copy(n, load=verb == "load"))

    # -- calls --

    def _round_trip(self, bed: Bed, watcher: Watcher) -> Cell:
        with _opened(bed.path(f"pin-{self.scale.extents[0]}")) as fd:
            return beside(lambda n: pin_and_unpin(fd, n), lambda n: empty_ioctls(fd, 2 * n), self.scale.calls)

    def _round_trip_beside_null(self, bed: Bed, watcher: Watcher) -> Cell:
        assert self._null is not None
        with _opened(bed.path(f"pin-{self.scale.extents[0]}")) as fd, _opened(self._null) as null:
            return beside(lambda n: pin_and_unpin(fd, n), lambda n: empty_ioctls(null, 2 * n), self.scale.calls)

    def _allocate(self, bed: Bed, watcher: Watcher) -> Cell:
        """Both sides on one mount: before, while, and after the extents are busy."""
        scale = self.scale
        with _opened(bed.path("busy")) as fd:
            before = allocate(bed, scale.calls)
            pin_id, _, _ = calls.pin(fd, 0, scale.busy * BLOCK, WRITE)
            os.ftruncate(fd, 0)
            times = [allocate(bed, scale.calls) for _ in range(3)]
            busy = bed.info()["busy"]
            if busy != scale.busy:
                raise RuntimeError(f"{busy} blocks are busy, {scale.busy} should be")
            calls.unpin(fd, pin_id, dirty=False)
        bed.await_free()
        after = allocate(bed, scale.calls)
        return Cell(statistics.median(times), (before + after) / 2)

    # -- long calls, while somebody else watches --

    def _pin(self, name: str) -> Callable[[Bed, Watcher], Cell]:
        def measure(bed: Bed, watcher: Watcher) -> Cell:
            with _opened(bed.path(name)) as fd:
                watcher.longest()
                began = time.perf_counter()
                pin_id, _, _ = calls.pin(fd, 0, bed.files[name].size, WRITE)
                cell = Cell(time.perf_counter() - began, stall=watcher.longest())
                calls.unpin(fd, pin_id, dirty=False)
                return cell

        return measure

    def _truncate(self, name: str, pinned: int) -> Callable[[Bed, Watcher], Cell]:
        def measure(bed: Bed, watcher: Watcher) -> Cell:
            with _opened(bed.path(name)) as fd:
                if pinned:
                    calls.pin(fd, 0, pinned * BLOCK, WRITE)
                watcher.longest()
                began = time.perf_counter()
                os.ftruncate(fd, 0)
                return Cell(time.perf_counter() - began, stall=watcher.longest())

        return measure

    def _free(self, bed: Bed, watcher: Watcher) -> Cell:
        with _opened(bed.path("free")) as fd:
            pin_id, _, _ = calls.pin(fd, 0, self.scale.many * BLOCK, WRITE)
            os.ftruncate(fd, 0)
            watcher.longest()
            began = time.perf_counter()
            calls.unpin(fd, pin_id, dirty=False)
            bed.await_free()
            return Cell(time.perf_counter() - began, stall=watcher.longest())

    def _close(self, bed: Bed, watcher: Watcher) -> Cell:
        with _opened(bed.path("close")) as fd:
            for block in range(self.scale.many):
                calls.pin(fd, block * BLOCK, BLOCK, WRITE)
            os.ftruncate(fd, 0)
            watcher.longest()
            began = time.perf_counter()
        bed.await_free()
        return Cell(time.perf_counter() - began, stall=watcher.longest())

    # -- memory --

    def _copy(self, n: int, *, load: bool) -> Callable[[Bed, Watcher], Cell]:
        def measure(bed: Bed, watcher: Watcher) -> Cell:
            memory, buffer = memoryview(mmap.mmap(-1, n)), memoryview(mmap.mmap(-1, n))
            with daxfs.open(bed.path(f"pin-{self.scale.extents[0]}"), "r+") as file, file.pin(0, n, write=True) as pin:
                mapped = pin.map()
                buffer[:] = os.urandom(n)
                mapped[:] = memory[:] = buffer  # every page is there
                ours = (buffer, mapped) if load else (mapped, buffer)
                theirs = (buffer, memory) if load else (memory, buffer)
                times = min(self.scale.calls * 10, COPY_BYTES // n)
                return beside(lambda k: copies(*ours, k), lambda k: copies(*theirs, k), times)

        return measure


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def beside(ours: Callable[[int], None], theirs: Callable[[int], None], times: int, runs: int = 40) -> Cell:
    """Seconds of one of ours and one of theirs: `runs` short runs of both in turn, the median of each."""
    each = max(1, times // runs)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, seconds in zip((ours, theirs), taken, strict=True):
            began = time.perf_counter()
            work(each)
            seconds.append((time.perf_counter() - began) / each)
    return Cell(statistics.median(taken[0]), statistics.median(taken[1]))


def pin_and_unpin(fd: int, times: int) -> None:
    buffer, unpin = bytearray(abi.PIN.pack(0, BLOCK, WRITE, 0, 0, 0, 0)), bytearray(abi.UNPIN.size)
    for _ in range(times):
        fcntl.ioctl(fd, abi.IOC_PIN, buffer, True)
        unpin[:8] = buffer[24:32]
        fcntl.ioctl(fd, abi.IOC_UNPIN, unpin, True)


def empty_ioctls(fd: int, times: int) -> None:
    buffer = bytearray(abi.PIN.size)
    for _ in range(times):
        try:  # noqa: SIM105 - suppress() takes time, too
            fcntl.ioctl(fd, EMPTY, buffer, True)
        except OSError:
            pass


def copies(target: memoryview, source: memoryview, times: int) -> None:
    for _ in range(times):
        target[:] = source


def allocate(bed: Bed, times: int) -> float:
    """Seconds that fallocate(2) of one more block takes."""
    fd = bed.open("grows")
    try:
        began = time.perf_counter()
        for block in range(times):
            os.posix_fallocate(fd, block * BLOCK, BLOCK)
        return (time.perf_counter() - began) / times
    finally:
        os.close(fd)
        bed.path("grows").unlink()
