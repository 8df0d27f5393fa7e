"""Clients that are killed in the middle of everything: of each system call, of pinning, of waiting for somebody's pins. The
daemon has nothing left of them, and nobody else notices.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daxfs import client
from tests.conftest import Maker
from tests.mount import syscalls
from tests.mount.crashload import Worker
from tests.mount.harness import Mounted, alive, eventually
from tests.mount.test_crash import fresh_seed

BLOCK = 4096
KILLS = 120
LIFE_S_MAX = 0.04


def calls(directory: Path, seed: int) -> None:
    """All kinds of calls on names, data and attributes."""
    Worker(directory, seed).run()


def pins(directory: Path, seed: int) -> None:
    choose = random.Random(seed)
    path = directory / "pinned"
    path.write_bytes(bytes(8 * BLOCK))
    while True:
        with client.open(path, "r+") as file, file.pin(choose.randrange(8) * BLOCK, BLOCK, write=True) as pin:
            pin.map()[:] = bytes(BLOCK)
            if choose.random() < 0.3:
                file.lease()
            os.truncate(path, choose.randrange(9) * BLOCK) if choose.random() < 0.3 else client.pins(directory)
        os.truncate(path, 8 * BLOCK)
        path.write_bytes(bytes(8 * BLOCK))


def waits(directory: Path, seed: int) -> None:
    """For a pin of the test, which stays."""
    held = directory.parent / "held"
    choose = random.Random(seed)
    while True:
        if choose.random() < 0.5:
            os.truncate(held, 0)
        else:
            fd = os.open(held, os.O_RDWR)
            syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, 0, BLOCK)


def child(work: Callable[[Path, int], None], directory: Path, seed: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(directory, seed)
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(1)


def kill_some(mounted: Mounted, work: Callable[[Path, int], None], seed: int) -> None:
    choose = random.Random(seed)
    for kill in range(KILLS // 3):
        directory = mounted.path / f"{work.__name__}-{kill}"
        directory.mkdir()
        pid = child(work, directory, choose.randrange(1 << 32), mounted.home / f"{work.__name__}.txt")
        time.sleep(choose.uniform(0.002, LIFE_S_MAX))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), (mounted.home / f"{work.__name__}.txt").read_text()


def test_kills_of_clients(make_mount: Maker) -> None:
    seed = fresh_seed()
    print(f"DAXFS_TEST_SEED={seed} chooses the same calls and moments again")
    mounted = make_mount(size="64M", options="allow_other,wait_s=1000")
    held = mounted.path / "held"
    held.write_bytes(b"h" * 4 * BLOCK)
    with client.open(held, "r+") as file, file.pin():
        os.setxattr(held, "user.daxfs.policy", b"wait")
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(kill_some, mounted, work, seed + n) for n, work in enumerate((calls, pins, waits))]
            for one in running:
                one.result()
        eventually("nobody waits", lambda: client.status(mounted.path)["waiting"] == 0)
        eventually("one pin is left", lambda: len(client.pins(mounted.path)) == 1)
        assert held.read_bytes() == b"h" * 4 * BLOCK
    eventually("nothing is pinned or busy", lambda: mounted.info()["pinned"] == mounted.info()["busy"] == 0)
    assert alive(mounted.pid)
    assert mounted.info()["failed"] == ""
