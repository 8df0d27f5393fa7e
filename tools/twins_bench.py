"""What twins cost: page faults and write-backs of a mapped file, with its blocks pinned and without, in turn on one mount.

    python -m tools.twins_bench [--rounds 11] [--pages 2000] [--json FILE]

    fault 4k        a page that is touched for the first time, read-ahead off
    read-ahead      all pages of the range, read by the kernel 128 KiB at a time
    write-back 4k   a page with a byte stored, written back by msync of it alone
    write-back all  the same of all pages, written back by one msync

Each round measures both files. `x` is the median over the rounds of pinned by unpinned, with the interval that holds the
true median with a probability of 95 %. The mount has coherence_ms=0, so that no pass runs beside the measurement.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daxfs import client

PAGE = mmap.PAGESIZE
DAXFS = [str(Path(sys.executable).with_name("daxfs"))]


class Side:
    """One file, pinned or not."""

    def __init__(self, path: Path, pages: int, *, pinned: bool) -> None:
        path.write_bytes(b"x" * pages * PAGE)
        self.pages = pages
        self.file = client.open(path, "r+")
        self.pin = self.file.pin(write=True) if pinned else None
        self.fd = os.open(path, os.O_RDWR)

    def mapped(self, advice: int) -> mmap.mmap:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        mapping = mmap.mmap(self.fd, self.pages * PAGE)
        mapping.madvise(advice)
        return mapping

    def close(self) -> None:
        if self.pin is not None:
            self.pin.close()
        self.file.close()
        os.close(self.fd)


def timed(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def touch(mapping: mmap.mmap, pages: int) -> None:
    for at in range(0, pages * PAGE, PAGE):
        mapping[at]


def dirty(mapping: mmap.mmap, pages: int, value: int) -> None:
    for at in range(64, pages * PAGE, PAGE):
        mapping[at] = value


def flush_each(mapping: mmap.mmap, pages: int) -> None:
    for at in range(0, pages * PAGE, PAGE):
        mapping.flush(at, PAGE)


def measure(side: Side, round_number: int) -> dict[str, float]:
    """Seconds for all pages, by row."""
    pages, value = side.pages, round_number % 251
    result = {}
    with side.mapped(mmap.MADV_RANDOM) as mapping:
        result["fault 4k"] = timed(lambda: touch(mapping, pages))
        dirty(mapping, pages, value + 1)
        result["write-back 4k"] = timed(lambda: flush_each(mapping, pages))
        dirty(mapping, pages, value + 2)
        result["write-back all"] = timed(mapping.flush)
    with side.mapped(mmap.MADV_SEQUENTIAL) as mapping:
        result["read-ahead"] = timed(lambda: touch(mapping, pages))
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, by order statistics, with a probability of at least 95 % (from 6 values on)."""
    ordered, n = sorted(values), len(values)
    below = max(0, int((n - 1.96 * n**0.5) / 2))
    return ordered[below], ordered[n - 1 - below]


def run(rounds: int, pages: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="daxfs-twins-") as home:
        place, image = Path(home, "mnt"), Path(home, "image")
        place.mkdir()
        mount = [*DAXFS, "mount", "-o", "coherence_ms=0", "--image", str(image), "--size", "256M", str(place)]
        subprocess.run(mount, check=True, stdout=subprocess.DEVNULL)
        try:
            sides = {name: Side(place / name, pages, pinned=name == "pinned") for name in ("unpinned", "pinned")}
            found: dict[str, dict[str, list[float]]] = {}
            for number in range(rounds + 1):  # the first one warms up
                for name in sides if number % 2 else reversed(sides):
                    for row, seconds in measure(sides[name], number).items():
                        found.setdefault(row, {}).setdefault(name, []).append(seconds / pages)
            for side in sides.values():
                side.close()
        finally:
            subprocess.run([*DAXFS, "umount", str(place)], check=True)
    return [summary(row, times["unpinned"][1:], times["pinned"][1:]) for row, times in found.items()]


def summary(row: str, plain: list[float], pinned: list[float]) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(plain, pinned, strict=True)]
    low, high = interval(ratios)
    return {
        "row": row, "plain_us": statistics.median(plain) * 1e6, "pinned_us": statistics.median(pinned) * 1e6,
        "x": statistics.median(ratios), "low": low, "high": high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.twins_bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = run(chosen.rounds, chosen.pages)
    print(f"{'':16} {'unpinned':>10} {'pinned':>10} {'x':>6}  95 %")
    for row in rows:
        print(
            f"{row['row']:16} {row['plain_us']:7.2f} us {row['pinned_us']:7.2f} us {row['x']:6.2f}"
            f"  {row['low']:.2f} to {row['high']:.2f}"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
