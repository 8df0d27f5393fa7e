"""A holder that misbehaves: an errno each, the daemon's memory bounded, nobody else slowed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import abi, client
from daxfs.client import PinError, calls
from tests.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted, alive, eventually
from tests.pins.holders import BLOCK, Holder

pytestmark = pytest.mark.mount

TOP = (1 << 64) - 1


@pytest.fixture
def file(shared_mount: Mounted) -> Path:
    path = shared_mount.fresh_directory() / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    return path


@contextmanager
def watched(mounted: Mounted, slowest_s: float) -> Iterator[None]:
    """Somebody else uses the mount meanwhile: none of his calls may take longer."""
    path = mounted.fresh_directory() / "bystander"
    path.write_bytes(b"b" * BLOCK)
    stop, times = threading.Event(), [0.0]

    def look() -> None:
        fd = os.open(path, os.O_RDWR)
        while not stop.is_set():
            started = time.monotonic()
            os.pwrite(fd, b"c" * BLOCK, 0)
            os.statvfs(mounted.path)
            os.stat(path)
            times.append(time.monotonic() - started)
        os.close(fd)

    bystander = threading.Thread(target=look)
    bystander.start()
    try:
        yield
    finally:
        stop.set()
        bystander.join()
    assert len(times) > 2
    assert max(times) < slowest_s, f"a call took {max(times):.3f} s"


def memory_mib(mounted: Mounted) -> float:
    pages = int(Path(f"/proc/{mounted.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


@pytest.mark.parametrize(
    ("offset", "length", "flags", "code"),
    [
        (0, 0, abi.FOLL_PIN, errno.EINVAL),
        (1, BLOCK, abi.FOLL_PIN, errno.EINVAL),
        (0, BLOCK - 1, abi.FOLL_PIN, errno.EINVAL),
        (0, 9 * BLOCK, abi.FOLL_PIN, errno.ENXIO),
        (8 * BLOCK, BLOCK, abi.FOLL_PIN, errno.ENXIO),
        (TOP, BLOCK, abi.FOLL_PIN, errno.EINVAL),
        (TOP - BLOCK + 1, BLOCK, abi.FOLL_PIN, errno.ENXIO),
        (0, TOP - BLOCK + 1, abi.FOLL_PIN, errno.ENXIO),
        (TOP - BLOCK + 1, TOP - BLOCK + 1, abi.FOLL_PIN | abi.FOLL_WRITE, errno.ENXIO),
        (0, TOP, abi.FOLL_PIN, errno.EINVAL),
        (1 << 63, 1 << 63, abi.FOLL_PIN, errno.ENXIO),
        (0, BLOCK, 0, errno.EINVAL),
        (0, BLOCK, abi.FOLL_PIN | abi.FOLL_GET, errno.EINVAL),
        (0, BLOCK, abi.FOLL_LONGTERM, errno.EINVAL),
        (0, BLOCK, abi.FOLL_PIN | 1 << 5, errno.EINVAL),
        (0, BLOCK, (1 << 32) - 1, errno.EINVAL),
        (0, BLOCK, abi.PIN_ON_DEMAND | abi.FOLL_PIN, errno.EINVAL),
    ],
)
def test_ranges_and_flags_that_make_no_sense(file: Path, offset: int, length: int, flags: int, code: int) -> None:
    with client.open(file, "r+") as opened:
        with pytest.raises(PinError) as caught:
            calls.pin(opened.fileno(), offset, length, flags)
        assert caught.value.errno == code
        assert client.pins(file.parent) == []


def test_ids_of_others_and_ids_twice(file: Path) -> None:
    with client.open(file) as mine, client.open(file) as other:
        pin_id, _, _ = calls.pin(mine.fileno(), 0, BLOCK, abi.FOLL_PIN)
        for fd, wrong in ((other.fileno(), pin_id), (mine.fileno(), pin_id + 1), (mine.fileno(), 0), (mine.fileno(), TOP)):
            for call in (
                lambda: calls.unpin(fd, wrong, dirty=True),
                lambda: calls.pin_runs(fd, wrong),
                lambda: calls.label(fd, wrong, "mine"),
                lambda: calls.acknowledge(fd, wrong),
            ):
                with pytest.raises(PinError) as caught:
                    call()
                assert caught.value.errno == errno.ENOENT
        calls.unpin(mine.fileno(), pin_id, dirty=False)
        with pytest.raises(PinError) as caught:
            calls.unpin(mine.fileno(), pin_id, dirty=False)
        assert caught.value.errno == errno.ENOENT
        assert client.info(file)["pinned"] == 0


def test_ioctls_of_wrong_sizes_and_numbers(file: Path) -> None:
    """Every number near ours with every size, with random bytes: an errno, and the daemon is well."""
    chance = random.Random(1)
    with client.open(file, "r+") as opened:
        for number in range(16):
            for size in (0, 1, 7, 8, 16, 24, 32, 40, 48, 64, 4096, 8192, (1 << 14) - 1):
                for direction in (1, 2, 3):
                    buffer = bytearray(chance.randbytes(size))
                    code = direction << 30 | size << 16 | abi.IOC_TYPE << 8 | number
                    if code == abi.IOC_ADMIN:
                        continue  # as root this would remove the device, now and then
                    try:
                        fcntl.ioctl(opened.fileno(), code, buffer, True)
                    except OSError as problem:
                        known = {errno.ENOTTY, errno.EINVAL, errno.ENOENT, errno.ENXIO, errno.EAGAIN, errno.EFAULT}
                        assert problem.errno in known, (number, size, problem)  # noqa: PT017
        assert opened.info()["failed"] == ""


def test_a_million_tiny_pins(make_mount: Maker) -> None:
    """One process, as many pins as it gets: it is told to stop, the daemon's memory is bounded, and nobody else is slowed,
    neither while it pins nor when its descriptors close all at once."""
    mounted = make_mount(size="64M", watchdog_s=400)
    path = mounted.path / "file"
    path.write_bytes(b"f" * 256 * BLOCK)
    before = memory_mib(mounted)
    program = (
        "import sys; from daxfs import client; from daxfs.client import calls\n"
        "files = [client.open(sys.argv[1]) for _ in range(5)]\n"
        "taken = 0\n"
        "for file in files:\n"
        "    try:\n"
        "        while True:\n"
        "            calls.pin(file.fileno(), taken % 256 * 4096, 4096, client.FOLL_PIN); taken += 1\n"
        "    except OSError as problem: code = problem.errno\n"
        "print(taken, code, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        assert hog.stdin is not None
        with watched(mounted, 1.0):
            taken, code = map(int, hog.stdout.readline().split())
        assert code == errno.ENOMEM
        assert 100_000 < taken <= 1 << 20
        assert memory_mib(mounted) - before < 512
        with client.open(path) as opened, opened.pin(0, BLOCK):  # others still may
            pass
        started = time.monotonic()
        with watched(mounted, 1.0):
            hog.kill()
            hog.wait(10)
            eventually("its pins are gone", lambda: client.status(mounted.path)["pins"] == 0, within_s=60)
        assert time.monotonic() - started < 60
    os.truncate(path, 0)
    assert client.info(mounted.path)["busy"] == 0


def test_a_truncate_waits_for_very_many_pins(make_mount: Maker) -> None:
    """Neither they nor the wait slow anybody: not who pins behind it, not who is held back, not who gives them back."""
    mounted = make_mount(size="64M", options="policy=wait,wait_s=60")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    program = (
        "import sys; from daxfs import client; from daxfs.client import calls\n"
        "file = client.open(sys.argv[1])\n"
        "ids = [calls.pin(file.fileno(), 0, 4096, client.FOLL_PIN)[0] for _ in range(20_000)]\n"
        "print(flush=True); sys.stdin.readline()\n"
        "for _ in range(50): ids.append(calls.pin(file.fileno(), 4096, 4096, client.FOLL_PIN)[0])\n"
        "for pin in ids[:500] + ids[-500:]: calls.unpin(file.fileno(), pin, dirty=False)\n"
        "print(flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        with subprocess.Popen(["truncate", "-s", "0", path]) as waiting, client.open(path) as other:
            eventually("it waits", lambda: client.status(mounted.path)["waiting"] == 1)
            with watched(mounted, 1.0):
                for _ in range(50):
                    with pytest.raises(PinError) as caught:
                        other.pin(0, BLOCK, wait=False)
                    assert caught.value.errno == errno.EAGAIN
                holder.stdin.write(b"\n")
                holder.stdin.flush()
                holder.stdout.readline()
            assert waiting.poll() is None
            holder.kill()
            assert waiting.wait(20) == 0
    assert path.stat().st_size == 0


def test_leases_without_end(shared_mount: Mounted, file: Path) -> None:
    """There is a limit; a truncate that breaks them all, and giving them back, makes room."""
    with client.open(file) as opened:
        for give_back in (lambda: os.truncate(file, 0), lambda: calls.lease(opened.fileno(), 0, 0, abi.LEASE_RELEASE)):
            taken = 0
            with pytest.raises(PinError) as caught:
                while taken < 10_000:
                    opened.lease(0, BLOCK)
                    taken += 1
            assert (caught.value.errno, taken) == (errno.ENOMEM, 256)
            os.truncate(file, 8 * BLOCK)
            give_back()
            assert client.status(file.parent)["leases"] == 0
        assert len(list(iter(opened.next_event, None))) == 256


def test_reports_that_nobody_reads() -> None:
    """The daemon keeps a bounded amount of them: who comes too late hears that he has to ask again."""
    from daxfs.daemon.service import Reports
    from daxfs.errors import FsError

    reports, size = Reports(), Reports.BYTES_MAX // 4
    for fh in range(100):
        reports.keep(fh, bytes(size))
        assert reports.bytes <= Reports.BYTES_MAX
    assert [len(reports.text(fh)) for fh in range(96, 100)] == [size] * 4
    with pytest.raises(FsError) as caught:
        reports.text(95)
    assert caught.value.errno == errno.ESTALE
    reports.keep(99, b"new")
    assert reports.text(99) == b"new"
    for fh in range(100):
        reports.drop(fh)
    assert reports.bytes == 0


def test_an_ordinary_user_cannot_have_blocks_given_away(shared_mount: Mounted, file: Path) -> None:
    """Policy unsafe of a file is for root and who mounted: its holders get at what others write later."""
    file.chmod(0o666)
    program = (
        "import os, sys; os.setresuid(65534, 65534, 65534)\n"
        "os.setxattr(sys.argv[1], 'user.daxfs.policy', b'wait')\n"
        "try: os.setxattr(sys.argv[1], 'user.daxfs.policy', b'unsafe')\n"
        "except PermissionError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr
    assert os.getxattr(file, "user.daxfs.policy") == b"wait"
    os.setxattr(file, "user.daxfs.policy", b"unsafe")


def test_pins_and_unpins_for_ever_leave_nothing(shared_mount: Mounted, file: Path) -> None:
    with client.open(file, "r+") as opened:

        def around(times: int) -> None:
            for _ in range(times):
                pin_id, _, _ = calls.pin(opened.fileno(), 0, 8 * BLOCK, abi.FOLL_PIN)
                calls.unpin(opened.fileno(), pin_id, dirty=False)

        around(2000)
        before = memory_mib(shared_mount)
        around(10_000)
        assert memory_mib(shared_mount) - before < 8


def test_events_that_nobody_reads(make_mount: Maker) -> None:
    """The queue keeps the newest 256 and says how many it lost."""
    mounted = make_mount(size="64M")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    with client.open(path) as opened, opened.pin(0, 8 * BLOCK) as pin:
        (start, _), *_ = pin.runs
        before = memory_mib(mounted)
        for n in range(1000):
            client.poison(path, start + n % 4, 1)
        assert memory_mib(mounted) - before < 8
        events = list(iter(opened.next_event, None))
        assert len(events) == 256
        assert events[0].lost == 744
        assert all(event.lost == 0 for event in events[1:])


def test_a_stopped_holder_stops_nobody(make_mount: Maker) -> None:
    """S53, S13: a truncate waits for a holder that is stopped, all others go on; a signal ends the wait."""
    mounted = make_mount(size="64M", options="policy=wait")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    with Holder(path) as holder:
        holder.pin(0, 8)
        os.kill(holder.pid, signal.SIGSTOP)
        with subprocess.Popen(["truncate", "-s", "0", path]) as waiting, watched(mounted, 1.0):
            eventually("it waits", lambda: client.status(mounted.path)["waiting"] == 1)
            time.sleep(0.5)
            assert waiting.poll() is None
            waiting.kill()
            waiting.wait(5)
        eventually("nobody waits", lambda: client.status(mounted.path)["waiting"] == 0)
        assert path.stat().st_size == 8 * BLOCK
        holder.end(signal.SIGKILL)
    os.truncate(path, 0)


def test_a_holder_that_never_acknowledges(make_mount: Maker) -> None:
    """S60: it is fenced after the time-out, what it could reach is kept from everybody, and the truncate goes on."""
    mounted = make_mount(size="16M", options="invalidate_s=0.5")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    with Holder(path) as holder:
        pin_id = holder.pin(0, 8, on_demand=True)
        before = holder.ask("load", pin_id)
        os.kill(holder.pid, signal.SIGSTOP)
        started = time.monotonic()
        with watched(mounted, 1.0):
            os.truncate(path, 0)
        assert 0.5 <= time.monotonic() - started < 5
        (pin,) = client.pins(mounted.path)
        assert (pin["state"], pin["withheld"]) == ("fenced", 8 * BLOCK)
        os.kill(holder.pid, signal.SIGCONT)
        with pytest.raises(OSError), open(mounted.path / "filler", "wb", buffering=0) as filler:
            while filler.write(b"z" * (1 << 20)):
                pass
        assert holder.ask("load", pin_id) == before
    eventually("its blocks are free", lambda: client.info(mounted.path)["busy"] == 0)


def test_a_holder_that_dies_in_the_middle(shared_mount: Mounted, file: Path) -> None:
    """SIGKILL at a random moment between PIN, map, UNPIN and close, again and again: no pin and no block is left."""
    program = (
        "import sys; from daxfs import client\nprint(flush=True)\n"
        "while True:\n"
        "    with client.open(sys.argv[1], 'r+') as file, file.pin(write=True) as pin: pin.map()[:] = bytes(32768)\n"
    )
    chance = random.Random(2)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", program, str(file)], cwd=REPOSITORY, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            time.sleep(chance.random() * 0.05)
            os.truncate(file, chance.choice((0, BLOCK)))
            os.truncate(file, 8 * BLOCK)
            holder.kill()
    eventually("no pin is left", lambda: client.pins(file.parent) == [])
    eventually("nothing is busy", lambda: client.info(file)["busy"] == 0)
    assert alive(shared_mount.pid)
