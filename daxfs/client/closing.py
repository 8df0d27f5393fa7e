"""Whose an object is: what `close` gives back, and what it only drops.

An object of this library stands for something that the daemon keeps for an open file description, or the kernel for a pipe
or a ring. Fork copies descriptors and mappings, and the interpreter's fork copies the objects too; the thing itself is there
once. The process that made an object is its *maker*.

| call | in the maker | in any other process |
| --- | --- | --- |
| `close`, leaving `with` | gives the thing back, then drops the copy | drops the copy |
| `drop` | drops the copy | drops the copy |
| `close_for_all` | gives the thing back, then drops the copy | the same: all other copies are dead |

*To give back* is to tell the daemon (UNPIN, DEREG_MR, ...), or to make the kernel let go. *To drop* is to give up what this
process has, mappings and descriptors, and to tell nobody. What all have dropped ends with the last copy of its descriptor.

Rules
- No class here has a `__del__`: objects that are forgotten, and an interpreter that ends, send nothing.
- Objects stand *on* others: pins and leases on a file, regions and queues on a context, rings and pipes on a pin. They are
  dropped before what they stand on.
- An object is not pickled and not copied: its copy would pass for the maker's.

States of an object: held -> dropped.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from types import TracebackType
from typing import NoReturn, Self

from daxfs.client.calls import PinError


class Process:
    """A process. Another one is another object, even if it gets the same pid."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()


_this = Process()


def _forked() -> None:
    global _this
    _this = Process()


os.register_at_fork(after_in_child=_forked)


def this_process() -> Process:
    """The process that asks: the same object for as long as it lives."""
    if _this.pid != os.getpid():  # a fork that the interpreter was not told of
        _forked()
    return _this


class Closing:
    """Something with a `close`, and with a maker. A context manager. `held`: not closed yet in this process."""

    __slots__ = ("_below", "_maker", "_on", "held")

    _closed_errno = errno.EBADF
    _closed_word = "is closed"

    def __init__(self, on: Closing | None = None) -> None:
        """`on`: what it stands on, if that is to drop it when it goes."""
        self.held = True
        self._maker = this_process()
        self._on = on
        self._below: dict[Closing, None] = {}  # what stands on this, the newest last
        if on is not None:
            on._below[self] = None

    @property
    def mine(self) -> bool:
        """Whether this process made it, so that `close` gives it back."""
        return self._maker is this_process()

    def close(self) -> object:
        """Give it back, in the process that made it; in any other, drop this process's copy. Again: no effect."""
        if not self.held:
            return None
        given = self._give_back() if self.mine else None
        self.drop()
        return given

    def drop(self) -> None:
        """Give up this process's copy, mapping and descriptors, and tell nobody. Again: no effect."""
        if not self.held:
            return
        self.held = False
        try:
            self._let_go()
        finally:
            if self._on is not None:
                self._on._below.pop(self, None)

    def _give_back(self) -> object:
        """Tell the daemon, or make the kernel let go. What must go before that (mappings), or even if it fails, is dropped
        here; else a failure leaves the object held."""
        return None

    def _let_go(self) -> None:
        """Give up mappings and descriptors."""

    def _called(self) -> tuple[str, str]:
        """How messages call it, and the path that they are about."""
        raise NotImplementedError

    def _require_held(self) -> None:
        """PinError, if it was closed: how, and where."""
        if not self.held:
            name, path = self._called()
            raise PinError(self._closed_errno, f"{name} {self._closed_word}{self._elsewhere()}", path)

    def _elsewhere(self) -> str:
        """What a message adds when this process has dropped what another one may have."""
        return "" if self.mine else f" in this process; process {self._maker.pid}, which made it, may still have it"

    def _require_maker(self, why: str) -> None:
        """PinError EPERM in any process but the maker."""
        if not self.mine:
            name, path = self._called()
            raise PinError(errno.EPERM, f"{name} was made by process {self._maker.pid}: {why}", path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to the process that made it: send the descriptor instead "
            "(socket.send_fds, multiprocessing.reduction.DupFd) and make a daxfs.client.File of it there"
        )


class Held(Closing):
    """Something that the daemon keeps for an open file description."""

    __slots__ = ()

    def close_for_all(self) -> object:
        """Give it back, whichever process made it: no copy of it in any process is worth anything afterwards. Again, and
        where this process has closed its copy: no effect. PinError: as `close` in the maker."""
        if not self.held:
            return None
        given = self._give_back()
        self.drop()
        return given


class Opened(Closing):
    """A descriptor, and what this process took through it. To close it is to close the descriptor and no more, in the maker
    too: what was taken lives on until the last copy of the descriptor is closed."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor. PinError: EBADF (closed)."""
        self._require_held()
        return self._fd

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        with ExitStack() as last_first:
            last_first.callback(os.close, fd)
            for thing in self._below:
                last_first.callback(thing.drop)
