"""Volumes from mkfs to unmount: sizes, snapshot and scan, orphans, and images that are none or are broken."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daxfs.core import fileops, fsck, layout, namespace, scan
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.layout import BLOCK_SIZES, CHUNK_INODES, INODE, INODE_SIZE, LEAF
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume
from daxfs.errors import BadHandle, Corrupt, FsError, ImageError, NoSpace, ReadOnly

from .image import NOW
from .power import state

B = 4096
ROOT = Caller(0, 0)
DATA = bytes(range(1, 252)) * 300


def create(vol: Volume, name: bytes, data: bytes = b"") -> Inode:
    inode = namespace.create(vol, NOW, vol.root, name, 0o644, ROOT)
    fileops.write(vol, NOW, inode, 0, data)
    return inode


def populate(vol: Volume) -> None:
    """Of everything something: leaves, long links, xattr blocks, directories, a hole in the inode table."""
    from daxfs.core import attributes

    size = vol.block_size
    directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
    for i in range(3):
        fileops.write(vol, NOW, namespace.create(vol, NOW, directory, b"%d" % i, 0o644, ROOT), i, DATA[: i * 5000])
    inode = create(vol, b"scattered")
    for i in range(8):
        fileops.write(vol, NOW, inode, 2 * i * size, DATA[:size])
    attributes.setxattr(vol, NOW, inode, b"user.big", DATA[:5000])
    namespace.symlink(vol, NOW, vol.root, b"link", DATA[:200], ROOT)
    namespace.unlink(vol, NOW, directory, b"1")
    fileops.reap(vol, NOW, vol.inode(4))


def crash(vol: Volume) -> None:
    vol.pmem.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def image(path: Path) -> Path:
    """A clean image with something on it."""
    format_image(path, 4 << 20, now=NOW)
    vol = Volume.open(path, now=NOW)
    populate(vol)
    vol.close(NOW)
    return path


# -- mkfs --


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 12345, 8 << 20, 1 << 36])
def test_every_size_and_block_size(path: Path, size: int, block_size: int) -> None:
    format_image(path, size, block_size=block_size, now=NOW, uid=5, gid=6, mode=0o700, label="größe", uuid=b"u" * 16)
    assert path.stat().st_size == size // block_size * block_size
    assert path.stat().st_blocks * 512 < 8 << 20  # sparse
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    vol = Volume.open(path, now=NOW)
    assert (vol.blocks, vol.block_size, vol.uuid) == (size // block_size, block_size, b"u" * 16)
    assert vol.sb["label"].rstrip(b"\0").decode() == "größe"
    assert (vol.root.uid, vol.root.gid, vol.root.mode, vol.root.nlink) == (5, 6, stat.S_IFDIR | 0o700, 2)
    assert (vol.busy, vol.pinned, vol.free + vol.used) == (0, 0, vol.blocks)
    assert vol.alloc.available > 4
    create(vol, b"f", DATA[:1000])
    before = state(vol)
    if size <= 8 << 20:
        vol.check()
        report = fsck.check(vol.pmem)
        assert report.errors == 0, [str(f) for f in report.findings]
    vol.close(NOW)
    vol = Volume.open(path, now=NOW)
    assert state(vol) == before
    vol.close(NOW)


def test_a_tiny_volume_can_be_used_up_and_cleared(path: Path) -> None:
    format_image(path, 1 << 20, block_size=65536, now=NOW)
    vol = Volume.open(path, now=NOW)
    inode = create(vol, b"f", b"x" * 10 * 65536)
    assert vol.alloc.available == 0
    assert inode.size > 2 * 65536
    namespace.unlink(vol, NOW, vol.root, b"f")
    fileops.reap(vol, NOW, inode)
    vol.check()
    vol.close(NOW)


BAD_FORMATS = {
    "block size": ({"block_size": 1000}, "a block size of 1000 is not one of 4096, 8192"),
    "too small": ({"size": (1 << 20) - 1}, "too small for a volume"),
    "negative": ({"size": -5}, "too small for a volume"),
    "too large": ({"size": 1 << 62}, "cannot make the image"),
    "larger than any file": ({"size": 1 << 70}, "cannot make the image"),
    "label": ({"label": "ö" * 33}, "more than 64 bytes"),
}


@pytest.mark.parametrize("what", BAD_FORMATS)
def test_bad_arguments_of_mkfs_change_nothing(path: Path, what: str) -> None:
    arguments, says = BAD_FORMATS[what]
    path.write_bytes(b"precious" * 1000)
    with pytest.raises(ImageError, match=says) as refused:
        format_image(path, **{"size": 1 << 20, "now": NOW, **arguments})  # type: ignore[arg-type]
    assert "\n" not in refused.value.why
    assert path.read_bytes() == b"precious" * 1000


def test_places_where_no_image_can_be_made(tmp_path: Path, image: Path) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    places = {"dir": "is a directory", "fifo": "not a regular file", "no/image": "cannot make the image"}
    for place, says in places.items():
        with pytest.raises(ImageError, match=says) as refused:
            format_image(f"{tmp_path}/{place}", 1 << 20, now=NOW)
        assert "\n" not in refused.value.why
    vol = Volume.open(image, now=NOW)
    before = image.read_bytes()
    with pytest.raises(ImageError, match="is in use"):
        format_image(image, 1 << 20, now=NOW)
    assert image.read_bytes() == before
    vol.close(NOW)


# -- open and close --


def test_mounts_are_counted(image: Path) -> None:
    counts = []
    for clean in (True, False, False, True, True):
        vol = Volume.open(image, now=NOW)
        counts.append((vol.sb["mounts"], vol.sb["dirty_shutdowns"]))
        vol.close(NOW) if clean else crash(vol)
    assert counts == [(2, 0), (3, 0), (4, 1), (5, 2), (6, 2)]


def test_one_at_a_time(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    for readonly in (False, True):
        with pytest.raises(ImageError, match=r"is in use: .*unmount it first"):
            Volume.open(image, readonly=readonly, now=NOW)
    vol.close(NOW)
    readers = [Volume.open(image, readonly=True, now=NOW) for _ in range(2)]
    with pytest.raises(ImageError, match="is in use"):
        Volume.open(image, now=NOW)
    for vol in readers:
        vol.close(NOW)
    Volume.open(image, now=NOW).close(NOW)


def test_a_reader_of_the_mapping_does_not_keep_the_lock(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    view = vol.pmem.view[:10]
    vol.close(NOW)
    Volume.open(image, now=NOW).close(NOW)
    assert len(view) == 10


def test_a_read_only_mount_writes_nothing(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    inode = create(vol, b"orphan", DATA[:5000])
    inode.opens = 1
    namespace.unlink(vol, NOW, vol.root, b"orphan")
    crash(vol)
    before = image.read_bytes()
    vol = Volume.open(image, readonly=True, now=NOW)
    state(vol)
    fileops.note_access(vol.root, NOW + 10**15)
    with pytest.raises(ReadOnly):
        namespace.mkdir(vol, NOW, vol.root, b"x", 0o755, ROOT)
    vol.close(NOW)
    assert image.read_bytes() == before


def test_hostsync(image: Path) -> None:
    vol = Volume.open(image, hostsync=True, now=NOW)
    create(vol, b"f", DATA)
    vol.pmem.sync()
    before = state(vol)
    vol.close(NOW)
    vol = Volume.open(image, now=NOW)
    assert state(vol) == before
    vol.close(NOW)


def test_a_failed_volume_stays_armed(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    vol.fail("first")
    vol.fail("second")
    assert vol.failed == "first"
    vol.close(NOW)
    vol = Volume.open(image, now=NOW)
    assert vol.sb["dirty_shutdowns"] == 1
    vol.check()
    vol.close(NOW)


# -- snapshot and scan --


def books(vol: Volume) -> tuple[list[tuple[int, int]], list[int]]:
    return vol.alloc.free.runs(), sorted(vol.free_inodes)


@pytest.fixture
def no_scan() -> Iterator[None]:
    with mock.patch.object(scan, "survey", side_effect=AssertionError("scanned")):
        yield


def test_the_snapshot_says_what_the_scan_finds(image: Path, no_scan: None) -> None:
    vol = Volume.open(image, now=NOW)
    quick = books(vol)
    crash(vol)
    mock.patch.stopall()
    with mock.patch.object(scan, "survey", wraps=scan_survey) as scanned:
        vol = Volume.open(image, now=NOW)
        assert scanned.called
        assert books(vol) == quick
        vol.check()
        vol.close(NOW)


scan_survey = scan.survey  # before a test hides it


def test_the_numbers_of_free_inodes_keep_their_order(image: Path) -> None:
    """The next file gets the same number, whether the mount scanned or not."""
    vol = Volume.open(image, now=NOW)
    first = vol.free_inodes[-1]
    crash(vol)
    vol = Volume.open(image, now=NOW)
    assert vol.free_inodes[-1] == first
    vol.close(NOW)


@given(at=st.integers(0, 300), byte=st.integers(1, 255))
def test_a_damaged_snapshot_is_not_believed(image: Path, at: int, byte: int) -> None:
    vol = Volume.open(image, readonly=True, now=NOW)
    want, start = books(vol), vol.sb["snapshot_start"]
    length = layout.SNAPSHOT.size + 16 * len(want[0]) + 8 * len(want[1])
    vol.close(NOW)
    place = start * B + at % length
    with image.open("r+b") as f:
        old = os.pread(f.fileno(), 1, place)
        os.pwrite(f.fileno(), bytes([old[0] ^ byte]), place)
        with mock.patch.object(scan, "survey", wraps=scan.survey) as scanned:
            vol = Volume.open(image, readonly=True, now=NOW)
        assert books(vol) == want
        assert scanned.called
        vol.close(NOW)
        os.pwrite(f.fileno(), old, place)


def test_no_snapshot_while_blocks_are_busy(image: Path) -> None:
    from daxfs import abi
    from daxfs.core import holding
    from daxfs.core.pins import Holder

    vol = Volume.open(image, now=NOW, boot_id=b"b" * 16)
    inode = create(vol, b"f", DATA[:B])
    inode.opens = 1
    holding.pin(vol, NOW, inode, 0, B, abi.FOLL_PIN, 1, Holder(1), writable=True)
    fileops.truncate(vol, NOW, inode, 0)
    vol.close(NOW)
    vol = Volume.open(image, now=NOW, boot_id=b"c" * 16)
    assert vol.busy == 0
    vol.check()
    vol.close(NOW)


# -- orphans and inodes --


def test_orphans_end_at_the_next_mount(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    free, numbers = vol.free, sorted(vol.free_inodes)
    inode = create(vol, b"f", DATA[: 9 * B])
    directory = namespace.mkdir(vol, NOW, vol.root, b"gone", 0o755, ROOT)
    for name, remove in ((b"f", namespace.unlink), (b"gone", namespace.rmdir)):
        remove(vol, NOW, vol.root, name)
    namespace.tmpfile(vol, NOW, vol.root, 0o600, ROOT)
    assert inode.nlink == directory.nlink == 0
    assert vol.free == free - 9
    crash(vol)
    vol = Volume.open(image, now=NOW)
    assert (vol.free, sorted(vol.free_inodes)) == (free, numbers)
    vol.check()
    vol.close(NOW)


def test_a_clean_unmount_ends_orphans(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    free = vol.free
    create(vol, b"f", DATA[: 9 * B]).opens = 1
    namespace.unlink(vol, NOW, vol.root, b"f")
    vol.close(NOW)
    vol = Volume.open(image, now=NOW)
    assert vol.free == free
    assert fsck.check(vol.pmem).errors == 0
    vol.close(NOW)


def test_an_end_that_fails_can_be_tried_again(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    inode = create(vol, b"f", DATA[: 9 * B])
    namespace.unlink(vol, NOW, vol.root, b"f")
    with mock.patch.object(vol.journal, "commit", side_effect=NoSpace), pytest.raises(NoSpace):
        fileops.reap(vol, NOW, inode)
    assert not inode.dead
    assert fileops.read(vol, inode, 0, 5) == DATA[:5]
    vol.check()
    fileops.reap(vol, NOW, inode)
    assert inode.dead
    vol.check()
    vol.close(NOW)


def test_inodes_are_added_by_the_chunk(path: Path) -> None:
    format_image(path, 1 << 20, now=NOW)
    vol = Volume.open(path, now=NOW)
    room, made = vol.inodes_free, 0
    assert room > CHUNK_INODES
    assert vol.inodes == room + 1
    try:
        for made in range(100000):
            namespace.create(vol, NOW, vol.root, b"%d" % made, 0o600, ROOT)
    except NoSpace:
        pass
    assert made > room // 2
    assert len(vol.chunks) == vol.ino_end // CHUNK_INODES > 3
    vol.check()
    before = state(vol)
    crash(vol)
    vol = Volume.open(path, now=NOW)
    assert state(vol) == before
    assert not vol.free_inodes or vol.alloc.available < 8
    vol.close(NOW)


def test_inode_numbers_that_are_none(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    for ino in (0, -1, 4, CHUNK_INODES, 1 << 40):
        with pytest.raises(BadHandle):
            vol.inode(ino)
    vol.close(NOW)


def test_generations_wrap(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    inode = create(vol, b"f")
    with vol.transaction(NOW) as txn:
        inode.generation = 0xFFFF_FFFF
        txn.dirty(inode)
    namespace.unlink(vol, NOW, vol.root, b"f")
    fileops.reap(vol, NOW, inode)
    assert create(vol, b"g").generation == 1
    vol.close(NOW)


# -- what check() sees --


def lose_a_block(vol: Volume) -> None:
    vol.alloc.take(1)


def free_an_owned_block(vol: Volume) -> None:
    vol.alloc.free.add(vol.sb["data_start"], 1)


def busy_and_free(vol: Volume) -> None:
    start, _ = vol.alloc.free.runs()[0]
    vol.busy_list.extents.add(start, 1)


def pinned_and_free(vol: Volume) -> None:
    start, _ = vol.alloc.free.runs()[0]
    vol.pins.counts.add([(start, 1)])


def forget_a_number(vol: Volume) -> None:
    vol.free_inodes.pop()


def two_owners(vol: Volume) -> None:
    one, two = create(vol, b"1", DATA[:B]), create(vol, b"2", DATA[:B])
    with vol.transaction(NOW) as txn:
        txn.free(two.map.carve(0, 1))
        two.map.insert(0, one.block(0), 1)
        txn.dirty(two)


WRONG = {
    lose_a_block: "have no owner",
    free_an_owned_block: "outside the data|has another owner",
    busy_and_free: "has another owner",
    pinned_and_free: "pinned",
    forget_a_number: "list of free inodes",
    two_owners: "has two owners",
}


@pytest.mark.parametrize("harm", WRONG, ids=lambda harm: harm.__name__)
def test_check_sees(image: Path, harm: Callable[[Volume], None]) -> None:
    vol = Volume.open(image, now=NOW)
    vol.check()
    harm(vol)
    with pytest.raises((ValueError, Corrupt), match=WRONG[harm]):
        vol.check()
    crash(vol)


# -- images that are none --


def refusal(path: Path, **how: bool) -> str:
    """Why an image is not opened; it is as it was, and nobody holds its lock."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ImageError) as refused:
        Volume.open(path, now=NOW, **how)  # type: ignore[arg-type]
    why = refused.value.why
    assert "\n" not in why
    assert str(path) in why
    assert (path.read_bytes() if path.is_file() else None) == before
    return why


NO_IMAGES = {
    "empty": (b"", "is empty, too small"),
    "small": (b"x" * 4095, "too small"),
    "zeros": (bytes(1 << 20), r"is empty \(zeros\)"),
    "text": (b"hello\n" * 10000, "is not a daxfs image"),
    "ext4": (bytes(1080) + b"\x53\xef" + bytes(1 << 20), "is empty|is not a daxfs image"),
    "only the magic": (layout.SB_MAGIC.to_bytes(4, "little") + bytes(8192), "superblocks are damaged"),
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_files_that_are_no_image(path: Path, what: str) -> None:
    content, says = NO_IMAGES[what]
    path.write_bytes(content)
    for readonly in (False, True):
        assert any(s in refusal(path, readonly=readonly) for s in says.replace("\\", "").split("|"))


def test_things_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "no image" in refusal(tmp_path / "nothing")
    assert "mkfs" in refusal(tmp_path / "nothing")
    assert "is a directory" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "fifo")
    assert "not a regular file" in refusal(Path("/dev/null"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match="cannot open"):
        Volume.open(tmp_path / "file" / "below", now=NOW)


def test_a_truncated_image(image: Path) -> None:
    os.truncate(image, (4 << 20) - B)
    assert "is truncated" in refusal(image)
    os.truncate(image, 8 << 20)  # longer than it says is fine
    Volume.open(image, now=NOW).close(NOW)


# -- images that are broken --


class Broken:
    """An image to break: records are read, changed, sealed again and put back."""

    def __init__(self, image: Path) -> None:
        self.vol = Volume.open(image, now=NOW)
        self.vol.sb["state"] = layout.STATE_MOUNTED

    def inode(self, name: bytes, **changes: int | bytes) -> None:
        found = namespace.lookup(self.vol, self.vol.root, name) if name else self.vol.root
        assert found is not None
        values = INODE.unpack(self.vol.pmem.view, found.at) | changes
        self.vol.pmem.store(found.at, layout.seal(INODE.pack(**values), end=layout.INODE_CRC_END))

    def extent(self, name: bytes, **changes: int) -> None:
        found = namespace.lookup(self.vol, self.vol.root, name)
        assert found is not None
        body = bytearray(INODE.unpack(self.vol.pmem.view, found.at)["body"])
        values = layout.EXTENT.unpack(body) | changes
        body[:24] = layout.EXTENT.pack(**values)
        self.inode(name, body=bytes(body))

    def leaf(self, **changes: int) -> None:
        found = namespace.lookup(self.vol, self.vol.root, b"scattered")
        assert found is not None
        at = found.map.leaf_blocks()[0] * B
        head = LEAF.unpack(self.vol.pmem.view, at)
        end = at + LEAF.size + 24 * int(changes.get("count", head["count"]))
        extents = self.vol.pmem.load(at + LEAF.size, end - at - LEAF.size)
        self.vol.pmem.store(at, layout.seal(LEAF.pack(**(head | changes)) + extents))

    def word(self, index: int, value: int) -> None:
        self.vol.pmem.store_word(self.vol.sb["idir_start"] * B + 8 * index, value)


BREAK: dict[str, tuple[Callable[[Broken], None], str]] = {
    "an inode's bytes": (lambda b: b.vol.pmem.store(b.vol.root.at + 20, b"\xff"), "inode 1: bad checksum"),
    "an inode of another number": (lambda b: b.inode(b"link", ino=3), "is not an inode, or another's"),
    "an inode of another magic": (lambda b: b.inode(b"link", magic=1), "is not an inode, or another's"),
    "a root that is a file": (lambda b: b.inode(b"", mode=stat.S_IFREG), "root inode is not a directory"),
    "a root that is free": (lambda b: b.inode(b"", mode=0), "inode 1 is free"),
    "a root that is unlinked": (lambda b: b.inode(b"", nlink=0), "root inode is not a directory"),
    "an extent in the superblock": (lambda b: b.extent(b"link", physical=0), "has two owners"),
    "an extent outside": (lambda b: b.extent(b"link", physical=b.vol.blocks), "outside the image"),
    "an extent round the end of numbers": (lambda b: b.extent(b"link", physical=(1 << 64) - 1), "outside|two owners"),
    "another's block": (lambda b: b.extent(b"link", physical=b.vol.root.block(0)), "has two owners"),
    "too many inline extents": (lambda b: b.inode(b"link", extents=7), "more inline extents than fit"),
    "a leaf outside": (lambda b: b.inode(b"scattered", leaf=b.vol.blocks), "chain of extent leaves is broken"),
    "a leaf in the journal": (lambda b: b.inode(b"scattered", leaf=3), "chain of extent leaves is broken"),
    "a leaf that is none": (lambda b: b.inode(b"scattered", leaf=b.vol.blocks - 1), "extent leaf at block"),
    "leaves in a circle": (lambda b: b.leaf(next=b.vol.inode(6).map.leaf_blocks()[0]), "broken"),
    "another's leaf": (lambda b: b.leaf(ino=1), "belongs to inode 1"),
    "a leaf of the past": (lambda b: b.leaf(generation=9), "belongs to inode"),
    "an empty leaf": (lambda b: b.leaf(count=0), "is empty"),
    "a leaf of too many": (lambda b: b.leaf(count=169), "do not fit"),
    "xattrs outside": (lambda b: b.inode(b"scattered", xattr_block=b.vol.blocks), "xattr block"),
    "xattrs that are none": (lambda b: b.inode(b"scattered", xattr_block=b.vol.blocks - 1), "xattr block"),
    "no inode directory": (lambda b: b.word(0, 0), "it is empty"),
    "a damaged inode directory": (lambda b: b.word(0, 123), "entry 0 is damaged"),
    "a chunk outside": (lambda b: b.word(1, layout.idir_word(1, b.vol.blocks - 1)), "lies outside the image"),
    "a chunk in the journal": (lambda b: b.word(1, layout.idir_word(1, 4)), "lies outside the image"),
    "a gap in the inode directory": (lambda b: b.word(5, layout.idir_word(5, 500)), "an entry is missing"),
    "a chunk twice": (lambda b: b.word(1, layout.idir_word(1, b.vol.chunks[0])), "two chunks overlap"),
    "a journal header": (lambda b: b.vol.pmem.store(2 * B, b"xx"), "journal header"),
    "a commit word": (lambda b: b.vol.pmem.store_word(2 * B + 64, 77), "commit word does not match"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAK)
def test_broken_images_are_refused(image: Path, what: str) -> None:
    harm, says = BREAK[what]
    broken = Broken(image)
    harm(broken)
    crash(broken.vol)
    why = refusal(image)
    assert any(s in why for s in says.split("|"))
    assert "is damaged" in why
    assert "see: daxfs fsck" in why
    assert refusal(image, readonly=True) == why


def test_an_orphan_that_is_broken_stays(image: Path) -> None:
    """One damaged file must not keep the volume from being mounted; its blocks stay taken, fsck tells."""
    broken = Broken(image)
    broken.extent(b"link", logical=1 << 60)
    broken.inode(b"link", nlink=0, mode=stat.S_IFREG, target_length=0)
    crash(broken.vol)
    vol = Volume.open(image, now=NOW)
    with pytest.raises(Corrupt):
        vol.inode(7).map  # noqa: B018
    assert create(vol, b"f", DATA).size == len(DATA)
    vol.close(NOW)


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), clean=st.booleans())
def test_random_damage_never_surprises(image: Path, seed: int, clean: bool) -> None:
    """Flipped bits in metadata: the image is refused with one line, or everything that is read is right or an FsError."""
    pristine = image.read_bytes()
    try:
        damage(image, seed, clean=clean)
        try:
            vol = Volume.open(image, now=NOW)
        except ImageError as refused:
            why = refused.why
        else:
            why = ""
            live_with(vol)
        assert "\n" not in why
    finally:
        image.write_bytes(pristine)


def live_with(vol: Volume) -> None:
    for call in (lambda: state(vol), lambda: create(vol, b"new", DATA[:9000])):
        with contextlib.suppress(FsError):
            call()
    vol.close(NOW)


def damage(image: Path, seed: int, *, clean: bool) -> None:
    rng = random.Random(seed)
    with image.open("r+b") as f:
        used = np.flatnonzero(np.frombuffer(f.read(), np.uint8).reshape(-1, 64).any(axis=1))
        for _ in range(rng.randint(1, 4)):
            at = int(rng.choice(used)) * 64 + rng.randrange(64)
            byte = os.pread(f.fileno(), 1, at)[0]
            os.pwrite(f.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)
        if not clean:  # without its snapshot it is scanned
            for copy in (0, B):
                sb = layout.SUPERBLOCK.unpack(os.pread(f.fileno(), layout.SUPERBLOCK.size, copy))
                if 0 < sb["snapshot_start"] < 1024:
                    os.pwrite(f.fileno(), b"\0", sb["snapshot_start"] * B)


def test_records_lie_where_they_should(image: Path) -> None:
    vol = Volume.open(image, now=NOW)
    for ino in (1, 2, 3):
        assert vol.inode_at(ino) == vol.chunks[0] * B + ino * INODE_SIZE
    vol.close(NOW)
