"""Bytes on media: tables, checksums, time words. What is frozen here cannot change without a new media version."""

from __future__ import annotations

import struct

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import layout
from daxfs.core.layout import INODE, SUPERBLOCK, TABLES, TIME_MAX, TIME_MIN, Table, time_ns, time_word
from daxfs.errors import Corrupt

NS = 1_000_000_000

# Media version 1: a table's size, and where one telling field is.
FROZEN = {
    "superblock": (512, "uuid", 64),
    "journal header": (32, "body_blocks", 16),
    "transaction": (32, "length", 16),
    "redo record": (16, "length", 8),
    "inode": (512, "mtime", 488),
    "extent": (24, "count", 16),
    "extent leaf": (64, "count", 32),
    "directory block": (32, "index", 24),
    "directory entry": (16, "length", 12),
    "xattr record": (8, "name_length", 4),
    "xattr block": (48, "length", 32),
    "ledger block": (64, "boot_id", 24),
    "ledger entry": (64, "pid", 40),
    "free-space snapshot": (64, "payload_crc", 40),
}


def test_media_version_1_is_frozen() -> None:
    assert layout.MEDIA_VERSION == 1
    assert {t.title: (t.size, FROZEN[t.title][1], t.offset[FROZEN[t.title][1]]) for t in TABLES} == FROZEN


def test_time_words_are_aligned_and_outside_the_checksum() -> None:
    assert layout.INODE_TIMES_AT % 8 == 0
    assert layout.INODE_CRC_END == layout.INODE_TIMES_AT
    assert INODE.size - layout.INODE_TIMES_AT == 3 * 8


def test_a_commit_word_has_its_own_cache_line() -> None:
    assert layout.JOURNAL_COMMIT_AT % 64 == 0
    assert layout.JOURNAL_HEADER.size <= layout.JOURNAL_COMMIT_AT


def test_magics_differ() -> None:
    magics = {name: value for name, value in vars(layout).items() if name.endswith("_MAGIC")}
    assert len(set(magics.values())) == len(magics) == 10
    assert all(value.to_bytes(4, "little").startswith(b"DX") for value in magics.values())


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(TypeError, match="12 bytes, not 16"):
        Table("x", 16, ("a", "I", ""), ("b", "Q", ""))


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.title)
@given(data=st.data())
def test_tables_round_trip(table: Table, data: st.DataObject) -> None:
    values = {}
    for f in table.fields:
        size = struct.calcsize("<" + f.code)
        if f.code.endswith("s"):
            values[f.name] = data.draw(st.binary(min_size=size, max_size=size))
        else:
            values[f.name] = data.draw(st.integers(0, (1 << 8 * size) - 1))
    packed = table.pack(**values)
    assert len(packed) == table.size
    assert table.unpack(packed) == values
    assert table.unpack(b"xxx" + packed, 3) == values
    for f in table.fields:  # each field alone, little-endian, where `offset` says
        size, at = struct.calcsize("<" + f.code), table.offset[f.name]
        value = values[f.name]
        assert packed[at : at + size] == (value if isinstance(value, bytes) else value.to_bytes(size, "little"))


def test_pack_wants_every_field() -> None:
    with pytest.raises(KeyError):
        layout.EXTENT.pack(logical=1, physical=2, count=3)
    with pytest.raises(struct.error):
        layout.EXTENT.pack(logical=1, physical=2, count=1 << 32, flags=0)


# -- checksums --


@given(st.binary(min_size=12, max_size=200), st.integers(4, 8))
def test_seal_and_verify(record: bytes, crc_at: int) -> None:
    sealed = layout.seal(record, crc_at)
    crc = int.from_bytes(sealed[crc_at : crc_at + 4], "little")
    assert crc == crc32c(sealed[:crc_at] + sealed[crc_at + 4 :])
    assert sealed[:crc_at] == record[:crc_at]
    assert sealed[crc_at + 4 :] == record[crc_at + 4 :]
    assert layout.seal(sealed, crc_at) == sealed


@given(at=st.integers(0, 511), byte=st.integers(1, 255))
def test_no_flip_goes_unseen(at: int, byte: int) -> None:
    sealed = bytearray(layout.seal(struct.pack("<I", layout.SB_MAGIC) + bytes(508)))
    layout.verify(sealed, layout.SB_MAGIC, "it")
    sealed[at] ^= byte
    with pytest.raises(Corrupt, match=r"^it: (magic|bad checksum)"):
        layout.verify(sealed, layout.SB_MAGIC, "it")


@given(at=st.integers(0, 511), byte=st.integers(1, 255))
def test_an_inode_is_sealed_up_to_its_times(at: int, byte: int) -> None:
    sealed = bytearray(layout.seal(struct.pack("<I", layout.INODE_MAGIC) + bytes(508), end=layout.INODE_CRC_END))
    sealed[at] ^= byte
    if at >= layout.INODE_CRC_END:
        layout.verify(sealed, layout.INODE_MAGIC, "it", end=layout.INODE_CRC_END)
    else:
        with pytest.raises(Corrupt):
            layout.verify(sealed, layout.INODE_MAGIC, "it", end=layout.INODE_CRC_END)


# -- words --


@given(st.integers(TIME_MIN * NS, (TIME_MAX + 1) * NS - 1))
def test_times_round_trip(ns: int) -> None:
    word = time_word(ns)
    assert 0 <= word < 1 << 64
    assert time_ns(word) == ns


@given(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 70), 1 << 70))
def test_time_words_keep_order_and_clamp(a: int, b: int) -> None:
    low, high = TIME_MIN * NS, (TIME_MAX + 1) * NS - 1
    assert time_ns(time_word(a)) == min(max(a, low), high)
    assert (time_word(a) <= time_word(b)) or a > b


@given(st.integers(0, (1 << 64) - 1))
def test_any_word_is_a_time(word: int) -> None:
    assert TIME_MIN * NS <= time_ns(word) < (TIME_MAX + 1) * NS


@given(st.integers(0, 1 << 40), st.integers(1, (1 << 48) - 1), st.integers(0, 63))
def test_words_of_the_inode_directory(index: int, block: int, bit: int) -> None:
    word = layout.idir_word(index, block)
    assert layout.idir_block(index, word) == block
    try:
        assert layout.idir_block(index, word ^ 1 << bit) != block
        assert bit < 48  # 16 bits of check: a flip within them is always seen
    except Corrupt:
        pass


def test_the_empty_word_of_the_inode_directory() -> None:
    assert layout.idir_word(5, 0) == 0
    assert layout.idir_block(5, 0) == 0
    with pytest.raises(Corrupt, match="entry 5 is damaged"):
        layout.idir_block(5, layout.idir_word(6, 77))


@pytest.mark.parametrize("block_size", layout.BLOCK_SIZES)
def test_sizes_that_follow_from_the_block_size(block_size: int) -> None:
    capacity = layout.leaf_capacity(block_size)
    assert 0 <= block_size - layout.LEAF.size - capacity * layout.EXTENT.size < layout.EXTENT.size
    chunk = layout.chunk_blocks(block_size) * block_size
    assert chunk >= layout.CHUNK_INODES * layout.INODE_SIZE
    assert layout.FILE_SIZE_MAX % block_size == 0
    assert layout.FILE_SIZE_MAX + block_size <= 1 << 63
    assert SUPERBLOCK.size <= block_size
