"""Taking the device away from under its mount, in order (the 2021 thread): `daxfs device remove`.

States: live -> removing (no new pins: `volume.leaving` is the live reference that every PIN looks at; holders were told;
everything else goes on) -> removed. In between the pins that are left when the time is over are revoked, the kernel's
pages of all open files are dropped (the unmap-all of that thread: whoever still has a file mapped faults, and finds no
device), and the image is closed cleanly. From then on the door is shut (`Service.gone`): every call answers ENODEV, but
for those that let people look at the mount's root and at the state of the device, and for UNPIN and NEXT_EVENT. The
daemon lives on, without the image, until the mount is taken away.

Blocks that a revoked holder may still have mapped stay in the ledger: the next mount keeps them busy till it is gone.
"""

from __future__ import annotations

import errno
import logging
import time
from typing import TYPE_CHECKING

import trio

from daxfs import abi
from daxfs.core import holding
from daxfs.core.events import Event
from daxfs.core.layout import ROOT_INO
from daxfs.core.pins import State
from daxfs.daemon import protocol, session
from daxfs.daemon.service import OpenFile, Service, Turns, now
from daxfs.daemon.session import Request

if TYPE_CHECKING:
    from daxfs.core.inode import Inode

log = logging.getLogger("daxfs")

_LOOK_S = 0.02  # between two looks at whether all pins are gone


class Removal:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._volume = service.volume
        self._end = float("inf")
        self.spared: set[Request] = set()  # calls that are being answered, with or without the device: reports, admin's
        self._root: dict[int, bytes] = {}  # what GETATTR and STATX of the root answer when the image is closed

    @property
    def state(self) -> str:
        return "removed" if self._service.gone else "removing" if self._volume.leaving else "live"

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
            self._volume.leaving = True
            for owner in pins.owner_list():
                self._volume.events.push(owner, Event(abi.EVENT_DEVICE_REMOVE, 0, 0, 0))
            for ino in list(self._volume.breaks):
                self._service.moved(ino)  # pins that wait behind a layout change are refused
            self._service.start(self._run)

    async def _run(self) -> None:
        volume = self._volume
        while volume.pins.owners and time.monotonic() < self._end:  # noqa: ASYNC110 - an unpin is cheap, and stays so
            await trio.sleep(_LOOK_S)
        await self._revoke()
        await self._drop_pages()
        self._detach()
        await self._drop_pages()  # whoever mapped something anew meanwhile
        for inode in self._known():
            session.inval_inode(inode.ino, -1)

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
                await trio.to_thread.run_sync(session.inval_inode, inode.ino)

    def _known(self) -> list[Inode]:
        return self._volume.in_memory()

    def _detach(self) -> None:
        """The last moment of the device: everything that waits is answered, the image is closed cleanly."""
        service, volume = self._service, self._volume
        root = volume.root
        self._root = {
            protocol.GETATTR: protocol.attr_out(root, volume.block_size),
            protocol.STATX: protocol.statx_out(root, volume.block_size),
        }
        service.gone = True
        for request in session.waiting():
            if request in self.spared:
                continue
            stop = request.on_interrupt
            request.error(errno.ENODEV)
            if stop is not None:
                stop()
        volume.close(now())
        for fh in list(service.pollers):
            service.wake_pollers(fh)
        log.info("the device is removed: %s is closed", volume.pmem.path)

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
            request.error(errno.ENODEV)
