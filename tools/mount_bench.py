"""How long a mount takes: python -m tools.mount_bench [--inodes N ...] [--table N] [--json FILE]

Makes sparse images of N files in directories of 1,000 (tools.fsck_bench), and with --table one of N inodes whose table is
there but holds no file. Measures opening the image in the core (superblock to free space, each in a process of its own) and
the whole command `daxfs mount`, Python's start and imports included, after a clean unmount and after a kill -9. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from daxfs import client
from daxfs.core import layout
from daxfs.core.format import format_image
from daxfs.core.volume import Volume
from tools import fsck_bench

ROUNDS = 5
DAXFS = [sys.executable, "-m", "daxfs.cli"]
_OPEN = """
import os, sys, time
from daxfs.core.volume import Volume
began = time.perf_counter()
volume = Volume.open(sys.argv[1], now=1)
print(time.perf_counter() - began, flush=True)
if sys.argv[2] == "crash":
    os._exit(0)
volume.close(1)
"""


def make_table(path: Path, inodes: int) -> None:
    """A volume that once had so many files: all the inode table's chunks, in which every number is free."""
    per_chunk = layout.chunk_blocks(layout.BLOCK_SIZE)
    chunks = inodes // layout.CHUNK_INODES
    format_image(path, chunks * per_chunk * layout.BLOCK_SIZE + 16 * inodes + (64 << 20), now=1)  # and their numbers
    volume = Volume.open(path, now=1)
    first = volume.data_blocks.stop - chunks * per_chunk
    volume.alloc.free.remove(first, chunks * per_chunk)
    at = volume.sb["idir_start"] * volume.block_size
    for index in range(1, chunks):
        block = first + index * per_chunk
        volume.pmem.store_word(at + 8 * index, layout.idir_word(index, block))
        volume.chunks.append(block)
    volume.alloc.give([(first, per_chunk)])
    volume.free_inodes.extend(range(inodes - 1, layout.CHUNK_INODES - 1, -1))
    volume.close(1)


def opened(path: Path, end: str) -> float:
    """Open an image in a fresh process; seconds. `end`: "clean", or "crash" to leave it as a crash does."""
    done = subprocess.run([sys.executable, "-c", _OPEN, str(path), end], check=True, capture_output=True, text=True)
    return float(done.stdout)


def mounted(path: Path, place: Path, end: str) -> float:
    """`daxfs mount`, from its start to its end, when the mount is served; seconds."""
    log = place.with_suffix(".log")
    began = time.perf_counter()
    subprocess.run([*DAXFS, "mount", "--image", path, "--log", log, place], check=True, stderr=subprocess.DEVNULL)
    took = time.perf_counter() - began
    if end == "clean":
        subprocess.run([*DAXFS, "umount", place], check=True)
        return took
    pid = int(client.info(place)["pid"])
    daemon = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([daemon], [], [])
    os.close(daemon)
    subprocess.run(["umount", "--lazy", place], check=True)
    return took


def measure(path: Path, place: Path, *, crashes: bool) -> dict[str, float]:
    """Medians in ms."""
    found: dict[str, list[float]] = {}
    for name, how in (("open", opened), ("mount", lambda image, end: mounted(image, place, end))):
        how(path, "clean")
        found[f"clean {name}"] = [how(path, "clean") for _ in range(ROUNDS)]
        if crashes:
            how(path, "crash")
            found[f"crash {name}"] = [how(path, "crash") for _ in range(ROUNDS)]
            how(path, "clean")
    return {name: round(1000 * statistics.median(times), 1) for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="mount_bench", description="Measures mounts of volumes with many inodes.")
    parser.add_argument("--inodes", type=int, nargs="*", default=[1000, 1_000_000], metavar="N", help="files of an image")
    parser.add_argument("--table", type=int, default=10_000_000, metavar="N", help="inodes without files; 0: none")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the images are made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="daxfs-mount-bench-", dir=args.directory) as scratch:
        image, place = Path(scratch, "image"), Path(scratch, "mnt")
        place.mkdir()
        for inodes in args.inodes:
            fsck_bench.make(image, inodes)
            rows[f"{inodes:,} files"] = measure(image, place, crashes=True)
            image.unlink()
        if args.table:
            make_table(image, args.table)
            rows[f"{args.table:,} free inodes"] = measure(image, place, crashes=False)
    for what, row in rows.items():
        print(f"{what}: " + ", ".join(f"{name} {ms:g} ms" for name, ms in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
