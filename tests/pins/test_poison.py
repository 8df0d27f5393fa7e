"""Errors of the medium, on a real mount: read(2), mmap, write, punch, holders, and a volume whose own blocks fail."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daxfs import client
from daxfs.client import EventType
from tests.mount.harness import REPOSITORY, Mounted, daxfs, eventually
from tests.pins.holders import BLOCK, Holder

pytestmark = pytest.mark.mount


@pytest.fixture
def file(shared_mount: Mounted) -> Path:
    path = shared_mount.fresh_directory() / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    return path


def block_of(path: Path, logical: int) -> int:
    with client.open(path) as file:
        return next(e.physical + logical - e.logical for e in file.extents() if e.logical <= logical < e.logical + e.count)


def fails(path: Path, offset: int, length: int) -> bool:
    fd, code = os.open(path, os.O_RDONLY), 0
    try:
        os.pread(fd, length, offset)
    except OSError as problem:
        code = problem.errno or 0
    os.close(fd)
    assert code in (0, errno.EIO)
    return code != 0


def test_reads_fail_till_the_block_is_written_anew(file: Path) -> None:
    bad = block_of(file, 3)
    done = daxfs("device", "inject-error", "--block", str(bad), "--count", "2", "--json", file)
    assert json.loads(done.stdout) == {"block": bad, "count": 2, "poisoned": True, "files": 1, "metadata": False}
    assert {"start": bad, "count": 2, "owner": "file"} in client.device(file)["poison"]
    assert fails(file, 3 * BLOCK, 1)
    assert fails(file, 0, 8 * BLOCK)
    assert not fails(file, 0, 3 * BLOCK)
    with open(file, "r+b", buffering=0) as opened:
        opened.seek(3 * BLOCK)
        with pytest.raises(OSError) as caught:
            opened.write(b"part")
        assert caught.value.errno == errno.EIO
        assert opened.write(b"w" * BLOCK) == BLOCK
    assert not fails(file, 3 * BLOCK, BLOCK)
    assert fails(file, 4 * BLOCK, BLOCK)
    subprocess.run(["fallocate", "--punch-hole", "-o", str(4 * BLOCK), "-l", str(BLOCK), file], check=True)
    assert file.read_bytes() == b"f" * 3 * BLOCK + b"w" * BLOCK + bytes(BLOCK) + b"f" * 3 * BLOCK
    assert {"start": bad + 1, "count": 1, "owner": "retired"} in client.device(file)["poison"]
    assert f"block {bad + 1}, 1 in a row (retired)" in daxfs("device", "status", file).stdout
    daxfs("device", "inject-error", "--block", str(bad), "--count", "2", "--clear", file)
    assert client.device(file)["poison"] == []


def test_the_hot_path_sees_it(file: Path) -> None:
    """A file that is open and was read before: its reads were answered without asking the core."""
    with open(file, "rb", buffering=0) as opened:
        hot = client.info(file)["requests"]["hot_reads"]
        for _ in range(3):
            assert os.pread(opened.fileno(), BLOCK, 0) == b"f" * BLOCK
        assert client.info(file)["requests"]["hot_reads"] >= hot + 3
        bad = block_of(file, 0)
        client.poison(file, bad, 1)
        with pytest.raises(OSError) as caught:
            os.pread(opened.fileno(), BLOCK, 0)
        assert caught.value.errno == errno.EIO
        assert os.pread(opened.fileno(), BLOCK, BLOCK) == b"f" * BLOCK
        client.clear_poison(file, bad, 1)
        hot = client.info(file)["requests"]["hot_reads"]
        assert os.pread(opened.fileno(), BLOCK, 0) == b"f" * BLOCK
        assert client.info(file)["requests"]["hot_reads"] == hot + 1


_TOUCH = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print(view[0], flush=True)
sys.stdin.readline()
print(view[int(sys.argv[2])], flush=True)
"""


@pytest.mark.parametrize(("logical", "signal"), [(0, -7), (1, 0)])
def test_a_mapping_gets_sigbus(file: Path, logical: int, signal: int) -> None:
    """Pages that the kernel has already read are read anew, and cannot be."""
    command = [sys.executable, "-c", _TOUCH, str(file), str(logical * BLOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdin is not None
        assert reader.stdout.readline() == b"102\n"
        client.poison(file, block_of(file, 0), 1)
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        assert reader.wait(10) == signal


def test_holders_are_told_which_bytes(file: Path) -> None:
    with Holder(file) as holder, Holder(file) as other:
        pin_id = holder.pin(2, 4)
        other.pin(0, 1)
        client.poison(file, block_of(file, 3), 2)
        assert holder.ask("event") == [EventType.POISON, pin_id, 3 * BLOCK, 2 * BLOCK]
        assert other.ask("event") is None
        with pytest.raises(OSError) as caught:
            other.pin(3, 1)
        assert caught.value.errno == errno.EIO
        os.truncate(file, 0)
    eventually("busy poison is retired", lambda: client.status(file)["retired"] >= 2)


def test_poisoned_blocks_are_never_handed_out(mount: Mounted) -> None:
    free = client.info(mount.path)["free"]
    end = client.info(mount.path)["blocks"]
    files, metadata = client.poison(mount.path, end - 40_000, 40_000)
    assert (files, metadata) == (0, False)
    assert client.info(mount.path)["free"] == free - 40_000
    with pytest.raises(OSError) as caught, open(mount.path / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"z" * (1 << 20))
    assert caught.value.errno == errno.ENOSPC
    with client.open(mount.path / "filler") as opened:
        assert max(e.physical + e.count for e in opened.extents()) <= end - 40_000
    assert client.clear_poison(mount.path, end - 40_000, 40_000) == 0
    with open(mount.path / "filler", "ab", buffering=0) as more:
        assert more.write(b"z" * (1 << 20)) == 1 << 20


def test_poisoned_metadata_turns_the_volume_read_only(mount: Mounted) -> None:
    path = mount.path / "file"
    path.write_bytes(b"f" * BLOCK)
    done = daxfs("device", "inject-error", "--block", "2", mount.path, check=False)
    assert done.returncode == 1
    assert "read-only" in done.stderr
    for change in (lambda: path.write_bytes(b"x"), lambda: os.mkdir(mount.path / "new"), lambda: os.unlink(path)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    assert path.read_bytes() == b"f" * BLOCK
    status = client.device(mount.path)
    assert status["readonly"]
    assert "poisoned" in status["failed"]
    mount.umount()
    mount.mount()
    assert client.device(mount.path)["dirty_shutdowns"] == 1
    assert client.device(mount.path)["last_shutdown"].startswith("dirty")
    path.write_bytes(b"again")


def test_a_copy_stops_at_poison(file: Path) -> None:
    client.poison(file, block_of(file, 0), 1)
    source, target = os.open(file, os.O_RDONLY), os.open(file.parent / "copy", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError) as caught:
        os.copy_file_range(source, target, 8 * BLOCK)
    assert caught.value.errno == errno.EIO
    os.close(source)
    os.close(target)


def test_a_store_through_a_mapping_does_not_hide_poison(file: Path) -> None:
    """A part of a page cannot be stored: the page has to be read first, and cannot be."""
    program = "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); mmap.mmap(fd, 0)[5] = 1"
    client.poison(file, block_of(file, 0), 1)
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=REPOSITORY, check=False)
    assert done.returncode == -7
    assert mmap.PAGESIZE == BLOCK
