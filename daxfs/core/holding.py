"""The verbs of pins: take, give back, and what happens to busy blocks then.

Rules
- A pin covers whole blocks below the (rounded up) end of file. A write pin fills holes and unwritten blocks with zeroed
  ones, as a write fault would; a read pin of them is a BadAddress (EFAULT), as there is no block to hold.
- The ledger has a pin's runs before the pin is granted.
- Counting and looking up the extents is one step: nothing can free the blocks in between.
- What loses its last pin and has no file becomes due; `Volume.free_unpinned` gives it back.
"""

from __future__ import annotations

from daxfs import abi
from daxfs.core import fileops
from daxfs.core.alloc import Run
from daxfs.core.inode import Inode
from daxfs.core.pins import PINS_PER_OWNER_MAX, Holder, Pin
from daxfs.core.volume import Volume
from daxfs.errors import AccessDenied, BadAddress, BadArgument, IsDirectory, NoMemory, NoSuchAddress, ReadOnly


def pin(vol: Volume, now: int, inode: Inode, offset: int, length: int, flags: int, owner: int, holder: Holder, *,
        writable: bool) -> Pin:  # fmt: skip
    """Pin a range of a file for an owner. `writable`: its descriptor is. Errors as abi.IOC_PIN says."""
    if inode.is_dir:
        raise IsDirectory("only regular files have blocks to pin")
    if not inode.is_file:
        raise BadArgument("only regular files have blocks to pin")
    _check_flags(flags)
    size = vol.block_size
    if length == 0 or offset % size or length % size:
        raise BadArgument(f"offset and length of a pin are multiples of {size}, and the length is not 0")
    write = bool(flags & abi.FOLL_WRITE)
    if write and not writable:
        raise AccessDenied("a write pin needs a descriptor that is open for writing")
    if offset + length > inode.size + -inode.size % size:
        raise NoSuchAddress("the range goes beyond the end of file")
    if vol.pins.count_of(owner) >= PINS_PER_OWNER_MAX:
        raise NoMemory(f"this open file has {PINS_PER_OWNER_MAX} pins already")
    first, count = offset // size, length // size
    if write and not vol.readonly:
        fileops.materialise(vol, now, inode, first, count)
    elif write:
        raise ReadOnly("the volume is mounted read-only")
    elif not inode.map.written(first, count):
        raise BadAddress("the range has a hole, and a read pin cannot fill it")
    runs = _joined([(physical, n) for _, physical, n, _ in inode.map.overlaps(first, count)])
    taken = Pin(vol.pins.next_id(), owner, inode, inode.ino, offset, length, flags, runs, holder, now)
    if not vol.readonly:
        taken.entries = vol.ledger.insert(now, taken.id, runs, holder.pid, flags, holder.started, inode.ino)
    vol.pins.insert(taken)
    return taken


def _check_flags(flags: int) -> None:
    if flags & ~abi.PIN_FLAGS:
        raise BadArgument(f"unknown flags {flags & ~abi.PIN_FLAGS:#x}")
    if bool(flags & abi.FOLL_PIN) == bool(flags & abi.FOLL_GET):
        raise BadArgument("a pin is either FOLL_PIN or FOLL_GET")
    if flags & abi.FOLL_LONGTERM and not flags & abi.FOLL_PIN:
        raise BadArgument("FOLL_LONGTERM needs FOLL_PIN")


def _joined(runs: list[Run]) -> list[Run]:
    """Neighbours on the image as one run."""
    out: list[Run] = []
    for start, count in runs:
        if out and out[-1][0] + out[-1][1] == start:
            out[-1] = (out[-1][0], out[-1][1] + count)
        else:
            out.append((start, count))
    return out


def unpin(vol: Volume, now: int, owner: int, pin_id: int, *, dirty: bool = False) -> None:
    """Give a pin back; `dirty`: the device wrote, so the file was modified (O2). NoEntry if this owner has no such pin."""
    taken = vol.pins.get(owner, pin_id)
    if dirty and taken.flags & abi.FOLL_WRITE and taken.inode and not (taken.inode.dead or vol.readonly or vol.failed):
        taken.inode.touch_in_place(mtime=now, ctime=now)
    _release(vol, [taken])


def release_owner(vol: Volume, owner: int) -> int:
    """The owner's last close: all its pins go. How many there were."""
    pins = vol.pins.of_owner(owner)
    _release(vol, pins)
    return len(pins)


def release_survivor(vol: Volume, survivor: Pin) -> None:
    """The holder of a pin that a dead daemon granted is gone."""
    _release(vol, [survivor])


def _release(vol: Volume, pins: list[Pin]) -> None:
    if not pins:
        return
    idle = vol.pins.remove(pins)
    if not vol.readonly:
        vol.ledger.void([at for one in pins for at in one.entries])
    vol.busy_list.unpinned(idle)
