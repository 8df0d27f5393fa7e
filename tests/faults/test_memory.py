"""A daemon that runs out of memory. Some is kept back (daemon/spare.h): calls that need more are refused with ENOMEM, all
others are served; with more memory all is as before, and what was acknowledged is there.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from daxfs import client
from daxfs.client import calls
from tests.conftest import Maker
from tests.faults import poor
from tests.mount.harness import Mounted, alive

BLOCK = 4096
CONTENT = os.urandom(8 * BLOCK)
ROOM = 3 << 20


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


Hungry = Callable[[Path, ExitStack], None]


@pytest.mark.parametrize("hungry", [pins, files, open_files, extents])
def test_memory_runs_out(make_mount: Maker, monkeypatch: pytest.MonkeyPatch, hungry: Hungry) -> None:
    mounted: Mounted = make_mount(size="2G", watchdog_s=40)
    (mounted.path / "file").write_bytes(CONTENT)
    mounted.umount()
    monkeypatch.setenv(poor.VARIABLE, str(ROOM))
    mounted.mount(setup=poor.SETUP)
    served = os.open(mounted.path / "file", os.O_RDWR)
    with ExitStack() as open_ones:
        with pytest.raises(OSError, match=r".") as problem:
            hungry(mounted.path, open_ones)
        assert problem.value.errno == errno.ENOMEM
        assert alive(mounted.pid)
        assert os.pread(served, 8 * BLOCK, 0) == CONTENT
        os.statvfs(mounted.path)
        os.fstat(served)
        assert "out of memory: names, opens and writes are refused" in mounted.log_text()
    resource.prlimit(mounted.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (mounted.path / "new").mkdir()
    assert mounted.info()["failed"] == ""
    os.close(served)
    mounted.umount()
    assert "there is memory again" in mounted.log_text()
    mounted.log.unlink()  # the next one must be empty of trouble
    mounted.fsck()
    mounted.mount()
    assert (mounted.path / "file").read_bytes() == CONTENT
