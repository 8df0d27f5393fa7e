"""Inodes: the fixed record of a file on media, its extent leaves, and what the core keeps of it in memory.

An inode's life: free (mode 0) -> linked -> unlinked but referenced (nlink 0: a name in the kernel or an open descriptor
keeps it) -> free, with the next generation. A crash in the third state ends it at the next mount.

The record is rewritten as a whole, in a transaction (`store`). Times are the exception: three words on media that a plain
data access overwrites in place; while a transaction has new ones the record holds them. The size lives in the extent map,
where the native session sees it. Bytes from media are believed only after `_parse` and `ExtentMap.append_leaf`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from daxfs.core import layout
from daxfs.core.extents import HOT_READ, HOT_WRITE, ExtentMap
from daxfs.core.layout import EXTENT, INLINE_EXTENTS, LEAF
from daxfs.core.records import Record, time_word
from daxfs.errors import BadHandle, Corrupt

if TYPE_CHECKING:
    from daxfs.core.directory import Directory
    from daxfs.core.transaction import Transaction
    from daxfs.core.volume import Volume

_COPY_LEAVES = 8  # more changed leaves than this are rewritten elsewhere instead of going through the journal
_TIMES_AT = layout.INODE_TIMES_AT


class Inode(Record):
    """One file. Fields as in layout.INODE; times are ns since 1970; `size` is bytes. What the record has is compiled
    (records.Record)."""

    __slots__ = ("__weakref__", "_volume", "dead", "directory", "nlookup", "opens", "xattrs")

    def __init__(self, volume: Volume, ino: int, at: int) -> None:
        super().__init__(volume.pmem.load_word, ino, at,
                         ExtentMap(volume.leaf_capacity, volume.block_shift))  # fmt: skip
        self._volume = volume
        self.nlookup = 0  # references of the kernel
        self.opens = 0  # open file descriptions
        self.dead = False
        self.directory: Directory | None = None
        self.xattrs: dict[bytes, bytes] | None = None

    def touch_in_place(self, *, mtime: int | None = None, ctime: int | None = None, atime: int | None = None) -> None:
        """New times outside a transaction: one atomic store each."""
        pmem, at = self._volume.pmem, self.at + _TIMES_AT
        for address, ns in ((at, mtime), (at + 8, ctime), (at + 16, atime)):
            if ns is not None:
                pmem.store_word(address, time_word(ns))
        pmem.flush(at, 24)
        pmem.fence()

    # -- from media --

    def load(self) -> None:
        """Read the record. BadHandle if the inode is free, Corrupt if it cannot be believed."""
        volume = self._volume
        self._parse(volume.pmem.view[self.at : self.at + layout.INODE_SIZE], volume.blocks)
        self.xattrs = None
        size = self.size
        self._map.clear()
        self._map.size = size
        self._attach()

    def _attach(self) -> None:
        """Tell the native session where the image and the times are."""
        address = self._volume.pmem.address
        self._map.attach(address, address + self.at + _TIMES_AT)

    @property
    def map(self) -> ExtentMap:
        """The extent map; the first use reads the leaves. Corrupt if they cannot be believed."""
        if self._extents:
            self._load_map()
        return self._map

    def _load_map(self) -> None:
        volume, expected, block = self._volume, self._extents, self._leaf
        size, data = volume.block_size, volume.data_blocks
        try:
            if not block:
                self._map.append_leaf(self._inline, expected, 0, 0, data.start, data.stop)
            while block:
                if len(self._map) >= expected or block not in data:
                    raise ValueError("the chain of leaves is too long or leaves the image")
                head, entries = read_leaf(volume.pmem.view, block, size, self.ino, self.generation)
                self._map.append_leaf(entries, head["count"], block, head["next"], data.start, data.stop)
                block = int(head["next"])
            if len(self._map) != expected:
                raise ValueError(f"{len(self._map)} extents found, {expected} expected")
            self._extents = 0  # loaded
        except BaseException as e:
            self._map.clear()
            if isinstance(e, ValueError):
                raise Corrupt(f"inode {self.ino}: extents: {e}") from None
            raise
        self._inline = b""

    def revert(self) -> None:
        """After an aborted transaction: back to what media say. An inode that was new is gone."""
        self.directory = None
        self.dead = False
        self._map.hot = 0  # also if media cannot be believed
        try:
            self.load()
        except BadHandle:
            self.dead = True
            self._clear()
            self._map.clear()
            self._volume.drop(self)
        else:
            self.set_hot()

    # -- to media --

    def store(self, txn: Transaction) -> None:
        """Put the record, and the leaves that changed, into the transaction."""
        if self.dead:
            txn.write(self.at, self._pack_free())
            return
        if not (self._extents or self._fits_inline):  # extents that were not read did not change
            self._store_leaves(txn)
        txn.write(self.at, self._pack())

    def _store_leaves(self, txn: Transaction) -> None:
        mapped = self._map
        count = mapped.leaves
        for block in mapped.dropped():
            txn.free([(block, 1)])
        if count == 0 or (count == 1 and len(mapped) <= INLINE_EXTENTS):
            if count:
                block = mapped.leaf(0)[0]
                if block:
                    txn.free([(block, 1)])
                mapped.place_leaf(0, 0)
                mapped.stored(0, 0)
            return
        fresh = set(mapped.unplaced())
        for i in fresh:
            mapped.place_leaf(i, txn.take_block())
        overwritten = [i for i, _ in mapped.stale() if i not in fresh]
        if len(overwritten) > _COPY_LEAVES:
            for i in overwritten:
                txn.free([(mapped.leaf(i)[0], 1)])
                mapped.place_leaf(i, txn.take_block())
            fresh.update(overwritten)
        for i, following in mapped.stale():
            block, n, entries = mapped.leaf(i)
            head = LEAF.pack(magic=layout.LEAF_MAGIC, crc=0, address=block, ino=self.ino, next=following, count=n,
                             generation=self.generation, reserved=b"")  # fmt: skip
            data = layout.seal(head + entries)
            if i in fresh:
                txn.fresh(block * self._volume.block_size, data)
            else:
                txn.write(block * self._volume.block_size, data)
            mapped.stored(i, following)

    def committed(self) -> None:
        """The transaction that stored this inode is on media."""
        self._stored()
        if self.dead:
            self._volume.drop(self)
        elif self.opens or self._map.hot:
            self.set_hot()

    # -- what others ask --

    def block(self, index: int) -> int:
        """The image's block behind a logical block, 0 if there is none."""
        found = self.map.find(index)
        return found[1] + index - found[0] if found else 0

    def append_block(self, txn: Transaction) -> int:
        """One more block at the end of a directory; its number on the image."""
        size = self._volume.block_size
        index = self._map.size // size
        last = self.block(index - 1) if index else 0
        block = txn.take(1, last + 1 if last else 0, meta=False)[0][0]
        txn.dirty(self)  # first: whatever fails from here on, the transaction takes back
        self.map.insert(index, block, 1)
        self._map.size += size
        return block

    def set_hot(self) -> None:
        """Say what the native session may do by itself with this file."""
        hot = self._map.hot = 0  # also if the map turns out to be damaged
        usable = not (self._volume.failed or self._volume.closed or self._volume.poison.holds(self))
        if usable and self.opens and self.is_file:
            self.map  # noqa: B018 - the native session needs it loaded
            hot = HOT_READ
            privileged = self.mode & (stat.S_ISUID | stat.S_ISGID) or self.xattr_block or self.xattr_inline
            if not (self._volume.readonly or self._volume.pmem.hostsync or privileged):
                hot |= HOT_WRITE
        self._map.hot = hot


def read_leaf(view: memoryview, block: int, block_size: int, ino: int, generation: int) -> tuple[dict[str, Any], memoryview]:
    """A leaf's header fields and its extents. Corrupt if it cannot be believed."""
    data = view[block * block_size : (block + 1) * block_size]
    head = LEAF.unpack(data)
    count = int(head["count"])
    what = f"extent leaf at block {block}"
    if count > layout.leaf_capacity(block_size):
        raise Corrupt(f"{what}: {count} extents do not fit")
    end = LEAF.size + count * EXTENT.size
    layout.verify(data, layout.LEAF_MAGIC, what, end=end)
    if (head["address"], head["ino"], head["generation"]) != (block, ino, generation):
        raise Corrupt(f"{what}: it belongs to inode {head['ino']}")
    return head, data[LEAF.size : end]


def read_leaves(view: memoryview, block_size: int, data_blocks: range, first: int, ino: int, generation: int
                ) -> Iterator[tuple[int, dict[str, Any], memoryview]]:  # fmt: skip
    """(block, header, extents) along a chain of leaves; `data_blocks` are those that may be in one. Corrupt if it is a
    cycle, leaves them, or has a leaf that cannot be believed."""
    block, seen = first, {0}
    while block:
        if block not in data_blocks or block in seen:
            raise Corrupt(f"inode {ino}: its chain of extent leaves is broken")
        seen.add(block)
        head, entries = read_leaf(view, block, block_size, ino, generation)
        if not head["count"]:
            raise Corrupt(f"inode {ino}: the extent leaf at block {block} is empty")
        yield block, head, entries
        block = int(head["next"])
