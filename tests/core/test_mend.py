"""One flipped bit of a record, wherever it is, is put right; more than one is left alone."""

from __future__ import annotations

import random

import pytest

from daxfs.core import layout
from daxfs.core.fsck.mend import mended, mended_word

RECORDS = [(512, 4, 488), (512, 4, None), (64, 4, None), (32, 4, None), (40, 8, None), (4096, 4, None)]


@pytest.mark.parametrize(("size", "crc_at", "end"), RECORDS)
def test_every_single_bit(size: int, crc_at: int, end: int | None) -> None:
    record = layout.seal(random.Random(size).randbytes(size), crc_at, end)
    assert mended(record, crc_at, end) == record
    step = 1 if size < 1000 else 61
    for bit in range(0, 8 * (end or size), step):
        flipped = bytearray(record)
        flipped[bit >> 3] ^= 1 << (bit & 7)
        assert mended(bytes(flipped), crc_at, end) == record, bit


def test_what_the_checksum_does_not_cover_stays() -> None:
    record = bytearray(layout.seal(bytes(488), end=488) + bytes(24))
    record[500] ^= 4
    assert mended(bytes(record), end=488) == record
    record[100] ^= 1
    right = mended(bytes(record), end=488)
    assert right is not None
    assert (right[100], right[500]) == (0, 4)


def test_two_bits_are_not_taken_for_one() -> None:
    dice = random.Random(3)
    record = layout.seal(dice.randbytes(512), end=488)
    for _ in range(2000):
        flipped = bytearray(record)
        for bit in dice.sample(range(8 * 488), 2):
            flipped[bit >> 3] ^= 1 << (bit & 7)
        assert mended(bytes(flipped), end=488) is None


def test_words_of_the_inode_directory() -> None:
    for index, block in ((0, 19), (7, 123456), (1000, (1 << 40) + 5)):
        word = layout.idir_word(index, block)
        for bit in range(64):
            assert block in mended_word(index, word ^ 1 << bit)
