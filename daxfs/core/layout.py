"""Every byte on media. One table per structure; `docs/format.md` is generated from them.

Rules
- All integers are little-endian and unsigned. All addresses are bytes from the start of the image, all block numbers count
  blocks of `block_size` from its start.
- A record carries its type and version in its magic, its own address (or number), and a CRC32C of itself. The CRC field is
  the second word; it covers every other byte of the record, but for the three time words of an inode: those are overwritten
  in place by one aligned 8-byte store each, which a CRC would turn into two.
- Names on media are bytes. A block number of 0 means "none": block 0 is a superblock.

Regions of an image, in order: superblock A, superblock B, journal, inode directory, data. Data blocks hold file data,
directory blocks, extent leaves, xattr blocks, inode chunks and ledger blocks, told apart by who refers to them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from crc32c import crc32c

from daxfs.errors import Corrupt

MEDIA_VERSION = 1
BLOCK_SIZE = 4096
BLOCK_SIZES = (4096, 8192, 16384, 32768, 65536)
IMAGE_SIZE_MIN = 1 << 20
NAME_MAX = 255
SYMLINK_MAX = 4095
LINK_MAX = (1 << 31) - 1
XATTR_NAME_MAX = 255
XATTR_VALUE_MAX = 65536
FILE_SIZE_MAX = (1 << 63) - 1 - 65535  # the last block of 2^63 - 1 stays out, at any block size

ROOT_INO = 1

FEATURES_COMPAT = 0
FEATURES_RO_COMPAT = 0
FEATURES_INCOMPAT = 0


@dataclass(frozen=True)
class Field:
    name: str
    code: str  # of struct, little-endian, without padding
    means: str


class Table:
    """A record of named fields; packs a dict, unpacks to a dict, knows offsets. Sizes are checked at import."""

    def __init__(self, title: str, size: int, *fields: tuple[str, str, str]) -> None:
        self.title = title
        self.fields = [Field(*f) for f in fields]
        self.struct = struct.Struct("<" + "".join(f.code for f in self.fields))
        self._behind_crc = struct.Struct("<" + "".join(f.code for f in self.fields[2:]))
        self.size = size
        if self.struct.size != size:
            raise TypeError(f"layout of {title}: {self.struct.size} bytes, not {size}")
        self.offset: dict[str, int] = {}
        at = 0
        for f in self.fields:
            self.offset[f.name] = at
            at += struct.calcsize("<" + f.code)
        self.names = tuple(f.name for f in self.fields)

    def unpack(self, data: bytes | memoryview, at: int = 0) -> dict[str, Any]:
        return dict(zip(self.names, self.struct.unpack_from(data, at), strict=True))

    def pack(self, **values: int | bytes) -> bytes:
        return self.struct.pack(*(values[n] for n in self.names))

    def sealed(self, magic: int, *values: int | bytes) -> bytes:
        """A record that begins with magic and CRC; `values` are the fields behind those."""
        rest = self._behind_crc.pack(*values)
        return _HEAD.pack(magic, crc32c(rest, _crc_of_magic(magic))) + rest


_HEAD = struct.Struct("<II")  # magic, CRC


@cache
def _crc_of_magic(magic: int) -> int:
    return crc32c(magic.to_bytes(4, "little"))


def seal(record: bytes | bytearray, crc_at: int = 4, end: int | None = None) -> bytes:
    """The record with the CRC32C of all its other bytes (up to `end`) at `crc_at`."""
    crc = crc32c(record[crc_at + 4 : end], crc32c(record[:crc_at]))
    return b"".join((record[:crc_at], crc.to_bytes(4, "little"), record[crc_at + 4 :]))


def checksum(record: bytes | bytearray | memoryview, crc_at: int = 4, end: int | None = None) -> int:
    view = memoryview(record)
    return crc32c(view[crc_at + 4 : end], crc32c(view[:crc_at]))


def verify(record: bytes | memoryview, magic: int, what: str, crc_at: int = 4, end: int | None = None) -> None:
    """Raise Corrupt unless magic and CRC of the record are right."""
    found, crc = struct.unpack_from("<II", record)
    if found != magic:
        raise Corrupt(f"{what}: magic {found:#010x} is not {magic:#010x}")
    if checksum(record, crc_at, end) != crc:
        raise Corrupt(f"{what}: bad checksum")


# -- superblock: blocks 0 and 1 ---------------------------------------------------------------------------------------

SB_MAGIC = 0x31465844  # "DXF1"
SUPERBLOCK = Table(
    "superblock",
    512,
    ("magic", "I", "`DXF1`"),
    ("crc", "I", "CRC32C of the other 508 bytes"),
    ("kind", "16s", "`daxfs image` and zeros, for file(1)"),
    ("version", "I", "media version"),
    ("copy", "I", "0 in block 0, 1 in block 1"),
    ("sequence", "Q", "rises with each write; the copy with the higher one is the newer"),
    ("compat", "Q", "feature bits that an old program may ignore"),
    ("ro_compat", "Q", "feature bits that an old program may only read around"),
    ("incompat", "Q", "feature bits that an old program must refuse"),
    ("uuid", "16s", "of the volume"),
    ("block_size", "I", "bytes"),
    ("state", "I", "0 clean, 1 mounted (armed: found at mount, it counts as a dirty shutdown)"),
    ("blocks", "Q", "size of the volume"),
    ("journal_start", "Q", "block"),
    ("journal_blocks", "Q", "blocks"),
    ("idir_start", "Q", "block of the inode directory"),
    ("idir_blocks", "Q", "blocks"),
    ("data_start", "Q", "first block after the regions"),
    ("ledger", "Q", "first block of the pin ledger, 0: none"),
    ("snapshot_start", "Q", "block of the free-space snapshot of a clean unmount, 0: none"),
    ("snapshot_blocks", "Q", "blocks"),
    ("mounts", "Q", "mount count"),
    ("dirty_shutdowns", "Q", "how often the volume was found armed"),
    ("created", "Q", "time of mkfs, ns since 1970"),
    ("boot_id", "16s", "of the host that mounted last; ledger entries of another boot are void"),
    ("label", "64s", "UTF-8 and zeros"),
    ("reserved", "248s", "zeros"),
)
STATE_CLEAN, STATE_MOUNTED = 0, 1
SB_KIND = b"daxfs image".ljust(16, b"\0")

# -- journal: a header block, then the body of one transaction --------------------------------------------------------

JOURNAL_MAGIC = 0x314A5844  # "DXJ1"
JOURNAL_COMMIT_AT = 64  # the commit word has a cache line of its own in the header block
JOURNAL_HEADER = Table(
    "journal header",
    32,
    ("magic", "I", "`DXJ1`"),
    ("crc", "I", "CRC32C of the other 28 bytes"),
    ("address", "Q", "bytes: where this header is"),
    ("body_blocks", "Q", "blocks of the body behind the header block"),
    ("reserved", "Q", "zero"),
)
TXN_MAGIC = 0x31545844  # "DXT1"
TXN_HEADER = Table(
    "transaction",
    32,
    ("magic", "I", "`DXT1`"),
    ("crc", "I", "CRC32C of the header's other bytes and of all its records"),
    ("sequence", "Q", "equals the commit word when the transaction counts"),
    ("length", "Q", "bytes of the records that follow"),
    ("records", "Q", "how many"),
)
TXN_RECORD = Table(
    "redo record",
    16,
    ("address", "Q", "bytes: where the data goes"),
    ("length", "Q", "bytes of data that follow, padded with zeros to a multiple of 8"),
)

# -- inode directory: one 8-byte word per chunk of inodes -------------------------------------------------------------

INODE_SIZE = 512
CHUNK_INODES = 32


def idir_word(index: int, block: int) -> int:
    """Entry of the inode directory: the chunk's first block in the low 48 bits, a check of index and block above."""
    if not block:
        return 0
    return block | (crc32c(struct.pack("<QQ", index, block)) & 0xFFFF) << 48


def idir_block(index: int, word: int) -> int:
    """The chunk's first block, 0 if there is none. Corrupt if the check does not match."""
    block = word & 0xFFFF_FFFF_FFFF
    if idir_word(index, block) != word:
        raise Corrupt(f"inode directory: entry {index} is damaged")
    return block


def chunk_blocks(block_size: int) -> int:
    return max(1, CHUNK_INODES * INODE_SIZE // block_size)


# -- inode ------------------------------------------------------------------------------------------------------------

INODE_MAGIC = 0x31495844  # "DXI1"
INLINE_EXTENTS = 6
INLINE_TARGET_MAX = INLINE_EXTENTS * 24
INLINE_XATTR_MAX = 240
INODE = Table(
    "inode",
    INODE_SIZE,
    ("magic", "I", "`DXI1`"),
    ("crc", "I", "CRC32C of bytes 0..3 and 8..487"),
    ("ino", "Q", "its own number"),
    ("generation", "I", "rises when the number is used again"),
    ("mode", "I", "type and permissions; 0: free"),
    ("uid", "I", ""),
    ("gid", "I", ""),
    ("nlink", "I", "0: unlinked, freed at the next mount"),
    ("flags", "I", "zero"),
    ("rdev", "Q", "of a device node"),
    ("size", "Q", "bytes"),
    ("parent", "Q", "of a directory: the inode of `..`"),
    ("btime", "Q", "birth, a time word"),
    ("xattr_block", "Q", "first xattr block, 0: the inline area holds them all"),
    ("leaf", "Q", "first extent leaf, 0: extents are inline"),
    ("extents", "I", "how many extents"),
    ("target_length", "H", "of an inline symlink: bytes of the target"),
    ("xattr_length", "H", "bytes used in the inline xattr area"),
    ("body", "144s", "six extents, or the symlink's target"),
    ("xattrs", "240s", "xattr records"),
    ("blocks", "Q", "how many blocks its extents map"),
    ("mtime", "Q", "time word, not under the CRC"),
    ("ctime", "Q", "time word, not under the CRC"),
    ("atime", "Q", "time word, not under the CRC"),
)
INODE_CRC_END = INODE.offset["mtime"]
INODE_TIMES_AT = INODE.offset["mtime"]

TIME_MIN = -(1 << 31)
TIME_MAX = TIME_MIN + (1 << 34) - 1
_NS = 1_000_000_000


def time_word(ns: int) -> int:
    """A time as one word: seconds since 1901-12-13 (34 bits) above nanoseconds (30 bits). Clamps to 1901..2446, as ext4."""
    seconds, nanos = divmod(ns, _NS)
    if seconds < TIME_MIN:
        return 0
    if seconds > TIME_MAX:
        return (TIME_MAX - TIME_MIN) << 30 | (_NS - 1)
    return (seconds - TIME_MIN) << 30 | nanos


def time_ns(word: int) -> int:
    return ((word >> 30) + TIME_MIN) * _NS + min(word & 0x3FFF_FFFF, _NS - 1)


# -- extents ----------------------------------------------------------------------------------------------------------

EXTENT = Table(
    "extent",
    24,
    ("logical", "Q", "first block of the file"),
    ("physical", "Q", "first block of the image"),
    ("count", "I", "blocks"),
    ("flags", "I", "1: unwritten"),
)
EXTENT_UNWRITTEN = 1
EXTENT_COUNT_MAX = (1 << 32) - 1

LEAF_MAGIC = 0x314C5844  # "DXL1"
LEAF = Table(
    "extent leaf",
    64,
    ("magic", "I", "`DXL1`"),
    ("crc", "I", "CRC32C of the header and of the extents that count"),
    ("address", "Q", "its own block"),
    ("ino", "Q", "whose extents"),
    ("next", "Q", "block of the next leaf, 0: last"),
    ("count", "I", "extents in this leaf; they follow the header"),
    ("generation", "I", "of the inode"),
    ("reserved", "24s", "zeros"),
)

# -- directory blocks -------------------------------------------------------------------------------------------------

DIRBLOCK_MAGIC = 0x31445844  # "DXD1"
DIRBLOCK = Table(
    "directory block",
    32,
    ("magic", "I", "`DXD1`"),
    ("crc", "I", "CRC32C of the header's other bytes"),
    ("address", "Q", "its own block"),
    ("ino", "Q", "of the directory"),
    ("index", "Q", "logical block of the directory"),
)
DIRENT_ALIGN = 16
DIRENT = Table(
    "directory entry",
    16,
    ("ino", "Q", "0: free space"),
    ("crc", "I", "CRC32C of the entry's other bytes: ino, length, name_length, type, name"),
    ("length", "H", "of the entry with its padding, in units of 16 bytes; entries fill the block to its end"),
    ("name_length", "B", ""),
    ("type", "B", "type bits of the mode, shifted right by 12 (DT_*)"),
)
# An entry's CRC is its third word: crc_at = 8.
DIRENT_CRC_AT = 8

# -- xattrs -----------------------------------------------------------------------------------------------------------

XATTR = Table(
    "xattr record",
    8,
    ("length", "I", "bytes of the value"),
    ("name_length", "H", ""),
    ("reserved", "H", "zero"),
)
XATTR_BLOCK_MAGIC = 0x31585844  # "DXX1"
XATTR_BLOCK = Table(
    "xattr block",
    48,
    ("magic", "I", "`DXX1`"),
    ("crc", "I", "CRC32C of the header's other bytes and of the payload"),
    ("address", "Q", "its own block"),
    ("ino", "Q", "whose xattrs"),
    ("next", "Q", "block of the next one, 0: last"),
    ("length", "I", "bytes of payload: the records, name and value behind each, run on from block to block"),
    ("generation", "I", "of the inode"),
    ("reserved", "Q", "zero"),
)

# -- pin ledger -------------------------------------------------------------------------------------------------------

LEDGER_MAGIC = 0x31475844  # "DXG1"
LEDGER_BLOCK = Table(
    "ledger block",
    64,
    ("magic", "I", "`DXG1`"),
    ("crc", "I", "CRC32C of the header's other bytes"),
    ("address", "Q", "its own block"),
    ("next", "Q", "block of the next one, 0: last"),
    ("boot_id", "16s", "of the host; entries of another boot are void"),
    ("reserved", "24s", "zeros"),
)
LEDGER_ENTRY_MAGIC = 0x31455844  # "DXE1"
LEDGER_ENTRY = Table(
    "ledger entry",
    64,
    ("magic", "I", "`DXE1`; 0: free"),
    ("crc", "I", "CRC32C of the entry's other bytes"),
    ("address", "Q", "bytes: where this entry is"),
    ("pin", "Q", "id of the pin"),
    ("start", "Q", "first block of the run"),
    ("count", "Q", "blocks"),
    ("pid", "I", "of the process that took the pin"),
    ("flags", "I", "of the pin"),
    ("started", "Q", "when that process started, in clock ticks since boot"),
    ("ino", "Q", "the file it was taken on"),
)

# -- free-space snapshot ----------------------------------------------------------------------------------------------

SNAPSHOT_MAGIC = 0x31535844  # "DXS1"
SNAPSHOT = Table(
    "free-space snapshot",
    64,
    ("magic", "I", "`DXS1`"),
    ("crc", "I", "CRC32C of the header's other bytes"),
    ("address", "Q", "its own block"),
    ("sequence", "Q", "of the superblock that refers to it"),
    ("runs", "Q", "pairs of start and count, 8 bytes each, that follow the header"),
    ("free_inodes", "Q", "inode numbers, 8 bytes each, that follow the runs"),
    ("payload_crc", "I", "CRC32C of all that follows the header"),
    ("reserved", "20s", "zeros"),
)

TABLES = (
    SUPERBLOCK, JOURNAL_HEADER, TXN_HEADER, TXN_RECORD, INODE, EXTENT, LEAF, DIRBLOCK, DIRENT, XATTR, XATTR_BLOCK,
    LEDGER_BLOCK, LEDGER_ENTRY, SNAPSHOT,
)  # fmt: skip


def leaf_capacity(block_size: int) -> int:
    return (block_size - LEAF.size) // EXTENT.size
