"""Holders that are dying let go: a killed process can hang in the kernel for as long as a layout change waits for its pins,
with its descriptors open.

The kernel writes the dirty pages of a mapping back before a process gives its memory up (fuse_vma_close), and only then
closes its descriptors. While a truncate is being answered it holds write-back back (fuse_set_nowrite): the truncate waits
for the pin, the pin for the close, the close for the write-back, and that for the truncate. So a close is not waited for:
while a layout change waits, this looks at who has the descriptions with pins and leases of its file. When all of them are
dying, the pins are too, and stand in nobody's way. Their blocks are busy, and are given to nobody, until the last close.

Rules
- Nothing is looked at while no layout change waits.
- A look is a thread's work and at most 1/20 of its time: where processes and descriptors are many, looks are rare.
- In doubt a holder lives (holders.py): then the change waits on, as long as its policy says.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from daxfs.core import holding
from daxfs.daemon import holders
from daxfs.daemon.holders import Description
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.threads import in_thread
from daxfs.errors import NoMemory

if TYPE_CHECKING:
    from daxfs.daemon.service import Service

log = logging.getLogger("daxfs")

LOOK_S = 0.3  # between two looks, at least
_SHARE = 20  # a look may take this part of the time
_TAKERS = 64  # pins of a description, the newest, of which it is known who took them
_AT_ONCE = 256  # pins between two looks at the mount


class Dying:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._watching = False
        self._limiter = trio.CapacityLimiter(1)  # a thread of its own: others can hang until the change is through

    def watch(self) -> None:
        """A layout change waits."""
        if not self._watching:
            self._watching = True
            self._service.start(self._watch)

    async def _watch(self) -> None:
        service, pause = self._service, LOOK_S
        try:
            while service.volume.breaks and not service.gone:
                await trio.sleep(pause)
                began = time.monotonic()
                files, candidates = self._in_the_way()
                if candidates:
                    for fh in await self._dying(files):
                        if fh in candidates:
                            await self._let_die(candidates[fh])
                pause = max(LOOK_S, _SHARE * (time.monotonic() - began))
        finally:
            self._watching = False

    def _in_the_way(self) -> tuple[list[Description], dict[int, OpenFile]]:
        """The descriptions of files whose layout is to change, and those of them that have pins or leases, by handle."""
        volume = self._service.volume
        files: list[Description] = []
        candidates: dict[int, OpenFile] = {}
        for ino in volume.breaks:
            opened = self._service.opened.get(ino, {})
            holding_ = {fh: f for fh, f in opened.items() if volume.pins.owned(fh) or volume.leases.has_owner(fh)}
            candidates |= holding_
            for fh, file in opened.items() if holding_ else ():
                takers = {pin.holder.pid for pin in volume.pins.of_owner(fh, _TAKERS)}
                files.append(Description(fh, ino, file.flags & os.O_ACCMODE, {file.task, *takers}))
        return files, candidates

    async def _dying(self, files: list[Description]) -> set[int]:
        service = self._service
        look = partial(holders.dying, files, service.device, service.mount_id)
        try:
            return await in_thread(look, limiter=self._limiter)
        except NoMemory as e:
            log.error("%s: whether holders are dying is not known now", e.why)
            return set()

    async def _let_die(self, file: OpenFile) -> None:
        """A handle that was closed meanwhile may be another description's by now."""
        service = self._service
        owner, ino = file.fh, file.inode.ino
        pins = service.volume.pins.of_owner(owner) if self._is_open(file) else []
        for at in range(0, max(1, len(pins)), _AT_ONCE):
            if service.gone or not self._is_open(file):
                return
            holding.let_die(service.volume, owner, pins[at : at + _AT_ONCE])
            await trio.lowlevel.checkpoint()
        log.info("all holders of an open file of inode %d are dying: %d pins stand in no way any more", ino, len(pins))

    def _is_open(self, file: OpenFile) -> bool:
        return self._service.opened.get(file.inode.ino, {}).get(file.fh) is file
