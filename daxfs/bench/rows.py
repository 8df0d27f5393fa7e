"""What is measured: the rows of the table, their units, and the goals of daxfs beside each peer. Data; nothing runs here.

    data    fio, one file, direct I/O; where a row says `one CPU`, the server and fio share it
    names   namebench.c, calls of one process on many small files
    list    namebench.c, readdir of a large directory with a stat for each entry
    cpu     what a request costs the server's process (all its threads), measured while a row of data runs

A ratio is of daxfs to a peer. Goals are in it too: at least, and at most where lower is better.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    peer: str
    ratio: float


@dataclass(frozen=True)
class Row:
    name: str
    group: str
    unit: str
    goals: tuple[Goal, ...] = ()
    lower: bool = False  # is better

    def matches(self, text: str) -> bool:
        """Whether it is among the rows that are called so: by a part of the name, or by the group."""
        return text in self.name or text == self.group

    def meets(self, ratio: float, goal: Goal) -> bool:
        return ratio <= goal.ratio if self.lower else ratio >= goal.ratio


@dataclass(frozen=True)
class FioRow(Row):
    options: tuple[str, ...] = ()  # the last one is --rw
    queued: bool = False  # asynchronous, 16 requests at a time
    one_cpu: bool = False
    fresh: bool = False  # into a new file that ends at its size: every write allocates
    cpu: str = ""  # the row of group cpu that is measured with it


@dataclass(frozen=True)
class Scale:
    """How much work one cell is, and how many rounds there are."""

    seconds: float  # of fio
    rounds: int
    data_bytes: int
    files: int  # of the names
    entries: int  # of the directory that is listed


FULL = Scale(seconds=1.0, rounds=5, data_bytes=128 << 20, files=3000, entries=100_000)
QUICK = Scale(seconds=0.4, rounds=2, data_bytes=32 << 20, files=500, entries=10_000)


def _goals(**least: float) -> tuple[Goal, ...]:
    return tuple(Goal(peer, ratio) for peer, ratio in least.items())


_CPU_MOST = _goals(minimal_ll=1.5)
_QD1 = _goals(minimal_ll=1.4, passthrough_ll=0.8, fuse2fs=0.8)
_ONE_CPU = _goals(minimal_ll=0.85, nullfs=2.0)
_NAMES = _goals(passthrough_ll=0.7, fuse2fs=1.0)
_OPENS = _goals(passthrough_ll=1.0, fuse2fs=1.0)
_CACHED = _goals(passthrough_ll=0.9)


def _data(name: str, rw: str, size: str, unit: str = "IOPS", *, goals: tuple[Goal, ...] = (), **how: bool | str) -> FioRow:
    return FioRow(name, "data", unit, goals, options=(f"--bs={size}", f"--rw={rw}"), **how)  # type: ignore[arg-type]


DATA_ROWS: tuple[FioRow, ...] = (
    _data("4k random read QD1", "randread", "4k", goals=_QD1, cpu="cpu: 4k random read QD1"),
    _data("4k random write QD1", "randwrite", "4k", goals=_QD1, cpu="cpu: 4k random write QD1"),
    _data("4k random read QD1, one CPU", "randread", "4k", goals=_ONE_CPU, one_cpu=True, cpu="cpu: 4k random read, one CPU"),
    _data("4k random write QD1, one CPU", "randwrite", "4k", goals=_ONE_CPU, one_cpu=True),
    _data(
        "4k random read QD16", "randread", "4k", goals=_goals(minimal_ll=0.7, passthrough_ll=0.7, fuse2fs=4.0),
        queued=True, cpu="cpu: 4k random read QD16",
    ),
    _data("4k random write QD16", "randwrite", "4k", queued=True),
    _data("1M sequential read", "read", "1M", "MiB/s", goals=_goals(minimal_ll=1.0, passthrough_ll=2.0)),
    _data("1M sequential write", "write", "1M", "MiB/s", goals=_goals(minimal_ll=1.0)),
    _data("1M write, new file", "write", "1M", "MiB/s", fresh=True),
    _data("4k append, new file", "write", "4k", fresh=True),
)  # fmt: skip

NAME_ROWS: tuple[Row, ...] = (
    Row("create", "names", "/s", _NAMES),
    Row("open+write 4k+close", "names", "/s", _OPENS),
    Row("open+read 4k+close", "names", "/s", _OPENS),
    Row("rename", "names", "/s", _NAMES),
    Row("truncate", "names", "/s", _NAMES),
    Row("unlink", "names", "/s", _NAMES),
    Row("mkdir+rmdir", "names", "/s"),
    Row("stat, repeated", "names", "/s", _CACHED),
    Row("stat, asked of the server", "names", "/s"),
)
LIST_ROWS: tuple[Row, ...] = (
    Row("readdir+stat, cold", "list", "entries/s", _CACHED),
    Row("readdir+stat, warm", "list", "entries/s", _CACHED),
)
CPU_ROWS: tuple[Row, ...] = (
    *(Row(row.cpu, "cpu", "µs", _CPU_MOST, lower=True) for row in DATA_ROWS if row.cpu),
    *(Row(f"cpu: {row.name}", "cpu", "µs", lower=True) for row in NAME_ROWS if row.name != "stat, repeated"),
)
ROWS: tuple[Row, ...] = (*DATA_ROWS, *NAME_ROWS, *LIST_ROWS, *CPU_ROWS)
