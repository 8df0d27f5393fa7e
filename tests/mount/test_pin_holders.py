"""Holders of pins: how they end, share and pass pins on, and which pins are refused (S53 ... S58 of the catalogue)."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from daxfs import abi, client
from tests.mount.harness import REAPED_S, eventually
from tests.mount.holder import Holder, HolderError
from tests.mount.pincase import BLOCK, DATA, PUNCH, Case, fallocate, pattern

# -- holders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "segv"])
def test_s53_the_end_of_a_holder_releases_its_pins(case: Case, how: str) -> None:
    free = case.info()["free"]
    case.p.pin(case.a, 0, 8)
    os.truncate(case.a, 0)
    assert case.info()["busy"] == 8
    if how == "segv":
        case.p.tell("crash")
        assert case.p.process.wait(10) == -signal.SIGSEGV
    else:
        case.p.end(signal.SIGTERM if how == "exit" else signal.SIGKILL)
    case.settled(free + 8)


def test_s53_a_stopped_holder_keeps_its_pins(case: Case) -> None:
    case.p.pin(case.a, 0, 8)
    os.kill(case.p.pid, signal.SIGSTOP)
    os.truncate(case.a, 0)
    time.sleep(0.3)
    assert case.info()["busy"] == 8
    (listed,) = client.pins(case.mount.path)
    assert listed["pid"] == case.p.pid
    os.kill(case.p.pid, signal.SIGCONT)
    assert case.p.read(length=8 * BLOCK) == DATA
    case.p("unpin")
    case.settled()


def test_s54_a_pin_goes_with_the_descriptor_to_another_process(case: Case, tmp_path: Path) -> None:
    free = case.info()["free"]
    socket_path = str(tmp_path / "socket")
    with Holder() as q:
        case.p.pin(case.a, 0, 8)
        q.tell("receive", socket_path=socket_path)
        assert q.answer() == "listening"
        case.p("send", socket_path=socket_path)
        q.answer()
        case.p.end(signal.SIGKILL)
        os.truncate(case.a, 0)
        time.sleep(0.2)
        assert case.info()["busy"] == 8, "the pin lives with the description"
        (listed,) = client.pins(case.mount.path)
        assert listed["pid"] == q.pid
        q.end(signal.SIGKILL)
        case.settled(free + 8)


def test_s55_a_fork_shares_the_pin(case: Case) -> None:
    free = case.info()["free"]
    case.p.pin(case.a, 0, 8)
    child = case.p("fork")
    os.truncate(case.a, 0)
    case.p("reap", pid=child, how=signal.SIGTERM)
    time.sleep(0.2)
    assert case.info()["busy"] == 8, "a child's exit releases nothing"
    child = case.p("fork")
    case.p.end(signal.SIGKILL)
    time.sleep(0.2)
    assert case.info()["busy"] == 8, "the child has the description"
    os.kill(child, signal.SIGKILL)
    case.settled(free + 8)


@pytest.mark.parametrize("keep", [False, True], ids=["cloexec", "kept"])
def test_s56_exec(case: Case, keep: bool) -> None:
    free = case.info()["free"]
    case.p.pin(case.a, 0, 8)
    os.truncate(case.a, 0)
    case.p("exec", keep=keep)
    if keep:
        time.sleep(0.3)
        assert case.info()["busy"] == 8
        case.p.end(signal.SIGKILL)
    case.settled(free + 8)


def test_s57_unmapping_or_closing_a_copy_releases_nothing(case: Case) -> None:
    free = case.info()["free"]
    case.p.pin(case.a, 0, 8)
    copy = case.p("dup")
    os.truncate(case.a, 0)
    case.p("unmap")
    case.p("close")
    time.sleep(0.2)
    assert case.info()["busy"] == 8
    case.p("close_fd", fd=copy)
    case.settled(free + 8)


def refused(holder: Holder, path: Path, **words: Any) -> str:
    try:
        holder("pin", path=str(path), **words)
    except HolderError as problem:
        return problem.name
    return "ok"


def test_s58_pins_that_are_refused(case: Case) -> None:
    fallocate(case.a, PUNCH, 3 * BLOCK, BLOCK)
    (case.mount.path / "empty").write_bytes(b"")
    pin = abi.FOLL_PIN
    rows: list[tuple[str, dict[str, Any]]] = [
        ("EACCES", {"offset": 0, "length": BLOCK, "write": True, "mode": "r"}),
        ("EINVAL", {"offset": 1, "length": BLOCK}),
        ("EINVAL", {"offset": 0, "length": 100}),
        ("EINVAL", {"offset": 0, "length": 0}),
        ("ENXIO", {"offset": 8 * BLOCK, "length": BLOCK}),
        ("ENXIO", {"offset": 7 * BLOCK, "length": 2 * BLOCK}),
        ("ENXIO", {"offset": 1 << 62, "length": BLOCK}),
        ("ENXIO", {"offset": (1 << 64) - BLOCK, "length": BLOCK}),
        ("EFAULT", {"offset": 3 * BLOCK, "length": BLOCK}),
        ("EFAULT", {"offset": 0, "length": 8 * BLOCK}),
        ("EINVAL", {"offset": 0, "length": BLOCK, "flags": 0}),
        ("EINVAL", {"offset": 0, "length": BLOCK, "flags": pin | abi.FOLL_GET}),
        ("EINVAL", {"offset": 0, "length": BLOCK, "flags": abi.FOLL_LONGTERM}),
        ("EINVAL", {"offset": 0, "length": BLOCK, "flags": pin | 1 << 29}),
        ("ok", {"offset": 0, "length": BLOCK, "flags": abi.FOLL_GET}),
        ("ok", {"offset": 0, "length": BLOCK, "flags": pin | abi.FOLL_LONGTERM}),
        ("ok", {"offset": 7 * BLOCK, "length": BLOCK, "mode": "r"}),
        ("ok", {"offset": 2 * BLOCK, "length": 3 * BLOCK, "write": True}),  # a write pin fills the hole
    ]
    wrong = [
        f"{words}: {got}, should be {want}" for want, words in rows if (got := refused(case.p, case.a, **words)) != want
    ]
    assert not wrong, "\n".join(wrong)
    assert case.a.read_bytes() == DATA[: 3 * BLOCK] + bytes(BLOCK) + DATA[4 * BLOCK :]
    assert refused(case.p, case.mount.path / "empty", offset=0, length=BLOCK) == "ENXIO"
    assert refused(case.p, case.mount.path, offset=0, length=BLOCK, mode="r") in ("EISDIR", "EINVAL")
    case.p.end()
    case.settled()


def test_s58_raw_ioctls_that_are_wrong(case: Case) -> None:
    """What the client library would not send: reserved fields, unpin of a stranger's pin, runs of no pin."""
    held = case.p.pin(case.a, 0, 1)
    with open(case.a, "r+b") as file:
        fd = file.fileno()
        for want, number, data in (
            (errno.EINVAL, abi.IOC_PIN, abi.PIN.pack(0, BLOCK, abi.FOLL_PIN, 1, 0, 0, 0)),
            (errno.ENOENT, abi.IOC_UNPIN, abi.UNPIN.pack(held["id"], 0, 0)),
            (errno.ENOENT, abi.IOC_UNPIN, abi.UNPIN.pack(1 << 60, 0, 0)),
            (errno.EINVAL, abi.IOC_UNPIN, abi.UNPIN.pack(held["id"], 8, 0)),
            (errno.ENOENT, abi.IOC_PIN_RUNS, abi.PAGE.pack(held["id"], 0, 0, 0).ljust(abi.PAGE_BYTES, b"\0")),
            (errno.EINVAL, abi.IOC_REPORT, abi.PAGE.pack(99, 0, 0, 0).ljust(abi.PAGE_BYTES, b"\0")),
            (errno.ENOTTY, abi.IOC_PIN + 100, bytes(abi.PIN.size)),
        ):
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(fd, number, bytearray(data))
            assert caught.value.errno == want, (hex(number), data[:16])
    only_to_write = os.open(case.a, os.O_WRONLY)  # as with mmap(2): who may not read gets no blocks to look at
    for flags in (abi.FOLL_PIN, abi.FOLL_PIN | abi.FOLL_WRITE, abi.PIN_ON_DEMAND | abi.FOLL_WRITE, abi.FOLL_GET):
        with pytest.raises(PermissionError):
            fcntl.ioctl(only_to_write, abi.IOC_PIN, bytearray(abi.PIN.pack(0, BLOCK, flags, 0, 0, 0, 0)))
    os.close(only_to_write)
    assert len(client.pins(case.mount.path)) == 1


def test_a_write_pin_of_a_hole_allocates_zeroed_blocks(case: Case) -> None:
    path = case.mount.path / "hole"
    with open(path, "wb") as file:
        file.truncate(10 * BLOCK)
    held = case.p.pin(path, 2, 5, write=True)
    assert sum(count for _, count in held["runs"]) == 5
    assert os.stat(path).st_blocks == 5 * 8
    assert case.p.read(length=5 * BLOCK) == bytes(5 * BLOCK)
    case.p.write(b"dma", at=BLOCK)
    assert path.read_bytes() == (bytes(3 * BLOCK) + b"dma").ljust(10 * BLOCK, b"\0")


def test_unpin_of_a_written_pin_moves_mtime(case: Case) -> None:
    """Dirtying goes through the file system (O2)."""
    case.p.pin(case.a, 0, 1, write=True)
    old = os.stat(case.a).st_mtime_ns
    time.sleep(0.01)
    case.p.write(b"dma")
    case.p("unpin", dirty=True)
    assert os.stat(case.a).st_mtime_ns > old


def test_umount_with_live_pins_is_refused(case: Case) -> None:
    """The holder's descriptor is open (S43); afterwards it works."""
    case.p.pin(case.a, 0, 1)
    with pytest.raises(AssertionError, match="in use"):
        case.mount.umount()
    case.p.end()
    case.mount.umount()
    case.mount.mount()
    assert case.a.read_bytes() == DATA


def test_a_fragmented_pin_is_one_contiguous_view(case: Case) -> None:
    """Blocks that are scattered over the image, many more than one page of runs has."""
    path, other = case.mount.path / "scattered", case.mount.path / "between"
    count = 1200
    with open(path, "wb", buffering=0) as a, open(other, "wb", buffering=0) as b:
        for n in reversed(range(count)):
            os.pwrite(a.fileno(), pattern(n), n * BLOCK)
            b.write(b"b" * BLOCK)
    held = case.p.pin(path, 0, count)
    assert sum(n for _, n in held["runs"]) == count
    assert len(held["runs"]) > 510, "not fragmented: the test tests nothing"
    for n in (0, 1, 509, 510, 511, count - 1):
        assert case.p.read(at=n * BLOCK) == pattern(n)
    os.unlink(path)
    assert len(case.busy_blocks()) in (0, count), "busy, or still in the unlinked file"
    assert stat.S_ISREG(os.stat(other).st_mode)


# -- a daemon that dies -----------------------------------------------------------------------------------------------


def test_s39_holders_survive_the_daemon(small: Case) -> None:
    """The next mount keeps the blocks of a living holder away from everyone, and frees them when it has ended."""
    free = small.info()["free"]
    held = small.p.pin(small.a, 0, 4, write=True)
    os.truncate(small.a, 2 * BLOCK)  # of the pin, two blocks are busy and two are the file's
    small.mount.kill()
    small.mount.fsck()
    small.mount.mount()
    start = held["runs"][0][0]
    assert small.busy_blocks() == {start + 2, start + 3}
    os.truncate(small.a, 0)
    assert small.busy_blocks() == {*range(start, start + 4)}, "the pin of the file's blocks counts as well"
    assert small.p.read(length=4 * BLOCK) == DATA[: 4 * BLOCK]
    filler = small.fill()
    assert not small.blocks_of(filler) & {*range(start, start + 4)}
    small.p.write(b"\x99" * 4 * BLOCK)
    assert set(filler.read_bytes()) == {0xEE}
    (listed,) = client.pins(small.mount.path)
    assert listed["pid"] == small.p.pid
    os.unlink(filler)
    small.p.end(signal.SIGKILL)
    eventually("the blocks are freed", lambda: small.info()["busy"] == 0, REAPED_S)
    small.settled(free + 8)


def test_s39_a_holder_that_ended_with_the_daemon_keeps_nothing(small: Case) -> None:
    free = small.info()["free"]
    small.p.pin(small.a, 0, 8)
    os.truncate(small.a, 0)
    small.mount.kill()
    small.p.end(signal.SIGKILL)
    small.mount.mount()
    small.settled(free + 8)


def test_s42_an_unlinked_pinned_file_and_a_crash(small: Case) -> None:
    """The orphan goes at the next mount, once; what is pinned of it stays busy as long as the holder lives."""
    free = small.info()["free"]
    held = small.p.pin(small.a, 1, 3)
    os.unlink(small.a)
    small.mount.kill()
    small.mount.mount()
    start = held["runs"][0][0]
    assert small.busy_blocks() == {*range(start, start + 3)}
    assert small.info()["free"] == free + 5
    assert small.p.read(length=3 * BLOCK) == DATA[BLOCK : 4 * BLOCK]
    small.mount.kill()
    small.mount.mount()
    assert small.busy_blocks() == {*range(start, start + 3)}
    small.p.end(signal.SIGKILL)
    eventually("the blocks are freed", lambda: small.info()["busy"] == 0, REAPED_S)
    small.settled(free + 8)
