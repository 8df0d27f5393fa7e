"""A directory's entries: the blocks that hold them, and the index in memory that finds them.

Owns the name index (name -> inode, type, position) and the free slots of one directory. A directory is a file of
blocks; each block is a header and records that fill it to its end, entries and free slots, in granules of 16 bytes.

Rules
- An entry never moves and never changes its length: its position (byte offset in the directory) is a readdir cookie.
- Free slots of a block are merged when they touch, so the longest name fits wherever it can fit.
- The index is authoritative inside a transaction: media follows at commit. After an abort `revert` forgets it.
- Blocks on media are hostile: a record that this module would not have written is Corrupt, and so is the directory.

Not here: `.` and `..` (the inode's parent), times and link counts (namespace.py), giving blocks back: a directory keeps
the blocks it once had until it dies, and uses their slots again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from daxfs.core.dirblock import records
from daxfs.core.layout import CHUNK_INODES, DIRBLOCK, DIRBLOCK_MAGIC, DIRENT_ALIGN, NAME_MAX, seal, verify
from daxfs.core.records import pack_entry
from daxfs.core.slots import Slots
from daxfs.errors import Corrupt, Exists, NameTooLong, NoEntry

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.transaction import Transaction
    from daxfs.core.volume import Volume

TYPES = frozenset((1, 2, 4, 6, 8, 10, 12))  # DT_FIFO, CHR, DIR, BLK, REG, LNK, SOCK

_NO_NAMES = frozenset((b"", b".", b".."))
_FIRST = DIRBLOCK.size // DIRENT_ALIGN  # granule of a block's first record

# Value of the index: the inode number above a word of position (a multiple of 16) and type. One int, no tuple: a third
# of the memory, and nothing for the garbage collector to visit.
_INO_SHIFT = 64
_TYPE = DIRENT_ALIGN - 1
_POSITION = (1 << _INO_SHIFT) - DIRENT_ALIGN

Record = tuple[int, int, int, int, bytes]  # offset in the block, granules, ino (0: free), type, name


def granules(name: bytes) -> int:
    """Length of the entry of this name."""
    return len(name) + 31 >> 4  # DIRENT.size and DIRENT_ALIGN are 16


def pack_block(address: int, ino: int, index: int, block_size: int) -> bytes:
    """A directory block that is one free slot."""
    header = seal(DIRBLOCK.pack(magic=DIRBLOCK_MAGIC, crc=0, address=address, ino=ino, index=index))
    slot = pack_entry(0, block_size // DIRENT_ALIGN - _FIRST, 0, b"")
    return (header + slot).ljust(block_size, b"\0")


def parse_block(data: bytes, address: int, ino: int, index: int, ino_end: int) -> list[Record]:
    """All records of a directory block, in order; Corrupt unless every byte that counts is right."""
    what = f"directory {ino}, block {index}"
    verify(data[: DIRBLOCK.size], DIRBLOCK_MAGIC, what)
    header = DIRBLOCK.unpack(data)
    if (header["address"], header["ino"], header["index"]) != (address, ino, index):
        raise Corrupt(f"{what}: belongs elsewhere (inode {header['ino']!r}, block {header['index']!r})")
    return records(data, DIRBLOCK.size, ino_end, what)


def valid_names(names: list[bytes]) -> bool:
    joined = b"/".join(names)
    return not names or (
        joined.count(b"/") == len(names) - 1 and b"\0" not in joined and _NO_NAMES.isdisjoint(names)
    )


class Directory:
    """One directory; built on first use, from media."""

    __slots__ = ("_index", "_inode", "_slots", "_vol")

    def __init__(self, vol: Volume, inode: Inode) -> None:
        self._vol = vol
        self._inode = inode
        self._index: dict[bytes, int] | None = None
        self._slots = Slots()

    def __len__(self) -> int:
        return len(self._names())

    def lookup(self, name: bytes) -> tuple[int, int] | None:
        """(ino, type) of the entry."""
        value = self._names().get(name)
        return None if value is None else (value >> _INO_SHIFT, value & _TYPE)

    def is_empty(self) -> bool:
        return not self._names()

    def insert(self, txn: Transaction, name: bytes, ino: int, dtype: int) -> None:
        names = self._names()
        if name in names:
            raise Exists
        if len(name) > NAME_MAX:
            raise NameTooLong
        need = granules(name)
        start, length = self._slots.take(need) or self._grow(txn)
        txn.touch(self)
        if length > need:
            self._slots.put(start + need, length - need)
        position = start * DIRENT_ALIGN
        txn.write(self._address(position), pack_entry(ino, need, dtype, name, length - need))
        names[name] = ino << _INO_SHIFT | position | dtype

    def remove(self, txn: Transaction, name: bytes) -> None:
        names = self._names()
        if name not in names:
            raise NoEntry
        txn.touch(self)
        start, length = self._slots.add((names.pop(name) & _POSITION) // DIRENT_ALIGN, granules(name))
        txn.write(self._address(start * DIRENT_ALIGN), pack_entry(0, length, 0, b""))

    def replace(self, txn: Transaction, name: bytes, ino: int, dtype: int) -> None:
        """The same name for another inode, in place."""
        names = self._names()
        if name not in names:
            raise NoEntry
        txn.touch(self)
        position = names[name] & _POSITION
        txn.write(self._address(position), pack_entry(ino, granules(name), dtype, name))
        names[name] = ino << _INO_SHIFT | position | dtype

    def entries(self, position: int = 0) -> Iterator[tuple[bytes, int, int, int]]:
        """(name, ino, type, position to go on from) of each entry from `position` on.

        Read from media: not for use inside a transaction that changes this directory. Changes while it runs are seen
        or not; every other entry comes exactly once.
        """
        block_size = self._vol.block_size
        self._check_size()
        for index in range(position // block_size, self._inode.size // block_size):
            base = index * block_size
            for at, length, ino, dtype, name in self._records(index):
                if ino and base + at >= position:
                    yield name, ino, dtype, base + at + length * DIRENT_ALIGN

    def revert(self) -> None:
        """After an aborted transaction."""
        self._index = None
        self._slots = Slots()

    def check(self) -> None:
        """Corrupt unless memory says what media says."""
        if self._index is None:
            return
        fresh = Directory(self._vol, self._inode)
        if fresh._names() != self._index:
            raise Corrupt(f"directory {self._inode.ino}: the index differs from media")
        if fresh._slots.starts != self._slots.starts:
            raise Corrupt(f"directory {self._inode.ino}: the free slots differ from media")

    def _names(self) -> dict[bytes, int]:
        if self._index is None:
            self._load()
        assert self._index is not None
        return self._index

    def _load(self) -> None:
        block_size = self._vol.block_size
        self._check_size()
        names: dict[bytes, int] = {}
        slots = Slots()
        entries = 0
        for index in range(self._inode.size // block_size):
            base = index * block_size
            for at, length, ino, dtype, name in self._records(index):
                if ino:
                    names[name] = ino << _INO_SHIFT | base + at | dtype
                    entries += 1
                else:
                    slots.put((base + at) // DIRENT_ALIGN, length)
        if len(names) != entries:
            raise Corrupt(f"directory {self._inode.ino}: a name is in it twice")
        self._index, self._slots = names, slots

    def _check_size(self) -> None:
        """Corrupt if a block lies behind the end: one more could not be appended."""
        end, rest = divmod(self._inode.size, self._vol.block_size)
        if rest or self._inode.map.blocks_from(end):
            raise Corrupt(f"directory {self._inode.ino}: its size is not that of its blocks")

    def _records(self, index: int) -> list[Record]:
        vol, ino = self._vol, self._inode.ino
        address = self._inode.block(index)
        if not address:
            raise Corrupt(f"directory {ino}: block {index} is missing")
        data = vol.pmem.load(address * vol.block_size, vol.block_size)
        return parse_block(data, address, ino, index, len(vol.chunks) * CHUNK_INODES)

    def _grow(self, txn: Transaction) -> tuple[int, int]:
        """One more block: its only slot. May fail, so nothing of ours is changed before."""
        block_size = self._vol.block_size
        address = self._inode.append_block(txn)
        index = self._inode.size // block_size - 1
        txn.fresh(address * block_size, pack_block(address, self._inode.ino, index, block_size))
        per_block = block_size // DIRENT_ALIGN
        return index * per_block + _FIRST, per_block - _FIRST

    def _address(self, position: int) -> int:
        """Where on the image a byte of the directory is."""
        shift = self._vol.block_shift
        address: int = (self._inode.block(position >> shift) << shift) + (position & (1 << shift) - 1)
        return address
