"""What people see of hostile images: one line of the command, and the exit code. mount: 1. info: 1. fsck: 4 or 8."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from daxfs.cli.app import run
from tests.hostile.classes import CLASSES
from tests.hostile.forge import Forge
from tests.mount.harness import daxfs, mounts_below
from tools import fuzz

# name: (what mount and info say, the exit code of fsck)
SEEN = {
    "empty": ("is empty, too small for an image; make one with: daxfs mkfs", 8),
    "a block short": ("is truncated: it has 1044480 bytes of 1048576; restore it from a copy", 8),
    "zeros": ("is empty (zeros), not a daxfs image; make one with: daxfs mkfs", 8),
    "random": ("is not a daxfs image; name another file, or make one with daxfs mkfs", 8),
    "future version": ("has media version 99, newer than 1; update daxfs", 8),
    "bad checksums in both": ("both superblocks are damaged (superblock copy B: bad checksum); see: daxfs fsck", 4),
    "as many blocks as can be": ("is truncated", 8),
    "a root that is a file": ("is damaged: the root inode is not a directory; see: daxfs fsck", 4),
    "endless leaves": ("is damaged: inode 6: its chain of extent leaves is broken; see: daxfs fsck", 4),
    "a transaction over a superblock": ("is damaged: journal: a record is empty, or points at a superblock", 4),
    "a ledger in a circle": ("is damaged: pin ledger: the chain of blocks is broken; see: daxfs fsck", 4),
}


def make(place: Path, name: str) -> Path:
    image = Forge("armed")
    CLASSES[name][1](image)
    place.write_bytes(image.data)
    return place


def one_line(text: str, says: str) -> None:
    assert text.startswith("daxfs: ")
    assert text.count("\n") == 1, text
    assert says in text
    assert "Traceback" not in text
    assert "internal error" not in text


@pytest.mark.mount
@pytest.mark.parametrize("name", SEEN)
def test_mount_refuses(base: Path, place: Path, name: str) -> None:
    image, point = make(place, name), place.parent / "mnt"
    point.mkdir()
    before = image.read_bytes()
    done = daxfs("mount", "--image", image, "--log", place.parent / "log", point, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    one_line(done.stderr, SEEN[name][0])
    assert image.read_bytes() == before
    assert not mounts_below(place.parent)
    assert "Traceback" not in (place.parent / "log").read_text() if (place.parent / "log").exists() else True


@pytest.mark.parametrize("name", SEEN)
def test_fsck_and_info_say_why(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    says, code = SEEN[name]
    image = make(place, name)
    before = image.read_bytes()
    assert run(["fsck", str(image)]) == code
    out, err = capsys.readouterr()
    if code == 8:
        assert out == ""
        one_line(err, says.partition(";")[0])
    else:
        assert "error: " in out
        assert " error" in out.splitlines()[-1]
        assert err == ""
    assert run(["info", str(image)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert image.read_bytes() == before


@pytest.mark.mount
def test_hostile_files_on_a_mount(base: Path, place: Path) -> None:
    """Mounted for real: what is damaged answers EIO, whatever is called on it, and the daemon goes on."""
    point, image = place.parent / "mnt", Forge("clean")
    point.mkdir()
    image.inode("small", size=1 << 63)
    image.inode("short", target_length=0)
    image.entry("", b"pipe", ino=30)
    image.leaf_extent(4, physical=(1 << 64) - 1)
    image.inode("dir/sub", size=0)
    place.write_bytes(image.data)
    daxfs("mount", "--image", place, "--log", place.parent / "log", point)
    try:
        for words in ("cat small", "readlink -v short", "cat pipe", "cat dir/leafy", "ls dir/sub", "touch dir/sub/x",
                      "mv pipe y", "truncate -s 1 dir/leafy", "stat small", "ls dir/sub/deep"):  # fmt: skip
            done = subprocess.run(words.split(), cwd=point, capture_output=True, text=True, timeout=20, check=False)
            assert "Input/output error" in done.stderr, words
        (point / "new").write_text("fine")
        assert (point / "new").read_text() == "fine"
        assert sorted(path.name for path in point.iterdir()) == ["dir", "new", "pipe", "short", "small"]
    finally:
        daxfs("umount", point)
    log = (place.parent / "log").read_text()
    assert "Traceback" not in log
    assert "inode 3: size 9223372036854775808 is impossible" in log.replace(f"inode {image.number('small')}", "inode 3")


@pytest.mark.mount
def test_an_unharmed_image_of_unknown_features_mounts_read_only(base: Path, place: Path) -> None:
    image, point = make(place, "unknown features, read-only"), place.parent / "mnt"
    point.mkdir()
    done = daxfs("mount", "--image", image, "--log", place.parent / "log", point, check=False)
    assert done.returncode == 1
    one_line(done.stderr, "has features that this daxfs can only read (0x2); mount it with -o ro")
    daxfs("mount", "--image", image, "-o", "ro", "--log", place.parent / "log", point)
    try:
        assert (point / "small").read_bytes() == b"hello" * 100
    finally:
        daxfs("umount", point)


def test_a_sound_image_is_as_clean_as_ever(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place.write_bytes(fuzz.seed_image("clean").data)
    assert run(["fsck", str(place)]) == 0
    assert "clean" in capsys.readouterr().out
