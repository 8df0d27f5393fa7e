"""The client library for trio programs: nothing here holds up the event loop.

    async with aio.open("/mnt/x/film", "r+") as file:
        with await file.register(0, 1 << 20) as region:
            async for event in file.events():
                if event.type is EventType.INVALIDATE:
                    region.acknowledge()
                    break

Only what may wait is async: a pin behind a layout change, a truncate or punch, the next event. The rest is one round trip to
the daemon and is called as in `daxfs.client`; `AsyncFile.file` is the `File`. This is the only module that imports trio.

Rules
- Events are awaited through an epoll of their own that asks for POLLPRI only: a description without pins is always readable.
- A call that waits does so in a thread, on a duplicate of the descriptor. When it is cancelled the thread goes on to the end
  of the call; a pin that it still gets is given back at once.
- In a forked child (closing.py) trio's own epoll is still the parent's: nothing is told to it there. A child that was forked
  inside of trio.run has to leave with os._exit or exec, or trio itself disturbs the parent.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar

import trio

from daxfs import abi
from daxfs.client import calls
from daxfs.client import file as sync
from daxfs.client.calls import PinError
from daxfs.client.closing import Process, this_process
from daxfs.client.events import Event, Lease
from daxfs.client.file import File, Pin
from daxfs.client.reports import Path

T = TypeVar("T")


@asynccontextmanager
async def open(path: Path, mode: str = "r") -> AsyncIterator[AsyncFile]:
    """Open a file of a daxfs mount, as `daxfs.client.open` does."""
    async with AsyncFile(sync.open(path, mode)) as file:
        yield file


class AsyncFile:
    """A `File` for trio. Closing it (an async context manager) closes the file."""

    def __init__(self, file: File) -> None:
        self.file = file
        self._epoll = select.epoll()
        self._epoll.register(file.fileno(), select.EPOLLPRI)
        self._lent: dict[int, Process] = {}  # duplicates of the descriptor, each with the process whose thread closes it

    async def pin(
        self, offset: int = 0, length: int | None = None, *, write: bool = False, longterm: bool = False
    ) -> Pin:
        """Pin a range; waits while a layout change waits for it. Arguments and errors as `File.pin`."""
        flags = abi.FOLL_PIN | (abi.FOLL_WRITE if write else 0) | (abi.FOLL_LONGTERM if longterm else 0)
        return await self._take(offset, length, flags)

    async def register(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> Pin:
        """Register a range on demand; see `File.register`."""
        return await self._take(offset, length, abi.PIN_ON_DEMAND | (abi.FOLL_WRITE if write else 0))

    async def _take(self, offset: int, length: int | None, flags: int) -> Pin:
        await trio.lowlevel.checkpoint()
        file = self.file
        with file._named():
            size = file._length(offset, length)
            try:
                pin_id, _, blocks = calls.pin(file.fileno(), offset, size, flags | abi.PIN_NOWAIT)
            except PinError as problem:
                if problem.errno != errno.EAGAIN:
                    raise
                pin_id, _, blocks = await self._in_thread(
                    lambda fd: calls.pin(fd, offset, size, flags), lambda fd, late: calls.unpin(fd, late[0], dirty=False)
                )
            return file._granted(pin_id, offset, size, flags, blocks)

    async def truncate(self, size: int) -> None:
        """truncate(2); waits as the policy says. When it is cancelled it may still be carried out later."""
        await self._change(size, 0, abi.CHANGE_TRUNCATE)

    async def punch(self, offset: int, length: int) -> None:
        """Punch a hole; waits as the policy says. When it is cancelled it may still be carried out later."""
        await self._change(offset, length, abi.CHANGE_PUNCH)

    async def _change(self, offset: int, length: int, operation: int) -> None:
        with self.file._named():
            await self._in_thread(lambda fd: calls.change(fd, offset, length, operation, wait=True), lambda fd, _: None)

    async def _in_thread(self, call: Callable[[int], T], undo: Callable[[int, T], None]) -> T:
        """The result of a call that may wait, made in a thread. `undo` takes back one that nobody waits for any more."""
        caller = this_process()
        fd = os.dup(self.file.fileno())
        self._lent[fd] = caller
        lock = threading.Lock()
        results: list[T] = []
        abandoned = False

        def work() -> T:
            try:
                result = call(fd)
                with lock:
                    results.append(result)
                    if abandoned:
                        undo(fd, result)
                return result
            finally:
                del self._lent[fd]
                os.close(fd)

        try:
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        except trio.Cancelled:
            if this_process() is not caller:
                raise  # a forked child: the thread, and what it gets, are the parent's
            with lock:
                abandoned = True
                if results:  # it came at the same moment
                    undo(self.file.fileno(), results[0])
            raise

    def lease(self, offset: int = 0, length: int = 0) -> Lease:
        """Take a layout lease; see `File.lease`."""
        return self.file.lease(offset, length)

    async def next_event(self) -> Event:
        """The next event of this description; waits for it."""
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            event = self.file.next_event()
            if event is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return event
            await trio.lowlevel.wait_readable(self._epoll.fileno())

    def events(self) -> Events:
        """Events as they come, without an end: `async for`."""
        return Events(self)

    async def aclose(self) -> None:
        """Close the file, as `File.close` does. Again: no effect."""
        if not self._epoll.closed:
            if self.file.mine:
                trio.lowlevel.notify_closing(self._epoll.fileno())
            for fd in [fd for fd, process in self._lent.items() if process is not this_process()]:
                os.close(fd)  # the thread that would do it is not here
            self._epoll.close()
            self.file.close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Events:
    """The events of a file as an async iterator. Leaving the loop early is fine: nothing is lost."""

    def __init__(self, file: AsyncFile) -> None:
        self._file = file

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self._file.next_event()
