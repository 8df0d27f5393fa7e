"""One run: all targets mounted at once; every round goes through the rows, and every row through the targets, forwards and
backwards in turn, so that a slow minute of the machine hits all alike. Then come the rows of pins, which have a mount of
their own in each round."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from daxfs import __version__
from daxfs.bench import pins, rows, work
from daxfs.bench.peers import PEERS, Here, Missing, Peer, Target
from daxfs.bench.result import Result, Samples
from daxfs.bench.rows import FioRow, Row, Scale

TMPFS = Path("/dev/shm")
SLOW_S = 5.0  # a directory whose listing takes longer is not listed again in the later rounds
IMAGE_SPARE = 512 << 20  # beside the data: a large directory, files of the names
Progress = Callable[[str, int, int], None]  # what is worked on, how much is done, of how much


@dataclass(frozen=True)
class Plan:
    """What a run is asked for."""

    scale: Scale
    peers: tuple[str, ...]
    place: Path | None = None  # a directory that is the subject
    only: str = ""
    pins: pins.PinScale = pins.FULL

    def wants(self, row: Row) -> bool:
        return row.matches(self.only)


class Run:
    """`measure` does it all; the result is complete when it returns."""

    def __init__(self, plan: Plan, progress: Progress | None = None) -> None:
        self.plan = plan
        self.targets: list[Target] = []
        self._progress = progress
        self._done = self._total = 0
        self._slow: set[str] = set()
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        samples = [Samples(row) for row in rows.ROWS if plan.wants(row)]
        self.result = Result("", [], samples, time=began, version=__version__, scale=asdict(plan.scale))
        self._by_name = {samples.row.name: samples for samples in samples}
        self._fio_rows = [row for row in rows.DATA_ROWS if plan.wants(row) or row.cpu in self._by_name]
        self._name_rows = [row for row in rows.NAME_ROWS if plan.wants(row) or f"cpu: {row.name}" in self._by_name]
        self._list_rows = [row for row in rows.LIST_ROWS if plan.wants(row)]

    def measure(self) -> Result:
        """Missing: nothing can be measured here, and why."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            scratch = Path(tempfile.mkdtemp(prefix="daxfs-bench-", dir=TMPFS if TMPFS.is_dir() else None))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            driver = self._prepare(scratch)
            self._start(scratch, driver, stack)
            self._rounds(driver, scratch)
        self.result.took_s = time.monotonic() - began
        return self.result

    # Before the first round

    def _prepare(self, scratch: Path) -> work.NameBench | None:
        """What the rows need besides the file systems; rows that cannot be had are left out."""
        if self._fio_rows:
            try:
                work.need_fio()
            except Missing as why:
                self.result.missing["rows of fio"] = str(why)
                self._fio_rows = []
        if not self._name_rows and not self._list_rows:
            return None
        try:
            return work.NameBench(scratch)
        except Missing as why:
            self.result.missing["rows of names"] = str(why)
            self._name_rows, self._list_rows = [], []
            return None

    def _start(self, scratch: Path, driver: work.NameBench | None, stack: contextlib.ExitStack) -> None:
        image_bytes = self.plan.scale.data_bytes * 4 + IMAGE_SPARE
        if self.plan.place is not None:
            here = Here(self.plan.place)
            stack.callback(here.end)
            self._add(here, driver)
            self.result.is_daxfs = here.daxfs
        for kind in PEERS:
            if kind.name not in self.plan.peers:
                continue
            peer = kind(scratch, image_bytes)
            stack.callback(peer.end)
            try:
                self._step(f"starting {peer.name}")
                peer.start()
                self._add(peer, driver)
            except (Missing, OSError) as why:
                self.result.missing[peer.name] = str(why)
                peer.end()
        if not self.targets:
            raise Missing("; ".join(f"{name}: {why}" for name, why in self.result.missing.items()))
        names = self.result.targets = [target.name for target in self.targets]
        self.result.subject = names[0]
        if self.plan.place is None:
            self.result.is_daxfs = names[0] == "daxfs"

    def _add(self, target: Target, driver: work.NameBench | None) -> None:
        if self._fio_rows:
            work.lay_out_data(target, self.plan.scale)
        if driver and self._list_rows:
            try:
                entries = driver.lay_out_list(target, self.plan.scale)
            except work.RowsFailed as why:
                raise Missing(f"the directory of {self.plan.scale.entries} entries: {why}") from None
            if entries < self.plan.scale.entries:
                note = f"{target.name} lists a directory of {entries:,} entries only: {target.entries_why}"
                self.result.notes.append(note)
        self.targets.append(target)

    # The rounds

    def _rounds(self, driver: work.NameBench | None, scratch: Path) -> None:
        pin_rows = self._pin_rows()
        self.result.pins = pin_rows.rows if pin_rows else []
        cells = len(self.targets) * (len(self._fio_rows) + bool(self._name_rows) + bool(self._list_rows))
        self._total = self.plan.scale.rounds * (cells + bool(self.result.pins))
        servers = [target.server for target in self.targets if target.server]
        machine = self.result.machine
        machine.begin(servers)
        for turn in range(self.plan.scale.rounds):
            order = self.targets if turn % 2 == 0 else self.targets[::-1]
            for row in self._fio_rows:
                for target in order:
                    self._step(f"{row.name}: {target.name}")
                    self._fio(row, target)
            for measure, wanted in ((self._names, self._name_rows), (self._list, self._list_rows)):
                for target in order if wanted and driver else ():
                    assert driver is not None
                    self._step(f"{wanted[0].group}: {target.name}")
                    target.settle()
                    measure(driver, target)
            if pin_rows and pin_rows.rows:
                self._step("pins")
                pin_rows.measure(scratch / f"pins-{turn}")
        machine.end(servers)
        mounted = (target for target in self.targets if isinstance(target, Peer))
        self.result.memory = {peer.name: memory for peer in mounted if (memory := peer.memory())}

    def _step(self, what: str) -> None:
        self.result.machine.calibrate()
        if self._progress:
            self._progress(what, self._done, self._total)
        self._done += bool(self._total)

    def _pin_rows(self) -> pins.PinRows | None:
        if "daxfs" not in self.result.targets:
            return None
        null = next((target.directory / work.DATA for target in self.targets if target.name == "nullfs"), None)
        return pins.PinRows(self.plan.pins, self.plan.only, null if self._fio_rows else None)

    def _fio(self, row: FioRow, target: Target) -> None:
        data, cpu = self._by_name.get(row.name), self._by_name.get(row.cpu)
        try:
            cell = work.fio(target, row, self.plan.scale)
        except (RuntimeError, OSError) as why:
            if data:
                data.fail(target.name, str(why))
            return
        if data:
            _enter(data, target, cell)
        if cpu and cell.cpu_us is not None:
            cpu.add(target.name, cell.cpu_us)

    def _names(self, driver: work.NameBench, target: Target) -> None:
        try:
            cells, why = driver.names(target, self.plan.scale), ""
        except work.RowsFailed as failed:
            cells, why = failed.cells, str(failed)
        for row in self._name_rows:
            data, cpu, cell = self._by_name.get(row.name), self._by_name.get(f"cpu: {row.name}"), cells.get(row.name)
            if data and cell:
                _enter(data, target, cell)
            elif data:
                data.fail(target.name, why or "it was not measured")
            if cpu and cell and cell.cpu_us is not None:
                cpu.add(target.name, cell.cpu_us)

    def _list(self, driver: work.NameBench, target: Target) -> None:
        if target.name in self._slow:
            return
        began = time.monotonic()
        for row in self._list_rows:
            samples = self._by_name[row.name]
            try:
                if row.name.endswith("cold"):
                    target.forget_names()
                _enter(samples, target, driver.list_entries(target))
            except (Missing, OSError, RuntimeError) as why:
                samples.fail(target.name, str(why))
        target.settle()
        if time.monotonic() - began > SLOW_S:
            self._slow.add(target.name)


def _enter(samples: Samples, target: Target, cell: work.Cell) -> None:
    samples.add(target.name, cell.value)
    if cell.cpu_us is not None:
        samples.cpu_us.setdefault(target.name, []).append(cell.cpu_us)
    if cell.latency is not None:
        samples.latency.setdefault(target.name, []).append(cell.latency)
