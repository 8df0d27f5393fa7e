"""The verbs of pins: take, give back, and what happens to busy blocks then.

Rules
- A pin covers whole blocks below the (rounded up) end of file. A write pin fills holes and unwritten blocks with zeroed
  ones, as a write fault would; a read pin of them is a BadAddress (EFAULT), as there is no block to hold.
- The ledger has a pin's runs before the pin is granted.
- Counting and looking up the extents is one step: nothing can free the blocks in between.
- What loses its last pin and has no file becomes due; `Volume.free_unpinned` gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from daxfs import abi
from daxfs.core import fileops
from daxfs.core.breaking import ALL, check_hold, revoke
from daxfs.core.inode import Inode
from daxfs.core.pins import (
    PIECES_MAX,
    PIECES_PER_PIN,
    PIECES_PER_PROCESS_MAX,
    PINS_PER_OWNER_MAX,
    Holder,
    Pin,
    State,
)
from daxfs.core.volume import Volume
from daxfs.errors import (
    AccessDenied,
    BadAddress,
    BadArgument,
    IsDirectory,
    NoDevice,
    NoEntry,
    NoMemory,
    NoSuchAddress,
    NotPermitted,
    NotSupported,
    ReadOnly,
)  # fmt: skip

LEAVE_AT_ONCE = 1 << 16


def pin(vol: Volume, now: int, inode: Inode, offset: int, length: int, flags: int, owner: int, holder: Holder, *,
        writable: bool, readable: bool = True) -> Pin:  # fmt: skip
    """Pin a range of a file for an owner, or register it on demand. `writable`, `readable`: its descriptor is. Errors as
    abi.IOC_PIN says, and LayoutBusy when it has to wait behind a layout change."""
    if not inode.is_file:
        raise (IsDirectory if inode.is_dir else BadArgument)("only regular files have blocks to pin")
    _check_flags(flags)
    size = vol.block_size
    if length == 0 or offset % size or length % size:
        raise BadArgument(f"offset and length of a pin are multiples of {size}, and the length is not 0")
    write = bool(flags & abi.FOLL_WRITE)
    if not readable:
        raise AccessDenied("a pin needs a descriptor that is open for reading, as mmap(2) does")
    if write and not writable:
        raise AccessDenied("a write pin needs a descriptor that is open for writing")
    first, count = offset // size, length // size
    if first + count > -(-inode.size // size):
        raise NoSuchAddress("the range goes beyond the end of file")
    _check_longterm(vol, inode, first, count, flags, owner)
    if vol.leaving:  # the live reference of the 2021 thread
        raise NoDevice("the device is being removed: no new pins")
    _check_limits(vol, owner, holder, count)
    if vol.breaks:
        check_hold(vol, inode.ino, first, count, owner, holder, nowait=bool(flags & abi.PIN_NOWAIT))
    if write and vol.readonly:
        raise ReadOnly("the volume is mounted read-only")
    if not inode.map.written(first, count):
        if not write:
            raise BadAddress("the range has a hole, and a read pin cannot fill it")
        fileops.materialise(vol, now, inode, first, count)
    runs = inode.map.runs(first, count)
    if vol.poison:
        vol.poison.refuse_runs(runs)
    _check_pieces(vol, now, holder, len(runs))
    flags &= ~abi.PIN_NOWAIT
    taken = Pin(vol.pins.next_id(), owner, inode, inode.ino, offset, length, flags, runs, count, holder, now,
                bool(flags & abi.PIN_ON_DEMAND))  # fmt: skip
    if not vol.readonly and not flags & abi.FOLL_GET:
        taken.entries = vol.ledger.insert(now, taken.id, runs, holder.pid, flags, holder.started, inode.ino)
    vol.pins.insert(taken)
    return taken


@cache  # of flags that are right: there are few of them
def _check_flags(flags: int) -> None:
    """The kernel's rules (is_valid_gup_args in mm/gup.c), and ours for registrations on demand."""
    if flags & ~abi.PIN_FLAGS:
        raise BadArgument(f"unknown flags {flags & ~abi.PIN_FLAGS:#x}")
    if flags & abi.PIN_ON_DEMAND:
        if flags & (abi.FOLL_PIN | abi.FOLL_GET | abi.FOLL_LONGTERM):
            raise BadArgument("an on-demand registration is no pin: FOLL_PIN, FOLL_GET and FOLL_LONGTERM do not go with it")
    elif bool(flags & abi.FOLL_PIN) == bool(flags & abi.FOLL_GET):
        raise BadArgument("a pin is either FOLL_PIN or FOLL_GET")
    if flags & abi.FOLL_LONGTERM and not flags & abi.FOLL_PIN:
        raise BadArgument("FOLL_LONGTERM needs FOLL_PIN")


def _check_longterm(vol: Volume, inode: Inode, first: int, count: int, flags: int, owner: int) -> None:
    if not flags & abi.FOLL_LONGTERM or vol.settings.longterm == "allow":
        return
    if vol.settings.longterm == "deny":
        raise NotSupported("the mount denies long-term pins (longterm=deny), as Linux does on DAX")
    if not vol.leases.covers(owner, inode.ino, first, count):
        raise NotPermitted("a long-term pin needs a layout lease on its range first (longterm=lease)")


def _check_limits(vol: Volume, owner: int, holder: Holder, count: int) -> None:
    if vol.pins.owned(owner) >= PINS_PER_OWNER_MAX:
        raise NoMemory(f"this open file has {PINS_PER_OWNER_MAX} pins already")
    limit = vol.settings.pins_max
    if limit and vol.pins.charged(holder)[0] + count > limit:
        raise NoMemory(f"the process would have more than {limit} blocks pinned or busy (pins_max)")


def _check_pieces(vol: Volume, now: int, holder: Holder, runs: int) -> None:
    """Nobody shall fill the daemon's memory with pins, be it with many or with one of many runs."""
    pieces = PIECES_PER_PIN + runs
    while vol.pins.charged(holder)[1] + pieces > PIECES_PER_PROCESS_MAX or vol.pins.pieces + pieces > PIECES_MAX:
        if not vol.pins.leaving:
            raise NoMemory("the process, or all of them together, would have too many pins or pinned extents")
        vol.free_unpinned(now, LEAVE_AT_ONCE)  # released before, so it must not count


def unpin(vol: Volume, now: int, owner: int, pin_id: int, *, dirty: bool = False) -> None:
    """Give a pin back; `dirty`: the device wrote, so the file was modified (O2). NoEntry if this owner has no such pin."""
    taken = vol.pins.get(owner, pin_id)
    changeable = not (vol.readonly or vol.failed or vol.closed)
    if changeable and dirty and taken.flags & abi.FOLL_WRITE and taken.inode and not taken.inode.dead:
        taken.inode.touch_in_place(mtime=now, ctime=now)
    _release(vol, [taken])


def acknowledge(vol: Volume, owner: int, pin_id: int) -> None:
    """An on-demand holder has let go of its range (ACK). NoEntry, BadArgument (it was not told to)."""
    taken = vol.pins.get(owner, pin_id)
    if not taken.on_demand or (taken.state is State.HELD and not taken.told):
        raise BadArgument(f"pin {pin_id} has nothing to acknowledge")
    if taken.state is State.HELD:
        vol.pins.let_go(taken)
        _forget_entries(vol, [taken])
    elif taken.state is State.FENCED:
        _release(vol, [taken])  # late, but it has let go


def take_lease(vol: Volume, inode: Inode, offset: int, length: int, owner: int) -> None:
    """A layout lease on a range in bytes; length 0: all of the file, as long as it gets."""
    if not inode.is_file:
        raise BadArgument("only regular files have a layout")
    size = vol.block_size
    if offset % size or length % size:
        raise BadArgument(f"offset and length of a lease are multiples of {size}")
    vol.leases.take(owner, inode.ino, offset // size, length // size if length else ALL)


def release_lease(vol: Volume, owner: int) -> None:
    """Give back all leases of an owner. NoEntry if there are none."""
    if not vol.leases.release(owner):
        raise NoEntry("this open file has no lease")


def release_some(vol: Volume, owner: int, most: int) -> int:
    """Release at most so many pins of an owner. How many are left."""
    _release(vol, vol.pins.of_owner(owner, most))
    return vol.pins.owned(owner)


def release_owner(vol: Volume, owner: int) -> int:
    """The owner's last close: its pins, leases and events go. How many pins there were."""
    pins = vol.pins.of_owner(owner)
    _release(vol, pins)
    vol.leases.release(owner)
    vol.events.drop(owner)
    return len(pins)


def revoke_access(vol: Volume, taken: Pin) -> None:
    """Take a holder's access away, and tell it. Its blocks stay with it till its owner ends or it unpins: a raw mapping may
    still reach them. So an on-demand registration, which kept nothing so far, is fenced."""
    if taken.state is not State.HELD:
        return
    if taken.on_demand:
        vol.pins.fence(taken)
        vol.tell(taken, abi.EVENT_REVOKED)
    else:
        revoke(vol, [taken])


def let_die(vol: Volume, owner: int, pins: Iterable[Pin]) -> None:
    """All processes that have an owner are ending: its leases, and these pins of it, stand in no layout change's way any
    more. Their blocks stay with it until its last close, as what is left of a process may still reach them."""
    for taken in pins:
        if taken.state is State.HELD and taken.on_demand:
            vol.pins.fence(taken)
        elif taken.state is State.HELD:
            vol.pins.let_die(taken)
    vol.leases.release(owner)


def release_survivor(vol: Volume, survivor: Pin) -> None:
    """The holder of a pin that a dead daemon granted is gone."""
    _release(vol, [survivor])


def _release(vol: Volume, pins: list[Pin]) -> None:
    if not pins:
        return
    idle = vol.pins.remove(pins)
    _forget_entries(vol, pins)
    vol.busy_list.unpinned(idle)


def _forget_entries(vol: Volume, pins: list[Pin]) -> None:
    if not (vol.readonly or vol.closed):
        vol.ledger.void([at for one in pins for at in one.entries])
    for one in pins:
        one.entries = []
