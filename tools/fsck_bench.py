"""How long `daxfs fsck` takes and how much memory it needs: python -m tools.fsck_bench [--inodes N] [--damage N]

Makes a sparse image of N files of a block each in directories of 1,000 (records and directory blocks are packed as the core
packs them, but stored without a transaction per file), checks it, damages some of its records and directory blocks at
random, repairs it and checks it again. Each step is a process of its own; its memory is the most that it had of its own
(RssAnon, sampled): the image is mapped, and its pages are the host's to take back.
"""

from __future__ import annotations

import argparse
import random
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from daxfs.core import layout, namespace
from daxfs.core.format import format_image
from daxfs.core.fsck import check, repair
from daxfs.core.fsck.dirblocks import Entry, build
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRBLOCK, EXTENT, INODE, INODE_CRC_END, INODE_SIZE
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume

NOW = 1_700_000_000_000_000_000
FILES = 1000  # in a directory
BLOCK = 4096


def make(path: Path, inodes: int) -> None:
    format_image(path, (inodes * (BLOCK + INODE_SIZE + 64) + (64 << 20)), now=NOW)
    volume = Volume.open(path, now=NOW)
    for i in range(inodes // FILES):
        directory = namespace.mkdir(volume, NOW, volume.root, b"d%05d" % i, 0o755, Caller(0, 0, 0))
        _fill(volume, directory)
        volume.drop(directory)
    volume.close(NOW)


def _fill(volume: Volume, directory: Inode) -> None:
    time_word = layout.time_word(NOW)
    values: dict[str, int | bytes] = dict.fromkeys(INODE.names, 0)
    values.update(magic=layout.INODE_MAGIC, generation=1, mode=stat.S_IFREG | 0o644, nlink=1, size=BLOCK, extents=1,
                  blocks=1, btime=time_word, mtime=time_word, ctime=time_word, atime=time_word, xattrs=b"")  # fmt: skip
    entries: list[Entry] = []
    with volume.transaction(NOW) as txn:
        for i in range(FILES):
            if not volume.free_inodes:
                volume._add_chunk(NOW)
            ino = volume.free_inodes.pop()
            values.update(ino=ino, body=EXTENT.struct.pack(0, txn.take(1)[0][0], 1, 0))
            volume.pmem.store(volume.inode_at(ino), layout.seal(INODE.pack(**values), end=INODE_CRC_END))
            entries.append(Entry(entries[-1].end if entries else DIRBLOCK.size, ino, stat.S_IFREG >> 12, b"file%06d" % i))
            if entries[-1].end + 32 > BLOCK or i == FILES - 1:
                block = directory.append_block(txn)
                index = directory.size // BLOCK - 1
                txn.fresh(block * BLOCK, build(block, directory.ino, index, BLOCK, entries))
                entries = []
        txn.dirty(directory)


def damage(path: Path, count: int) -> None:
    """Scribble over inode records and directory blocks, half and half."""
    dice = random.Random(1)
    volume = Volume.open(path, readonly=True, now=NOW)
    places = [volume.inode_at(dice.randrange(2, volume.ino_end)) + 8 * dice.randrange(60) for _ in range(count // 2)]
    for name, ino, _, _ in list(namespace.entries(volume, volume.root, 0)):
        if len(places) < count and name.startswith(b"d"):
            places.append(volume.inode(ino).block(0) * BLOCK + dice.randrange(BLOCK - 8))
    volume.close(NOW)
    with open(path, "r+b") as file:
        for at in places:
            file.seek(at)
            file.write(dice.randbytes(8))


def step(what: str, path: Path, argument: int = 0) -> None:
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    started = time.monotonic()
    code = 0
    if what == "make":
        make(path, argument)
    elif what == "damage":
        damage(path, argument)
    else:
        report = check(path) if what == "check" else repair(path, now=NOW)
        code = report.exit_code
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{what:8} {seconds:7.1f} s   exit {code}   memory {peak[0]} MiB, with the mapped image {mapped} MiB", flush=True)


def watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        with open("/proc/self/status") as file:
            peak[0] = max(peak[0], *(int(line.split()[1]) // 1024 for line in file if line.startswith("RssAnon")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inodes", type=int, default=1_000_000)
    parser.add_argument("--damage", type=int, default=1000, help="records and directory blocks")
    parser.add_argument("--image", type=Path, help="default: a temporary file")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step[0], arguments.image, int(arguments.step[1]))
        return
    with tempfile.TemporaryDirectory() as place:
        image = arguments.image or Path(place) / "image"
        steps = [("make", arguments.inodes), ("check", 0), ("damage", arguments.damage), ("repair", 0), ("check", 0)]
        for what, argument in steps:
            command = [sys.executable, "-m", "tools.fsck_bench", "--image", str(image), "--step", what, str(argument)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
