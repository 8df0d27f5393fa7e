"""An exception in each handler, ioctl and worker of the daemon: whoever called gets EIO, the log has all of it, the daemon
lives, and the volume is read-only, and says why. Nothing that was there is lost, and the next mount is like any other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import signal
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from daxfs import abi, client
from daxfs.client import calls
from tests.conftest import Maker
from tests.faults import faulty
from tests.mount import syscalls
from tests.mount.harness import Mounted, alive, eventually

BLOCK = 4096
CONTENT = os.urandom(8 * BLOCK)
RENAME_NOREPLACE = 1
FORCE_SYNC, BASIC, BTIME = 0x2000, 0x7FF, 0x800


def statx(path: Path, mask: int) -> None:
    syscalls._check(syscalls.libc.statx(syscalls.AT_FDCWD, os.fsencode(path), FORCE_SYNC, mask, bytes(256)))


def on(path: Path, call: Callable[[int], object], flags: int = os.O_RDWR) -> None:
    fd = os.open(path, flags)
    try:
        call(fd)
    finally:
        os.close(fd)


def close(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def copy(mnt: Path) -> None:
    on(mnt / "file", lambda a: on(mnt / "other", lambda b: syscalls.copy_range(a, 0, b, 0, BLOCK)))


def poll(fd: int) -> None:
    """poll(2) has no errors of a file's own: EIO shows as POLLERR, or as readiness."""
    waiter = select.poll()
    waiter.register(fd, select.POLLIN | select.POLLPRI)
    waiter.poll(1000)
    raise OSError(errno.EIO, "as good as")


def forget(mnt: Path) -> None:
    os.unlink(mnt / "other")


def forget_many(mnt: Path) -> None:
    """What the kernel forgets while the daemon does not listen comes as one request."""
    pid = client.info(mnt)["pid"]
    fds = [os.open(mnt / f"old {n}", os.O_CREAT | os.O_RDWR) for n in range(20)]
    paths = [os.open(mnt / f"old {n}", os.O_PATH) for n in range(20)]
    for n, fd in enumerate(fds):
        os.close(fd)
        os.unlink(mnt / f"old {n}")
    os.kill(pid, signal.SIGSTOP)
    try:
        for fd in paths:
            os.close(fd)
    finally:
        os.kill(pid, signal.SIGCONT)


def passed_over(mnt: Path) -> None:
    """The kernel is asked what it has of a page beside a pin."""
    with client.open(mnt / "file", "r+") as file, file.pin(0, BLOCK), mmap.mmap(file.fileno(), BLOCK) as mapping:
        assert mapping[0] == CONTENT[0]
        passes = client.info(mnt)["coherence"]["passes"]
        eventually("a pass", lambda: client.info(mnt)["coherence"]["passes"] > passes, within_s=30)


# A call that meets the handler first.
def synced_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


RAW: dict[str, Callable[[Path], object]] = {
    "lookup": lambda mnt: os.stat(mnt / "never asked for"),
    "getattr": lambda mnt: statx(mnt / "file", BASIC),
    "statx": lambda mnt: statx(mnt / "file", BASIC | BTIME),
    "unlink": lambda mnt: os.unlink(mnt / "other"),
    "opendir": lambda mnt: os.listdir(mnt / "dir"),
    "readdirplus": lambda mnt: os.listdir(mnt / "dir"),
    "readdir": lambda mnt: os.listdir(mnt / "dir"),
    "setattr": lambda mnt: os.chmod(mnt / "file", 0o600),
    "setxattr": lambda mnt: os.setxattr(mnt / "file", "user.new", b"value"),
    "open": lambda mnt: os.open(mnt / "file", os.O_RDWR),
    "create": lambda mnt: (mnt / "new").touch(),
    "tmpfile": lambda mnt: os.open(mnt, os.O_TMPFILE | os.O_RDWR),
    "read": lambda mnt: on(mnt / "file", lambda fd: os.pread(fd, 100, 0)),
    "write": lambda mnt: on(mnt / "other", lambda fd: os.pwrite(fd, b"x" * 100, 0)),
    "fallocate": lambda mnt: on(mnt / "other", lambda fd: syscalls.fallocate(fd, 0, 1 << 20, BLOCK)),
    "lseek": lambda mnt: on(mnt / "file", lambda fd: os.lseek(fd, 0, os.SEEK_HOLE)),
    "copy_file_range": copy,
    "ioctl": lambda mnt: client.info(mnt),
    "poll": lambda mnt: on(mnt / "file", poll),
    "release": lambda mnt: close(mnt / "file"),
    "statfs": lambda mnt: os.statvfs(mnt),
    "forget": forget,
    "batch_forget": forget_many,
    "readlink": lambda mnt: os.readlink(mnt / "link"),
    "mknod": lambda mnt: os.mkfifo(mnt / "fifo"),
    "mkdir": lambda mnt: os.mkdir(mnt / "new"),
    "symlink": lambda mnt: os.symlink("x", mnt / "new"),
    "link": lambda mnt: os.link(mnt / "file", mnt / "new"),
    "rmdir": lambda mnt: os.rmdir(mnt / "dir"),
    "rename": lambda mnt: os.rename(mnt / "other", mnt / "new"),
    "rename2": lambda mnt: syscalls.rename2(mnt / "other", mnt / "new", RENAME_NOREPLACE),
    "fsync": lambda mnt: on(mnt / "file", os.fsync),
    "not_needed": lambda mnt: synced_directory(mnt / "dir"),
    "getxattr": lambda mnt: os.getxattr(mnt / "file", "user.name"),
    "listxattr": lambda mnt: os.listxattr(mnt / "file"),
    "retrieved": passed_over,
    "removexattr": lambda mnt: os.removexattr(mnt / "file", "user.name"),
}
UNHEARD = {"raw:release", "raw:forget", "raw:batch_forget", "raw:retrieved"}  # no error of these reaches anybody
IOCTLS = [name for name in vars(abi) if name.startswith("IOC_") and getattr(abi, name) >> 16]
CASES = [*(f"raw:{name}" for name in RAW), *(f"ioctl:{name}" for name in IOCTLS)]


def ioctl(mnt: Path, name: str) -> None:
    number = getattr(abi, name)
    on(mnt / "file", lambda fd: fcntl.ioctl(fd, number, bytearray(abi.ioc_size(number))))


def trigger(case: str, mnt: Path) -> None:
    kind, _, name = case.partition(":")
    if kind == "ioctl":
        ioctl(mnt, name)
    else:
        RAW[name](mnt)


@pytest.fixture
def faulted(make_mount: Maker) -> Mounted:
    mounted = make_mount(size="8M")
    mnt = mounted.path
    (mnt / "file").write_bytes(CONTENT)
    os.setxattr(mnt / "file", "user.name", b"value")
    (mnt / "other").write_bytes(bytes(2 * BLOCK))
    (mnt / "dir").mkdir()
    (mnt / "link").symlink_to("file")
    mounted.umount()
    return mounted


def tree(mounted: Mounted) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in mounted.path.iterdir() if path.is_file()}


def is_read_only_and_alive(mounted: Mounted, kind: str) -> None:
    """What there was is there, changes are refused, and everybody is told why; then a plain mount finds all in order."""
    assert faulty.TEXT in eventually("the volume says why", lambda: mounted.info()["failed"])
    with pytest.raises(OSError, match="Read-only"):
        (mounted.path / "refused").mkdir()
    assert (mounted.path / "file").read_bytes() == CONTENT
    assert {"file", "dir", "link"} <= {*os.listdir(mounted.path)}
    before = tree(mounted)
    assert alive(mounted.pid)
    text = mounted.log_text()
    assert text.count("unexpected failure, the volume is read-only from now on") == 1
    assert f"{kind}: " in text or f"{kind}(" in text
    mounted.log.unlink()  # the next one must be empty of trouble
    mounted.umount()
    mounted.fsck()
    mounted.mount()
    assert mounted.info()["failed"] == ""
    assert tree(mounted) == before
    (mounted.path / "again").mkdir()


def test_nothing_is_left_out(faulted: Mounted) -> None:
    names = faulty.start(faulted)
    assert {*names["raw"]} == RAW.keys()
    assert {*names["ioctl"]} == {*IOCTLS}


@pytest.mark.parametrize(("case", "kind"), [*zip(CASES, cycle(faulty.KINDS), strict=False)])
def test_a_bug_in_a_handler(faulted: Mounted, case: str, kind: str) -> None:
    faulty.start(faulted)
    faulty.arm(faulted, case, kind)
    if case in UNHEARD:
        trigger(case, faulted.path)
    else:
        with pytest.raises(OSError, match=r".") as problem:
            trigger(case, faulted.path)
        assert problem.value.errno == errno.EIO
    eventually("the handler was met", lambda: not faulty.place(faulted).exists())
    is_read_only_and_alive(faulted, kind)


@pytest.mark.parametrize("kind", ["MemoryError", "RuntimeError"])
def test_a_bug_under_what_is_answered_quickly(faulted: Mounted, kind: str) -> None:
    """requests.pyx asks the directory; here nobody has translated or caught anything yet."""
    faulty.start(faulted, "allow_other")
    (faulted.path / "first").touch()  # the directory is in memory
    faulty.arm(faulted, "worker:lookup", kind)
    with pytest.raises(OSError, match=r".") as problem:
        os.stat(faulted.path / "never asked for")
    assert problem.value.errno == errno.EIO
    is_read_only_and_alive(faulted, kind)


@pytest.mark.parametrize("kind", ["MemoryError", "KeyError"])
def test_a_bug_in_the_delayed_free(faulted: Mounted, kind: str) -> None:
    faulty.start(faulted)
    with open(faulted.path / "other", "r+b") as file:
        pin, _, _ = calls.pin(file.fileno(), 0, BLOCK, client.FOLL_PIN)
        os.truncate(faulted.path / "other", 0)
        faulty.arm(faulted, "worker:free_unpinned", kind)
        calls.unpin(file.fileno(), pin, dirty=False)
    is_read_only_and_alive(faulted, kind)


def test_a_bug_while_the_image_is_watched(faulted: Mounted) -> None:
    faulty.start(faulted)
    faulty.arm(faulted, "worker:look", "OSError")
    is_read_only_and_alive(faulted, "OSError")


def test_a_bug_in_a_report(faulted: Mounted) -> None:
    """Made by a task of its own."""
    faulty.start(faulted)
    faulty.arm(faulted, "worker:text", "RuntimeError")
    with pytest.raises(OSError, match=r".") as problem:
        client.pins(faulted.path)
    assert problem.value.errno == errno.EIO
    is_read_only_and_alive(faulted, "RuntimeError")


def test_a_bug_while_survivors_are_looked_for(faulted: Mounted) -> None:
    """Nobody is known to be gone then: their blocks stay away from everybody."""
    faulted.mount()
    fd = os.open(faulted.path / "other", os.O_RDWR)
    calls.pin(fd, 0, BLOCK, client.FOLL_PIN)
    os.truncate(faulted.path / "other", 0)
    faulted.kill()
    faulty.arm(faulted, "worker:gone", "MemoryError")
    faulty.start(faulted)
    eventually("the worker has failed", lambda: faulted.info()["failed"])
    assert faulted.info()["busy"] == 1
    with contextlib.suppress(OSError):  # of a dead mount
        os.close(fd)
    is_read_only_and_alive(faulted, "MemoryError")
