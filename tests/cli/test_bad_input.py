"""Bad input of every kind, as real runs: one line that says what is wrong, the right exit code, nothing changed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daxfs.core import layout
from tests.mount.harness import DAXFS, Mounted, daxfs

pytestmark = pytest.mark.mount


@pytest.fixture
def home(base: Path) -> Path:
    """A directory of one's own with an empty mount point `mnt`."""
    path = base / f"bad-{os.urandom(4).hex()}"
    (path / "mnt").mkdir(parents=True)
    return path


@pytest.fixture(autouse=True)
def tidy(home: Path) -> object:
    yield
    import shutil

    shutil.rmtree(home)


def refused(code: int, *words: str | Path, says: str) -> None:
    """The command ends with this code and one line on stderr that contains these words."""
    done = daxfs(*words, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("daxfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert says in done.stderr


def fingerprint(home: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(home.rglob("*"))
        if path != home / "log"
    }


def broken_image(home: Path, kind: str) -> Path:
    image = home / "image"
    if kind == "directory":
        image.mkdir()
        return image
    if kind == "missing":
        return image
    if kind in ("empty", "zeros", "too small", "of another kind"):
        content = {"empty": b"", "zeros": bytes(2 << 20), "too small": b"x" * 100, "of another kind": b"MZ" * (1 << 20)}
        image.write_bytes(content[kind])
        return image
    daxfs("mkfs", "--size", "16M", image)
    if kind == "truncated":
        os.truncate(image, 8 << 20)
    if kind in ("newer", "features"):
        with open(image, "r+b") as file:
            for at in (0, 4096):
                values = layout.SUPERBLOCK.unpack(os.pread(file.fileno(), layout.SUPERBLOCK.size, at))
                values.update({"newer": {"version": 99}, "features": {"incompat": 1 << 40}}[kind])
                os.pwrite(file.fileno(), layout.seal(layout.SUPERBLOCK.pack(**values)), at)
    if kind == "damaged":
        with open(image, "r+b") as file:
            for at in (0, 4096):
                os.pwrite(file.fileno(), b"?", at + 100)
    return image


KINDS = {
    "directory": "is a directory",
    "missing": "no image",
    "empty": "is empty",
    "zeros": "is empty",
    "too small": "is too small",
    "of another kind": "is not a daxfs image",
    "truncated": "is truncated",
    "newer": "newer than",
    "features": "features that this daxfs does not know",
    "damaged": "damaged",
}


@pytest.mark.parametrize("kind", KINDS)
def test_mount_of_a_bad_image(home: Path, kind: str) -> None:
    image = broken_image(home, kind)
    before = fingerprint(home)
    refused(1, "mount", "--image", image, "--log", home / "log", home / "mnt", says=KINDS[kind])
    assert fingerprint(home) == before
    assert not os.path.ismount(home / "mnt")


@pytest.mark.parametrize("kind", KINDS)
def test_fsck_and_info_of_a_bad_image(home: Path, kind: str) -> None:
    image = broken_image(home, kind)
    before = fingerprint(home)
    for command, codes in (("info", (1,)), ("fsck", (4, 8))):
        done = daxfs(command, image, check=False)
        assert done.returncode in codes, done.stderr
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr
        assert len((done.stdout + done.stderr).splitlines()) >= 1
    assert fingerprint(home) == before


def test_mount_points(home: Path) -> None:
    image = home / "image"
    daxfs("mkfs", "--size", "16M", image)
    (home / "file").write_text("text")
    (home / "full").mkdir()
    (home / "full" / "file").write_text("text")
    refused(1, "mount", "--image", image, home / "missing", says="does not exist")
    refused(1, "mount", "--image", image, home / "file", says="is not a directory")
    refused(1, "mount", "--image", image, home / "full", says="is not empty")
    daxfs("mount", "--image", image, "--log", home / "log", "-o", "nonempty", home / "full")
    assert os.listdir(home / "full") == []
    daxfs("umount", home / "full")
    assert os.listdir(home / "full") == ["file"]


def test_an_image_in_use(mount: Mounted, home: Path) -> None:
    before = mount.info()["uuid"]
    refused(1, "mount", "--image", mount.image, "--log", home / "log", home / "mnt", says="in use")
    refused(1, "mkfs", "--force", "--size", "16M", mount.image, says="in use")
    refused(1, "mount", "--image", home / "other", mount.path, says="mounted already")
    assert daxfs("fsck", mount.image, check=False).returncode == 8
    assert mount.info()["uuid"] == before
    assert f'"{before}"' in daxfs("info", "--json", mount.image).stdout


def test_options_and_sizes(home: Path) -> None:
    place = home / "mnt"
    refused(2, "mount", "--size", "1.5G", place, says="is not a size")
    refused(2, "mount", "--bogus", place, says="No such option")
    refused(2, "mount", "-o", "bogus", place, says="bogus")
    refused(2, "mount", "-o", "ro=3", place, says="takes no value")
    refused(2, "mount", "--policy", "maybe", place, says="maybe")
    refused(1, "mount", "--image", home / "new", "--size", "100", place, says="too small")
    refused(1, "mkfs", "--size", "100", home / "new", says="too small")
    refused(1, "mkfs", "--block-size", "5000", home / "new", says="block size")
    refused(1, "mkfs", "--label", "x" * 65, home / "new", says="label")
    refused(1, "mkfs", home / "no" / "where", says="No such file")
    refused(1, "mkfs", home / "mnt", says="not a regular file")
    assert sorted(os.listdir(home)) == ["mnt"]


def test_mkfs_keeps_what_is_there(home: Path) -> None:
    (home / "file").write_bytes(b"precious" * 1000)
    before = fingerprint(home)
    refused(1, "mkfs", home / "file", says="--force")
    assert fingerprint(home) == before
    daxfs("mkfs", "--force", "--size", "2M", home / "file")
    assert daxfs("fsck", home / "file").returncode == 0


def test_umount_of_what_is_not_mounted(home: Path) -> None:
    refused(1, "umount", home / "mnt", says="is not a mount point")
    refused(1, "umount", home / "missing", says="is not a mount point")
    refused(1, "umount", "/proc", says="is not a daxfs mount")


def test_umount_in_use_says_by_whom(mount: Mounted) -> None:
    sleeper = subprocess.Popen(["sleep", "100"], cwd=mount.path)
    try:
        refused(1, "umount", mount.path, says=f"sleep ({sleeper.pid})")
        assert os.path.ismount(mount.path)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--length", "1M"], "beyond the end"),
        (["--offset", "1T", "--length", "4K"], "beyond the end"),
        (["--offset", "64K"], "nothing to pin"),
        (["--offset", "1"], "whole blocks"),
        (["--length", "5"], "whole blocks"),
        (["--length", "0"], "whole blocks"),
    ],
)
def test_pins_outside_the_file(shared_mount: Mounted, words: list[str], says: str) -> None:
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"x" * 65536)
    refused(1, "pin", *words, file, says=says)
    assert shared_mount.info()["pinned"] == 0


def test_pins_of_what_cannot_be_pinned(shared_mount: Mounted, home: Path) -> None:
    place = shared_mount.fresh_directory()
    os.mkfifo(place / "fifo")
    with open(place / "hole", "wb") as file:
        file.truncate(8192)
    (place / "empty").touch()
    refused(1, "pin", "--length", "4K", place, says="only regular files")
    refused(1, "pin", "--length", "4K", "--write", place, says="directory")
    refused(1, "pin", place / "fifo", says="neither a regular file")
    refused(1, "pin", place / "hole", says="hole")
    refused(1, "pin", place / "empty", says="nothing to pin")
    refused(1, "pin", place / "missing", says="No such file")
    refused(1, "pin", home, says="not on a daxfs mount")
    refused(1, "extents", place, says="only regular files")
    refused(1, "extents", home, says="not on a daxfs mount")
    for command in ("pins", "busy"):
        refused(1, command, home, says="not on a daxfs mount")
        refused(1, command, place / "missing", says="No such file")
    refused(1, "info", home, says="neither on a daxfs mount nor a daxfs image")
    assert shared_mount.info()["pinned"] == 0


def test_a_dead_mount(make_mount: Callable[..., Mounted]) -> None:
    mounted = make_mount(size="16M")
    mounted.kill()
    for command in ("info", "pins", "busy"):
        refused(1, command, mounted.path, says="daemon of this mount is gone")
    daxfs("umount", mounted.path)
    assert not os.path.ismount(mounted.path)


def test_a_closed_pipe_is_no_traceback(shared_mount: Mounted) -> None:
    command = " ".join([*DAXFS, "info", "--json", str(shared_mount.path)])
    done = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_interrupts_are_quiet(shared_mount: Mounted) -> None:
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"x" * 4096)
    with subprocess.Popen([*DAXFS, "pin", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        assert b'"pin"' in holder.stdout.readline()
        holder.send_signal(signal.SIGINT)
        assert holder.wait(10) == 0
        assert holder.stderr.read() == b""
