"""The pin ABI at the daemon's end: ioctls are decoded, handed to the core, answered. `abi.py` defines every byte.

A pin belongs to the open file description that the ioctl came through, which is the session's file handle: the core's
owner. The process that pins is recorded (pid, comm, start time); who holds the pin today may be another (fork, SCM_RIGHTS),
so reports (admin.py) look for the processes that have the description.
"""

from __future__ import annotations

import errno
import json
import os
import select
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import trio

from daxfs import __version__, abi
from daxfs.core import attributes, fileops, holding
from daxfs.core.breaking import Breaker
from daxfs.core.pins import Pin
from daxfs.daemon import holders, pages, protocol, serving, session
from daxfs.daemon.admin import Admin
from daxfs.daemon.coherence import ALL, Claim
from daxfs.daemon.hca import Hca
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.service import Service, now
from daxfs.daemon.session import Request
from daxfs.daemon.twins import PAGE
from daxfs.errors import BadArgument, BadDescriptor, FsError, NoDevice, NoMemory, NotSupported, TryAgain

_ROOM = abi.PAGE_BYTES - abi.PAGE.size  # bytes of records in a page
_ARGUMENT_AT = protocol.IOCTL_IN.size
_DONE = protocol.IOCTL_OUT.pack(0, 0)
_WITHOUT_DEVICE = {abi.IOC_REPORT, abi.IOC_ADMIN, abi.IOC_NEXT_EVENT, abi.IOC_UNPIN}


class Control:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._volume = service.volume
        self._hca = Hca(service)
        self.admin = Admin(service, self.info, self._hca.counters)
        self._known = holders.Known()
        self._calls: dict[int, Callable[[OpenFile, bytes, Request], bytes | None]] = {
            abi.IOC_PIN: self._pin,
            abi.IOC_UNPIN: self._unpin,
            abi.IOC_PIN_RUNS: self._pin_runs,
            abi.IOC_EXTENTS: self._extents,
            abi.IOC_LEASE: self._lease,
            abi.IOC_NEXT_EVENT: self._next_event,
            abi.IOC_ACK: self._acknowledge,
            abi.IOC_CHANGE: self._change,
            abi.IOC_PAGES: lambda file, argument, _: pages.answer(self._volume, file, argument),
            abi.IOC_REPORT: self._report,
            abi.IOC_LABEL: self._label,
            abi.IOC_ADMIN: self.admin.act,
            abi.IOC_HCA: self._hca.call,
        }

    def ioctl(self, request: Request) -> None:
        fh, _, number, _, in_size, _ = protocol.IOCTL_IN.unpack_from(request.body)
        call = self._calls.get(number)
        if call is None:
            raise FsError("not an ioctl of daxfs", errno.ENOTTY)
        if in_size != number >> 16 & abi.IOC_SIZE_MAX:
            raise BadArgument("the ioctl carries another size than its number says")
        if self.service.gone and number not in _WITHOUT_DEVICE:
            raise NoDevice("the device is gone", self.service.gone_errno)
        argument = bytes(request.body[_ARGUMENT_AT : _ARGUMENT_AT + in_size])
        file = self.service.file(fh)
        file.used = True
        answer = call(file, argument, request)
        if answer is not None:  # else it comes later
            request.reply(_DONE + answer)

    # -- pins --

    def pin(
        self, file: OpenFile, offset: int, length: int, flags: int, task: int, uid: int, claim: Claim | None = None
    ) -> Pin:
        """`claim`: see Coherence.before_pin."""
        if session.short():
            raise NoMemory("no pins before there is memory again")
        if self.service.caching.on:
            self.service.caching.before_pin(file, flags)
        else:
            self.service.coherence.before_pin(file.inode, offset, length, flags, uid, claim)
        inode, mapped, at = file.inode, file.inode.map, now()
        blocks = mapped.blocks
        pin = holding.pin(
            self._volume, at, inode, offset, length, flags, file.fh, self._known.of(task, at),
            writable=file.writable, readable=file.readable,
        )  # fmt: skip
        if mapped.blocks != blocks:  # a write pin has filled holes
            self.service.stale(inode)
        return pin

    def unpin(self, file: OpenFile, pin_id: int, *, dirty: bool = False) -> None:
        holding.unpin(self._volume, now(), file.fh, pin_id, dirty=dirty)
        if dirty:
            self.service.stale_data(file.inode)

    def _pin(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        offset, length, flags, zero, *_ = abi.PIN.unpack(argument)
        if zero:
            raise BadArgument("the reserved field of a pin must be 0")
        pin = self.pin(file, offset, length, flags, request.pid, request.uid, request)
        return abi.PIN.pack(offset, length, flags, 0, pin.id, len(pin.runs), pin.blocks)

    def _unpin(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        pin_id, flags, zero = abi.UNPIN.unpack(argument)
        if zero or flags & ~abi.UNPIN_DIRTY:
            raise BadArgument("unknown flags of an unpin")
        self.unpin(file, pin_id, dirty=bool(flags & abi.UNPIN_DIRTY))
        return argument

    def _pin_runs(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        pin_id, first, *_ = abi.PAGE.unpack_from(argument)
        runs = self._volume.pins.get(file.fh, pin_id).runs
        page = runs[first : first + _ROOM // abi.RUN.size]
        return _page(pin_id, first, len(page), len(runs), b"".join(abi.RUN.pack(*run) for run in page))

    def _label(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        pin_id, text = abi.LABEL.unpack(argument)
        label = text.rstrip(b"\0").decode("utf-8", "replace")
        self._volume.pins.get(file.fh, pin_id).label = label
        return argument

    # -- leases, events, changes that do not wait --

    def _lease(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        offset, length, op, zero = abi.LEASE.unpack(argument)
        if zero or op not in (abi.LEASE_TAKE, abi.LEASE_RELEASE):
            raise BadArgument("a lease is taken or released")
        if op == abi.LEASE_TAKE:
            holding.take_lease(self._volume, file.inode, offset, length, file.fh)
        else:
            holding.release_lease(self._volume, file.fh)
        return argument

    def _next_event(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        found = self._volume.events.pop(file.fh)
        if found is None:
            raise TryAgain("no event is waiting")
        event, lost = found
        return abi.EVENT.pack(event.type, lost, event.pin, event.offset, event.length)

    def _acknowledge(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        pin_id, zero = abi.ACK.unpack(argument)
        if zero:
            raise BadArgument("the reserved field of an acknowledgement must be 0")
        holding.acknowledge(self._volume, file.fh, pin_id)
        return argument

    def _change(self, file: OpenFile, argument: bytes, request: Request) -> bytes | None:
        offset, length, op, flags = abi.CHANGE.unpack(argument)
        if flags & ~abi.CHANGE_NOWAIT or op not in (abi.CHANGE_TRUNCATE, abi.CHANGE_PUNCH):
            raise BadArgument("unknown change or flags")
        if not file.writable:
            raise BadDescriptor("the descriptor is not open for writing")
        if self.service.caching.on:
            raise NotSupported("with dax=never the kernel owns the size and the pages: use truncate(2) and fallocate(2)")
        overdue, coherence = self.service.waiting.overdue(request), self.service.coherence
        breaker = Breaker(file.fh, bool(flags & abi.CHANGE_NOWAIT), overdue)
        old_size = file.inode.size
        start, end = (offset, ALL * PAGE) if op == abi.CHANGE_TRUNCATE else (offset, offset + length)
        coherence.clear(request, file.inode, start, end)
        if op == abi.CHANGE_TRUNCATE:
            new = attributes.Attributes(size=offset, kill_priv=request.uid != 0, breaker=breaker)
            attributes.setattr(self._volume, now(), file.inode, new)
        else:
            mode = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
            fileops.fallocate(self._volume, now(), file.inode, mode, offset, length, breaker=breaker)
        self.service.stale(file.inode)
        dropped = coherence.changed(file.inode, old_size, start, end)
        if dropped.is_set():
            return argument
        self.service.start(self._answer_when, dropped, request, argument)
        return None

    async def _answer_when(self, dropped: trio.Event, request: Request, argument: bytes) -> None:
        await dropped.wait()
        if not request.answered:
            request.reply(_DONE + argument)

    def poll(self, request: Request) -> None:
        """A descriptor that holds pins or leases is readable (and urgent) when an event waits; any other one always is."""
        fh, kh, flags, _ = protocol.POLL_IN.unpack_from(request.body)
        self.service.file(fh).used = True
        volume = self._volume
        ready = select.POLLOUT | select.POLLWRNORM
        holder = volume.pins.owned(fh) or volume.leases.has_owner(fh)
        if volume.events.waiting(fh):
            ready |= select.POLLIN | select.POLLRDNORM | select.POLLPRI
        elif not holder:
            ready |= select.POLLIN | select.POLLRDNORM
        if self.service.gone:
            ready |= select.POLLERR | select.POLLHUP
        if flags & protocol.POLL_SCHEDULE_NOTIFY:
            self.service.pollers.setdefault(fh, set()).add(kh)
        request.reply(protocol.POLL_OUT.pack(ready))

    # -- extents --

    def _extents(self, file: OpenFile, argument: bytes, request: Request) -> bytes:
        logical, *_ = abi.PAGE.unpack_from(argument)
        if not file.inode.is_file:
            raise BadArgument("only regular files have extents to show")
        found = file.inode.map.extents_from(logical, _ROOM // abi.EXTENT.size)
        records = b"".join(abi.EXTENT.pack(*extent, 0) for extent in found)
        return _page(logical, 0, len(found), len(file.inode.map), records)

    # -- reports --

    def _report(self, file: OpenFile, argument: bytes, request: Request) -> bytes | None:
        key, first, *_ = abi.PAGE.unpack_from(argument)
        if key != abi.REPORT_INFO and not self.admin.has(key):
            raise BadArgument(f"no report {key}")
        if first == 0 and key != abi.REPORT_INFO:

            async def made() -> bytes:
                text = await self.admin.text(key)
                self.service.reports.keep(self.service.file(file.fh).fh, text)
                return _DONE + _text_page(key, 0, text)

            self.admin.later(request, made)
            return None
        if first == 0:
            self.service.reports.keep(file.fh, json.dumps(self.info()).encode())
        return _text_page(key, first, self.service.reports.text(file.fh))

    def info(self) -> dict[str, Any]:
        volume = self._volume
        return {
            **volume.facts(),
            "image_id": list(volume.pmem.file_id),
            "mount": self.service.mountpoint,
            "dax": "never" if self.service.caching.on else "always",
            "coherence": self.service.coherence.facts(),
            "settings": asdict(volume.settings),
            "pid": os.getpid(),
            "readonly": volume.readonly,
            "failed": volume.failed,
            "abi": abi.ABI_VERSION,
            "version": __version__,
            "device": self.admin.removal.state,
            "requests": {**session.counters(), "late": serving.late},
        }


def _text_page(key: int, first: int, text: bytes) -> bytes:
    page = text[first : first + _ROOM]
    return _page(key, first, len(page), len(text), page)


def _page(key: int, first: int, count: int, total: int, records: bytes) -> bytes:
    return (abi.PAGE.pack(key, first, count, total) + records).ljust(abi.PAGE_BYTES, b"\0")
