"""What is measured on one mount: rows of the table, each one number, higher is better.

A row belongs to a kind: "data" rows are fio's requests on an existing file, "names" are system calls per second on many
small files, "extra" rows are shown without a goal. Every row leaves the mount as it found it: rounds can be repeated.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = "data"  # the file that fio reads and writes


@dataclass(frozen=True)
class Scale:
    """How much work one cell is."""

    seconds: float
    rounds: int
    data_bytes: int
    files: int


FULL = Scale(seconds=2.0, rounds=5, data_bytes=128 << 20, files=2000)
QUICK = Scale(seconds=0.7, rounds=2, data_bytes=32 << 20, files=500)


@dataclass(frozen=True)
class FioRow:
    name: str
    kind: str
    unit: str  # "IOPS" or "MiB/s"
    options: tuple[str, ...]
    fresh: bool = False  # into a new file that ends at its size, so that every write allocates


@functools.cache
def async_engine() -> str:
    """io_uring where the kernel allows it, else libaio."""
    try:
        disabled = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0"
    except OSError:
        disabled = True
    listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    return "libaio" if disabled or "io_uring" not in listed else "io_uring"


def fio_rows() -> list[FioRow]:
    qd1 = ("--ioengine=psync", "--iodepth=1")
    qd16 = (f"--ioengine={async_engine()}", "--iodepth=16")
    rows = []
    for depth, engine in (("QD1", qd1), ("QD16", qd16)):
        for verb in ("read", "write"):
            rows.append(FioRow(f"4k random {verb} {depth}", "data", "IOPS", (*engine, "--bs=4k", f"--rw=rand{verb}")))
    for verb in ("read", "write"):
        rows.append(FioRow(f"1M sequential {verb}", "data", "MiB/s", (*qd1, "--bs=1M", f"--rw={verb}")))
    rows.append(FioRow("1M write, new file", "extra", "MiB/s", (*qd1, "--bs=1M", "--rw=write"), fresh=True))
    rows.append(FioRow("4k append, new file", "extra", "IOPS", (*qd1, "--bs=4k", "--rw=write"), fresh=True))
    return rows


def lay_out(mount: Path, scale: Scale) -> None:
    chunk = os.urandom(1 << 20)
    with (mount / DATA).open("wb", buffering=0) as file:
        for _ in range(scale.data_bytes >> 20):
            file.write(chunk)


def fio(mount: Path, row: FioRow, scale: Scale) -> tuple[float, dict[str, float]]:
    """One run: the row's number and the latencies in microseconds."""
    file = mount / ("new" if row.fresh else DATA)
    size = scale.data_bytes if row.unit == "MiB/s" or not row.fresh else scale.data_bytes >> 3
    command = ["fio", "--name=bench", f"--filename={file}", f"--size={size}", "--direct=1", "--fallocate=none", "--thread"]
    command += ["--invalidate=0", "--norandommap", "--output-format=json", *row.options]
    if not row.fresh:
        command += ["--time_based", f"--runtime={scale.seconds * 1000:.0f}ms", f"--ramp_time={scale.seconds * 100:.0f}ms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if row.fresh:
        file.unlink(missing_ok=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"fio: {lines[0] if lines else done.returncode}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = job["write" if "write" in row.options[-1] else "read"]
    percentiles = side["clat_ns"].get("percentile", {})
    latency = {name: percentiles.get(key, 0) / 1e3 for name, key in (("p50_us", "50.000000"), ("p99_us", "99.000000"))}
    return (side["iops"] if row.unit == "IOPS" else side["bw_bytes"] / (1 << 20)), latency


# Names: one process, one system call after the other.

AT_FDCWD = -100
AT_STATX_FORCE_SYNC = 0x2000
STATX_BASIC_STATS = 0x7FF
_libc = ctypes.CDLL(None, use_errno=True)
_statx_buffer = ctypes.create_string_buffer(256)


def create(path: bytes) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def stat(path: bytes) -> None:
    os.stat(path)


def stat_served(path: bytes) -> None:
    """A stat that the kernel may not answer from its own cache."""
    if _libc.statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, _statx_buffer):
        raise OSError(ctypes.get_errno(), "statx")


NAME_ROWS: tuple[tuple[str, str, Callable[[bytes], None]], ...] = (
    ("create", "names", create),
    ("stat", "names", stat),
    ("stat, asked of the server", "extra", stat_served),
    ("unlink", "names", os.unlink),
)


def names(mount: Path, scale: Scale) -> Iterator[tuple[str, float]]:
    """Calls per second of every row of NAME_ROWS, in order, over the same files."""
    paths = [os.fsencode(mount / f"file-{number:05}") for number in range(scale.files)]
    for name, _, call in NAME_ROWS:
        began = time.perf_counter()
        for path in paths:
            call(path)
        yield name, scale.files / (time.perf_counter() - began)


# The machine itself

CALIBRATION_LOOPS = 200_000


def calibrate() -> float:
    """Milliseconds of a fixed piece of computation: its spread over a run is the noise of the machine."""
    began = time.perf_counter()
    for _ in range(CALIBRATION_LOOPS):
        pass
    return (time.perf_counter() - began) * 1e3


def cpu_times() -> tuple[int, int]:
    """(stolen, all) ticks of all CPUs since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)
