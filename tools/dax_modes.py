"""What `-o dax=never` brings, and costs, beside the default: the same small jobs on two mounts, in turn, medians compared.

    python -m tools.dax_modes [--rounds 5] [--directory /dev/shm] [--json FILE]

Each row is a job that programs do; its name says what. `x`: how many times as fast as dax=always the mount with the page
cache is, the median of the ratios of the rounds. Times of a busy machine are worth little, its ratios something.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import PROT_READ, mmap
from pathlib import Path

BLOCK = 4096
FILE = 64 << 20
REPOSITORY = Path(__file__).resolve().parents[1]


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def read_4k(home: Path) -> None:
    with opened(home / "big") as fd:
        for _ in range(3000):
            os.pread(fd, BLOCK, random.randrange(FILE // BLOCK) * BLOCK)


def write_4k(home: Path) -> None:
    data = bytes(BLOCK)
    with opened(home / "big", os.O_RDWR) as fd:
        for _ in range(3000):
            os.pwrite(fd, data, random.randrange(FILE // BLOCK) * BLOCK)
        os.fsync(fd)


def append_100(home: Path) -> None:
    with opened(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) as fd:
        for _ in range(5000):
            os.write(fd, b"x" * 100)
        os.fsync(fd)


def write_1m(home: Path) -> None:
    data = bytes(1 << 20)
    with opened(home / "stream", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        for _ in range(FILE // len(data)):
            os.write(fd, data)
        os.fsync(fd)


def read_1m_cold(home: Path) -> None:
    with opened(home / "big") as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, 1 << 20):
            pass


def read_1m_again(home: Path) -> None:
    with opened(home / "big") as fd:
        while os.read(fd, 1 << 20):
            pass


def read_mapped(home: Path) -> None:
    with opened(home / "big") as fd, mmap(fd, FILE, prot=PROT_READ) as view:
        sum(view[at] for at in range(0, FILE, BLOCK))


def create_4k(home: Path) -> None:
    for n in range(300):
        (home / f"small-{n}").write_bytes(bytes(BLOCK))
    for n in range(300):
        (home / f"small-{n}").unlink()


def open_and_read_4k(home: Path) -> None:
    for _ in range(1000):
        (home / "little").read_bytes()


def tar(home: Path) -> None:
    tree = home / "tree"
    tree.mkdir()
    packed = subprocess.run(["tar", "cf", "-", "-C", REPOSITORY, "docs", "tests"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "xf", "-", "-C", tree], input=packed, check=True)
    subprocess.run(["tar", "cf", "-", "-C", tree, "."], stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(tree)


def sqlite(home: Path) -> None:
    with sqlite3.connect(home / "db") as base:
        base.execute("create table t(a, b)")
        for n in range(40):
            base.executemany("insert into t values(?, ?)", [(n, "x" * 200)] * 50)
            base.commit()
        base.execute("select count(*) from t where a = 7").fetchall()
    base.close()
    (home / "db").unlink()


ROWS: dict[str, Callable[[Path], None]] = {
    "random 4k reads": read_4k, "random 4k writes, fsync": write_4k, "appends of 100 bytes, fsync": append_100,
    "sequential 1M reads, first time": read_1m_cold, "sequential 1M reads, again": read_1m_again,
    "sequential 1M writes, fsync": write_1m, "a byte of each page, mapped": read_mapped,
    "create, write 4k, close, unlink": create_4k, "open, read 4k, close": open_and_read_4k,
    "tar: unpack and pack a tree": tar, "sqlite: 40 commits of 50 rows": sqlite,
}  # fmt: skip


@contextmanager
def mounted(home: Path, dax: str) -> Iterator[Path]:
    place, command = home / dax, [sys.executable, "-m", "daxfs.cli"]
    place.mkdir()
    image = ["--image", str(home / f"{dax}.img"), "--size", "1G", "--log", str(home / f"{dax}.log")]
    subprocess.run([*command, "mount", *image, "-o", f"dax={dax}", place], check=True, stdout=subprocess.DEVNULL)
    try:
        (place / "big").write_bytes(random.randbytes(FILE))
        (place / "little").write_bytes(bytes(BLOCK))
        yield place
    finally:
        subprocess.run([*command, "umount", place], check=True, stdout=subprocess.DEVNULL)


def timed(row: Callable[[Path], None], place: Path) -> float:
    start = time.perf_counter()
    row(place)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="daxfs-modes-") as home,
        mounted(Path(home), "always") as always,
        mounted(Path(home), "never") as never,
    ):
        for name, row in ROWS.items():
            for place in (always, never):
                row(place)
            rounds = [(timed(row, always), timed(row, never)) for _ in range(options.rounds)]
            found[name] = {
                "always_s": statistics.median(a for a, _ in rounds),
                "never_s": statistics.median(n for _, n in rounds),
                "x": statistics.median(a / n for a, n in rounds),
            }
            a, n, x = found[name].values()
            print(f"{name:34} always {a * 1e3:8.1f} ms   never {n * 1e3:8.1f} ms   {x:6.2f}x", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
