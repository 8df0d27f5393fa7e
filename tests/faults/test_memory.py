"""A daemon that runs out of memory. Some is kept back (daemon/spare.h): calls that need more are refused with ENOMEM, all
others are served; with more memory all is as before, and what was acknowledged is there.

Should an allocation fail all the same, anywhere, nothing that was acknowledged is lost, nobody hangs, and the next mount
finds a sound volume. That the daemon lives is not promised then: pyfuse3 and trio do not live through all of it.
DAXFS_TEST_ALLOCATIONS: how often (8).
"""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from daxfs import client
from daxfs.client import calls
from tests.conftest import Maker
from tests.faults import forgetful
from tests.mount.harness import alive
from tests.mount.test_crash import fresh_seed

BLOCK = 4096
CONTENT = os.urandom(8 * BLOCK)
ROOM = 1 << 20
ROUNDS = int(os.environ.get("DAXFS_TEST_ALLOCATIONS") or 8)


def pins(mnt: Path, _: ExitStack) -> None:
    with client.open(mnt / "file", "r+") as file:
        while True:
            calls.pin(file.fileno(), 0, BLOCK, client.FOLL_PIN)


def files(mnt: Path, _: ExitStack) -> None:
    for number in range(100_000):
        with open(mnt / f"file-{number}", "wb", buffering=0) as file:
            os.setxattr(file.fileno(), "user.name", bytes(3000))


def open_files(mnt: Path, open_ones: ExitStack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    open_ones.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    while True:
        open_ones.callback(os.close, os.open(mnt / "file", os.O_RDONLY))


def extents(mnt: Path, _: ExitStack) -> None:
    with open(mnt / "sparse", "wb", buffering=0) as file:
        for number in range(1_000_000):
            os.pwrite(file.fileno(), b"x", 2 * BLOCK * number)


def used(pid: int) -> int:
    """Bytes of address space."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def limit(pid: int, size: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


Hungry = Callable[[Path, ExitStack], None]


@pytest.mark.parametrize("hungry", [pins, files, open_files, extents])
def test_memory_runs_out(make_mount: Maker, hungry: Hungry) -> None:
    mounted = make_mount(size="2G")
    (mounted.path / "file").write_bytes(CONTENT)
    served = os.open(mounted.path / "file", os.O_RDWR)
    limit(mounted.pid, used(mounted.pid) + ROOM)
    with ExitStack() as open_ones:
        with pytest.raises(OSError, match=r".") as problem:
            hungry(mounted.path, open_ones)
        assert problem.value.errno == errno.ENOMEM
        assert alive(mounted.pid)
        assert os.pread(served, 8 * BLOCK, 0) == CONTENT
        os.statvfs(mounted.path)
        os.fstat(served)
        assert "out of memory: names, opens and writes are refused" in mounted.log_text()
    limit(mounted.pid, resource.RLIM_INFINITY)
    (mounted.path / "new").mkdir()
    assert mounted.info()["failed"] == ""
    os.close(served)
    mounted.umount()
    assert "there is memory again" in mounted.log_text()
    mounted.log.unlink()  # the next one must be empty of trouble
    mounted.fsck()
    mounted.mount()
    assert (mounted.path / "file").read_bytes() == CONTENT


def pin_and_truncate(file: Path) -> None:
    with client.open(file, "r+") as pinned, pinned.pin(0, BLOCK):
        os.truncate(file, 0)


def some_calls(mnt: Path) -> None:
    """All kinds of them; each may fail."""
    one, two, directory, link = (mnt / name for name in ("one", "two", "directory", "link"))
    for call in (
        lambda: one.write_bytes(CONTENT), lambda: os.truncate(one, 5000), lambda: os.rename(one, two),
        lambda: os.listdir(mnt), lambda: os.setxattr(two, "user.name", b"value"), directory.mkdir,
        lambda: link.symlink_to("two"), link.readlink, lambda: os.statvfs(mnt), lambda: client.pins(mnt),
        two.read_bytes, lambda: pin_and_truncate(two), link.unlink, directory.rmdir,
    ):  # fmt: skip
        with suppress(OSError):
            call()


def test_allocations_fail_anywhere(make_mount: Maker) -> None:
    pytest.importorskip("_testcapi", reason="CPython's own tests are not installed (Debian: libpython3-testsuite)")
    seed = fresh_seed()
    print(f"DAXFS_TEST_SEED={seed} chooses the same allocations again")
    choose = random.Random(seed)
    mounted = make_mount(size="64M", watchdog_s=120)
    (mounted.path / "file").write_bytes(CONTENT)
    mounted.umount()
    for _ in range(ROUNDS):
        forgetful.start(mounted)
        with suppress(AssertionError, OSError):  # it may die of the signal's own work
            forgetful.arm(mounted, choose.randrange(1, 8000), choose.choice((1, 2, 5, 50)))
        if os.path.ismount(mounted.path):
            some_calls(mounted.path)
        with suppress(AssertionError, OSError):
            forgetful.arm(mounted, 1, 0)
        with suppress(AssertionError):
            mounted.umount()
        if mounted.pid and alive(mounted.pid):
            mounted.kill()
        mounted.pid = 0
        mounted.log.unlink()
        mounted.fsck()
        mounted.mount()
        assert (mounted.path / "file").read_bytes() == CONTENT
        (mounted.path / "again").mkdir()
        (mounted.path / "again").rmdir()
        mounted.umount()
        mounted.fsck()
    mounted.mount()
