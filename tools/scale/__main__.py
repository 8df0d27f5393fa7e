"""How costs and memory grow: python -m tools.scale [--only NAME ...] [--quick] [--json FILE]

Each group of rows takes one thing from small to a million (extents of a file, entries of a directory, pins, inodes, ...) and
measures what a call costs at each size, and the memory. Costs are CPU time of the core, or of the command, and the best of
some rounds; the last column is the last value against the first. `ageing` compares extents per file with ext4 (as root).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tools.scale import compare, files, holders, mounts, volumes
from tools.scale.measure import Row, Rows

K, M = 1000, 1_000_000


@dataclass(frozen=True)
class Group:
    """Rows of one subject; `counts` says what the sizes count."""

    title: str
    counts: str
    measure: Callable[[Rows, int, Path], None]
    sizes: tuple[int, ...] = (K, 10 * K, 100 * K, M)
    quick: tuple[int, ...] = (K, 10 * K)


GROUPS = {
    "extents": Group("One file of many extents", "extents", files.extents),
    "runs": Group("Free space in many runs", "free runs", files.runs),
    "directories": Group("One directory of many entries", "entries", files.directories),
    "pins": Group("Many pins, each of a block", "pins", holders.pins),
    "busy": Group("Many busy extents", "busy extents", holders.busy),
    "inodes": Group("A volume with many files of a block", "files", volumes.inodes, (10 * K, 100 * K, M)),
    "sparse": Group("A large image with next to nothing in it", "GiB", volumes.sparse, (1, 64, 1024, 8192), (1, 1024)),
    "known": Group("Files that the kernel has looked up (through a mount)", "files", mounts.known, (10 * K, 100 * K)),
    "ageing": Group("Extents per file after ageing", "percent full", compare.ageing, (85, 90), (87,)),
}


def show(group: Group, rows: list[Row], console: Console) -> None:
    sizes = sorted({size for row in rows for size in row.values})
    table = Table(title=group.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right")
    table.add_column("unit")
    table.add_column("growth", justify="right")
    for row in rows:
        cells = [f"{row.values[size]:,.4g}" if size in row.values else "" for size in sizes]
        growth = f"{row.growth:.2f}x" if row.growth is not None and row.flat else ""
        table.add_row(row.name, *cells, row.unit, growth)
    console.print(table)
    console.print(f"[dim]columns: {group.counts}[/dim]\n")


def run(name: str, size: int, directory: Path) -> list[Row]:
    """A group at one size, in a process of its own: memory is measured."""
    with tempfile.TemporaryDirectory(prefix="daxfs-scale-", dir=directory) as scratch:
        command = [sys.executable, "-m", "tools.scale", "--group", name, scratch, str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"scale: {name} at {size:,} failed with exit code {done.returncode}")
    return [Row(**row, values={size: value}) for row, value in json.loads(done.stdout)]


def measure(name: str, scratch: str, size: str) -> None:
    rows = Rows()
    GROUPS[name].measure(rows, int(size), Path(scratch))
    facts = [({"name": row.name, "unit": row.unit, "flat": row.flat}, row.values[int(size)]) for row in rows.rows.values()]
    print(json.dumps(facts))


def merge(rows: dict[str, Row], more: list[Row]) -> None:
    for row in more:
        rows.setdefault(row.name, Row(row.name, row.unit, row.flat)).values.update(row.values)


def arguments() -> argparse.Namespace:
    example = "Example: python -m tools.scale --only pins extents --quick"
    parser = argparse.ArgumentParser(prog="scale", description="Measures how costs and memory grow.", epilog=example)
    add = parser.add_argument
    add("--only", nargs="+", choices=GROUPS, metavar="NAME", help="only these groups: " + ", ".join(GROUPS))
    add("--quick", action="store_true", help="small sizes: a minute instead of many")
    add("--sizes", nargs="+", type=int, metavar="N", help="these sizes instead of each group's own")
    add("--json", type=Path, metavar="FILE", help="write all that was measured to FILE")
    add("--directory", type=Path, default=Path("/dev/shm"), help="where the images are made (default: /dev/shm)")
    add("--group", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.group:
        measure(*args.group)
        return 0
    console, found = Console(width=None if sys.stdout.isatty() else 140), dict[str, list[dict[str, Any]]]()
    names = [name for name in GROUPS if not args.only or name in args.only]
    sizes = {name: args.sizes or (GROUPS[name].quick if args.quick else GROUPS[name].sizes) for name in names}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, sizes.values())))
        for name in names:
            rows: dict[str, Row] = {}
            for size in sizes[name]:
                progress.update(task, description=f"{name} {size:,}")
                merge(rows, run(name, size, args.directory))
                progress.advance(task)
            found[name] = [vars(row) for row in rows.values()]
            show(GROUPS[name], list(rows.values()), console)
    if args.json:
        args.json.write_text(json.dumps({"cpus": os.cpu_count(), "groups": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
