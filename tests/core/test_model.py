"""The centre piece: random verbs, pins, holders that write, crashes and remounts, against the model of model.py.

After every step the volume proves its own invariants, all that is visible is compared with the model (names, attributes,
extents, every byte), and every pinned block is looked at: its bytes are the file's while the file owns it, and nobody's but
the holder's afterwards. At the end comes fsck, and a last remount. Extent leaves are tiny in some runs, so that chains of
leaves, which need large files otherwise, are as common as anything.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daxfs import abi
from daxfs.core import attributes, fileops, fsck, holding, layout, namespace, xattr
from daxfs.core.attributes import Attributes
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.layout import FILE_SIZE_MAX
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.core.waiting import SPACE
from daxfs.errors import FsError, NoSpace

from .image import NOW, soil
from .model import EXCHANGE, KEEP_SIZE, NOREPLACE, PUNCH, WHITEOUT, ZERO, HeldPin, Model, Node

CALLER = Caller(1000, 100, 0o022)
BOOTS = [bytes([n]) * 16 for n in (1, 2)]
PATTERN = bytes(range(1, 252)) * 1100  # 251 is prime: a block in the wrong place shows

pick = st.integers(0, 999)  # which one of what there is
names = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff\xfe", b"n" * 255])
# (block, bytes) from the start of the file, or a distance from its end or from the largest size
spots = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 30), st.sampled_from([0, 0, 0, 1, 37, -1])),
    st.tuples(st.just("end"), st.integers(-3, 3), st.sampled_from([0, 0, 1, -1, 700])),
    st.tuples(st.just("limit"), st.integers(-2, 0), st.sampled_from([0, -1, 100])),
)
sizes = st.one_of(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, -1, 99])), st.tuples(st.integers(0, 40), st.just(0)))
modes = st.sampled_from([0, KEEP_SIZE, PUNCH | KEEP_SIZE, PUNCH | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE, PUNCH, 8])
attribute_names = st.sampled_from([b"user.a", b"user.b", b"trusted.c", b"security.selinux"])
values = st.one_of(st.binary(max_size=40), st.integers(200, 9000).map(lambda n: PATTERN[:n]))

T = TypeVar("T")


class Machine(RuleBasedStateMachine):
    """One image; `vol` is it mounted, `model` what it should hold."""

    @initialize(
        size=st.sampled_from([1 << 20, 1 << 20, 3 << 20]),
        block_size=st.sampled_from([4096, 4096, 4096, 16384]),
        leaf=st.sampled_from([6, 9, 168]),
    )
    def begin(self, size: int, block_size: int, leaf: int) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="daxfs-model-")
        self.path = Path(self.directory.name) / "image"
        self.leaf = mock.patch.object(layout, "leaf_capacity", return_value=leaf)
        self.leaf.start()
        size = max(size, 64 * block_size)
        format_image(self.path, size, block_size=block_size, now=NOW)
        self.now, self.boot, self.serial = NOW, BOOTS[0], 0
        self.handles: dict[int, Node] = {}  # open file -> what it has open
        self.size = block_size
        self.vol = soil(Volume.open(self.path, now=NOW, boot_id=self.boot))
        self.model = Model(block_size, Node(1, stat.S_IFDIR | 0o755, 0, 0, 2, NOW))
        self.model.root.parent = self.model.root
        self.populate()

    def populate(self) -> None:
        """Something to work on: directories, and files of which one is in many pieces."""
        for name in (b"a", b"b"):
            self.mkdir(0, name)
        for where, name in enumerate((b"c", b"d", b"\xff\xfe", b"c")):
            self.create(where, name, stat.S_IFREG)
        for which, node in enumerate(self.model.files()):
            self.write(which, ("start", 0, 0), (2 * which + 1, 99), which)
            if which % 2:
                self.open(self.model.nodes.index(node))
        self.scatter(0, 3, 12, 5)
        for which, where in ((1, "written"), (19, "written"), (3, "written"), (1, "pinned")):
            self.pin(which, which, 2, which == 3, where)

    # -- how a rule calls --

    def one(self, which: int, among: Sequence[T]) -> T:
        return among[which % len(among)]

    def inode(self, node: Node) -> Inode:
        return self.vol.inode(node.ino)

    def entry(self, which: int) -> tuple[Node, bytes]:
        """A directory and a name in it; now and then a name that is not there."""
        there = [(parent, name) for parent in self.model.directories() for name in parent.children]
        return (self.model.root, b"missing") if which % 16 == 0 or not there else there[which // 16 % len(there)]

    def written(self) -> list[Node]:
        return [n for n in self.model.files() if any(block is not None for block in n.blocks.values())]

    def spot(self, node: Node, where: tuple[str, int, int]) -> int:
        base, blocks, delta = where
        start = {"start": 0, "end": node.size, "limit": FILE_SIZE_MAX}[base]
        return max(0, start + blocks * self.size + delta)

    def bytes_of(self, size: tuple[int, int]) -> int:
        return max(0, size[0] * self.size + size[1])

    def both(self, call: Callable[[], Any], model: Callable[[], Any], *, room: int | None = None) -> tuple[bool, Any]:
        """Call the volume, then the model: the same error, or (True, what the volume returned).

        `room`: how many blocks of data space the call may need; without that much, or if next to nothing of the reserve is
        left for a split leaf, it may say NoSpace, and the model is left alone. None: it must never say so.
        """
        self.now += 1_000_000_007
        short = room is not None and (self.vol.alloc.available < room or self.vol.free < 6)
        self.model.before = {b: self.bytes_at(b) for b in self.model.pinned}
        refused: FsError | None = None
        result = None
        try:
            result = call()
        except FsError as e:
            refused = e
        if isinstance(refused, NoSpace) and short:
            return False, None
        expected: FsError | None = None
        try:
            if refused is None or not isinstance(refused, NoSpace):
                model()
        except FsError as e:
            expected = e
        assert (refused and refused.errno) == (expected and expected.errno), f"{refused!r}, the model says {expected!r}"
        return refused is None, result

    def bytes_at(self, block: int) -> bytes:
        return self.vol.pmem.load(block * self.size, self.size)

    def reap(self, node: Node | None) -> None:
        if node is not None:
            fileops.reap(self.vol, self.now, self.inode(node))
            self.model.reap(node)

    # -- names --

    @rule(where=pick, name=names, kind=st.sampled_from([stat.S_IFREG] * 6 + [stat.S_IFIFO]))
    def create(self, where: int, name: bytes, kind: int) -> None:
        parent = self.one(where, self.model.directories())
        done, inode = self.both(
            lambda: namespace.create(self.vol, self.now, self.inode(parent), name, kind | 0o666, CALLER),
            lambda: self.model.place(parent, name),
            room=8,
        )
        if done:
            self.model.enter(parent, name, Node(inode.ino, kind | 0o644, 1000, 100, 1, self.now), self.now)

    @rule(where=pick, name=names)
    def mkdir(self, where: int, name: bytes) -> None:
        parent = self.one(where, self.model.directories())
        done, inode = self.both(
            lambda: namespace.mkdir(self.vol, self.now, self.inode(parent), name, 0o777, CALLER),
            lambda: self.model.place(parent, name),
            room=8,
        )
        if done:
            self.model.enter(parent, name, Node(inode.ino, stat.S_IFDIR | 0o755, 1000, 100, 2, self.now), self.now)

    @rule(where=pick, name=names, length=st.sampled_from([1, 143, 144, 145, 4095]))
    def symlink(self, where: int, name: bytes, length: int) -> None:
        parent = self.one(where, self.model.directories())
        target = PATTERN[:length]
        done, inode = self.both(
            lambda: namespace.symlink(self.vol, self.now, self.inode(parent), name, target, CALLER),
            lambda: self.model.place(parent, name),
            room=9,
        )
        if done:
            node = Node(inode.ino, stat.S_IFLNK | 0o777, 1000, 100, 1, self.now, size=length, target=target)
            self.model.enter(parent, name, node, self.now)

    @precondition(lambda self: sum(n.nlink == 0 for n in self.model.nodes) < 2)
    @rule()
    def tmpfile(self) -> None:
        done, inode = self.both(
            lambda: namespace.tmpfile(self.vol, self.now, self.inode(self.model.root), 0o600, CALLER), lambda: None, room=8
        )
        if done:
            self.model.nodes.append(Node(inode.ino, stat.S_IFREG | 0o600, 1000, 100, 0, self.now))
            self.opened(self.model.nodes[-1])

    @rule(which=pick, where=pick, name=names)
    def link(self, which: int, where: int, name: bytes) -> None:
        node, parent = self.one(which, self.model.nodes), self.one(where, self.model.directories())
        self.both(
            lambda: namespace.link(self.vol, self.now, self.inode(node), self.inode(parent), name),
            lambda: self.model.link(node, parent, name, self.now),
            room=2,
        )

    @rule(which=pick, wrong=st.sampled_from([False, False, False, True]))
    def unlink(self, which: int, wrong: bool) -> None:
        parent, name = self.entry(which)
        node = parent.children.get(name)
        directory = (node is not None and node.is_dir) != wrong
        verb, model = (namespace.rmdir, self.model.rmdir) if directory else (namespace.unlink, self.model.unlink)
        done, _ = self.both(
            lambda: verb(self.vol, self.now, self.inode(parent), name), lambda: model(parent, name, self.now)
        )
        if done:
            self.reap(node)

    @rule(which=pick, to=pick, new_name=names, over=st.booleans(),
          flags=st.sampled_from([0, 0, 0, NOREPLACE, EXCHANGE, EXCHANGE, WHITEOUT, EXCHANGE | NOREPLACE]))  # fmt: skip
    def rename(self, which: int, to: int, new_name: bytes, over: bool, flags: int) -> None:
        parent, name = self.entry(which)
        new_parent, new_name = self.entry(to) if over else (self.one(to, self.model.directories()), new_name)
        lost: list[Node | None] = []
        moved = parent.children.get(name)
        done, _ = self.both(
            lambda: namespace.rename(
                self.vol, self.now, self.inode(parent), name, self.inode(new_parent), new_name, flags
            ),
            lambda: lost.append(self.model.rename(parent, name, new_parent, new_name, flags, self.now)),
            room=9,
        )
        if done:
            if flags & WHITEOUT and parent.children.get(name) is not moved:
                left = namespace.lookup(self.vol, self.inode(parent), name)
                assert left is not None
                self.model.enter(parent, name, Node(left.ino, stat.S_IFCHR, 0, 0, 1, self.now), self.now)
            self.reap(lost[0])

    @rule(which=pick)
    def open(self, which: int) -> None:
        self.opened(self.one(which, self.model.nodes))

    def opened(self, node: Node) -> None:
        self.serial += 1
        self.handles[self.serial] = node
        self.inode(node).opens += 1
        self.inode(node).set_hot()
        node.opens += 1

    @precondition(lambda self: self.handles)
    @rule(which=pick)
    def close(self, which: int) -> None:
        """The last close of a description: its pins go, and the file if nothing else has it."""
        handle = list(self.handles)[which % len(self.handles)]
        node = self.handles.pop(handle)
        self.model.before = {b: self.bytes_at(b) for b in self.model.pinned}
        mine = [pin for pin in self.model.pins if pin.owner == handle]
        assert holding.release_owner(self.vol, handle) == len(mine)
        self.model.unpin(mine)
        self.inode(node).opens -= 1
        node.opens -= 1
        self.reap(node)

    @rule(which=pick)
    def forget(self, which: int) -> None:
        """The kernel drops it: the next use reads media."""
        node = self.one(which, self.model.nodes)
        fileops.reap(self.vol, self.now, self.inode(node))

    # -- data --

    @precondition(lambda self: self.model.files())
    @rule(which=pick, where=spots, size=sizes, tint=st.integers(0, 250))
    def write(self, which: int, where: tuple[str, int, int], size: tuple[int, int], tint: int) -> None:
        node = self.one(which, self.model.files())
        offset, length = self.spot(node, where), min(self.bytes_of(size), 1 << 18)
        data = PATTERN[tint : tint + length]
        missing = self.model.missing(node, offset, length)
        available = self.vol.alloc.available
        if offset >= FILE_SIZE_MAX and data:
            return
        data = data[: FILE_SIZE_MAX - offset]
        done: list[int] = []
        self.both(
            lambda: done.append(fileops.write(self.vol, self.now, self.inode(node), offset, data)),
            lambda: self.model.write(node, self.now, offset, data[: done[0]]),
            room=missing,
        )
        if done and done[0] < len(data):
            assert done[0] > 0
            assert available < missing
            assert self.vol.alloc.available == 0

    @precondition(lambda self: self.model.files())
    @rule(which=pick, first=st.integers(0, 6), count=st.integers(4, 14), tint=st.integers(0, 250))
    def scatter(self, which: int, first: int, count: int, tint: int) -> None:
        """Every second block: one extent each."""
        for i in range(count):
            self.write(which, ("start", first + 2 * i, 0), (1, 0), tint)

    @rule(which=pick, leave=st.integers(0, 3))
    def fill(self, which: int, leave: int) -> None:
        """Take nearly all the space that there is."""
        if self.model.files() and (room := self.vol.alloc.available - leave) > 0:
            node = self.one(which, self.model.files())
            missing = (i for i in range(1 << 20) if i not in node.blocks)
            end = next(i for n, i in enumerate(missing) if n == room)
            self.both(
                lambda: fileops.fallocate(self.vol, self.now, self.inode(node), KEEP_SIZE, 0, end * self.size),
                lambda: self.model.fallocate(node, self.now, KEEP_SIZE, 0, end * self.size),
            )

    @precondition(lambda self: self.model.files())
    @rule()
    def drain(self) -> None:
        """The largest file becomes small."""
        largest = max(range(len(self.model.files())), key=lambda i: len(self.model.files()[i].blocks))
        self.truncate(largest, ("start", 2, 37))

    @precondition(lambda self: self.model.files())
    @rule(which=pick, where=spots)
    def truncate(self, which: int, where: tuple[str, int, int]) -> None:
        node = self.one(which, self.model.files())
        size = self.spot(node, where)
        self.both(
            lambda: fileops.truncate(self.vol, self.now, self.inode(node), size),
            lambda: self.model.truncate(node, self.now, size),
        )

    @precondition(lambda self: self.model.files())
    @rule(which=pick, mode=modes, where=spots, size=sizes)
    def fallocate(self, which: int, mode: int, where: tuple[str, int, int], size: tuple[int, int]) -> None:
        node = self.one(which, self.model.files())
        offset, length = self.spot(node, where), self.bytes_of(size)
        room = 0 if mode & PUNCH else self.model.missing(node, offset, length) + 2
        self.both(
            lambda: fileops.fallocate(self.vol, self.now, self.inode(node), mode, offset, length),
            lambda: self.model.fallocate(node, self.now, mode, offset, length),
            room=room,
        )

    @precondition(lambda self: self.model.files())
    @rule(which=pick, other=pick, where=spots, to=spots, size=sizes)
    def copy(self, which: int, other: int, where: tuple[str, int, int], to: tuple[str, int, int],
             size: tuple[int, int]) -> None:  # fmt: skip
        source, target = self.one(which, self.model.files()), self.one(other, self.model.files())
        offset, target_offset, length = self.spot(source, where), self.spot(target, to), self.bytes_of(size)
        if target_offset + length > FILE_SIZE_MAX:
            return
        done: list[int] = []
        want = max(0, min(length, source.size - offset))
        self.both(
            lambda: done.append(fileops.copy_range(
                self.vol, self.now, self.inode(source), offset, self.inode(target), target_offset, length)),
            lambda: self.model.write(
                target, self.now, target_offset,
                self.model.copy_range(source, offset, target, target_offset, length)[: done[0] if done else length]),
            room=self.model.missing(target, target_offset, length),
        )  # fmt: skip
        if done:
            assert done[0] == want or self.vol.alloc.available == 0

    @precondition(lambda self: self.model.files())
    @rule(which=pick, where=spots, size=sizes, data=st.booleans())
    def look(self, which: int, where: tuple[str, int, int], size: tuple[int, int], data: bool) -> None:
        node = self.one(which, self.model.files())
        offset, length = self.spot(node, where), self.bytes_of(size)
        assert fileops.read(self.vol, self.inode(node), offset, length) == self.model.read(node, offset, length)
        want: list[int] = []
        done, got = self.both(
            lambda: fileops.seek(self.vol, self.inode(node), offset, os.SEEK_DATA if data else os.SEEK_HOLE),
            lambda: want.append(self.model.seek(node, offset, data)),
        )
        if done:
            assert got == want[0]

    # -- attributes --

    @rule(which=pick, mode=st.sampled_from([None, 0o600, 0o1777]), gid=st.sampled_from([None, 7]), times=st.booleans())
    def setattr(self, which: int, mode: int | None, gid: int | None, times: bool) -> None:
        node = self.one(which, self.model.nodes)
        new = Attributes(mode=mode, gid=gid, atime=self.serial if times else None, mtime=-5 if times else None)

        def model() -> None:
            node.mode = node.mode if mode is None else node.mode & ~0o7777 | mode
            node.gid = node.gid if gid is None else gid
            node.atime, node.mtime = (self.serial, -5) if times else (node.atime, node.mtime)
            node.ctime = self.now

        self.both(lambda: attributes.setattr(self.vol, self.now, self.inode(node), new), model)

    @rule(which=pick, name=attribute_names, value=values, flags=st.sampled_from([0, 0, 1, 2]))
    def setxattr(self, which: int, name: bytes, value: bytes, flags: int) -> None:
        node = self.one(which, self.model.nodes)
        self.both(
            lambda: attributes.setxattr(self.vol, self.now, self.inode(node), name, value, flags),
            lambda: self.model.set_xattr(node, self.now, name, value, flags),
            room=12,
        )

    @rule(which=pick, name=attribute_names)
    def removexattr(self, which: int, name: bytes) -> None:
        node = self.one(which, self.model.nodes)
        self.both(
            lambda: attributes.removexattr(self.vol, self.now, self.inode(node), name),
            lambda: self.model.remove_xattr(node, self.now, name),
            room=12,
        )

    # -- pins --

    @precondition(lambda self: self.written())
    @rule(which=pick, index=pick, count=st.sampled_from([0, 1, 1, 1, 2, 3, 6]), write=st.booleans(),
          where=st.sampled_from(["written", "written", "pinned", "any", "behind"]))  # fmt: skip
    def pin(self, which: int, index: int, count: int, write: bool, where: str) -> None:
        node = self.one(which, self.written())
        if node not in self.handles.values():
            self.opened(node)
        owner = self.one(index, [handle for handle, there in self.handles.items() if there is node])
        written = sorted(i for i, block in node.blocks.items() if block is not None)
        there = {"any": range(min(-(-node.size // self.size), 40)), "behind": range(-(-node.size // self.size), 1 << 52),
                 "pinned": [i for owner, i in self.model.home.values() if owner is node]}.get(where)  # fmt: skip
        first = self.one(index, there or written)
        flags = abi.FOLL_PIN | (abi.FOLL_WRITE if write else 0)
        missing = self.model.missing(node, first * self.size, count * self.size)
        self.serial += 1
        done, pin = self.both(
            lambda: holding.pin(self.vol, self.now, self.inode(node), first * self.size, count * self.size, flags, owner,
                                Holder(self.serial, "test", 5), writable=True),
            lambda: self.model.check_pin(node, first, count, write),
            room=missing + 8,
        )  # fmt: skip
        if done:
            blocks = [b for start, n in pin.runs for b in range(start, start + n)]
            self.model.pin(HeldPin(self.serial, owner, pin.id, node, write, blocks), self.now, first)

    @precondition(lambda self: self.model.home)
    @rule(which=pick, mode=st.sampled_from([PUNCH | KEEP_SIZE, PUNCH | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE, None]),
          less=st.integers(0, 2), count=st.integers(1, 5), delta=st.sampled_from([0, 0, 0, 37]))  # fmt: skip
    def cut(self, which: int, mode: int | None, less: int, count: int, delta: int) -> None:
        """A layout change right at a pinned block, and its neighbours."""
        node, index = list(self.model.home.values())[which % len(self.model.home)]
        place = self.model.files().index(node)
        if mode is None:
            self.truncate(place, ("start", index, delta))
        else:
            self.fallocate(place, mode, ("start", index - less, delta), (count, 0))

    @precondition(lambda self: self.model.pins)
    @rule(which=pick, index=pick, at=st.integers(0, 4095), tint=st.integers(0, 250))
    def dma(self, which: int, index: int, at: int, tint: int) -> None:
        """A device writes through the mapped image."""
        pin = self.model.pins[which % len(self.model.pins)]
        block = pin.blocks[index % len(pin.blocks)]
        data = PATTERN[tint : tint + min(500, self.size - at)]
        self.vol.pmem.view[block * self.size + at : block * self.size + at + len(data)] = data
        self.model.dma(block, at, data)

    @precondition(lambda self: self.model.pins)
    @rule(which=pick, dirty=st.booleans())
    def unpin(self, which: int, dirty: bool) -> None:
        pin = self.model.pins[which % len(self.model.pins)]
        self.now += 1
        if pin.owner is None:
            held = next(p for p in self.vol.pins.survivors() if p.holder.pid == pin.key)
            holding.release_survivor(self.vol, held)
        else:
            holding.unpin(self.vol, self.now, pin.owner, pin.id, dirty=dirty)
            if dirty and pin.write:
                pin.node.mtime = pin.node.ctime = self.now
        self.model.unpin([pin])

    @rule(limit=st.sampled_from([1, 2, 100]))
    def delayed_free(self, limit: int) -> None:
        due, free = len(self.model.due), self.vol.free
        moves: list[int] = []
        self.vol.on_moved = moves.append
        more = self.vol.free_unpinned(self.now, limit)
        freed = self.vol.free - free
        assert bool(freed) == bool(due)
        assert (SPACE in moves) == bool(freed)
        assert more == (freed < due)
        self.model.due -= {b for b in self.model.due if self.vol.alloc.free.within(b, 1)}

    # -- the end of a mount --

    @rule(clean=st.booleans(), same_boot=st.sampled_from([True, True, False]))
    def remount(self, clean: bool, same_boot: bool) -> None:
        self.model.before = {b: self.bytes_at(b) for b in self.model.pinned}
        dirty_shutdowns = self.vol.sb["dirty_shutdowns"]
        if clean:
            self.vol.close(self.now)
        else:
            self.vol.pmem.close()
        if not same_boot:
            self.boot = BOOTS[self.boot == BOOTS[0]]
        self.vol = Volume.open(self.path, now=self.now, boot_id=self.boot)
        self.handles.clear()
        self.model.remount(same_boot=same_boot)
        assert self.vol.sb["dirty_shutdowns"] == dirty_shutdowns + (not clean)
        survivors = {p.holder.pid: [b for s, n in p.runs for b in range(s, s + n)] for p in self.vol.pins}
        assert {k: sorted(v) for k, v in survivors.items()} == {p.key: sorted(p.blocks) for p in self.model.pins}

    # -- what must hold --

    @invariant()
    def proof(self) -> None:
        self.vol.check()

    @invariant()
    def space(self) -> None:
        vol = self.vol
        assert vol.busy == self.model.busy
        owned = sum(self.blocks_of(node) for node in self.model.nodes)
        metadata = vol.sb["data_start"] + len(vol.chunks) * layout.chunk_blocks(self.size) + len(vol.ledger.blocks)
        assert vol.used == metadata + owned - self.model.kept
        assert vol.free + vol.used + vol.busy == vol.blocks
        assert vol.pinned == len(self.model.pinned)
        assert not vol.failed

    def blocks_of(self, node: Node) -> int:
        inode = self.inode(node)
        chain = xattr.read_chain(self.vol.pmem.load, self.size, self.vol.data_blocks, inode.xattr_block, inode.ino,
                                 inode.generation)  # fmt: skip
        return inode.map.blocks + len(inode.map.leaf_blocks()) + len(list(chain))

    @invariant()
    def same(self) -> None:
        for node in self.model.nodes:
            inode = self.inode(node)
            for what in ("mode", "uid", "gid", "nlink", "mtime", "ctime", "atime", "btime", "opens"):
                assert getattr(inode, what) == getattr(node, what), (what, node.ino)
            assert {name: xattr.get(self.vol, inode, name) for name in xattr.names(self.vol, inode)} == node.xattrs
            if node.is_dir and node.parent is not None:
                assert inode.parent == node.parent.ino
                listed = {name: (ino, dtype) for name, ino, dtype, _ in namespace.entries(self.vol, inode, 0)}
                assert listed == {name: (child.ino, child.dtype) for name, child in node.children.items()}
                for name, (ino, _) in listed.items():
                    assert namespace.lookup(self.vol, inode, name) is self.vol.inode(ino)
            elif node.is_file:
                self.same_data(node, inode)
            elif node.target:
                assert namespace.readlink(self.vol, inode) == node.target

    def same_data(self, node: Node, inode: Inode) -> None:
        assert inode.size == node.size
        mapped = {}
        for logical, physical, count, flags in inode.map:
            for i in range(count):
                mapped[logical + i] = physical + i
                assert (node.blocks.get(logical + i, b"") is None) == bool(flags), f"block {logical + i} of {node.ino}"
        assert mapped.keys() == node.blocks.keys()
        for index, block in node.blocks.items():
            length = min(self.size, node.size - index * self.size)
            if block is not None and length > 0:
                assert self.bytes_at(mapped[index])[:length] == block[:length], f"block {index} of inode {node.ino}"
        for block, (owner, index) in self.model.home.items():
            assert owner is not node or mapped[index] == block, "a pinned block moved"

    @invariant()
    def held(self) -> None:
        """Nobody but the holder changes a pinned block that has lost its file, and nobody gets it."""
        for block, content in self.model.strays.items():
            assert self.bytes_at(block) == content, f"pinned block {block} was written to"
        assert self.vol.busy_list.due.blocks == len(self.model.due)
        gone = self.model.strays.keys() | self.model.due
        assert sum(n for b in gone for _, n in self.vol.busy_list.search(b, 1)) == len(gone) == self.vol.busy_list.blocks

    def teardown(self) -> None:
        if hasattr(self, "vol"):
            try:
                self.finish()
            finally:
                self.leaf.stop()
                self.directory.cleanup()

    def finish(self) -> None:
        """Clean unmount, fsck, and one more look at everything."""
        self.model.before = {b: self.bytes_at(b) for b in self.model.pinned}
        self.vol.close(self.now)
        report = fsck.check(self.path)
        assert report.errors == 0, [str(f) for f in report.findings]
        self.vol = Volume.open(self.path, now=self.now, boot_id=self.boot)
        try:
            self.model.remount(same_boot=True)
            self.proof()
            self.space()
            self.same()
            self.held()
        finally:
            self.vol.pmem.close()


TestModel = Machine.TestCase
TestModel.settings = settings(settings.get_profile("daxfs"), max_examples=150, stateful_step_count=50)
