"""Taking the device away from under its mount, in order (the 2021 thread): `daxfs device remove`.

States: live -> removing (no new pins: `volume.leaving` is the live reference that every PIN looks at; holders were told;
everything else goes on) -> removed. In between the pins that are left when the time is over are revoked, the kernel's
pages of all open files are dropped (the unmap-all of that thread: whoever still has a file mapped faults, and finds no
device), and the image is closed cleanly. From then on the door is shut (`Service.gone`): every call answers ENODEV, but
for those that let people look at the mount's root and at the state of the device, and for UNPIN and NEXT_EVENT. The
daemon lives on, without the image, until the mount is taken away.

Blocks that a revoked holder may still have mapped stay in the ledger: the next mount keeps them busy till it is gone.

Lost: the image was truncated under the mount (lostpages.h). The same door is shut at once and for good, but what is behind
it failed instead of leaving: calls answer EIO. A page that the host could not give (its disk is full) costs less: the
volume is read-only from then on, and the block is poisoned.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from typing import TYPE_CHECKING

import trio

from daxfs import abi
from daxfs.core import holding, poison
from daxfs.core.events import Event
from daxfs.core.layout import ROOT_INO
from daxfs.core.pins import State
from daxfs.daemon import protocol, requests, session
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.service import Service, Turns, now
from daxfs.daemon.session import Request
from daxfs.daemon.threads import in_thread
from daxfs.errors import Corrupt, FsError

if TYPE_CHECKING:
    from daxfs.core.inode import Inode

log = logging.getLogger("daxfs")

_LOOK_S = 0.02  # between two looks at whether all pins are gone
_WATCH_S = 1.0  # between two looks at the size of the image


class Removal:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._volume = service.volume
        self._end = float("inf")
        self.spared: set[Request] = set()  # calls that are being answered, with or without the device: reports, admin's
        self._root: dict[int, bytes] = {}  # what GETATTR and STATX of the root answer when the image is closed

    @property
    def state(self) -> str:
        if self._service.gone:
            return "removed" if self._service.gone_errno == errno.ENODEV else "lost"
        return "removing" if self._volume.leaving else "live"

    @property
    def left_s(self) -> float | None:
        """What the holders still have, if there is a limit."""
        if self.state != "removing" or self._end == float("inf"):
            return None
        return max(0.0, self._end - time.monotonic())

    def begin(self, drain_s: float, *, force: bool) -> None:
        """No new pins from now on; those that there are have `drain_s` to go, or no time at all. Again: less time."""
        self._end = min(self._end, time.monotonic() + (0 if force else drain_s))
        if self.state == "live":
            pins = self._volume.pins
            log.info("the device is being removed: %d open files hold %d pins", pins.owners, len(pins))
            self._volume.leave()  # pins that wait behind a layout change are refused
            for owner in pins.owner_list():
                self._volume.events.push(owner, Event(abi.EVENT_DEVICE_REMOVE, 0, 0, 0))
            self._service.start(self._run)

    async def _run(self) -> None:
        volume = self._volume
        while volume.pins.owners and time.monotonic() < self._end:  # noqa: ASYNC110 - an unpin is cheap, and stays so
            await trio.sleep(_LOOK_S)
        await self._revoke()
        await self._drop_pages()
        if self._service.gone:  # lost meanwhile
            return
        self._detach()
        await self._forget_all()  # also what somebody mapped anew meanwhile

    async def _revoke(self) -> None:
        left, turns = [pin for pin in self._volume.pins if pin.owner is not None], Turns()
        for pin in left:
            if self._volume.pins.has(pin) and pin.state is State.HELD:
                holding.revoke_access(self._volume, pin)
            await turns.pause()
        if left:
            log.warning("%d pins were not given back in time: revoked", len(left))

    async def _drop_pages(self) -> None:
        """Nobody shall go on with pages of the kernel. This can wait for dirty ones to be written, so a thread does it."""
        for inode in self._known():
            if inode.opens and inode.is_file:
                await in_thread(session.inval_inode, inode.ino)

    def _known(self) -> list[Inode]:
        return self._volume.in_memory()

    def _detach(self) -> None:
        """The last moment of the device: everything that waits is answered, the image is closed cleanly."""
        service, volume = self._service, self._volume
        root = volume.root
        self._root = {
            protocol.GETATTR: requests.attr_out(root),
            protocol.STATX: protocol.statx_out(root, volume.block_size),
        }
        service.gone = True
        for request in session.waiting():
            if request in self.spared:
                continue
            stop = request.on_interrupt
            request.error(service.gone_errno)
            if stop is not None:
                stop()
        volume.close(now())
        session.unguard()
        for fh in list(service.pollers):
            service.wake_pollers(fh)
        log.info("the device is %s: %s is closed", self.state, volume.pmem.path)

    # -- a device that fails --

    @staticmethod
    def check() -> None:
        """Corrupt if the image has lost pages since it was opened."""
        if session.lost():
            raise Corrupt("pages of the image are gone")

    async def watch(self) -> None:
        """An image can shrink without anybody touching what is gone."""
        while not self._service.gone:
            await trio.sleep(_WATCH_S)
            if not self._service.gone:
                session.look()

    def lost(self, first: int, end: int, truncated: bool) -> None:
        """Bytes [first, end) of the image are no longer there (session.guard)."""
        service, volume = self._service, self._volume
        if service.gone:
            return
        if not truncated:
            log.critical("the host could not give bytes %d to %d of %s: its disk is full, or fails; the volume is read-only"
                         " from now on", first, end, volume.pmem.path)  # fmt: skip
            volume.fail("the host's disk is full, or fails")
            with contextlib.suppress(FsError):  # damaged elsewhere, too
                poison.inject(volume, first // volume.block_size, 1)
            return
        size = os.fstat(volume.pmem.fileno()).st_size
        log.critical("%s was truncated to %d bytes of %d under the mount: every call fails with EIO from now on; unmount it,"
                     " and restore the image from a copy", volume.pmem.path, size, volume.pmem.size)  # fmt: skip
        volume.fail("the image was truncated under the mount")
        for owner in volume.pins.owner_list():
            volume.events.push(owner, Event(abi.EVENT_DEVICE_REMOVE, 0, 0, 0))
        service.gone_errno = errno.EIO
        self._detach()
        service.start(self._forget_all)

    async def _forget_all(self) -> None:
        await self._drop_pages()
        for inode in self._known():
            session.inval_inode(inode.ino, -1)

    # -- the shut door --

    def answer(self, request: Request) -> None:
        """What a call gets when the device is gone. Looking at the root, and asking for the device's state, still work."""
        service = self._service
        if request.opcode in (protocol.RELEASE, protocol.RELEASEDIR):
            (fh,) = protocol.RELEASE_IN.unpack_from(request.body)
            service.forget_handle(fh)
            request.reply()
        elif request.nodeid == ROOT_INO and request.opcode in self._root:
            request.reply(self._root[request.opcode])
        elif request.nodeid == ROOT_INO and request.opcode == protocol.OPENDIR:
            file = OpenFile(self._volume.root, 0)
            file.fh = session.attach(keep=file)
            request.reply(protocol.OPEN_OUT.pack(file.fh, 0))
        else:
            request.error(service.gone_errno)
