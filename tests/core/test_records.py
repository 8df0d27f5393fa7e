"""The compiled encoders say what the tables of layout.py say, and compiled stores stay within the image."""

from __future__ import annotations

import ctypes

import crc32c as library
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import layout, records
from daxfs.core.extents import ExtentMap
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRENT, DIRENT_ALIGN, DIRENT_CRC_AT, EXTENT, INODE, TXN_HEADER, TXN_RECORD
from daxfs.core.memory import Memory
from daxfs.core.records import Record
from daxfs.core.volume import Volume
from daxfs.errors import BadHandle, Corrupt, NoSpace

from .image import NOW, new_inode

words = st.integers(0, (1 << 64) - 1)
halves = st.integers(0, (1 << 32) - 1)


@given(data=st.binary(max_size=300), crc=halves)
def test_checksums(data: bytes, crc: int) -> None:
    want = library.crc32c(data, crc)
    assert records.crc32c(data, crc) == records.crc32c(memoryview(data), crc, by_table=True) == want


@given(ns=st.integers(-(1 << 70), 1 << 70) | st.integers(-(1 << 62), 1 << 62), word=words)
def test_times(ns: int, word: int) -> None:
    assert records.time_word(ns) == layout.time_word(ns)
    assert records.time_ns(word) == layout.time_ns(word)


@given(ino=words, length=st.integers(18, 999), dtype=st.integers(0, 255), name=st.binary(max_size=255),
       rest=st.integers(1, 999))  # fmt: skip
def test_directory_entries(ino: int, length: int, dtype: int, name: bytes, rest: int) -> None:
    def packed(ino: int, length: int, dtype: int, name: bytes) -> bytes:
        record = DIRENT.pack(ino=ino, crc=0, length=length, name_length=len(name), type=dtype) + name
        return layout.seal(record, DIRENT_CRC_AT)

    entry = packed(ino, length, dtype, name)
    assert records.pack_entry(ino, length, dtype, name) == entry
    slot = packed(0, rest, 0, b"")
    assert records.pack_entry(ino, length, dtype, name, rest) == entry.ljust(length * DIRENT_ALIGN, b"\0") + slot


@given(sequence=words, parts=st.lists(st.tuples(words, st.binary(max_size=100)), max_size=6))
def test_transactions(sequence: int, parts: list[tuple[int, bytes]]) -> None:
    body = b"".join(TXN_RECORD.pack(address=at, length=len(data)) + data + bytes(-len(data) % 8) for at, data in parts)
    head = TXN_HEADER.pack(magic=layout.TXN_MAGIC, crc=0, sequence=sequence, length=len(body), records=len(parts))
    assert records.pack_transaction(sequence, parts, len(body)) == layout.seal(head + body)
    if body:
        with pytest.raises(NoSpace):
            records.pack_transaction(sequence, tuple(parts), len(body) - 1)


@given(
    fields=st.fixed_dictionaries({
        "ino": words, "generation": halves, "uid": halves, "gid": halves, "flags": halves, "parent": words,
        "mode": st.sampled_from([0o100644, 0o040755, 0o120777, 0o020600, 0o060600, 0o010644, 0o140777]),
        "nlink": st.integers(0, layout.LINK_MAX), "rdev": halves, "xattr_block": words,
    }),
    size=st.integers(0, layout.FILE_SIZE_MAX), target=st.binary(max_size=144), xattrs=st.binary(max_size=240),
    extents=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=layout.INLINE_EXTENTS),
    times=st.tuples(words, words, words), birth=st.integers(0, NOW),
)  # fmt: skip
def test_an_inode(fields: dict[str, int], size: int, target: bytes, xattrs: bytes, extents: list[tuple[int, int]],
                  times: tuple[int, int, int], birth: int) -> None:  # fmt: skip
    mapped, body, at = ExtentMap(168, 12), b"", 0
    for i, (gap, count) in enumerate([] if target else extents):
        mapped.insert(at + gap, 1000 * i + 5000, count)
        body += EXTENT.pack(logical=at + gap, physical=1000 * i + 5000, count=count, flags=0)
        at += gap + count

    def load_word(address: int) -> int:
        return times[(address - 4096 - layout.INODE_TIMES_AT) // 8]

    record = Record(load_word, fields["ino"], 4096, mapped)
    for name, value in fields.items():
        setattr(record, name, value)
    record.size, record.target, record.xattr_inline, record.btime = size, target, xattrs, birth
    mtime, ctime, atime = times
    raw = layout.seal(INODE.pack(
        **fields, magic=layout.INODE_MAGIC, crc=0, size=size, btime=layout.time_word(birth), leaf=0, extents=len(mapped),
        target_length=len(target), xattr_length=len(xattrs), body=target or body, xattrs=xattrs, blocks=mapped.blocks,
        mtime=mtime, ctime=ctime, atime=atime,
    ), end=layout.INODE_CRC_END)  # fmt: skip
    assert record._pack() == raw
    assert (record.mtime, record.ctime, record.atime) == tuple(map(layout.time_ns, times))
    again = Record(load_word, fields["ino"], 4096, ExtentMap(168, 12))
    again._parse(raw, 1 << 40)
    assert again._pack() == raw, "extents that were not loaded stay as they were"
    assert again.blocks == mapped.blocks
    damaged = bytearray(raw)
    damaged[40] ^= 1
    with pytest.raises(Corrupt, match="checksum"):
        again._parse(damaged, 1 << 40)
    with pytest.raises(BadHandle):
        again._parse(bytes(512), 1 << 40)
    with pytest.raises(Corrupt, match="cut off"):
        again._parse(raw[:511], 1 << 40)


def test_a_change_of_attributes_reads_no_leaves(vol: Volume) -> None:
    inode = new_inode(vol, 0o100644)
    with vol.transaction(NOW) as txn:
        for i in range(20):
            inode.map.insert(2 * i, txn.take(1)[0][0], 1)
        txn.dirty(inode)
    again = Inode(vol, inode.ino, inode.at)
    again.load()
    with vol.transaction(NOW) as txn:
        again.mode = 0o100600
        txn.dirty(again)
    assert len(again._map) == 0, "not loaded"
    assert list(again.map) == list(inode.map)
    assert again.mode == 0o100600


def test_stores_stay_within_the_image() -> None:
    backing = bytearray(4096)
    memory = Memory()
    memory._place(ctypes.addressof(ctypes.c_char.from_buffer(backing)), len(backing))
    memory.store(4090, b"123456")
    memory.copy(4090, 0, 6)
    memory.store_word(8, 77)
    assert bytes(backing[:6]) == b"123456"
    assert memory.load_word(8) == 77
    memory.fill_zero(4090, 6)
    assert not any(backing[4090:])
    for wrong in (
        lambda: memory.store(4091, b"123456"), lambda: memory.store(1 << 63, b"1"), lambda: memory.fill_zero(1, 4096),
        lambda: memory.copy(4095, 0, 2), lambda: memory.copy(0, 4095, 2), lambda: memory.store_word(4096, 1),
        lambda: memory.store_word(4, 1), lambda: memory.load_word(4089), lambda: memory.store(2, bytearray(4095)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"image|word"):
            wrong()
