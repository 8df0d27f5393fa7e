"""kill -9 of the daemon at random moments under load: after the next mount everything acknowledged is there, the call that
was under way is whole or absent, and fsck finds nothing. Two volumes are tested at the same time, half of the kills each;
DAXFS_TEST_KILLS says how many (100).

Few random moments fall between a commit and its end (some 5 us). So every second kill is aimed: a sniper shares the daemon's
CPU at a higher priority, wakes up every few microseconds, and kills when it finds the commit word in the image set. The
daemon does nothing more before it is dead, so recovery has a transaction to replay.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daxfs.core import layout
from tests.conftest import Maker
from tests.mount import warm
from tests.mount.crashload import Worker
from tests.mount.harness import COMMAND_S, Mounted, alive, eventually

KILLS = int(os.environ.get("DAXFS_TEST_KILLS") or 100) // 2  # per volume
WORKERS = 3
LOAD_S_MAX = 0.08
START_S_MAX = 0.05  # from a warm start of `daxfs mount` to a served mount
GONE = r"not connected|abort"


def fresh_seed() -> int:
    return int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))


SNIPER = """
import mmap, os, signal, sys, time
image, at, pid, after_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
cpu = {max(os.sched_getaffinity(pid))}
with open(image, "rb") as file, mmap.mmap(file.fileno(), at + 8, prot=mmap.PROT_READ) as view:
    os.sched_setaffinity(pid, cpu)
    os.sched_setaffinity(0, cpu)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    time.sleep(after_s)
    end, word, none = time.monotonic() + 1, slice(at, at + 8), bytes(8)
    while view[word] == none and time.monotonic() < end:
        time.sleep(0.00003)
    os.kill(pid, signal.SIGKILL)
"""


def commit_word_at(image: Path) -> int:
    """Where the journal's commit word is, as bytes from the start of the image."""
    with open(image, "rb") as file:
        sb = layout.SUPERBLOCK.unpack(file.read(layout.SUPERBLOCK.size))
    return int(sb["journal_start"]) * int(sb["block_size"]) + layout.JOURNAL_COMMIT_AT


def committed(image: Path) -> bool:
    """Whether recovery will have a transaction to replay."""
    with open(image, "rb") as file:
        return os.pread(file.fileno(), 8, commit_word_at(image)) != bytes(8)


def crash(mounted: Mounted, workers: list[Worker], after_s: float, *, aimed: bool) -> None:
    """Load from every worker, and a SIGKILL in the middle of it; `aimed` at a moment when a transaction is committed."""
    problems: list[BaseException] = []

    def load(worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=load, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    if aimed:
        target = [str(mounted.image), str(commit_word_at(mounted.image)), str(mounted.pid), str(after_s)]
        command = [sys.executable, "-I", "-S", "-c", SNIPER, *target]
        mounted.kill(lambda: subprocess.run(command, check=True))
    else:
        time.sleep(after_s)
        mounted.kill()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def kill_a_mount(mounted: Mounted, after_s: float) -> None:
    """Kill a daemon while it starts: recovery itself may be interrupted."""
    starting = warm.warm().start(["mount", "--foreground", "--image", str(mounted.image), str(mounted.path)])
    time.sleep(after_s)
    os.kill(starting.pid, signal.SIGKILL)
    starting.wait(COMMAND_S)


def lane(mounted: Mounted, seed: int) -> str:
    choose = random.Random(seed)
    workers = [Worker(mounted.fresh_directory(), choose.randrange(1 << 32)) for _ in range(WORKERS)]
    finished = halfway = replayed = 0
    for kill in range(KILLS):
        try:
            crash(mounted, workers, choose.uniform(0, LOAD_S_MAX), aimed=kill % 2 == 1)
            replayed += committed(mounted.image)
            mounted.fsck()
            while choose.random() < 0.2:
                kill_a_mount(mounted, choose.uniform(0, START_S_MAX))
            mounted.mount()
            for worker in workers:
                if worker.pending is not None:
                    halfway += 1
                finished += worker.verify()
        except BaseException as problem:
            raise AssertionError(f"seed {seed}, kill {kill}: {problem}") from problem
    done = sum(worker.done for worker in workers)
    assert done > KILLS, "the load hardly did anything"
    assert replayed > KILLS // 10, f"only {replayed} of {KILLS} kills fell between a commit and its end"
    return (
        f"seed {seed}: {KILLS} kills, {replayed} with a transaction to replay, {done} calls acknowledged, "
        f"{halfway} under way at a kill, {finished} of them done"
    )


@pytest.mark.slow
def test_kills_under_load(make_mount: Maker) -> None:
    seed = fresh_seed()
    print(f"DAXFS_TEST_SEED={seed} chooses the same calls and moments again")
    lanes = [make_mount(size="64M", watchdog_s=100 + 2 * KILLS) for _ in range(2)]
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
