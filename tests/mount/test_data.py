"""Reading and writing: the same probes on daxfs and on tmpfs; what tmpfs cannot do (zero range) against expectations."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
from pathlib import Path

import pytest

from tests.mount import parity, syscalls
from tests.mount.harness import Mounted
from tests.mount.parity import Probe, Recorder

BLOCK = 4096
PUNCH = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE


def pattern(length: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + i // 251 + seed) % 255 + 1 for i in range(length))


def contents(path: str) -> bytes:
    return Path(path).read_bytes()


def appending(t: Recorder) -> None:
    a, b = (os.open("f", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for _ in range(2))
    t(os.write, a, b"one ")
    t(os.write, b, b"two ")
    t(os.lseek, a, 0, os.SEEK_CUR)
    t(os.pwrite, a, b"three", 0)  # Linux appends for pwrite as well
    t(os.lseek, a, 0, os.SEEK_SET)
    t(os.write, a, b" four")
    t(contents, "f")
    os.ftruncate(b, 2)
    t(os.write, a, b"five")
    t(contents, "f")
    os.close(a)
    os.close(b)


def truncating(t: Recorder) -> None:
    Path("f").write_bytes(pattern(3 * BLOCK))
    for size in (2 * BLOCK + 100, 100, 5 * BLOCK, 100_000_000_000, 101, 0, 1):
        t(os.truncate, "f", size)
        t.note(f"size after {size}", os.stat("f").st_size)
        with open("f", "rb") as f:
            t.note(f"head after {size}", f.read(6 * BLOCK))
    with open("f", "r+b") as f:
        f.write(b"x")
    fd = os.open("f", os.O_WRONLY | os.O_TRUNC)
    t.note("size after O_TRUNC", os.fstat(fd).st_size)
    os.close(fd)
    fd = os.open("f", os.O_RDONLY | os.O_CREAT, 0o600)
    t.note("size after O_CREAT", os.fstat(fd).st_size)
    os.close(fd)


def sparse(t: Recorder) -> None:
    """Holes at several scales; where data is and is not."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    places = (0, 10 * BLOCK, 1 << 30, (1 << 40) + 5 * BLOCK, 1 << 50)
    for at in places:
        t(os.pwrite, fd, b"data", at)
    t.note("size", os.fstat(fd).st_size)
    for at in (*places, BLOCK, 11 * BLOCK, (1 << 30) + BLOCK, 2, (1 << 50) + 4, (1 << 50) + 3, 1 << 51):
        t(os.lseek, fd, at, os.SEEK_DATA)
        t(os.lseek, fd, at, os.SEEK_HOLE)
        t(os.pread, fd, 8, at - 4 if at else 0)
    t.note("blocks", os.fstat(fd).st_blocks)
    os.close(fd)


def seeking(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        t(os.lseek, fd, 0, whence)  # of an empty file
    os.ftruncate(fd, 8 * BLOCK)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        t(os.lseek, fd, 0, whence)  # of one hole
    os.pwrite(fd, pattern(2 * BLOCK), 2 * BLOCK)
    os.pwrite(fd, b"x", 6 * BLOCK + 1)
    for at in (0, 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5, 4 * BLOCK, 5 * BLOCK, 6 * BLOCK, 7 * BLOCK, 8 * BLOCK - 1):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            t(os.lseek, fd, at, whence)
    syscalls.fallocate(fd, PUNCH, 2 * BLOCK, BLOCK)
    for at in (0, 2 * BLOCK, 3 * BLOCK):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            t(os.lseek, fd, at, whence)
    os.close(fd)


def punching(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    data = pattern(10 * BLOCK + 77)
    for at, length in (
        (0, 1),
        (0, BLOCK),
        (BLOCK - 1, 2),
        (3 * BLOCK, 2 * BLOCK),
        (10, 9 * BLOCK),
        (9 * BLOCK, 1 << 40),
        (0, 1 << 62),
    ):
        os.pwrite(fd, data, 0)
        t(syscalls.fallocate, fd, PUNCH, at, length)
        t(os.pread, fd, len(data) + 10, 0)
        t.note("size", os.fstat(fd).st_size)
        t.note("blocks", os.fstat(fd).st_blocks)
    os.close(fd)


def allocating(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    for mode, at, length in ((0, 0, 100), (0, 50, BLOCK), (1, BLOCK, 5 * BLOCK), (0, 8 * BLOCK, 1), (1, 20 * BLOCK, 3)):
        t(syscalls.fallocate, fd, mode, at, length)
        t.note("size", os.fstat(fd).st_size)
        t(os.pread, fd, 20 * BLOCK, 0)
    t(os.pwrite, fd, b"in the allocation", 2 * BLOCK - 5)
    t(os.pread, fd, 20 * BLOCK, 0)
    t(os.ftruncate, fd, 100 * BLOCK)
    t.note("all the rest is zeros", set(os.pread(fd, 99 * BLOCK, 3 * BLOCK)))
    t(syscalls.fallocate, fd, 0, 0, 1 << 60)  # no file system has that much
    t.note("size", os.fstat(fd).st_size)
    os.close(fd)


def copying(t: Recorder) -> None:
    a, b = (os.open(n, os.O_RDWR | os.O_CREAT, 0o600) for n in "ab")
    os.pwrite(a, pattern(5 * BLOCK + 99), 0)
    for args in (
        (0, 0, 10),
        (1, BLOCK - 1, BLOCK),
        (0, 0, 1 << 40),
        (5 * BLOCK, 20 * BLOCK, BLOCK),
        (6 * BLOCK, 0, 10),
        (0, 7, 0),
    ):
        t.note(f"copy {args}", syscalls.copy_range(a, args[0], b, args[1], args[2]))
        t(contents, "b")
    t.note("within", syscalls.copy_range(a, 0, a, 3 * BLOCK, BLOCK))
    t(contents, "a")
    os.pwrite(a, b"x", 1 << 30)
    t.note("a long hole", syscalls.copy_range(a, 8 * BLOCK, b, 0, 4 * BLOCK))
    t(contents, "b")
    os.close(a)
    os.close(b)


def vectors(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    t(os.writev, fd, [b"a" * 3000, b"", b"b" * 3000, b"c"])
    t(os.pwritev, fd, [b"x", b"y"], 4095)
    parts = [bytearray(4096), bytearray(10), bytearray(4096)]
    t.note("preadv", os.preadv(fd, parts, 1))
    t.note("parts", parts)
    t(os.write, fd, b"")
    t(os.pread, fd, 0, 0)
    t(os.pread, fd, 10, 1 << 40)
    t(os.pwrite, fd, b"", 1 << 40)  # writes nothing, grows nothing
    t.note("size", os.fstat(fd).st_size)
    os.close(fd)


def large_requests(t: Recorder) -> None:
    data = pattern(BLOCK) * 1200  # 4.7 MiB: several requests for the daemon
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    t(os.pwrite, fd, data, 3)
    t.note("read back", os.pread(fd, len(data) + 100, 3) == data)
    t.note("read at odd places", [os.pread(fd, 1_500_001, at) == data[at - 3 :][:1_500_001] for at in (3, 4095, 1_048_577)])
    os.close(fd)


def unlinked(t: Recorder) -> None:
    """A file lives on without a name; so does its link count."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.link("f", "g")
    os.write(fd, pattern(3 * BLOCK))
    os.unlink("f")
    t.note("one name left", parity.look(fd))
    os.unlink("g")
    t.note("none left", parity.look(fd))
    t(os.pwrite, fd, b"more", 4 * BLOCK)
    t(os.pread, fd, 10 * BLOCK, 0)
    t(os.ftruncate, fd, 2 * BLOCK)
    t(os.fchmod, fd, 0o640)
    t(os.setxattr, fd, "user.a", b"b")
    t(os.getxattr, fd, "user.a")
    t(syscalls.fallocate, fd, PUNCH, 0, BLOCK)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    t(os.pread, again, 10 * BLOCK, 0)
    with mmap.mmap(again, 2 * BLOCK) as view:
        view[5:8] = b"map"
        t(os.pread, fd, 16, 0)
    t.note("a new file of that name is another", (Path("f").write_bytes(b"new"), os.fstat(fd).st_size))
    os.close(fd)
    t.note("again", parity.look(again))
    os.close(again)
    t(sorted, os.listdir())


def nameless(t: Recorder) -> None:
    """O_TMPFILE: no name, until linkat gives it one; O_EXCL forbids that."""
    os.mkdir("d")
    fd = os.open("d", os.O_TMPFILE | os.O_RDWR, 0o640)
    t(parity.look, fd)
    t(os.write, fd, pattern(BLOCK + 1))
    t(os.listdir, "d")
    t(syscalls.link_fd, fd, "d/named")
    t(parity.look, "d/named")
    t(contents, "d/named")
    t(syscalls.link_fd, fd, "again")
    t(parity.look, fd)
    os.close(fd)
    t(contents, "again")
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    t.note("exclusive", fails(lambda: syscalls.link_fd(fd, "never")))
    os.close(fd)


def fails(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]
    return "ok"


def mapping_shared(t: Recorder) -> None:
    """What is stored through a mapping is read by read, and the other way round, at once."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, pattern(4 * BLOCK))
    with mmap.mmap(fd, 0) as one, mmap.mmap(fd, 0) as two:
        one[BLOCK - 2 : BLOCK + 2] = b"maps"
        t(os.pread, fd, 8, BLOCK - 4)
        t.note("the other mapping", bytes(two[BLOCK - 4 : BLOCK + 4]))
        os.pwrite(fd, b"written", 2 * BLOCK)
        t.note("after write", bytes(one[2 * BLOCK : 2 * BLOCK + 8]))
        syscalls.fallocate(fd, PUNCH, 0, BLOCK)
        t.note("after punch", bytes(one[: BLOCK + 4]))
        os.ftruncate(fd, 3 * BLOCK + 5)
        os.ftruncate(fd, 4 * BLOCK)
        t.note("after truncate down and up", bytes(one[3 * BLOCK :]))
        one[3 * BLOCK + 1 :] = bytes([7]) * (BLOCK - 1)
        one.flush()
        t(os.pread, fd, BLOCK, 3 * BLOCK)
        other = os.open("g", os.O_RDWR | os.O_CREAT, 0o600)
        t(syscalls.copy_range, fd, 3 * BLOCK, other, 0, 100)
        t(contents, "g")
        t(syscalls.copy_range, other, 0, fd, 10, 50)
        t.note("after a copy into it", bytes(two[:100]))
        os.close(other)
    os.close(fd)
    t(contents, "f")


def mapping_private(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, pattern(2 * BLOCK))
    with mmap.mmap(fd, 0, mmap.MAP_PRIVATE) as view:
        view[:4] = b"mine"
        os.pwrite(fd, b"file", 0)
        os.pwrite(fd, b"seen", BLOCK)
        t.note("private stays", bytes(view[:4]))
        t.note("untouched pages show the file", bytes(view[BLOCK : BLOCK + 4]))
    t(os.pread, fd, 4, 0)
    os.close(fd)
    fd = os.open("f", os.O_RDONLY)
    t.note("shared writable of a read-only descriptor", fails(lambda: mmap.mmap(fd, 10)))
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        t.note("read-only mapping", bytes(view[:10]))
    os.close(fd)
    fd = os.open("f", os.O_WRONLY)
    t.note("of a write-only descriptor", fails(lambda: mmap.mmap(fd, 10)))
    os.close(fd)


def mapping_survives(t: Recorder) -> None:
    """A mapping outlives its descriptor and the file's name; a child shares it."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, pattern(BLOCK))
    view = mmap.mmap(fd, 0)
    os.close(fd)
    view[:5] = b"after"
    t(contents, "f")
    os.unlink("f")
    parity.in_child(lambda: view.__setitem__(slice(5, 10), b"child"))
    t.note("seen", bytes(view[:12]))
    view.close()


def mapping_beyond_the_end(t: Recorder) -> None:
    """SIGBUS for pages that the file does not have any more."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, pattern(4 * BLOCK))
    for at in (0, BLOCK - 1, BLOCK, 3 * BLOCK):
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                with mmap.mmap(fd, 4 * BLOCK) as view:
                    os.ftruncate(fd, 100)
                    os._exit(view[at] != 0)
            finally:
                os._exit(99)
        t.note(f"at {at}", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.ftruncate(fd, 4 * BLOCK)
    os.close(fd)


def direct(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    plain = os.open("f", os.O_RDWR)
    with mmap.mmap(-1, 4 * BLOCK) as memory:
        memory[:] = pattern(4 * BLOCK)
        t.note("write", os.pwritev(fd, [memory], BLOCK))
        t(os.pread, plain, 10 * BLOCK, 0)
        os.pwrite(plain, b"plain", BLOCK + 10)
        memory[:] = bytes(4 * BLOCK)
        t.note("read", os.preadv(fd, [memory], 2 * BLOCK))
        t.note("data", bytes(memory))
        t.note("read at the end", os.preadv(fd, [memory], 5 * BLOCK))
        with mmap.mmap(plain, 5 * BLOCK) as view:
            view[BLOCK : BLOCK + 6] = b"mapped"
            os.preadv(fd, [memory], BLOCK)
            t.note("direct read of what was mapped", bytes(memory[:12]))
            memory[:7] = b"by dma "
            os.pwritev(fd, [memory], BLOCK)
            t.note("mapping after a direct write", bytes(view[BLOCK : BLOCK + 12]))
    os.close(fd)
    os.close(plain)


def syncing(t: Recorder) -> None:
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o600)
    t(os.write, fd, pattern(10_000))
    for call in (os.fsync, os.fdatasync, syscalls.syncfs):
        t.note(call.__name__, call(fd))
    t(syscalls.sync_file_range, fd, 0, 4096)
    for advice in range(6):
        t(os.posix_fadvise, fd, 0, 0, advice)
    os.close(fd)
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    t(os.fsync, fd)
    os.close(fd)
    t(contents, "f")


def pipes(t: Recorder) -> None:
    """sendfile, splice both ways, and a fifo on the file system itself."""
    Path("f").write_bytes(pattern(100_000))
    source, target = os.open("f", os.O_RDONLY), os.open("g", os.O_RDWR | os.O_CREAT, 0o600)
    done = 0
    while done < 100_000:
        done += os.sendfile(target, source, done, 100_000 - done)
    t(contents, "g")
    out, into = os.pipe()
    t.note("splice in", os.splice(source, into, 5000, offset_src=4000))
    t.note("splice out", os.splice(out, target, 5000, offset_dst=100))
    t(contents, "g")
    for fd in (source, target, out, into):
        os.close(fd)
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("fifo", os.O_WRONLY)
    t.note("fifo", (os.write(writer, b"through the fifo"), os.read(reader, 100)))
    os.close(writer)
    t.note("hung up", bool(select.select([reader], [], [], 0)[0]))
    os.close(reader)


PROBES: tuple[Probe, ...] = (
    appending, truncating, sparse, seeking, punching, allocating, copying, vectors, large_requests, unlinked, nameless,
    mapping_shared, mapping_private, mapping_survives, mapping_beyond_the_end, direct, syncing, pipes,
)  # fmt: skip


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_same_as_tmpfs(probe: Probe, mount: Mounted, peer: Path) -> None:
    parity.compare(probe, mount.path, peer)


@pytest.mark.parametrize("keep", [0, syscalls.KEEP_SIZE], ids=["grow", "keep_size"])
def test_zero_range(mount: Mounted, keep: int) -> None:
    """Whole blocks become unwritten, edges are zeroed, the rest stays; the size grows unless it is kept."""
    data = pattern(10 * BLOCK)
    path = mount.path / "f"
    for at, length in (
        (0, 1),
        (1, BLOCK),
        (BLOCK, BLOCK),
        (BLOCK + 7, 5 * BLOCK),
        (9 * BLOCK + 1, 3 * BLOCK),
        (20 * BLOCK, 10),
    ):
        path.write_bytes(data)
        with open(path, "r+b") as file:
            syscalls.fallocate(file.fileno(), syscalls.ZERO_RANGE | keep, at, length)
        end = len(data) if keep else max(len(data), at + length)
        want = bytearray(data.ljust(max(end, at + length), b"\0"))
        want[at : at + length] = bytes(length)
        assert path.read_bytes() == want[:end], (at, length)
        assert os.stat(path).st_blocks >= 8 * 10


def test_seek_sees_unwritten_as_a_hole(mount: Mounted) -> None:
    """Preallocated blocks read as zeros and are holes for SEEK_DATA, until they are written (as on ext4 and XFS)."""
    with open(mount.path / "f", "w+b") as file:
        fd = file.fileno()
        syscalls.fallocate(fd, 0, 0, 8 * BLOCK)
        assert os.fstat(fd).st_blocks == 64
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert fails(lambda: os.lseek(fd, 0, os.SEEK_DATA)) == "ENXIO"
        os.pwrite(fd, b"x", 3 * BLOCK)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 3 * BLOCK
        assert os.lseek(fd, 3 * BLOCK, os.SEEK_HOLE) == 4 * BLOCK
        assert os.pread(fd, 8 * BLOCK, 0) == bytes(3 * BLOCK) + b"x" + bytes(5 * BLOCK - 1)


def test_full_volume(make_mount: object) -> None:
    """ENOSPC; everything stays readable, unlink works, and the space comes back."""
    mounted = make_mount(size="16M")  # type: ignore[operator]
    kept = mounted.path / "kept"
    kept.write_bytes(pattern(100_000))
    with open(mounted.path / "filler", "wb", buffering=0) as filler:
        written = 0
        chunk = pattern(64 * 1024)
        with pytest.raises(OSError, match="No space") as full:
            while written < 64 << 20:
                written += filler.write(chunk)
        assert full.value.errno == errno.ENOSPC
        assert os.fstat(filler.fileno()).st_size == written, "the size counts what was written, no more"
    assert written > 8 << 20
    assert os.statvfs(mounted.path).f_bavail == 0
    assert kept.read_bytes() == pattern(100_000)
    assert (mounted.path / "filler").read_bytes() == (chunk * (written // len(chunk) + 1))[:written]
    with pytest.raises(OSError, match="No space"):
        (mounted.path / "another").write_bytes(pattern(10 * BLOCK))
    os.unlink(mounted.path / "filler")
    (mounted.path / "again").write_bytes(chunk * 100)
    assert (mounted.path / "again").read_bytes() == chunk * 100


def test_data_survives_a_remount(mount: Mounted) -> None:
    files = {f"f{n}": pattern(n * 3001, n) for n in range(40)}
    for name, data in files.items():
        (mount.path / name).write_bytes(data)
    with open(mount.path / "sparse", "w+b") as file:
        for n in range(200):  # more extents than fit in the inode
            os.pwrite(file.fileno(), pattern(100, n), n * 3 * BLOCK)
    before = parity.tree(mount.path)
    mount.remount()
    assert parity.tree(mount.path) == before
    assert all((mount.path / name).read_bytes() == data for name, data in files.items())
