"""Files of many extents, free space in many runs, directories of many entries."""

from __future__ import annotations

import os
from pathlib import Path

from daxfs.core import fileops, namespace
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRBLOCK
from daxfs.core.volume import Volume
from tools.scale.measure import BLOCK, MANY, NOW, ROOT, Rows, memory, once_us, scattered, volume
from tools.scale.volumes import fill_directory, step

_DATA = b"x" * BLOCK
_PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE


def extents(rows: Rows, n: int, place: Path) -> None:
    """Calls on a file of so many extents, each of a block."""
    with volume(place, 2 * n * BLOCK + (512 << 20)) as vol:
        file = scattered(vol, b"f", n)
        middle = n // 2

        def at(i: int) -> int:
            return i % 200 * (n // 200) * BLOCK  # so that best rounds take no page faults

        rows.cost("read 4k", n, lambda i: fileops.read(vol, file, at(i), BLOCK))
        rows.cost("overwrite 4k", n, lambda i: fileops.write(vol, NOW, file, at(i), _DATA))
        rows.cost("punch 4k", n, lambda i: fileops.fallocate(vol, NOW, file, _PUNCH, (middle + i) * BLOCK, BLOCK))
        rows.cost("fill a hole of 4k", n, lambda i: fileops.write(vol, NOW, file, (middle + i) * BLOCK, _DATA))
        rows.cost("append 4k", n, lambda i: fileops.write(vol, NOW, file, file.size, _DATA))
        rows.cost("truncate by 4k", n, lambda i: fileops.truncate(vol, NOW, file, file.size - BLOCK))
        rows.cost("seek to data", n, lambda i: fileops.seek(vol, file, at(i), os.SEEK_DATA))
    image = place / "image"
    format_image(image, 2 * n * BLOCK + (512 << 20), now=NOW)
    vol = Volume.open(image, now=NOW)
    scattered(vol, b"f", n)
    vol.close(NOW)
    took, kept, _ = step("map", image)
    rows.put("open: its map is read, per extent", "µs", n, took * 1e3 / n)
    if n >= MANY:
        rows.put("memory of an extent", "B", n, kept / n)
        _, kept, _ = step("lengths", image)
        rows.put("memory of a free run, for its length alone", "B", n, kept / n)
    vol = Volume.open(image, now=NOW)
    found = namespace.lookup(vol, vol.root, b"f")
    assert found is not None
    whole = once_us(lambda: fileops.seek(vol, found, 0, os.SEEK_HOLE))
    rows.put("seek to the hole behind all of them, per extent", "µs", n, whole / n)
    rows.put("truncate to nothing, per extent", "µs", n, once_us(lambda: fileops.truncate(vol, NOW, found, 0)) / n)
    vol.close(NOW)
    image.unlink()


def runs(rows: Rows, n: int, place: Path) -> None:
    """Allocations while free space is in so many runs of a block, and one long one."""
    with volume(place, 2 * n * BLOCK + (512 << 20)) as vol:
        file = scattered(vol, b"f", n)
        alloc, first = vol.alloc, file.block(0)

        def cycle(count: int, goal: int = 0) -> None:
            alloc.give(alloc.take(count, goal))

        def grow(_: int) -> None:
            alloc.give(alloc.take(3, owner=5))
            alloc.let_go(5)

        rows.cost("take and give 1 block", n, lambda i: cycle(1))
        rows.cost("take and give 100 blocks", n, lambda i: cycle(100))
        rows.cost("... with a goal that is not free", n, lambda i: cycle(2, first + 2 * (i * 7919 % n)))
        rows.cost("... for a file that grows", n, grow)


def directories(rows: Rows, n: int, place: Path) -> None:
    """Calls on a directory of so many entries."""
    with volume(place, n * 800 + (512 << 20)) as vol:
        parent = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
        fill_directory(vol, parent, n)
        vol.drop(parent)
        before = memory()
        parent = vol.inode(parent.ino)
        _calls_on_directory(rows, n, vol, parent)
        parent.opens = 0
        fileops.reap(vol, NOW, parent)
        del parent
        if n >= MANY:
            rows.put("... and when it was forgotten", "B", n, (memory() - before) / n)


def _calls_on_directory(rows: Rows, n: int, vol: Volume, parent: Inode) -> None:
    before = memory()
    first = once_us(lambda: namespace.lookup(vol, parent, b"nothing"))
    rows.put("first lookup: the index is made, per entry", "µs", n, first / n)
    if n >= MANY:
        rows.put("memory of an entry while the directory is in use", "B", n, (memory() - before) / n)

    def look(i: int) -> None:
        inode = namespace.lookup(vol, parent, b"file%08d" % (i * 7919 % n))
        assert inode is not None
        vol.forget(inode)

    def unlink(i: int) -> None:
        inode = namespace.lookup(vol, parent, b"new%d" % i)
        assert inode is not None
        namespace.unlink(vol, NOW, parent, b"new%d" % i)
        fileops.reap(vol, NOW, inode)

    def list_100(i: int) -> None:
        position = DIRBLOCK.size + i * 7919 % max(1, parent.size // BLOCK - 2) * BLOCK
        for _ in zip(range(100), namespace.entries(vol, parent, position), strict=False):
            pass

    rows.cost("lookup", n, look)
    rows.cost("create", n, lambda i: vol.forget(namespace.create(vol, NOW, parent, b"new%d" % i, 0o644, ROOT)))
    rows.cost("unlink", n, unlink)
    rows.cost("readdir of 100 entries, anywhere", n, list_100, 20)
