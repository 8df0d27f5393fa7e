"""Very many pins, and very many busy extents."""

from __future__ import annotations

from pathlib import Path

from daxfs import abi
from daxfs.core import fileops, holding
from daxfs.core.inode import Inode
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.errors import TextBusy
from tools.scale.measure import BLOCK, MANY, NOW, Rows, memory, new_file, once_us, scattered, volume

OWNERS = 8  # descriptors of as many processes: each may have 262,144 pins
_PIN = abi.FOLL_PIN | abi.FOLL_WRITE
_DATA = b"x" * BLOCK


def _pin(vol: Volume, file: Inode, first: int, owner: int = 1) -> int:
    pin = holding.pin(vol, NOW, file, first * BLOCK, BLOCK, _PIN, owner, Holder(owner, "", owner), writable=True)
    number: int = pin.id
    return number


def pins(rows: Rows, n: int, place: Path) -> None:
    """Calls while so many blocks of a file are pinned, each by itself."""
    with volume(place, 3 * n * BLOCK + (768 << 20)) as vol:
        file, other = _files(vol, n)
        before = memory()
        took = once_us(lambda: _pin_all(vol, file, n))
        rows.put("to take them, each", "µs", n, took / n)
        if n >= MANY:
            rows.put("memory of a pin", "B", n, (memory() - before) / n)
        _calls_beside_pins(rows, n, vol, file, other)
        for owner in range(2, OWNERS + 1):
            holding.release_owner(vol, owner)
        rows.cost("16 pins of a close", n, lambda i: holding.release_some(vol, 1, 16), 1)
        holding.release_owner(vol, 1)


def _files(vol: Volume, n: int) -> tuple[Inode, Inode]:
    """One of so many extents, and another one of 16 MiB."""
    file, other = scattered(vol, b"f", n), new_file(vol, b"other")
    fileops.write(vol, NOW, other, 0, _DATA * 4096)
    return file, other


def _pin_all(vol: Volume, file: Inode, n: int) -> None:
    for i in range(n):
        _pin(vol, file, i, 1 + i % OWNERS)


def _calls_beside_pins(rows: Rows, n: int, vol: Volume, file: Inode, other: Inode) -> None:
    punch = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE

    def pin_and_unpin(which: Inode, i: int) -> None:
        holding.unpin(vol, NOW, 99, _pin(vol, which, i, 99))

    rows.cost("pin and unpin of a block of another file", n, lambda i: pin_and_unpin(other, i % 4096))
    rows.cost("... of the same file", n, lambda i: pin_and_unpin(file, i * 7919 % n))
    rows.cost("append 4k to another file", n, lambda i: fileops.write(vol, NOW, other, other.size, _DATA))
    rows.cost("truncate it by 4k", n, lambda i: fileops.truncate(vol, NOW, other, other.size - BLOCK))
    rows.cost("statfs", n, lambda i: (vol.free, vol.alloc.available, vol.busy, vol.pinned, vol.used))

    def refused(i: int) -> None:
        try:
            fileops.fallocate(vol, NOW, file, punch, i * 7919 % n * BLOCK, BLOCK)
        except TextBusy:
            return
        raise AssertionError

    vol.settings.policy = "fail"
    rows.cost("punch of a pinned block, refused", n, refused)
    vol.settings.policy = "busy"
    rows.cost("punch of a pinned block: busy", n, lambda i: fileops.fallocate(vol, NOW, file, punch, i * BLOCK, BLOCK), 100)


def busy(rows: Rows, n: int, place: Path) -> None:
    """Calls while so many extents are busy: blocks of a file that was truncated under its pins."""
    with volume(place, 3 * n * BLOCK + (768 << 20)) as vol:
        file, other = _files(vol, n)
        _pin_all(vol, file, n)
        before = memory()
        took = once_us(lambda: fileops.truncate(vol, NOW, file, 0))
        rows.put("the truncate, each", "µs", n, took / n)
        if n >= MANY:
            rows.put("memory of a busy extent", "B", n, max(0, memory() - before) / n)
        rows.cost("append 4k", n, lambda i: fileops.write(vol, NOW, other, other.size, _DATA))
        rows.cost("truncate by 4k", n, lambda i: fileops.truncate(vol, NOW, other, other.size - BLOCK))
        rows.cost("pin and unpin", n, lambda i: holding.unpin(vol, NOW, 99, _pin(vol, other, i % 4096, 99)))
        rows.cost("statfs", n, lambda i: (vol.free, vol.alloc.available, vol.busy, vol.pinned, vol.used))
        _calls_that_free(rows, n, vol)


def _calls_that_free(rows: Rows, n: int, vol: Volume) -> None:
    def unpin(i: int) -> None:
        holding.release_some(vol, 1, 1)

    rows.cost("unpin of a busy extent", n, unpin, 10)
    for owner in range(1, OWNERS + 1):
        holding.release_owner(vol, owner)
    rows.cost("64 extents of the delayed free", n, lambda i: vol.free_unpinned(NOW, 64), 2)
    while vol.free_unpinned(NOW, 1 << 16):
        pass
