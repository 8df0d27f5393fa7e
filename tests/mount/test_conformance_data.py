"""Bytes, mappings, directories as lists, special files and locks, statement by statement: what Linux programs count on.

Random data operations are exerciser.py's, errnos of single calls test_errno.py's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import syscalls
from tests.mount.conformance import Watch, end_helpers, expect, libc
from tests.mount.harness import Mounted
from tests.mount.parity import in_child

BLOCK = 4096
U, V = 65534, 65533


@pytest.fixture(autouse=True)
def work(shared_mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared_mount.fresh_directory())


@pytest.fixture(scope="module", autouse=True)
def people() -> Iterator[None]:
    yield
    end_helpers()


@pytest.fixture
def fd() -> Iterator[int]:
    """An empty file, open for reading and writing, named n."""
    fd = os.open("n", os.O_RDWR | os.O_CREAT, 0o666)
    yield fd
    os.close(fd)


def refused(function: Callable[..., object], *arguments: object) -> str | None:
    """The errno's name, or None."""
    try:
        function(*arguments)
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]
    return None


# holes


def seek(fd: int, at: int, whence: int) -> int | None:
    try:
        return os.lseek(fd, at, whence)
    except OSError:
        return None


def test_holes_are_found(fd: int) -> None:
    assert seek(fd, 0, os.SEEK_DATA) is None
    assert seek(fd, 0, os.SEEK_HOLE) is None
    os.pwrite(fd, b"x" * BLOCK, 4 * BLOCK)
    os.pwrite(fd, b"x" * 10, 9 * BLOCK)
    end = 9 * BLOCK + 10
    for at, data, hole in (
        (0, 4 * BLOCK, 0),
        (4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK - 1),
        (4 * BLOCK, 4 * BLOCK, 5 * BLOCK),
        (4 * BLOCK + 7, 4 * BLOCK + 7, 5 * BLOCK),
        (5 * BLOCK, 9 * BLOCK, 5 * BLOCK),
        (9 * BLOCK + 3, 9 * BLOCK + 3, end),
        (end - 1, end - 1, end),
    ):
        assert (seek(fd, at, os.SEEK_DATA), seek(fd, at, os.SEEK_HOLE)) == (data, hole)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        assert refused(os.lseek, fd, end, whence) == "ENXIO"
        assert refused(os.lseek, fd, 1 << 50, whence) == "ENXIO"
        assert refused(os.lseek, fd, -1, whence) == "ENXIO"
    assert os.lseek(fd, -3, os.SEEK_END) == end - 3
    assert refused(os.lseek, fd, -1, os.SEEK_SET) == "EINVAL"
    os.ftruncate(fd, 20 * BLOCK)
    assert seek(fd, 10 * BLOCK, os.SEEK_DATA) is None
    assert seek(fd, 10 * BLOCK, os.SEEK_HOLE) == 10 * BLOCK


def test_punching_makes_holes_and_keeps_the_size(fd: int) -> None:
    os.write(fd, os.urandom(8 * BLOCK))
    before = os.fstat(fd).st_blocks
    syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, 2 * BLOCK, 3 * BLOCK)
    assert os.pread(fd, 3 * BLOCK, 2 * BLOCK) == bytes(3 * BLOCK)
    assert os.fstat(fd).st_size == 8 * BLOCK
    assert os.fstat(fd).st_blocks == before - 3 * 8
    assert seek(fd, 0, os.SEEK_HOLE) == 2 * BLOCK
    assert seek(fd, 2 * BLOCK, os.SEEK_DATA) == 5 * BLOCK
    syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, 0, 1 << 40)
    assert os.fstat(fd).st_size == 8 * BLOCK
    assert os.fstat(fd).st_blocks == 0


def test_preallocated_blocks_read_zero_and_go_with_truncate(fd: int) -> None:
    syscalls.fallocate(fd, syscalls.KEEP_SIZE, 0, 16 * BLOCK)
    assert os.fstat(fd).st_size == 0
    assert os.fstat(fd).st_blocks == 16 * 8
    os.pwrite(fd, b"x", 5 * BLOCK)
    assert os.pread(fd, 6 * BLOCK, 0) == bytes(5 * BLOCK) + b"x"
    os.ftruncate(fd, 5 * BLOCK + 1)
    assert os.fstat(fd).st_blocks <= 16 * 8
    os.ftruncate(fd, 0)
    assert os.fstat(fd).st_blocks == 0
    syscalls.fallocate(fd, 0, BLOCK, BLOCK)
    assert os.fstat(fd).st_size == 2 * BLOCK
    assert os.pread(fd, 3 * BLOCK, 0) == bytes(2 * BLOCK)


# limits


def test_the_file_size_limit_of_the_process() -> None:
    def limited() -> list[str | None]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK, 10 * BLOCK))
        fd = os.open("limited", os.O_RDWR | os.O_CREAT, 0o600)
        answers = [
            refused(os.ftruncate, fd, 10 * BLOCK + 1),
            refused(syscalls.fallocate, fd, 0, 0, 10 * BLOCK + 1),
            refused(os.pwrite, fd, b"x", 10 * BLOCK),
            refused(os.ftruncate, fd, 10 * BLOCK),
        ]
        assert os.pwrite(fd, b"x" * 100, 10 * BLOCK - 50) == 50
        return answers

    assert in_child(limited) == ["EFBIG", "EFBIG", "EFBIG", None]


def test_the_end_of_the_number_line(fd: int) -> None:
    last = (1 << 63) - 1
    assert refused(os.pwrite, fd, b"xx", last) in ("EFBIG", "EINVAL")
    assert refused(os.pwrite, fd, b"xx", last - 1) in ("EFBIG", "EINVAL")
    assert os.pread(fd, 1, last - 1) == b""
    assert refused(syscalls.fallocate, fd, 0, last, 1) == "EFBIG"
    assert refused(syscalls.fallocate, fd, 0, -1, 1) == "EINVAL"
    assert refused(syscalls.fallocate, fd, 0, 0, 0) == "EINVAL"
    assert os.fstat(fd).st_size == 0


# mappings


def test_a_store_through_a_mapping_moves_the_times(fd: int) -> None:
    os.write(fd, b"x" * BLOCK)
    with mmap.mmap(fd, BLOCK) as mapped, Watch("n", moved=("mtime", "ctime")):
        mapped[0:1] = b"y"
        mapped.flush()
    assert os.pread(fd, 1, 0) == b"y"


def test_a_mapping_and_the_calls_agree(fd: int) -> None:
    os.write(fd, b"a" * (4 * BLOCK))
    with mmap.mmap(fd, 4 * BLOCK) as mapped:
        os.pwrite(fd, b"bcd", BLOCK - 1)
        assert mapped[BLOCK - 2 : BLOCK + 3] == b"abcda"
        mapped[10:13] = b"xyz"
        assert os.pread(fd, 5, 9) == b"axyza"
        with open("n", "rb") as again:
            assert again.read(13)[10:] == b"xyz"
        syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, BLOCK, BLOCK)
        assert mapped[BLOCK : 2 * BLOCK] == bytes(BLOCK)
        mapped[BLOCK : BLOCK + 1] = b"n"
        assert os.pread(fd, 2, BLOCK) == b"n\0"
        os.ftruncate(fd, 3 * BLOCK)
        os.ftruncate(fd, 4 * BLOCK)
        assert mapped[3 * BLOCK :] == bytes(BLOCK)


def test_a_private_mapping_is_private(fd: int) -> None:
    os.write(fd, b"a" * BLOCK)
    with mmap.mmap(fd, BLOCK, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[0:1] = b"z"
        assert os.pread(fd, 1, 0) == b"a"
        os.pwrite(fd, b"q", 0)
        assert mapped[0:1] == b"z"


STORE_BEYOND_THE_END = """
import mmap, os
fd = os.open("n", os.O_RDWR)
mapped = mmap.mmap(fd, 8192)
mapped[5000]
os.ftruncate(fd, 100)
mapped[5000] = 1
"""


def test_a_store_beyond_the_end_is_a_signal(fd: int) -> None:
    os.write(fd, b"a" * (2 * BLOCK))
    assert subprocess.run([sys.executable, "-c", STORE_BEYOND_THE_END]).returncode == -signal.SIGBUS


def test_mapped_bytes_outlive_name_and_descriptor() -> None:
    with open("n", "wb+") as file:
        file.write(b"a" * BLOCK)
        file.flush()
        mapped = mmap.mmap(file.fileno(), BLOCK)
    os.unlink("n")
    mapped[7:8] = b"k"
    mapped.flush()
    assert mapped[6:9] == b"aka"
    mapped.close()


# direct I/O


def test_direct_reads_at_the_end(fd: int) -> None:
    os.write(fd, b"d" * (BLOCK + 100))
    direct = os.open("n", os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4 * BLOCK)
    try:
        assert os.preadv(direct, [buffer], 0) == BLOCK + 100
        assert os.preadv(direct, [buffer], BLOCK) == 100
        assert os.preadv(direct, [buffer], 2 * BLOCK) == 0
        assert os.preadv(direct, [buffer], 8 * BLOCK) == 0
        buffer[:BLOCK] = b"e" * BLOCK
        assert os.pwritev(direct, [memoryview(buffer)[:BLOCK]], 2 * BLOCK) == BLOCK
        assert os.fstat(fd).st_size == 3 * BLOCK
        assert os.pread(fd, BLOCK, BLOCK) == b"d" * 100 + bytes(BLOCK - 100)
        assert os.pread(fd, BLOCK, 2 * BLOCK) == b"e" * BLOCK
    finally:
        os.close(direct)


# what a write takes away

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


@pytest.mark.parametrize("how", ["write", "truncate", "chown", "punch", "zero", "open"])
def test_changing_a_file_takes_its_capabilities(how: str, fd: int) -> None:
    os.write(fd, b"x" * (4 * BLOCK))
    os.setxattr("n", "security.capability", CAPABILITY)
    assert os.getxattr("n", "security.capability")
    if how == "write":
        os.pwrite(fd, b"y", 0)
    elif how == "truncate":
        os.truncate("n", 10)
    elif how == "chown":
        os.chown("n", U, U)
    elif how == "open":
        os.close(os.open("n", os.O_WRONLY | os.O_TRUNC))
    else:
        mode = syscalls.PUNCH_HOLE if how == "punch" else syscalls.ZERO_RANGE
        syscalls.fallocate(fd, mode | syscalls.KEEP_SIZE, 0, BLOCK)
    assert refused(os.getxattr, "n", "security.capability") == "ENODATA"


@pytest.mark.parametrize("bits", [0o4000, 0o2000, 0o6000])
def test_every_way_of_writing_clears_set_id_bits(bits: int, fd: int) -> None:
    os.write(fd, b"x" * (4 * BLOCK))
    os.chmod("n", 0o666)
    keep = syscalls.KEEP_SIZE
    for call in (
        ("write", 0, b"x"),
        ("ftruncate", 0, 3 * BLOCK),
        ("ftruncate", 0, 5 * BLOCK),
        ("fallocate", 0, 0, 0, 9 * BLOCK),
        ("fallocate", 0, keep, 0, 10 * BLOCK),
        ("fallocate", 0, keep | syscalls.PUNCH_HOLE, BLOCK, BLOCK),
        ("fallocate", 0, keep | syscalls.ZERO_RANGE, BLOCK, BLOCK),
    ):
        os.chmod("n", bits | 0o777)
        expect(0o777, ("open", "n", os.O_RDWR), call, ("stat", "n", "mode"), by=(U, U))


def test_copying_clears_set_id_bits(fd: int) -> None:
    os.write(fd, b"x" * (4 * BLOCK))
    Path("source").write_bytes(b"s" * BLOCK)
    os.chmod("n", 0o6777)
    os.chmod("source", 0o644)

    def copy() -> None:
        os.setgid(U)
        os.setuid(U)
        source, target = os.open("source", os.O_RDONLY), os.open("n", os.O_WRONLY)
        assert syscalls.copy_range(source, 0, target, 0, BLOCK) == BLOCK

    in_child(copy)
    assert os.stat("n").st_mode & 0o7777 == 0o777


# many at once


APPENDER = """
import os, sys
fd = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for number in range(400):
    os.write(fd, f"{sys.argv[1]} {number:05}\\n".encode())
"""


def test_appends_of_several_processes_all_arrive() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", APPENDER, str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = Path("log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{number} {i:05}" for number in range(4) for i in range(400))
    for number in range(4):
        assert [line for line in lines if line.startswith(f"{number} ")] == [f"{number} {i:05}" for i in range(400)]


def test_writers_of_neighbouring_bytes_do_not_disturb_each_other(fd: int) -> None:
    def write(lane: int) -> None:
        mine = os.open("n", os.O_WRONLY)
        for turn in range(150):
            os.pwrite(mine, bytes([lane + 1]) * 1000, (turn * 4 + lane) * 1000)
        os.close(mine)

    threads = [threading.Thread(target=write, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Path("n").read_bytes() == b"".join(bytes([i % 4 + 1]) * 1000 for i in range(600))


# directories as lists


def test_a_listing_under_change_has_every_lasting_name_once() -> None:
    lasting = {f"lasting-{number:04}" for number in range(1500)}
    os.mkdir("d")
    for number, name in enumerate(sorted(lasting)):
        Path("d", name).touch()
        Path("d", f"old-{number}").touch()
    seen: list[str] = []
    with os.scandir("d") as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            Path("d", f"old-{number}").unlink(missing_ok=True)
            if number < 2000:
                Path("d", f"new-{number}").touch()
    names = [name for name in seen if name in lasting]
    assert len(names) == len(set(names)) == len(lasting)
    assert len(seen) == len(set(seen))


def test_a_listing_ends_although_names_are_renamed_behind_it() -> None:
    os.mkdir("d")
    for number in range(500):
        Path("d", f"f{number}").touch()
    seen = 0
    with os.scandir("d") as entries:
        for entry in entries:
            os.rename(f"d/{entry.name}", f"d/{entry.name}x")
            seen += 1
            assert seen < 5000, "the listing does not end"
    assert len(os.listdir("d")) == 500


def test_a_directory_can_be_read_from_every_position() -> None:
    os.mkdir("d")
    for number in range(700):
        Path("d", f"{'n' * (number % 200)}{number}").touch()
    libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(b"d"))

    def name() -> bytes | None:
        entry = libc.readdir64(stream)
        return ctypes.string_at(entry + 19) if entry else None

    places: list[tuple[int, bytes]] = []
    while True:
        place = libc.telldir(stream)
        found = name()
        if found is None:
            break
        places.append((place, found))
    assert len(places) == 702
    assert {b".", b".."} <= {found for _, found in places}
    for place, found in places[::-7]:
        libc.seekdir(stream, ctypes.c_long(place))
        assert name() == found
    libc.rewinddir(stream)
    assert name() == places[0][1]
    libc.closedir(stream)


def test_types_and_inodes_in_listings_are_those_of_stat() -> None:
    os.mkdir("directory")
    os.symlink("x", "symlink")
    os.mkfifo("fifo")
    os.mknod("device", 0o020644, os.makedev(1, 3))
    Path("file").touch()
    with os.scandir(".") as entries:
        for entry in entries:
            assert entry.inode() == os.lstat(entry.name).st_ino
            assert entry.is_dir(follow_symlinks=False) == (entry.name == "directory")
            assert entry.is_symlink() == (entry.name == "symlink")
            assert entry.is_file(follow_symlinks=False) == (entry.name == "file")


def test_a_removed_directory_takes_nothing_more() -> None:
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    try:
        os.close(os.open("x", os.O_CREAT | os.O_WRONLY, 0o644))
        with pytest.raises(FileNotFoundError):
            os.open("x", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd)
        with pytest.raises(FileNotFoundError):
            os.mkdir("x", dir_fd=fd)
        with pytest.raises(FileNotFoundError):
            os.link("x", "y", dst_dir_fd=fd)
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


# what has no name any more


def test_a_nameless_file_is_still_a_file(fd: int) -> None:
    os.unlink("n")
    os.write(fd, b"x" * 5000)
    os.fchmod(fd, 0o604)
    os.fchown(fd, U, V)
    os.ftruncate(fd, 4500)
    os.utime(fd, ns=(1, 2))
    os.setxattr(fd, "user.a", b"1")
    status = os.fstat(fd)
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid, status.st_size) == (0o604, U, V, 4500)
    assert (status.st_atime_ns, status.st_mtime_ns, status.st_nlink) == (1, 2, 0)
    assert os.getxattr(fd, "user.a") == b"1"
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert os.read(again, 10) == b"x" * 10
    os.close(again)


# special files, locks, moving bytes


def test_bytes_go_through_a_fifo_and_a_socket() -> None:
    os.mkfifo("f")
    reader = os.open("f", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("f", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind("s")
        listener.listen()
        caller.connect("s")
        accepted, _ = listener.accept()
        accepted.sendall(b"hello")
        assert caller.recv(10) == b"hello"
        accepted.close()


def test_locks_exclude_other_processes(fd: int) -> None:
    os.write(fd, b"x" * 100)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)

    def other() -> list[str | None]:
        mine = os.open("n", os.O_RDWR)
        return [
            refused(fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0),
            refused(fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0),
            refused(fcntl.flock, mine, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ]

    assert in_child(other) == ["EAGAIN", None, None]
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert in_child(other) == ["EAGAIN", None, "EAGAIN"]
    fcntl.flock(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_UN)
    assert in_child(other) == [None, None, None]


def test_bytes_are_spliced_and_sent(fd: int) -> None:
    data = os.urandom(200_000)
    os.write(fd, data)
    with open("copy", "wb") as copy:
        sent = 0
        while sent < len(data):
            sent += os.sendfile(copy.fileno(), fd, sent, len(data) - sent)
    assert Path("copy").read_bytes() == data
    reading, writing = os.pipe()
    got = b""
    while len(got) < len(data):
        moved = os.splice(fd, writing, 30_000, offset_src=len(got))
        got += os.read(reading, moved)
    assert got == data
    os.write(writing, b"through a pipe")
    target = os.open("spliced", os.O_RDWR | os.O_CREAT, 0o644)
    assert os.splice(reading, target, 14, offset_dst=5) == 14
    assert Path("spliced").read_bytes() == bytes(5) + b"through a pipe"
    for one in (reading, writing, target):
        os.close(one)


def test_a_written_program_runs() -> None:
    Path("script").write_text("#!/bin/sh\necho $((6 * 7))\n")
    os.chmod("script", 0o755)
    assert subprocess.run(["./script"], capture_output=True).stdout == b"42\n"
    Path("program").write_bytes(Path("/bin/true").read_bytes())
    os.chmod("program", 0o755)
    assert subprocess.run(["./program"]).returncode == 0
    os.chmod("program", 0o644)
    assert refused(os.execv, "./program", ["program"]) == "EACCES"


def test_syncing_anything(fd: int) -> None:
    os.write(fd, b"x" * 100_000)
    os.fsync(fd)
    os.fdatasync(fd)
    syscalls.sync_file_range(fd, 0, 100_000)
    syscalls.syncfs(fd)
    here = os.open(".", os.O_RDONLY)
    os.fsync(here)
    syscalls.syncfs(here)
    os.close(here)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 3, 99_999) == b"x"
    reading = os.open("n", os.O_RDONLY)
    os.fsync(reading)
    os.close(reading)


def test_a_regular_file_is_always_ready(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]


def test_many_attributes() -> None:
    Path("n").touch()
    expected = {}
    for number in range(60):
        name, value = f"user.{'a' * (number % 40)}{number}", os.urandom(number * 37 % 900)
        os.setxattr("n", name, value)
        expected[name] = value
    assert set(os.listxattr("n")) >= set(expected)
    assert {name: os.getxattr("n", name) for name in expected} == expected
    for name in list(expected)[::2]:
        os.removexattr("n", name)
        del expected[name]
    os.setxattr("n", "user.big", big := os.urandom(3000))
    expected["user.big"] = big
    assert {name: os.getxattr("n", name) for name in expected} == expected
    assert {name for name in os.listxattr("n") if name.startswith("user.")} == set(expected)


# handles


class Handle(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("kind", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128)]


def handle_of(path: Path) -> Handle:
    handle = Handle(128)
    mount_id = ctypes.c_int()
    assert not libc.name_to_handle_at(-100, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount_id), 0)
    return handle


def read_by_handle(mount: Path, handle: Handle) -> bytes | str:
    """What is in the file, or the errno's name."""
    directory = os.open(mount, os.O_RDONLY)
    fd = libc.open_by_handle_at(directory, ctypes.byref(handle), os.O_RDONLY)
    os.close(directory)
    if fd < 0:
        return errno.errorcode[ctypes.get_errno()]
    with open(fd, "rb") as file:
        return file.read()


def test_handles_outlive_names_and_mounts(mount: Mounted) -> None:
    (mount.path / "d").mkdir()
    kept, gone = mount.path / "d" / "kept", mount.path / "d" / "gone"
    kept.write_bytes(b"kept")
    gone.write_bytes(b"gone")
    handles = [handle_of(kept), handle_of(gone)]
    assert [read_by_handle(mount.path, handle) for handle in handles] == [b"kept", b"gone"]
    kept.rename(mount.path / "elsewhere")
    gone.unlink()
    mount.remount()
    (mount.path / "new").write_bytes(b"may get the number of the one that is gone")
    assert [read_by_handle(mount.path, handle) for handle in handles] == [b"kept", "ESTALE"]
