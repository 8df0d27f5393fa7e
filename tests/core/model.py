"""The reference model: what a volume should hold, in plain Python, one entry per block.

Nodes are files, directories and symbolic links; a file is a dict of blocks, `None` for an unwritten one. Bytes of a block
behind the end of file do not count. A verb changes the model or raises the error that the core should raise; running out
of space is not predicted: the test asks the volume first, and tells the model how much of a write was done.

Pins: a pinned block has one home, (node, block of the file), from the first pin until a layout change takes it away; then
it is stray: its bytes are frozen but for what holders write. Strays without a pin are due until the delayed free.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from daxfs import errors
from daxfs.core.layout import FILE_SIZE_MAX

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH, ZERO = 1, 2, 16


@dataclass(eq=False)
class Node:
    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    time: int
    size: int = 0
    blocks: dict[int, bytearray | None] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    parent: Node | None = None
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    opens: int = 0

    def __post_init__(self) -> None:
        self.mtime = self.ctime = self.atime = self.btime = self.time

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def dtype(self) -> int:
        return stat.S_IFMT(self.mode) >> 12


@dataclass(eq=False)
class HeldPin:
    """A pin as its holder knows it. `owner`: the open file; None if its daemon died."""

    key: int  # the holder's pid, which no other pin has
    owner: int | None
    id: int
    node: Node
    write: bool
    blocks: list[int]  # of the image, in the order of the file


class Model:
    def __init__(self, block_size: int, root: Node) -> None:
        self.block_size = block_size
        self.root = root
        self.nodes: list[Node] = [root]  # all that are linked or open
        self.pins: list[HeldPin] = []
        self.home: dict[int, tuple[Node, int]] = {}  # pinned block -> whose it is
        self.strays: dict[int, bytes] = {}  # pinned block that nobody owns -> its bytes
        self.due: set[int] = set()
        self.before: dict[int, bytes] = {}  # pinned block -> its bytes before the verb that runs

    # -- what there is --

    def files(self) -> list[Node]:
        return [n for n in self.nodes if n.is_file]

    def directories(self) -> list[Node]:
        return [n for n in self.nodes if n.is_dir and n.nlink]

    @property
    def pinned(self) -> set[int]:
        return {b for pin in self.pins for b in pin.blocks}

    @property
    def kept(self) -> int:
        """Pinned blocks of unlinked files. (Those that only pins of a dead daemon cover are not known to be such.)"""
        live = {b for pin in self.pins if pin.owner is not None for b in pin.blocks}
        return sum(1 for b, (node, _) in self.home.items() if node.nlink == 0 and b in live)

    @property
    def busy(self) -> int:
        """Blocks that only pins keep, and those that wait for the delayed free."""
        return len(self.strays) + len(self.due) + self.kept

    # -- data --

    def read(self, node: Node, offset: int, length: int) -> bytes:
        end = min(offset + length, node.size)
        out = bytearray(max(0, end - offset))
        for index, start, stop in self._pieces(offset, end):
            block = node.blocks.get(index)
            if block is not None:
                at = index * self.block_size + start - offset
                out[at : at + stop - start] = block[start:stop]
        return bytes(out)

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """A byte range as (block, first byte in it, last byte + 1 in it)."""
        size = self.block_size
        while offset < end:
            index, start = divmod(offset, size)
            stop = min(size, start + end - offset)
            yield index, start, stop
            offset += stop - start

    def write(self, node: Node, now: int, offset: int, data: bytes) -> None:
        if not data:
            return
        self._grow(node, offset + len(data))
        done = 0
        for index, start, stop in self._pieces(offset, offset + len(data)):
            block = node.blocks.get(index)
            if block is None:
                block = node.blocks[index] = bytearray(self.block_size)
            block[start:stop] = data[done : done + stop - start]
            done += stop - start
        node.mtime = node.ctime = now

    def _grow(self, node: Node, size: int) -> None:
        if size > node.size:
            block = node.blocks.get(node.size // self.block_size)
            if block is not None:
                self._clear(block, node.size % self.block_size, self.block_size)
            node.size = size

    @staticmethod
    def _clear(block: bytearray, start: int, stop: int) -> None:
        block[start:stop] = bytes(stop - start)

    def _zero_part(self, node: Node, start: int, end: int) -> None:
        for index, first, last in self._pieces(start, end):
            block = node.blocks.get(index)
            if block is not None:
                self._clear(block, first, last)

    def truncate(self, node: Node, now: int, size: int) -> None:
        if size > FILE_SIZE_MAX:
            raise errors.TooBig
        if size <= node.size:
            self._drop(node, range(-(-size // self.block_size), 1 << 53))
        if size < node.size and size % self.block_size:
            self._zero_part(node, size, size + -size % self.block_size)
        self._grow(node, size)
        node.size = size
        node.mtime = node.ctime = now

    def _drop(self, node: Node, gone: range) -> None:
        """Blocks that a file loses: pinned ones become strays, with the bytes that they had."""
        homes = {place: b for b, place in self.home.items()}
        for index in [i for i in node.blocks if i in gone]:
            del node.blocks[index]
            block = homes.get((node, index))
            if block is not None:
                del self.home[block]
                self.strays[block] = self.before[block]

    def _inside(self, start: int, end: int) -> range:
        """Whole blocks of a byte range."""
        return range(-(-start // self.block_size), max(-(-start // self.block_size), end // self.block_size))

    def _edges(self, node: Node, start: int, end: int) -> None:
        inside = self._inside(start, end)
        size = self.block_size
        if inside:
            self._zero_part(node, start, inside.start * size)
            self._zero_part(node, inside.stop * size, end)
        else:
            self._zero_part(node, start, end)

    def fallocate(self, node: Node, now: int, mode: int, offset: int, length: int) -> None:
        kind = mode & ~KEEP_SIZE
        end = offset + length
        if length <= 0:
            raise errors.BadArgument
        if kind not in (0, PUNCH, ZERO) or mode == PUNCH:
            raise errors.NotSupported
        if end > FILE_SIZE_MAX:
            raise errors.TooBig
        if kind != PUNCH and self.missing(node, offset, length) > 1 << 20:
            raise errors.NoSpace
        old = node.size
        if kind:
            self._edges(node, offset, end)
        if kind == PUNCH:
            self._drop(node, self._inside(offset, end))
        else:
            pinned = {index for owner, index in self.home.values() if owner is node}
            for index in range(offset // self.block_size, -(-end // self.block_size)):
                if kind == ZERO and index in self._inside(offset, end):
                    keep = index in pinned
                    node.blocks[index] = bytearray(self.block_size) if keep else None
                node.blocks.setdefault(index, None)
            if not mode & KEEP_SIZE:
                self._grow(node, end)
        node.ctime = now
        if kind or node.size != old:
            node.mtime = now

    def missing(self, node: Node, offset: int, length: int) -> int:
        """Blocks of a range that the file has not got."""
        first, last = offset // self.block_size, -(-(offset + length) // self.block_size)
        return last - first - sum(1 for i in node.blocks if first <= i < last)

    def seek(self, node: Node, offset: int, data: bool) -> int:
        if offset >= node.size:
            raise errors.NoSuchAddress
        size = self.block_size
        written = sorted(i for i, block in node.blocks.items() if block is not None)
        if data:
            found = next((i for i in written if (i + 1) * size > offset), None)
            if found is None or found * size >= node.size:
                raise errors.NoSuchAddress
            return max(offset, found * size)
        index = offset // size
        held = set(written)
        while index in held:
            index += 1
        return min(max(offset, index * size), node.size)

    def copy_range(self, source: Node, offset: int, target: Node, target_offset: int, length: int) -> bytes:
        """The bytes that a copy puts there; `write` does it."""
        length = max(0, min(length, source.size - offset))
        if source is target and length and abs(offset - target_offset) < length:
            raise errors.BadArgument
        return self.read(source, offset, length)

    # -- names --

    def place(self, parent: Node, name: bytes) -> None:
        if name in parent.children:
            raise errors.Exists

    def enter(self, parent: Node, name: bytes, node: Node, now: int) -> None:
        parent.children[name] = node
        if node.is_dir:
            parent.nlink += 1
            node.parent = parent
        parent.mtime = parent.ctime = now
        if node not in self.nodes:
            self.nodes.append(node)

    def find(self, parent: Node, name: bytes) -> Node:
        if name not in parent.children:
            raise errors.NoEntry
        return parent.children[name]

    def link(self, node: Node, parent: Node, name: bytes, now: int) -> None:
        if node.is_dir:
            raise errors.NotPermitted
        self.place(parent, name)
        node.nlink += 1
        node.ctime = now
        self.enter(parent, name, node, now)

    def unlink(self, parent: Node, name: bytes, now: int) -> Node:
        node = self.find(parent, name)
        if node.is_dir:
            raise errors.IsDirectory
        self._lose(parent, name, now)
        return node

    def rmdir(self, parent: Node, name: bytes, now: int) -> Node:
        node = self.find(parent, name)
        if not node.is_dir:
            raise errors.NotDirectory
        if node.children:
            raise errors.NotEmpty
        self._lose(parent, name, now)
        return node

    def _lose(self, parent: Node, name: bytes, now: int) -> None:
        node = parent.children.pop(name)
        if node.is_dir:
            node.nlink = 0
            parent.nlink -= 1
        else:
            node.nlink -= 1
        node.ctime = parent.mtime = parent.ctime = now

    def reap(self, node: Node) -> None:
        """An unlinked node that is not open is gone, and so are its blocks."""
        if node.nlink == 0 and not node.opens and node in self.nodes:
            self._drop(node, range(1 << 53))
            self.nodes.remove(node)

    def _above(self, node: Node | None) -> Iterator[Node]:
        while node is not None:
            yield node
            node = node.parent if node is not self.root else None

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int, now: int) -> Node | None:
        """The node that lost a name, if one did."""
        if flags & EXCHANGE and flags & (NOREPLACE | WHITEOUT):
            raise errors.BadArgument
        node = self.find(parent, name)
        other = new_parent.children.get(new_name)
        if other is None and flags & EXCHANGE:
            raise errors.NoEntry
        if other is not None and flags & NOREPLACE:
            raise errors.Exists
        if other is node:
            return None
        if node.is_dir and node in self._above(new_parent):
            raise errors.BadArgument
        if flags & EXCHANGE:
            assert other is not None
            if other.is_dir and other in self._above(parent):
                raise errors.BadArgument
            for directory, there, old, new in ((parent, name, node, other), (new_parent, new_name, other, node)):
                directory.children[there] = new
                directory.nlink += new.is_dir - old.is_dir
                if new.is_dir:
                    new.parent = directory
                directory.mtime = directory.ctime = new.ctime = now
            return None
        if other is not None:
            if other.is_dir and not node.is_dir:
                raise errors.IsDirectory
            if node.is_dir and not other.is_dir:
                raise errors.NotDirectory
            if other.children:
                raise errors.NotEmpty
            self._lose(new_parent, new_name, now)
        del parent.children[name]
        parent.mtime = parent.ctime = node.ctime = now
        parent.nlink -= node.is_dir
        self.enter(new_parent, new_name, node, now)
        return other

    # -- attributes --

    def set_xattr(self, node: Node, now: int, name: bytes, value: bytes, flags: int) -> None:
        if flags == 1 and name in node.xattrs:
            raise errors.Exists
        if flags == 2 and name not in node.xattrs:
            raise errors.NoData
        node.xattrs[name] = value
        node.ctime = now

    def remove_xattr(self, node: Node, now: int, name: bytes) -> None:
        if name not in node.xattrs:
            raise errors.NoData
        del node.xattrs[name]
        node.ctime = now

    # -- pins --

    def check_pin(self, node: Node, first: int, count: int, write: bool) -> None:
        """Raise what a pin of these blocks should raise."""
        if count == 0:
            raise errors.BadArgument
        if first + count > -(-node.size // self.block_size):
            raise errors.NoSuchAddress
        if not write and any(node.blocks.get(i) is None for i in range(first, first + count)):
            raise errors.BadAddress

    def pin(self, pin: HeldPin, now: int, first: int) -> None:
        """Take a pin that the volume has granted."""
        node = pin.node
        wanted = range(first, first + len(pin.blocks))
        if any(node.blocks.get(i) is None for i in wanted):
            node.mtime = node.ctime = now
        for index, block in zip(wanted, pin.blocks, strict=True):
            if node.blocks.get(index) is None:
                node.blocks[index] = bytearray(self.block_size)
            assert self.home.setdefault(block, (node, index)) == (node, index), "a pinned block has moved or was given away"
            assert block not in self.strays
            assert block not in self.due
        self.pins.append(pin)

    def dma(self, block: int, at: int, data: bytes) -> None:
        """What a holder writes through its pin: into the file that owns the block, or into nobody's."""
        if block in self.home:
            node, index = self.home[block]
            content = node.blocks[index]
            assert content is not None
            content[at : at + len(data)] = data
        else:
            old = self.strays[block]
            self.strays[block] = old[:at] + data + old[at + len(data) :]

    def unpin(self, pins: list[HeldPin]) -> None:
        for pin in pins:
            self.pins.remove(pin)
        held = self.pinned
        for block in [b for b in self.home if b not in held]:
            del self.home[block]
        for block in [b for b in self.strays if b not in held]:
            del self.strays[block]
            self.due.add(block)

    def remount(self, *, same_boot: bool) -> None:
        """All descriptors are gone, and so are unlinked nodes; holders survive unless the host was booted."""
        if not same_boot:
            self.unpin(list(self.pins))
        for node in list(self.nodes):
            node.opens = 0
            self.reap(node)
        self.due.clear()
        for pin in self.pins:
            pin.owner = None
