"""Holders that outlived an earlier daemon: who of them is still there, and giving back what the others left.

The ledger kept their blocks away from everybody over the restart (core/ledger.py). A survivor is there as long as any
process maps the image at its blocks, or still has the pinned file open on the mount that died: it may map at any time. A
process whose /proc the daemon may not read counts as there while it lives, if it is the one that took the pin.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import trio

from daxfs.core import holding
from daxfs.core.pins import Pin
from daxfs.daemon import holders, mountpoint
from daxfs.daemon.service import Service

log = logging.getLogger("daxfs")

LOOK_S = 0.5  # between two looks at /proc, while there are survivors


async def reap_worker(service: Service) -> None:
    """Release survivors that are gone, until there are none."""
    volume = service.volume
    left = volume.pins.survivors()
    if left:
        log.info("%d pins of an earlier daemon are kept until their holders are gone", len(left))
    while left := volume.pins.survivors():
        ended = await trio.to_thread.run_sync(gone, left, volume.pmem.address, volume.block_size)
        if service.gone:
            return
        for pin in filter(volume.pins.has, ended):
            log.info("pin %d of process %d is released: its holder is gone", pin.id, pin.holder.pid)
            holding.release_survivor(volume, pin)
            service.moved(pin.ino)
        await trio.sleep(LOOK_S)


def gone(pins: Iterable[Pin], address: int, block_size: int) -> list[Pin]:
    """Those of the pins whose holders have ended. `address`: where this process maps the image, since /proc may name its
    device in another way than stat(2) (btrfs). It reads /proc: for a thread."""
    image = next((line.file for line in _maps(os.getpid()) if line.start <= address < line.end), None)
    if image is None:
        raise RuntimeError("the daemon does not find its own mapping of the image in /proc")
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    mapped: list[tuple[int, int]] = []
    open_files: set[int] = set()
    unreadable: set[int] = set()
    for pid in pids:
        try:
            mapped += _mapped(pid, image)
            open_files |= _open_on_dead_mounts(pid)
        except PermissionError:
            unreadable.add(pid)
        except OSError:
            pass  # it has ended
    return [pin for pin in pins if not _there(pin, mapped, open_files, unreadable, block_size)]


def _there(
    pin: Pin, mapped: list[tuple[int, int]], open_files: set[int], unreadable: set[int], block_size: int
) -> bool:
    if pin.ino in open_files or (pin.holder.pid in unreadable and holders.alive(pin.holder)):
        return True
    ranges = [(start * block_size, (start + count) * block_size) for start, count in pin.runs]
    return any(lo < end and start < hi for lo, hi in mapped for start, end in ranges)


class _Line(NamedTuple):
    """A mapping of a file: addresses, the offset in the file, and which file (device, inode)."""

    start: int
    end: int
    offset: int
    file: tuple[bytes, int]


def _maps(pid: int) -> Iterator[_Line]:
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            place, _, offset, device, ino = line.split(None, 5)[:5]
            start, end = (int(part, 16) for part in place.split(b"-"))
            yield _Line(start, end, int(offset, 16), (device, int(ino)))


def _mapped(pid: int, image: tuple[bytes, int]) -> list[tuple[int, int]]:
    """The byte ranges of the image that a process maps."""
    return [(line.offset, line.offset + line.end - line.start) for line in _maps(pid) if line.file == image]


def _open_on_dead_mounts(pid: int) -> set[int]:
    """Inode numbers of the files that a process has open on mounts that are in nobody's tree any more."""
    found: set[int] = set()
    mounts: set[str] | None = None
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
                facts = dict(line.partition(":\t")[::2] for line in info.read().splitlines())
        except FileNotFoundError:
            continue
        if mounts is None:
            mounts = {mounted.id for mounted in mountpoint.table(pid)}
        ino, mount_id = facts.get("ino", ""), facts.get("mnt_id", "")
        if ino.isdecimal() and mount_id not in mounts and _is_file(pid, fd):
            found.add(int(ino))
    return found


def _is_file(pid: int, fd: str) -> bool:
    """Not a pipe, socket or the like, which have no mount in the tree either."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/")
    except FileNotFoundError:
        return False
