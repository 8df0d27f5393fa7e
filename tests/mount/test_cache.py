"""dax=never: the kernel's page cache and write-back. What people get of it, what a full volume and a killed daemon do, and
that a pinned file never has a page in it: what a device writes is what the next read sees, or an errno."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daxfs import abi, client
from daxfs.client import FOLL_GET, PinError
from tests.conftest import Maker, serving
from tests.mount import syscalls
from tests.mount.harness import Mounted, eventually
from tests.mount.holder import Holder
from tests.mount.syscalls import KEEP_SIZE, PUNCH_HOLE

BLOCK = 4096
NEVER = "allow_other,dax=never"


@pytest.fixture(scope="module")
def cached(base: Path) -> Iterator[Mounted]:
    """One mount for all cases that leave it as it was."""
    with serving(base / "cached", options=NEVER) as mounted:
        yield mounted


@pytest.fixture
def path(cached: Mounted) -> Path:
    file = cached.fresh_directory() / "file"
    file.write_bytes(b"old." * (4 * BLOCK))
    return file


def requests(mounted: Mounted) -> dict[str, int]:
    counted: dict[str, int] = mounted.info()["requests"]
    return counted


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The name of the errno."""
    with pytest.raises(OSError) as problem:
        call(*arguments, **named)
    return errno.errorcode[problem.value.errno or 0]


# -- the cache --------------------------------------------------------------------------------------------------------


def test_reads_and_small_writes_make_few_requests(cached: Mounted, path: Path) -> None:
    before = requests(cached)
    with open(path, "r+b", buffering=0) as file:
        for n in range(1000):
            os.pwrite(file.fileno(), b"%04d" % n, 4 * n)
        os.fsync(file.fileno())
        for n in range(1000):
            assert os.pread(file.fileno(), 4, 4 * n) == b"%04d" % n
    assert path.read_bytes()[:8] == b"00000001", "and the next open keeps the pages"
    after = requests(cached)
    made = sum(after[kind] - before[kind] for kind in ("raw", "passed", "hot_reads", "hot_writes"))
    assert made < 50, f"{made} requests for 2000 calls"


def test_times_are_the_kernels_and_stay(make_mount: Maker) -> None:
    """Writing back moves no time: mtime is that of the write, not of the write-back, also after a remount."""
    mounted = make_mount(options=NEVER)
    file, other = mounted.path / "file", mounted.path / "other"
    with open(file, "wb", buffering=0) as f:
        f.write(b"x" * 10_000)
        written = os.fstat(f.fileno()).st_mtime_ns
        time.sleep(0.05)
        os.fsync(f.fileno())
        assert os.fstat(f.fileno()).st_mtime_ns == written
    other.write_bytes(b"x" * 10_000)
    os.utime(other, ns=(10**18, 10**18 + 7))
    seen = [(os.stat(f).st_mtime_ns, os.stat(f).st_ctime_ns) for f in (file, other)]
    assert seen[0][0] == written
    assert seen[1][0] == 10**18 + 7
    mounted.remount()
    assert [(os.stat(f).st_mtime_ns, os.stat(f).st_ctime_ns) for f in (file, other)] == seen


def test_blocks_are_counted_when_they_are_written(path: Path) -> None:
    os.truncate(path, 0)
    assert os.stat(path).st_blocks == 0
    with open(path, "wb") as file:
        file.write(bytes(10 * BLOCK))
    assert os.stat(path).st_blocks == 80
    with open(path, "ab", buffering=0) as file:
        file.write(bytes(BLOCK))
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_blocks == 88


def test_what_is_dirty_is_data_to_seek_copy_and_punch(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.pwrite(fd, b"d" * BLOCK, 5 * BLOCK)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 5 * BLOCK
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    os.pwrite(fd, b"e" * BLOCK, 8 * BLOCK)
    assert os.lseek(fd, 6 * BLOCK, os.SEEK_DATA) == 8 * BLOCK
    os.pwrite(fd, b"f" * 2 * BLOCK, 0)
    assert syscalls.copy_range(fd, 0, fd, 20 * BLOCK, 2 * BLOCK) == 2 * BLOCK
    assert os.pread(fd, 2 * BLOCK, 20 * BLOCK) == b"f" * 2 * BLOCK
    os.pwrite(fd, b"g" * BLOCK, BLOCK)
    syscalls.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, BLOCK // 2, BLOCK)
    assert os.pread(fd, 2 * BLOCK, 0) == b"f" * (BLOCK // 2) + bytes(BLOCK) + b"g" * (BLOCK // 2)
    os.close(fd)
    assert path.read_bytes()[: 2 * BLOCK] == b"f" * (BLOCK // 2) + bytes(BLOCK) + b"g" * (BLOCK // 2)


@pytest.mark.parametrize(
    ("size", "blocks"), [(10_000, 3), (5000, 2), (4096, 1), (0, 0), (12_288, 256), (20_000, 256)]
)
def test_truncate_gives_preallocated_blocks_back_before_anything_is_written(path: Path, size: int, blocks: int) -> None:
    """To a size that is not greater than the kernel's; one that grows keeps them, as on ext4 and XFS."""
    with open(path, "w+b", buffering=0) as file:
        file.write(b"x" * 10_000)
        syscalls.fallocate(file.fileno(), KEEP_SIZE, 0, 1 << 20)
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 // BLOCK == blocks
        assert os.pread(file.fileno(), 30_000, 0) == (b"x" * min(size, 10_000)).ljust(size, b"\0")


def copied(fd: int, source: Path) -> None:
    source.write_bytes(b"new" * 100)
    with open(source, "rb") as file:
        syscalls.copy_range(file.fileno(), 0, fd, 6000, 300)


GROWN: dict[str, Callable[[int, Path], object]] = {
    "ftruncate": lambda fd, _: os.ftruncate(fd, BLOCK),
    "ftruncate-far": lambda fd, _: os.ftruncate(fd, 3 * BLOCK + 7),
    "fallocate": lambda fd, _: syscalls.fallocate(fd, 0, 0, BLOCK),
    "fallocate-behind": lambda fd, _: syscalls.fallocate(fd, 0, 2 * BLOCK, BLOCK),
    "zero-range": lambda fd, _: syscalls.fallocate(fd, syscalls.ZERO_RANGE, 2 * BLOCK, BLOCK),
    "copy": copied,
}


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("how", GROWN)
def test_bytes_behind_the_end_do_not_show_when_the_file_grows(path: Path, how: str, synced: bool) -> None:
    """A mapping has stored them there. What was written before the end, and not written back, stays."""
    with open(path, "w+b", buffering=0) as file:
        file.write(b"A" * 100)
        if synced:
            os.fsync(file.fileno())
        with mmap.mmap(file.fileno(), 0) as view:
            _store_behind(view, 100, b"B" * (BLOCK - 100))
            GROWN[how](file.fileno(), path.with_name("source"))
            size = os.fstat(file.fileno()).st_size
            assert size >= BLOCK
            for _ in range(2):  # from the cache, and from the blocks
                data = os.pread(file.fileno(), size, 0)
                assert data[:100] == b"A" * 100
                assert data[100:].replace(b"new", bytes(3)) == bytes(size - 100)
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_what_is_stored_behind_the_end_after_it_grew_stays(path: Path) -> None:
    """The kernel's page of the end, and the one behind: nothing of them is taken for garbage later."""
    with open(path, "w+b", buffering=0) as file:
        for n in range(1, 40):
            file.write(b"A" * 100)
            end = file.tell()
            os.ftruncate(file.fileno(), end + 2000)
            with mmap.mmap(file.fileno(), 0) as view:
                view[end : end + 1000] = bytes([n]) * 1000
                assert os.pread(file.fileno(), 2000, end) == bytes([n]) * 1000 + bytes(1000)
                os.fsync(file.fileno())
                assert os.pread(file.fileno(), 2000, end) == bytes([n]) * 1000 + bytes(1000)
            file.seek(end + 2000)


def _store_behind(view: mmap.mmap, at: int, data: bytes) -> None:
    """Into the mapped page, where Python says that there is nothing."""
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(view)) + at, data, len(data))


def test_pages_are_read_through_handles_that_only_write(path: Path) -> None:
    """A write to a part of a page that is not there reads it first, and appends are the kernel's to place."""
    fds = [os.open(path, os.O_WRONLY | flags) for flags in (0, os.O_APPEND, os.O_APPEND)]
    os.posix_fadvise(fds[0], 0, 0, os.POSIX_FADV_DONTNEED)
    os.pwrite(fds[0], b"NEW!", 6)
    for n in range(100):
        os.write(fds[1 + n % 2], b"%02d" % n)
    os.close(fds[0])
    kept = os.open(path, os.O_RDONLY)
    path.unlink()
    os.write(fds[1], b"behind the unlink")
    text = os.pread(kept, 1 << 20, 0)
    assert text[:12] == b"old.olNEW!d."
    assert text[16 * BLOCK :] == b"".join(b"%02d" % n for n in range(100)) + b"behind the unlink"
    for fd in (*fds[1:], kept):
        os.close(fd)


def test_full_volume(make_mount: Maker) -> None:
    """Who fills a volume hears ENOSPC from write(2) once writing back has failed, from fsync, and from close at the latest;
    what was there stays, and the space comes back."""
    mounted = make_mount(size="16M", options=NEVER)
    kept, filler, late = mounted.path / "kept", mounted.path / "filler", mounted.path / "late"
    kept.write_bytes(b"k" * 100_000)
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    with pytest.raises(OSError, match="No space"):
        for _ in range(64):
            os.write(fd, b"f" * (1 << 20))
            os.fsync(fd)
    assert refused(os.write, fd, b"f" * (1 << 20)) == "ENOSPC"
    os.close(fd)
    assert os.statvfs(mounted.path).f_bavail == 0
    fd = os.open(late, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(fd, b"l" * BLOCK)
    assert refused(os.close, fd) == "ENOSPC"
    assert kept.read_bytes() == b"k" * 100_000
    filler.unlink()
    late.write_bytes(b"m" * 1_000_000)
    mounted.remount()
    assert late.read_bytes() == b"m" * 1_000_000


def test_a_killed_daemon_has_what_was_synced(make_mount: Maker) -> None:
    """As with any write-back cache: fsync is the promise; and a close, which writes back."""
    mounted = make_mount(options=NEVER)
    synced, closed, dirty = (mounted.path / name for name in ("synced", "closed", "dirty"))
    fds = [os.open(f, os.O_RDWR | os.O_CREAT, 0o600) for f in (synced, dirty)]
    for fd in fds:
        os.pwrite(fd, b"first" * 10_000, 0)
        os.fsync(fd)
    closed.write_bytes(b"closed" * 10_000)
    os.pwrite(fds[1], b"later" * 10_000, 0)  # last: the kernel writes back when it likes
    mounted.kill()
    assert refused(os.fsync, fds[1]) in ("ENOTCONN", "ECONNABORTED", "EIO")
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    mounted.mount()
    assert synced.read_bytes() == b"first" * 10_000
    assert closed.read_bytes() == b"closed" * 10_000
    assert dirty.read_bytes() in (b"later" * 10_000, b"first" * 10_000)


# -- pins: who may pin ------------------------------------------------------------------------------------------------


def test_a_pin_needs_the_file_out_of_the_cache(path: Path) -> None:
    """A descriptor, or a mapping, through the cache is in the way; a reference (FOLL_GET) needs nothing."""
    fd = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(fd, BLOCK)
    os.close(fd)
    with client.open(path, "r+") as file:
        for call in (file.pin, file.register):
            with pytest.raises(PinError, match="page cache") as problem:
                call(0, BLOCK, write=True)
            assert problem.value.errno == errno.EBUSY
        file.pin(0, BLOCK, flags=FOLL_GET).close()
    mapped[:4] = b"late"
    mapped.close()
    with client.open(path, "r+") as file, file.pin(0, BLOCK, write=True) as pin:
        assert bytes(pin.map()[:4]) == b"late", "what was dirty is in the block"


def test_a_descriptor_that_was_not_opened_to_pin(path: Path) -> None:
    for flags in (0, os.O_DIRECT, os.O_NONBLOCK):
        with client.File(os.open(path, os.O_RDWR | flags)) as file:
            assert refused(file.pin, 0, BLOCK) == "EBUSY"
    with client.File(os.open(path, os.O_RDWR | abi.O_PIN)) as file:
        file.pin(0, BLOCK).close()


def test_closed_just_now(path: Path) -> None:
    """A close is over when it is over: nobody needs to wait before the file is opened to pin, and all that was written by
    then is in the blocks."""
    for n in range(150):
        with open(path, "r+b", buffering=0) as file:
            file.write(b"%08d" % n * 1000)
        with client.open(path, "r+") as file, file.pin(0, 2 * BLOCK, write=True) as pin:
            view = pin.map()
            assert bytes(view[:8]) == b"%08d" % n
            view[:8] = b"%08d" % (n + 1)
        with open(path, "rb", buffering=0) as file:
            assert file.read(8) == b"%08d" % (n + 1)


# -- pins: what others see --------------------------------------------------------------------------------------------


def stale_reads(read: Callable[[], int], published: mmap.mmap, for_s: float) -> list[tuple[int, int]]:
    """(what was read, what was published before the read began), where that is less. Of 300 reads at least."""
    done, stale = 0, []
    end = time.monotonic() + for_s
    while done < 300 or time.monotonic() < end:
        (least,) = struct.unpack_from("<Q", published)
        got = read()
        if got < least:
            stale.append((got, least))
        done += 1
    return stale


@contextmanager
def counting(view: memoryview) -> Iterator[mmap.mmap]:
    """A device that counts up in its block, without a pause, and says how far it is behind each store."""
    published = mmap.mmap(-1, BLOCK)
    running = os.fork()
    if running == 0:
        words = [memoryview(memory)[:8].cast("Q") for memory in (view, published)]  # one store each
        for value in range(1 << 62):
            for word in words:
                word[0] = value
    try:
        eventually("the device writes", lambda: number(published))
        yield published
    finally:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)


def number(data: bytes | mmap.mmap) -> int:
    (value,) = struct.unpack_from("<Q", data)
    return int(value)


def test_no_read_is_stale_while_a_device_writes(path: Path) -> None:
    """Readers through descriptors of all ages and kinds never see less than what the device had said by then."""
    holder = client.open(path, "r+")
    old = os.open(path, os.O_RDWR)  # before the pin
    pin = holder.pin(0, BLOCK, write=True)
    new, direct = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)

    def reopened() -> int:
        with open(path, "rb", buffering=0) as file:
            return number(file.read(8))

    readers: list[Callable[[], int]] = [
        lambda: number(os.pread(old, 8, 0)),
        lambda: number(os.pread(new, BLOCK, 0)),
        lambda: (os.preadv(direct, [buffer], 0), number(buffer))[1],
        reopened,
    ]
    view = pin.map()
    with counting(view) as published:
        stale = [stale_reads(read, published, 0.4) for read in readers]
    assert stale == [[]] * len(readers)
    last = bytes(view[:8])
    pin.close()
    holder.close()
    for fd in (old, new, direct):
        os.close(fd)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), BLOCK) as mapped:
        assert mapped[:8] == last, "pages that come back later have it, too"


def test_a_stale_read_would_be_seen(mount: Mounted) -> None:
    """The measure itself: with dax=always a file can be mapped beside a pin, and the mapping is what was there before."""
    path = mount.path / "file"
    path.write_bytes(bytes(BLOCK))
    with client.open(path, "r+") as file, file.pin(0, BLOCK, write=True) as pin, mmap.mmap(file.fileno(), BLOCK) as mapped:
        assert number(mapped) == 0
        with counting(pin.map()) as published:
            assert stale_reads(lambda: number(mapped), published, 0.1)


def test_writes_reach_the_holder_at_once(path: Path) -> None:
    with client.open(path, "r+") as file, file.pin(0, BLOCK, write=True) as pin, open(path, "r+b", buffering=0) as other:
        view = pin.map()
        for n in range(100):
            os.pwrite(other.fileno(), b"%04d" % n, 8)
            assert bytes(view[8:12]) == b"%04d" % n


def ends_with(work: Callable[[], object]) -> int:
    """The signal that ends a child which does this, 0: none."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # pytest's faulthandler has it
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_what_would_need_pages_is_refused(path: Path, tmp_path: Path) -> None:
    """While a device writes: shared mappings are ENODEV, splices EINVAL (so callers read), private ones SIGBUS."""
    with client.open(path, "r+") as file:
        other = os.open(path, os.O_RDWR)
        assert refused(mmap.mmap, other, BLOCK) == "ENODEV"
        private = mmap.mmap(other, BLOCK, flags=mmap.MAP_PRIVATE)
        assert private[:4] == b"old.", "no device writes yet"
        with open(tmp_path / "copy", "wb") as sink:
            assert os.sendfile(sink.fileno(), other, 0, BLOCK) == BLOCK
        with file.pin(0, BLOCK) as reading:
            assert private[:4] == b"old.", "it only reads"
            with file.pin(0, BLOCK, write=True) as writing:
                writing.map()[:4] = b"DMA!"
                with open(tmp_path / "copy", "wb") as sink:
                    assert refused(os.sendfile, sink.fileno(), other, 0, BLOCK) == "EINVAL"
                assert ends_with(lambda: private[:4]) == signal.SIGBUS
                fresh = mmap.mmap(other, BLOCK, flags=mmap.MAP_PRIVATE)
                assert ends_with(lambda: fresh[:4]) == signal.SIGBUS
                shutil.copyfile(path, tmp_path / "copy")
                assert (tmp_path / "copy").read_bytes()[:4] == b"DMA!"
                assert os.pread(other, 4, 0) == b"DMA!"
            assert bytes(reading.map()[:4]) == b"DMA!"
            assert private[:4] == fresh[:4] == b"DMA!"
            fresh.close()
            private.close()
        os.close(other)
    with open(path, "r+b") as again, mmap.mmap(again.fileno(), BLOCK) as mapped:
        assert mapped[:4] == b"DMA!", "the cache is back when all have closed the file"


def test_layout_changes_go_through_the_kernel(path: Path) -> None:
    """It owns size and pages: our own lockless calls are refused, truncate(2) and fallocate(2) do what they do."""
    with client.open(path, "r+") as file, file.pin(0, BLOCK, write=True) as pin:
        assert refused(file.truncate, 0) == "ENOTSUP"
        assert refused(file.punch, 0, BLOCK) == "ENOTSUP"
        os.truncate(path, 0)
        assert bytes(pin.map()[:4]) == b"old."
        assert os.stat(path).st_size == 0
        path.write_bytes(b"next")
        assert path.read_bytes() == b"next"
        assert bytes(pin.map()[:4]) == b"old."


def test_a_survivor_keeps_the_file_out_of_the_cache(make_mount: Maker, holder: Holder) -> None:
    """A holder outlives the daemon, with its mapping: in the next mount the file of its pin is direct from the start."""
    mounted = make_mount(options=NEVER)
    path = mounted.path / "file"
    path.write_bytes(b"old." * BLOCK)
    holder.pin(path, 0, 1, write=True)
    mounted.kill()
    mounted.mount()
    with open(path, "r+b", buffering=0) as file:
        for n in range(10):
            holder.write(b"DMA%d" % n)
            assert os.pread(file.fileno(), 4, 0) == b"DMA%d" % n
        assert refused(mmap.mmap, file.fileno(), BLOCK) == "ENODEV"
    holder.end(signal.SIGKILL)
    client.reap_busy(mounted.path)
    eventually("the survivor is gone", lambda: not client.pins(mounted.path))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), BLOCK) as mapped:
        assert mapped[:4] == b"DMA9"


def test_times_of_a_file_that_is_open_to_pin(path: Path) -> None:
    """The kernel does not move them for writes that bypass its cache: it is told."""

    def moved(call: Callable[[], object], *, fd: int) -> bool:
        before = os.fstat(fd)
        time.sleep(0.01)
        call()
        after = os.stat(path)
        assert (after.st_mtime_ns, after.st_ino) == (os.fstat(fd).st_mtime_ns, before.st_ino)
        return after.st_mtime_ns > before.st_mtime_ns and after.st_ctime_ns > before.st_ctime_ns

    with client.open(path, "r+") as file, open(path, "r+b", buffering=0) as other:
        fd = other.fileno()
        assert moved(lambda: os.pwrite(fd, b"new", 0), fd=fd)
        assert moved(lambda: os.pwrite(fd, b"new", 1 << 20), fd=fd)
        assert not moved(lambda: os.pread(fd, 3, 0), fd=fd)
        pin = file.pin(0, BLOCK, write=True)
        pin.map()[:3] = b"DMA"
        assert moved(lambda: pin.close(dirty=True), fd=fd)
        os.utime(path, ns=(10**18, 10**18))
        assert os.stat(path).st_mtime_ns == 10**18
        assert moved(lambda: os.truncate(path, 100), fd=fd)
        assert moved(lambda: os.pwrite(fd, b"new", 0), fd=fd)
        os.utime(path, ns=(10**18, 10**18))
        os.pwrite(fd, b"new", 0)
    eventually("the last close tells it, too", lambda: os.stat(path).st_mtime_ns > 10**18)
