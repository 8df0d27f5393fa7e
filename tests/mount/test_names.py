"""Names, links and directories: odd names, every rename, listings under change, many entries; locks and sockets."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.mount import parity, syscalls
from tests.mount.harness import Mounted
from tests.mount.namespace import NamespaceExerciser
from tests.mount.parity import Probe, Recorder


def odd_names(t: Recorder) -> None:
    names = [bytes([c]) for c in range(1, 256) if bytes([c]) not in (b"/", b".")]
    names += [b"n" * 255, b"\xff" * 255, b"...", b".hidden", b"-rf", "ünïcödé".encode(), b"\xc3\x28", b"a\nb", b"%s%n"]
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600))
    t.note("all there", sorted(os.listdir(b".")) == sorted(names))
    for name in names:
        os.rename(name, name[:-1] + b"!" if len(name) == 255 else name + b"!")
    t.note("renamed", sorted(os.listdir(b".")))
    for name in os.listdir(b"."):
        os.unlink(name)
    t.note("none left", os.listdir(b"."))
    t(os.rmdir, b"n" * 255)


def types(t: Recorder) -> None:
    """mknod of every type, device numbers up to the largest, and what listings say they are."""
    numbers = (0, os.makedev(1, 3), os.makedev(259, 300), os.makedev(4095, 1048575))
    for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
        for n, device in enumerate(numbers):
            name = f"{kind:o}-{n}"
            t(os.mknod, name, kind | 0o640, device)
            t(parity.look, name)
    os.mkdir("dir")
    os.symlink("x", "symlink")
    t.note(
        "entry types",
        sorted(
            (e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False), e.is_symlink())
            for e in os.scandir(".")
        ),
    )


def renaming(t: Recorder) -> None:
    def start() -> None:
        for name in ("f", "g"):
            Path(name).write_text(name)
        os.makedirs("d/in")
        os.makedirs("full/in")
        os.mkdir("empty")
        os.symlink("f", "link")
        os.link("f", "hard")

    def clear() -> None:
        for path in sorted(parity.tree(), reverse=True):
            (os.rmdir if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink)(path)

    moves = (
        ("f", "g"), ("f", "new"), ("f", "hard"), ("f", "link"), ("link", "f"), ("d", "empty"), ("d", "full"),
        ("d", "new"), ("d/in", "in"), ("full/in", "d/in"), ("f", "d/in/f"), ("d", "d/in/x"), ("f", "empty"), ("d", "f"),
        ("hard", "d/hard"),
    )  # fmt: skip
    for flags in (0, syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE):
        for old, new in moves:
            start()
            t(syscalls.rename2, old, new, flags)
            t.note("tree", parity.tree())
            t.note("links", os.stat(".").st_nlink)
            clear()


def parents(t: Recorder) -> None:
    """`..` follows a directory that moves; link counts follow subdirectories."""
    os.makedirs("a/b/c")
    os.mkdir("z")
    fd = os.open("a/b/c", os.O_RDONLY)
    for path in (".", "a", "a/b", "z"):
        t.note(f"links of {path}", os.stat(path).st_nlink)
    t(os.rename, "a/b", "z/b")
    for path in (".", "a", "z", "z/b", "z/b/c/.."):
        t.note(f"links of {path}", os.stat(path).st_nlink)
    t.note(".. of the open one", os.path.samestat(os.stat("..", dir_fd=fd), os.stat("z/b")))
    t.note(".. of b", os.path.samestat(os.stat("z/b/.."), os.stat("z")))
    t(syscalls.rename2, "z/b", "a", syscalls.RENAME_EXCHANGE)
    for path in (".", "a", "z", "z/b", "a/c"):
        t.note(f"links of {path}", os.stat(path).st_nlink)
    os.close(fd)


def removed_directory(t: Recorder) -> None:
    """A working directory that has been removed: empty, nothing can be made in it."""
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    home = os.getcwd()
    os.chdir("d")
    os.rmdir("../d")
    t(os.listdir, ".")
    t(os.mkdir, "x")
    t(os.open, "f", os.O_CREAT | os.O_WRONLY)
    t(os.symlink, "a", "b")
    t(os.rename, home, "x")
    t.note("links", os.fstat(fd).st_nlink)
    t.note("listed by descriptor", os.listdir(fd))
    os.chdir(home)
    os.close(fd)
    os.mkdir("d")
    t(os.listdir, "d")


def hard_links(t: Recorder) -> None:
    Path("f").write_text("data")
    os.mkdir("d")
    for n in range(300):
        os.link("f", f"d/{n}")
    t(parity.look, "f")
    os.unlink("f")
    Path("d/7").write_text("new")
    t.note("read", Path("d/200").read_text())
    for n in range(299):
        os.unlink(f"d/{n}")
    t(parity.look, "d/299")
    os.symlink("d", "s")
    os.link("s", "s2", follow_symlinks=False)
    t.note("a symlink's link", (os.readlink("s2"), parity.look("s2")))


def symlinks(t: Recorder) -> None:
    for target in (b"x", b"t" * 100, b"t" * 143, b"t" * 144, b"t" * 145, b"t" * 1000, b"t" * 4095, b"\xff\x01\n"):
        name = b"l%d" % len(target)
        t(os.symlink, target, name)
        t(os.readlink, name)
        t.note("size", os.lstat(name).st_size)
    Path("end").write_text("the end")
    os.symlink("end", "c0")
    for n in range(1, 45):
        os.symlink(f"c{n - 1}", f"c{n}")
    for n in (10, 39, 40, 41):
        t.note(f"chain of {n}", try_read(f"c{n}"))
    os.mkdir("d")
    os.symlink("../end", "d/up")
    t.note("through a directory", try_read("d/up"))
    os.rename("d/up", "up")
    t.note("moved", try_read("up"))
    os.symlink(os.getcwd() + "/end", "absolute")
    t.note("absolute", try_read("absolute"))


def try_read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]


def locks(t: Recorder) -> None:
    """flock, fcntl and open-file-description locks between processes and descriptors."""
    Path("f").write_bytes(bytes(100))
    fd = os.open("f", os.O_RDWR)
    other = os.open("f", os.O_RDWR)

    def attempt(kind: int, start: int = 0, length: int = 0) -> str:
        def work() -> str:
            mine = os.open("f", os.O_RDWR)
            try:
                if length:
                    fcntl.lockf(mine, kind | fcntl.LOCK_NB, length, start)
                else:
                    fcntl.flock(mine, kind | fcntl.LOCK_NB)
            except OSError as problem:
                return errno.errorcode[problem.errno or 0]
            return "ok"

        return str(parity.in_child(work))

    fcntl.flock(fd, fcntl.LOCK_SH)
    t.note("flock shared", (attempt(fcntl.LOCK_SH), attempt(fcntl.LOCK_EX)))
    t(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_UN)
    t(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    t.note("flock exclusive", (attempt(fcntl.LOCK_SH), attempt(fcntl.LOCK_EX)))
    fcntl.flock(other, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 20)
    for start, length in ((0, 20), (10, 11), (25, 1), (29, 5), (30, 1)):
        t.note(f"fcntl [{start}, +{length})", (attempt(fcntl.LOCK_EX, start, length), attempt(fcntl.LOCK_SH, start, length)))
    query = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = parity.in_child(
        lambda: struct.unpack("hhqqixxxx", fcntl.fcntl(os.open("f", os.O_RDWR), fcntl.F_GETLK, query))[:4]
    )
    t.note("F_GETLK", found)
    os.close(other)  # any close of the file drops a process's fcntl locks
    t.note("after a close", attempt(fcntl.LOCK_EX, 20, 10))
    ofd = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 5, 5, 0)
    t.note("F_OFD_SETLK", fcntl.fcntl(fd, 37, ofd) == ofd)
    os.close(os.open("f", os.O_RDWR))
    t.note("an OFD lock stays", attempt(fcntl.LOCK_EX, 5, 5))
    os.close(fd)
    t.note("until the last close", attempt(fcntl.LOCK_EX, 5, 5))


def sockets(t: Recorder) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        server.listen()
        t(parity.look, "s")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("s")
            client.sendall(b"hello")
            with server.accept()[0] as peer:
                t.note("received", peer.recv(100))
        with socket.socket(socket.AF_UNIX) as again:
            t(again.bind, "s")
        os.rename("s", "s2")
        with socket.socket(socket.AF_UNIX) as client:
            t(client.connect, "s2")
    with socket.socket(socket.AF_UNIX) as client:
        t(client.connect, "s2")
    os.unlink("s2")


PROBES: tuple[Probe, ...] = (
    odd_names, types, renaming, parents, removed_directory, hard_links, symlinks, locks, sockets,
)  # fmt: skip


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_same_as_tmpfs(probe: Probe, mount: Mounted, peer: Path) -> None:
    parity.compare(probe, mount.path, peer)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_names(seed: int, mount: Mounted, peer: Path) -> None:
    """3,000 random operations by three users on both; answers and trees compared, then again after a remount."""
    print(f"seed {seed}")
    ours = mount.fresh_directory()
    NamespaceExerciser(ours, peer, seed).run(3000)
    before = parity.tree(ours)
    mount.remount()
    assert not parity.differences(parity.tree(ours), before)


def test_random_names_of_a_fresh_seed(mount: Mounted, peer: Path) -> None:
    seed = int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))
    print(f"seed {seed} (DAXFS_TEST_SEED={seed} runs it again)")
    NamespaceExerciser(mount.fresh_directory(), peer, seed).run(3000)


# -- listings under change ------------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def entries(fd: int, size: int = 1024) -> list[tuple[bytes, int, int]]:
    """One getdents64 call: names, inode numbers, and the position behind each. Small buffers make many calls."""
    buffer = ctypes.create_string_buffer(size)
    count = libc.syscall(217, fd, buffer, size)
    if count < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    found, at = [], 0
    while at < count:
        ino, position, length, _ = struct.unpack_from("<QqHB", buffer, at)
        name = buffer.raw[at + 19 : at + length].split(b"\0", 1)[0]
        found.append((name, ino, position))
        at += length
    return found


def listing(fd: int, size: int = 1024) -> list[bytes]:
    names: list[bytes] = []
    while part := entries(fd, size):
        names += [name for name, _, _ in part]
    return names


def test_listing_is_stable_under_change(mount: Mounted) -> None:
    """Entries that stay are listed exactly once, whatever is created, renamed and removed while the listing goes on."""
    d = mount.path / "d"
    d.mkdir()
    stay = {b"stay-%04d" % n for n in range(500)}
    go = {b"go-%04d" % n for n in range(500)}
    for name in sorted(stay | go, key=lambda n: n[-4:]):
        (d / os.fsdecode(name)).write_bytes(b"")
    fd = os.open(d, os.O_RDONLY)
    seen: list[bytes] = []
    leaving = sorted(go)
    made = 0
    while part := entries(fd):
        seen += [name for name, _, _ in part]
        for _ in range(10):
            if leaving:
                os.unlink(d / os.fsdecode(leaving.pop()))
            (d / f"new-{made}").write_bytes(b"")
            if made % 3 == 0:
                os.rename(d / f"new-{made}", d / f"moved-{made}")
            made += 1
    assert len(seen) == len(set(seen)), "an entry was listed twice"
    assert stay <= set(seen), "an entry that was there all the time was not listed"
    os.lseek(fd, 0, os.SEEK_SET)
    assert sorted(listing(fd)) == sorted([b".", b"..", *map(os.fsencode, os.listdir(d))])
    os.close(fd)


def test_listing_from_any_position(mount: Mounted) -> None:
    """Every position that getdents gave continues the listing there, also after a seek back and forth."""
    d = mount.path / "d"
    d.mkdir()
    for n in range(300):
        (d / f"{'long' * (n % 50)}-{n}").write_bytes(b"")
    fd = os.open(d, os.O_RDONLY)
    all_of_them = []
    while part := entries(fd, 600):
        all_of_them += part
    names = [name for name, _, _ in all_of_them]
    assert names[:2] == [b".", b".."]
    assert len(names) == 302
    for index in (0, 1, 2, 10, 150, 299, 300, 301):
        os.lseek(fd, all_of_them[index][2], os.SEEK_SET)
        assert listing(fd) == names[index + 1 :], index
    inos = {name: ino for name, ino, _ in all_of_them}
    assert all(inos[os.fsencode(n)] == os.lstat(d / n).st_ino for n in os.listdir(d))
    assert inos[b"."] == os.stat(d).st_ino
    assert inos[b".."] == os.stat(mount.path).st_ino
    os.close(fd)


def test_removing_while_listing(mount: Mounted) -> None:
    """What `rm -r` does: remove what is listed, between two reads of the listing; in the end nothing is left."""
    d = mount.path / "d"
    d.mkdir()
    for n in range(2000):
        (d / f"file-{n}").write_bytes(b"")
    fd = os.open(d, os.O_RDONLY)
    while part := entries(fd, 4096):
        for name, _, _ in part:
            if name not in (b".", b".."):
                os.unlink(d / os.fsdecode(name))
    os.close(fd)
    os.rmdir(d)


def test_listing_while_others_change(mount: Mounted) -> None:
    """The same with real concurrency: three processes change the directory while this one lists it again and again."""
    d = mount.path / "d"
    d.mkdir()
    stay = {f"stay-{n}" for n in range(200)}
    for name in stay:
        (d / name).write_bytes(b"")
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                end = time.monotonic() + 2
                n = 0
                while time.monotonic() < end:
                    path = d / f"child-{child}-{n % 50}"
                    path.write_bytes(b"")
                    os.rename(path, f"{path}-x")
                    os.unlink(f"{path}-x")
                    n += 1
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    rounds = 0
    try:
        while not all_ended(children):
            names = os.listdir(d)
            assert len(names) == len(set(names))
            assert stay <= set(names)
            rounds += 1
    finally:
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert rounds > 10
    assert set(os.listdir(d)) == stay


def all_ended(children: list[int]) -> bool:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "a child that changes the directory failed"
            children.remove(pid)
    return not children


@pytest.mark.slow
def test_directory_of_100_000(make_mount: object) -> None:
    """Creating, looking up and removing stay O(1): the last thousands cost about what the first do."""
    mounted = make_mount(size="512M", watchdog_s=240)  # type: ignore[operator]
    d = mounted.path / "d"
    d.mkdir()
    count, step = 100_000, 5000
    home = os.open(d, os.O_RDONLY)
    times = []
    for start in range(0, count, step):
        began = time.perf_counter()
        for n in range(start, start + step):
            os.mknod(f"entry-{n:06d}", stat.S_IFREG | 0o600, dir_fd=home)
        times.append(time.perf_counter() - began)
    assert min(times[-4:]) < 3 * min(times[:4]) + 0.1, f"creating {step}: first {times[:4]}, last {times[-4:]}"
    names = os.listdir(d)
    assert len(names) == len(set(names)) == count
    assert os.stat("entry-099999", dir_fd=home).st_nlink == 1
    with pytest.raises(FileExistsError):
        os.mkdir("entry-050000", dir_fd=home)
    os.close(home)
    mounted.remount()
    home = os.open(d, os.O_RDONLY)
    assert set(os.listdir(d)) == set(names)
    times = []
    for start in range(0, 25_000, step):
        began = time.perf_counter()
        for n in range(start, start + step):
            os.unlink(f"entry-{n * 37 % count:06d}", dir_fd=home)  # all over the directory
        times.append(time.perf_counter() - began)
    assert min(times[-2:]) < 3 * min(times[:2]) + 0.1, f"removing {step}: {times}"
    gone = {f"entry-{n * 37 % count:06d}" for n in range(25_000)}
    assert set(os.listdir(d)) == set(names) - gone
    os.close(home)


def test_racing_for_one_name(mount: Mounted) -> None:
    """Of eight threads that create, link or rename to one name, exactly one wins each round."""
    wins: list[int] = []

    def race(round_: int, me: int, barrier: threading.Barrier) -> None:
        name = mount.path / f"name-{round_}"
        own = mount.path / f"own-{round_}-{me}"
        own.write_text(str(me))
        barrier.wait()
        try:
            match me % 3:
                case 0:
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                case 1:
                    os.link(own, name)
                case _:
                    syscalls.rename2(own, name, syscalls.RENAME_NOREPLACE)
            wins.append(round_)
        except FileExistsError:
            pass

    for round_ in range(40):
        barrier = threading.Barrier(8)
        threads = [threading.Thread(target=race, args=(round_, me, barrier)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(wins) == list(range(40))
