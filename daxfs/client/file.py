"""A file of a daxfs mount, and the pins that this process takes on it.

A pin belongs to the open file description behind `File`: dup, fork and a descriptor sent over a socket share it, and
the last close releases it, also when the process is killed. `Pin.close` gives it back earlier, in the process that took it;
what it means in others is in closing.py. The pinned blocks stay where they are, whatever happens to the file; `Pin.map` maps
them from the image itself, so what is read and written there are the bytes on the (emulated) medium. For that the process
needs permission for the image, as for a raw device.

States of a pin in a process: held -> closed. States of its mapping: none -> mapped (`map`) -> closed, always before the
pin is.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from daxfs import abi
from daxfs.client import calls
from daxfs.client.calls import PinError, Run
from daxfs.client.closing import Held, Opened
from daxfs.client.events import Event, EventType, Lease
from daxfs.client.memory import Window
from daxfs.client.reports import Path, open_descriptor

_MODES = {"r": os.O_RDONLY, "r+": os.O_RDWR, "w+": os.O_RDWR | os.O_CREAT}


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a file's map, in blocks. An unwritten one is allocated and reads as zeros."""

    logical: int
    physical: int
    count: int
    unwritten: bool


def open(path: Path, mode: str = "r") -> File:
    """Open a file of a daxfs mount: "r" to read (or a directory, for reports), "r+" to read and write, "w+" creates it.

    Nothing is truncated. PinError (an OSError): ENOENT, EACCES, ... with the path; ENOTTY if it is not on daxfs.
    """
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r}: use one of {', '.join(map(repr, _MODES))}")
    flags = _MODES[mode]
    if flags & os.O_CREAT and not os.path.lexists(path):
        try:
            os.close(os.open(path, flags | os.O_CLOEXEC, 0o666))
        except OSError as problem:
            raise PinError(problem.errno, problem.strerror, os.fsdecode(path)) from None
    file = File(open_descriptor(path, flags, to_pin=True), os.fsdecode(path))
    try:
        file.info()
    except BaseException:
        file.close()
        raise
    return file


class File(Opened):
    """An open file of a daxfs mount. A context manager.

    `close` takes the mappings of this process away and closes the descriptor. Pins and leases go with the last copy of it.
    """

    def __init__(self, fd: int, path: str = "") -> None:
        """Take over an open descriptor: `close` closes it. `path` is only for messages."""
        super().__init__(fd)
        self.path = path or f"descriptor {fd}"
        self._block_size = 0

    def _called(self) -> tuple[str, str]:
        return "the file", self.path

    @contextmanager
    def _named(self) -> Iterator[None]:
        """PinErrors raised inside carry the path."""
        try:
            yield
        except PinError as problem:
            raise PinError(problem.errno, problem.strerror, self.path) from None

    @property
    def block_size(self) -> int:
        """Bytes in a block of the volume: offsets and lengths of pins are multiples of it."""
        if not self._block_size:
            self.info()
        return self._block_size

    def info(self) -> dict[str, Any]:
        """The volume this file is on; see `daxfs.client.info`."""
        with self._named():
            answer: dict[str, Any] = calls.report(self.fileno(), abi.REPORT_INFO)
            self._block_size = int(answer["block_size"])
            return answer

    def extents(self) -> list[Extent]:
        """Where the file's blocks are on the image, in file order; holes are left out."""
        with self._named():
            return [Extent(*extent) for extent in calls.extents(self.fileno())]

    def open_image(self, *, writable: bool) -> int:
        """A new descriptor of the image that the file's blocks are on; the caller closes it.

        PinError: EACCES (no permission for the image), ENOENT or ESTALE (it is not where the daemon says).
        """
        info = self.info()
        image = str(info["image"])
        try:
            fd = os.open(image, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except PermissionError:
            raise PinError(
                errno.EACCES,
                "no permission for the image: mapping pinned blocks is a privilege of who may open it; "
                "run as its owner, or ask the owner for access",
                image,
            ) from None
        except OSError as problem:
            why = f"the image cannot be opened from this process: {problem.strerror}"
            raise PinError(problem.errno, why, image) from None
        status = os.fstat(fd)
        if info.get("image_id", [status.st_dev, status.st_ino]) != [status.st_dev, status.st_ino]:
            os.close(fd)
            raise PinError(errno.ESTALE, "another file has taken the place of the mounted image", image)
        return fd

    def pin(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        write: bool = False,
        longterm: bool = False,
        wait: bool = True,
        flags: int | None = None,
    ) -> Pin:
        """Pin `length` bytes at `offset`, both multiples of the block size; without a length, to the end of the file.

        write: the device writes the blocks (needs "r+"; holes get blocks). longterm: FOLL_LONGTERM. wait: behind a layout
        change that waits for the range; else EAGAIN. flags: FOLL_* bits in place of all three. PinError: EINVAL (alignment,
        flags), EACCES (write pin, file open for reading), ENXIO (beyond the end), EFAULT (read pin of a hole), ENOMEM
        (limit), ENOSPC (full), EOPNOTSUPP (long-term pins are denied), EPERM (they need a lease), EBUSY (dax=never: the file
        is open through the page cache, elsewhere, or by this `File` if it was made of a descriptor without abi.O_PIN).
        """
        if flags is None:
            flags = abi.FOLL_PIN | (abi.FOLL_WRITE if write else 0) | (abi.FOLL_LONGTERM if longterm else 0)
            flags |= 0 if wait else abi.PIN_NOWAIT
        return self._take(offset, length, flags)

    def register(self, offset: int = 0, length: int | None = None, *, write: bool = False, wait: bool = True) -> Pin:
        """Register a range on demand (ODP): no pin. Its holder gets INVALIDATE before the blocks go, must stop using them
        and say so (`Pin.acknowledge`); one that does not is fenced. Arguments and errors as those of `pin`."""
        flags = abi.PIN_ON_DEMAND | (abi.FOLL_WRITE if write else 0) | (0 if wait else abi.PIN_NOWAIT)
        return self._take(offset, length, flags)

    def _take(self, offset: int, length: int | None, flags: int) -> Pin:
        with self._named():
            length = self._length(offset, length)
            pin_id, _, blocks = calls.pin(self.fileno(), offset, length, flags)
            return self._granted(pin_id, offset, length, flags, blocks)

    def _length(self, offset: int, length: int | None) -> int:
        """The length of a range; None: to the end of the file."""
        if length is None:
            length = -(-os.fstat(self.fileno()).st_size // self.block_size) * self.block_size - offset
            if length <= 0:
                raise PinError(errno.ENXIO, f"nothing to pin: the file ends at or before byte {offset}")
        return length

    def _granted(self, pin_id: int, offset: int, length: int, flags: int, blocks: int) -> Pin:
        """The object for a pin that the daemon has granted."""
        pin = Pin(self, pin_id, offset, length, flags & ~abi.PIN_NOWAIT, ())
        try:
            pin.runs = calls.pin_runs(self.fileno(), pin_id)
            if sum(count for _, count in pin.runs) != blocks:
                raise PinError(errno.EPROTO, f"pin {pin_id} has {blocks} blocks, its runs have other ones")
        except BaseException:
            pin.close(dirty=False)
            raise
        return pin

    def unpin(self, pin_id: int, *, dirty: bool = False) -> None:
        """Give back a pin of this description by its id, whichever process took it: for one that has nothing but the
        descriptor. No copy of it is worth anything afterwards; see `Pin.close_for_all`.

        dirty: the device wrote. PinError: ENOENT (no such pin on this description)."""
        for thing in [*self._below]:
            if isinstance(thing, Pin) and thing.id == pin_id:
                thing.drop()
        with self._named():
            calls.unpin(self.fileno(), pin_id, dirty=dirty)

    def lease(self, offset: int = 0, length: int = 0) -> Lease:
        """Take a layout lease on a range of whole blocks (length 0: all of the file, as long as it gets). A context manager.

        PinError: EINVAL (alignment, not a regular file).
        """
        with self._named():
            calls.lease(self.fileno(), offset, length, abi.LEASE_TAKE)
        return Lease(self, offset, length)

    def poll(self, timeout_s: float | None = None) -> bool:
        """Wait until an event is there (without a time-out: for ever). Whether there is one."""
        poller = select.poll()
        poller.register(self.fileno(), select.POLLPRI)
        return any(ready & select.POLLPRI for _, ready in poller.poll(None if timeout_s is None else timeout_s * 1000))

    def next_event(self, timeout_s: float | None = 0) -> Event | None:
        """The oldest event of this description; None if none comes within `timeout_s` (None: wait for ever)."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._named():
                found = calls.next_event(self.fileno())
            if found is not None:
                kind, lost, pin_id, offset, length = found
                return Event(EventType(kind), pin_id, offset, length, lost)
            rest = None if end is None else end - time.monotonic()
            if rest is not None and rest <= 0:
                return None
            self.poll(rest)  # with the description shared, somebody else may take the event: look again

    def truncate(self, size: int, *, wait: bool = True) -> None:
        """truncate(2) of this descriptor. Without `wait`: EAGAIN, and nothing has changed, where it would wait for pins.
        PinError: EBADF, EOPNOTSUPP (dax=never), and by the policy ETXTBSY, EDEADLK (own pins), EBUSY."""
        with self._named():
            calls.change(self.fileno(), size, 0, abi.CHANGE_TRUNCATE, wait=wait)

    def punch(self, offset: int, length: int, *, wait: bool = True) -> None:
        """Punch a hole, as fallocate(2) does with PUNCH_HOLE and KEEP_SIZE. `wait` and errors as of `truncate`."""
        with self._named():
            calls.change(self.fileno(), offset, length, abi.CHANGE_PUNCH, wait=wait)


class Pin(Held):
    """A pin: `id`, `offset` and `length` (bytes), `flags` (FOLL_*), `runs` of (start block, count). A context manager.

    A forked child has a copy: it may map, label and look, and its `close` is about the copy only.
    """

    def __init__(self, file: File, pin_id: int, offset: int, length: int, flags: int, runs: tuple[Run, ...]) -> None:
        super().__init__(file)
        self.file = file
        self.id = pin_id
        self.offset = offset
        self.length = length
        self.flags = flags
        self.runs = runs
        self._dirty = self.writable
        self._window: Window | None = None

    def _called(self) -> tuple[str, str]:
        return f"pin {self.id}", self.file.path

    def label(self, text: str) -> None:
        """Name the pin for whoever lists pins (`daxfs pins`): 56 bytes of UTF-8, more is cut off. PinError: ENOENT."""
        with self.file._named():
            calls.label(self.file.fileno(), self.id, text)

    @property
    def writable(self) -> bool:
        return bool(self.flags & abi.FOLL_WRITE)

    @property
    def on_demand(self) -> bool:
        return bool(self.flags & abi.PIN_ON_DEMAND)

    def acknowledge(self) -> None:
        """An on-demand registration lets go, after INVALIDATE: unmap, then tell the daemon. Close it afterwards.
        PinError: EINVAL (it was not told to), ENOENT, EPERM (another process registered it, which may have it mapped)."""
        self._require_maker("only that one can say that it has let go")
        self.unmap()
        with self.file._named():
            calls.acknowledge(self.file.fileno(), self.id)

    def map(self) -> memoryview:
        """The pinned blocks as one memoryview of bytes, in file order; writable if the pin is. Again: the same view.

        It is mapped from the image, so it stays valid when the file is truncated, punched or unlinked, until the pin is
        closed. Then the view is released, and slices of it that are still held read zeros and write nowhere.
        PinError: EACCES (no permission for the image), ENOENT or ESTALE (it is not where the daemon says), EBADF.
        """
        self._require_held()
        if self._window is None or _released(self._window.view):
            if self._window is not None:
                self._window.close()
            self._window = self._map()
        return self._window.view

    def _map(self) -> Window:
        if self.flags & abi.FOLL_GET:
            why = "a FOLL_GET reference gives no access to the data: take a FOLL_PIN"
            raise PinError(errno.EACCES, why, self.file.path)
        fd = self.file.open_image(writable=self.writable)
        try:
            return Window(fd, self.runs, self.file.block_size, writable=self.writable)
        finally:
            os.close(fd)

    @property
    def address(self) -> int:
        """Where `map` put the blocks in this process: for `ctypes`, vmsplice, O_DIRECT. 0 while they are not mapped."""
        return self._window.address if self._window else 0

    def unmap(self) -> None:
        """Take the mapping of this process away; the pin stays. Slices of the view that are still held read zeros and write
        nowhere. Rings and pipes on the pin (`daxfs.client.kernel`) are closed first."""
        with ExitStack() as last_first:
            if self._window is not None:
                last_first.callback(self._window.close)
                self._window = None
            for user in self._below:
                last_first.callback(user.close)

    def close(self, *, dirty: bool | None = None) -> None:
        """Unmap, then unpin; in another process than the one that took the pin, only unmap. Again: no effect.

        dirty: whether the device wrote, so that the file's times move; by default, whether the pin is a write pin.
        PinError: ENOENT (released before), ENOTCONN (the daemon is gone; the blocks are unmapped here all the same).
        """
        if dirty is not None:
            self._dirty = dirty
        super().close()

    def _give_back(self) -> None:
        self.drop()
        with self.file._named():
            calls.unpin(self.file.fileno(), self.id, dirty=self._dirty)

    def _let_go(self) -> None:
        self.unmap()


def _released(view: memoryview) -> bool:
    try:
        return view.nbytes < 0
    except ValueError:
        return True
