"""What an admin sees and may do: reports of pins, busy extents, the device; IOC_ADMIN.

Reports are made when they are asked for, in turns with other requests, and at most `LISTED_MAX` entries long, so that a
holder of a million pins cannot stop the mount by being looked at; `status` says how many there are. Whatever needs /proc is
looked up once per report, in a thread. The text of a report is JSON.

Rules
- Acting is for root and for whoever mounted (EPERM); looking is for everybody who may open the root.
- Releasing a pin takes its access away and tells its holder. Its blocks stay with it until its descriptor is closed: a raw
  mapping cannot be taken back. Only a survivor, whose descriptor died with an earlier daemon, can be released for good.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import Any

from daxfs import abi
from daxfs.core import holding, poison
from daxfs.core.alloc import Run
from daxfs.core.pins import Holder, Pin
from daxfs.daemon import holders, protocol, session, survivors
from daxfs.daemon.holders import Description
from daxfs.daemon.removal import Removal
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.service import Service, Turns, now
from daxfs.daemon.session import Request
from daxfs.daemon.threads import in_thread
from daxfs.errors import BadArgument, Busy, FsError, NoDevice, NoMemory, NotPermitted

log = logging.getLogger("daxfs")

LISTED_MAX = 10_000  # entries of a list
RUNS_MAX = 256  # runs that a pin is listed with
RUNS_LISTED_MAX = 100_000  # by all pins of a list together
_FLAGS = {"FOLL_PIN", "FOLL_GET", "FOLL_WRITE", "FOLL_LONGTERM", "PIN_ON_DEMAND"}
_FLAG_NAMES = {getattr(abi, name): name for name in sorted(_FLAGS)}

Report = dict[str, Any] | list[dict[str, Any]]


class Admin:
    """`info` makes the facts about the volume, `hca` those about the simulated HCA."""

    def __init__(
        self, service: Service, info: Callable[[], dict[str, Any]], hca: Callable[[], dict[str, int]]
    ) -> None:
        self.service = service
        self.removal = Removal(service)
        self._volume = service.volume
        self._info = info
        self._hca = hca
        self._reports: dict[int, Callable[[], Awaitable[Report]]] = {
            abi.REPORT_PINS: self.pins,
            abi.REPORT_BUSY: self.busy,
            abi.REPORT_STATUS: self.status,
            abi.REPORT_DEVICE: self.device,
        }
        self._verbs: dict[int, Callable[[int, int, int], Awaitable[tuple[int, int]]]] = {
            abi.ADMIN_RELEASE_PIN: self._release_pin,
            abi.ADMIN_REAP_BUSY: self._reap_busy,
            abi.ADMIN_DEVICE_REMOVE: self._remove_device,
            abi.ADMIN_POISON: self._poison,
            abi.ADMIN_CLEAR_POISON: self._clear_poison,
        }

    # -- asking --

    def has(self, report: int) -> bool:
        return report in self._reports

    async def text(self, report: int) -> bytes:
        """A report as JSON, a list with one entry per line. NoDevice when there is nothing to report on any more."""
        try:
            return await self._text(report)
        except MemoryError:  # of a long report; making one changes nothing
            raise NoMemory("not enough memory for the report") from None

    async def _text(self, report: int) -> bytes:
        found = await self._reports[report]()
        if isinstance(found, dict):
            return json.dumps(found, indent=2).encode() + b"\n"
        lines, turns = [], Turns()
        for entry in found:
            lines.append(json.dumps(entry))
            await turns.pause()
        return f"[{(',' + chr(10)).join(lines)}]\n".encode()

    def later(self, request: Request, work: Callable[[], Awaitable[bytes]]) -> None:
        """Answer a request when the work is done."""

        async def task() -> None:
            try:
                answer = await work()
            except FsError as e:
                answer, code = b"", e.errno
            except Exception:
                request.error(errno.EIO)
                raise
            else:
                code = 0
            finally:
                self.removal.spared.discard(request)
            if code:
                request.error(code)
            else:
                request.reply(answer)

        self.removal.spared.add(request)
        self.service.start(task)

    def act(self, file: OpenFile, argument: bytes, request: Request) -> None:
        """IOC_ADMIN."""
        op, flags, a, b = abi.ADMIN.unpack(argument)
        if request.uid not in (0, os.getuid()):
            raise NotPermitted("only root and the user who mounted may do this")
        if op not in self._verbs or flags & ~abi.ADMIN_FORCE:
            raise BadArgument(f"no admin call {op} with flags {flags:#x}")
        if self.service.gone and op != abi.ADMIN_DEVICE_REMOVE:
            raise NoDevice("the device is gone", self.service.gone_errno)

        async def work() -> bytes:
            done = abi.ADMIN.pack(op, flags, *await self._verbs[op](flags, a, b))
            return protocol.IOCTL_OUT.pack(0, 0) + done

        self.later(request, work)

    # -- pins --

    async def pins(self) -> list[dict[str, Any]]:
        chosen = list(islice(self._live().pins.all(), LISTED_MAX))
        return await self._described(chosen)

    async def _described(self, pins: list[Pin]) -> list[dict[str, Any]]:
        found = await self._holders(pins)
        entries, turns, at, room = [], Turns(), now(), RUNS_LISTED_MAX
        for pin in pins:
            await turns.pause()
            self._live()
            runs = pin.runs[: min(room, RUNS_MAX)]
            room -= len(runs)
            entries.append(self._describe(pin, found.get(pin.owner or 0, []), at, runs))
        return entries

    async def _holders(self, pins: Iterable[Pin]) -> dict[int, list[Holder]]:
        """The processes that hold pins, by owner."""
        service = self.service
        wanted: dict[int, Description] = {}
        for pin in pins:
            for fh, file in service.opened.get(pin.ino, {}).items() if pin.owner is not None else ():
                if fh not in wanted:
                    wanted[fh] = Description(fh, pin.ino, file.flags & os.O_ACCMODE, {file.task})
            if pin.owner in wanted:
                wanted[pin.owner].known.add(pin.holder.pid)
        return await in_thread(
            holders.of_descriptions, list(wanted.values()), service.device, service.mount_id
        )

    def _describe(self, pin: Pin, found: list[Holder], at: int, runs: list[Run]) -> dict[str, Any]:
        taker = pin.holder
        if not found and holders.alive(taker):
            found = [holders.of(taker.pid)]
        first = next((holder for holder in found if holder.pid == taker.pid), found[0] if found else taker)
        return {
            "id": pin.id,
            "pid": first.pid,
            "comm": first.comm,
            "holders": [{"pid": holder.pid, "comm": holder.comm} for holder in found],
            "ino": pin.ino,
            "path": self.service.path(pin.inode) if pin.inode else f"(inode {pin.ino})",
            "offset": pin.offset,
            "length": pin.length,
            "mode": "write" if pin.flags & abi.FOLL_WRITE else "read",
            "flags": "|".join(name for flag, name in _FLAG_NAMES.items() if pin.flags & flag),
            "state": "survivor" if pin.owner is None else str(pin.state),
            "label": pin.label,
            "age_s": round(max(0, at - pin.taken) / 1e9, 3),
            "blocks": pin.blocks,
            "withheld": self._withheld(pin) * self._volume.block_size,
            "runs": [list(run) for run in runs],
        }

    def _withheld(self, pin: Pin) -> int:
        """Blocks that would be free but for this pin (and others that cover them)."""
        if not pin.counted:
            return 0
        if pin.inode is not None and not pin.inode.nlink:
            return pin.blocks
        busy = self._volume.busy_list
        return sum(count for run in pin.runs for _, count in busy.search(*run)) if busy.blocks else 0

    # -- busy extents --

    async def busy(self) -> list[dict[str, Any]]:
        """Busy extents, each with the pins that keep it and where it came from; neighbours with other pins are extents of
        their own."""
        keepers, entries, turns, room = [], [], Turns(), RUNS_LISTED_MAX
        for pin in list(self._live().pins.all()):
            if self._withheld(pin):
                keepers.append(pin)
                room -= len(pin.runs)
            if room <= 0 or len(keepers) == LISTED_MAX:
                break
            await turns.pause()
        described = {entry["id"]: entry for entry in await self._described(keepers)}
        for piece in islice(_pieces(self._live().busy_runs(), keepers), LISTED_MAX):
            entries.append(self._busy_entry(*piece, described))
            await turns.pause()
        return entries

    def _busy_entry(self, start: int, count: int, ids: list[int], described: dict[int, dict[str, Any]]) -> dict[str, Any]:
        pins = [described[pin_id] for pin_id in ids]
        found = {holder["pid"]: holder for pin in pins for holder in pin["holders"]}
        return {
            "start": start,
            "count": count,
            "bytes": count * self._volume.block_size,
            "pins": ids,
            "holders": list(found.values()),
            "ino": pins[0]["ino"] if pins else 0,
            "path": pins[0]["path"] if pins else "",
            "mode": "write" if any(pin["mode"] == "write" for pin in pins) else "read",
            "age_s": max((pin["age_s"] for pin in pins), default=0),
        }

    # -- the whole --

    async def status(self) -> dict[str, Any]:
        volume, service = self._volume, self.service
        return {
            **self._info(),
            "pins": len(volume.pins),
            "holders": volume.pins.owners,
            "busy_extents": len(volume.busy_list.extents),
            "due": volume.busy_list.due.blocks,
            "waiting": len(service.waiting),
            "poisoned": volume.poison.blocks.blocks,
            "retired": volume.poison.retired.blocks,
            "leases": len(volume.leases),
            "hca": self._hca(),
        }

    async def device(self) -> dict[str, Any]:
        volume, info = self._volume, self._info()
        left = self.removal.left_s
        return {
            "state": self.removal.state,
            "image": info["image"],
            "mount": info["mount"],
            "uuid": info["uuid"],
            "mounts": volume.sb["mounts"],
            "dirty_shutdowns": volume.sb["dirty_shutdowns"],
            "last_shutdown": volume.last_shutdown,
            "readonly": volume.readonly or bool(volume.failed),
            "failed": volume.failed,
            "holders": volume.pins.owners,
            "pins": len(volume.pins),
            "left_s": None if left is None else round(left, 3),
            "retired": volume.poison.retired.blocks,
            "poison": [self._bad(run) for run in volume.poison.blocks.runs(0, LISTED_MAX)],
        }

    def _bad(self, run: Run) -> dict[str, Any]:
        """A poisoned run, and who has its first block."""
        start, count = run
        volume = self._volume
        for what, runs in (("metadata", volume.poison.metadata), ("retired", volume.poison.retired),
                           ("busy", volume.busy_list.extents)):  # fmt: skip
            if runs.within(start, 1):
                return {"start": start, "count": count, "owner": what}
        return {"start": start, "count": count, "owner": "file"}

    def _live(self) -> Any:
        if self.service.gone:
            raise NoDevice("the device is gone", self.service.gone_errno)
        return self._volume

    # -- acting; each returns what `a` and `b` of the answer are --

    async def _release_pin(self, flags: int, pin_id: int, _: int) -> tuple[int, int]:
        """(1 if it is gone for good, blocks that it still keeps)."""
        pin = self._volume.pins.any_id(pin_id)
        if pin.owner is not None:
            holding.revoke_access(self._volume, pin)
        else:
            left = [] if flags & abi.ADMIN_FORCE else await self._gone([pin])
            if not flags & abi.ADMIN_FORCE and pin not in left:
                raise Busy(f"the holder of pin {pin_id} outlived an earlier daemon and is still there")
            self._end_survivors([pin])
        released = not self._volume.pins.has(pin)
        return int(released), pin.blocks if pin.counted and not released else 0

    async def _reap_busy(self, *_: int) -> tuple[int, int]:
        """(blocks freed, survivors released)."""
        volume, free, turns = self._volume, self._volume.free, Turns()
        gone = await self._gone(volume.pins.survivors())
        self._end_survivors(gone)
        while volume.free_unpinned(now(), 64):
            await turns.pause()
        return max(0, volume.free - free), len(gone)

    async def _gone(self, pins: list[Pin]) -> list[Pin]:
        """The survivors among these whose holders have ended."""
        volume = self._volume
        gone = await in_thread(survivors.gone, pins, volume, self.service.device) if pins else []
        self._live()
        return gone

    def _end_survivors(self, pins: list[Pin]) -> None:
        for pin in pins:
            if self._volume.pins.has(pin):
                log.info("pin %d of process %d is released", pin.id, pin.holder.pid)
                holding.release_survivor(self._volume, pin)

    async def _remove_device(self, flags: int, drain_ms: int, _: int) -> tuple[int, int]:
        """(pins that are left, 0). It goes on without the caller: REPORT_DEVICE shows how far it is."""
        if not self.service.gone:
            self.removal.begin(drain_ms / 1000, force=bool(flags & abi.ADMIN_FORCE))
        return len(self._volume.pins), 0

    async def _poison(self, _: int, first: int, count: int) -> tuple[int, int]:
        """(files that have blocks there, 1 if the volume's own blocks are among them)."""
        files = poison.inject(self._volume, first, count)
        log.warning("blocks %d to %d are poisoned, %d files have some of them", first, first + count - 1, len(files))
        await self._forget_pages(files)
        return len(files), int(bool(self._volume.poison.metadata.within(first, count)))

    async def _clear_poison(self, _: int, first: int, count: int) -> tuple[int, int]:
        files = poison.clear(self._volume, first, count)
        await self._forget_pages(files)
        return len(files), 0

    async def _forget_pages(self, files: Iterable[int]) -> None:
        """What the kernel has in its pages is read anew."""
        for ino in files:
            await in_thread(session.inval_inode, ino)


def _pieces(runs: list[Run], pins: list[Pin]) -> Iterable[tuple[int, int, list[int]]]:
    """Runs, cut wherever the set of pins that cover them changes."""
    edges = sorted(
        edge for pin in pins for start, count in pin.runs for edge in ((start, True, pin.id), (start + count, False, pin.id))
    )
    over: set[int] = set()
    passed = 0
    for at, count in runs:
        end = at + count
        while at < end:
            while passed < len(edges) and edges[passed][0] <= at:
                _, begins, pin_id = edges[passed]
                over.add(pin_id) if begins else over.discard(pin_id)
                passed += 1
            stop = min(end, edges[passed][0]) if passed < len(edges) else end
            yield at, stop - at, sorted(over)
            at = stop
