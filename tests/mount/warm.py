"""A `daxfs` whose modules are imported already: a process that forks one child per command.

Most of what a short command takes is Python's imports, and this suite mounts and unmounts hundreds of times. The child does
what the command does after its imports: same arguments, environment, streams, exit code, daemon. What the command itself
costs, and that it works at all, is tested with real ones (tests/cli, tests/lab).

The server (`python -m tests.mount.warm FD`) never waits for a command: each is answered when it ends, and many run at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Self

REPOSITORY = Path(__file__).resolve().parents[2]
_REQUEST_MAX = 1 << 17


class Running:
    """A command that was started. It has to be waited for."""

    def __init__(self, words: list[str], answer: socket.socket, streams: list[int]) -> None:
        self.words = words
        self.pid = int(json.loads(answer.recv(64)))
        self._answer = answer
        self._streams = streams

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """What became of it. After `timeout_s` it is killed, and TimeoutExpired raised."""
        self._answer.settimeout(timeout_s)
        with self._answer:
            try:
                code = json.loads(self._answer.recv(64))
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.words, timeout_s) from None
            return subprocess.CompletedProcess(self.words, code, *map(_text, self._streams))


class Warm:
    """The client's side. A context manager; safe to use from several threads."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.mount.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        theirs.close()

    def start(self, arguments: Sequence[str], setup: str = "") -> Running:
        """A daxfs command with this process's environment; `setup` is a module whose `install` is called before."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = [os.memfd_create(name) for name in ("stdout", "stderr")]
        request = json.dumps({"arguments": arguments, "setup": setup, "environment": dict(os.environ)}).encode()
        socket.send_fds(self._socket, [request], [theirs.fileno(), *streams])
        theirs.close()
        return Running(["daxfs", *arguments], ours, streams)

    def close(self) -> None:
        self._socket.close()
        self._server.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_warm: Warm | None = None
_starting = threading.Lock()


def warm() -> Warm:
    """The one of this test run, started when it is first needed; `end` ends it."""
    global _warm
    with _starting:
        if _warm is None:
            _warm = Warm()
    return _warm


def end() -> None:
    global _warm
    if _warm is not None:
        _warm.close()
        _warm = None


def _text(stream: int) -> str:
    with open(stream, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def _serve(requests: socket.socket) -> None:
    """Until the client is gone: fork for each request, answer with the pid at once and with the exit code at the end."""
    import daxfs.daemon.server  # noqa: F401 - what `daxfs mount` imports late
    from daxfs.cli.app import run

    with contextlib.redirect_stderr(io.StringIO()):
        run(["umount", "/proc"])  # refused; by then everything that a command line needs is imported
    gc.collect()
    gc.freeze()
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for fd, _ in poll.poll():
            if fd in running:
                pid, answer = running.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with answer, contextlib.suppress(BrokenPipeError):
                    answer.send(json.dumps(code).encode())
                continue
            request, fds, _, _ = socket.recv_fds(requests, _REQUEST_MAX, 3)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                requests.close()
                for number, (_, other) in running.items():
                    os.close(number)
                    other.close()
                _command(json.loads(request), fds)
            answer = socket.socket(fileno=fds[0])
            for stream in fds[1:]:
                os.close(stream)
            answer.send(json.dumps(pid).encode())
            child = os.pidfd_open(pid)
            running[child] = (pid, answer)
            poll.register(child, select.POLLIN)


def _command(request: dict[str, object], fds: Sequence[int]) -> None:
    """In the child, which ends here."""
    code = 1
    try:
        answer, out, err = fds
        os.close(answer)  # a daemon must not keep it
        for number, stream in ((1, out), (2, err)):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        if request["setup"]:
            importlib.import_module(str(request["setup"])).install()
        from daxfs.cli.app import run

        code = run(request["arguments"])  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
