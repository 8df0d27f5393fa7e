"""Holders as processes of their own, for tests: they do what a line on their standard input says, and answer with JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.mount.harness import REPOSITORY

BLOCK = 4096


class Holder:
    """A process with one file open. `ask` calls a function of `Acts` below there; an OSError comes back as its errno."""

    def __init__(self, path: Path | None = None, mode: str = "r+") -> None:
        command = [sys.executable, "-m", "tests.pins.holders", str(path or ""), mode]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.process.pid

    def ask(self, act: str, *arguments: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([act, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        code, value = json.loads(self.process.stdout.readline())
        if code:
            raise OSError(code, value)
        return value

    def pin(self, offset: int = 0, blocks: int = 1, **more: object) -> int:
        pin_id: int = self.ask("pin", offset * BLOCK, blocks * BLOCK, more)
        return pin_id

    def end(self, how: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(10)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Acts:
    """What a holder can be asked to do."""

    def __init__(self, path: str, mode: str) -> None:
        from daxfs import client

        self.client = client
        self.file = client.open(path, mode) if path else None
        self.pins: dict[int, Any] = {}

    def pin(self, offset: int, length: int, more: dict[str, Any]) -> int:
        assert self.file is not None
        label = more.pop("label", "")
        on_demand = more.pop("on_demand", False)
        pin = (self.file.register if on_demand else self.file.pin)(offset, length, **more)
        self.pins[pin.id] = pin
        if label:
            pin.label(label)
        return pin.id

    def unpin(self, pin_id: int) -> None:
        self.pins.pop(pin_id).close()

    def forget(self) -> None:
        """Close the descriptor without a word."""
        assert self.file is not None
        os.close(self.file.fileno())

    def load(self, pin_id: int) -> str:
        return bytes(self.pins[pin_id].map()).hex()

    def store(self, pin_id: int, byte: int) -> None:
        view = self.pins[pin_id].map()
        view[:] = bytes([byte]) * len(view)

    def dma(self, pin_id: int, offset: int, text: str) -> None:
        """A device writes some bytes."""
        self.pins[pin_id].map()[offset : offset + len(text)] = text.encode()

    def event(self) -> list[int] | None:
        assert self.file is not None
        event = self.file.next_event()
        return event and [event.type, event.pin_id, event.offset, event.length]

    def fork(self) -> int:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        return child

    def reap(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def send(self, name: str) -> None:
        """The descriptor, over a socket."""
        assert self.file is not None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(name)
            socket.send_fds(channel, [b"x"], [self.file.fileno()])

    def receive(self, name: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(name)
            listener.listen()
            with listener.accept()[0] as channel:
                self.received = socket.recv_fds(channel, 1, 1)[1]

    def read(self, offset: int, length: int) -> str:
        assert self.file is not None
        return os.pread(self.file.fileno(), length, offset).hex()


def main() -> None:
    path, mode = sys.argv[1:]
    acts = Acts(path, mode)
    for line in sys.stdin:
        act, *arguments = json.loads(line)
        try:
            answer = [0, getattr(acts, act)(*arguments)]
        except OSError as problem:
            answer = [problem.errno or errno.EIO, str(problem)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
