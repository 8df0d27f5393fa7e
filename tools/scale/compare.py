"""Extents per file after ageing, on daxfs and on ext4 in a loop device of the same size."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.scale.ageing import Aged, Core, Course, Mounted, age
from tools.scale.measure import Rows, volume

SIZE = 512 << 20
TURNOVERS = 6.0
SEEDS = (1, 2)


def ageing(rows: Rows, percent: int, place: Path) -> None:
    """So full; seeds 1 and 2, the mean of both."""
    courses = [Course(percent / 100, TURNOVERS, seed) for seed in SEEDS]
    _put(rows, "daxfs", percent, [_daxfs(place, course) for course in courses])
    if os.getuid() == 0 and shutil.which("mkfs.ext4"):
        _put(rows, "ext4", percent, [_ext4(place, course) for course in courses])


def _put(rows: Rows, who: str, percent: int, aged: list[Aged]) -> None:
    found = [one.summary() for one in aged]
    for name, unit in (("mean", "extents"), ("median", "extents"), ("p99", "extents"), ("max", "extents"),
                       ("large mean", "extents"), ("MiB/s", "MiB/s"), ("files", "")):  # fmt: skip
        value = sum(one[name] for one in found) / len(found)
        label = "mean of files of 1 MiB and more" if name == "large mean" else name
        rows.put(f"{who}: {label}", unit, percent, value, flat=False)


def _daxfs(place: Path, course: Course) -> Aged:
    with volume(place, SIZE) as vol:
        aged = age(Core(vol), course)
        vol.check()
    return aged


def _ext4(place: Path, course: Course) -> Aged:
    with _loop(place) as root:
        return age(Mounted(root), course)


@contextmanager
def _loop(place: Path) -> Iterator[Path]:
    """An ext4 with its defaults, but no blocks reserved for root."""
    image, root = place / "ext4.img", place / "ext4"
    root.mkdir(exist_ok=True)
    subprocess.run(["fallocate", "-l", str(SIZE), image], check=True)
    options = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)
        image.unlink()
