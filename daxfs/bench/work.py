"""How a row is measured on one target. Every measure leaves the directory as it found it: rounds can be repeated."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daxfs.bench import peers
from daxfs.bench.peers import Missing, Target
from daxfs.bench.rows import FioRow, Scale

DATA = "data"  # the file that fio reads and writes
NAMES = "names"  # a directory that is empty between the rounds
BIG = "big"  # the directory that is listed
AT_FDCWD = -100
AT_STATX_FORCE_SYNC = 0x2000
STATX_BASIC_STATS = 0x7FF
_libc = ctypes.CDLL(None, use_errno=True)
_statx_buffer = ctypes.create_string_buffer(256)


@dataclass(frozen=True)
class Cell:
    """What one row was on one target in one round: its value, CPU of the server for each request (µs), latencies (µs)."""

    value: float
    cpu_us: float | None = None
    latency: dict[str, float] | None = None


@functools.cache
def async_engine() -> str:
    """io_uring where the kernel allows it, else libaio."""
    try:
        disabled = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0"
    except OSError:
        disabled = True
    listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    return "libaio" if disabled or "io_uring" not in listed else "io_uring"


def need_fio() -> None:
    if shutil.which("fio") is None:
        raise Missing("fio is not installed: apt-get install fio")


def lay_out_data(target: Target, scale: Scale) -> None:
    chunk = os.urandom(1 << 20)
    with (target.directory / DATA).open("wb", buffering=0) as file:
        for _ in range(scale.data_bytes >> 20):
            if file.write(chunk) != len(chunk):
                raise Missing("a write was cut short: is it full?")


def fio(target: Target, row: FioRow, scale: Scale) -> Cell:
    """One run of fio. RuntimeError: it failed, in its own words."""
    if row.one_cpu:
        with target.on_one_cpu():
            return _fio(target, row, scale)
    return _fio(target, row, scale)


def _fio(target: Target, row: FioRow, scale: Scale) -> Cell:
    file = target.directory / ("new" if row.fresh else DATA)
    size = scale.data_bytes if row.unit == "MiB/s" or not row.fresh else scale.data_bytes >> 3
    command = ["fio", "--name=bench", f"--filename={file}", f"--size={size}", "--direct=1", "--fallocate=none", "--thread"]
    command += ["--invalidate=0", "--norandommap", "--output-format=json"]
    command += [f"--ioengine={async_engine()}", "--iodepth=16"] if row.queued else ["--ioengine=psync", "--iodepth=1"]
    command += row.options
    if not row.fresh:
        command += ["--time_based", f"--runtime={scale.seconds * 1000:.0f}ms"]
    before = target.cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = target.cpu_seconds()
    if row.fresh:
        file.unlink(missing_ok=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(lines[0] if lines else f"fio: exit code {done.returncode}")
    return parse_fio(done.stdout, row, None if before is None or after is None else after - before)


def parse_fio(output: str, row: FioRow, cpu_s: float | None) -> Cell:
    """What fio printed as JSON; `cpu_s`: what its run cost the server."""
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["write" if "write" in row.options[-1] else "read"]
    percentiles = side["clat_ns"].get("percentile", {})
    latency = {name: percentiles.get(key, 0) / 1e3 for name, key in (("p50_us", "50.000000"), ("p99_us", "99.000000"))}
    cpu_us = cpu_s / side["total_ios"] * 1e6 if cpu_s is not None and side["total_ios"] else None
    return Cell(side["iops"] if row.unit == "IOPS" else side["bw_bytes"] / (1 << 20), cpu_us, latency)


class NameBench:
    """The compiled driver of names and lists."""

    def __init__(self, scratch: Path) -> None:
        """Missing: it cannot be compiled."""
        self._binary = peers.compiled(Path(__file__).with_name("namebench.c"), scratch / "namebench")

    def _run(self, what: str, directory: Path, *arguments: object) -> dict[str, Cell]:
        command = [str(self._binary), what, str(directory), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cells = parse_names(done.stdout)
        if done.returncode:
            raise RowsFailed(done.stderr.strip() or f"exit code {done.returncode}", cells)
        return cells

    def names(self, target: Target, scale: Scale) -> dict[str, Cell]:
        """All rows of names. RowsFailed: a call failed; the rows before it are in there."""
        directory = target.directory / NAMES
        directory.mkdir(exist_ok=True)
        try:
            return self._run("names", directory, scale.files, target.server or 0)
        except RowsFailed:
            for left in os.scandir(directory):
                os.rmdir(left.path) if left.is_dir() else os.unlink(left.path)
            raise

    def lay_out_list(self, target: Target, scale: Scale) -> int:
        """The number of entries that it made."""
        directory = target.big_directory(BIG)
        directory.mkdir()
        entries = min(scale.entries, target.entries_most or scale.entries)
        self._run("fill", directory, entries)
        return entries

    def list_entries(self, target: Target) -> Cell:
        return self._run("list", target.directory / BIG, target.server or 0)["list"]


class RowsFailed(RuntimeError):
    """A call failed: which and why, and what was measured before."""

    def __init__(self, why: str, cells: dict[str, Cell]) -> None:
        super().__init__(why)
        self.cells = cells


def parse_names(output: str) -> dict[str, Cell]:
    """What namebench.c printed: calls per second, and the server's CPU for each."""
    cells = {}
    for line in output.splitlines():
        name, calls, took_ns, served_ns = line.split("\t")
        count = int(calls)
        cells[name] = Cell(count / (int(took_ns) / 1e9), int(served_ns) / 1e3 / count if int(served_ns) else None)
    return cells


def stat_served(path: bytes) -> None:
    """A stat that the kernel may not answer from its own cache."""
    if _libc.statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, _statx_buffer):
        raise OSError(ctypes.get_errno(), "statx")
