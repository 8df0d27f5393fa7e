"""The data verbs at their edges. Free blocks hold garbage here, so whatever shows without having been written is seen."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs import abi
from daxfs.core import attributes, fileops, holding, namespace
from daxfs.core.attributes import Attributes
from daxfs.core.fileops import FALLOC_KEEP_SIZE as KEEP
from daxfs.core.fileops import FALLOC_PUNCH_HOLE, copy_range, fallocate, read, truncate, write
from daxfs.core.fileops import FALLOC_ZERO_RANGE as ZERO
from daxfs.core.inode import Inode
from daxfs.core.layout import BLOCK_SIZES, FILE_SIZE_MAX
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.errors import BadArgument, FsError, IsDirectory, NoSpace, NoSuchAddress, NotSupported, ReadOnly, TooBig

from .image import NOW, fresh_volume, soil
from .power import state

B = 4096
PUNCH = FALLOC_PUNCH_HOLE | KEEP
ROOT = Caller(0, 0)
DATA = bytes(range(1, 252)) * 2000
DAY = 86400 * 10**9


@pytest.fixture
def vol(vol: Volume) -> Volume:
    return soil(vol)


@pytest.fixture
def file(vol: Volume) -> Inode:
    return make(vol, b"f")


def make(vol: Volume, name: bytes, data: bytes = b"") -> Inode:
    inode = namespace.create(vol, NOW, vol.root, name, 0o644, ROOT)
    write(vol, NOW, inode, 0, data)
    return inode


def hog(vol: Volume, leave: int = 0) -> Inode:
    """A file that has all the space but `leave` blocks."""
    inode = make(vol, b"hog", b"h" * B)
    fallocate(vol, NOW, inode, KEEP, B, (vol.alloc.available - leave) * B)
    assert vol.alloc.available == leave
    return inode


def shape(inode: Inode) -> list[tuple[int, int, bool]]:
    """(first block, blocks, unwritten) of each extent."""
    return [(logical, count, bool(flags)) for logical, _, count, flags in inode.map]


# -- read and write --


def test_what_is_written_is_read(vol: Volume, file: Inode) -> None:
    for offset, length in ((0, 1), (1, B), (B - 1, 2), (3 * B, B), (10 * B + 5, 3 * B), (2 * B + 1, 1)):
        before = read(vol, file, 0, 20 * B)
        assert write(vol, NOW, file, offset, DATA[:length]) == length
        want = bytearray(before.ljust(offset + length, b"\0"))
        want[offset : offset + length] = DATA[:length]
        assert read(vol, file, 0, 20 * B) == bytes(want)
    assert file.size == 13 * B + 5


def test_read_stops_at_the_end(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[:5000])
    assert read(vol, file, 4000, 5000) == DATA[4000:5000]
    assert read(vol, file, 5000, 1) == read(vol, file, 9999, 1) == read(vol, file, 0, 0) == b""


def test_an_empty_write_does_nothing(vol: Volume, file: Inode) -> None:
    before = state(vol)
    for offset in (0, 5, FILE_SIZE_MAX, 1 << 70):
        assert write(vol, NOW + 5, file, offset, b"") == 0
    assert state(vol) == before


def test_growing_files_are_contiguous(vol: Volume, file: Inode) -> None:
    for i in range(50):
        write(vol, NOW, file, i * 1000, DATA[i * 1000 : i * 1000 + 1000])
    assert shape(file) == [(0, 13, False)]
    assert read(vol, file, 0, 50000) == DATA[:50000]


def test_overwrites_stay_in_place(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[: 4 * B])
    where = [file.block(i) for i in range(4)]
    write(vol, NOW + 5, file, 100, DATA[50 : 50 + 3 * B])
    assert [file.block(i) for i in range(4)] == where
    assert (file.mtime, file.ctime) == (NOW + 5, NOW + 5)


def test_a_hole_that_is_written_in_part_shows_nothing_else(vol: Volume, file: Inode) -> None:
    truncate(vol, NOW, file, 9 * B)
    write(vol, NOW, file, 3 * B + 100, b"x" * (B + 50))
    assert read(vol, file, 0, 9 * B) == (bytes(3 * B + 100) + b"x" * (B + 50)).ljust(9 * B, b"\0")
    assert shape(file) == [(3, 2, False)]


def test_unwritten_blocks_that_are_written_in_part_show_nothing_else(vol: Volume, file: Inode) -> None:
    fallocate(vol, NOW, file, 0, 0, 9 * B)
    assert read(vol, file, 0, 9 * B) == bytes(9 * B)
    write(vol, NOW, file, 3 * B + 100, b"x" * (B + 50))
    assert read(vol, file, 0, 9 * B) == (bytes(3 * B + 100) + b"x" * (B + 50)).ljust(9 * B, b"\0")
    assert shape(file) == [(0, 3, True), (3, 2, False), (5, 4, True)]


GROW = {
    "truncate": lambda vol, inode: truncate(vol, NOW, inode, 3 * B),
    "write in the same block": lambda vol, inode: write(vol, NOW, inode, B - 1, b"\0"),
    "write behind": lambda vol, inode: write(vol, NOW, inode, 3 * B - 1, b"\0"),
    "fallocate": lambda vol, inode: fallocate(vol, NOW, inode, 0, 0, 3 * B),
    "zero range": lambda vol, inode: fallocate(vol, NOW, inode, ZERO, 2 * B, B),
}


@pytest.mark.parametrize("how", GROW)
def test_what_lies_behind_the_end_never_shows(vol: Volume, file: Inode, how: str) -> None:
    """A holder (or a mapping) wrote behind the end of file in its last block: zeros when the file grows over it."""
    write(vol, NOW, file, 0, b"a" * 100)
    vol.pmem.store(file.block(0) * B + 100, b"\xdd" * (B - 100))
    GROW[how](vol, file)
    assert read(vol, file, 0, 4 * B) == b"a" * 100 + bytes(file.size - 100)


def test_truncate_zeroes_the_tail(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[: 3 * B])
    truncate(vol, NOW, file, B + 7)
    truncate(vol, NOW, file, 3 * B)
    assert read(vol, file, 0, 3 * B) == DATA[: B + 7].ljust(3 * B, b"\0")
    assert shape(file) == [(0, 2, False)]


def test_truncate_gives_back_what_lies_behind_the_end(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, b"x")
    free = vol.free
    fallocate(vol, NOW, file, KEEP, 0, 9 * B)
    assert (vol.free, file.size) == (free - 8, 1)
    truncate(vol, NOW, file, 1)
    assert vol.free == free


@pytest.mark.parametrize(("size", "left"), [(9 * B, 16), (3 * B - 5, 3), (3 * B - 6, 3), (0, 0), (3 * B - 4, 16)])
def test_truncate_of_a_file_that_is_longer_for_its_user(vol: Volume, file: Inode, size: int, left: int) -> None:
    """What is written but on its way counts: only a truncate beyond it keeps what was preallocated."""
    fallocate(vol, NOW, file, KEEP, 0, 16 * B)
    attributes.setattr(vol, NOW, file, Attributes(size=size, known_size=3 * B - 5))
    assert (file.size, sum(count for _, count, _ in shape(file))) == (size, left)


# -- the largest file --


def test_the_last_byte_of_the_largest_file(vol: Volume, file: Inode) -> None:
    assert write(vol, NOW, file, FILE_SIZE_MAX - 1, b"x") == 1
    assert file.size == FILE_SIZE_MAX
    assert read(vol, file, FILE_SIZE_MAX - 3, 10) == b"\0\0x"
    assert file.map.blocks == 1
    assert fileops.seek(vol, file, 0, os.SEEK_DATA) == FILE_SIZE_MAX - B
    truncate(vol, NOW, file, 1)
    assert file.map.blocks == 0
    truncate(vol, NOW, file, FILE_SIZE_MAX)
    assert read(vol, file, FILE_SIZE_MAX - 3, 10) == bytes(3)


def test_beyond_the_largest_file(vol: Volume, file: Inode) -> None:
    assert write(vol, NOW, file, FILE_SIZE_MAX - 3, b"abcdef") == 3
    before = state_of(file)
    for call in (
        lambda: write(vol, NOW, file, FILE_SIZE_MAX, b"x"),
        lambda: truncate(vol, NOW, file, FILE_SIZE_MAX + 1),
        lambda: fallocate(vol, NOW, file, 0, FILE_SIZE_MAX, 1),
        lambda: fallocate(vol, NOW, file, PUNCH, 0, FILE_SIZE_MAX + 1),
    ):
        with pytest.raises(TooBig):
            call()
    assert state_of(file) == before
    fallocate(vol, NOW, file, PUNCH, 0, FILE_SIZE_MAX)
    assert (file.map.blocks, file.size) == (0, FILE_SIZE_MAX)


def state_of(inode: Inode) -> tuple[object, ...]:
    return (inode.size, inode.mtime, inode.ctime, list(inode.map))


# -- fallocate --


def test_preallocation(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 2 * B, DATA[:B])
    fallocate(vol, NOW + 1, file, KEEP, 0, 6 * B)
    assert (file.size, file.mtime, file.ctime) == (3 * B, NOW, NOW + 1)
    assert shape(file) == [(0, 2, True), (2, 1, False), (3, 3, True)]
    fallocate(vol, NOW + 2, file, 0, 0, 5 * B + 1)
    assert (file.size, file.mtime, file.map.blocks) == (5 * B + 1, NOW + 2, 6)
    assert read(vol, file, 0, 9 * B) == (bytes(2 * B) + DATA[:B]).ljust(5 * B + 1, b"\0")


@pytest.mark.parametrize(("offset", "length", "left"), [
    (0, B, [(1, 7)]), (B, 2 * B, [(0, 1), (3, 5)]), (100, 50, [(0, 8)]), (100, B, [(0, 8)]),
    (B - 1, B + 2, [(0, 1), (2, 6)]),
    (0, 100 * B, []), (7 * B, 9 * B, [(0, 7)]), (9 * B, B, [(0, 8)]),
])  # fmt: skip
def test_punch(vol: Volume, file: Inode, offset: int, length: int, left: list[tuple[int, int]]) -> None:
    write(vol, NOW, file, 0, DATA[: 8 * B])
    free = vol.free
    fallocate(vol, NOW, file, PUNCH, offset, length)
    end = min(offset + length, 8 * B)
    want = DATA[: 8 * B] if offset >= 8 * B else DATA[:offset] + bytes(end - offset) + DATA[end : 8 * B]
    assert read(vol, file, 0, 9 * B) == want
    assert [(first, count) for first, count, _ in shape(file)] == left
    assert vol.free - free == 8 - sum(count for _, count in left)
    assert file.size == 8 * B


@pytest.mark.parametrize("keep", [0, KEEP])
@pytest.mark.parametrize(("offset", "length"), [(0, B), (100, 50), (B - 1, 3 * B), (6 * B + 1, 3 * B), (9 * B, B)])
def test_zero_range(vol: Volume, file: Inode, offset: int, length: int, keep: int) -> None:
    write(vol, NOW, file, 0, DATA[: 8 * B])
    where = [file.block(i) for i in range(8)]
    fallocate(vol, NOW, file, ZERO | keep, offset, length)
    want = bytearray(DATA[: 8 * B].ljust(max(8 * B, offset + length), b"\0"))
    want[offset : offset + length] = bytes(length)
    assert read(vol, file, 0, 20 * B) == bytes(want[: 8 * B] if keep else want)
    assert [file.block(i) for i in range(8)] == where
    assert file.map.gaps(offset // B, -(-(offset + length) // B) - offset // B) == []


BAD_MODES = {
    "no length": (0, 0, 0, BadArgument),
    "negative length": (0, 0, -1, BadArgument),
    "negative offset": (0, -1, 5, BadArgument),
    "punch without keep size": (FALLOC_PUNCH_HOLE, 0, B, NotSupported),
    "punch and zero": (PUNCH | ZERO, 0, B, NotSupported),
    "collapse": (8, 0, B, NotSupported),
    "insert": (32, 0, B, NotSupported),
    "unshare": (64, 0, B, NotSupported),
    "unknown": (1 << 20, 0, B, NotSupported),
}


@pytest.mark.parametrize("what", BAD_MODES)
def test_bad_fallocate(vol: Volume, file: Inode, what: str) -> None:
    mode, offset, length, error = BAD_MODES[what]
    write(vol, NOW, file, 0, DATA[:B])
    before = state(vol)
    with pytest.raises(error):
        fallocate(vol, NOW + 5, file, mode, offset, length)
    assert state(vol) == before


# -- seek --


def test_seek(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 2 * B, DATA[:B])
    fallocate(vol, NOW, file, 0, 5 * B, B)
    write(vol, NOW, file, 7 * B, DATA[:100])
    data = {0: 2 * B, 2 * B: 2 * B, 2 * B + 5: 2 * B + 5, 3 * B: 7 * B, 5 * B: 7 * B, 7 * B + 99: 7 * B + 99}
    hole = {0: 0, 1: 1, 2 * B: 3 * B, 3 * B + 7: 3 * B + 7, 5 * B: 5 * B, 7 * B: 7 * B + 100, 7 * B + 99: 7 * B + 100}
    assert {at: fileops.seek(vol, file, at, os.SEEK_DATA) for at in data} == data
    assert {at: fileops.seek(vol, file, at, os.SEEK_HOLE) for at in hole} == hole
    for at in (7 * B + 100, 1 << 40, -1):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(NoSuchAddress):
                fileops.seek(vol, file, at, whence)
    truncate(vol, NOW, file, 7 * B)
    with pytest.raises(NoSuchAddress):
        fileops.seek(vol, file, 3 * B, os.SEEK_DATA)
    with pytest.raises(BadArgument):
        fileops.seek(vol, file, 0, os.SEEK_SET)


# -- copy --


def test_copy_range(vol: Volume, file: Inode) -> None:
    source = make(vol, b"s", DATA[: 5 * B])
    fallocate(vol, NOW, source, PUNCH, B, B)
    want = read(vol, source, 0, 5 * B)
    assert copy_range(vol, NOW, source, 10, file, 100, 9 * B) == 5 * B - 10
    assert read(vol, file, 0, 9 * B) == bytes(100) + want[10:]
    assert copy_range(vol, NOW, source, 5 * B, file, 0, 10) == 0
    assert copy_range(vol, NOW, source, 1 << 40, file, 0, 10) == 0
    assert copy_range(vol, NOW, source, 0, file, 0, 0) == 0


def test_copy_within_a_file(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[: 3 * B])
    assert copy_range(vol, NOW, file, 0, file, 3 * B, 3 * B) == 3 * B
    assert read(vol, file, 0, 9 * B) == DATA[: 3 * B] * 2
    for offset, target in ((0, B), (B, 0), (0, 0), (0, 3 * B - 1)):
        with pytest.raises(BadArgument, match="overlap"):
            copy_range(vol, NOW, file, offset, file, target, 3 * B)
    assert copy_range(vol, NOW, file, 5 * B, file, 6 * B, 2 * B) == B  # they overlap only behind the end


def test_a_copy_of_many_pieces(vol: Volume, file: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileops, "_COPY_BYTES", 3000)
    source = make(vol, b"s", DATA[:20000])
    assert copy_range(vol, NOW, source, 0, file, 1, 20000) == 20000
    assert read(vol, file, 0, 30000) == b"\0" + DATA[:20000]


def test_a_copy_that_does_not_fit(vol: Volume, file: Inode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileops, "_COPY_BYTES", 2 * B)
    source = make(vol, b"s", DATA[: 8 * B])
    hog(vol, 3)
    assert copy_range(vol, NOW, source, 0, file, 0, 8 * B) == 3 * B
    assert read(vol, file, 0, 8 * B) == DATA[: 3 * B]
    with pytest.raises(NoSpace):
        copy_range(vol, NOW, source, 0, file, 3 * B, B)


# -- a full volume --


def test_a_write_that_does_not_fit_is_partial(vol: Volume, file: Inode) -> None:
    hog(vol, 3)
    assert write(vol, NOW, file, B + 100, DATA[: 9 * B]) == 3 * B - 100
    assert file.size == 4 * B
    assert read(vol, file, 0, 9 * B) == bytes(B + 100) + DATA[: 3 * B - 100]
    before = state(vol)
    for offset in (0, 4 * B, 1 << 30):
        with pytest.raises(NoSpace):
            write(vol, NOW + 5, file, offset, DATA[:10])
    assert state(vol) == before
    assert write(vol, NOW, file, 4 * B - 50, DATA[:100]) == 50  # the mapped part fits
    assert write(vol, NOW, file, B, DATA[: 3 * B]) == 3 * B  # in place
    vol.check()


def test_a_partial_write_over_extents_and_holes(vol: Volume, file: Inode) -> None:
    for i in (1, 3, 5):
        write(vol, NOW, file, i * B, DATA[:B])
    hog(vol, 2)
    assert write(vol, NOW, file, 0, b"x" * 8 * B) == 4 * B
    assert read(vol, file, 0, 9 * B) == b"x" * 4 * B + bytes(B) + DATA[:B]


def test_fallocate_is_all_or_nothing(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[: 3 * B])
    hog(vol, 3)
    before = state(vol)
    for mode in (0, KEEP, ZERO, ZERO | KEEP):
        with pytest.raises(NoSpace):
            fallocate(vol, NOW + 5, file, mode, B + 5, 6 * B)
    with pytest.raises(NoSpace):
        fallocate(vol, NOW + 5, file, 0, 0, FILE_SIZE_MAX)
    assert state(vol) == before
    fallocate(vol, NOW, file, 0, 0, 6 * B)
    assert vol.alloc.available == 0


def test_preallocated_blocks_can_be_written(vol: Volume) -> None:
    inode = hog(vol)
    assert write(vol, NOW, inode, B, DATA[: 5 * B]) == 5 * B
    assert write(vol, NOW, inode, 20 * B + 5, DATA[:10]) == 10
    assert read(vol, inode, 20 * B, B) == bytes(5) + DATA[:10]


def test_space_can_be_given_back_on_a_full_volume(vol: Volume) -> None:
    """S50: unlink, truncate and punch work at 100 %, also where an extent map has to grow for it."""
    victim = make(vol, b"victim", DATA[: 40 * B])
    other = make(vol, b"other", DATA[: 5 * B])
    hog(vol)
    for i in range(1, 40, 2):  # from one extent to twenty: out of the inode into a leaf
        fallocate(vol, NOW, victim, PUNCH, i * B, B)
        vol.check()
    assert len(victim.map) == 20
    truncate(vol, NOW, victim, B + 1)
    free = vol.free
    namespace.unlink(vol, NOW, vol.root, b"other")
    fileops.reap(vol, NOW, other)
    assert vol.free == free + 5
    namespace.unlink(vol, NOW, vol.root, b"hog")
    attributes.setattr(vol, NOW, victim, Attributes(mode=0o600, uid=5))
    vol.check()


def test_pinned_blocks_do_not_eat_the_reserve(vol: Volume) -> None:
    """I10: on a full volume everything that is punched is pinned, so nothing comes back; unlink works all the same."""
    victim = make(vol, b"victim", DATA[: 100 * B])
    victim.opens = 1
    holding.pin(vol, NOW, victim, 0, 100 * B, abi.FOLL_PIN, 1, Holder(1), writable=False)
    hog(vol)
    reserve = vol.free
    for i in range(1, 99, 2):
        fallocate(vol, NOW, victim, PUNCH, i * B, B)
    assert reserve - vol.free == len(victim.map.leaf_blocks())
    truncate(vol, NOW, victim, 0)
    assert (vol.free, vol.busy) == (reserve, 100)
    namespace.unlink(vol, NOW, vol.root, b"victim")
    with pytest.raises(NoSpace):
        write(vol, NOW, make(vol, b"new"), 0, b"x")
    holding.release_owner(vol, 1)
    vol.free_unpinned(NOW, 100)
    assert vol.alloc.available == 100


# -- times, privileges, kinds --


def test_times(vol: Volume, file: Inode) -> None:
    """(mtime, ctime) change with: data, attributes, nothing."""
    steps = [
        (lambda now: write(vol, now, file, 0, DATA[: 3 * B]), True),
        (lambda now: write(vol, now, file, 5, b"x"), True),
        (lambda now: truncate(vol, now, file, 3 * B), True),
        (lambda now: fallocate(vol, now, file, KEEP, 0, 5 * B), False),
        (lambda now: fallocate(vol, now, file, 0, 0, 5 * B), True),
        (lambda now: fallocate(vol, now, file, PUNCH, 9 * B, B), True),
        (lambda now: fallocate(vol, now, file, ZERO | KEEP, B, B), True),
        (lambda now: attributes.setattr(vol, now, file, Attributes(mode=0o600)), False),
    ]
    for i, (call, data) in enumerate(steps, 1):
        mtime, now = file.mtime, NOW + i
        call(now)
        assert (file.mtime, file.ctime) == (now if data else mtime, now)
    before = (file.mtime, file.ctime)
    read(vol, file, 0, 10)
    assert (file.mtime, file.ctime) == before


def test_relatime(vol: Volume, file: Inode) -> None:
    assert file.atime == NOW
    fileops.note_access(file, NOW + 1)
    assert file.atime == NOW + 1  # it was not newer than mtime
    fileops.note_access(file, NOW + 2)
    assert file.atime == NOW + 1
    write(vol, NOW + 3, file, 0, b"x")
    fileops.note_access(file, NOW + 4)
    assert file.atime == NOW + 4
    fileops.note_access(file, NOW + 4 + DAY - 1)
    assert file.atime == NOW + 4
    fileops.note_access(file, NOW + 4 + DAY)
    assert file.atime == NOW + 4 + DAY


@pytest.mark.parametrize(("mode", "left"), [(0o6777, 0o777), (0o4755, 0o755), (0o2755, 0o755), (0o2745, 0o2745)])
def test_a_write_without_privilege_drops_suid(vol: Volume, file: Inode, mode: int, left: int) -> None:
    for change in (
        lambda kill: write(vol, NOW, file, 0, b"x", kill_priv=kill),
        lambda kill: attributes.setattr(vol, NOW, file, Attributes(size=1, kill_priv=kill)),
    ):
        attributes.setattr(vol, NOW, file, Attributes(mode=mode))
        attributes.setxattr(vol, NOW, file, b"security.capability", b"c")
        change(False)
        assert stat.S_IMODE(file.mode) == mode
        assert attributes.listxattr(vol, file) == []  # capabilities go with any change
        change(True)
        assert stat.S_IMODE(file.mode) == left


def test_only_files_have_data(vol: Volume, file: Inode) -> None:
    link = namespace.symlink(vol, NOW, vol.root, b"l", b"target", ROOT)
    fifo = namespace.create(vol, NOW, vol.root, b"p", stat.S_IFIFO | 0o600, ROOT)
    before = state(vol)
    for inode, error in ((vol.root, IsDirectory), (link, BadArgument), (fifo, BadArgument)):
        for call in (
            lambda i: read(vol, i, 0, 1),
            lambda i: write(vol, NOW, i, 0, b"x"),
            lambda i: truncate(vol, NOW, i, 0),
            lambda i: fallocate(vol, NOW, i, 0, 0, 1),
            lambda i: fileops.seek(vol, i, 0, os.SEEK_DATA),
            lambda i: copy_range(vol, NOW, i, 0, file, 0, 1),
            lambda i: copy_range(vol, NOW, file, 0, i, 0, 1),
        ):
            with pytest.raises(error):
                call(inode)
    assert state(vol) == before


def test_a_volume_that_is_read_only(tmp_path: Path) -> None:
    with fresh_volume(tmp_path) as vol:
        make(vol, b"f", DATA[: 3 * B])
    vol = Volume.open(tmp_path / "image", readonly=True, now=NOW)
    inode = namespace.lookup(vol, vol.root, b"f")
    assert inode is not None
    assert read(vol, inode, 0, 3 * B) == DATA[: 3 * B]
    refused(vol, inode)
    vol.close(NOW)


def test_a_volume_that_failed(vol: Volume) -> None:
    inode = make(vol, b"f", DATA[: 3 * B])
    vol.fail("because")
    assert read(vol, inode, 0, 3 * B) == DATA[: 3 * B]
    refused(vol, inode)
    vol.failed = ""


def refused(vol: Volume, inode: Inode) -> None:
    before = state(vol)
    calls = [
        lambda: write(vol, NOW + 5, inode, 0, b"x"),
        lambda: write(vol, NOW + 5, inode, 9 * B, b"x"),
        lambda: truncate(vol, NOW + 5, inode, 0),
        lambda: fallocate(vol, NOW + 5, inode, 0, 0, 9 * B),
        lambda: copy_range(vol, NOW + 5, inode, 0, inode, B, B),
        lambda: namespace.unlink(vol, NOW + 5, vol.root, b"f"),
        lambda: namespace.create(vol, NOW + 5, vol.root, b"g", 0o644, ROOT),
        lambda: attributes.setattr(vol, NOW + 5, inode, Attributes(mode=0)),
        lambda: attributes.setxattr(vol, NOW + 5, inode, b"user.a", b"x"),
    ]
    for call in calls:
        with pytest.raises(ReadOnly):
            call()
    assert state(vol) == before


def test_reap(vol: Volume, file: Inode) -> None:
    write(vol, NOW, file, 0, DATA[: 3 * B])
    free = vol.free
    namespace.unlink(vol, NOW, vol.root, b"f")
    for holds in ("opens", "nlookup"):
        setattr(file, holds, 1)
        fileops.reap(vol, NOW, file)
        assert vol.inode(file.ino) is file
        setattr(file, holds, 0)
    assert read(vol, file, 0, 5) == DATA[:5]
    fileops.reap(vol, NOW, file)
    assert (file.dead, vol.free) == (True, free + 3)
    with pytest.raises(FsError) as gone:
        vol.inode(file.ino)
    assert gone.value.errno == 116
    fileops.reap(vol, NOW, file)
    again = make(vol, b"g")
    assert (again.ino, again.generation) == (file.ino, 2)


# -- everything at once --

verbs = st.lists(
    st.tuples(
        st.sampled_from(["write", "truncate", "punch", "zero", "alloc"]),
        st.one_of(st.integers(0, 9 * B), st.integers(0, 9).map(lambda n: n * B)),
        st.one_of(st.integers(1, 5 * B), st.integers(1, 5).map(lambda n: n * B)),
    ),
    max_size=25,
)


@given(steps=verbs)
def test_one_file_against_a_bytearray(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    with fresh_volume(tmp_path_factory.mktemp("volume"), 1 << 20) as vol:
        soil(vol)
        inode, want = make(vol, b"f"), bytearray()
        for i, (verb, offset, length) in enumerate(steps):
            end = offset + length
            if verb == "write":
                data = DATA[i : i + length]
                assert write(vol, NOW, inode, offset, data) == length
                want.extend(bytes(max(0, end - len(want))))
                want[offset:end] = data
            elif verb == "truncate":
                truncate(vol, NOW, inode, offset)
                want = want[:offset].ljust(offset, b"\0")
            elif verb == "alloc":
                fallocate(vol, NOW, inode, 0, offset, length)
                want.extend(bytes(max(0, end - len(want))))
            else:
                fallocate(vol, NOW, inode, PUNCH if verb == "punch" else ZERO | KEEP, offset, length)
                cut = min(end, len(want))
                want[offset:cut] = bytes(max(0, cut - offset))
            assert read(vol, inode, 0, 20 * B) == bytes(want)
            inode.map.check()
        vol.check()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_smallest_journal_has_room_for_a_punch_with_two_ragged_edges(tmp_path: Path, block_size: int) -> None:
    with fresh_volume(tmp_path, 1 << 20, block_size) as vol:
        inode = namespace.create(vol, NOW, vol.root, b"file", 0o644, Caller(0, 0))
        write(vol, NOW, inode, 0, b"x" * 3 * block_size)
        fallocate(vol, NOW, inode, PUNCH, 1, 3 * block_size - 2)
        assert read(vol, inode, 0, 4 * block_size) == b"x" + bytes(3 * block_size - 2) + b"x"


def test_free_blocks_hold_garbage(vol: Volume) -> None:
    """So that the tests above can see what they look for."""
    start, _ = vol.alloc.free.runs()[0]
    assert vol.pmem.load(start * B, 4) == b"\xee" * 4
