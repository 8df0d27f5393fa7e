"""Which opens are cached, by a model of one: random opens, closes and pins of a few files, without the kernel."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daxfs import abi
from daxfs.core import fileops, holding, namespace
from daxfs.core.breaking import Break
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.core.waiting import LayoutBusy
from daxfs.daemon import caching, protocol, requests, session
from daxfs.daemon.service import OpenFile, Service
from daxfs.errors import BadArgument, Busy
from tests.core.image import NOW, fresh_volume

WRITE = abi.FOLL_PIN | abi.FOLL_WRITE
CACHED, DIRECT = protocol.FOPEN_KEEP_CACHE, caching.DIRECT_FLAGS


class Bench:
    """A service of a volume that nobody has mounted; its tasks are only noted."""

    def __init__(self, volume: Volume, monkeypatch: pytest.MonkeyPatch, dax: str = "never") -> None:
        self.tasks: list[Any] = []
        monkeypatch.setattr(Service, "start", lambda _, *work: self.tasks.append(work))
        self.service = service = Service(volume, "/nowhere", dax)
        requests.install(
            volume.inode, service.names, service.opened, None, None, breaks=volume.breaks, block_size=volume.block_size,
            file_flags=caching.DIRECT_FLAGS, directory_flags=0, quick=False, direct=False,
        )  # fmt: skip
        self.caching = self.service.caching
        self.volume = volume
        self.holder = Holder(os.getpid(), "test", 1)

    def file(self, name: bytes = b"f") -> Inode:
        root = self.volume.root
        inode = namespace.create(self.volume, NOW, root, name, stat.S_IFREG | 0o600, Caller(0, 0, 0))
        fileops.write(self.volume, NOW, inode, 0, b"x" * 8192)
        return inode

    def open(self, inode: Inode, flags: int = os.O_RDWR) -> OpenFile:
        return self.service.file(self.service.open(inode, flags))

    def pin(self, file: OpenFile, flags: int = WRITE) -> int:
        self.caching.before_pin(file, flags)
        taken = holding.pin(
            self.volume, NOW, file.inode, 0, 4096, flags, file.fh, self.holder, writable=file.writable
        )
        return int(taken.id)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with fresh_volume(tmp_path) as volume:
        yield Bench(volume, monkeypatch)


def test_the_first_open_decides(bench: Bench) -> None:
    f = bench.file()
    for first, then, wanted in (
        (os.O_RDWR, os.O_RDONLY | abi.O_PIN, CACHED),
        (os.O_RDONLY | abi.O_PIN, os.O_RDWR, DIRECT),
        (os.O_RDWR | os.O_DIRECT, os.O_RDWR, CACHED),
        (os.O_RDWR | os.O_NONBLOCK, os.O_RDWR | abi.O_PIN, CACHED),
    ):
        files = [bench.open(f, first), bench.open(f, then)]
        assert [bench.caching.flags(file) for file in files] == [wanted, wanted]
        bench.caching.check()
        for file in files:
            bench.service.release(file.fh)
    assert not f.opens


def test_always_is_always_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_volume(tmp_path) as volume:
        bench = Bench(volume, monkeypatch, "always")
        file = bench.open(bench.file())
        assert bench.caching.flags(file) == DIRECT
        bench.caching.fill(file.inode)
        bench.pin(file)
        bench.caching.fill(file.inode)
        bench.service.release(file.fh)
    assert caching.init_flags("always") & session.INIT_DIRECT_IO_ALLOW_MMAP
    assert caching.init_flags("never") & session.INIT_WRITEBACK_CACHE
    assert not caching.init_flags("never") & session.INIT_DIRECT_IO_ALLOW_MMAP


def test_an_open_drops_no_pages_while_a_layout_change_waits(bench: Bench) -> None:
    """It would wait for write-back, which the kernel holds back until the change is answered."""
    file = bench.open(bench.file(), os.O_RDWR | abi.O_PIN)
    bench.volume.breaks[file.inode.ino] = [Break(0, 1)]
    assert bench.caching.flags(file) == DIRECT | protocol.FOPEN_KEEP_CACHE
    del bench.volume.breaks[file.inode.ino]
    assert bench.caching.flags(file) == DIRECT


def test_pages_of_a_direct_file(bench: Bench) -> None:
    """They are dropped before a write pin, and refused as long as there is one."""
    file = bench.open(bench.file(), os.O_RDWR | abi.O_PIN)
    inode = file.inode
    bench.caching.fill(inode)
    bench.pin(file, abi.FOLL_PIN)
    with pytest.raises(LayoutBusy):
        bench.pin(file)
    assert [work[-1] for work in bench.tasks] == [inode.ino]
    with pytest.raises(BadArgument):
        bench.caching.fill(inode)  # while they are dropped
    with pytest.raises(LayoutBusy):
        bench.pin(file)
    assert len(bench.tasks) == 1, "one drop is enough"


def test_who_opens_to_pin_waits_for_a_release(bench: Bench) -> None:
    f, request = bench.file(), SimpleNamespace(unique=7)
    file = bench.open(f)
    bench.caching.await_release(request, f, os.O_RDWR)  # type: ignore[arg-type]
    with pytest.raises(LayoutBusy):
        bench.caching.await_release(request, f, os.O_RDWR | abi.O_PIN)  # type: ignore[arg-type]
    bench.service.release(file.fh)
    bench.caching.await_release(request, f, os.O_RDWR | abi.O_PIN)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_opens_and_pins(seed: int, bench: Bench) -> None:
    dice = random.Random(seed)
    inodes = [bench.file(b"f%d" % n) for n in range(3)]
    opened: list[OpenFile] = []
    granted = busy = 0
    for _ in range(1500):
        chance = dice.random()
        if chance < 0.4 and len(opened) < 12:
            access = dice.choice((os.O_RDONLY, os.O_RDWR, os.O_WRONLY))
            opened.append(bench.open(dice.choice(inodes), access | dice.choice((0, 0, abi.O_PIN, os.O_DIRECT))))
        elif chance < 0.8 and opened:
            bench.service.release(opened.pop(dice.randrange(len(opened))).fh)
        elif opened:
            file = dice.choice(opened)
            if file.readable and file.writable:
                try:
                    bench.pin(file, dice.choice((WRITE, abi.FOLL_PIN, abi.FOLL_GET, abi.PIN_ON_DEMAND)))
                    granted += 1
                except Busy:
                    assert file.cached
                    busy += 1
        bench.caching.check()
    assert granted > 20
    assert busy > 20
    for file in opened:
        bench.service.release(file.fh)
    bench.caching.check()
