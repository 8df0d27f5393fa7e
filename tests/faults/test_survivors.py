"""Holders outlive the daemon (S39, S43), in all the ways in which a process can be half there: what any of them may still
map stays away from everybody, what none can is free within a second or so.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import client
from daxfs.core.pins import Holder as Recorded
from daxfs.core.pins import Pin
from daxfs.core.volume import Volume
from daxfs.daemon import holders, survivors
from tests.core.image import fresh_volume
from tests.mount.harness import REAPED_S, alive, eventually
from tests.mount.holder import Holder, HolderError
from tests.mount.pincase import BLOCK, DATA, Case
from tests.mount.test_crash import fresh_seed

LOOKS_S = 2.3 * survivors.LOOK_S  # time for some looks at the holders


def crash(case: Case, *, options: str | None = None) -> None:
    case.mount.kill()
    case.mount.mount(options)


def held(case: Case, first: int = 0, count: int = 4) -> set[int]:
    """Pin blocks of A, take A away: they are busy."""
    pin = case.p.pin(case.a, first, count, write=True)
    os.truncate(case.a, 0)
    blocks = {block for start, length in pin["runs"] for block in range(start, start + length)}
    assert case.busy_blocks() == blocks
    return blocks


def stays(case: Case, blocks: set[int]) -> None:
    """Nobody gets the blocks, however often the daemon looks."""
    end = time.monotonic() + LOOKS_S
    while time.monotonic() < end:
        assert case.busy_blocks() == blocks
        time.sleep(0.1)
    filler = case.fill()
    assert not case.blocks_of(filler) & blocks
    os.unlink(filler)


def goes(case: Case) -> None:
    eventually("the blocks are freed", lambda: case.info()["busy"] == 0, REAPED_S)
    case.settled()


# -- who counts as there ----------------------------------------------------------------------------------------------


def test_a_mapping_without_its_descriptor(small: Case) -> None:
    """close(2) after the crash: what is mapped stays mapped; the descriptor was all that could map more."""
    blocks = held(small)
    small.mount.kill()
    small.p("close")
    small.mount.mount()
    stays(small, blocks)
    assert small.p.read(length=4 * BLOCK) == DATA[: 4 * BLOCK]
    small.p("unmap")
    goes(small)


def test_a_descriptor_without_a_mapping(small: Case) -> None:
    """It may map at any time."""
    blocks = held(small)
    small.p("unmap")
    crash(small)
    stays(small, blocks)
    small.p("close")
    goes(small)


def test_a_child_that_inherited_the_mapping(small: Case) -> None:
    """The process that took the pin is dead; its child has the memory."""
    blocks = held(small)
    child = small.p("fork")
    crash(small)
    small.p.end(signal.SIGKILL)
    stays(small, blocks)
    os.kill(child, signal.SIGKILL)
    goes(small)


def test_children_that_hand_it_on_all_the_time(small: Case) -> None:
    """Each lives for a moment only: whoever reads /proc one process after the other may never see any of them."""
    blocks = held(small)
    crash(small)
    began, lasts = time.monotonic(), LOOKS_S + 1.5
    small.p("relay", for_s=lasts)
    small.p.end(signal.SIGKILL)
    while time.monotonic() < began + lasts - 0.5:
        assert small.busy_blocks() == blocks
        time.sleep(0.05)
    goes(small)


def test_a_process_whose_first_thread_has_ended(small: Case) -> None:
    """/proc/PID shows it as a zombie without memory; its other threads go on."""
    blocks = held(small)
    crash(small)
    small.p("end_first_thread")
    eventually("its first thread has ended", lambda: holders.zombie(small.p.pid))
    stays(small, blocks)
    small.p.write(b"\x99" * BLOCK)
    small.p.end(signal.SIGKILL)
    goes(small)


def test_a_stopped_process(small: Case) -> None:
    blocks = held(small)
    os.kill(small.p.pid, signal.SIGSTOP)
    crash(small)
    stays(small, blocks)
    os.kill(small.p.pid, signal.SIGCONT)
    assert small.p.read(length=BLOCK) == DATA[:BLOCK]
    small.p.end(signal.SIGKILL)
    goes(small)


def test_a_zombie(small: Case) -> None:
    """Nobody waits for it, but it has nothing any more."""
    held(small)
    crash(small)
    os.kill(small.p.pid, signal.SIGKILL)
    eventually("it is a zombie", lambda: Path(f"/proc/{small.p.pid}").exists() and not alive(small.p.pid))
    goes(small)


@contextmanager
def bound(source: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "--bind", source, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def test_a_descriptor_of_a_bind_mount(small: Case) -> None:
    """The dead mount leaves the tree when the next one comes; a bind mount of it stays."""
    with bound(small.mount.path, small.mount.home / "bound") as place:
        pin = small.p.pin(place / "A", 0, 4)
        small.p("unmap")
        os.truncate(small.a, 0)
        crash(small)
        stays(small, {*range(pin["runs"][0][0], pin["runs"][0][0] + 4)})
        small.p("close")
        goes(small)


def test_the_pinned_file_is_open_elsewhere(small: Case) -> None:
    """A descriptor of the new mount is no sign of an old holder."""
    small.p.pin(small.a, 0, 4)
    small.mount.kill()
    small.p.end(signal.SIGKILL)
    small.mount.mount()
    with open(small.a, "rb"):
        eventually("the pin is released", lambda: not client.pins(small.mount.path), REAPED_S)


# -- one crash after another ------------------------------------------------------------------------------------------


def test_crashes_in_a_row_and_a_read_only_mount_between(small: Case) -> None:
    """What one restart keeps, the next ones keep; a mount that may not write changes nothing about it."""
    blocks = held(small)
    other = small.mount.path / "B"  # of one file, a descriptor of the old mount could be either holder's
    other.write_bytes(DATA)
    with Holder() as gone:
        gone.pin(other, 4, 2)
        crash(small)
        crash(small)
        small.mount.kill()
        small.mount.mount("allow_other,ro")
        gone.end(signal.SIGKILL)
        eventually("one pin is released", lambda: len(client.pins(small.mount.path)) == 1, REAPED_S)
        assert small.busy_blocks() == blocks
        small.mount.kill()
        small.mount.fsck()
        small.mount.mount()
        eventually("one pin is released", lambda: len(client.pins(small.mount.path)) == 1, REAPED_S)
        stays(small, blocks)
        small.mount.remount()  # a clean end of the daemon frees them as little
        stays(small, blocks)
    small.p.end(signal.SIGKILL)
    goes(small)


def test_crashes_while_survivors_are_released(small: Case) -> None:
    """Many pins of a holder that has ended, and one of a holder that has not: the daemon is killed again and again while it
    voids the entries of the first."""
    seed = fresh_seed()
    print(f"DAXFS_TEST_SEED={seed} chooses the same moments again")
    choose = random.Random(seed)
    blocks = held(small, 0, 2)
    other = small.mount.path / "B"
    other.write_bytes(DATA)
    with Holder() as many:
        many.pin(other, 0, 8)
        for at in range(150):
            many("pin", file=0, offset=at % 8 * BLOCK, length=BLOCK)
        os.truncate(other, 0)
        small.mount.kill()
        many.end(signal.SIGKILL)
    for _ in range(6):
        small.mount.mount()
        time.sleep(choose.uniform(0, 0.06))
        small.mount.kill()
        small.mount.fsck()
    small.mount.mount()
    eventually("the pins are released", lambda: len(client.pins(small.mount.path)) == 1, REAPED_S)
    stays(small, blocks)
    small.p.end(signal.SIGKILL)
    goes(small)


def test_a_full_ledger(small: Case) -> None:
    """When it cannot grow any more a pin is refused with ENOSPC; what was granted before is kept over a crash."""
    pin = small.p.pin(small.a, 0, 1)
    filler, granted = small.fill(), 1
    with pytest.raises(HolderError) as refused:
        while True:
            small.p("pin", file=pin["file"], offset=0, length=BLOCK)
            granted += 1
    assert refused.value.name == "ENOSPC"
    assert granted >= 62  # the block that mkfs made
    os.unlink(small.a)
    assert small.info()["pinned"] == 1
    crash(small)
    assert len(client.pins(small.mount.path)) == granted
    os.unlink(filler)
    assert small.info()["busy"] == 1
    small.p.end(signal.SIGKILL)
    goes(small)


# -- processes that cannot be looked at -------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    with fresh_volume(tmp_path) as made:
        yield made


def survivor(volume: Volume, process: subprocess.Popen[bytes], started: int | None = None) -> Pin:
    recorded = holders.of(process.pid)
    record = Recorded(process.pid, "", recorded.started if started is None else started)
    return Pin(1, None, None, 1 << 40, 0, BLOCK, 0, [(volume.blocks - 9, 1)], 1, record, 0)


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_that_the_daemon_may_not_read(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's: it is there as long as the process lives that took the pin; its number alone does not count."""

    def refuse(place: str, image: tuple[bytes, bytes]) -> list[tuple[int, int]]:
        raise PermissionError(errno.EACCES, "not yours")

    with sleeper() as process:
        pin, other = survivor(volume, process), survivor(volume, process, started=1)
        assert survivors.gone([pin, other], volume, "") == [pin, other], "it has nothing of ours"
        monkeypatch.setattr(survivors, "_mapped", refuse)
        assert survivors.gone([pin, other], volume, "") == [other], "that number was another process's once"
    assert survivors.gone([pin], volume, "") == [pin]


def test_a_process_that_proc_does_not_show(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid: only a signal tells that there is such a process."""

    def hidden(pid: int, number: int) -> None:
        if alive(pid):
            raise PermissionError(errno.EPERM, "not yours")
        raise ProcessLookupError(errno.ESRCH, "no such process")

    with sleeper() as process:
        pin = survivor(volume, process)
        names, read = os.listdir, holders._read
        monkeypatch.setattr(survivors.os, "kill", hidden)
        monkeypatch.setattr(survivors.os, "listdir", lambda path: [n for n in names(path) if n != str(process.pid)])
        monkeypatch.setattr(holders, "_read", lambda pid, what: "" if pid == process.pid else read(pid, what))
        assert survivors.gone([pin], volume, "") == []
        monkeypatch.undo()
    assert survivors.gone([pin], volume, "") == [pin]


def test_processes_come_faster_than_one_can_look(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody is known to be gone."""
    fresh = iter(range(1 << 30, 1 << 31))
    monkeypatch.setattr(survivors.os, "listdir", lambda _: [str(next(fresh))])
    with sleeper() as process:
        assert survivors.gone([survivor(volume, process)], volume, "") == []
