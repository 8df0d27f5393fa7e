"""Memory regions of the simulated HCA: keys, what a key lets whom reach, and the copying between regions.

A region stands on a pin (FOLL_PIN|FOLL_LONGTERM) of a file, or on an on-demand registration of it, and ends with the pin.
Addresses (iova) are made at registration; a transfer turns them into bytes of the image through the pin's runs, never
through the file's map: after a truncate the device goes on in the blocks that it has pinned.

Rules
- Key, protection domain, access, bounds and the state of the pin are looked at for every piece that is moved
  (`Table.check`). A pin that was revoked, fenced or given back lets nothing through: nobody reaches the next owner's bytes.
- On demand: when the file system takes the blocks it calls `_let_go`, at once and without waiting, as Linux calls an MMU
  notifier. The next transfer faults the range in again from the file as it is then, or is refused if it is not there.
  LayoutBusy passes through: a layout change is under way, and the fault has to come again.
- Poisoned blocks are refused, to read and to write.
- All is synchronous. Bytes move in runs, never block by block.

Not here: queues, completions and time (queues.py), handles and calls (hca.py).
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from daxfs import abi
from daxfs.abi_hca import Access
from daxfs.core import holding
from daxfs.core.pins import Pin, State
from daxfs.core.waiting import LayoutBusy
from daxfs.daemon.coherence import Granting
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.service import Service, now
from daxfs.errors import BadArgument, Busy, FsError, NoEntry, Poisoned

Piece = tuple[int, int]  # byte address on the image, bytes
_WRITES = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC)
_ON_DEMAND = int(Access.ON_DEMAND)


class Refused(Exception):
    """A transfer that a key does not allow."""


@dataclass(eq=False, slots=True)
class Region:
    """`offset` and `length`: bytes of the file. `key` is lkey and rkey in one."""

    domain: object
    key: int
    access: int
    file: OpenFile
    offset: int
    length: int
    iova: int
    pin: Pin | None
    written: bool = False  # by the device, since it was registered
    firsts: list[int] = field(default_factory=list)  # for each run of the pin: how many blocks of it come before
    handle: int = 0
    claim: Granting | None = None  # while a fault waits

    @property
    def on_demand(self) -> bool:
        return bool(self.access & _ON_DEMAND)

    def use(self, pin: Pin) -> None:
        self.pin = pin
        self.firsts = list(accumulate((count for _, count in pin.runs), initial=0))

    def pieces(self, offset: int, length: int, block: int) -> Iterator[Piece]:
        """Where a range of bytes of the file is, as the pin has it. The pin covers it."""
        assert self.pin is not None
        at = offset - self.pin.offset
        index = bisect_right(self.firsts, at // block) - 1
        while length:
            start, count = self.pin.runs[index]
            within = at - self.firsts[index] * block
            n = min(length, count * block - within)
            yield start * block + within, n
            at, length, index = at + n, length - n, index + 1


class Table:
    """All regions of the HCA, by key."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._volume = service.volume
        self._keys: dict[int, Region] = {}
        self._pins: dict[int, Region] = {}
        self._files: dict[int, set[Region]] = {}  # by file handle

    def __len__(self) -> int:
        return len(self._keys)

    # -- life --

    def register(self, domain: object, file: OpenFile, access: int, pin_id: int, start: int, length: int, iova: int
                 ) -> Region:  # fmt: skip
        """A region on a pin of an open file. BadArgument, NoEntry (no such pin here), Busy (another region has it)."""
        pin = self._volume.pins.get(file.fh, pin_id)
        if access & (Access.REMOTE_WRITE | Access.REMOTE_ATOMIC) and not access & Access.LOCAL_WRITE:
            raise BadArgument("remote write and atomic access need local write access, as in verbs")
        if access & Access.LOCAL_WRITE and not pin.flags & abi.FOLL_WRITE:
            raise BadArgument("a region with write access needs a write pin")
        if bool(access & Access.ON_DEMAND) != pin.on_demand:
            raise BadArgument("a region on demand stands on a registration on demand, any other one on a pin")
        if not pin.on_demand and not pin.flags & abi.FOLL_LONGTERM:
            raise BadArgument("a region needs a long-term pin (FOLL_PIN|FOLL_LONGTERM)")
        if not length or start + length > pin.length or iova + length > 1 << 64:
            raise BadArgument("the region is not within its pin, or its addresses are not")
        offset = pin.offset + start
        if (iova - offset) % self._volume.block_size:
            raise BadArgument("the address of a region and its offset in the file must be the same within a block")
        if pin_id in self._pins:
            raise Busy(f"pin {pin_id} has a region already")
        region = Region(domain, self._new_key(), access, file, offset, length, iova, None)
        self._keys[region.key] = region
        self._files.setdefault(file.fh, set()).add(region)
        self._stand_on(region, pin)
        return region

    def _new_key(self) -> int:
        while (key := secrets.randbits(32)) in self._keys or not key:
            pass
        return key

    def _stand_on(self, region: Region, pin: Pin) -> None:
        region.use(pin)
        self._pins[pin.id] = region
        if region.on_demand:
            pin.notifier = self._let_go

    def deregister(self, region: Region) -> None:
        """The key means nothing any more, and the pin is given back."""
        del self._keys[region.key]
        mine = self._files[region.file.fh]
        mine.remove(region)
        if not mine:
            del self._files[region.file.fh]
        self._give_back(region)

    def file_closed(self, fh: int) -> None:
        """The descriptor that the pins came through is gone, and they with it: their regions stay, dead."""
        for region in self._files.get(fh, set()):
            self._give_back(region)

    def _give_back(self, region: Region) -> None:
        pin, region.pin = region.pin, None
        if pin is None:
            return
        del self._pins[pin.id]
        pin.notifier = None
        try:
            holding.unpin(self._volume, now(), region.file.fh, pin.id, dirty=region.written)
        except NoEntry:  # the holder, or an admin, was first
            return
        if region.written:
            self._service.stale_data(region.file.inode)
            region.written = False

    # -- transfers --

    def check(self, domain: object, key: int, address: int, length: int, need: int) -> tuple[Region, int]:
        """The region of a key and the offset in its file, if all of an address range may be reached now. Refused,
        LayoutBusy."""
        region = self._keys.get(key)
        if region is None or region.domain is not domain:
            raise Refused("no such key in this protection domain")
        if need & ~region.access:
            raise Refused("the region does not allow this")
        return region, self._settled(region, address - region.iova, length, need)

    def reach(self, domain: object, key: int, address: int, length: int, need: int) -> list[Piece]:
        """Where the bytes of an address range are on the image now. Refused, LayoutBusy."""
        region, offset = self.check(domain, key, address, length, need)
        return self._sound(region, offset, length)

    def inside(self, region: Region, offset: int, length: int, need: int) -> list[Piece]:
        """The same for the region's owner, by offset within it."""
        if need & ~region.access:
            raise Refused("the region does not allow this")
        return self._sound(region, self._settled(region, offset, length, need), length)

    def _sound(self, region: Region, offset: int, length: int) -> list[Piece]:
        """Where the bytes are, if the medium has not failed there."""
        pieces = list(region.pieces(offset, length, self._volume.block_size))
        if self._volume.poison:
            try:
                for piece in pieces:
                    self._volume.poison.refuse(*piece)
            except Poisoned as e:
                raise Refused(e.why) from None
        return pieces

    def _settled(self, region: Region, offset: int, length: int, need: int) -> int:
        """The offset in the file, of a range that is within bounds and has blocks that are held."""
        if offset < 0 or offset + length > region.length:
            raise Refused("out of the region's bounds")
        if need & _WRITES and self._volume.failed:
            raise Refused("the volume refuses changes")
        offset += region.offset
        if not self._stands(region, offset, length):
            self._fault(region, offset, length)
        return offset

    def _stands(self, region: Region, offset: int, length: int) -> bool:
        """Whether the pin below is in force, and covers the range."""
        pin = region.pin
        if pin is None or pin.state is not State.HELD or not self._volume.pins.has(pin):
            return False
        return pin.offset <= offset and offset + length <= pin.offset + pin.length

    def _let_go(self, pin: Pin) -> None:
        """The file system takes blocks below a region on demand. The device has nothing in flight there: a transfer moves
        its bytes in one go, or in pieces that each look first."""
        holding.acknowledge(self._volume, pin.owner or 0, pin.id)

    def _fault(self, region: Region, offset: int, length: int) -> None:
        """Take an on-demand region's blocks from the file as it is now: all of it, or if that is not there any more, what is
        asked for."""
        old = region.pin
        if not region.on_demand or old is None or old.state not in (State.HELD, State.INVALID):
            raise Refused("the region's pin is gone or was revoked")
        if not self._volume.pins.has(old):
            raise Refused("the region's registration was given back")
        size = self._volume.block_size
        first, end = region.offset // size * size, -(-(region.offset + region.length) // size) * size
        try:
            new = self._register_again(region, old, first, end)
        except LayoutBusy:
            raise
        except FsError:
            try:
                new = self._register_again(region, old, offset // size * size, -(-(offset + length) // size) * size)
            except LayoutBusy:
                raise
            except FsError as e:
                raise Refused(f"the range is not there any more: {e.why}") from None
        self._give_back(region)
        self._stand_on(region, new)

    def _register_again(self, region: Region, old: Pin, first: int, end: int) -> Pin:
        """A new pin of the blocks that a range has now. LayoutBusy leaves its claim on the kernel's pages in force."""
        claim = region.claim = region.claim or Granting()
        try:
            new = self._pin(region.file, old, first, end - first, claim)
        except LayoutBusy:
            raise
        except FsError:
            self._end_claim(region)
            raise
        self._end_claim(region)
        return new

    def _end_claim(self, region: Region) -> None:
        assert region.claim is not None
        region.claim.answered = True
        self._service.coherence.claim_ended(region.claim)
        region.claim = None

    def _pin(self, file: OpenFile, old: Pin, offset: int, length: int, claim: Granting) -> Pin:
        inode = file.inode
        self._service.coherence.before_pin(inode, offset, length, old.flags, inode.uid, claim)
        blocks = inode.map.blocks
        new = holding.pin(
            self._volume, now(), inode, offset, length, old.flags, file.fh, old.holder, writable=file.writable
        )
        if inode.map.blocks != blocks:  # it has filled holes
            self._service.stale(inode)
        return new

    def wrote(self, domain: object, key: int) -> None:
        """A transfer has put bytes below a key."""
        region = self._keys.get(key)
        if region is not None and region.domain is domain:
            region.written = True

    def copy(self, sources: list[Piece], targets: list[Piece]) -> None:
        """Move bytes on the image: two lists of pieces of the same length in all."""
        pmem = self._volume.pmem
        left = iter(targets)
        to, room = next(left, (0, 0))
        for at, n in sources:
            while n:
                if not room:
                    to, room = next(left)
                take = min(n, room)
                pmem.copy(at, to, take)
                pmem.flush(to, take)
                at, n, to, room = at + take, n - take, to + take, room - take
        pmem.fence()

    def load(self, pieces: list[Piece]) -> bytes:
        return b"".join(self._volume.pmem.load(at, n) for at, n in pieces)

    def store(self, pieces: list[Piece], data: bytes) -> None:
        pmem, done = self._volume.pmem, 0
        for at, n in pieces:
            pmem.store(at, data[done : done + n])
            pmem.flush(at, n)
            done += n
        pmem.fence()
