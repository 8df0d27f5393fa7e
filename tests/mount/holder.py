"""Processes that hold pins, driven by the test: each line on stdin is a command in JSON, each line on stdout its answer.

A holder maps the blocks of its pins from the image, as `daxfs.client` does it, so what it reads and writes are the bytes on
the medium. `Holder` is the test's end; `python -m tests.mount.holder` the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from daxfs import abi, client
from tests.mount.harness import REPOSITORY

SYS_EXIT = {"x86_64": 60}.get(platform.machine(), 93)  # of one thread


class HolderError(AssertionError):
    """The holder answered with an errno."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


class Holder:
    """A holder process, as a context manager; killed at the end if it still runs."""

    def __init__(self, *more: Any, **keep: Any) -> None:
        command = [sys.executable, "-m", "tests.mount.holder"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **keep
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def __call__(self, verb: str, **more: Any) -> Any:
        """Carry out a command in the holder."""
        self.tell(verb, **more)
        return self.answer(verb)

    def tell(self, verb: str, **more: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": verb, **more}) + "\n")

    def answer(self, verb: str = "") -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the holder ended with {self.process.wait()} at {verb}")
        answer = json.loads(line)
        if "errno" in answer:
            raise HolderError(answer["errno"], answer["text"])
        return answer["value"]

    def pin(self, path: Path, first: int = 0, count: int = 1, *, write: bool = False, **more: Any) -> Any:
        """Open a file and pin `count` blocks from block `first` on; the answer has `pin`, `id`, `file` and `runs`."""
        return self("pin", path=str(path), offset=first * 4096, length=count * 4096, write=write, **more)

    def read(self, pin: int = 0, at: int = 0, length: int = 4096) -> bytes:
        return bytes.fromhex(self("read", pin=pin, at=at, length=length))

    def write(self, data: bytes, pin: int = 0, at: int = 0) -> None:
        self("write", pin=pin, at=at, data=data.hex())

    def end(self, how: int = signal.SIGTERM) -> None:
        """End it and wait for that: SIGTERM (a plain exit, all is closed), SIGKILL, ..."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.end(signal.SIGKILL)


# -- the process itself -----------------------------------------------------------------------------------------------


class Server:
    def __init__(self) -> None:
        self.files: list[client.File] = []
        self.pins: list[client.Pin] = []
        self.stop = threading.Event()
        self.streams: list[threading.Thread] = []
        self.foreign = 0
        self.passes = 0

    def serve(self) -> None:
        for line in sys.stdin:
            words = json.loads(line)
            try:
                answer: dict[str, Any] = {"value": getattr(self, "do_" + words.pop("do"))(**words)}
            except OSError as problem:
                answer = {"errno": errno.errorcode.get(problem.errno or 0, "?"), "text": str(problem)}
            print(json.dumps(answer), flush=True)

    def do_open(self, path: str, mode: str = "r+") -> int:
        self.files.append(client.open(path, mode))
        return len(self.files) - 1

    def do_pin(self, offset: int, length: int, path: str = "", file: int = -1, write: bool = False,
               mode: str = "r+", flags: int | None = None) -> dict[str, Any]:  # fmt: skip
        if file < 0:
            file = self.do_open(path, mode)
        pin = self.files[file].pin(offset, length, write=write, flags=flags)
        self.pins.append(pin)
        if not pin.flags & abi.FOLL_GET:  # a reference gives no access to the data
            pin.map()
        return {"pin": len(self.pins) - 1, "id": pin.id, "file": file, "runs": pin.runs}

    def do_unpin(self, pin: int = 0, dirty: bool | None = None) -> None:
        self.pins[pin].close(dirty=dirty)

    def do_unmap(self, pin: int = 0) -> None:
        """Give the mapping up and keep the pin (the client library has no word for it)."""
        window = self.pins[pin]._window
        assert window
        window.close()
        self.pins[pin]._window = None

    def do_read(self, pin: int, at: int, length: int) -> str:
        return bytes(self.pins[pin].map()[at : at + length]).hex()

    def do_write(self, pin: int, at: int, data: str) -> None:
        raw = bytes.fromhex(data)
        self.pins[pin].map()[at : at + len(raw)] = raw

    def do_stream(self, pin: int, byte: int) -> None:
        """Write a byte all over the pinned blocks, look whether it is still there, again and again, as a device does."""
        view = self.pins[pin].map()
        mine = bytes([byte]) * len(view)

        def work() -> None:
            view[:] = mine
            while not self.stop.is_set():
                self.foreign += len(view) - bytes(view).count(byte)
                view[:] = mine
                self.passes += 1
                time.sleep(0)

        self.stop.clear()
        self.streams.append(threading.Thread(target=work))
        self.streams[-1].start()

    def do_stop(self) -> dict[str, int]:
        self.stop.set()
        for stream in self.streams:
            stream.join()
        self.streams = []
        return {"foreign": self.foreign, "passes": self.passes}

    def do_close(self, file: int = 0) -> None:
        """Close the descriptor only: mappings stay, as with a plain close(2)."""
        os.close(self.files[file].fileno())

    def do_dup(self, file: int = 0) -> int:
        return os.dup(self.files[file].fileno())

    def do_close_fd(self, fd: int) -> None:
        os.close(fd)

    def do_fork(self) -> int:
        """A child that has everything open and does nothing; it ends with SIGTERM or when it is told by a signal."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        return pid

    def do_reap(self, pid: int, how: int) -> None:
        os.kill(pid, how)
        os.waitpid(pid, 0)

    def do_end_first_thread(self) -> None:
        """End the thread the process began with; another one goes on, and answers from now on."""
        threading.Thread(target=self.serve).start()
        print(json.dumps({"value": None}), flush=True)
        ctypes.CDLL(None).syscall(SYS_EXIT, 0)

    def do_relay(self, for_s: float) -> None:
        """Leave the mappings, but no descriptor, to a child, which leaves them to its child at once, and so on."""
        if os.fork():
            return
        os.setsid()
        end = time.monotonic() + for_s
        for file in self.files:
            os.close(file.fileno())
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
        os._exit(0)

    def do_exec(self, keep: bool) -> None:
        """Become another program, with or without the descriptors."""
        for file in self.files:
            os.set_inheritable(file.fileno(), keep)
        print(json.dumps({"value": None}), flush=True)
        os.execv("/bin/sleep", ["sleep", "1000"])

    def do_crash(self) -> None:
        ctypes.string_at(8)

    def do_send(self, socket_path: str, file: int = 0) -> None:
        """Pass a descriptor to whoever listens there."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(socket_path)
            socket.send_fds(s, [b"x"], [self.files[file].fileno()])

    def do_receive(self, socket_path: str) -> int:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(socket_path)
            s.listen()
            print(json.dumps({"value": "listening"}), flush=True)
            with s.accept()[0] as peer:
                _, fds, _, _ = socket.recv_fds(peer, 1, 1)
            self.files.append(client.File(fds[0]))
            return len(self.files) - 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Server().serve()
