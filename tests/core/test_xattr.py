"""Extended attributes on a real volume: inline, chained, back again; limits, aborts, hostile chains."""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import xattr
from daxfs.core.inode import Inode
from daxfs.core.layout import INLINE_XATTR_MAX, XATTR, XATTR_BLOCK, XATTR_BLOCK_MAGIC, XATTR_VALUE_MAX, seal
from daxfs.core.volume import Volume
from daxfs.errors import BadArgument, Corrupt, Exists, FsError, NoData, NoSpace, OutOfRange

from .image import NOW, Abort, fresh_volume, new_inode


@pytest.fixture
def vol(tmp_path: Path) -> Iterator[Volume]:
    with fresh_volume(tmp_path) as volume:
        yield volume


@pytest.fixture
def inode(vol: Volume) -> Inode:
    return new_inode(vol, stat.S_IFREG | 0o644)


def put(vol: Volume, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
    with vol.transaction(NOW) as txn:
        xattr.set(vol, txn, inode, name, value, flags)


def drop(vol: Volume, inode: Inode, name: bytes) -> None:
    with vol.transaction(NOW) as txn:
        xattr.remove(vol, txn, inode, name)


def reread(vol: Volume, inode: Inode) -> dict[bytes, bytes]:
    """What media says."""
    inode.xattrs = None
    return {name: xattr.get(vol, inode, name) for name in xattr.names(vol, inode)}


def test_none(vol: Volume, inode: Inode) -> None:
    assert xattr.names(vol, inode) == []
    with pytest.raises(NoData):
        xattr.get(vol, inode, b"user.a")
    with pytest.raises(NoData):
        drop(vol, inode, b"user.a")


def test_inline(vol: Volume, inode: Inode) -> None:
    free = vol.free
    put(vol, inode, b"user.a", b"1")
    put(vol, inode, b"user.b", b"")
    put(vol, inode, b"user.a", b"22")
    assert reread(vol, inode) == {b"user.a": b"22", b"user.b": b""}
    assert inode.xattr_block == 0
    assert vol.free == free
    drop(vol, inode, b"user.a")
    assert reread(vol, inode) == {b"user.b": b""}


def test_out_of_the_inode_and_back(vol: Volume, inode: Inode) -> None:
    free = vol.free
    put(vol, inode, b"user.small", b"s" * 100)
    put(vol, inode, b"user.big", b"b" * XATTR_VALUE_MAX)
    assert inode.xattr_block
    assert inode.xattr_inline == b""
    assert vol.free < free - XATTR_VALUE_MAX // vol.block_size
    assert reread(vol, inode) == {b"user.small": b"s" * 100, b"user.big": b"b" * XATTR_VALUE_MAX}
    put(vol, inode, b"user.big", b"c" * 5000)
    assert reread(vol, inode)[b"user.big"] == b"c" * 5000
    assert vol.free == free - 2
    drop(vol, inode, b"user.big")
    assert inode.xattr_block == 0
    assert vol.free == free
    assert reread(vol, inode) == {b"user.small": b"s" * 100}


def test_the_inline_area_is_used_to_its_last_byte(vol: Volume, inode: Inode) -> None:
    room = INLINE_XATTR_MAX - XATTR.size - len(b"user.a")
    put(vol, inode, b"user.a", b"x" * room)
    assert inode.xattr_block == 0
    put(vol, inode, b"user.a", b"x" * (room + 1))
    assert inode.xattr_block
    assert reread(vol, inode) == {b"user.a": b"x" * (room + 1)}


def test_flags(vol: Volume, inode: Inode) -> None:
    with pytest.raises(NoData):
        put(vol, inode, b"user.a", b"1", xattr.XATTR_REPLACE)
    put(vol, inode, b"user.a", b"1", xattr.XATTR_CREATE)
    with pytest.raises(Exists):
        put(vol, inode, b"user.a", b"2", xattr.XATTR_CREATE)
    put(vol, inode, b"user.a", b"3", xattr.XATTR_REPLACE)
    assert reread(vol, inode) == {b"user.a": b"3"}


def test_limits(vol: Volume, inode: Inode) -> None:
    put(vol, inode, b"user." + b"n" * 250, b"x")
    for name, value, flags, code in (
        (b"user." + b"n" * 251, b"x", 0, errno.ERANGE),
        (b"", b"x", 0, errno.ERANGE),
        (b"user.a", b"x" * (XATTR_VALUE_MAX + 1), 0, errno.E2BIG),
        (b"user.a", b"x", 4, errno.EINVAL),
    ):
        with pytest.raises(FsError) as caught:
            put(vol, inode, name, value, flags)
        assert caught.value.errno == code
    assert issubclass(OutOfRange, FsError)
    assert issubclass(BadArgument, FsError)
    assert len(reread(vol, inode)) == 1


def test_total_limit(vol: Volume, inode: Inode) -> None:
    fit = xattr.XATTR_TOTAL_MAX // (XATTR_VALUE_MAX + XATTR.size + 8)
    for n in range(fit):
        put(vol, inode, b"user.%03d" % n, b"x" * XATTR_VALUE_MAX)
    with pytest.raises(NoSpace):
        put(vol, inode, b"user.one", b"x" * XATTR_VALUE_MAX)
    assert len(reread(vol, inode)) == fit


def test_list_limit(vol: Volume, inode: Inode) -> None:
    """listxattr(2) can return 64 KiB of names, so there are no more."""
    for n in range(256):
        put(vol, inode, b"user.%03d" % n + b"n" * 247, b"")
    with pytest.raises(NoSpace):
        put(vol, inode, b"user.one-more", b"")
    assert len(reread(vol, inode)) == 256


def test_abort_changes_nothing(vol: Volume, inode: Inode) -> None:
    put(vol, inode, b"user.a", b"x" * 1000)
    free, block = vol.free, inode.xattr_block
    with suppress(Abort), vol.transaction(NOW) as txn:
        xattr.set(vol, txn, inode, b"user.a", b"y" * 9000)
        raise Abort
    assert (vol.free, inode.xattr_block) == (free, block)
    assert xattr.get(vol, inode, b"user.a") == b"x" * 1000
    assert reread(vol, inode) == {b"user.a": b"x" * 1000}


def test_free_all(vol: Volume, inode: Inode) -> None:
    free = vol.free
    put(vol, inode, b"user.a", b"x" * 10000)
    with vol.transaction(NOW) as txn:
        xattr.free_all(vol, txn, inode)
    assert vol.free == free
    assert reread(vol, inode) == {}


def test_a_full_volume_can_still_remove(vol: Volume, inode: Inode) -> None:
    put(vol, inode, b"user.a", b"x" * 3000)
    put(vol, inode, b"user.b", b"x" * 3000)
    with vol.transaction(NOW) as txn:
        txn.take(vol.alloc.available)
    with pytest.raises(NoSpace):
        put(vol, inode, b"user.c", b"x" * 3000)
    drop(vol, inode, b"user.a")
    assert reread(vol, inode) == {b"user.b": b"x" * 3000}


@given(st.dictionaries(st.binary(min_size=1, max_size=255).filter(lambda n: b"\0" not in n), st.binary(max_size=3000)))
def test_encode_and_decode(xattrs: dict[bytes, bytes]) -> None:
    assert xattr.decode(xattr.encode(xattrs), "test") == xattrs


@given(st.binary(max_size=300))
def test_any_bytes_are_judged(data: bytes) -> None:
    try:
        decoded = xattr.decode(data, "test")
    except Corrupt:
        return
    assert xattr.encode(decoded) == data


def rewrite(vol: Volume, inode: Inode, **changes: int) -> None:
    """Change fields of the first xattr block and make its checksum right again."""
    at = inode.xattr_block * vol.block_size
    data = vol.pmem.load(at, vol.block_size)
    header = {**XATTR_BLOCK.unpack(data), **changes}
    length = header["length"] if isinstance(header["length"], int) else 0
    vol.pmem.store(at, seal(XATTR_BLOCK.pack(**header) + data[XATTR_BLOCK.size : XATTR_BLOCK.size + length]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"magic": XATTR_BLOCK_MAGIC + 1}, "magic"),
        ({"ino": 12345}, "belongs"),
        ({"generation": 12345}, "belongs"),
        ({"address": 12345}, "belongs"),
        ({"length": 0}, "payload"),
        ({"length": 1 << 31}, "payload"),
        ({"length": 500}, "longer|cut off|valid"),
        ({"next": 1 << 62}, "outside"),
        ({"next": 1}, "outside"),
    ],
)
def test_well_formed_but_wrong(vol: Volume, inode: Inode, changes: dict[str, int], why: str) -> None:
    put(vol, inode, b"user.a", b"x" * 4500)
    rewrite(vol, inode, **changes)
    inode.xattrs = None
    with pytest.raises(Corrupt, match=why):
        xattr.get(vol, inode, b"user.a")


def test_a_cycle_ends(vol: Volume, inode: Inode) -> None:
    put(vol, inode, b"user.a", b"x" * 1000)
    rewrite(vol, inode, next=inode.xattr_block)
    inode.xattrs = None
    with pytest.raises(Corrupt, match="cycle"):
        xattr.get(vol, inode, b"user.a")


def test_a_flipped_bit_is_found_and_the_inode_can_still_die(vol: Volume, inode: Inode) -> None:
    put(vol, inode, b"user.a", b"x" * 9000)
    dice = random.Random(5)
    at = inode.xattr_block * vol.block_size + dice.randrange(XATTR_BLOCK.size + 4000)
    vol.pmem.store(at, bytes([vol.pmem.load(at, 1)[0] ^ 1 << dice.randrange(8)]))
    inode.xattrs = None
    with pytest.raises(Corrupt):
        xattr.names(vol, inode)
    with vol.transaction(NOW) as txn:
        xattr.free_all(vol, txn, inode)
    assert reread(vol, inode) == {}
