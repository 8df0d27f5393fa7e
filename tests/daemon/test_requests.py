"""The records and open files of requests.pyx, without a mount: against the layouts of <linux/fuse.h>."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from dataclasses import dataclass
from typing import Any, cast

import pytest

import daxfs.daemon  # noqa: F401 - the session comes first
from daxfs.core.extents import HOT_READ, ExtentMap
from daxfs.core.inode import Inode
from daxfs.daemon import requests, session
from daxfs.errors import Corrupt

NS = 1_000_000_000
ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
NAMES = (
    "ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec", "ctimensec", "mode", "nlink", "uid", "gid",
    "rdev", "blksize", "flags",
)  # fmt: skip


@dataclass
class Facts:
    """An inode as far as replies go."""

    ino: int = 17
    generation: int = 3
    mode: int = stat.S_IFREG | 0o640
    nlink: int = 2
    uid: int = 1000
    gid: int = 1001
    rdev: int = 0
    size: int = 5000
    blocks: int = 2
    atime: int = 1
    mtime: int = 2 * NS + 5
    ctime: int = 3 * NS - 1

    def attr(self) -> dict[str, int]:
        times = {name: divmod(getattr(self, name), NS) for name in ("atime", "mtime", "ctime")}
        return {
            "ino": self.ino, "size": self.size, "blocks": self.blocks * 8, "mode": self.mode, "nlink": self.nlink,
            "uid": self.uid, "gid": self.gid, "rdev": self.rdev, "blksize": 4096, "flags": 0,
            **{name: seconds for name, (seconds, _) in times.items()},
            **{f"{name}nsec": ns for name, (_, ns) in times.items()},
        }  # fmt: skip


def attr(data: bytes) -> dict[str, int]:
    return dict(zip(NAMES, ATTR.unpack(data), strict=True))


TIMES = (0, -1, -NS, -NS - 1, NS - 1, -(1 << 31) * NS, (1 << 33) * NS + 7, (1 << 63) - 1, 1 << 63, 15_000_000_000 * NS + 1)


@pytest.mark.parametrize("ns", TIMES)
def test_times_of_any_sign_and_size(ns: int) -> None:
    facts = Facts(atime=ns, mtime=ns + 1, ctime=ns)
    assert attr(requests.attr_out(facts)[16:]) == facts.attr()


def test_attributes_and_entries() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(300):
        numbers = [rng.getrandbits(rng.randint(1, 32)) for _ in range(6)]
        facts = Facts(rng.getrandbits(62), *numbers, rng.getrandbits(60), rng.getrandbits(50), *(
            rng.randrange(-(1 << 60), 1 << 60) for _ in range(3)))  # fmt: skip
        out, entry = requests.attr_out(facts), requests.entry_out(facts)
        assert len(out) == 104, seed
        assert len(entry) == 128, seed
        assert struct.unpack_from("=QI", out) == (requests.VALID_S, 0), seed
        assert struct.unpack_from("=QQQQII", entry) == (
            facts.ino, facts.generation, requests.VALID_S, requests.VALID_S, 0, 0,
        ), seed  # fmt: skip
        assert attr(out[16:]) == attr(entry[40:]) == facts.attr(), seed


@pytest.mark.parametrize("plus", [False, True])
def test_a_listing_is_records_up_to_its_size(plus: bool) -> None:
    head = 24 + 128 * plus
    names = [b"n" * n for n in (1, 7, 8, 9, 255, 16, 17)]
    for size in range(head, head * 8 + 330, 5):
        listing, expected = requests.Listing(size, plus=plus), b""
        for n, name in enumerate(names):
            known = Facts(ino=n + 100) if n % 2 else None
            record = (requests.entry_out(known) if known else bytes(128)) if plus else b""
            record += struct.pack("=QQII", n, 1000 + n, len(name), 8) + name
            record = record.ljust((len(record) + 7) & ~7, b"\0")
            fits = len(expected) + len(record) <= size
            assert listing.has_room(name) == fits
            assert listing.add(name, n, 8, 1000 + n, known) == fits
            if not fits:
                break
            expected += record
        assert bytes(listing.data()) == expected


class Opened:
    """What opening needs of an inode."""

    def __init__(self, *, is_file: bool = True, damaged: bool = False) -> None:
        self.ino, self.opens, self.is_file, self.damaged = 5, 0, is_file, damaged
        self.map = ExtentMap()

    def set_hot(self) -> None:
        assert self.opens
        if self.damaged:
            raise Corrupt("extents")
        self.map.hot = HOT_READ


@pytest.fixture
def opened() -> dict[int, dict[int, requests.OpenFile]]:
    found: dict[int, dict[int, requests.OpenFile]] = {}

    def unasked(*args: Any) -> Any:
        raise AssertionError

    requests.install(
        unasked, {}, found, unasked, unasked, breaks={}, block_size=4096, file_flags=0, directory_flags=0, quick=False,
        direct=True,
    )  # fmt: skip
    return found


def test_open_files_are_found_by_inode_and_handle(opened: dict[int, dict[int, requests.OpenFile]]) -> None:
    inode = Opened()
    one, other = (requests.open_file(cast(Inode, inode), flags, 7) for flags in (os.O_RDONLY, os.O_RDWR | os.O_APPEND))
    assert inode.opens == 2
    assert {fh: (file.fh, file.task, file.writable) for fh, file in opened[5].items()} == {
        one: (one, 7, False), other: (other, 7, True),
    }  # fmt: skip
    assert session.keeper(one) is opened[5][one]
    requests.close_file(opened[5][one])
    assert [*opened[5]] == [other]
    requests.close_file(opened[5][other])
    assert not opened
    with pytest.raises(KeyError):
        session.keeper(one)


def test_directories_are_not_among_them(opened: dict[int, dict[int, requests.OpenFile]]) -> None:
    fh = requests.open_file(cast(Inode, Opened(is_file=False)), os.O_RDONLY)
    file = session.keeper(fh)
    assert isinstance(file, requests.OpenFile)
    assert not opened
    requests.close_file(file)


def test_an_open_that_fails_leaves_nothing(opened: dict[int, dict[int, requests.OpenFile]]) -> None:
    inode = Opened(damaged=True)
    with pytest.raises(Corrupt) as problem:
        requests.open_file(cast(Inode, inode), os.O_RDWR)
    assert problem.value.errno == errno.EIO
    assert (inode.opens, opened) == (0, {})
    fh = session.attach()
    session.detach(fh)
    assert fh == requests.open_file(cast(Inode, Opened()), os.O_RDWR)  # no handle was lost
    requests.close_file(opened[5][fh])


@pytest.mark.parametrize(
    ("mode", "access"),
    [(os.O_RDONLY, (True, False)), (os.O_WRONLY, (False, True)), (os.O_RDWR, (True, True)), (3, (False, False))],
)
def test_access_modes(mode: int, access: tuple[bool, bool]) -> None:
    file = requests.OpenFile(cast(Inode, Opened()), mode | os.O_APPEND)
    assert (file.readable, file.writable) == access
