"""Directories on a real volume: entries come, go, keep their place, survive an abort and a reload; media is judged."""

from __future__ import annotations

import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daxfs.core.directory import Directory, Slots, pack_block, parse_block
from daxfs.core.inode import Inode
from daxfs.core.layout import DIRBLOCK, DIRENT_ALIGN
from daxfs.core.records import pack_entry
from daxfs.core.volume import Transaction, Volume
from daxfs.errors import Corrupt, Exists, FsError, NameTooLong, NoEntry

from .image import NOW, Abort, fresh_volume, new_inode

REG, DIR = 8, 4


@pytest.fixture
def vol(tmp_path: Path) -> Iterator[Volume]:
    with fresh_volume(tmp_path) as volume:
        yield volume


def new_dir(vol: Volume) -> Inode:
    return new_inode(vol, stat.S_IFDIR | 0o755)


def insert(directory: Directory, vol: Volume, *names: bytes) -> None:
    with vol.transaction(NOW) as txn:
        for name in names:
            directory.insert(txn, name, 5, REG)


def remove(directory: Directory, vol: Volume, *names: bytes) -> None:
    with vol.transaction(NOW) as txn:
        for name in names:
            directory.remove(txn, name)


def names_of(directory: Directory) -> list[bytes]:
    return [name for name, _, _, _ in directory.entries()]


def test_empty(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    assert directory.is_empty()
    assert directory.lookup(b"a") is None
    assert list(directory.entries(0)) == []
    assert inode.size == 0


def test_insert_lookup_remove(vol: Volume) -> None:
    directory = Directory(vol, new_dir(vol))
    with vol.transaction(NOW) as txn:
        directory.insert(txn, b"file", 27, REG)
        directory.insert(txn, b"dir", 28, DIR)
    assert directory.lookup(b"file") == (27, REG)
    assert directory.lookup(b"dir") == (28, DIR)
    assert len(directory) == 2
    with vol.transaction(NOW) as txn:
        directory.remove(txn, b"file")
    assert directory.lookup(b"file") is None
    assert not directory.is_empty()
    directory.check()


def test_wrong_calls(vol: Volume) -> None:
    directory = Directory(vol, new_dir(vol))
    insert(directory, vol, b"a")
    calls: list[tuple[type[FsError], Callable[[Transaction], None]]] = [
        (Exists, lambda txn: directory.insert(txn, b"a", 5, REG)),
        (NameTooLong, lambda txn: directory.insert(txn, b"b" * 256, 5, REG)),
        (NoEntry, lambda txn: directory.remove(txn, b"b")),
        (NoEntry, lambda txn: directory.replace(txn, b"b", 5, REG)),
    ]
    for error, call in calls:
        with pytest.raises(error), vol.transaction(NOW) as txn:
            call(txn)
    directory.check()
    assert names_of(directory) == [b"a"]


def test_replace_in_place(vol: Volume) -> None:
    directory = Directory(vol, new_dir(vol))
    insert(directory, vol, b"a", b"b", b"c")
    before = list(directory.entries())
    with vol.transaction(NOW) as txn:
        directory.replace(txn, b"b", 29, DIR)
    assert directory.lookup(b"b") == (29, DIR)
    assert [(n, p) for n, _, _, p in directory.entries()] == [(n, p) for n, _, _, p in before]
    directory.check()


def test_names_of_all_lengths_and_bytes(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    names = [b"x" * n for n in range(1, 256)]
    names += [bytes([b]) + b"," for b in range(1, 256) if b != ord("/")] + [b"...", b"..a", b"\xff" * 255]
    for name in names:
        insert(directory, vol, name)
    assert sorted(names_of(Directory(vol, inode))) == sorted(names)
    directory.check()


def test_space_of_removed_entries_is_used_again(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    names = [b"name-%04d" % n for n in range(1000)]
    insert(directory, vol, *names)
    size = inode.size
    for _ in range(3):
        random.Random(1).shuffle(names)
        remove(directory, vol, *names)
        assert directory.is_empty()
        insert(directory, vol, *names)
        assert inode.size == size
        directory.check()


def test_small_holes_become_room_for_long_names(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    short = [b"%02d" % n for n in range((vol.block_size - DIRBLOCK.size) // 32)]
    insert(directory, vol, *short)
    assert inode.size == vol.block_size
    remove(directory, vol, *short[8:40:2])  # holes of 32 bytes, then their neighbours: nothing but merging makes room
    remove(directory, vol, *short[9:40:2])
    insert(directory, vol, b"L" * 255, b"M" * 255, b"N" * 255)
    assert inode.size == vol.block_size
    directory.check()


def test_remove_and_insert_in_one_transaction(vol: Volume) -> None:
    """rename within a directory; the slot of the removed one may be taken at once."""
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    insert(directory, vol, *(b"%03d" % n for n in range(200)))
    with vol.transaction(NOW) as txn:
        for n in range(200):
            directory.remove(txn, b"%03d" % n)
            directory.insert(txn, b"new-%03d" % n, n % 31 + 1, REG)
    directory.check()
    assert Directory(vol, inode).lookup(b"new-007") == (8, REG)


def test_abort_changes_nothing(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    insert(directory, vol, b"stays")
    size, free = inode.size, vol.free
    with suppress(Abort), vol.transaction(NOW) as txn:
        directory.remove(txn, b"stays")
        for n in range(300):
            directory.insert(txn, b"goes-%d" % n, 9, REG)
        directory.replace(txn, b"goes-1", 10, DIR)
        raise Abort
    assert names_of(directory) == [b"stays"]
    assert (inode.size, vol.free) == (size, free)
    directory.check()
    insert(directory, vol, b"later")
    assert sorted(names_of(Directory(vol, inode))) == [b"later", b"stays"]


def test_readdir_is_stable_under_change(vol: Volume) -> None:
    """Read in small steps while others create and remove: whoever is there all the time comes exactly once."""
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    dice = random.Random(7)
    stays = {b"stays-%d" % n * dice.randint(1, 8) for n in range(500)}
    volatile = {b"volatile-%d" % n * dice.randint(1, 8) for n in range(500)}
    for name in dice.sample(sorted(stays | volatile), 1000):
        insert(directory, vol, name)
    seen: list[bytes] = []
    position = 0
    while True:
        page = [entry for entry, _ in zip(directory.entries(position), range(7), strict=False)]
        if not page:
            break
        seen += [name for name, _, _, _ in page]
        position = page[-1][3]
        gone = dice.sample(sorted(volatile), 5)
        remove(directory, vol, *gone)
        volatile -= set(gone)
        new = {b"%x" % dice.getrandbits(dice.choice((16, 200, 900))) for _ in range(4)} - volatile
        insert(directory, vol, *new)
        volatile |= new
    assert stays <= set(seen)
    assert len([n for n in seen if n in stays]) == len(stays)
    directory.check()


def test_positions_outlive_a_reload(vol: Volume) -> None:
    inode = new_dir(vol)
    directory = Directory(vol, inode)
    insert(directory, vol, *(b"n%d" % n for n in range(400)))
    entries = list(directory.entries())
    for i in (0, 1, 130, 399):
        assert list(Directory(vol, inode).entries(entries[i][3])) == entries[i + 1 :]
    assert list(directory.entries(1)) == entries
    assert list(directory.entries(1 << 60)) == []


def block_of(vol: Volume, inode: Inode) -> int:
    """Address in bytes of the first directory block."""
    return inode.block(0) * vol.block_size


@pytest.mark.parametrize("at", [0, 4, 8, 16, 24, *(DIRBLOCK.size + n for n in (0, 8, 12, 14, 15, 17))])
def test_a_flipped_bit_is_found(vol: Volume, at: int) -> None:
    inode = new_dir(vol)
    insert(Directory(vol, inode), vol, b"name", b"other")
    place = block_of(vol, inode) + at
    vol.pmem.store(place, bytes([vol.pmem.load(place, 1)[0] ^ 0x10]))
    damaged = Directory(vol, inode)
    for read in (lambda: damaged.lookup(b"name"), lambda: list(damaged.entries()), damaged.is_empty):
        with pytest.raises(Corrupt):
            read()


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([(5, 2, REG, b"a"), (5, 2, REG, b"a")], "twice"),
        ([(5, 2, REG, b"a/b")], "name"),
        ([(5, 2, REG, b"a\0b")], "name"),
        ([(5, 2, REG, b"..")], "name"),
        ([(5, 2, REG, b".")], "name"),
        ([(5, 1, REG, b"")], "name"),
        ([(5, 1, REG, b"a")], "length"),
        ([(5, 0, REG, b"a")], "length"),
        ([(0, 0, 0, b"")], "length"),
        ([(0, 500, 0, b"")], "length"),
        ([(5, 3, REG, b"a")], "not valid"),
        ([(5, 2, 3, b"a")], "not valid"),
        ([(1 << 63, 2, REG, b"a")], "not valid"),
        ([(0, 2, 0, b"a")], "not valid"),
        ([(0, 2, REG, b"")], "not valid"),
    ],
)
def test_well_formed_but_wrong(vol: Volume, records: list[tuple[int, int, int, bytes]], why: str) -> None:
    """Records with right checksums that this program would not write."""
    inode = new_dir(vol)
    insert(Directory(vol, inode), vol, b"first")
    data = pack_block(inode.block(0), inode.ino, 0, vol.block_size)[: DIRBLOCK.size]
    left = vol.block_size // DIRENT_ALIGN - 2
    for ino, length, dtype, name in records:
        data += pack_entry(ino, length, dtype, name).ljust(length * DIRENT_ALIGN, b"\0")
        left -= length
    if left > 0:
        data += pack_entry(0, left, 0, b"")
    vol.pmem.store(block_of(vol, inode), data[: vol.block_size].ljust(vol.block_size, b"\0"))
    with pytest.raises(Corrupt, match=why):
        Directory(vol, inode).lookup(b"a")


def test_a_block_of_another_directory_is_refused(vol: Volume) -> None:
    one, two = new_dir(vol), new_dir(vol)
    insert(Directory(vol, one), vol, b"a")
    insert(Directory(vol, two), vol, b"b")
    vol.pmem.store(block_of(vol, two), vol.pmem.load(block_of(vol, one), vol.block_size))
    with pytest.raises(Corrupt, match="elsewhere"):
        Directory(vol, two).lookup(b"a")


def test_random_bytes_are_refused_not_followed() -> None:
    dice = random.Random(3)
    sound = pack_block(9, 2, 0, 4096)
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(48)] = dice.getrandbits(8)
        try:
            parse_block(bytes(data), 9, 2, 0, 1 << 32)
        except FsError:
            continue
        assert data[:48] == sound[:48]


def test_slots_merge_on_both_sides() -> None:
    slots = Slots()
    assert slots.add(10, 2) == (10, 2)
    assert slots.add(14, 2) == (14, 2)
    assert slots.add(12, 2) == (10, 6)
    assert slots.starts == {10: 6}
    assert slots.take(7) is None
    assert slots.take(3) == (10, 6)
    assert slots.take(1) is None


class Model(RuleBasedStateMachine):
    """A directory against a dict, with aborts and reloads."""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        place = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.vol = self.stack.enter_context(fresh_volume(place))
        self.inode = new_dir(self.vol)
        self.directory = Directory(self.vol, self.inode)
        self.model: dict[bytes, tuple[int, int]] = {}

    def teardown(self) -> None:
        self.stack.close()

    names = st.integers(0, 60).map(lambda n: b"%d" % n * (1 + n * 7 % 90))

    @rule(changes=st.lists(st.tuples(names, st.integers(1, 31), st.booleans()), max_size=20), abort=st.booleans())
    def change(self, changes: list[tuple[bytes, int, bool]], abort: bool) -> None:
        model = dict(self.model)
        try:
            with self.vol.transaction(NOW) as txn:
                for name, ino, overwrite in changes:
                    if name not in model:
                        self.directory.insert(txn, name, ino, REG)
                        model[name] = (ino, REG)
                    elif overwrite:
                        self.directory.replace(txn, name, ino, DIR)
                        model[name] = (ino, DIR)
                    else:
                        self.directory.remove(txn, name)
                        del model[name]
                if abort:
                    raise Abort
        except Abort:
            return
        self.model = model

    @precondition(lambda self: self.model)
    @rule()
    def reload(self) -> None:
        self.directory = Directory(self.vol, self.inode)

    @invariant()
    def agrees(self) -> None:
        self.directory.check()
        assert {name: (ino, dtype) for name, ino, dtype, _ in self.directory.entries()} == self.model
        assert all(self.directory.lookup(name) == value for name, value in self.model.items())
        positions = [position for _, _, _, position in self.directory.entries()]
        assert positions == sorted(set(positions))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
