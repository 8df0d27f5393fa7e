"""Flipped bits put right: what a checksum says beyond "wrong".

CRC32C is linear: the checksum of a damaged record differs from the stored one by the checksum of the error alone. Up to
64 KiB any two errors of a single bit differ there, so one flipped bit is found and put right exactly. That an error of
many bits looks like one of a single bit has a chance of one in a million for an inode (3,904 bits among 2^32); what is
mended is judged like everything else afterwards.

Not here: what the records mean.
"""

from __future__ import annotations

from daxfs.core import layout
from daxfs.core.layout import checksum

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected

_bits: dict[int, int] = {}  # difference of checksums -> how many bits before the last one of the record the error is
_last = [_POLYNOMIAL]


def mended(record: bytes, crc_at: int = 4, end: int | None = None) -> bytes | None:
    """The record with its one flipped bit put right; itself if it is sound, None if more than a bit is wrong.

    `end` is where the CRC's cover ends, as in `layout.seal`; what is behind it is left alone.
    """
    end = len(record) if end is None else end
    out = bytearray(record)
    stored = int.from_bytes(record[crc_at : crc_at + 4], "little")
    difference = checksum(record, crc_at, end) ^ stored
    if difference == 0:
        return record
    if difference & (difference - 1) == 0:  # a bit of the checksum itself
        out[crc_at : crc_at + 4] = (stored ^ difference).to_bytes(4, "little")
        return bytes(out)
    bits = 8 * (end - 4)
    before = _find(difference, bits)
    if before is None:
        return None
    byte, bit = divmod(bits - 1 - before, 8)
    out[byte if byte < crc_at else byte + 4] ^= 1 << bit
    return bytes(out)


def mended_word(index: int, word: int) -> list[int]:
    """Words of the inode directory that differ from a damaged one by one bit and whose check is right: the blocks."""
    flipped = (word ^ 1 << bit for bit in range(64))
    return [w & 0xFFFF_FFFF_FFFF for w in flipped if w and layout.idir_word(index, w & 0xFFFF_FFFF_FFFF) == w]


def _find(difference: int, bits: int) -> int | None:
    """The table grows to the longest record that was ever asked for: half a million bits at most (64 KiB)."""
    value = _last[0]
    for i in range(len(_bits), bits):
        _bits[value] = i
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    _last[0] = value
    before = _bits.get(difference)
    return before if before is not None and before < bits else None
