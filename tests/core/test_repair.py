"""`fsck --repair`: what is broken is mended, what is not is left alone, and it does not matter when the repair dies."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daxfs.core import attributes, fileops, fsck, layout, namespace
from daxfs.core.format import format_image
from daxfs.core.fsck import Report, repair
from daxfs.core.layout import INODE_SIZE, SUPERBLOCK
from daxfs.core.volume import Volume
from daxfs.errors import ImageError

from .damage import Known, damage, know, says
from .image import NOW
from .power import DyingPmem, PowerLoss, State, state
from .test_fsck import BS, DAMAGE, WHO, Medium, commit, first_leaf, ledger_entry, populate, texts

LATER = NOW + 10**9
FUZZ_SEEDS = int(os.environ.get("DAXFS_FUZZ_SEEDS", "60"))  # thousands, for whoever has the time
FUZZ_FROM = int(os.environ.get("DAXFS_FUZZ_FROM", "0"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair") / "sound"
    format_image(path, 16 << 20, now=NOW)
    volume = Volume.open(path, now=NOW)
    populate(volume)
    volume.close(NOW)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return known(tmp_path_factory.mktemp("repair") / "small", 4096)


def known(path: Path, block_size: int) -> Known:
    """An image of 1,024 blocks, and what is in it."""
    format_image(path, block_size << 10, block_size=block_size, now=NOW)
    volume = Volume.open(path, now=NOW)
    populate(volume)
    volume.close(NOW)
    return know(path)


@pytest.fixture
def image(sound: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "image"
    shutil.copyfile(sound, copy)
    return copy


def hurt(path: Path, how: Callable[[Medium], object]) -> None:
    medium = Medium(path)
    how(medium)
    medium.pmem.close()


def seen(path: Path) -> State:
    """What a mount shows, on a volume that proves itself; the image is as it was afterwards."""
    volume = Volume.open(path, readonly=True, now=NOW)
    volume.check()
    found = state(volume)
    volume.close(NOW)
    return found


def repaired(path: Path) -> Report:
    """Repair; all errors are gone, the second repair finds nothing and stores nothing."""
    report = repair(path, now=LATER)
    assert report.left == 0, texts(report, fsck.LEFT)
    before = path.read_bytes()
    again = repair(path, now=LATER)
    assert (again.errors, again.fixed, again.exit_code) == (0, 0, 0), texts(again)
    assert path.read_bytes() == before
    return report


def mounts(path: Path) -> None:
    """The volume can be mounted and changed."""
    volume = Volume.open(path, now=NOW)
    volume.check()
    file = namespace.create(volume, NOW, volume.root, b"new file", 0o644, WHO)
    fileops.write(volume, NOW, file, 0, b"new data" * 1000)
    volume.check()
    volume.close(NOW)
    assert fsck.check(path).errors == 0


# -- every kind of damage ------------------------------------------------------------------------------------------------

# Damage -> what may be lost or changed by it; the names are those of `populate`. Nothing else may be.
COSTS = {
    "/file": ("leaf", "on a leaf", "xattr cycle"),
    "/small": ("ino", "inode magic", "inode bit", "mode", "size", "huge size", "time", "xattr", "extent", "on ",
               "two owners", "itself twice", "beyond the end", "target of a file", "entry to", "one name", "more than"),
    "/short": ("symlink",),
    "/long": ("symlink",),
    "/fifo": ("orphan", "ACL", "default", "xattr", "unlinked"),
}  # fmt: skip
MOVES = ("dir block", "cycle", "one name less")  # names that are in lost+found afterwards


@pytest.mark.parametrize("which", range(len(DAMAGE)), ids=[d[0] for d in DAMAGE])
def test_every_damage_is_repaired(image: Path, sound: Path, which: int) -> None:
    name, how, _ = DAMAGE[which]
    hurt(image, how)
    report = repaired(image)
    assert report.errors > 0
    assert report.fixed > 0
    assert report.exit_code == 1
    assert all("\n" not in str(finding) and len(str(finding)) < 400 for finding in report.findings)
    before, after = seen(sound), seen(image)
    contents = [value[-2] for value in after.values()]
    for path, was in before.items():
        text = path.decode()
        if text.startswith("/dir/link"):
            text = "/small"
        cost = any(name.startswith(kind) for kind in COSTS.get(text, ()))
        if not cost and not stat.S_ISDIR(was[2]):
            assert after.get(path, was)[2:5] + after.get(path, was)[-3:] == was[2:5] + was[-3:], path
            assert path in after or name.startswith(MOVES), path
            assert was[-2] in contents, path
    mounts(image)


def test_a_sound_image_is_not_written_to(image: Path) -> None:
    before = image.read_bytes()
    report = repair(image, now=LATER)
    assert (report.findings, report.exit_code) == ([], 0)
    assert image.read_bytes() == before


def test_a_volume_that_was_not_unmounted_stays_one(image: Path) -> None:
    """Nothing is wrong with it: the next mount frees what was unlinked, and counts the shutdown."""
    volume = Volume.open(image, now=NOW)
    namespace.unlink(volume, NOW, volume.root, b"fifo")
    volume.pmem.close()
    before = image.read_bytes()
    report = repair(image, now=LATER)
    assert (report.errors, report.fixed, report.exit_code) == (0, 0, 0)
    assert len(texts(report, fsck.NOTE)) == 2
    assert image.read_bytes() == before
    hurt(image, lambda m: m.set_inode("small", nlink=9))
    assert repaired(image).exit_code == 1
    volume = Volume.open(image, now=NOW)
    assert volume.sb["dirty_shutdowns"] == 1
    volume.check()
    volume.close(NOW)


def test_a_committed_transaction_is_applied_first(image: Path) -> None:
    medium = Medium(image)
    medium.unclean()
    at = medium.inode_at("small")
    right = medium.pmem.load(at, INODE_SIZE)
    medium.set_inode("small", nlink=7)
    commit(medium, [(at, right)])
    medium.pmem.close()
    report = repaired(image)
    assert (report.errors, report.exit_code) == (0, 0)
    assert texts(report, fsck.FIXED) == ["journal: a committed transaction was applied"]
    assert image.read_bytes()[at : at + INODE_SIZE] == right


def test_a_flipped_bit_costs_nothing(image: Path, sound: Path) -> None:
    """In every kind of record, at once."""
    before = seen(sound)

    def flip(m: Medium) -> None:
        places = [BS + 100, m.inode_at("small") + 50, m.inode_at("root") + 20, m.inode_at("dir") + 100]
        places += [first_leaf(m) * BS + 200, m.number("file", "xattr_block") * BS + 1000, m.sb["ledger"] * BS + 20]
        places += [m.dir_block("root") * BS + 20, m.dir_block("dir") * BS + 700, m.sb["idir_start"] * BS + 9]
        for at in places:
            m.pmem.store(at, bytes([m.pmem.load(at, 1)[0] ^ 16]))

    hurt(image, flip)
    assert repaired(image).exit_code == 1
    assert seen(image) == before


# -- the superblock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [0, 1])
def test_either_superblock_will_do(image: Path, copy: int) -> None:
    hurt(image, lambda m: m.pmem.store(copy * BS, b"\xee" * 512))
    assert repaired(image).exit_code == 1
    mounts(image)


def test_a_newest_superblock_that_makes_no_sense(image: Path) -> None:
    """Its checksum is right; the older one is used, and written over it."""
    hurt(image, lambda m: m.set_superblock(blocks=1 << 60))
    assert fsck.check(image).exit_code == 4
    assert repaired(image).exit_code == 1
    mounts(image)


def test_a_bit_of_both_superblocks(image: Path) -> None:
    def flip(m: Medium) -> None:
        for at in (90, BS + 300):
            m.pmem.store(at, bytes([m.pmem.load(at, 1)[0] ^ 1]))

    hurt(image, flip)
    assert fsck.check(image).exit_code == 4
    assert repaired(image).exit_code == 1
    mounts(image)


@pytest.mark.parametrize("change", [{"version": 2}, {"incompat": 4}, {"ro_compat": 1}])
def test_what_a_later_daxfs_has_made_is_refused(image: Path, change: dict[str, int]) -> None:
    """Also if the other copy could be read."""
    hurt(image, lambda m: m.set_superblock(**change))
    before = image.read_bytes()
    with pytest.raises(ImageError):
        repair(image, now=LATER)
    assert image.read_bytes() == before


def test_both_superblocks_are_lost(image: Path, sound: Path) -> None:
    """Where everything is follows from the size of the image; the journal and the inode directory confirm it."""
    before = seen(sound)
    hurt(image, lambda m: (m.pmem.store(0, bytes(600)), m.pmem.store(BS, bytes(600))))
    assert fsck.check(image).exit_code == 4
    assert repaired(image).exit_code == 1
    assert seen(image) == before
    mounts(image)


@pytest.mark.parametrize("also", [2 * BS, 19 * BS])
def test_without_a_superblock_and_more_nothing_is_touched(image: Path, also: int) -> None:
    """Nothing to go by."""
    hurt(image, lambda m: [m.pmem.store(at, bytes(600)) for at in (0, BS, also if also < 5 * BS else
                                                                   m.sb["idir_start"] * BS)])  # fmt: skip
    before = image.read_bytes()
    with pytest.raises(ImageError, match=r"restore|not a daxfs image"):
        repair(image, now=LATER)
    assert image.read_bytes() == before


def test_an_image_in_use_is_refused(image: Path) -> None:
    volume = Volume.open(image, now=NOW)
    with pytest.raises(ImageError, match="in use"):
        repair(image, now=LATER)
    volume.close(NOW)


# -- particular cures ----------------------------------------------------------------------------------------------------


def test_the_inode_directory_is_found_again(image: Path, sound: Path) -> None:
    """All of it is gone; the chunks know whose they are."""
    before = seen(sound)
    hurt(image, lambda m: m.pmem.fill_zero(m.sb["idir_start"] * BS, m.sb["idir_blocks"] * BS))
    report = repaired(image)
    assert sum("was found again" in text for text in texts(report, fsck.FIXED)) == 7
    assert seen(image) == before


def test_a_chunk_within_a_file_is_not_taken_for_one(image: Path, tmp_path: Path) -> None:
    """A file holds what looks like a chunk with more inodes than the real one."""
    volume = Volume.open(image, now=NOW)
    trap = namespace.create(volume, NOW, volume.root, b"trap", 0o644, WHO)
    fileops.write(volume, NOW, trap, 0, volume.pmem.load(volume.chunks[6] * BS, 4 * BS))
    volume.close(NOW)
    before = seen(image)
    hurt(image, lambda m: m.pmem.store_word(m.sb["idir_start"] * BS + 48, 12345))
    repaired(image)
    assert seen(image) == before


def test_a_lost_chunk_in_the_middle(image: Path, sound: Path) -> None:
    """Its inodes are gone for good, with their names; those of the chunks behind it are not."""
    before = seen(sound)

    def wipe(m: Medium) -> None:
        block = layout.idir_block(3, m.pmem.load_word(m.sb["idir_start"] * BS + 24))
        m.pmem.fill_zero(block * BS, 4 * BS)
        m.pmem.store_word(m.sb["idir_start"] * BS + 24, 77)

    hurt(image, wipe)
    repaired(image)
    gone = {path for path, was in before.items() if 96 <= was[0] < 128}
    assert len(gone) == 32
    assert {path: after for path, after in seen(image).items() if path != b"/dir"} == {
        path: was for path, was in before.items() if path not in gone and path != b"/dir"
    }
    mounts(image)


def test_files_that_share_a_block_get_one_each(image: Path) -> None:
    """The file that was changed last keeps it, the other gets a copy."""
    volume = Volume.open(image, now=NOW)
    for name, when in ((b"one", NOW), (b"two", NOW + 5)):
        file = namespace.create(volume, when, volume.root, name, 0o644, WHO)
        fileops.write(volume, when, file, 0, name * 3000)
    volume.close(NOW)
    medium = Medium(image)
    (_, block, count, _), = medium.extents("two")
    medium.set_extents("one", (0, block, count, 0))
    medium.pmem.close()
    report = repaired(image)
    assert any("has copies of them" in text for text in texts(report, fsck.FIXED))
    medium = Medium(image)
    assert medium.extents("two")[0][1] == block
    assert medium.extents("one")[0][1] != block
    medium.pmem.close()
    after = seen(image)
    assert after[b"/one"][-2] == after[b"/two"][-2] == b"two" * 3000


def test_no_room_for_copies(tmp_path: Path) -> None:
    """Holes instead; the file that keeps the blocks loses nothing."""
    path = tmp_path / "full"
    format_image(path, 1 << 20, now=NOW)
    volume = Volume.open(path, now=NOW)
    namespace.create(volume, NOW, volume.root, b"poor", 0o644, WHO)
    rich = namespace.create(volume, NOW, volume.root, b"rich", 0o644, WHO)
    fileops.write(volume, NOW + 5, rich, 0, b"gold" * (volume.alloc.available * BS // 4))
    volume.close(NOW)
    medium = Medium(path)
    has = medium.extents("rich")
    medium.set_extents("poor", *has)
    medium.set_inode("poor", blocks=sum(e[2] for e in has), size=medium.number("rich", "size"))
    medium.pmem.close()
    report = repaired(path)
    assert any("they are holes now" in text for text in texts(report, fsck.FIXED))
    after = seen(path)
    assert after[b"/rich"][-2] == b"gold" * (len(after[b"/rich"][-2]) // 4)
    assert after[b"/poor"][-2] == bytes(len(after[b"/rich"][-2]))


def test_names_of_a_damaged_block_that_can_be_read_stay(image: Path, sound: Path) -> None:
    before = seen(sound)
    hurt(image, lambda m: m.pmem.store(m.dir_block("dir") * BS + 1000, b"\xde\xad" * 50))
    report = repaired(image)
    after = seen(image)
    moved = [path for path in after if path.startswith(b"/lost+found/")]
    assert 1 <= len(moved) <= 5
    assert len(after) == len(before) + 1
    assert {after[path][0] for path in moved} == {before[path][0] for path in before.keys() - after.keys()}
    assert any("entries of it are kept" in text for text in texts(report, fsck.FIXED))
    assert after[b"/lost+found"][2] == stat.S_IFDIR | 0o700


def test_removed_names_do_not_come_back(image: Path) -> None:
    """Behind a damaged record, the bytes of entries that were removed still look like entries."""
    volume = Volume.open(image, now=NOW)
    place = namespace.mkdir(volume, NOW, volume.root, b"place", 0o755, WHO)
    for i in range(60):
        namespace.create(volume, NOW, place, b"ghost%d" % i, 0o644, WHO)
    keep = namespace.create(volume, NOW, place, b"kept", 0o644, WHO)
    for i in range(10, 60):
        namespace.rename(volume, NOW, place, b"ghost%d" % i, volume.root, b"moved%d" % i)
    ino = keep.ino
    volume.close(NOW)
    medium = Medium(image)
    block = medium.dir_block("place")
    medium.pmem.store(block * BS + 32 + 10 * 32, b"\xff" * 16)  # the free slot that all those became
    medium.pmem.close()
    repaired(image)
    after = seen(image)
    assert {path for path in after if path.startswith(b"/place/")} >= {b"/place/kept"}
    assert not {path for path in after if path.startswith(b"/place/ghost")} - {b"/place/ghost%d" % i for i in range(10)}
    assert after[b"/place/kept"][0] == ino
    assert sum(path.startswith(b"/moved") for path in after) == 50


def test_the_root_directory_is_made_anew(image: Path, sound: Path) -> None:
    before = seen(sound)
    hurt(image, lambda m: m.pmem.store(m.inode_at("root"), b"\xaa" * 512))
    repaired(image)
    after = seen(image)
    assert {value[0] for path, value in before.items() if path != b"/"} <= {value[0] for value in after.values()}
    assert b"/lost+found/#2/sub/deep" in after
    mounts(image)


def test_something_else_is_called_lost_and_found(image: Path) -> None:
    volume = Volume.open(image, now=NOW)
    namespace.create(volume, NOW, volume.root, b"lost+found", 0o644, WHO)
    volume.close(NOW)
    hurt(image, lambda m: m.set_entries("root", *(e for e in m.entries("root") if e[0] != b"fifo")))
    repaired(image)
    after = seen(image)
    assert stat.S_ISREG(after[b"/lost+found"][2])
    assert any(path.startswith(b"/lost+found.1/#") for path in after)


def test_pins_are_not_forgotten(image: Path) -> None:
    """A holder may still have its block mapped: no repair may hand it out, whatever else it does."""
    medium = Medium(image)
    pinned = medium.sb["blocks"] - 700
    ledger_entry(medium, pinned, 300)
    medium.set_superblock(boot_id=b"B" * 16, state=layout.STATE_MOUNTED, snapshot_start=0, snapshot_blocks=0)
    header = medium.pmem.load(medium.sb["ledger"] * BS, 8)
    medium.pmem.store(medium.sb["ledger"] * BS, bytes(b ^ 0xFF for b in header))
    medium.pmem.fill_zero(pinned * BS, 300 * BS)
    medium.set_entries("root", *(e for e in medium.entries("root") if e[0] != b"dir"))
    medium.set_extents("small", (0, medium.dir_block("dir"), 1, 0))
    medium.pmem.close()
    repaired(image)
    assert image.read_bytes()[pinned * BS : (pinned + 300) * BS] == bytes(300 * BS)
    volume = Volume.open(image, now=NOW, boot_id=b"B" * 16)
    assert volume.busy == 300
    volume.check()
    volume.close(NOW)


# -- random damage -------------------------------------------------------------------------------------------------------


def survive(before: Known, path: Path, seed: int) -> None:
    """Random damage; then a mount, and every file that it did not touch is intact."""
    dice = random.Random(seed)
    image = bytearray(before.image)
    done = damage(image, before, dice)
    path.write_bytes(image)
    untouched = before.untouched(bytes(image))
    try:
        report = repair(path, now=LATER)
        assert report.left == 0, texts(report, fsck.LEFT)
        intact(before, path, untouched)
    except Exception as e:
        raise AssertionError(f"seed {seed}: {'; '.join(done)}") from e


def intact(before: Known, path: Path, untouched: set[int]) -> None:
    assert fsck.check(path).errors == 0
    volume = Volume.open(path, now=NOW)
    try:
        volume.check()
        for ino in untouched:
            assert says(volume, ino) == before.files[ino], ino
        assert untouched <= named(volume)
    finally:
        volume.close(NOW)
    assert fsck.check(path).errors == 0


def named(volume: Volume) -> set[int]:
    """The inodes that names lead to. (Contents are not read: damage makes sparse files of any size.)"""
    found, waiting = {1}, [volume.root]
    while waiting:
        for _, ino, dtype, _ in namespace.entries(volume, waiting.pop(), 0):
            found.add(ino)
            if dtype == stat.S_IFDIR >> 12:
                waiting.append(volume.inode(ino))
    return found


def test_any_damage_can_be_repaired(small: Known, tmp_path: Path) -> None:
    """DAXFS_FUZZ_SEEDS and DAXFS_FUZZ_FROM choose others."""
    for seed in range(FUZZ_FROM, FUZZ_FROM + FUZZ_SEEDS):
        survive(small, tmp_path / "image", seed)


@pytest.mark.parametrize("block_size", [8192, 16384])
def test_any_damage_with_larger_blocks(tmp_path: Path, block_size: int) -> None:
    image = known(tmp_path / "known", block_size)
    for seed in range(FUZZ_FROM, FUZZ_FROM + FUZZ_SEEDS // 10):
        survive(image, tmp_path / "image", seed)


def test_progress(image: Path) -> None:
    """Each phase says what it does and how far it is."""
    hurt(image, lambda m: m.set_inode("small", flags=1))
    steps: list[tuple[str, int, int]] = []
    repair(image, now=LATER, progress=lambda *step: steps.append(step))
    assert {what for what, _, _ in steps} == {"inodes", "repairing inodes", "directories", "space"}
    assert all(0 <= done <= total for _, done, total in steps)


# -- a repair that dies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "torn"), [(3, False), (20, True), (24, False), (136, True)])
def test_a_repair_that_dies_can_be_run_again(small: Known, tmp_path: Path, seed: int, torn: bool) -> None:
    """It dies at its stores one after another (at some of them, if there are many), and once more in the second run."""
    image = bytearray(small.image)
    done = damage(image, small, random.Random(seed))
    untouched = small.untouched(bytes(image))
    path = tmp_path / "image"
    path.write_bytes(image)
    stores = dies(path, None)
    assert stores > 8
    for left in range(0, stores, max(1, stores // 12)):
        path.write_bytes(image)
        dies(path, left, torn)
        dies(path, left // 2, torn)
        assert repair(path, now=LATER).left == 0, (done, left)
        intact(small, path, untouched)


def dies(path: Path, left: int | None, torn: bool = False) -> int:
    """Repair until `left` stores are done; how many were done."""
    pmem = DyingPmem(path)
    pmem.left, pmem.torn = left, torn
    try:
        with contextlib.suppress(PowerLoss):
            repair(pmem, now=LATER)
        return pmem.stores
    finally:
        pmem.close()


def test_a_killed_process(small: Known, tmp_path: Path) -> None:
    """kill -9 at any moment of a repair."""
    dice = random.Random(11)
    image = bytearray(small.image)
    for _ in range(6):
        damage(image, small, dice)
    untouched = small.untouched(bytes(image))
    path = tmp_path / "image"
    code = "import sys; from daxfs.core.fsck import repair; print('.', flush=True); repair(sys.argv[1], now=1)"
    for _ in range(6):
        path.write_bytes(image)
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            time.sleep(dice.random() * 0.3)
            process.send_signal(signal.SIGKILL)
        assert repair(path, now=LATER).left == 0
        intact(small, path, untouched)


def test_attributes_before_a_damaged_block_stay(image: Path) -> None:
    """Of a chain of xattr blocks whose second block is beyond help, the attributes before it are kept."""
    volume = Volume.open(image, now=NOW)
    file = namespace.create(volume, NOW, volume.root, b"attributes", 0o644, WHO)
    for i in range(10):
        attributes.setxattr(volume, NOW, file, b"user.%d" % i, b"%d" % i * 1000)
    volume.close(NOW)

    def scribble(m: Medium) -> None:
        first = m.number("attributes", "xattr_block")
        second = int(layout.XATTR_BLOCK.unpack(m.pmem.view, first * BS)["next"])
        m.pmem.store(second * BS + 100, b"scribble")

    hurt(image, scribble)
    repaired(image)
    kept = seen(image)[b"/attributes"][11]
    assert kept == {b"user.%d" % i: b"%d" % i * 1000 for i in range(len(kept))}
    assert len(kept) == 3


def test_superblock_copies_are_rewritten_in_turns(image: Path) -> None:
    """The good copy is never written over before the other one is good."""
    for left in range(6):
        copy = image.with_name("copy")
        shutil.copyfile(image, copy)
        hurt(copy, lambda m: m.pmem.store((1 - m.sb["copy"]) * BS + 100, b"\xff\xff"))
        dies(copy, left, torn=True)
        data = copy.read_bytes()
        sound_copies = 0
        for at in (0, BS):
            with contextlib.suppress(Exception):
                layout.verify(data[at : at + SUPERBLOCK.size], layout.SB_MAGIC, "superblock")
                sound_copies += 1
        assert sound_copies >= 1
