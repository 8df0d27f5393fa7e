"""The process that scenarios get their actors from: it forks one per request, and each does what it is told.

`python -m daxfs.lab.actor FD`: on the socket FD arrive bytes with one descriptor each, the channel of a new actor; the
answer is its pid. An actor takes (function, args, kwargs) from its channel, calls it, and sends back what came of it.
It ends with its channel. Forking from a process that has everything imported takes a few milliseconds, which starting
Python does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from daxfs.lab.processes import OS_ERROR, RAISED, RETURNED


class Interrupted(Exception):
    """A signal with a handler has come."""


def _on_signal(number: int, frame: object) -> None:
    raise Interrupted


def serve(channel: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who runs the scenario
    while True:
        try:
            function, args, kwargs = channel.recv()
        except (EOFError, OSError):
            return
        with contextlib.suppress(BrokenPipeError):
            channel.send(_outcome(function, args, kwargs))


def _outcome(function: Any, args: Any, kwargs: Any) -> tuple[str, Any, str]:
    try:
        return RETURNED, function(*args, **kwargs), ""
    except OSError as problem:
        return OS_ERROR, problem.errno, str(problem)
    except Exception as problem:
        return RAISED, None, "".join(traceback.format_exception(problem))


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for actors: they leave no zombies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import daxfs.lab.acts  # noqa: F401 - before the first fork

    while True:
        word, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not word:
            return
        pid = os.fork()
        if pid == 0:
            requests.close()
            serve(Connection(descriptors[0]))
            os._exit(0)
        os.close(descriptors[0])
        requests.sendall(pid.to_bytes(4, "little"))


if __name__ == "__main__":
    main()
