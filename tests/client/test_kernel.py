"""The kernel as the holder: what it does to pinned blocks after a truncate, and what it refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daxfs import client, kernel
from daxfs.client import PinError
from tests.client.hosts import why_no_ring
from tests.mount.harness import Mounted, eventually, mounts_below

pytestmark = pytest.mark.mount

BLOCK = 4096
BLOCKS = 8
PATTERN = bytes(range(256)) * (BLOCK * BLOCKS // 256)


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    """A file of 8 blocks, block n full of the letter A + n."""
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(BLOCKS)))
    return file


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a file system with a disk below it, as far as there is one."""
    place = Path(tempfile.mkdtemp(prefix="daxfs-test-", dir="/var/tmp"))
    yield place
    shutil.rmtree(place)


@pytest.fixture
def source(disk: Path) -> Iterator[int]:
    """A file of the pattern on the disk, open with O_DIRECT."""
    (disk / "source").write_bytes(PATTERN)
    fd = os.open(disk / "source", os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


def somebody_else(path: Path) -> Callable[[], None]:
    """Fill the volume's free blocks with other files; the function that comes back says that they were not touched."""
    files = [path.with_name(f"other-{n}") for n in range(4)]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n + 1]) * BLOCK * 64)

    def unchanged() -> None:
        for n, file in enumerate(files):
            assert file.read_bytes() == bytes([n + 1]) * BLOCK * 64

    return unchanged


def test_the_disk_reads_into_a_truncated_files_blocks(path: Path, source: int) -> None:
    with client.open(path, "r+") as file, file.pin(write=True) as pin:
        view = pin.map()
        os.truncate(path, 0)
        unchanged = somebody_else(path)
        assert kernel.read_direct(source, BLOCK, pin, 2 * BLOCK, 3 * BLOCK) == 3 * BLOCK
        assert view[2 * BLOCK : 5 * BLOCK] == PATTERN[BLOCK : 4 * BLOCK]
        assert bytes(view[::BLOCK][:2]) + bytes(view[::BLOCK][5:]) == b"ABFGH"
        assert kernel.read_direct(source, 6 * BLOCK, pin) == 2 * BLOCK  # the file ends
        unchanged()


def test_the_disk_writes_what_a_truncated_file_had(path: Path, source: int, disk: Path) -> None:
    with client.open(path) as file, file.pin() as pin:
        os.truncate(path, 0)
        somebody_else(path)
        assert kernel.write_direct(source, BLOCK, pin, BLOCK, 2 * BLOCK) == 2 * BLOCK
        assert (disk / "source").read_bytes()[: 4 * BLOCK : BLOCK] == PATTERN[:1] + b"BC" + PATTERN[:1]


def test_direct_refusals(path: Path, source: int, disk: Path) -> None:
    with client.open(path) as file, file.pin() as pin, pytest.raises(PinError, match="take a write pin") as caught:
        kernel.read_direct(source, 0, pin)
    assert caught.value.errno == errno.EACCES
    with client.open(path, "r+") as file, file.pin(write=True) as pin:
        for at, length in ((0, 9 * BLOCK), (-BLOCK, BLOCK), (8 * BLOCK, BLOCK), (0, 0)):
            with pytest.raises(PinError, match="not all in the pin"):
                kernel.read_direct(source, 0, pin, at, length)
        with pytest.raises(PinError, match="logical block size") as caught:
            kernel.read_direct(source, 17, pin)
        assert caught.value.errno == errno.EINVAL
        with open(disk / "source", "rb") as buffered, pytest.raises(PinError, match="O_DIRECT"):
            kernel.read_direct(buffered.fileno(), 0, pin)


def test_pages_in_a_pipe_are_the_blocks(path: Path, shared_mount: Mounted) -> None:
    with client.open(path, "r+") as file, file.pin(write=True) as pin, kernel.splice(pin, BLOCK, 3 * BLOCK) as pipe:
        os.truncate(path, 0)
        unchanged = somebody_else(path)
        pin.map()[2 * BLOCK] = ord("!")  # no copy: it is seen in the pipe
        assert pipe.read(BLOCK) == b"B" * BLOCK
        rest = pipe.read()
        assert (len(rest), rest[:2], rest[BLOCK : BLOCK + 2]) == (2 * BLOCK, b"!C", b"DD")
        unchanged()
    eventually("the blocks are free", lambda: client.busy(shared_mount.path) == [])


def test_a_long_splice_and_one_that_is_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    path.write_bytes(os.urandom(size))
    with client.open(path) as file, file.pin() as pin:
        with kernel.splice(pin, 17, size - 100) as pipe:
            assert pipe.read() == path.read_bytes()[17 : size - 83]
        monkeypatch.setattr("daxfs.client.kernel.fcntl.F_SETPIPE_SZ", fcntl.F_GETPIPE_SZ)  # it stays as long as it is
        with pytest.raises(PinError, match="the pipe is full after 65536 bytes") as caught:
            kernel.splice(pin)
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def ring() -> None:
    if why := why_no_ring():
        pytest.skip(why)


@pytest.mark.usefixtures("ring")
def test_io_uring_fixed_buffer_after_truncate(path: Path, source: int) -> None:
    with client.open(path, "r+") as file, file.pin(write=True, longterm=True) as pin, kernel.FixedBuffer(pin) as buffer:
        with pin.map():
            pass  # the ring does not care that the view is gone
        view = pin.map()
        os.truncate(path, 0)
        unchanged = somebody_else(path)
        assert buffer.read(source, 0, BLOCK, 2 * BLOCK) == 2 * BLOCK
        assert view[BLOCK : 3 * BLOCK] == PATTERN[: 2 * BLOCK]
        assert buffer.write(source, 4 * BLOCK, 0, BLOCK) == BLOCK
        assert kernel.read_direct(source, 4 * BLOCK, pin, 7 * BLOCK, BLOCK) == BLOCK
        assert bytes(view[7 * BLOCK :]) == b"A" * BLOCK
        unchanged()


@pytest.mark.usefixtures("ring")
def test_an_operation_under_way_when_truncate_comes(path: Path) -> None:
    """The ring waits for a pipe; the file is truncated and its space given to others; then the bytes come."""
    read_end, write_end = os.pipe()
    with client.open(path, "r+") as file, file.pin(0, 2 * BLOCK, write=True) as pin, kernel.FixedBuffer(pin) as buffer:
        number = buffer.submit_read(read_end, 0, BLOCK, BLOCK)
        assert buffer.wait(0.05) == {}
        os.truncate(path, 0)
        unchanged = somebody_else(path)
        with pytest.raises(PinError, match="under way"):
            buffer.read(read_end, 0)
        threading.Timer(0.05, os.write, (write_end, b"late" * 1024)).start()
        assert buffer.wait(5) == {number: BLOCK}
        assert bytes(pin.map()[BLOCK:]) == b"late" * 1024
        unchanged()
    os.close(read_end)
    os.close(write_end)


@pytest.mark.usefixtures("ring")
def test_closing_the_pin_ends_what_the_kernel_does(path: Path, shared_mount: Mounted) -> None:
    read_end, write_end = os.pipe()
    with client.open(path, "r+") as file:
        pin = file.pin(write=True)
        buffer = kernel.FixedBuffer(pin)
        pipe = kernel.splice(pin, 0, BLOCK)
        buffer.submit_read(read_end, 0, 0, BLOCK)
        pin.close()
        with pytest.raises(PinError, match="the buffer is closed"):
            buffer.submit_read(read_end, 0, 0, BLOCK)
        with pytest.raises(PinError, match="the pipe is closed"):
            pipe.read()
        buffer.close()
        pipe.close()
    os.write(write_end, b"x" * BLOCK)
    assert os.read(read_end, BLOCK) == b"x" * BLOCK  # nobody else took it
    assert path.read_bytes()[:1] == b"A"
    os.close(read_end)
    os.close(write_end)


@pytest.mark.usefixtures("ring")
def test_many_operations(path: Path, source: int) -> None:
    with client.open(path, "r+") as file, file.pin(write=True) as pin, kernel.FixedBuffer(pin) as buffer:
        done: dict[int, int] = {}
        for n in range(32):
            buffer.submit_read(source, n % BLOCKS * BLOCK, n % BLOCKS * BLOCK, BLOCK)
        with pytest.raises(PinError, match="wait for one first") as caught:
            buffer.submit_read(source, 0, 0, BLOCK)
        assert caught.value.errno == errno.EAGAIN
        for n in range(100):
            done |= buffer.wait()
            buffer.submit_read(source, n % BLOCKS * BLOCK, n % BLOCKS * BLOCK, BLOCK)
        while found := buffer.wait():
            done |= found
        assert done == dict.fromkeys(range(1, 133), BLOCK)
        assert bytes(pin.map()) == PATTERN


@pytest.mark.usefixtures("ring")
def test_fixed_buffer_refusals(path: Path, source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.open(path) as file, file.pin() as pin, pytest.raises(PinError, match="take a write pin") as caught:
        kernel.FixedBuffer(pin)
    assert caught.value.errno == errno.EACCES
    with client.open(path, "r+") as file, file.pin(write=True) as pin:
        with kernel.FixedBuffer(pin) as buffer, pytest.raises(PinError, match="not aligned"):
            buffer.read(source, 17)
        monkeypatch.setitem(sys.modules, "liburing", None)
        with pytest.raises(PinError, match="pip install liburing") as caught:
            kernel.FixedBuffer(pin)
        assert caught.value.errno == errno.ENOPKG


@pytest.mark.usefixtures("ring")
def test_an_image_on_another_file_system(disk: Path) -> None:
    """The kernel pins no page cache of ext4 and others for long; short pins and pipes it does."""
    if os.stat(disk).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("/var/tmp is a tmpfs: there is no other file system to put an image on")
    mounted = Mounted(disk / "home", size="64M")
    try:
        mounted.mount()
        path = mounted.path / "file"
        path.write_bytes(b"A" * BLOCK)
        with client.open(path, "r+") as file, file.pin(write=True) as pin:
            with pytest.raises(PinError, match="put the image on tmpfs") as caught:
                kernel.FixedBuffer(pin)
            assert caught.value.errno in (errno.EFAULT, errno.EOPNOTSUPP)
            assert caught.value.filename == str(mounted.image)
            with kernel.splice(pin) as pipe:
                os.truncate(path, 0)
                assert pipe.read() == b"A" * BLOCK
            (disk / "source").write_bytes(PATTERN)
            fd = os.open(disk / "source", os.O_RDONLY | os.O_DIRECT)
            assert kernel.read_direct(fd, 0, pin) == BLOCK
            os.close(fd)
            assert pin.map() == PATTERN[:BLOCK]
    finally:
        mounted.finish()
        assert not mounts_below(disk)
