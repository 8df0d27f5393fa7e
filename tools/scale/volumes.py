"""Volumes with many inodes, and images that are large and sparse."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from daxfs.core import layout
from daxfs.core.fsck.dirblocks import Entry, build
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRBLOCK, INODE, INODE_CRC_END
from daxfs.core.volume import Volume
from tools import fsck_bench
from tools.scale.measure import BLOCK, NOW, Rows

_AT_ONCE = 4096  # files of a transaction
_STEP = """
import os, sys, time
what, image = sys.argv[1:3]
from daxfs.core import fileops, fsck, namespace
from daxfs.core.format import format_image
from daxfs.core.volume import Volume

def memory():
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
if what in ("open", "write"):
    volume.close(1)
"""


def step(what: str, image: Path, size: int = 0) -> tuple[float, int, int]:
    """One step in a process of its own: (CPU ms, bytes of own memory that it kept, bytes at its peak, mapped ones too)."""
    command = [sys.executable, "-c", _STEP, what, str(image), str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took, kept, peak = done.stdout.split()
    return float(took), int(kept), int(peak)


def fill_directory(vol: Volume, parent: Inode, files: int) -> None:
    """So many empty files, stored as the core stores them but without a transaction for each."""
    time_word = layout.time_word(NOW)
    values: dict[str, int | bytes] = dict.fromkeys(INODE.names, 0)
    values.update(magic=layout.INODE_MAGIC, generation=1, mode=stat.S_IFREG | 0o644, nlink=1, btime=time_word,
                  mtime=time_word, ctime=time_word, atime=time_word, body=b"", xattrs=b"")  # fmt: skip
    at = INODE.offset["ino"]
    record = bytearray(INODE.pack(**values))
    entries: list[Entry] = []
    for first in range(0, files, _AT_ONCE):
        last = min(files, first + _AT_ONCE)
        while len(vol.free_inodes) < last - first:
            vol._add_chunk(NOW)
        with vol.transaction(NOW) as txn:
            txn.dirty(parent)
            for i in range(first, last):
                ino = vol.free_inodes.pop()
                record[at : at + 8] = ino.to_bytes(8, "little")
                vol.pmem.store(vol.inode_at(ino), layout.seal(record, end=INODE_CRC_END))
                place = entries[-1].end if entries else DIRBLOCK.size
                entries.append(Entry(place, ino, stat.S_IFREG >> 12, b"file%08d" % i))
                if entries[-1].end + 32 > BLOCK or i == last - 1:
                    block = parent.append_block(txn)
                    index = parent.size // BLOCK - 1
                    txn.fresh(block * BLOCK, build(block, parent.ino, index, BLOCK, entries))
                    entries = []


def inodes(rows: Rows, n: int, place: Path) -> None:
    """A volume of so many files of a block, in directories of 1,000."""
    image = place / "image"
    fsck_bench.make(image, n)
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
