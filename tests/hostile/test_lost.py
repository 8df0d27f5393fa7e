"""The medium goes away under a mount: the image is truncated, or the host's disk is full. EIO, and the daemon lives.

Every access to what is gone raises SIGBUS, in C, in memoryviews, in NumPy; lostpages.c takes it. A holder's mapping is the
holder's: it gets SIGBUS, as from real hardware, and hears DEVICE_REMOVE."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daxfs import client
from daxfs.core import fsck
from tests.mount import syscalls
from tests.mount.harness import Mounted, alive, daxfs, eventually

pytestmark = pytest.mark.mount

MiB = 1 << 20
CONTENT = bytes(range(256)) * 4096 * 4  # 4 MiB


@pytest.fixture
def mount(base: Path) -> Iterator[Mounted]:
    """A mount with /file (4 MiB), /dir and /link, which is not expected to end well."""
    mounted = Mounted(base / f"lost-{os.urandom(4).hex()}", size="32M")
    timer = mounted.watchdog(60)
    try:
        mounted.mount()
        (mounted.path / "file").write_bytes(CONTENT)
        (mounted.path / "dir").mkdir()
        os.symlink("t" * 1000, mounted.path / "link")
        yield mounted
        assert not mounted.hung, "the daemon did not answer any more"
    finally:
        timer.cancel()
        mounted.remove()


def failure(call: Callable[[], object]) -> int:
    """The errno of a call, 0 if it succeeds."""
    try:
        call()
    except OSError as e:
        return e.errno or -1
    return 0


def calls(mount: Mounted, fd: int) -> dict[str, Callable[[], object]]:
    path = mount.path
    return {
        "read": lambda: os.pread(fd, 4096, 3 * MiB),
        "write": lambda: os.pwrite(fd, b"x" * 100_000, 2 * MiB),
        "write that allocates": lambda: os.pwrite(fd, b"x" * 5000, 6 * MiB),
        "truncate": lambda: os.ftruncate(fd, 3),
        "punch": lambda: syscalls.fallocate(fd, 3, 0, MiB),
        "setxattr": lambda: os.setxattr(fd, "user.x", b"y" * 5000),
        "mkdir": lambda: os.mkdir(path / "new"),
        "rename": lambda: os.rename(path / "dir", path / "other"),
        "unlink": lambda: os.unlink(path / "file"),
        "readdir": lambda: os.listdir(path / "dir"),
        "readlink": lambda: os.readlink(path / "link"),
        "statfs": lambda: os.statvfs(path),
    }


def end(mount: Mounted, *says: str) -> None:
    """The daemon is there, can be unmounted, has said why, and has not stumbled."""
    assert alive(mount.pid)
    assert mount.info()["device"] == "lost"
    mount.umount()
    log = mount.log_text()
    assert "Traceback" not in log
    for text in ("was truncated to", "every call fails with EIO from now on", *says):
        assert text in log, log
    assert log.count("was truncated to") == 1


@pytest.mark.parametrize("first", ["read", "write", "mkdir", "truncate"])
def test_truncated(mount: Mounted, first: str) -> None:
    """Whatever touches it first, and all that comes after: EIO."""
    with open(mount.path / "file", "r+b", buffering=0) as file:
        os.truncate(mount.image, 10_000)
        verbs = calls(mount, file.fileno())
        for name in (first, *verbs, *verbs):
            assert failure(verbs[name]) == errno.EIO, name
        assert failure(lambda: open(mount.path / "file", "rb").close()) == errno.EIO
    end(mount, "was truncated to 10000 bytes of 33554432")


def test_truncated_while_nobody_looks(mount: Mounted) -> None:
    os.truncate(mount.image, 0)
    eventually("the daemon sees it by itself", lambda: "was truncated to 0 bytes" in mount.log_text(), 10)
    assert failure(lambda: os.listdir(mount.path)) == errno.EIO
    end(mount)


def test_truncated_in_the_middle_of_everything(mount: Mounted) -> None:
    """Readers, writers and makers of files at work; nobody hangs, nobody gets a wrong byte, everybody hears EIO."""
    wrong: list[str] = []
    ended: list[int] = []

    def work(number: int) -> None:
        fd = os.open(mount.path / "file", os.O_RDWR)
        try:
            for i in range(1_000_000):
                if number == 0 and os.pread(fd, 65536, i % 32 * 65536) != CONTENT[:65536]:
                    wrong.append(f"read {i}")
                elif number == 1:
                    os.pwrite(fd, CONTENT[:MiB], 2 * MiB)
                elif number == 2:
                    os.close(os.open(mount.path / "dir" / str(i), os.O_CREAT | os.O_WRONLY))
                elif number == 3:
                    os.listdir(mount.path / "dir")
        except OSError as e:
            ended.append(e.errno or -1)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    eventually("they are at work", lambda: len(os.listdir(mount.path / "dir")) > 20, 20)
    os.truncate(mount.image, MiB)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert ended == [errno.EIO] * 4
    end(mount)


def test_truncated_read_only(mount: Mounted) -> None:
    mount.remount("ro")
    fd = os.open(mount.path / "file", os.O_RDONLY)
    os.truncate(mount.image, 8192)
    assert failure(lambda: os.read(fd, 65536)) == errno.EIO
    assert failure(lambda: os.listdir(mount.path)) == errno.EIO
    assert failure(lambda: os.close(fd)) in (0, errno.EIO)
    end(mount)


def test_a_holder_hears_it(mount: Mounted) -> None:
    """It is told, and may go; its own mapping ends like that of real hardware that is gone."""
    program = (
        "import sys, daxfs.client as c\n"
        "file = c.open(sys.argv[1], 'r+')\n"
        "view = file.pin(0, 4096, write=True, longterm=True).map()\n"
        "print('ready', flush=True)\n"
        "event = file.next_event(30)\n"
        "print(event.type.name, flush=True)\n"
        "view[0] = 1\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, mount.path / "file"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    os.truncate(mount.image, 4096)
    assert failure(lambda: os.mkdir(mount.path / "new")) == errno.EIO
    assert holder.stdout.readline() == "DEVICE_REMOVE\n"
    assert holder.wait(20) == -7  # SIGBUS
    holder.stdout.close()
    end(mount)


def test_it_can_be_mounted_again_once_it_is_restored(mount: Mounted) -> None:
    mount.umount()
    copy = mount.image.read_bytes()
    mount.mount()
    os.truncate(mount.image, 0)
    assert failure(lambda: os.mkdir(mount.path / "new")) == errno.EIO
    end(mount)
    mount.image.write_bytes(copy)
    mount.mount()
    assert (mount.path / "file").read_bytes() == CONTENT
    mount.umount()
    mount.fsck()


def test_a_full_host(base: Path, tmp_path: Path) -> None:
    """Blocks of the image that its disk had given are taken away (a hole is punched), and it has no others: the call fails
    whole, the volume turns read-only, what was there stays. (A disk that is just full is ENOSPC: tests/faults.)"""
    disk, point, log = base / "disk", base / "full-mnt", tmp_path / "log"
    for directory in (disk, point):
        directory.mkdir()
    syscalls.mount_tmpfs(disk, "8M")
    try:
        daxfs("mkfs", "--size", "64M", disk / "image")
        daxfs("mount", "--image", disk / "image", "--log", log, point)
        pid = int(client.info(point)["pid"])
        (point / "kept").write_bytes(CONTENT[:MiB])
        (point / "file").write_bytes(CONTENT[:MiB])
        with client.open(point / "file") as file:
            runs = [(extent.physical * 4096, extent.count * 4096) for extent in file.extents()]
        with open(disk / "image", "r+b") as image:
            for at, length in runs:
                syscalls.fallocate(image.fileno(), syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, at, length)
        with open(disk / "rest", "wb", buffering=0) as rest:
            while not failure(lambda: rest.write(bytes(4096))):
                pass
        with open(point / "file", "r+b", buffering=0) as file:
            assert failure(lambda: file.write(CONTENT[: MiB // 4])) == errno.EIO
        assert failure(lambda: os.mkdir(point / "dir")) == errno.EROFS
        assert (point / "kept").read_bytes() == CONTENT[:MiB]
        assert alive(pid)
        daxfs("umount", point)
        assert "the host could not give bytes" in log.read_text()
        assert "Traceback" not in log.read_text()
        os.unlink(disk / "rest")
        assert fsck.check(disk / "image").errors == 0
        daxfs("mount", "--image", disk / "image", "--log", log, point)
        assert (point / "kept").read_bytes() == CONTENT[:MiB]
        (point / "file").write_bytes(CONTENT[:MiB])
        daxfs("umount", point)
    finally:
        syscalls.umount(disk, detach=True)
        for directory in (disk, point):
            directory.rmdir()


# -- the handler by itself --------------------------------------------------------------------------------------------------

PROGRAM = """
import ctypes, mmap, os, sys
import daxfs.daemon
from daxfs.daemon import session
size = 64 << 12
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, size)
image = mmap.mmap(fd, size)
view = memoryview(image)
address = ctypes.addressof(ctypes.c_char.from_buffer(image))
session.guard(address, size, fd)
view[:] = b"a" * size
os.ftruncate(fd, 5000)
"""


def run(place: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM + "\n".join(lines), str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_lost_reads_zero_and_the_rest_is_there(place: Path) -> None:
    done = run(place, "print(session.lost(), bytes(view[9000:9004]), session.lost(), bytes(view[4990:5002]))",
               "view[20000:20004] = b'wxyz'", "print(bytes(view[20000:20004]))")  # fmt: skip
    assert done.stdout == "False b'\\x00\\x00\\x00\\x00' True b'aaaaaaaaaa\\x00\\x00'\nb'wxyz'\n", done.stderr
    assert place.stat().st_size == 5000


def test_it_is_found_without_an_access(place: Path) -> None:
    assert run(place, "print(session.look(), session.lost())").stdout == "True True\n"


def test_another_file_s_sigbus_is_not_ours(place: Path) -> None:
    """A bug elsewhere is not covered up."""
    done = run(place, "fd = os.memfd_create('x'); os.ftruncate(fd, 4096)",
               "other = mmap.mmap(fd, 4096); os.ftruncate(fd, 0)",
               "print(bytes(view[9000:9001]), flush=True)", "other[0]")  # fmt: skip
    assert done.stdout == "b'\\x00'\n"
    assert done.returncode == -7


def test_nothing_is_guarded_after_unguard(place: Path) -> None:
    assert run(place, "session.unguard()", "view[9000]").returncode == -7
