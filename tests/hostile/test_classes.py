"""Every class of hostile image mounts, or is refused with one line that says why; and no use of it does harm."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from daxfs.core import fileops, fsck, snapshot, superblock
from daxfs.core.directory import Directory
from daxfs.core.inode import Inode
from daxfs.core.transaction import Transaction
from daxfs.core.volume import Volume
from daxfs.errors import Corrupt, FsError, ImageError
from tests.hostile.classes import CLASSES
from tests.hostile.forge import Forge
from tools import fuzz, fuzz_use
from tools.fuzz_image import NOW, STATES
from tools.fuzz_use import Harm, ordeal

CASES = [(name, state) for name, (states, _, _) in CLASSES.items() for state in states]


def forged(name: str, state: str) -> bytes:
    image = Forge(state)
    CLASSES[name][1](image)
    return bytes(image.data)


def refusal(place: Path) -> str:
    """Why an image cannot be mounted; empty if it can."""
    try:
        Volume.open(place, now=NOW).close(NOW)
    except ImageError as e:
        return e.why
    return ""


@pytest.mark.parametrize(("name", "state"), CASES, ids=[f"{state}: {name}" for name, state in CASES])
def test_class(place: Path, name: str, state: str) -> None:
    image, says = forged(name, state), CLASSES[name][2]
    expected = says if isinstance(says, str) else says[state]
    place.write_bytes(image)
    why = refusal(place)
    assert bool(why) == bool(expected), why or "it was mounted"
    assert expected in why
    place.write_bytes(image)
    ordeal(place)


SOUND = {"twice as long", "unknown features, read-only", "unknown features that do no harm", "a label of garbage",
         "dirty, and nothing in the journal", "a name that is not UTF-8", "the largest size", "a pin of everything",
         "a wrong magic in A"}  # fmt: skip


@pytest.mark.parametrize(("name", "state"), CASES, ids=[f"{state}: {name}" for name, state in CASES])
def test_fsck_sees_it(place: Path, name: str, state: str) -> None:
    """What is wrong with an image, fsck says, or that it cannot look."""
    place.write_bytes(forged(name, state))
    try:
        report = fsck.check(place)
    except ImageError:
        assert refusal(place)
        return
    assert bool(report.errors) == (name not in SOUND), [str(finding) for finding in report.findings]


@pytest.mark.parametrize("state", STATES)
def test_the_images_that_are_broken_here_are_sound(place: Path, state: str) -> None:
    place.write_bytes(fuzz.seed_image(state).data)
    assert fsck.check(place).errors == 0
    volume = Volume.open(place, now=NOW)
    volume.check()
    volume.close(NOW)
    place.write_bytes(fuzz.seed_image(state).data)
    assert ordeal(place) == "mounted"


def test_a_damaged_file_does_not_keep_its_neighbours(place: Path) -> None:
    """EIO for what is damaged, everything else as always."""
    image = Forge()
    image.inode("small", size=1 << 63)
    place.write_bytes(image.data)
    volume = Volume.open(place, now=NOW)
    use = fuzz_use.Use(volume)
    use.walk()
    names = {name for _, _, name in use.found.values()}
    assert names == {b"dir", b"sub", b"deep", b"leafy", b"holes", b"short", b"long", b"pipe"}
    with pytest.raises(Corrupt, match="size 9223372036854775808 is impossible"):
        volume.inode(image.number("small"))
    volume.close(NOW)


# -- the ordeal is one: without the check, it sees the harm ---------------------------------------------------------------


def nothing(*_: object) -> None:
    pass


WITHOUT = {
    "counters": (superblock, "_COUNTER_MAX", 1 << 70, "a sequence at its end", "clean"),
    "free space": (snapshot, "_is_free", lambda *_: True, "free space outside", "clean"),
    "the size of a directory": (Directory, "_check_size", nothing, "a directory shorter than its blocks", "clean"),
    "an error of our own": (Inode, "load", lambda self: {}[0], "no links", "clean"),
    "a text of two lines": (ImageError, "__init__", lambda self, why: FsError.__init__(self, f"{why}\n"), "zeros", "clean"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_harm_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    owner, name, other, image, state = WITHOUT[what]
    data = forged(image, state)  # before anything is taken away
    place.write_bytes(data)
    ordeal(place)
    monkeypatch.setattr(owner, name, other)
    with pytest.raises((Harm, KeyError)):
        for which in range(3):  # of the files are left alone: by their bytes, as a rule
            place.write_bytes(data)
            monkeypatch.setattr(zlib, "crc32", lambda _, which=which: which)
            ordeal(place)


def test_a_block_that_is_freed_twice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is on media. Without the check the allocator would be at a loss behind the commit."""
    for checked in (True, False):
        place.write_bytes(forged("one block twice in a file", "clean"))
        volume = Volume.open(place, now=NOW)
        inode = volume.inode(Forge().number("small"))
        if checked:
            with pytest.raises(Corrupt, match="are freed, but belong to somebody else as well"):
                fileops.truncate(volume, NOW, inode, 0)
            assert not volume.failed
            assert (inode.size, inode.map.blocks) == (500, 2)
        else:
            monkeypatch.setattr(Transaction, "_check_freed", nothing)
            with pytest.raises(ValueError, match="in the set already"):
                fileops.truncate(volume, NOW, inode, 0)
            assert volume.failed
        volume.close(NOW)


def test_an_endless_loop_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(_: Volume) -> None:
        while True:
            pass

    place.write_bytes(fuzz.seed_image("clean").data)
    monkeypatch.setattr(Volume, "check", forever)
    monkeypatch.setattr(fuzz_use, "LIMIT_S", 1)
    with pytest.raises(Harm, match="more than 1 s of computing"):
        ordeal(place)
