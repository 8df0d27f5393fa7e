"""Real processes for scenarios: who holds, who truncates, who is killed meanwhile.

`Zygote.process()` gives one; `process.do(function, *args)` calls a function in it and gives back its result, or raises
its OSError; `process.start(...)` does not wait and returns a `Pending`. Functions are pickled by name: those of
`acts.py`, of the standard library (os.unlink), or of a person's own scenario file.

Nothing here waits for ever: what does not come within its time is an `Unseen`. The lab itself never touches a mount, its
processes do: a daemon that hangs must not hang the lab.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, ParamSpec, Self, TypeVar

import daxfs

CALL_S = 10.0  # what a call may take that has nothing to wait for
RETURNED, OS_ERROR, RAISED = "returned", "os error", "raised"  # what comes back on a channel

_USUAL = {errno.EDEADLK: "EDEADLK", errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN"}

P = ParamSpec("P")
T = TypeVar("T")


class Unseen(Exception):
    """What a scenario says was not seen: it has failed. One line for people."""


class Died(Exception):
    """The process ended before it answered."""


def errno_name(code: int | None) -> str:
    """EOPNOTSUPP, not ENOTSUP, which is the same number; "" for none."""
    if not code:
        return ""
    return _USUAL.get(code) or errno.errorcode.get(code, str(code))


def eventually(what: str, condition: Callable[[], T], within_s: float = 3.0) -> T:
    """Look until the condition holds; its value. Unseen if it does not in time."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise Unseen(f"not within {within_s:g} s: {what}")
        time.sleep(0.003)
    return value


class Pending(Generic[T]):
    """A call that is under way in a process."""

    def __init__(self, process: Process, what: str) -> None:
        self._process = process
        self.what = what

    def done(self, within_s: float = 0.0) -> bool:
        """Whether it has returned (or the process has died)."""
        return self._process.channel.poll(within_s)

    def result(self, within_s: float = CALL_S) -> T:
        """What it returned. Raises its OSError, Unseen (still under way), Died, or RuntimeError for any other exception."""
        if not self.done(within_s):
            raise Unseen(f"{self.what} did not return within {within_s:g} s")
        self._process.pending = None
        try:
            kind, value, text = self._process.channel.recv()
        except (EOFError, OSError):
            raise Died(f"process {self._process.pid} died in {self.what}") from None
        if kind == OS_ERROR:
            raise OSError(value, text)
        if kind == RAISED:
            raise RuntimeError(f"{self.what}: {text}")
        answer: T = value
        return answer


class Process:
    """A process of the lab. One call at a time."""

    def __init__(self, pid: int, channel: Connection) -> None:
        self.pid = pid
        self.channel = channel
        self.pending: Pending[Any] | None = None

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Begin a call."""
        if self.pending is not None:
            raise RuntimeError(f"process {self.pid} is still busy with {self.pending.what}")
        names = ", ".join(_shown(x) for x in args)
        pending: Pending[T] = Pending(self, f"{getattr(function, '__name__', function)}({names})")
        try:
            self.channel.send((function, args, kwargs))
        except BrokenPipeError:
            raise Died(f"process {self.pid} is dead") from None
        self.pending = pending
        return pending

    def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call and wait for the result."""
        return self.start(function, *args, **kwargs).result()

    def errno_of(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
        """The errno of a call, 0 if it succeeds."""
        try:
            self.do(function, *args, **kwargs)
        except OSError as problem:
            return problem.errno or errno.EIO
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def gone(self) -> bool:
        return not alive(self.pid)

    def kill(self) -> None:
        """SIGKILL; does not wait."""
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it and forget it."""
        self.kill()
        self.channel.close()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _shown(value: object) -> str:
    text = os.path.basename(value) if isinstance(value, str) else repr(value)
    return text if len(text) < 40 else text[:37] + "..."


class Zygote:
    """Where processes come from. A context manager; `paths` are searched for modules besides Python's own."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        self._requests, theirs = socket.socketpair()
        package = str(Path(daxfs.__file__).resolve().parents[1])
        path = os.pathsep.join([*paths, package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "daxfs.lab.actor", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()

    def process(self) -> Process:
        ours, theirs = socket.socketpair()
        socket.send_fds(self._requests, [b"."], [theirs.fileno()])
        theirs.close()
        answer = self._requests.recv(4)
        if len(answer) != 4:
            raise Died("the process that forks the others is dead")
        return Process(int.from_bytes(answer, "little"), Connection(ours.detach()))

    def close(self) -> None:
        self._requests.close()
        try:
            self._popen.wait(5)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
