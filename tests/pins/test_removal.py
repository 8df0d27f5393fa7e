"""Taking the device away from under a mount (the 2021 thread): no new pins, holders told, drained or revoked, detached."""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daxfs import client
from daxfs.client import EventType, PinError
from daxfs.core.fsck import check
from tests.conftest import Maker
from tests.mount.harness import DAXFS, REAPED_S, REPOSITORY, Mounted, alive, daxfs, eventually
from tests.pins.holders import BLOCK, Holder

pytestmark = pytest.mark.mount


@pytest.fixture
def file(mount: Mounted) -> Path:
    path = mount.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    return path


def refused(call: Callable[[], object], *codes: int) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno in (codes or (errno.ENODEV, errno.EIO))


def removing(mount: Mounted, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DAXFS, "device", "remove", *words, str(mount.path)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )


def state(mount: Mounted) -> str:
    found: str = client.device(mount.path)["state"]
    return found


def test_nobody_holds_anything(mount: Mounted, file: Path) -> None:
    done = daxfs("device", "remove", "--json", mount.path)
    assert json.loads(done.stdout)["state"] == "removed"
    for call in (
        lambda: os.listdir(mount.path),
        lambda: file.read_bytes(),
        lambda: file.write_bytes(b"x"),
        lambda: os.stat(file),
        lambda: os.mkdir(mount.path / "dir"),
        lambda: os.rename(file, mount.path / "other"),
        lambda: os.unlink(file),
        lambda: os.statvfs(mount.path),
        lambda: client.pins(mount.path),
        lambda: client.poison(mount.path, 0, 1),
    ):
        refused(call)
    assert os.path.ismount(mount.path)
    assert json.loads((mount.path / ".daxfs" / "status.json").read_text())["device"] == "removed"
    assert client.info(mount.path)["device"] == "removed"
    assert not check(mount.image).errors
    mount.umount()
    mount.mount()
    assert file.read_bytes() == b"f" * 8 * BLOCK
    assert client.device(mount.path)["last_shutdown"] == "clean"


def test_holders_hear_it_and_are_waited_for(mount: Mounted, file: Path) -> None:
    with Holder(file) as holder, Holder(file) as other:
        pin_id = holder.pin(0, 8)
        refs = other.pin(0, 1, flags=client.FOLL_GET)
        with removing(mount, "--deadline", "60") as command:
            eventually("it is being removed", lambda: state(mount) == "removing")
            for one in (holder, other):
                assert one.ask("event")[:2] == [EventType.DEVICE_REMOVE, 0]
            refused(lambda: other.pin(4, 1), errno.ENODEV)
            refused(lambda: other.pin(4, 1, on_demand=True), errno.ENODEV)
            file.write_bytes(b"g" * 8 * BLOCK)  # all else goes on
            assert 50 < client.device(mount.path)["left_s"] <= 60
            holder.ask("unpin", pin_id)
            assert command.poll() is None
            other.ask("unpin", refs)
            assert command.wait(10) == 0
            assert command.stderr is not None
            assert "2 pins of 2 open files are left" in command.stderr.read()
        assert state(mount) == "removed"
        refused(lambda: holder.ask("read", 0, 1))
    mount.umount()
    mount.mount()
    assert file.read_bytes() == b"g" * 8 * BLOCK
    assert client.pins(mount.path) == []


def test_after_the_deadline_pins_are_revoked_and_the_blocks_stay_theirs(mount: Mounted, file: Path) -> None:
    """S64, and what a raw mapping may still reach after the image is mounted again."""
    with Holder(file) as holder:
        pin_id = holder.pin(0, 8, write=True)
        blocks = client.pins(mount.path)[0]["runs"]
        holder.ask("store", pin_id, 0x55)
        started = time.monotonic()
        daxfs("device", "remove", "--deadline", "0.5", mount.path)
        assert time.monotonic() - started >= 0.5
        assert [holder.ask("event")[0] for _ in range(2)] == [EventType.DEVICE_REMOVE, EventType.REVOKED]
        assert holder.ask("event") is None
        refused(lambda: holder.pin(0, 1), errno.ENODEV)
        daemon = mount.pid
        daxfs("umount", mount.path)  # not "target is busy"
        assert not os.path.ismount(mount.path)
        mount.mount()
        (pin,) = client.pins(mount.path)
        assert (pin["state"], pin["pid"], pin["runs"]) == ("survivor", holder.pid, blocks)
        os.unlink(file)
        holder.ask("store", pin_id, 0x66)
        with pytest.raises(OSError), open(mount.path / "filler", "wb", buffering=0) as filler:
            while filler.write(b"z" * (1 << 20)):
                pass
        with client.open(mount.path / "filler") as opened:
            taken = {e.physical + n for e in opened.extents() for n in range(e.count)}
        assert not taken & {start + n for start, count in blocks for n in range(count)}
    eventually("the old daemon has ended with its last descriptor", lambda: not alive(daemon), within_s=10)
    eventually("the survivor is gone", lambda: not client.pins(mount.path), REAPED_S)


def test_by_force_and_with_a_stopped_holder(mount: Mounted, file: Path) -> None:
    with Holder(file) as holder, Holder(file) as odp:
        holder.pin(0, 8)
        odp.pin(0, 8, on_demand=True)
        os.kill(holder.pid, signal.SIGSTOP)
        started = time.monotonic()
        daxfs("device", "remove", "--force", mount.path)
        assert time.monotonic() - started < 10
        assert [odp.ask("event")[0] for _ in range(2)] == [EventType.DEVICE_REMOVE, EventType.REVOKED]
        daxfs("umount", mount.path)
        mount.mount()


def test_a_second_call_may_be_less_patient(mount: Mounted, file: Path) -> None:
    with Holder(file) as holder:
        holder.pin()
        patient = removing(mount, "--deadline", "1000")
        eventually("it is being removed", lambda: state(mount) == "removing")
        daxfs("device", "remove", "--force", mount.path)
        patient.communicate(timeout=10)
        assert patient.returncode == 0
    mount.umount()
    mount.mount()


def test_calls_that_wait_are_answered(make_mount: Maker) -> None:
    """A truncate that waits for a pin ends when the device goes."""
    mounted = make_mount(size="16M", options="policy=wait")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    with Holder(path) as holder:
        holder.pin(0, 8, on_demand=True)
        with subprocess.Popen(["truncate", "-s", "0", path], stderr=subprocess.PIPE) as stuck:
            eventually("it waits", lambda: client.status(mounted.path)["waiting"] == 1)
            daxfs("device", "remove", "--force", mounted.path)
            assert stuck.wait(10) in (0, 1)
    mounted.umount()
    mounted.mount()


def test_a_poller_wakes(mount: Mounted, file: Path) -> None:
    with client.open(file) as opened, opened.pin():
        poller = select.poll()
        poller.register(opened.fileno(), select.POLLPRI)
        assert poller.poll(0) == []
        client.remove_device(mount.path, 0.2)
        assert poller.poll(5000)
        eventually("it is removed", lambda: state(mount) == "removed")
        poller.modify(opened.fileno(), 0)
        assert poller.poll(5000) == [(opened.fileno(), select.POLLERR | select.POLLHUP)]
        with pytest.raises(PinError) as caught:
            opened.pin(0, BLOCK)
        assert caught.value.errno == errno.ENODEV
    mount.umount()
    mount.mount()


def test_mapped_pages_of_the_mount_are_taken_away(mount: Mounted, file: Path) -> None:
    """The unmap-all: a process that has the file mapped through the kernel faults and finds no device."""
    program = (
        "import mmap, os, sys\n"
        "view = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)\n"
        "view[0] = 1; print(view[0], flush=True); sys.stdin.readline(); view[0]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        client.remove_device(mount.path, 0)
        eventually("it is removed", lambda: state(mount) == "removed")
        process.communicate(b"\n", timeout=10)
        assert process.returncode == -signal.SIGBUS
    mount.umount()
    mount.mount()
    assert file.read_bytes() == b"\1" + b"f" * (8 * BLOCK - 1)  # what was dirty was written before


def test_under_load(mount: Mounted) -> None:
    """Writers and pinners at full speed: each call succeeds or says that the device has gone; the image is sound."""
    stop, problems = threading.Event(), list[BaseException]()

    def work(n: int) -> None:
        path = mount.path / f"load-{n}"
        try:
            while not stop.is_set():
                path.write_bytes(os.urandom(4 * BLOCK))
                with client.open(path, "r+") as opened, opened.pin(write=True):
                    opened.extents()
                os.unlink(path)
        except OSError as problem:
            if problem.errno not in (errno.ENODEV, errno.EIO):
                problems.append(problem)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    daxfs("device", "remove", "--force", mount.path)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    stop.set()
    assert not problems
    assert not check(mount.image).errors
    mount.umount()
    mount.mount()


def test_status_of_an_image(mount: Mounted, file: Path) -> None:
    """S45: the count, and why."""
    found = json.loads(daxfs("device", "status", "--json", mount.image).stdout)
    assert (found["state"], found["mount"]) == ("live", str(mount.path))
    mount.umount()
    found = json.loads(daxfs("device", "status", "--json", mount.image).stdout)
    assert (found["state"], found["dirty_shutdowns"], found["last_shutdown"]) == ("not mounted", 0, "clean")
    mount.mount()
    mount.kill()
    copy = mount.image.with_name("copy")
    shutil.copyfile(mount.image, copy)
    found = json.loads(daxfs("device", "status", "--json", copy).stdout)
    assert found["dirty_shutdowns"] == 1
    assert "the daemon ended" in found["last_shutdown"]
    copy.unlink()
    mount.mount()
    found = client.device(mount.path)
    assert found["dirty_shutdowns"] == 1
    assert "the daemon ended" in found["last_shutdown"]
    assert mmap.PAGESIZE <= BLOCK
