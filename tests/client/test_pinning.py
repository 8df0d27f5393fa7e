"""The client library on a real mount: pin, map, change the file meanwhile, let go."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daxfs import client
from tests.mount.harness import REPOSITORY, Mounted, eventually

pytestmark = pytest.mark.mount

BLOCK = 4096
BLOCKS = 8


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    """A file of 8 blocks, block n full of the letter A + n."""
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(BLOCKS)))
    return file


def test_the_view_is_the_file(path: Path) -> None:
    with client.open(path, "r+") as file, file.pin(BLOCK, 3 * BLOCK, write=True) as pin:
        view = pin.map()
        assert pin.map() is view
        assert bytes(view[::BLOCK]) == b"BCD"
        view[BLOCK] = ord("!")
        assert path.read_bytes()[2 * BLOCK] == ord("!")
        os.pwrite(file.fileno(), b"?", BLOCK)
        assert view[0] == ord("?")
        assert pin.address


def test_truncate_leaves_the_holder_its_bytes(path: Path, shared_mount: Mounted) -> None:
    with client.open(path) as file, file.pin(0, 2 * BLOCK) as pin:
        view = pin.map()
        assert view.readonly
        os.truncate(path, 0)
        assert path.read_bytes() == b""
        assert bytes(view[::BLOCK]) == b"AB"
        assert sum(b["count"] for b in client.busy(shared_mount.path)) == 2
    eventually("the blocks are freed", lambda: client.busy(shared_mount.path) == [])


def test_a_fragmented_file_is_one_view(path: Path) -> None:
    """Written backwards, with another file's blocks between, so that its runs are more than one page of an answer."""
    count = 600
    other = path.with_name("other")
    with open(path, "r+b", buffering=0) as file, open(other, "wb", buffering=0) as noise:
        file.truncate(0)
        for n in reversed(range(count)):
            file.seek(n * BLOCK)
            file.write(bytes([n % 251]) * BLOCK)
            noise.write(b"noise" * 1000)
    with client.open(path, "r+") as opened, opened.pin(write=True) as pin:
        assert len(pin.runs) > 510
        assert [e.count for e in opened.extents()] == [count for _, count in pin.runs]
        assert bytes(pin.map()[::BLOCK]) == bytes(n % 251 for n in range(count))
        pin.map()[:] = bytes(count * BLOCK)
    assert path.read_bytes() == bytes(count * BLOCK)


def test_a_write_pin_gives_a_hole_blocks(path: Path) -> None:
    os.truncate(path, 16 * BLOCK)
    with client.open(path, "r+") as file:
        before = sum(e.count for e in file.extents())
        with file.pin(BLOCKS * BLOCK, 8 * BLOCK, write=True) as pin:
            view = pin.map()
            assert not any(view)
            view[:3] = b"new"
        assert sum(e.count for e in file.extents()) == before + 8
    assert path.read_bytes()[BLOCKS * BLOCK :][:4] == b"new\0"


def test_refusals(path: Path) -> None:
    hole = path.with_name("hole")
    with open(hole, "wb") as made:
        made.truncate(2 * BLOCK)
    with client.open(path) as file:
        for arguments, more, code in (
            ((0, BLOCK), {"write": True}, errno.EACCES),
            ((1, BLOCK), {}, errno.EINVAL),
            ((0, 0), {}, errno.EINVAL),
            ((0, BLOCK), {"flags": 1 << 30}, errno.EINVAL),
            ((0, BLOCK), {"flags": client.FOLL_PIN | client.FOLL_GET}, errno.EINVAL),
            ((BLOCKS * BLOCK, BLOCK), {}, errno.ENXIO),
            ((-BLOCK, BLOCK), {}, errno.EINVAL),
            ((1 << 64, BLOCK), {}, errno.EINVAL),
        ):
            with pytest.raises(client.PinError) as caught:
                file.pin(*arguments, **more)  # type: ignore[arg-type]
            assert caught.value.errno == code, arguments
            assert caught.value.filename == str(path)
    with client.open(hole) as file, pytest.raises(client.PinError, match="hole") as caught:
        file.pin()
    assert caught.value.errno == errno.EFAULT


def test_unpin_twice_and_a_foreign_pin(path: Path) -> None:
    with client.open(path) as one, client.open(path) as two:
        pin = one.pin()
        with pytest.raises(client.PinError) as caught:
            client.file.calls.unpin(two.fileno(), pin.id, dirty=False)
        assert caught.value.errno == errno.ENOENT
        pin.close()
        pin.close()
        with pytest.raises(client.PinError, match="is closed"):
            pin.map()


def test_closing_the_file_lets_everything_go(path: Path, shared_mount: Mounted) -> None:
    with client.open(path) as file:
        view = file.pin(0, BLOCK).map()
        file.pin(BLOCK, BLOCK)
        piece = view[:1]
        assert client.info(shared_mount.path)["pinned"] == 2, client.pins(shared_mount.path)
    eventually("the last close has released them", lambda: client.info(shared_mount.path)["pinned"] == 0)
    assert bytes(piece) == b"\0"


def test_many_pins_and_reports(path: Path, shared_mount: Mounted) -> None:
    """More than one page of each answer."""
    with client.open(path) as file:
        pins = [file.pin(n % BLOCKS * BLOCK, BLOCK) for n in range(300)]
        shown = client.pins(shared_mount.path)
        assert [p["id"] for p in shown] == [p.id for p in pins]
    eventually("the last close has released them", lambda: client.pins(shared_mount.path) == [])


def test_a_process_without_permission_for_the_image(path: Path, shared_mount: Mounted) -> None:
    """It may pin, but not map: mapping needs permission for the image."""
    os.chmod(path, 0o666)
    os.chmod(path.parent, 0o755)
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from daxfs import client\n"  # while it may still read the library
        "os.setgid(65534); os.setgroups([]); os.setuid(65534)\n"
        "with client.open(sys.argv[1], 'r+') as file, file.pin(write=True) as pin:\n"
        "    try: pin.map()\n"
        "    except client.PinError as problem: print(problem.errno, problem.filename, problem.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, REPOSITORY], capture_output=True, text=True, check=True, cwd="/"
    )
    code, image, text = done.stdout.split(maxsplit=2)
    assert (int(code), image) == (errno.EACCES, str(shared_mount.image))
    assert "no permission for the image" in text


def test_another_image_in_its_place(path: Path, shared_mount: Mounted) -> None:
    aside = shared_mount.image.with_name("aside")
    with client.open(path) as file, file.pin() as pin:
        os.rename(shared_mount.image, aside)
        try:
            with pytest.raises(client.PinError, match="cannot be opened"):
                pin.map()
            shared_mount.image.write_bytes(bytes(256 << 20))
            with pytest.raises(client.PinError, match="taken the place"):
                pin.map()
        finally:
            os.rename(aside, shared_mount.image)
        assert pin.map()[0] == ord("A")
