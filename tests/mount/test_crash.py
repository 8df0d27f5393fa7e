"""kill -9 of the daemon at 200 random moments under load: after the next mount everything acknowledged is there, the call
that was under way is whole or absent, and fsck finds nothing. Two volumes are tested at the same time, 100 kills each."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.conftest import Maker
from tests.mount.crashload import Worker
from tests.mount.harness import DAXFS, REPOSITORY, Mounted, alive, eventually

KILLS = 100  # per volume
WORKERS = 3
LOAD_S_MAX = 0.12
GONE = r"not connected|abort"


def fresh_seed() -> int:
    return int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))


def crash(mounted: Mounted, workers: list[Worker], after_s: float) -> None:
    """Load from every worker, and a SIGKILL in the middle of it."""
    problems: list[BaseException] = []

    def load(worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=load, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    time.sleep(after_s)
    mounted.kill()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def kill_a_mount(mounted: Mounted, after_s: float) -> None:
    """Kill a daemon while it starts: recovery itself may be interrupted."""
    command = [*DAXFS, "mount", "--foreground", "--image", str(mounted.image), str(mounted.path)]
    starting = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    starting.send_signal(signal.SIGKILL)
    starting.wait()


def lane(mounted: Mounted, seed: int) -> str:
    choose = random.Random(seed)
    workers = [Worker(mounted.fresh_directory(), choose.randrange(1 << 32)) for _ in range(WORKERS)]
    finished = halfway = 0
    for kill in range(KILLS):
        try:
            crash(mounted, workers, choose.uniform(0, LOAD_S_MAX))
            mounted.fsck()
            if choose.random() < 0.1:
                kill_a_mount(mounted, choose.uniform(0.1, 0.6))
            mounted.mount()
            for worker in workers:
                if worker.pending is not None:
                    halfway += 1
                finished += worker.verify()
        except BaseException as problem:
            raise AssertionError(f"seed {seed}, kill {kill}: {problem}") from problem
    done = sum(worker.done for worker in workers)
    assert done > KILLS, "the load hardly did anything"
    return f"seed {seed}: {KILLS} kills, {done} calls acknowledged, {halfway} under way at a kill, {finished} of them done"


@pytest.mark.slow
def test_200_kills(make_mount: Maker) -> None:
    seed = fresh_seed()
    print(f"DAXFS_TEST_SEED={seed} chooses the same calls and moments again")
    lanes = [make_mount(size="64M", watchdog_s=500) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(lane, mounted, seed + number) for number, mounted in enumerate(lanes)]
        print("\n".join(future.result() for future in running))
    assert all(int(mounted.info()["dirty_shutdowns"]) >= KILLS for mounted in lanes)


def test_dirty_shutdowns_are_counted(make_mount: Maker) -> None:
    """A clean unmount does not count, a kill does."""
    mounted = make_mount()
    assert mounted.info()["dirty_shutdowns"] == 0
    mounted.remount()
    assert mounted.info()["dirty_shutdowns"] == 0
    mounted.kill()
    mounted.mount()
    assert mounted.info()["dirty_shutdowns"] == 1
    mounted.remount()
    assert mounted.info()["dirty_shutdowns"] == 1


def test_unlinked_open_files_go_with_the_daemon(make_mount: Maker) -> None:
    """An orphan's blocks are free again after the next mount."""
    mounted = make_mount()
    (mounted.path / "stays").write_bytes(b"x" * 10_000)
    free = mounted.info()["free"]
    with open(mounted.path / "orphan", "wb") as orphan:
        orphan.write(bytes(8 << 20))
        orphan.flush()
        os.unlink(mounted.path / "orphan")
        assert mounted.info()["free"] <= free - 2048
        mounted.kill()
    mounted.fsck()
    mounted.mount()
    assert mounted.info()["free"] >= free - 1
    assert sorted(os.listdir(mounted.path)) == ["stays"]


def test_callers_do_not_hang(make_mount: Maker) -> None:
    """Whoever has files open of a killed daemon's mount gets errors at once, and can go on after the next mount."""
    mounted = make_mount()
    path = mounted.path / "f"
    path.write_bytes(b"before")
    with open(path, "rb", buffering=0) as file:
        mounted.kill()
        began = time.monotonic()
        with pytest.raises(OSError, match=GONE):
            file.read()
        with pytest.raises(OSError, match=GONE):
            os.stat(path)
        assert time.monotonic() - began < 1
    mounted.mount()
    assert path.read_bytes() == b"before"


def test_sigterm_unmounts_cleanly(make_mount: Maker) -> None:
    mounted = make_mount()
    (mounted.path / "f").write_bytes(b"data")
    pid = mounted.pid
    os.kill(pid, signal.SIGTERM)
    eventually("the daemon ends", lambda: not alive(pid), 10)
    mounted.pid = 0
    assert not os.path.ismount(mounted.path)
    mounted.fsck()
    mounted.mount()
    assert mounted.info()["dirty_shutdowns"] == 0
    assert (mounted.path / "f").read_bytes() == b"data"


def test_stopped_and_continued(make_mount: Maker) -> None:
    """A daemon that is stopped for a while answers everything afterwards."""
    mounted = make_mount()
    os.kill(mounted.pid, signal.SIGSTOP)
    writer = threading.Thread(target=lambda: (mounted.path / "f").write_bytes(b"late"))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    os.kill(mounted.pid, signal.SIGCONT)
    writer.join(5)
    assert not writer.is_alive()
    assert Path(mounted.path / "f").read_bytes() == b"late"
