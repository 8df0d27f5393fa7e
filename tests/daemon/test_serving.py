"""No request is left in the kernel's queue while the daemon sleeps; and if one were, it would be seen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import client
from tests.daemon import deaf
from tests.mount.harness import Mounted, alive, eventually

pytestmark = pytest.mark.mount

CALLERS = 6
BUSY = "while True: pass"


class Callers:
    """Threads that read, stat and pin: each has one request at a time, with and without pauses between them."""

    def __init__(self, path: Path) -> None:
        self.calls = [0] * CALLERS
        self.slowest = 0.0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._call, args=(n, path), daemon=True) for n in range(CALLERS)]

    def _call(self, n: int, path: Path) -> None:
        with client.open(path, "r+") as file:
            while not self.stop.is_set():
                began = time.monotonic()
                try:
                    os.pread(file.fileno(), 4096, 0)
                    if n % 2:
                        file.pin(0, 4096).close()
                    os.statvfs(path)
                except OSError:  # the daemon was killed
                    return
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.calls[n] += 1
                if n % 3 == 2:
                    time.sleep(0.003)

    def __enter__(self) -> Callers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads), "a call did not return"


@contextmanager
def mounted(base: Path, how: str = "") -> Iterator[Mounted]:
    made = Mounted(base / f"serving-{uuid.uuid4().hex[:8]}", size="32M")
    os.environ[deaf.VARIABLE] = how
    try:
        made.mount(setup=deaf.SETUP if how else "")
        (made.path / "file").write_bytes(b"f" * 4096)
        yield made
    finally:
        del os.environ[deaf.VARIABLE]
        made.remove()


@contextmanager
def other_load(count: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def late(made: Mounted) -> int:
    return int(made.info()["requests"]["late"])


def test_a_lost_request_hangs_its_caller(base: Path) -> None:
    """The test's own eyes: where the watch is off and nobody looks, the callers stand still."""
    with mounted(base, "for-ever") as made, Callers(made.path / "file") as callers:

        def stand_still() -> bool:
            before = list(callers.calls)
            time.sleep(3)
            return before == callers.calls

        eventually("all callers hang", stand_still, 30)
        assert alive(made.pid)
        made.kill()


def test_a_lost_request_is_found_and_served(base: Path) -> None:
    with mounted(base, "now-and-then") as made:
        with Callers(made.path / "file") as callers:
            eventually("it is counted", lambda: late(made) >= 3, 60)
        assert sum(callers.calls) > 0
        assert "nothing announced it" in made.log_text()


@pytest.mark.parametrize("others", [0, 6])
def test_nothing_is_late(others: int, base: Path) -> None:
    """Neither on an idle machine nor on one with more threads than it can run. A layout change that waits is answered."""
    with mounted(base) as made, other_load(others):
        pinned = made.path / "pinned"
        pinned.write_bytes(b"p" * 8192)
        os.setxattr(pinned, "user.daxfs.policy", b"wait")
        with Callers(made.path / "file") as callers:
            for _ in range(20):
                with client.open(pinned, "r+") as file:
                    pin = file.pin(0, 4096)
                    with subprocess.Popen(["truncate", "-s", "0", pinned]) as truncate:
                        eventually("it waits", lambda: client.status(made.path)["waiting"] == 1, 20)
                        pin.close()
                        assert truncate.wait(20) == 0
                pinned.write_bytes(b"p" * 8192)
        assert min(callers.calls) > 10
        assert late(made) == 0
        made.umount()
        made.fsck()
        made.check_log()
