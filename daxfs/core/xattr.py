"""Extended attributes of an inode: its inline area, or a chain of blocks.

Owns the encoding of all xattrs of an inode as one string of records and where that string is kept: in the inode if it
fits there, else in a chain of blocks, never in both.

Rules
- A change writes the whole string again, to the inode's record or to fresh blocks, so that nothing is overwritten in
  place; the commit of the inode's record is what switches from one chain to the other.
- `inode.xattrs` caches the decoded dict. It is replaced, never changed.
- A chain on media is hostile: wrong owner, bad checksum, a cycle, more than XATTR_TOTAL_MAX is Corrupt.

Not here: who may see or change which namespace, and what an ACL does to the mode (namespace.py and acl.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from daxfs.core.layout import (
    INLINE_XATTR_MAX,
    XATTR,
    XATTR_BLOCK,
    XATTR_BLOCK_MAGIC,
    XATTR_NAME_MAX,
    XATTR_VALUE_MAX,
    seal,
    verify,
)  # fmt: skip
from daxfs.errors import BadArgument, Corrupt, Exists, FsError, NoData, NoSpace, OutOfRange

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.transaction import Transaction
    from daxfs.core.volume import Volume

XATTR_CREATE, XATTR_REPLACE = 1, 2  # <linux/xattr.h>
XATTR_LIST_MAX = 65536  # bytes that listxattr(2) can return
XATTR_TOTAL_MAX = 1 << 17  # bytes of all records of an inode: a change rewrites them all


def get(vol: Volume, inode: Inode, name: bytes) -> bytes:
    try:
        return _all(vol, inode)[name]
    except KeyError:
        raise NoData from None


def find(vol: Volume, inode: Inode, name: bytes) -> bytes | None:
    """The value, None if there is none."""
    return _all(vol, inode).get(name)


def names(vol: Volume, inode: Inode) -> list[bytes]:
    return list(_all(vol, inode))


def set(vol: Volume, txn: Transaction, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
    if not 0 < len(name) <= XATTR_NAME_MAX:
        raise OutOfRange(f"the name of an extended attribute has 1 to {XATTR_NAME_MAX} bytes")
    if len(value) > XATTR_VALUE_MAX:
        raise FsError(f"the value of an extended attribute has at most {XATTR_VALUE_MAX} bytes", errno.E2BIG)
    if flags & ~(XATTR_CREATE | XATTR_REPLACE) or b"\0" in name:
        raise BadArgument
    xattrs = dict(_all(vol, inode))
    if flags & XATTR_CREATE and name in xattrs:
        raise Exists
    if flags & XATTR_REPLACE and name not in xattrs:
        raise NoData
    xattrs[name] = bytes(value)
    if sum(len(n) + 1 for n in xattrs) > XATTR_LIST_MAX:
        raise NoSpace(f"the names of a file's extended attributes have at most {XATTR_LIST_MAX} bytes")
    _store(vol, txn, inode, xattrs)


def remove(vol: Volume, txn: Transaction, inode: Inode, name: bytes) -> None:
    xattrs = dict(_all(vol, inode))
    if xattrs.pop(name, None) is None:
        raise NoData
    _store(vol, txn, inode, xattrs)


def free_all(vol: Volume, txn: Transaction, inode: Inode) -> None:
    """Give back the chain of an inode that dies. What is behind a damaged block is left to the next mount's scan."""
    chain: list[int] = []
    try:
        for block, _ in _chain(vol, inode):
            chain.append(block)
    except Corrupt:
        pass
    _free(txn, chain)
    _switch(txn, inode, b"", 0, {})


def encode(xattrs: dict[bytes, bytes]) -> bytes:
    """All records, one behind the other."""
    parts: list[bytes] = []
    for name, value in xattrs.items():
        parts += (XATTR.struct.pack(len(value), len(name), 0), name, value)
    return b"".join(parts)


def decode(data: bytes, what: str) -> dict[bytes, bytes]:
    xattrs: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        behind = at + XATTR.size
        if behind > len(data):
            raise Corrupt(f"{what}: an extended attribute is cut off")
        length, name_length, reserved = XATTR.struct.unpack_from(data, at)
        value_at = behind + name_length
        name = data[behind:value_at]
        at = value_at + length
        if at > len(data) or length > XATTR_VALUE_MAX:
            raise Corrupt(f"{what}: an extended attribute is longer than its place")
        if not 0 < name_length <= XATTR_NAME_MAX or b"\0" in name or reserved or name in xattrs:
            raise Corrupt(f"{what}: an extended attribute has a name that is not valid")
        xattrs[name] = data[value_at:at]
    return xattrs


def read_chain(
    load: Callable[[int, int], bytes], block_size: int, data_blocks: range, first: int, ino: int, generation: int
) -> Iterator[tuple[int, bytes]]:
    """(block, payload) along a chain on media, each verified; `data_blocks` are those that may be in one."""
    what = f"inode {ino}"
    block, total = first, 0
    seen = {0}
    while block:
        if block not in data_blocks or block in seen:
            raise Corrupt(f"{what}: xattr block {block} is outside the data region, or the chain is a cycle")
        seen.add(block)
        data = load(block * block_size, block_size)
        header = XATTR_BLOCK.unpack(data)
        length = header["length"]
        assert isinstance(length, int)
        if not 0 < length <= block_size - XATTR_BLOCK.size:
            raise Corrupt(f"{what}: xattr block {block} has {length} bytes of payload")
        end = XATTR_BLOCK.size + length
        verify(data[:end], XATTR_BLOCK_MAGIC, f"{what}: xattr block {block}")
        if (header["address"], header["ino"], header["generation"]) != (block, ino, generation):
            raise Corrupt(f"{what}: xattr block {block} belongs to inode {header['ino']!r}")
        total += length
        if total > XATTR_TOTAL_MAX:
            raise Corrupt(f"{what}: the xattr chain is too long")
        yield block, data[XATTR_BLOCK.size : end]
        following = header["next"]
        assert isinstance(following, int)
        block = following


def _all(vol: Volume, inode: Inode) -> dict[bytes, bytes]:
    if inode.xattrs is None:
        data = b"".join(payload for _, payload in _chain(vol, inode)) if inode.xattr_block else inode.xattr_inline
        inode.xattrs = decode(data, f"inode {inode.ino}")
    return inode.xattrs


def _chain(vol: Volume, inode: Inode) -> Iterator[tuple[int, bytes]]:
    return read_chain(
        vol.pmem.load, vol.block_size, vol.data_blocks, inode.xattr_block, inode.ino, inode.generation
    )


def _store(vol: Volume, txn: Transaction, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
    data = encode(xattrs)
    if len(data) > XATTR_TOTAL_MAX:
        raise NoSpace(f"the extended attributes of a file have at most {XATTR_TOTAL_MAX} bytes")
    old = [block for block, _ in _chain(vol, inode)]
    if len(data) <= INLINE_XATTR_MAX:
        _switch(txn, inode, data, 0, xattrs)
    else:
        room = vol.block_size - XATTR_BLOCK.size
        pieces = [data[at : at + room] for at in range(0, len(data), room)]
        # A change that needs no more blocks than before must work on a full volume: the old ones come back at once.
        runs = txn.take(len(pieces), meta=len(pieces) <= len(old))
        chain = [block for start, count in runs for block in range(start, start + count)]
        _write_chain(vol, txn, inode, chain, pieces)
        _switch(txn, inode, b"", chain[0], xattrs)
    _free(txn, old)


def _write_chain(vol: Volume, txn: Transaction, inode: Inode, chain: list[int], pieces: list[bytes]) -> None:
    for block, following, piece in zip(chain, [*chain[1:], 0], pieces, strict=True):
        header = XATTR_BLOCK.pack(
            magic=XATTR_BLOCK_MAGIC, crc=0, address=block, ino=inode.ino, next=following, length=len(piece),
            generation=inode.generation, reserved=0,
        )  # fmt: skip
        txn.fresh(block * vol.block_size, seal(header + piece))


def _switch(txn: Transaction, inode: Inode, inline: bytes, block: int, xattrs: dict[bytes, bytes]) -> None:
    txn.dirty(inode)
    inode.xattr_inline = inline
    inode.xattr_block = block
    inode.xattrs = xattrs


def _free(txn: Transaction, chain: list[int]) -> None:
    if chain:
        txn.free([(block, 1) for block in chain])
