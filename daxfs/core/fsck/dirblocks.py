"""Repair of one directory block: what can be read of a damaged one, and a new one with the entries that are kept.

An entry that is kept stays where it is. What is behind a damaged one is found by its length if that leads to a sound record,
else by trying every place where an entry may start. A removed entry leaves its bytes in the free slot that it becomes, so
what was found by trying may be such a ghost: it is doubtful, and counts only if its inode lacks a name (names.py). A name
cannot hold the bytes of an entry: an inode number has zeros in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from crc32c import crc32c

from daxfs.core.directory import TYPES, valid_names
from daxfs.core.fsck.mend import mended
from daxfs.core.layout import DIRBLOCK, DIRBLOCK_MAGIC, DIRENT, DIRENT_ALIGN, DIRENT_CRC_AT, seal
from daxfs.core.records import pack_entry

INO_END = 1 << 63


@dataclass(frozen=True)
class Entry:
    """`at`: bytes from the start of the block."""

    at: int
    ino: int
    dtype: int
    name: bytes
    doubtful: bool = False

    @property
    def end(self) -> int:
        return self.at + (DIRENT.size + len(self.name) + DIRENT_ALIGN - 1) // DIRENT_ALIGN * DIRENT_ALIGN


def salvage(data: bytes, address: int, ino: int) -> list[Entry]:
    """The entries of a damaged block of this directory. None of them if its header says that it is another's."""
    better = mended(data[: DIRBLOCK.size])
    header = DIRBLOCK.unpack(better or data)
    if better and header["magic"] == DIRBLOCK_MAGIC and (header["address"], header["ino"]) != (address, ino):
        return []
    found: list[Entry] = []
    at, end, doubtful = DIRBLOCK.size, len(data), False
    while at < end:
        record = _record(data, at, end, mend=not doubtful)
        if record is not None and (record[0].ino or not doubtful):
            entry, following = record
            if entry.ino:
                found.append(Entry(at, entry.ino, entry.dtype, entry.name, doubtful))
            at = following
            continue
        if not doubtful:
            behind = at + int.from_bytes(data[at + 12 : at + 14], "little") * DIRENT_ALIGN
            if at < behind < end and _record(data, behind, end, mend=False):
                at = behind
                continue
        doubtful = True
        at += DIRENT_ALIGN
    return found


def _record(data: bytes, at: int, end: int, *, mend: bool) -> tuple[Entry, int] | None:
    """The record at a place and where the next one starts; None if there is none that can be believed."""
    header = data[at : at + DIRENT.size]
    name_length = header[14]
    sizes = (name_length, *(name_length ^ 1 << bit for bit in range(8))) if mend else (name_length,)
    for size in sizes:
        record = data[at : at + DIRENT.size + size]
        if len(record) < DIRENT.size + size:
            continue
        if mend:
            better = mended(record, crc_at=DIRENT_CRC_AT)
        else:
            sound = crc32c(record[12:], crc32c(record[:8])) == int.from_bytes(record[8:12], "little")
            better = record if sound else None
        if better is None or better[14] != size:
            continue
        ino, _, length, _, dtype = DIRENT.struct.unpack_from(better)
        entry = Entry(at, ino, dtype, better[DIRENT.size :])
        following = at + length * DIRENT_ALIGN
        if not entry.end <= following <= end:
            continue
        if ino:
            if following == entry.end and ino < INO_END and dtype in TYPES and valid_names([entry.name]):
                return entry, following
        elif not (size or dtype):
            return entry, following
    return None


def build(address: int, ino: int, index: int, size: int, entries: list[Entry]) -> bytes:
    """A block with these entries, which are in order and do not overlap, and free slots between them."""
    header = seal(DIRBLOCK.pack(magic=DIRBLOCK_MAGIC, crc=0, address=address, ino=ino, index=index))
    out = bytearray(header)
    for entry in [*entries, Entry(size, 0, 0, b"")]:
        gap = entry.at - len(out)
        if gap:
            out += pack_entry(0, gap // DIRENT_ALIGN, 0, b"").ljust(gap, b"\0")
        if entry.ino:
            length = (entry.end - entry.at) // DIRENT_ALIGN
            out += pack_entry(entry.ino, length, entry.dtype, entry.name).ljust(entry.end - entry.at, b"\0")
    return bytes(out)
