"""Several processes on the same files at once: nobody ever sees bytes of another file, another place, or half a block."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daxfs import client
from tests.mount import syscalls
from tests.mount.harness import Mounted
from tests.mount.pincase import BLOCK, PUNCH

BLOCKS = 64
SECONDS = 4.0


def block_of(file: int, index: int, version: int) -> bytes:
    """A block that says whose it is: file, place and version, over and over."""
    return (b"%d %04d %08d\n" % (file, index, version)) * (BLOCK // 16)


def judge(file: int, index: int, data: bytes) -> None:
    """A block is all zeros, or of one version of this place of this file."""
    if data.strip(b"\0"):
        assert data == data[:16] * (BLOCK // 16), f"file {file} block {index} is of two versions: {data[:16]!r}"
        assert data[:7] == b"%d %04d " % (file, index), f"file {file} block {index} has {data[:16]!r}"


def write(path: Path, file: int, rng: random.Random) -> None:
    first = rng.randrange(BLOCKS)
    count = rng.randint(1, min(16, BLOCKS - first))
    version = rng.randrange(10**8)
    with open(path, "r+b", buffering=0) as f:
        os.pwrite(f.fileno(), b"".join(block_of(file, n, version) for n in range(first, first + count)), first * BLOCK)


def cut(path: Path, file: int, rng: random.Random) -> None:
    """Truncate or punch whole blocks: what is taken away is soon part of the other file."""
    first = rng.randrange(BLOCKS)
    if rng.random() < 0.5:
        os.truncate(path, first * BLOCK)
    else:
        with open(path, "r+b", buffering=0) as f:
            syscalls.fallocate(f.fileno(), PUNCH, first * BLOCK, rng.randint(1, 20) * BLOCK)


def read(path: Path, file: int, rng: random.Random) -> None:
    first = rng.randrange(BLOCKS)
    with open(path, "rb", buffering=0) as f:
        data = os.pread(f.fileno(), rng.randint(1, 32) * BLOCK, first * BLOCK)
    assert len(data) % BLOCK == 0
    for n in range(len(data) // BLOCK):
        judge(file, first + n, data[n * BLOCK : (n + 1) * BLOCK])


def map_privately(path: Path, file: int, rng: random.Random) -> None:
    """Pages of a fresh mapping, as long as the file is long enough; each page is read once."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size:
            first = rng.randrange(size // BLOCK)
            try:
                mapping = mmap.mmap(f.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
            except ValueError:  # mmap looked again: the file is shorter by now
                return
            with mapping as view:
                out, into = os.pipe()
                try:  # through a pipe: a page that has gone meanwhile is EFAULT, not SIGBUS
                    os.write(into, memoryview(view)[first * BLOCK : (first + 1) * BLOCK])
                    judge(file, first, os.read(out, BLOCK))
                except OSError as problem:
                    if problem.errno != errno.EFAULT:
                        raise
                finally:
                    os.close(out)
                    os.close(into)


def test_nobody_sees_foreign_bytes(mount: Mounted) -> None:
    """Two files that trade blocks all the time: two writers, two cutters, three readers."""
    paths = [mount.path / "file-0", mount.path / "file-1"]
    for path in paths:
        path.write_bytes(b"")
    work: tuple[Callable[[Path, int, random.Random], None], ...] = (write, write, cut, cut, read, read, map_privately)
    children = []
    for number, act in enumerate(work):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                rng, end = random.Random(number), time.monotonic() + SECONDS
                while time.monotonic() < end:
                    file = rng.randrange(2)
                    act(paths[file], file, rng)
                status = 0
            except BaseException as problem:
                os.write(2, f"{act.__name__}: {problem!r}\n".encode())
            finally:
                os._exit(status)
        children.append(pid)
    results = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert results == [0] * len(work), [act.__name__ for act, result in zip(work, results, strict=True) if result]
    for file, path in enumerate(paths):
        data = path.read_bytes()
        for n in range(len(data) // BLOCK):
            judge(file, n, data[n * BLOCK : (n + 1) * BLOCK])


def test_s16_pin_and_truncate_at_the_same_time(mount: Mounted) -> None:
    """The pin got the old block and the truncate saw it, or the pin failed; never a pin of a freed or a stranger's block."""
    path, other = mount.path / "A", mount.path / "other"
    granted = 0
    for round_ in range(300):
        path.write_bytes(block_of(1, 0, round_))
        barrier = threading.Barrier(2)
        pins: list[client.Pin | int] = []

        def take(barrier: threading.Barrier = barrier, pins: list[client.Pin | int] = pins) -> None:
            with client.open(path) as file:
                barrier.wait()
                time.sleep(random.random() * 0.0005)
                try:
                    pin = file.pin(0, BLOCK)
                except client.PinError as problem:
                    pins.append(problem.errno or 0)
                    return
                other.write_bytes(block_of(2, 0, 0))  # takes the block if it is to be had
                pins.append(pin)
                assert bytes(pin.map()) == block_of(1, 0, round_), "the pin is of a block that is not A's"

        thread = threading.Thread(target=take)
        thread.start()
        barrier.wait()
        time.sleep(random.random() * 0.0005)
        os.truncate(path, 0)
        thread.join()
        assert len(pins) == 1, "the holder failed"
        if isinstance(pins[0], int):
            assert pins[0] in (errno.ENXIO, errno.EFAULT), pins
        else:
            granted += 1
    assert 0 < granted < 300, "both orders have to be seen"
    assert other.read_bytes() in (b"", block_of(2, 0, 0))


def test_many_descriptors_and_processes_append(mount: Mounted) -> None:
    """O_APPEND of six processes: no line is lost, torn or twice."""
    path = mount.path / "log"
    path.write_bytes(b"")
    children = []
    for child in range(6):
        pid = os.fork()
        if pid == 0:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            for n in range(300):
                os.write(fd, b"%d %d %s\n" % (child, n, b"x" * (n * 7 % 500)))
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 6
    lines = path.read_bytes().splitlines()
    assert sorted(lines) == sorted(b"%d %d %s" % (c, n, b"x" * (n * 7 % 500)) for c in range(6) for n in range(300))
