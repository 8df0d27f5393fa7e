"""Volumes with many inodes, and images that are large and sparse."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
from crc32c import crc32c

from daxfs.core import layout, namespace
from daxfs.core.format import format_image
from daxfs.core.fsck.dirblocks import Entry, build
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRBLOCK, INODE_CRC_END
from daxfs.core.scan import INODE_DTYPE, Array
from daxfs.core.volume import Volume
from tools.scale.measure import BLOCK, NOW, ROOT, Rows

_AT_ONCE = 4096  # files of a transaction
_STEP = """
import ctypes, os, sys, time
trim = ctypes.CDLL(None).malloc_trim
what, image = sys.argv[1:3]
from daxfs.core import fileops, fsck, namespace
from daxfs.core.format import format_image
from daxfs.core.volume import Volume

def memory():
    trim(0)  # what was freed goes back to the host, or it would serve what is measured
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "VmHWM"))}

before, began = memory(), time.process_time()
if what == "mkfs":
    format_image(image, int(sys.argv[3]), now=1)
elif what == "fsck":
    assert fsck.check(image).exit_code == 0
else:
    volume = Volume.open(image, now=1)
took = time.process_time() - began
if what in ("map", "lengths"):
    before, began = memory(), time.process_time()
    if what == "map":
        volume.inode(namespace.index(volume, volume.root).lookup(b"f")[0]).map
    else:
        volume.alloc.take(1)
    took = time.process_time() - began
if what == "write":
    began = time.process_time()
    inode = namespace.create(volume, 1, volume.root, b"new", 0o644, namespace.Caller(0, 0))
    fileops.write(volume, 1, inode, 0, bytes(4096))
    took = time.process_time() - began
    namespace.unlink(volume, 1, volume.root, b"new")
    fileops.reap(volume, 1, inode)
after = memory()
print(took * 1e3, after["RssAnon"] - before["RssAnon"], after["VmHWM"] - before["VmHWM"], flush=True)
if what == "crash":
    os._exit(0)
if what not in ("mkfs", "fsck"):
    volume.close(1)
"""


def step(what: str, image: Path, size: int = 0) -> tuple[float, int, int]:
    """One step in a process of its own: (CPU ms, bytes of own memory that it kept, bytes at its peak, mapped ones too)."""
    command = [sys.executable, "-c", _STEP, what, str(image), str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took, kept, peak = done.stdout.split()
    return float(took), int(kept), int(peak)


def fill_directory(vol: Volume, parent: Inode, files: int, *, blocks: int = 0) -> None:
    """So many files of so many blocks (0 or 1), stored as the core stores them but without a transaction for each."""
    for first in range(0, files, _AT_ONCE):
        _fill(vol, parent, first, min(files, first + _AT_ONCE), blocks)


def _fill(vol: Volume, parent: Inode, first: int, last: int, blocks: int) -> None:
    while len(vol.free_inodes) < last - first:
        vol._add_chunk(NOW)
    inos = [vol.free_inodes.pop() for _ in range(first, last)]
    with vol.transaction(NOW) as txn:
        txn.dirty(parent)
        records = _records(np.array(inos, np.uint64), txn.take_chunk(last - first) if blocks else 0)
        size, end, seed = layout.INODE_SIZE, INODE_CRC_END, crc32c(layout.INODE_MAGIC.to_bytes(4, "little"))
        view = records.view(np.uint8).data
        records["crc"] = [crc32c(view[at + 8 : at + end], seed) for at in range(0, len(view), size)]
        for i, ino in enumerate(inos):
            vol.pmem.store(vol.inode_at(ino), view[i * size : (i + 1) * size])
        entries: list[Entry] = []
        for i, ino in enumerate(inos, first):
            place = entries[-1].end if entries else DIRBLOCK.size
            entries.append(Entry(place, ino, stat.S_IFREG >> 12, b"file%08d" % i))
            if entries[-1].end + 32 > BLOCK or i == last - 1:
                block = parent.append_block(txn)
                index = parent.size // BLOCK - 1
                txn.fresh(block * BLOCK, build(block, parent.ino, index, BLOCK, entries))
                entries = []


def _records(inos: Array, physical: int) -> Array:
    """Records of files, each with one block from `physical` on (0: none), but for their checksums."""
    time_word = layout.time_word(NOW)
    records = np.zeros(len(inos), INODE_DTYPE)
    for name, value in {"magic": layout.INODE_MAGIC, "generation": 1, "mode": stat.S_IFREG | 0o644, "nlink": 1, "ino": inos,
                        "btime": time_word, "mtime": time_word, "ctime": time_word, "atime": time_word}.items():  # fmt: skip
        records[name] = value
    if physical:
        records["size"], records["extents"], records["blocks"] = BLOCK, 1, 1
        records["body"]["physical"][:, 0] = np.arange(physical, physical + len(inos))
        records["body"]["count"][:, 0] = 1
    return records


def make(image: Path, files: int) -> None:
    """A volume of so many files of a block, in directories of some thousands."""
    format_image(image, files * (BLOCK + layout.INODE_SIZE + 64) + (64 << 20), now=NOW)
    vol = Volume.open(image, now=NOW)
    for first in range(0, files, _AT_ONCE):
        parent = namespace.mkdir(vol, NOW, vol.root, b"d%05d" % (first // _AT_ONCE), 0o755, ROOT)
        fill_directory(vol, parent, min(_AT_ONCE, files - first), blocks=1)
        vol.drop(parent)
    vol.close(NOW)


def inodes(rows: Rows, n: int, place: Path) -> None:
    """A volume of so many files of a block."""
    image = place / "image"
    make(image, n)
    step("open", image)
    rows.put("mount after a clean unmount", "ms", n, step("open", image)[0])
    rows.put("first create and write", "ms", n, step("write", image)[0])
    step("crash", image)
    took, kept, _ = step("crash", image)
    rows.put("mount after a crash", "ms", n, took, flat=False)
    rows.put("... per inode", "µs", n, took * 1e3 / n)
    rows.put("... memory that it keeps, per inode", "B", n, kept / n)
    step("open", image)
    image.unlink()


def sparse(rows: Rows, n: int, place: Path) -> None:
    """An image of so many GiB that has next to nothing in it."""
    image = place / "image"
    rows.put("mkfs", "ms", n, step("mkfs", image, n << 30)[0])
    took, kept, _ = step("open", image)
    rows.put("mount after a clean unmount", "ms", n, took)
    rows.put("memory of a mount", "KiB", n, kept / 1024)
    step("crash", image)
    rows.put("mount after a crash", "ms", n, step("crash", image)[0])
    rows.put("first create and write", "ms", n, step("write", image)[0])
    took, _, peak = step("fsck", image)
    rows.put("fsck", "ms", n, took)
    rows.put("memory of fsck at its peak, mapped pages too", "KiB", n, peak / 1024)
    rows.put("what the image takes on the host's disk", "KiB", n, os.stat(image).st_blocks / 2)
    image.unlink()
