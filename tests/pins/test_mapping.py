"""A program's mapping of the mount and a holder's mapping of the blocks: no byte of either is lost, each sees the other's in
time, seeks find what is only in a page yet, and what was stored behind the end of a file never shows."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daxfs import abi, client, verbs
from daxfs.client import calls
from tests.conftest import serving
from tests.mount import syscalls
from tests.mount.harness import Mounted, eventually
from tests.pins.holders import Holder

pytestmark = pytest.mark.mount

BLOCK = 4096
SEEN_S = 20.0  # for what comes without being asked for
KEEP_SIZE, ZERO_RANGE = syscalls.KEEP_SIZE, syscalls.ZERO_RANGE


@pytest.fixture(scope="module", params=["hotpath=on", "hotpath=off", "hostsync"], ids=["hot", "cold", "hostsync"])
def mounted(request: pytest.FixtureRequest, base: Path) -> Iterator[Mounted]:
    options = f"allow_other,dax=always,{request.param}"
    with serving(base / f"mapping-{uuid.uuid4().hex[:8]}", options=options, size="64M") as made:
        yield made


class Page:
    """A file of four blocks full of `.`, a holder with a write pin on all of it, and a program with a mapping."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        path.write_bytes(b"." * 4 * BLOCK)
        self.file = stack.enter_context(client.open(path, "r+"))
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.mapping = mmap.mmap(self.fd, 4 * BLOCK)
        stack.callback(self.leave)

    def leave(self) -> None:
        """munmap and close of the program's."""
        if self.fd >= 0:
            self.mapping.close()
            os.close(self.fd)
            self.fd = -1

    def block(self, n: int = 0) -> bytes:
        """What is on the medium."""
        (physical,) = [e.physical + n - e.logical for e in self.file.extents() if e.logical <= n < e.logical + e.count]
        with open(str(self.file.info()["image"]), "rb", buffering=0) as image:
            return os.pread(image.fileno(), BLOCK, physical * BLOCK)


@pytest.fixture
def page(mounted: Mounted) -> Iterator[Page]:
    with ExitStack() as stack:
        yield Page(mounted.fresh_directory() / "file", stack)


# -- no byte is lost --


def _msync(page: Page) -> None:
    page.mapping.flush()


def _read(page: Page) -> None:
    """By another process, which has no mapping."""
    subprocess.run(["cat", page.path], stdout=subprocess.DEVNULL, check=True)


def _write(page: Page) -> None:
    with open(page.path, "r+b", buffering=0) as other:
        os.pwrite(other.fileno(), b"w", 3000)


def _leave(page: Page) -> None:
    page.leave()


def _background(page: Page) -> None:
    os.sync()
    eventually("the kernel writes the page back", lambda: page.block()[:1] == b"\x02", SEEN_S)


def _sync_range(page: Page) -> None:
    syscalls.sync_file_range(page.fd, 0, BLOCK)


def _fsync(page: Page) -> None:
    os.fsync(page.fd)


TRIGGERS = [_msync, _read, _write, _leave, _background, _sync_range, _fsync]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda function: function.__name__.strip("_"))
def test_the_device_and_a_program_write_one_page(page: Page, trigger: Callable[[Page], None]) -> None:
    with page.file.pin(write=True) as pin:
        view = pin.map()
        assert page.mapping[:BLOCK] == b"." * BLOCK  # the program looks: the kernel has the page
        view[100:104] = b"DMA!"
        page.mapping[0] = 2
        trigger(page)
        assert bytes(view[100:104]) == b"DMA!"
        assert view[0] == 2
        view[200:204] = b"more"  # what the kernel has now is older than the block again
    found = page.path.read_bytes()
    assert (found[:1], found[100:104], found[200:204]) == (b"\x02", b"DMA!", b"more")


@pytest.mark.parametrize("dirty", [True, False], ids=["dirty", "clean"])
def test_unpin_with_a_dirty_page(page: Page, dirty: bool) -> None:
    pin = page.file.pin(write=True)
    view = pin.map()
    assert page.mapping[0] == ord(".")
    view[100:104] = b"DMA!"
    page.mapping[0] = 2
    pin.close(dirty=dirty)
    page.mapping[1] = 3
    page.mapping.flush()
    assert page.path.read_bytes()[:2] == b"\x02\x03"
    assert page.path.read_bytes()[100:104] == page.block()[100:104] == b"DMA!"


def test_a_page_that_is_dirty_before_the_pin(page: Page) -> None:
    page.mapping[0:4] = b"MMAP"
    with page.file.pin(write=True) as pin:
        view = pin.map()
        assert bytes(view[0:4]) == page.mapping[0:4] == b"MMAP"
        view[100:104] = b"DMA!"
        page.mapping[200:204] = b"more"
        page.mapping.flush()
        assert (bytes(view[0:4]), bytes(view[100:104]), bytes(view[200:204])) == (b"MMAP", b"DMA!", b"more")
    assert page.path.read_bytes()[:4] == b"MMAP"


def test_a_read_pin_of_a_dirty_page(page: Page) -> None:
    page.mapping[0:4] = b"MMAP"
    with client.open(page.path) as file, file.pin() as pin:
        eventually("the holder sees what was stored before its pin", lambda: bytes(pin.map()[:4]) == b"MMAP", SEEN_S)


def test_a_hole_that_a_write_pin_fills(page: Page) -> None:
    os.ftruncate(page.fd, 0)
    os.ftruncate(page.fd, 4 * BLOCK)
    page.mapping[0:4] = b"MMAP"
    with page.file.pin(write=True) as pin:
        view = pin.map()
        assert bytes(view[0:4]) == b"MMAP"
        assert page.mapping[BLOCK] == 0
        view[BLOCK + 100 : BLOCK + 104] = b"DMA!"
        page.mapping[BLOCK] = 2
        page.mapping.flush()
        assert bytes(view[BLOCK : BLOCK + 104]) == b"\x02" + bytes(99) + b"DMA!"


@pytest.mark.parametrize("first", ["page", "registration"])
def test_a_memory_region_of_an_open_file(page: Page, mounted: Mounted, first: str) -> None:
    """The adapter writes beside a program that has the file open and mapped, also before the region is registered."""
    if first == "page":
        page.mapping[0:4] = b"MMAP"
    with verbs.Context(mounted.path) as context:
        mr = verbs.MR(verbs.PD(context), BLOCK, verbs.IBV_ACCESS_LOCAL_WRITE, file=page.path)
        if first == "registration":
            page.mapping[0:4] = b"MMAP"
        assert page.mapping[0:4] == b"MMAP"
        mr.write(b"DMA!", offset=100)
        page.mapping[200:204] = b"more"
        page.mapping.flush()
        assert (mr.read(4, 0), mr.read(4, 100), mr.read(4, 200)) == (b"MMAP", b"DMA!", b"more")
        mr.close()
    assert page.path.read_bytes()[100:104] == b"DMA!"


def test_a_registration_on_demand(page: Page) -> None:
    page.mapping[0:4] = b"MMAP"
    with page.file.register(write=True) as pin:
        view = pin.map()
        assert bytes(view[0:4]) == page.mapping[0:4] == b"MMAP"
        view[100:104] = b"DMA!"
        page.mapping[200:204] = b"more"
        page.mapping.flush()
        assert (bytes(view[100:104]), bytes(view[200:204])) == (b"DMA!", b"more")


def test_two_holders_and_two_programs_in_one_page(page: Page) -> None:
    """Each has a quarter of the page and writes all of it, round after round, in turn."""
    with client.open(page.path, "r+") as second, mmap.mmap(page.fd, BLOCK) as other:
        with page.file.pin(0, BLOCK, write=True) as one, second.pin(0, BLOCK, write=True) as two:
            writers = [one.map(), page.mapping, two.map(), other]
            for value in range(1, 100):
                for n, writer in enumerate(writers):
                    writer[n * 1024 : n * 1024 + 1024] = bytes([value]) * 1024  # type: ignore[index]
                (_msync, _read, _fsync)[value % 3](page)
                assert bytes(one.map()) == bytes([value]) * BLOCK, f"round {value}"
                for n, writer in enumerate(writers):
                    mine = bytes(writer[n * 1024 : n * 1024 + 1024])  # type: ignore[index]
                    assert mine == bytes([value]) * 1024, f"round {value}, {n}"
        assert os.pread(page.fd, BLOCK, 0) == b"\x63" * BLOCK


def test_pins_that_come_and_go(page: Page) -> None:
    """Some end clean, some dirty, and the kernel's page is older than what they wrote each time."""
    pins: list[client.Pin] = []
    for round_ in range(60):
        if len(pins) > 2:
            pins.pop(round_ % 3).close(dirty=bool(round_ & 1))
        pins.append(page.file.pin(0, BLOCK, write=True))
        assert page.mapping[0] == (round_ or ord("."))
        pins[round_ % len(pins)].map()[100 + round_] = round_ + 1
        page.mapping[0] = round_ + 1
        page.mapping[1000 + round_] = round_ + 1
        if round_ % 7 == 0:
            page.mapping.flush()
    for pin in pins:
        pin.close(dirty=False)
    page.mapping.flush()
    found, wanted = page.path.read_bytes(), bytes(range(1, 61))
    assert (found[0], found[100:160], found[1000:1060]) == (60, wanted, wanted)


def _copy_into(page: Page) -> None:
    other = page.path.with_name("other")
    other.write_bytes(bytes(1000))
    with open(other, "rb") as source:
        assert os.copy_file_range(source.fileno(), page.fd, 1000, 0, 1000) == 1000


CHANGES: dict[str, Callable[[Page], object]] = {
    "punch": lambda page: syscalls.fallocate(page.fd, syscalls.PUNCH_HOLE | KEEP_SIZE, 1000, 1000),
    "zero-range": lambda page: syscalls.fallocate(page.fd, ZERO_RANGE | KEEP_SIZE, 1000, 1000),
    "copy_file_range": _copy_into,
    "IOC_CHANGE": lambda page: calls.change(page.file.fileno(), 1000, 1000, abi.CHANGE_PUNCH, wait=True),
    "write": lambda page: os.pwrite(page.fd, bytes(1000), 1000),
    "truncate": lambda page: (os.ftruncate(page.fd, 1000), os.ftruncate(page.fd, BLOCK)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_of_a_page_changes_that_both_write(page: Page, change: str) -> None:
    """The block stays where it is: both sides have their bytes before the part, and zeros in it."""
    with page.file.pin(0, BLOCK, write=True) as pin:
        view = pin.map()
        assert page.mapping[0] == ord(".")
        view[100:104] = view[1100:1104] = b"DMA!"
        page.mapping[200:204] = page.mapping[1200:1204] = b"MMAP"
        CHANGES[change](page)
        wanted = b"." * 100 + b"DMA!" + b"." * 96 + b"MMAP" + b"." * 796 + bytes(1000)
        assert os.pread(page.fd, 2000, 0) == wanted
        assert bytes(view[:2000]) == wanted
        assert page.mapping[:2000] == wanted
        page.mapping[201] = view[101] = 7
        page.mapping.flush()
        assert (view[101], view[201]) == (7, 7)


def test_the_block_of_a_page_goes(page: Page) -> None:
    """... while both write: the holder keeps what it wrote, and the file has nothing of it."""
    with page.file.pin(0, BLOCK, write=True) as pin:
        view = pin.map()
        assert page.mapping[0] == ord(".")
        view[100:104] = b"DMA!"
        page.mapping[200:204] = b"MMAP"
        page.mapping.flush()
        syscalls.fallocate(page.fd, syscalls.PUNCH_HOLE | KEEP_SIZE, 0, BLOCK)
        assert page.mapping[:BLOCK] == bytes(BLOCK)
        view[300:304] = b"more"
        page.mapping[0] = 2
        page.mapping.flush()
        kept = b"." * 100 + b"DMA!" + b"." * 96 + b"MMAP" + b"." * 96 + b"more" + b"." * (BLOCK - 304)
        assert bytes(view) == kept
        assert os.pread(page.fd, BLOCK, 0) == page.mapping[:BLOCK] == b"\x02" + bytes(BLOCK - 1)


def test_a_holder_that_outlived_the_daemon(mount: Mounted) -> None:
    """Its block is in a file of the next mount, where a program stores beside it: both survive, or the store is refused."""
    path = mount.path / "file"
    path.write_bytes(b"." * BLOCK)
    with Holder(path) as holder:
        pin_id = holder.pin(0, 1, write=True)
        holder.ask("dma", pin_id, 0, "before")
        mount.kill()
        mount.mount()
        with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), BLOCK) as mapping:
            assert mapping[:7] == b"before."
            holder.ask("dma", pin_id, 100, "DMA!")
            mapping[200:204] = b"MMAP"
            mapping.flush()
        found = bytes.fromhex(holder.ask("load", pin_id))
        assert (found[:6], found[100:104], found[200:204]) == (b"before", b"DMA!", b"MMAP")
        assert path.read_bytes() == found


# -- each sees the other in time --


@pytest.mark.parametrize("write", [True, False], ids=["write-pin", "read-pin"])
def test_a_holder_sees_a_store(page: Page, write: bool) -> None:
    with client.open(page.path, "r+" if write else "r") as file, file.pin(write=write) as pin:
        view = pin.map()
        for round_, at in enumerate((0, BLOCK + 77, 4 * BLOCK - 1)):
            page.mapping[at] = round_ + 1
            eventually("the holder sees it", lambda: view[at] == round_ + 1, SEEN_S)


def test_a_mapping_sees_the_device(page: Page) -> None:
    with page.file.pin(write=True) as pin:
        view = pin.map()
        for round_, at in enumerate((0, BLOCK + 77, 4 * BLOCK - 1)):
            assert page.mapping[at] == ord(".")
            view[at] = round_ + 1
            eventually("the program sees it", lambda: page.mapping[at] == round_ + 1, SEEN_S)


def test_a_mapping_sees_the_device_of_a_pin_that_is_gone(page: Page) -> None:
    pin = page.file.pin(write=True)
    view = pin.map()
    assert page.mapping[0] == ord(".")
    view[0:4] = b"DMA!"
    pin.close(dirty=True)
    eventually("the program sees it", lambda: page.mapping[:4] == b"DMA!", SEEN_S)


# -- seeks and copies --


def _data(fd: int) -> list[tuple[int, int]]:
    """The data of a file, as SEEK_DATA and SEEK_HOLE have it."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


@pytest.mark.parametrize("allocated", [False, True], ids=["hole", "fallocate"])
def test_seeks_find_what_is_in_a_page_only(page: Page, allocated: bool) -> None:
    os.ftruncate(page.fd, 0)
    os.ftruncate(page.fd, 1 << 20)
    if allocated:
        os.posix_fallocate(page.fd, 0, 1 << 20)
    before = os.open(page.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(page.fd, 1 << 20) as whole:
            whole[500_000] = 1
            assert os.lseek(before, 0, os.SEEK_DATA) == 499_712
            assert os.lseek(before, 499_712, os.SEEK_HOLE) == 499_712 + BLOCK
            whole[1] = 1
            assert os.lseek(before, 0, os.SEEK_HOLE) == BLOCK
            assert _data(before) == [(0, BLOCK), (499_712, 499_712 + BLOCK)]
    finally:
        os.close(before)


@pytest.mark.parametrize("how", ["cp", "loop", "copy_file_range"])
def test_a_copy_has_what_is_in_a_page_only(page: Page, how: str) -> None:
    """... also through a descriptor that was opened before."""
    os.ftruncate(page.fd, 0)
    os.ftruncate(page.fd, 1 << 20)
    copy = page.path.with_name("copy")
    whole = mmap.mmap(page.fd, 1 << 20)
    with whole, open(page.path, "rb", buffering=0) as before, open(copy, "wb", buffering=0) as out:
        whole[500_000:500_004] = b"MMAP"
        out.truncate(1 << 20)
        if how == "cp":
            subprocess.run(["cp", "--sparse=always", page.path, copy], check=True)
        elif how == "loop":
            for start, end in _data(before.fileno()):
                os.pwrite(out.fileno(), os.pread(before.fileno(), end - start, start), start)
        else:
            at = 0
            while at < 1 << 20:
                at += os.copy_file_range(before.fileno(), out.fileno(), (1 << 20) - at, at, at)
    assert copy.read_bytes() == bytes(500_000) + b"MMAP" + bytes((1 << 20) - 500_004)


# -- behind the end --


def _write_behind(page: Page) -> None:
    os.pwrite(page.fd, b"x", 2 * BLOCK)


def _copy(page: Page) -> None:
    other = page.path.with_name("other")
    other.write_bytes(b"x" * 10)
    with open(other, "rb") as source:
        assert os.copy_file_range(source.fileno(), page.fd, 10, 0, BLOCK) == 10


GROW: dict[str, Callable[[Page], object]] = {
    "ftruncate": lambda page: os.ftruncate(page.fd, BLOCK),
    "ftruncate-far": lambda page: os.ftruncate(page.fd, 3 * BLOCK + 7),
    "ftruncate-near": lambda page: os.ftruncate(page.fd, 3000),
    "truncate": lambda page: os.truncate(page.path, BLOCK),
    "write": _write_behind,
    "fallocate": lambda page: os.posix_fallocate(page.fd, 0, 2 * BLOCK),
    "zero-range": lambda page: syscalls.fallocate(page.fd, ZERO_RANGE, BLOCK, BLOCK),
    "copy_file_range": _copy,
    "IOC_CHANGE": lambda page: calls.change(page.file.fileno(), BLOCK, 0, abi.CHANGE_TRUNCATE, wait=True),
}


@pytest.mark.parametrize("pinned", [False, True], ids=["alone", "pinned"])
@pytest.mark.parametrize("look", ["read", "mapping"])
@pytest.mark.parametrize("grow", GROW)
def test_what_was_stored_behind_the_end_never_shows(page: Page, grow: str, look: str, pinned: bool) -> None:
    with ExitStack() as stack:
        os.ftruncate(page.fd, 100)
        if pinned:
            stack.enter_context(page.file.pin(0, BLOCK, write=True))
        page.mapping[50:BLOCK] = b"z" * (BLOCK - 50)
        GROW[grow](page)
        size = min(os.fstat(page.fd).st_size, BLOCK)
        wanted = b"." * 50 + b"z" * 50 + bytes(size - 100)
        looks = [lambda: os.pread(page.fd, size, 0), lambda: page.mapping[:size]]
        for found in looks if look == "read" else looks[::-1]:
            assert found() == wanted
        page.mapping.flush()
        assert page.block()[:size] == wanted


def test_the_end_within_a_page_that_both_write(page: Page) -> None:
    """A device writes up to the end, a program stores behind it; then the file grows."""
    os.ftruncate(page.fd, 100)
    with page.file.pin(0, BLOCK, write=True) as pin:
        view = pin.map()
        page.mapping[0] = 2
        view[96:100] = b"DMA!"
        page.mapping[100:200] = b"z" * 100
        os.ftruncate(page.fd, 200)
        assert os.pread(page.fd, 200, 0) == b"\x02" + b"." * 95 + b"DMA!" + bytes(100)


# -- a device that the kernel knows nothing of, in a process of its own --

_MAPPER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapping = mmap.mmap(fd, 4096)
print(mapping[0], flush=True)
for line in sys.stdin:
    mapping[0] = int(line)
    print("stored", flush=True)
    if line == "9\\n":
        os._exit(0)
"""


def test_a_program_that_ends_with_a_dirty_page(page: Page) -> None:
    with page.file.pin(write=True) as pin:
        view = pin.map()
        command = [sys.executable, "-c", _MAPPER, str(page.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdout.readline()
            view[100:104] = b"DMA!"
            print(9, file=program.stdin, flush=True)
            program.stdout.readline()
            program.wait(10)
        assert (view[0], bytes(view[100:104])) == (9, b"DMA!")
