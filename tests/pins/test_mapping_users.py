"""Mappings beside pins when there are several users, and when the daemon dies."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from pathlib import Path

import pytest

from daxfs import abi, client
from daxfs.client import calls
from daxfs.daemon.coherence import COHERENCE_MS, SHARE, TWINS_BYTES_MAX
from tests.conftest import Maker
from tests.mount.harness import eventually

pytestmark = pytest.mark.mount

BLOCK = 4096
NOBODY = 65534
BIG = TWINS_BYTES_MAX // SHARE + (8 << 20)  # more than one user's twins


def store_over_and_over(path: Path) -> None:
    """A user who pins a file and stores to all pages of a mapping of it, until killed."""
    os.setresuid(NOBODY, NOBODY, NOBODY)
    fd = os.open(path, os.O_RDWR)
    calls.pin(fd, 0, BIG, abi.FOLL_PIN | abi.FOLL_WRITE)
    with mmap.mmap(fd, BIG) as mapping:
        value = 0
        while True:
            value = (value + 1) % 256
            for at in range(0, BIG, BLOCK):
                mapping[at] = value


def test_a_user_who_stores_a_lot_makes_nobody_else_wait(make_mount: Maker) -> None:
    mounted = make_mount(size="128M", options="allow_other")
    theirs, ours = mounted.path / "theirs", mounted.path / "ours"
    for path, size in ((theirs, BIG), (ours, BLOCK)):
        with open(path, "wb") as file:
            file.write(bytes(size))
    os.chown(theirs, NOBODY, NOBODY)
    user = os.fork()
    if user == 0:
        try:
            store_over_and_over(theirs)
        finally:
            os._exit(1)
    try:
        with client.open(ours, "r+") as file, file.pin(write=True) as pin, mmap.mmap(file.fileno(), BLOCK) as mapping:
            view = pin.map()
            slowed = eventually("the user's passes are rare", lambda: slow(mounted.info()), within_s=60)
            assert slowed["twins"] <= TWINS_BYTES_MAX // SHARE // BLOCK
            for value in range(1, 6):
                mapping[value] = value
                eventually("the holder sees it", lambda: view[value] == value, within_s=20)
                view[100 + value] = value
                eventually("the application sees it", lambda: mapping[100 + value] == value, within_s=20)
                mine = [one for one in mounted.info()["coherence"]["users"] if one["uid"] == 0]
                assert all(one["period_ms"] == COHERENCE_MS for one in mine)
        assert os.waitpid(user, os.WNOHANG) == (0, 0)  # it went on
    finally:
        os.kill(user, signal.SIGKILL)
        os.waitpid(user, 0)
    eventually("its twins are gone", lambda: not mounted.info()["coherence"]["twins"], within_s=60)


def slow(info: dict) -> dict:  # type: ignore[type-arg]
    return next((u for u in info["coherence"]["users"] if u["uid"] == NOBODY and u["period_ms"] > 2 * COHERENCE_MS), {})


@pytest.mark.parametrize("asked", [True, False], ids=["after-an-fsync", "first-fsync"])
def test_fsync_fails_when_the_daemon_has_died(make_mount: Maker, asked: bool) -> None:
    """What was stored and not written back is lost then, so nothing may say that it is safe."""
    mounted = make_mount(size="64M")
    path = mounted.path / "file"
    path.write_bytes(bytes(BLOCK))
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, BLOCK) as mapping:
        mapping[0] = 1
        if asked:
            mapping.flush()
            os.fsync(fd)
        mapping[0] = 2
        mounted.kill()
        for call in (mapping.flush, lambda: os.fsync(fd)):
            with pytest.raises(OSError, match=r".") as caught:
                call()
            assert caught.value.errno in (errno.ENOTCONN, errno.EIO)
    os.close(fd)
    mounted.mount()
    assert path.read_bytes()[0] == int(asked)
