"""Events, leases and changes that do not wait, through the client library."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import client
from daxfs.client import EventType, PinError
from tests.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted, eventually

pytestmark = pytest.mark.mount

BLOCK = 4096


def a_file(mounted: Mounted, blocks: int = 8) -> Path:
    path = mounted.fresh_directory() / "file"
    path.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(blocks)))
    return path


def truncating(path: Path, size: int = 0) -> subprocess.Popen[bytes]:
    """truncate(1), another process."""
    return subprocess.Popen(["truncate", "-s", str(size), path])


def punching(path: Path, offset: int, length: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["fallocate", "--punch-hole", "-o", str(offset), "-l", str(length), path])


@contextmanager
def another_holder(path: Path, offset: int, length: int) -> Iterator[Callable[[], None]]:
    """A process that pins a range. What comes back lets it go."""
    program = (
        "import sys; from daxfs import client\n"
        "with client.open(sys.argv[1]) as f, f.pin(int(sys.argv[2]), int(sys.argv[3])):\n"
        "    print('pinned', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, path, str(offset), str(length)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"pinned\n"
        yield holder.stdin.close
        holder.stdin.close()
    assert holder.returncode == 0


def test_no_event(shared_mount: Mounted) -> None:
    with client.open(a_file(shared_mount)) as file, file.pin():
        assert file.next_event() is None
        start = time.monotonic()
        assert not file.poll(0.05)
        assert file.next_event(0.05) is None
        assert time.monotonic() - start >= 0.1


def test_an_on_demand_holder_lets_go(shared_mount: Mounted) -> None:
    path = a_file(shared_mount)
    with client.open(path, "r+") as file, file.register(write=True) as region:
        assert region.on_demand
        assert bytes(region.map()[::BLOCK]) == b"ABCDEFGH"
        with pytest.raises(PinError, match="nothing to acknowledge") as caught:
            region.acknowledge()
        assert caught.value.errno == errno.EINVAL
        change = truncating(path)
        assert file.poll(5)
        event = file.next_event()
        assert event == client.Event(EventType.INVALIDATE, region.id, 0, 8 * BLOCK)
        assert change.poll() is None
        region.map()
        region.acknowledge()
        assert region.address == 0
        assert change.wait(5) == 0
        assert path.stat().st_size == 0
        assert client.busy(path) == []
    assert client.pins(path) == []


def test_waiting_for_an_event(shared_mount: Mounted) -> None:
    path = a_file(shared_mount)
    with client.open(path, "r+") as file, file.register() as region:
        change = truncating(path)
        event = file.next_event(None)
        assert event is not None
        assert (event.type, event.pin_id) == (EventType.INVALIDATE, region.id)
        region.acknowledge()
        assert change.wait(5) == 0


def test_policy_lease(make_mount: Maker) -> None:
    mounted = make_mount(size="64M", options="policy=lease,longterm=lease")
    path = a_file(mounted)
    with client.open(path, "r+") as file:
        with pytest.raises(PinError, match="needs a layout lease") as caught:
            file.pin(longterm=True)
        assert caught.value.errno == errno.EPERM
        with file.lease() as lease, file.pin(0, BLOCK, longterm=True) as pin:
            change = truncating(path)
            kinds = {}
            while (event := file.next_event(5 if len(kinds) < 2 else 0)) is not None:
                kinds[event.pin_id] = event.type
            assert kinds == {pin.id: EventType.LEASE_BREAK, 0: EventType.LEASE_BREAK}
            assert change.poll() is None
            pin.close()
            assert lease.close()
            assert change.wait(5) == 0
        assert not lease.close()


def test_a_lease_that_was_broken(shared_mount: Mounted) -> None:
    path = a_file(shared_mount)
    with client.open(path, "r+") as file, file.lease(0, 2 * BLOCK) as lease:
        os.truncate(path, 0)  # policy busy: told and broken at once
        event = file.next_event()
        assert event is not None
        assert (event.type, event.pin_id, event.length) == (EventType.LEASE_BREAK, 0, 2 * BLOCK)
        assert not lease.close()
        with pytest.raises(PinError, match="whole blocks") as caught:
            file.lease(1)
        assert caught.value.errno == errno.EINVAL


def test_policy_revoke(make_mount: Maker) -> None:
    mounted = make_mount(size="64M", options="policy=revoke")
    path = a_file(mounted)
    with client.open(path) as file, file.pin(0, BLOCK) as pin:
        os.truncate(path, 0)
        event = file.next_event()
        assert event == client.Event(EventType.REVOKED, pin.id, 0, BLOCK)


def test_changes_that_do_not_wait(make_mount: Maker) -> None:
    mounted = make_mount(size="64M", options="policy=wait")
    path = a_file(mounted)
    with client.open(path, "r+") as file, another_holder(path, 0, 2 * BLOCK) as let_go:
        for change in (lambda: file.truncate(0, wait=False), lambda: file.punch(BLOCK, BLOCK, wait=False)):
            with pytest.raises(PinError, match="the range is pinned") as caught:
                change()
            assert caught.value.errno == errno.EAGAIN
        assert path.read_bytes()[BLOCK : BLOCK + 1] == b"B"
        file.punch(2 * BLOCK, BLOCK, wait=False)  # not pinned
        assert path.read_bytes()[2 * BLOCK : 3 * BLOCK : BLOCK] == b"\0"
        change = truncating(path, BLOCK)
        eventually("a new pin waits behind the truncate", lambda: not may_pin(file, 5 * BLOCK))
        assert may_pin(file, 0)  # the truncate does not want this one
        let_go()
        assert change.wait(5) == 0
        assert path.stat().st_size == BLOCK
    with client.open(path) as reader, pytest.raises(PinError, match="not open for writing") as caught:
        reader.truncate(0)
    assert caught.value.errno == errno.EBADF


def may_pin(file: client.File, offset: int) -> bool:
    try:
        file.pin(offset, BLOCK, wait=False).close()
        return True
    except PinError as problem:
        if problem.errno != errno.EAGAIN:
            raise
        return False
