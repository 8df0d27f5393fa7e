"""A sparse image on a disk that fills up: what would need more of it is refused with ENOSPC, whole; nothing else changes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import syscalls
from tests.mount.harness import Mounted, daxfs, eventually, mounts_below

MiB = 1 << 20
CHUNK = os.urandom(MiB // 4)


def failure(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as problem:
        return problem.errno or 0
    return 0


@pytest.fixture
def disk(base: Path) -> Iterator[Path]:
    place = base / "disk"
    place.mkdir()
    syscalls.mount_tmpfs(place, "6M")
    yield place
    for point in mounts_below(place):
        syscalls.umount(point, detach=True)
    eventually("the disk is gone", lambda: not mounts_below(place))
    place.rmdir()


def fill(path: Path) -> int:
    """Write until it fails: how many bytes."""
    with open(path, "wb", buffering=0) as file:
        while not (code := failure(lambda: file.write(CHUNK))):
            pass
        assert code == errno.ENOSPC
        return file.tell()


def test_a_full_disk_is_enospc(disk: Path) -> None:
    """The volume stays writable: what files gave back can be used again, and more when the disk has room again."""
    mounted = Mounted(disk / "home", size="64M")
    mounted.mount()
    mnt = mounted.path
    written = fill(mnt / "first")
    assert written >= 2 * MiB
    for number in range(200):  # until not even an inode or an entry finds room
        code = failure((mnt / f"small-{number}").touch)
        assert code in (0, errno.ENOSPC)
    assert mounted.info()["failed"] == ""
    content = (mnt / "first").read_bytes()
    assert len(content) == (mnt / "first").stat().st_size >= written
    assert content[:written] == CHUNK * (written // len(CHUNK))
    with open(mnt / "first", "r+b", buffering=0) as file:
        file.write(CHUNK[::-1])  # in place: no more is needed
    os.unlink(mnt / "first")
    again = fill(mnt / "second")
    assert again >= written - MiB
    mounted.umount()
    mounted.fsck()
    mounted.mount()
    assert (mnt / "second").read_bytes()[:again] == CHUNK * (again // len(CHUNK))
    subprocess.run(["mount", "-o", "remount,size=40M", disk], check=True)
    (mnt / "third").write_bytes(CHUNK * 40)
    assert (mnt / "third").read_bytes() == CHUNK * 40
    mounted.finish()


def test_a_kill_on_a_full_disk(disk: Path) -> None:
    mounted = Mounted(disk / "home", size="64M")
    mounted.mount()
    written = fill(mounted.path / "file")
    mounted.kill()
    mounted.fsck()
    mounted.mount()
    assert (mounted.path / "file").read_bytes()[:written] == CHUNK * (written // len(CHUNK))
    assert failure(lambda: (mounted.path / "more").write_bytes(CHUNK)) in (0, errno.ENOSPC)
    mounted.finish()


def test_no_room_for_the_journal(disk: Path) -> None:
    """Refused with a word on what to do; a read-only mount needs no room."""
    mounted = Mounted(disk / "home", size="64M")
    rest, room = disk / "rest", disk / "room"
    room.write_bytes(bytes(MiB // 4))  # tmpfs needs some even to read what is sparse
    with open(rest, "wb", buffering=0) as file:
        while not failure(lambda: file.write(bytes(4096))):
            pass
    os.unlink(room)
    done = daxfs("mount", "--image", mounted.image, "--log", disk / "log", mounted.path, check=False)
    assert done.returncode == 1
    assert "is full; make room there, or mount it read-only" in done.stderr
    mounted.mount("ro")
    assert os.listdir(mounted.path) == []
    mounted.umount()
    os.unlink(rest)
    mounted.mount()
    (mounted.path / "file").write_bytes(CHUNK)
    mounted.finish()
