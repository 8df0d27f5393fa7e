"""What a volume holds, and whether a crash may have left it so.

`state_of` gives all that is promised to outlive a crash, as values that compare: the tree by path with every attribute,
time, extended attribute, byte of content and allocated range, and how many blocks nobody accounts for. Not in it: where
on the image a block lies; and unlinked files that are open, busy blocks and pins, which a power cut ends.

What is promised (`explains`)
- A call is whole or absent: the recovered state is the one before or the one after it; once it returned, the latter.
- Except that data is overwritten in place (a pinned block stays where it is): of a call that does so (`Call.in_place`)
  each aligned 8-byte word of data that was there before is old or new, and so is each time that comes with it. If the
  call also allocates or grows the file, that part is one transaction: where it shows, all data is new.
- `MULTIPLE` lists the verbs that are more than one transaction, and why that does not show, or may.
- Whoever mounts next knows that there was a crash, unless it was within an unmount.
- Old or foreign data never shows. In holes and unwritten blocks it would be a difference like any other; behind the end
  of file it must not show when the file grows (`tails`).

Not here: what fsck and `Volume.check` prove about the image itself.
"""

from __future__ import annotations

import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from daxfs.core import fileops, layout, namespace, xattr
from daxfs.core.inode import Inode
from daxfs.core.volume import Volume
from daxfs.lab.crash.calls import Call

MULTIPLE = {
    "create, mkdir, mknod, symlink, tmpfile": "a new chunk of inodes is a transaction of its own: in between there are"
    " more free inodes, which nobody can see",
    "unlink, rename, rmdir, close": "removing the last name and ending the inode, when its last descriptor closes, are"
    " two transactions: an unlinked inode has no name, and the next mount ends it",
    "pin": "filling holes is a transaction; ledger entries follow, each a cache line: one that is not there belongs to"
    " a pin that was not granted",
    "unpin": "ledger entries of a pin go one by one, each with one store: what is left keeps blocks from reuse until"
    " the holder is gone or the host boots",
    "copy": "copy_file_range(2) copies pieces of 1 MiB, each a write of its own: a crash leaves the first few",
    "remount, reboot, die": "closing descriptors, ending unlinked inodes, snapshot, superblocks, ledger blocks of"
    " another boot: none of them changes the tree",
    "release": "as unpin, for all pins of a holder that is gone",
}


class Node(NamedTuple):
    """One file. Times in ns; sizes in bytes. `times`: mtime, ctime, atime. `data`: written ranges as (first block,
    blocks, bytes up to the end of file), `unwritten`: preallocated ones as (first block, blocks), neighbours joined."""

    ino: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    parent: int
    btime: int
    times: tuple[int, int, int]
    target: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    data: tuple[tuple[int, int, bytes], ...]
    unwritten: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class State:
    """`nodes` by path from the root, which is b"". `unowned`: blocks that are neither free nor busy nor of the tree nor
    the volume's own (on a live volume: those of unlinked files that are open). `block_size` is bytes. `clean`: it was
    unmounted before this mount; two states are the same whether or not."""

    nodes: dict[bytes, Node]
    unowned: int
    busy: int
    block_size: int
    clean: bool = field(compare=False)


def state_of(volume: Volume) -> State:
    """The state of an open volume; nothing is changed."""
    nodes: dict[bytes, Node] = {}
    counted: set[int] = set()
    owned = 0
    waiting = [(b"", volume.root)]
    while waiting:
        path, inode = waiting.pop()
        node, blocks = _node(volume, inode)
        nodes[path] = node
        if inode.ino in counted:
            continue  # a second name; of a directory, `faults` tells
        counted.add(inode.ino)
        owned += blocks
        if inode.is_dir:
            for name, ino, _, _ in namespace.entries(volume, inode, 0):
                waiting.append((path + b"/" + name, volume.inode(ino)))
    owned += volume.sb["data_start"] + len(volume.ledger.blocks)
    owned += len(volume.chunks) * layout.chunk_blocks(volume.block_size)
    busy = volume.busy_list.blocks
    unowned = volume.blocks - volume.free - busy - owned
    return State(nodes, unowned, busy, volume.block_size, volume.last_shutdown == "clean")


def _node(volume: Volume, inode: Inode) -> tuple[Node, int]:
    """The node, and how many blocks it has, extent leaves and xattr blocks included."""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    blocks = 0
    if inode.xattr_inline or inode.xattr_block:
        xattrs = tuple((name, xattr.get(volume, inode, name)) for name in sorted(xattr.names(volume, inode)))
    if inode.xattr_block:
        chain = xattr.read_chain(volume.pmem.load, volume.block_size, volume.data_blocks, inode.xattr_block, inode.ino,
                                 inode.generation)  # fmt: skip
        blocks += sum(1 for _ in chain)
    target = namespace.readlink(volume, inode) if inode.is_symlink else b""
    mapped = inode.map
    data: list[tuple[int, int, bytes]] = []
    unwritten: list[tuple[int, int]] = []
    if mapped.blocks:
        blocks += mapped.blocks + len(mapped.leaf_blocks())
        if inode.is_file:
            data, unwritten = _content(volume, inode)
    return Node(
        inode.ino, inode.generation, inode.mode, inode.uid, inode.gid, inode.nlink, inode.rdev, inode.size,
        inode.parent if inode.is_dir else 0, inode.btime, (inode.mtime, inode.ctime, inode.atime), target, xattrs,
        tuple(data), tuple(unwritten),
    ), blocks  # fmt: skip


def _content(volume: Volume, inode: Inode) -> tuple[list[tuple[int, int, bytes]], list[tuple[int, int]]]:
    size, end, view = volume.block_size, inode.size, volume.pmem.view
    data: list[tuple[int, int, bytes]] = []
    unwritten: list[tuple[int, int]] = []
    for logical, physical, count, fresh in inode.map:
        if fresh:
            if unwritten and sum(unwritten[-1]) == logical:
                first, before = unwritten.pop()
                unwritten.append((first, before + count))
            else:
                unwritten.append((logical, count))
            continue
        at = physical * size
        piece = bytes(view[at : at + max(0, min(count * size, end - logical * size))])
        if data and data[-1][0] + data[-1][1] == logical:
            first, before, head = data.pop()
            data.append((first, before + count, head + piece))
        else:
            data.append((logical, count, piece))
    return data, unwritten


# -- judging --


def faults(state: State) -> str | None:
    """What is wrong with a recovered state by itself, whatever came before; None if nothing is."""
    names = Counter(node.ino for node in state.nodes.values())
    subdirectories: Counter[int] = Counter()
    for path, node in state.nodes.items():
        if stat.S_ISDIR(node.mode):
            if names[node.ino] != 1:
                return f"{_shown(path)}: a directory with {names[node.ino]} names"
            above = state.nodes[path.rpartition(b"/")[0]]
            if node.parent != above.ino:
                return f"{_shown(path)}: its .. is inode {node.parent}, not {above.ino}"
            if path:
                subdirectories[above.ino] += 1
    for path, node in state.nodes.items():
        links = 2 + subdirectories[node.ino] if stat.S_ISDIR(node.mode) else names[node.ino]
        if node.nlink != links:
            return f"{_shown(path)}: its link count is {node.nlink}, and it has {links}"
    if state.unowned:
        return f"{state.unowned} blocks are nobody's, and not free"
    return None


def explains(recovered: State, before: State, after: State, call: Call | None = None, *,
             returned: bool = False) -> str | None:  # fmt: skip
    """None if a crash within `call` (or once it has returned) may leave this; else what is wrong, in one sentence."""
    wrong = faults(recovered)
    if wrong:
        return wrong
    if recovered.clean and (returned or call is None or not call.unmounts):
        return "the crash of a mounted volume passes for a clean unmount"
    nodes = recovered.nodes
    if nodes == after.nodes or (nodes == before.nodes and not returned):
        return None
    if returned:
        return f"a call that had returned is not there as a whole: {_difference(nodes, after.nodes)}"
    if call is not None and call.in_place and nodes.keys() == before.nodes.keys() == after.nodes.keys():
        for path, node in nodes.items():
            why = _overwritten(node, before.nodes[path], after.nodes[path], recovered.block_size)
            if why:
                return f"{_shown(path)}: {why}"
        return None
    return (f"neither before nor after: of what was before {_difference(nodes, before.nodes)}; "
            f"of what comes after {_difference(nodes, after.nodes)}")  # fmt: skip


def _overwritten(node: Node, before: Node, after: Node, block_size: int) -> str | None:
    """Whether a call that overwrites in place may leave this of one file."""
    if node in (before, after):
        return None
    if _bare(node) != _bare(before):
        return f"{_fields(node, before)} differ from before, and {_fields(node, after)} from after"
    in_place = _bare(before) == _bare(after)  # no transaction: times are stored in place as well
    for name, time, *known in zip(("mtime", "ctime", "atime"), node.times, before.times, after.times, strict=True):
        if time not in (known if in_place else known[:1]):
            return f"the {name} is {time}, neither old nor new"
    for (first, count, got), (_, _, old) in zip(node.data, before.data, strict=True):
        if len(got) != len(old):
            return f"{len(got)} bytes of data at block {first} instead of {len(old)}"
        new = bytearray(old)
        for at, blocks, data in after.data:
            low, high = max(at, first), min(at + blocks, first + count)
            if low < high:
                piece = data[(low - at) * block_size : (high - at) * block_size]
                piece = piece[: len(new) - (low - first) * block_size]
                new[(low - first) * block_size : (low - first) * block_size + len(piece)] = piece
        found, olds, news = _words(got), _words(old), _words(new)
        bad = np.flatnonzero((found != olds) & (found != news))
        if len(bad):
            return f"the 8 bytes at block {first} + {8 * int(bad[0])} are neither old nor new"
    return None


def _bare(node: Node) -> Node:
    """All that is never stored in place: without times and bytes of data."""
    return node._replace(times=(0, 0, 0), data=tuple((first, count, b"") for first, count, _ in node.data))


def _words(data: bytes | bytearray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes(data) + bytes(-len(data) % 8), "<u8")


def _difference(nodes: dict[bytes, Node], other: dict[bytes, Node]) -> str:
    """The first difference between two trees."""
    for path in sorted(nodes.keys() | other.keys()):
        if path not in nodes:
            return f"{_shown(path)} is missing"
        if path not in other:
            return f"{_shown(path)} is there"
        if nodes[path] != other[path]:
            return f"{_shown(path)} differs in {_fields(nodes[path], other[path])}"
    return "nothing"


def _fields(node: Node, other: Node) -> str:
    shown = []
    for name, value, expected in zip(Node._fields, node, other, strict=True):
        if value != expected:
            shown.append(f"{name} ({value}, not {expected})" if isinstance(value, int) else name)
    return ", ".join(shown)


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "replace")[:60] or "/"


# -- what files would show --


def tails(volume: Volume, now: int, known: State | None = None) -> str | None:
    """Grow every file to the end of its last block; None if nothing but zeros comes to light. It changes the volume.
    `known`: its state, if somebody has it."""
    size = volume.block_size
    for path, node in (known or state_of(volume)).nodes.items():
        if not stat.S_ISREG(node.mode) or node.size % size == 0:
            continue
        inode = volume.inode(node.ino)
        old = inode.size
        fileops.truncate(volume, now, inode, old + -old % size)
        if any(fileops.read(volume, inode, old, size)):
            return f"{_shown(path)}: what lies behind its old end of {old} bytes shows when it grows"
    return None
