"""Holders that outlived an earlier daemon: who of them is still there, and giving back what the others left.

The ledger kept their blocks away from everybody over the restart (core/ledger.py). A survivor is there as long as any
process maps the image at its blocks, or still has the pinned file open on the mount that died: it may map at any time.

Rules
- Who took the pin does not matter, what is mapped does: a mapping goes on in forked children, and in threads whose first
  one has ended. Processes that came while one looked are looked at too, as they may have inherited what their parent, now
  dead, had not shown yet.
- In doubt a survivor is there; an administrator can release it by force. A process that the daemon may not look at (only
  one of root may look at all) is such a doubt if it is the one that took the pin.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import trio

from daxfs.core import holding
from daxfs.core.pins import Pin
from daxfs.core.volume import Volume
from daxfs.daemon import holders, mountpoint
from daxfs.daemon.service import Service
from daxfs.daemon.threads import in_thread
from daxfs.errors import NoMemory

log = logging.getLogger("daxfs")

LOOK_S = 0.5  # between two looks at /proc, while there are survivors
_ROUNDS = 20  # of looking at processes that came meanwhile


async def reap_worker(service: Service) -> None:
    """Release survivors that are gone, until there are none."""
    volume = service.volume
    left = volume.pins.survivors()
    if left:
        await service.served.wait()
        log.info("%d pins of an earlier daemon are kept until their holders are gone", len(left))
    while left := volume.pins.survivors():
        try:
            ended = await in_thread(gone, left, volume, service.device)
        except NoMemory as e:
            log.error("%s: who holds pins is not known now", e.why)
            ended = []
        if service.gone:
            return
        for pin in filter(volume.pins.has, ended):
            log.info("pin %d of process %d is released: its holder is gone", pin.id, pin.holder.pid)
            holding.release_survivor(volume, pin)
        await trio.sleep(LOOK_S)


def gone(pins: Iterable[Pin], volume: Volume, device: str) -> list[Pin]:
    """Those of the pins whose holders have ended. `device`: of the mount that is served now. It reads /proc: for a thread.

    A descriptor can be passed on from a process that is looked at late to one that was looked at early; so one looks twice.
    """
    once = _gone(pins, volume, device)
    return _gone(once, volume, device) if once else []


def _gone(pins: Iterable[Pin], volume: Volume, device: str) -> list[Pin]:
    image, dead = _shown_as(volume), _DeadMounts(volume, device)
    mapped: list[tuple[int, int]] = []
    open_files: set[int] = set()
    unreadable: set[int] = set()
    seen = {os.getpid()}
    for _ in range(_ROUNDS):
        fresh = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - seen
        if not fresh:
            break
        seen |= fresh
        for pid, place in [(number, place) for number in fresh for place in _memories(number)]:
            try:
                open_files |= _open_on_dead_mounts(place, dead)
                mapped += _mapped(place, image)  # later: who has the file open may map it, and close it, meanwhile
            except PermissionError:
                unreadable.add(pid)
            except OSError:
                pass  # it has ended
    else:
        return []  # processes come faster than one can look
    pins = list(pins)
    unreadable |= {pid for pid in {pin.holder.pid for pin in pins} - seen if _hidden(pid)}

    def there(pin: Pin) -> bool:
        if pin.ino in open_files or (pin.holder.pid in unreadable and holders.may_live(pin.holder)):
            return True
        ranges = [(start * volume.block_size, (start + count) * volume.block_size) for start, count in pin.runs]
        return any(lo < end and start < hi for lo, hi in mapped for start, end in ranges)

    return [pin for pin in pins if not there(pin)]


def _hidden(pid: int) -> bool:
    """Whether there is such a process though /proc, mounted with hidepid, does not show it."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _memories(pid: int) -> list[str]:
    """Where below /proc a process's mappings and descriptors are: with a thread, if its first one ended before others."""
    if not holders.zombie(pid):
        return [str(pid)]
    try:
        return [f"{pid}/task/{tid}" for tid in os.listdir(f"/proc/{pid}/task") if int(tid) != pid]
    except OSError:
        return []


def _shown_as(volume: Volume) -> tuple[bytes, bytes]:
    """Device and inode of the image as /proc/PID/maps names them. On some file systems (btrfs, overlayfs) stat says
    another device, so this is what our own mapping of the image shows."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            place, _, _, device, ino = line.split(None, 5)[:5]
            start, end = (int(part, 16) for part in place.split(b"-"))
            if start <= volume.pmem.address < end and ino != b"0":
                return device, ino
    device_number, ino_number = volume.pmem.file_id
    return b"%02x:%02x" % (os.major(device_number), os.minor(device_number)), b"%d" % ino_number


def _mapped(place: str, image: tuple[bytes, bytes]) -> list[tuple[int, int]]:
    """The byte ranges of the image that a process maps."""
    found = []
    with open(f"/proc/{place}/maps", "rb") as maps:
        for line in maps:
            addresses, _, offset, device, ino = line.split(None, 5)[:5]
            if (device, ino) == image:
                start, end = (int(part, 16) for part in addresses.split(b"-"))
                found.append((int(offset, 16), int(offset, 16) + end - start))
    return found


class _DeadMounts:
    """Which mounts of our image are a dead daemon's: only one daemon at a time has the image, and we are the living one."""

    def __init__(self, volume: Volume, device: str) -> None:
        self._image, self._device = volume.pmem.file_id, device
        self._ours: dict[str, bool] = {}  # by source

    def has(self, mounted: mountpoint.Mounted) -> bool:
        if mounted.fstype != mountpoint.FSTYPE or mounted.device == self._device:
            return False
        if mounted.source not in self._ours:
            try:
                found = os.stat(mounted.source)
                self._ours[mounted.source] = (found.st_dev, found.st_ino) == self._image
            except OSError:
                self._ours[mounted.source] = True  # moved, perhaps: who knows
        return self._ours[mounted.source]


def _open_on_dead_mounts(place: str, dead: _DeadMounts) -> set[int]:
    """Inode numbers of the files that a process has open on mounts of a dead daemon. Those are not in its tree any more; if
    they are (bind mounts stay), one sees whose they are."""
    found: set[int] = set()
    alive: set[str] | None = None
    for fd in os.listdir(f"/proc/{place}/fdinfo"):
        try:
            with open(f"/proc/{place}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
                facts = dict(line.partition(":\t")[::2] for line in info.read().splitlines())
        except FileNotFoundError:
            continue
        if alive is None:
            alive = {mounted.id for mounted in mountpoint.table(place) if not dead.has(mounted)}
        ino, mount_id = facts.get("ino", ""), facts.get("mnt_id", "")
        if ino.isdecimal() and mount_id not in alive and _is_file(place, fd):
            found.add(int(ino))
    return found


def _is_file(place: str, fd: str) -> bool:
    """Not a pipe, socket or the like, which have no mount in the tree either."""
    try:
        return os.readlink(f"/proc/{place}/fd/{fd}").startswith("/")
    except FileNotFoundError:
        return False
