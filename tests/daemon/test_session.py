"""The native session against a real mount: onefile.py serves it in a process of its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.harness import eventually

BLOCK = 4096
SIZE = 600 * BLOCK - 100
MIB = 1 << 20
COUNTERS, CRASH, DROP, PARK, TWICE, UNPARK, GROW, TELL, HIDE, WAKE, WORK, LET_GO = range(1, 13)  # as in onefile.py
KEPT_FROM = 1 << 40  # of onefile.py

pytestmark = pytest.mark.mount


class Mount:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "tests.daemon.onefile", str(path)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n", self.log.read_text()

    def open(self, name: str = "file", flags: int = os.O_RDWR) -> int:
        return os.open(self.path / name, flags)

    def counters(self) -> dict[str, int]:
        fd = self.open()
        try:
            counted: dict[str, int] = json.loads(command(fd, COUNTERS).rstrip(b"\0"))
        finally:
            os.close(fd)
        return counted

    def end(self) -> None:
        # The `io` stressor of the other test process opens every mount it finds.
        eventually("it is unmounted", lambda: not subprocess.run(["fusermount3", "-u", self.path]).returncode, 10)
        output, _ = self.server.communicate(timeout=20)
        assert self.server.returncode == 0, self.log.read_text()
        assert "hot_reads" in json.loads(output)


def command(fd: int, number: int) -> bytes:
    """One of onefile.py's ioctls."""
    data = bytearray(BLOCK)
    fcntl.ioctl(fd, 3 << 30 | BLOCK << 16 | 0xDB << 8 | number, data)
    return bytes(data)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    path = tmp_path / "mnt"
    path.mkdir()
    mounted = Mount(path)
    try:
        yield mounted
        mounted.end()
    finally:
        mounted.server.kill()
        mounted.server.communicate()
        subprocess.run(["fusermount3", "-uqz", path], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def fd(mount: Mount) -> Iterator[int]:
    fd = mount.open()
    yield fd
    os.close(fd)


@contextlib.contextmanager
def counted(mount: Mount, **expected: int) -> Iterator[None]:
    """The session's counters move by so much."""
    before = mount.counters()
    yield
    after = mount.counters()
    assert {name: after[name] - before[name] for name in expected} == expected


def random_bytes(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited for 5 s in vain")


# -- data -------------------------------------------------------------------------------------------------------------


def test_holes_and_unwritten_extents_read_as_zeros(fd: int) -> None:
    os.pwrite(fd, b"x" * 4 * BLOCK, 0)
    assert os.pread(fd, 9 * BLOCK, 0) == b"x" * 4 * BLOCK + bytes(5 * BLOCK)


def test_random_reads_and_writes_are_those_of_a_model(mount: Mount, fd: int) -> None:
    seed = 4711
    rng = random.Random(seed)
    model = bytearray(SIZE)
    for step in range(2000):
        offset = rng.randrange(SIZE + BLOCK)
        length = rng.choice([1, 100, BLOCK, BLOCK * 3, rng.randrange(1, 300_000)])
        if rng.random() < 0.5:
            assert os.pread(fd, length, offset) == model[offset : offset + length], f"seed {seed} step {step}"
        else:
            data = rng.randbytes(length)
            if offset > len(model):
                model += bytes(offset - len(model))
            model[offset : offset + length] = data
            assert os.pwrite(fd, data, offset) == length
    assert os.pread(fd, MIB, 0) == model[:MIB]
    assert os.fstat(fd).st_size == len(model)
    assert mount.counters()["hot_writes"] > 500


def test_reads_and_writes_in_place_are_hot(mount: Mount, fd: int) -> None:
    size = MIB - BLOCK  # wherever the buffer starts, it has no more than the 256 pages that a request carries
    data = random_bytes(1, size)
    with counted(mount, hot_writes=1, hot_write_bytes=size, hot_reads=2, hot_read_bytes=size + 10):
        assert os.pwrite(fd, data, 8 * BLOCK) == size
        assert os.pread(fd, size, 8 * BLOCK) == data
        assert os.pread(fd, 100, SIZE - 10) == bytes(10)


def test_what_is_not_in_place_is_for_python(mount: Mount, fd: int) -> None:
    with counted(mount, hot_writes=0):
        assert os.pwrite(fd, b"hole", 4 * BLOCK) == 4
        assert os.pwrite(fd, b"unwritten", 6 * BLOCK) == 9
        assert os.pwrite(fd, b"beyond", SIZE - 1) == 6
    with counted(mount, hot_writes=2):
        assert os.pwrite(fd, b"HO", 4 * BLOCK) == 2
        assert os.pwrite(fd, b"UNWRI", 6 * BLOCK) == 5
    assert os.pread(fd, 4, 4 * BLOCK) == b"HOle"
    assert os.pread(fd, 9, 6 * BLOCK) == b"UNWRItten"
    assert os.pread(fd, 100, SIZE - 2) == b"\0beyond"


def test_append_is_for_python(mount: Mount) -> None:
    fd = mount.open(flags=os.O_RDWR | os.O_APPEND)
    with counted(mount, hot_writes=0):
        assert os.write(fd, b"end") == 3
        assert os.pwrite(fd, b"END", 0) == 3  # Linux appends this one, too
    assert os.pread(fd, 10, SIZE) == b"endEND"
    os.close(fd)


def test_a_read_of_too_many_pieces_is_for_python(mount: Mount) -> None:
    fd = mount.open("pieces")
    data = random_bytes(2, MIB)
    for at in range(0, MIB, BLOCK):
        os.pwrite(fd, data[at : at + BLOCK], at)
    with counted(mount, hot_reads=0):
        assert os.pread(fd, 513 * 512, 0) == data[: 513 * 512]
    with counted(mount, hot_reads=1):
        assert os.pread(fd, 512 * 512, 0) == data[: 512 * 512]
    os.close(fd)


def test_a_read_beyond_the_image_is_an_error(mount: Mount) -> None:
    fd = mount.open("short")
    assert os.pread(fd, BLOCK, 0) == bytes(BLOCK)
    with pytest.raises(OSError) as caught:
        os.pread(fd, 3 * BLOCK, 0)
    assert caught.value.errno == errno.EIO
    assert os.pread(fd, BLOCK, 0) == bytes(BLOCK)
    os.close(fd)


def test_times_of_hot_requests(fd: int) -> None:
    """Writes move mtime and ctime, reads move atime as relatime does."""
    before = os.fstat(fd)
    started = time.time_ns()
    os.pread(fd, 1, 0)
    first = os.fstat(fd)
    assert first.st_mtime_ns == before.st_mtime_ns
    assert started <= first.st_atime_ns <= time.time_ns()
    os.pread(fd, 1, 0)
    assert os.fstat(fd).st_atime_ns == first.st_atime_ns
    started = time.time_ns()
    os.pwrite(fd, b"x", 0)
    written = os.fstat(fd)
    assert started <= written.st_mtime_ns == written.st_ctime_ns <= time.time_ns()
    assert written.st_atime_ns == first.st_atime_ns
    os.pread(fd, 1, 0)
    assert os.fstat(fd).st_atime_ns > written.st_mtime_ns


def test_noatime_descriptor(mount: Mount) -> None:
    fd = mount.open(flags=os.O_RDONLY | os.O_NOATIME)
    before = os.fstat(fd).st_atime_ns
    os.pread(fd, BLOCK, 0)
    assert os.fstat(fd).st_atime_ns == before
    os.close(fd)


def test_truncate_is_seen_by_the_next_read(fd: int) -> None:
    os.pwrite(fd, b"x" * BLOCK, 0)
    os.ftruncate(fd, 1000)
    assert os.pread(fd, BLOCK, 0) == b"x" * 1000
    os.ftruncate(fd, 3 * BLOCK)
    assert os.pread(fd, 4 * BLOCK, BLOCK) == bytes(2 * BLOCK)


# -- what pyfuse3 does not know -----------------------------------------------------------------------------------------


def test_punch(mount: Mount, fd: int) -> None:
    os.pwrite(fd, b"x" * 4 * BLOCK, 0)
    where = ["-o", str(BLOCK), "-l", str(BLOCK), str(mount.path / "file")]
    subprocess.run(["fallocate", "-p", *where], check=True)
    assert os.pread(fd, 4 * BLOCK, 0) == b"x" * BLOCK + bytes(BLOCK) + b"x" * 2 * BLOCK
    refused = subprocess.run(["fallocate", "-z", *where], capture_output=True, text=True, check=False)
    assert os.strerror(errno.EOPNOTSUPP) in refused.stderr


def test_seek(fd: int) -> None:
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 4 * BLOCK
    assert os.lseek(fd, 4 * BLOCK, os.SEEK_DATA) == 6 * BLOCK
    with pytest.raises(OSError) as caught:
        os.lseek(fd, SIZE, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO


def test_copy_file_range(fd: int) -> None:
    data = random_bytes(3, 4 * BLOCK)
    os.pwrite(fd, data, 0)
    assert os.copy_file_range(fd, fd, 4 * BLOCK, 0, 100 * BLOCK) == 4 * BLOCK
    assert os.pread(fd, 4 * BLOCK, 100 * BLOCK) == data


def test_ioctl(fd: int) -> None:
    assert json.loads(command(fd, COUNTERS).rstrip(b"\0"))["raw"] > 0
    with pytest.raises(OSError) as caught:
        command(fd, 99)
    assert caught.value.errno == errno.ENOTTY


def test_other_opcodes_go_to_pyfuse3(mount: Mount) -> None:
    with counted(mount, raw=2):  # the second count's own open and ioctl
        with pytest.raises(FileNotFoundError):
            os.stat(mount.path / "nothing")
        assert os.stat(mount.path / "file").st_size == SIZE


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_shared_mapping_is_coherent_both_ways(fd: int) -> None:
    with mmap.mmap(fd, 16 * BLOCK) as mapping:
        assert mapping[:5] == bytes(5)
        os.pwrite(fd, b"first", 0)
        assert mapping[:5] == b"first"
        mapping[2:5] = b"XYZ"
        assert os.pread(fd, 5, 0) == b"fiXYZ"
        mapping[4 * BLOCK : 4 * BLOCK + 3] = b"new"  # into the hole
        assert os.pread(fd, 3, 4 * BLOCK) == b"new"
        os.pwrite(fd, b"again", 4 * BLOCK)
        assert mapping[4 * BLOCK : 4 * BLOCK + 5] == b"again"


def test_random_mapped_and_direct_operations(fd: int) -> None:
    seed = 99
    rng = random.Random(seed)
    model = bytearray(64 * BLOCK)
    with mmap.mmap(fd, 64 * BLOCK) as mapping:
        for step in range(1000):
            length = rng.choice([1, 100, BLOCK, rng.randrange(1, 3 * BLOCK)])
            offset = rng.randrange(len(model) - length)
            data = rng.randbytes(length)
            match rng.randrange(4):
                case 0:
                    os.pwrite(fd, data, offset)
                    model[offset : offset + length] = data
                case 1:
                    mapping[offset : offset + length] = data
                    model[offset : offset + length] = data
                case 2:
                    assert os.pread(fd, length, offset) == model[offset : offset + length], f"seed {seed} step {step}"
                case 3:
                    assert mapping[offset : offset + length] == model[offset : offset + length], f"seed {seed} step {step}"


# -- notifications ----------------------------------------------------------------------------------------------------


def test_cached_attributes_and_names_are_dropped(mount: Mount, fd: int) -> None:
    path = mount.path / "pieces"
    assert path.stat().st_size == MIB
    command(fd, GROW)
    assert path.stat().st_size == MIB  # the kernel's
    command(fd, TELL)
    assert path.stat().st_size == MIB + 1
    command(fd, HIDE)  # answered by a thread
    assert not path.exists()


def test_pollers_are_woken(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(20) == []
    threading.Timer(0.05, command, (fd, WAKE)).start()
    assert poll.poll(5000) == [(fd, select.POLLIN)]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [CRASH, DROP])
def test_a_bug_answers_eio(mount: Mount, fd: int, what: int) -> None:
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            command(fd, what)
        assert caught.value.errno == errno.EIO
    assert mount.counters()["crashes"] == (3 if what == CRASH else 0)
    assert os.pread(fd, 1, 0) == b"\0"
    assert ("asked for" if what == CRASH else "dropped") in mount.log.read_text()


def test_a_second_answer_is_a_bug(mount: Mount, fd: int) -> None:
    command(fd, TWICE)
    assert mount.counters()["crashes"] == 1
    assert "answered already" in mount.log.read_text()


def caller(mount: Mount, number: int) -> subprocess.Popen[str]:
    """A process that hangs in an ioctl, and tells how it ended."""
    code = (
        "import fcntl, os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "print('ready', flush=True)\n"
        "try: fcntl.ioctl(fd, int(sys.argv[2]), bytearray(4096)); print('done')\n"
        "except OSError as exc: print(exc.errno)\n"
    )
    words = [sys.executable, "-c", code, str(mount.path / "file"), str(3 << 30 | BLOCK << 16 | 0xDB << 8 | number)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_caller_goes_at_once(mount: Mount, fd: int) -> None:
    callers = [caller(mount, PARK) for _ in range(3)]
    wait_until(lambda: mount.counters()["waiting"] == 3)
    for process in callers:
        process.kill()
        assert process.wait(5) == -signal.SIGKILL
        process.communicate()
    wait_until(lambda: mount.counters()["interrupts"] == 3)
    command(fd, UNPARK)
    assert os.pread(fd, 1, 0) == b"\0"


def test_a_signalled_caller_gets_eintr(mount: Mount) -> None:
    process = caller(mount, PARK)
    wait_until(lambda: mount.counters()["waiting"] == 1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=5)
    assert output == f"{errno.EINTR}\n"


def test_a_kept_request_is_answered_later(mount: Mount, fd: int) -> None:
    process = caller(mount, PARK)
    wait_until(lambda: mount.counters()["waiting"] == 1)
    command(fd, UNPARK)
    output, _ = process.communicate(timeout=5)
    assert output == "done\n"


def test_a_mount_that_goes_under_its_callers(tmp_path: Path) -> None:
    """A lazy unmount, an aborted connection: the server ends by itself, parked requests or not."""
    path = tmp_path / "mnt"
    path.mkdir()
    mount = Mount(path)
    process = caller(mount, PARK)
    wait_until(lambda: mount.counters()["waiting"] == 1)
    minor = os.minor(os.stat(path).st_dev)
    subprocess.run(["fusermount3", "-uz", path], check=True)
    if os.geteuid() == 0:
        abort = Path(f"/sys/fs/fuse/connections/{minor}/abort")
        if not abort.exists():
            subprocess.run(["mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections"], check=True)
        abort.write_text("1")
    else:
        process.kill()
    process.communicate(timeout=5)
    output, _ = mount.server.communicate(timeout=10)
    assert mount.server.returncode == 0, mount.log.read_text()
    assert json.loads(output)["raw"] > 0


def test_many_callers_at_once(mount: Mount) -> None:
    code = (
        "import os, random, sys\n"
        "me = int(sys.argv[2])\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "for n in range(500):\n"
        "    at = (8 + me * 100 + n % 90) * 4096\n"
        "    data = bytes([n % 256, me]) * 2048\n"
        "    assert os.pwrite(fd, data, at) == 4096\n"
        "    assert os.stat(sys.argv[1]).st_size\n"
        "    assert os.pread(fd, 4096, at) == data\n"
    )
    path = str(mount.path / "file")
    processes = [subprocess.Popen([sys.executable, "-c", code, path, str(me)]) for me in range(5)]
    assert [process.wait(60) for process in processes] == [0] * 5


# -- turns, and want of memory ----------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def test_an_idle_mount_takes_no_cpu(mount: Mount, fd: int) -> None:
    for _ in range(1000):
        os.pread(fd, BLOCK, 0)
    time.sleep(0.1)
    before = cpu_s(mount.server.pid)
    time.sleep(1)
    assert cpu_s(mount.server.pid) - before < 0.005


def test_a_flood_of_hot_requests_leaves_trio_its_turn(mount: Mount, fd: int) -> None:
    code = "import os, sys\nfd = os.open(sys.argv[1], os.O_RDWR)\nwhile True: os.pread(fd, 4096, 0); os.pwrite(fd, b'x', 0)"
    flood = [subprocess.Popen([sys.executable, "-c", code, str(mount.path / "file")]) for _ in range(4)]
    try:
        start = mount.counters()["hot_writes"]
        wait_until(lambda: mount.counters()["hot_writes"] > start + 1000)
        before = mount.counters()
        command(fd, WORK)
        after = mount.counters()
        assert 0 < after["hot_reads"] - before["hot_reads"] < 100_000, "trio had to wait very long"
        assert [process.poll() for process in flood] == [None] * 4
    finally:
        for process in flood:
            process.kill()
            process.wait()


@contextlib.contextmanager
def no_more_memory(pid: int) -> Iterator[None]:
    """The process can have no more address space than it has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS, (pages * mmap.PAGESIZE, -1))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))


def written(fd: int, data: bytes) -> bool:
    """False: ENOMEM."""
    try:
        return os.pwrite(fd, data, KEPT_FROM) == len(data)
    except OSError as e:
        if e.errno != errno.ENOMEM:
            raise
        return False


def test_without_memory_for_a_request(mount: Mount, fd: int) -> None:
    """It is refused, with ENOMEM; hot ones need none, and the session lives."""
    data = [random_bytes(n, MIB - BLOCK) for n in range(30)]
    taken = []
    with no_more_memory(mount.server.pid):
        for number, piece in enumerate(data):
            if written(fd, piece):
                taken.append(number)
        assert len(taken) < len(data), "the limit limits nothing"
        assert os.pwrite(fd, data[0], 8 * BLOCK) == len(data[0])
        assert os.pread(fd, len(data[0]), 8 * BLOCK) == data[0]
    counters = mount.counters()
    assert counters["refused"] == len(data) - len(taken)
    assert counters["crashes"] == 0
    kept = command(fd, LET_GO).rstrip(b"\0").decode()
    assert kept == hashlib.sha256(b"".join(data[number] for number in taken)).hexdigest(), "a lent buffer was used again"
    assert os.pwrite(fd, data[1], KEPT_FROM) == len(data[1])


def test_configure_and_handles_refuse_nonsense() -> None:
    from daxfs.daemon import session

    for bad in ({"max_write": 100}, {"max_write": 2 * MIB}, {"max_background": 0}, {"spin_us": -1}, {"spin_us": 1001}):
        with pytest.raises(ValueError, match="must be"):
            session.configure(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be taken"):
        session.register(26, lambda request: None)
    with pytest.raises(KeyError):
        session.detach(0)
    first, second = session.attach(keep="one"), session.attach(keep="two")
    assert (session.keeper(first), session.keeper(second)) == ("one", "two")
    session.detach(first)
    with pytest.raises(KeyError):
        session.keeper(first)
    assert session.attach() == first
    session.detach(first)
    session.detach(second)
    with pytest.raises(TypeError):
        session.Request()


def test_handles_grow() -> None:
    from daxfs.daemon import session

    handles = [session.attach(keep=n) for n in range(1000)]
    assert len(set(handles)) == 1000
    assert 0 not in handles
    assert [session.keeper(fh) for fh in handles] == list(range(1000))
    for fh in handles:
        session.detach(fh)


def test_it_must_come_before_pyfuse3() -> None:
    code = "import pyfuse3, daxfs.daemon"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "before pyfuse3" in done.stderr
