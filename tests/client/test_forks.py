"""What forked children, and receivers of descriptors, take away from the process whose things they are: nothing."""

from __future__ import annotations

import copy
import ctypes
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daxfs import client, kernel, verbs
from daxfs.client.closing import this_process
from tests.client.forks import ENDINGS, KINDS
from tests.client.hosts import why_no_ring
from tests.conftest import FORKS, Maker
from tests.mount.harness import REPOSITORY, Mounted, eventually

pytestmark = [pytest.mark.mount, FORKS]

BLOCK = 4096
Outcomes = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def outcomes(shared_mount: Mounted) -> Outcomes:
    """What was wrong with each kind of thing after a child has ended so: one program for all of them."""
    found: dict[str, dict[str, str]] = {}

    def of(ending: str) -> dict[str, str]:
        if ending not in found:
            kinds = [kind for kind in KINDS if kind != "Ring" or not why_no_ring()]
            command = [sys.executable, "-m", "tests.client.forks", shared_mount.fresh_directory(), ending, *kinds]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=REPOSITORY)
            assert done.returncode == 0, done.stderr
            found[ending] = {kind: wrong and f"{wrong}\n{done.stderr}" for kind, wrong in json.loads(done.stdout).items()}
        return found[ending]

    return of


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_child_takes_nothing_away(outcomes: Outcomes, kind: str, ending: str) -> None:
    """The parent's things are there and work when the child has ended, and are gone when the parent has closed them."""
    found = outcomes(ending)
    if kind not in found:
        pytest.skip(why_no_ring() or "")
    assert found[kind] == ""


# -- the bytes of others ----------------------------------------------------------------------------------------------

PINNED = """
import os, sys, time
import daxfs.client as daxfs

path, how = sys.argv[1:]
file = daxfs.open(path, "r+")
with file, file.pin(0, 65536, write=True) as pin:
    view = pin.map()
    if not os.fork():
        if how == "leave": sys.exit(0)
        if how == "fail": raise RuntimeError
        sys.stdin.read(), os._exit(0)                  # it has the descriptor until its input ends
    if how == "hold":
        file.close()                                   # the child's copy keeps the pin
        print("ready", flush=True)
        os.wait()
    else:
        os.wait()
        print(pin.held, flush=True)
        sys.stdin.readline()
        view[:] = b"D" * 65536
        print(bytes(view[:1]), flush=True)
        sys.stdin.readline()
"""


def started(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PINNED, path, how]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY
    )


def fill(path: Path) -> None:
    """Every free block of the volume."""
    with pytest.raises(OSError, match="No space"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"\xee" * BLOCK)


@pytest.mark.parametrize("how", ["leave", "fail"])
def test_no_byte_of_another_file_changes(make_mount: Maker, how: str) -> None:
    """A child ends, the file is truncated, its blocks are wanted, the device of the parent writes."""
    mounted = make_mount(size="16M")
    path, other = mounted.path / "file", mounted.path / "other"
    path.write_bytes(b"A" * 65536)
    with started(path, how) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == "True\n"
        assert client.info(mounted.path)["pinned"] == 16
        os.truncate(path, 0)
        fill(other)
        assert client.info(mounted.path)["busy"] == 16
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "b'D'\n"
        assert other.read_bytes().count(b"D") == 0
        print(file=holder.stdin, flush=True)
    assert holder.returncode == 0
    eventually("the blocks are free", lambda: client.info(mounted.path)["busy"] == 0)


def test_the_parent_closes_and_the_child_still_has_it(make_mount: Maker) -> None:
    mounted = make_mount(size="16M")
    path = mounted.path / "file"
    path.write_bytes(b"A" * 65536)
    with started(path, "hold") as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == "ready\n"
        assert client.info(mounted.path)["pinned"] == 16
        os.truncate(path, 0)
        assert client.info(mounted.path)["busy"] == 16
        holder.stdin.close()
        eventually("the last copy is closed", lambda: client.info(mounted.path)["busy"] == 0)
    assert holder.returncode == 0


# -- one call at a time -----------------------------------------------------------------------------------------------


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"A" * 4 * BLOCK)
    return file


def in_child(work: Callable[[], object]) -> str:
    """What a forked child says: the result of a call, or the text of its PinError."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                said = repr(work())
            except client.PinError as problem:
                said = f"{errno.errorcode[problem.errno or 0]} {problem.strerror}"
            os.write(write_end, said.encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end, "rb") as answer:
        said = answer.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    return said


def pins(path: Path) -> list[int]:
    return [pin["id"] for pin in client.pins(path) if pin["path"] == str(path)]


def test_a_child_gives_back_what_its_parent_took(path: Path) -> None:
    """Where that is wanted it has a name of its own."""
    with client.open(path, "r+") as file:
        one, two, three = (file.pin(n * BLOCK, BLOCK) for n in range(3))
        assert in_child(one.close) == "None"
        assert pins(path) == [one.id, two.id, three.id]
        assert in_child(two.close_for_all) == "None"
        assert in_child(lambda: client.File(os.dup(file.fileno())).unpin(three.id)) == "None"
        assert pins(path) == [one.id]
        with pytest.raises(client.PinError, match="released before") as caught:
            two.close()
        assert caught.value.errno == errno.ENOENT
        assert not two.held
        with file.lease() as lease:
            assert in_child(lease.close) == "False"
            assert in_child(lease.close_for_all) == "True"
            assert not lease.close()
        with verbs.Context(path.parent) as context, verbs.PD(context) as pd:
            region = verbs.MR(pd, BLOCK, file=path)
            assert in_child(region.close) == "None"
            assert region.read(1) == b"A"
            assert in_child(region.close_for_all) == "None"
            with pytest.raises(verbs.PinError, match="gone"):
                region.read(1)


def test_unpin_by_number_takes_the_mapping_of_the_pin_away(path: Path) -> None:
    with client.open(path, "r+") as file, file.pin(write=True) as pin:
        piece = pin.map()[:1]
        file.unpin(pin.id, dirty=True)
        assert bytes(piece) == b"\0"
        assert pins(path) == []
        with pytest.raises(client.PinError, match=f"pin {pin.id} is closed: "):
            pin.map()
        with pytest.raises(client.PinError, match="released before"):
            file.unpin(pin.id)


def test_a_child_drops_its_own_mapping(path: Path, shared_mount: Mounted) -> None:
    image = str(shared_mount.image)

    def mapped() -> bool:
        return image in Path("/proc/self/maps").read_text()

    with client.open(path, "r+") as file, file.pin(write=True) as pin:
        piece = pin.map()[:1]
        assert in_child(mapped) == "True"
        assert in_child(lambda: (pin.close(), mapped(), bytes(piece), pin.held)) == "(None, False, b'\\x00', False)"
        assert in_child(lambda: (file.close(), mapped(), pin.held)) == "(None, False, False)"
        assert bytes(piece) == b"A"
        said = in_child(lambda: (pin.close(), pin.map()))
        assert said == (
            f"EBADF pin {pin.id} is closed in this process; process {os.getpid()}, which made it, may still have it"
        )


def test_what_a_child_takes_is_the_childs(path: Path) -> None:
    """A pin that it takes through the inherited file is its own to give back; a lease goes with the parent's."""
    with client.open(path, "r+") as file, file.pin(0, BLOCK) as pin:
        assert in_child(lambda: file.pin(BLOCK, BLOCK).close()) == "None"
        assert pins(path) == [pin.id]
        with file.lease():
            assert in_child(lambda: file.lease(0, BLOCK).close()) == "False"
            assert client.status(path)["leases"] == 2
        assert client.status(path)["leases"] == 0


def test_the_maker_lets_the_kernel_go_whatever_a_child_has(path: Path) -> None:
    """A pipe that a child has as well would keep the pages in it: the blocks are somebody else's by then."""
    with client.open(path, "r+") as file:
        pin = file.pin(write=True)
        pipe = kernel.splice(pin)
        copied = os.dup(pipe.fileno())
        pin.close()
        assert os.read(copied, 1) == b""
        os.close(copied)


def test_a_fork_that_the_interpreter_does_not_see(path: Path) -> None:
    libc = ctypes.CDLL(None)
    with client.open(path) as file, file.pin() as pin:
        before = this_process()
        pid = libc.fork()
        if not pid:
            pin.close()
            os._exit(0 if this_process() is not before and not pin.mine else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert this_process() is before
        assert pins(path) == [pin.id]


def test_objects_do_not_travel(path: Path) -> None:
    with client.open(path) as file, file.pin() as pin, file.lease() as lease:
        for thing in (file, pin, lease):
            for travel in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="send the descriptor instead"):
                    travel(thing)


def test_one_thing_that_fails_does_not_hold_up_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a file unmaps all of its pins and closes the descriptor, whatever goes wrong with one of them."""
    file = client.open(path, "r+")
    views = []
    for n in range(3):
        pin = file.pin(n * BLOCK, BLOCK, write=True)
        views.append(pin.map()[:1])
        if n == 1:
            pipe = kernel.splice(pin)
    monkeypatch.setattr(pipe, "_give_back", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        file.close()
    assert [bytes(view) for view in views] == [b"\0"] * 3
    assert not file.held
    monkeypatch.undo()
    pipe.close()
    eventually("the last close has released them", lambda: pins(path) == [])
