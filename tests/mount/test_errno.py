"""The errno table: every verb, every way in which it is refused. Each row is run on the daxfs mount and on tmpfs; both must
answer what the row says, so a wrong row shows on tmpfs."""

from __future__ import annotations

import errno
import fcntl
import inspect
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount import parity, syscalls
from tests.mount.harness import Mounted

LONG = b"n" * 255
TOO_LONG = b"n" * 256
TOO_LONG_PATH = b"/".join([b"d" * 100] * 41)
VALID_ACL = bytes.fromhex("02000000 01000700ffffffff 04000700ffffffff 20000700ffffffff")
Row = tuple[str, Callable[..., Any], tuple[Any, ...]]


def plant() -> None:
    """The tree that the rows talk about, in the current directory."""
    Path("file").write_bytes(b"12345678")
    Path("other").write_bytes(b"other")
    for name in ("dir", "empty", "full", "full/child", "closed", "sticky"):
        os.mkdir(name)
    Path("full/file").write_bytes(b"")
    Path("closed/file").write_bytes(b"")
    os.symlink("file", "link")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    os.symlink("dir", "dirlink")
    os.mkfifo("fifo")
    os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
    Path("mine").write_bytes(b"mine")
    os.chown("mine", 1000, 1000)
    os.mkdir("home")
    os.chown("home", 1000, 1000)
    Path("home/file").write_bytes(b"")
    os.chown("home/file", 1000, 1000)
    Path("sticky/root").write_bytes(b"")
    os.mkdir("sticky/rootdir")
    os.chmod("sticky", 0o1777)
    os.chmod("closed", 0o700)
    Path("secret").write_bytes(b"secret")
    os.chmod("secret", 0o600)
    Path("readable").write_bytes(b"x")
    Path("program").write_bytes(b"#!/bin/true\n")


def opened(flags: int, path: str | bytes, mode: int = 0o600) -> None:
    os.close(os.open(path, flags, mode))


def with_fd(work: Callable[[int], Any], path: str = "file", flags: int = os.O_RDWR) -> Any:
    fd = os.open(path, flags)
    try:
        return work(fd)
    finally:
        os.close(fd)


def on(work: Callable[[int], Any], path: str = "file", flags: int = os.O_RDWR) -> tuple[Any, ...]:
    return (work, path, flags)


R, W, RW, CREAT, EXCL, TRUNC = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_EXCL, os.O_TRUNC
MAX = (1 << 63) - 1

PATH_TROUBLES: tuple[tuple[str, bytes], ...] = (
    ("ENOENT", b"nowhere/x"),
    ("ENOENT", b"dangling/x"),
    ("ENOENT", b""),
    ("ENOTDIR", b"file/x"),
    ("ENOTDIR", b"link/x"),
    ("ENOTDIR", b"fifo/x"),
    ("ELOOP", b"loop/x"),
    ("ELOOP", b"loop1/x"),
    ("ENAMETOOLONG", TOO_LONG),
    ("ENAMETOOLONG", b"dir/" + TOO_LONG),
    ("ENAMETOOLONG", TOO_LONG_PATH),
)
PATH_VERBS: tuple[tuple[str, Callable[[bytes], Any]], ...] = (
    ("stat", os.stat),
    ("lstat", os.lstat),
    ("open", lambda p: opened(R, p)),
    ("creat", lambda p: opened(W | CREAT | TRUNC, p)),
    ("mkdir", os.mkdir),
    ("mknod", lambda p: os.mknod(p, stat.S_IFIFO)),
    ("symlink", lambda p: os.symlink(b"t", p)),
    ("link from", lambda p: os.link(p, b"fresh")),
    ("link to", lambda p: os.link(b"file", p)),
    ("rename from", lambda p: os.rename(p, b"fresh")),
    ("rename to", lambda p: os.rename(b"other", p)),
    ("exchange", lambda p: syscalls.rename2(p, b"other", syscalls.RENAME_EXCHANGE)),
    ("noreplace", lambda p: syscalls.rename2(b"other", p, syscalls.RENAME_NOREPLACE)),
    ("unlink", os.unlink),
    ("rmdir", os.rmdir),
    ("truncate", lambda p: os.truncate(p, 0)),
    ("chmod", lambda p: os.chmod(p, 0o700)),
    ("chown", lambda p: os.chown(p, 0, 0)),
    ("lchown", lambda p: os.lchown(p, 0, 0)),
    ("utimens", lambda p: syscalls.utimens(p, (0, 0), (0, 0))),
    ("readlink", os.readlink),
    ("statvfs", os.statvfs),
    ("listdir", os.listdir),
    ("access", lambda p: opened(os.O_PATH, p)),
    ("setxattr", lambda p: os.setxattr(p, "user.a", b"")),
    ("getxattr", lambda p: os.getxattr(p, "user.a")),
    ("listxattr", os.listxattr),
    ("removexattr", lambda p: os.removexattr(p, "user.a")),
)

ROWS: list[Row] = [
    # open and create
    ("ENOENT", opened, (R, "nowhere")),
    ("ENOENT", opened, (R, "dangling")),
    ("EEXIST", opened, (RW | CREAT | EXCL, "file")),
    ("EEXIST", opened, (RW | CREAT | EXCL, "dangling")),
    ("EEXIST", opened, (RW | CREAT | EXCL, "dir")),
    ("EISDIR", opened, (W, "dir")),
    ("EISDIR", opened, (RW, "dir")),
    ("EISDIR", opened, (R | CREAT, "dir")),
    ("EISDIR", opened, (R | TRUNC, "dir")),
    ("EISDIR", opened, (R | CREAT, "fresh/")),
    ("ENOTDIR", opened, (R, "file/")),
    ("ENOTDIR", opened, (R | os.O_DIRECTORY, "file")),
    ("ENOTDIR", opened, (R | os.O_DIRECTORY, "fifo")),
    ("EINVAL", opened, (R | CREAT | os.O_DIRECTORY, "fresh")),
    ("ELOOP", opened, (R | os.O_NOFOLLOW, "link")),
    ("ELOOP", opened, (R | os.O_NOFOLLOW, "dangling")),
    ("ENOTDIR", opened, (R | os.O_NOFOLLOW | os.O_DIRECTORY, "dirlink")),
    ("ELOOP", opened, (R, "loop")),
    ("ENXIO", opened, (W | os.O_NONBLOCK, "fifo")),
    ("ENXIO", opened, (R, "socket")),
    ("ok", opened, (R, "device")),
    ("EINVAL", opened, (R | os.O_TMPFILE, "dir")),  # O_TMPFILE needs write access
    ("ENOTDIR", opened, (RW | os.O_TMPFILE, "file")),
    ("ENOENT", opened, (RW | os.O_TMPFILE, "nowhere")),
    ("ENAMETOOLONG", opened, (RW | CREAT, TOO_LONG)),
    ("ok", opened, (RW | CREAT, LONG)),
    # mkdir, mknod, symlink
    ("EEXIST", os.mkdir, ("dir",)),
    ("EEXIST", os.mkdir, ("file",)),
    ("EEXIST", os.mkdir, ("dangling",)),
    ("EEXIST", os.mkdir, ("dir/.",)),
    ("EEXIST", os.mkdir, ("dir/..",)),
    ("EEXIST", os.mknod, ("file", stat.S_IFREG)),
    ("EEXIST", os.mknod, ("link", stat.S_IFIFO)),
    ("EPERM", os.mknod, ("fresh", stat.S_IFDIR)),
    ("EINVAL", os.mknod, ("fresh", stat.S_IFLNK)),
    ("EEXIST", os.symlink, ("x", "file")),
    ("EEXIST", os.symlink, ("x", "dangling")),
    ("ENOENT", os.symlink, ("", "fresh")),
    ("ENAMETOOLONG", os.symlink, (b"t" * 4096, "fresh")),
    ("ok", os.symlink, (b"t" * 4095, "longest")),
    # link
    ("EEXIST", os.link, ("file", "other")),
    ("EEXIST", os.link, ("file", "file")),
    ("EPERM", os.link, ("dir", "fresh")),
    ("ENOENT", os.link, ("file", "fresh/")),
    # unlink and rmdir
    ("EISDIR", os.unlink, ("dir",)),
    ("EISDIR", os.unlink, ("full/..",)),
    ("ENOTDIR", os.unlink, ("file/",)),
    ("ENOTDIR", os.unlink, ("link/",)),
    ("ENOTDIR", os.unlink, ("dirlink/",)),
    ("ENOENT", os.unlink, ("nowhere",)),
    ("ENOTEMPTY", os.rmdir, ("full",)),
    ("ENOTEMPTY", os.rmdir, ("full/child/..",)),
    ("EINVAL", os.rmdir, ("empty/.",)),
    ("ENOTDIR", os.rmdir, ("file",)),
    ("ENOTDIR", os.rmdir, ("dirlink",)),
    ("ENOTDIR", os.rmdir, ("dirlink/",)),
    ("ENOTDIR", os.rmdir, ("dangling",)),
    ("ENOENT", os.rmdir, ("nowhere",)),
    # rename
    ("ENOTEMPTY", os.rename, ("empty", "full")),
    ("ENOTDIR", os.rename, ("dir", "file")),
    ("EISDIR", os.rename, ("file", "empty")),
    ("EINVAL", os.rename, ("full", "full/child/x")),
    ("EINVAL", os.rename, ("full", "full/x")),
    ("ENOTEMPTY", os.rename, ("full/child", "full")),
    ("EBUSY", os.rename, ("dir/.", "fresh")),
    ("EBUSY", os.rename, ("file", "dir/..")),
    ("ENOTDIR", os.rename, ("file", "fresh/")),
    ("ENOTDIR", os.rename, ("file/", "fresh")),
    ("ENOENT", os.rename, ("nowhere", "file")),
    ("ok", os.rename, ("file", "file")),
    ("ok", os.rename, ("dir", "dir")),
    ("EEXIST", syscalls.rename2, ("file", "other", 1)),
    ("EEXIST", syscalls.rename2, ("file", "file", 1)),
    ("EEXIST", syscalls.rename2, ("file", "dangling", 1)),
    ("ENOENT", syscalls.rename2, ("nowhere", "other", 1)),
    ("ENOENT", syscalls.rename2, ("file", "nowhere", 2)),
    ("EINVAL", syscalls.rename2, ("full", "full/child", 2)),
    ("EINVAL", syscalls.rename2, ("full/child", "full", 2)),
    ("EINVAL", syscalls.rename2, ("file", "other", 3)),
    ("EINVAL", syscalls.rename2, ("file", "other", 8)),
    ("EINVAL", syscalls.rename2, ("file", "other", 6)),
    # truncate and the largest file
    ("EINVAL", os.truncate, ("file", -1)),
    ("EISDIR", os.truncate, ("dir", 0)),
    ("EINVAL", os.truncate, ("fifo", 0)),
    ("EINVAL", os.truncate, ("device", 0)),
    ("EINVAL", with_fd, on(lambda fd: os.ftruncate(fd, -1))),
    ("EINVAL", with_fd, on(lambda fd: os.ftruncate(fd, 0), flags=R)),
    # read, write, lseek
    ("EBADF", with_fd, on(lambda fd: os.read(fd, 1), flags=W)),
    ("EBADF", with_fd, on(lambda fd: os.write(fd, b"x"), flags=R)),
    ("EISDIR", with_fd, on(lambda fd: os.read(fd, 1), "dir", R)),
    ("EBADF", with_fd, on(lambda fd: os.write(fd, b"x"), "dir", R)),
    ("EINVAL", with_fd, on(lambda fd: os.pread(fd, 1, -1))),
    ("EINVAL", with_fd, on(lambda fd: os.pwrite(fd, b"x", -1))),
    ("EINVAL", with_fd, on(lambda fd: os.lseek(fd, -1, os.SEEK_SET))),
    ("EINVAL", with_fd, on(lambda fd: os.lseek(fd, -9, os.SEEK_END))),
    ("EINVAL", with_fd, on(lambda fd: os.lseek(fd, 0, 99))),
    ("ENXIO", with_fd, on(lambda fd: os.lseek(fd, 8, os.SEEK_DATA))),
    ("ENXIO", with_fd, on(lambda fd: os.lseek(fd, 8, os.SEEK_HOLE))),
    ("ENXIO", with_fd, on(lambda fd: os.lseek(fd, 1 << 60, os.SEEK_DATA))),
    ("ENXIO", with_fd, on(lambda fd: os.lseek(fd, -1, os.SEEK_DATA))),
    ("ENXIO", with_fd, on(lambda fd: os.lseek(fd, -1, os.SEEK_HOLE))),
    ("EINVAL", with_fd, on(lambda fd: os.pwrite(fd, b"x", MAX))),
    ("EBADF", with_fd, on(lambda fd: os.read(fd, 1), flags=os.O_PATH)),
    ("EBADF", with_fd, on(lambda fd: os.fchmod(fd, 0o600), flags=os.O_PATH)),
    # fallocate
    ("EINVAL", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, -1, 10))),
    ("EINVAL", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, 0, 0))),
    ("EINVAL", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, 0, -1))),
    ("EFBIG", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, MAX, 1))),
    ("EFBIG", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, MAX - 10, 100))),
    ("EBADF", with_fd, on(lambda fd: syscalls.fallocate(fd, 0, 0, 10), flags=R)),
    ("EOPNOTSUPP", with_fd, on(lambda fd: syscalls.fallocate(fd, syscalls.PUNCH_HOLE, 0, 4096))),
    ("EOPNOTSUPP", with_fd, on(lambda fd: syscalls.fallocate(fd, syscalls.COLLAPSE_RANGE, 0, 4096))),
    ("EOPNOTSUPP", with_fd, on(lambda fd: syscalls.fallocate(fd, syscalls.INSERT_RANGE, 0, 4096))),
    ("EOPNOTSUPP", with_fd, on(lambda fd: syscalls.fallocate(fd, 1 << 20, 0, 4096))),
    # copy_file_range
    ("EINVAL", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 4, 8))),
    ("EINVAL", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 100, 1, 1))),
    ("EBADF", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 100, 1), flags=R)),
    ("EBADF", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 100, 1), flags=W)),
    ("EBADF", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 100, 1), flags=RW | os.O_APPEND)),
    ("EISDIR", with_fd, on(lambda fd: syscalls.copy_range(fd, 0, fd, 100, 1), "dir", R)),
    # xattrs
    ("ENODATA", os.getxattr, ("file", "user.none")),
    ("ENODATA", os.removexattr, ("file", "user.none")),
    ("ENODATA", os.setxattr, ("file", "user.none", b"", os.XATTR_REPLACE)),
    ("EOPNOTSUPP", os.getxattr, ("file", "none.x")),
    ("EOPNOTSUPP", os.setxattr, ("file", "none.x", b"")),
    ("EOPNOTSUPP", os.setxattr, ("file", "user", b"")),
    ("EINVAL", os.setxattr, ("file", "user.", b"")),
    ("ERANGE", os.setxattr, ("file", "", b"")),
    ("ERANGE", os.setxattr, ("file", b"user." + b"n" * 251, b"")),
    ("ok", os.setxattr, ("file", b"user." + b"n" * 250, b"")),
    ("E2BIG", os.setxattr, ("file", "user.big", b"x" * 65537)),
    ("EINVAL", os.setxattr, ("file", "user.a", b"", 4)),
    ("EPERM", os.setxattr, ("fifo", "user.a", b"")),
    ("EPERM", os.setxattr, ("device", "user.a", b"")),
    ("ENODATA", os.getxattr, ("fifo", "user.a")),
    ("ENODATA", os.getxattr, ("file", "system.posix_acl_access")),
    ("EACCES", os.setxattr, ("file", "system.posix_acl_default", VALID_ACL)),
    ("EINVAL", os.setxattr, ("file", "system.posix_acl_access", b"\2\0\0\0odd")),
    ("EOPNOTSUPP", os.setxattr, ("file", "system.posix_acl_access", bytes.fromhex("03000000"))),
    # readlink, directories
    ("EINVAL", os.readlink, ("file",)),
    ("EINVAL", os.readlink, ("dir",)),
    ("ENOTDIR", os.listdir, ("file",)),
    ("ENOTDIR", os.chdir, ("file",)),
    ("ELOOP", os.chdir, ("loop",)),
    # ioctls that are not ours
    ("ENOTTY", with_fd, on(lambda fd: fcntl.ioctl(fd, 0x5401, bytearray(64)))),
    ("ENOTTY", with_fd, on(lambda fd: fcntl.ioctl(fd, 0x1234, 0))),
]  # fmt: skip

# As uid 1000 and gid 1000, in a tree that root owns but for mine, home, sticky.
USER_ROWS: list[Row] = [
    ("EACCES", opened, (R, "secret")),
    ("EACCES", opened, (W, "readable")),
    ("EACCES", opened, (R | TRUNC, "readable")),
    ("EACCES", opened, (R, "closed/file")),
    ("EACCES", os.stat, ("closed/file",)),
    ("EACCES", os.listdir, ("closed",)),
    ("EACCES", os.chdir, ("closed",)),
    ("EACCES", opened, (RW | CREAT, "dir/fresh")),
    ("EACCES", os.mkdir, ("dir/fresh",)),
    ("EACCES", os.mknod, ("dir/fresh", stat.S_IFIFO)),
    ("EACCES", os.symlink, ("x", "dir/fresh")),
    ("EACCES", os.link, ("mine", "dir/fresh")),
    ("EACCES", os.unlink, ("full/file",)),
    ("EACCES", os.rmdir, ("full/child",)),
    ("EACCES", os.rename, ("full/file", "home/x")),
    ("EACCES", os.rename, ("home/file", "full/x")),
    ("EACCES", syscalls.rename2, ("home/file", "full/file", 2)),
    ("EACCES", os.rename, ("full", "home/x")),
    ("EEXIST", os.mkdir, ("dir",)),
    ("EPERM", os.mknod, ("home/device", stat.S_IFCHR, os.makedev(1, 3))),
    ("EPERM", os.mknod, ("home/device", stat.S_IFBLK, os.makedev(8, 0))),
    ("ok", os.mknod, ("home/nulldev", stat.S_IFCHR, 0)),
    ("ok", os.mknod, ("home/fifo", stat.S_IFIFO)),
    ("EPERM", os.unlink, ("sticky/root",)),
    ("EPERM", os.rmdir, ("sticky/rootdir",)),
    ("EPERM", os.rename, ("sticky/root", "sticky/x")),
    ("EPERM", os.rename, ("sticky/root", "home/x")),
    ("EPERM", os.rename, ("home/file", "sticky/root")),
    ("EPERM", syscalls.rename2, ("home/file", "sticky/root", 2)),
    ("EPERM", os.chmod, ("readable", 0o777)),
    ("EPERM", os.chmod, ("dir", 0o777)),
    ("EPERM", os.chown, ("mine", 1001, -1)),
    ("EPERM", os.chown, ("mine", -1, 2000)),
    ("EPERM", os.chown, ("mine", 0, 0)),
    ("EPERM", os.chown, ("readable", 1000, -1)),
    ("EPERM", os.chown, ("readable", -1, 1000)),
    ("ok", os.chown, ("mine", 1000, 1000)),
    ("ok", os.chown, ("mine", -1, 3000)),
    ("ok", os.chown, ("mine", -1, -1)),
    ("EACCES", os.truncate, ("readable", 0)),
    ("EPERM", syscalls.utimens, ("readable", (1, 0), (1, 0))),
    ("EACCES", syscalls.utimens, ("readable", syscalls.UTIME_NOW, syscalls.UTIME_NOW)),
    ("EACCES", syscalls.utimens_now, ("readable",)),
    ("EPERM", syscalls.utimens, ("readable", syscalls.UTIME_NOW, syscalls.UTIME_OMIT)),
    ("ok", syscalls.utimens, ("readable", syscalls.UTIME_OMIT, syscalls.UTIME_OMIT)),
    ("ok", syscalls.utimens, ("mine", (1, 0), (2, 0))),
    ("EACCES", os.setxattr, ("readable", "user.a", b"")),
    ("EACCES", os.getxattr, ("secret", "user.a")),
    ("EACCES", os.removexattr, ("readable", "user.a")),
    ("EPERM", os.setxattr, ("mine", "trusted.a", b"")),
    ("ENODATA", os.getxattr, ("mine", "trusted.a")),
    ("EPERM", os.setxattr, ("sticky", "user.a", b"")),
    ("EPERM", os.setxattr, ("readable", "system.posix_acl_access", VALID_ACL)),
    ("EPERM", opened, (R | os.O_NOATIME, "readable")),
    ("ok", opened, (R | os.O_NOATIME, "mine")),
    ("EACCES", os.execv, ("program", ["program"])),
    ("EACCES", opened, (RW | os.O_TMPFILE, "dir")),
]  # fmt: skip


def answer(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    try:
        function(*args)
    except OSError as problem:
        return errno.errorcode.get(problem.errno or 0, str(problem.errno)).replace("ENOTSUP", "EOPNOTSUPP")
    return "ok"


def judge(rows: list[Row]) -> list[str]:
    wrong = []
    for want, function, args in rows:
        got = answer(function, args)
        if got != want:
            what = inspect.getsource(args[0]).strip() if callable(args[0]) else f"{function.__name__}{parity.brief(args)}"
            wrong.append(f"{what}: {got}, should be {want}")
    return wrong


def judge_in(directory: Path, rows: list[Row], uid: int = 0, groups: tuple[int, ...] = ()) -> list[str]:
    def work() -> list[str]:
        os.umask(0o022)
        os.chdir(directory)
        plant()
        if uid:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        return judge(rows)

    result: list[str] = parity.in_child(work)
    return result


def both(mount: Mounted, peer: Path, rows: list[Row], **more: Any) -> None:
    wrong = [f"tmpfs: {line}" for line in judge_in(peer, rows, **more)]
    wrong += [f"daxfs: {line}" for line in judge_in(mount.path, rows, **more)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_refusals_of_root(mount: Mounted, peer: Path) -> None:
    both(mount, peer, ROWS)


def test_refusals_of_a_user(mount: Mounted, peer: Path) -> None:
    both(mount, peer, USER_ROWS, uid=1000, groups=(3000,))


def test_largest_file(mount: Mounted) -> None:
    """2^63-1 minus the last 64 KiB, sparse; one byte more is EFBIG, whatever the verb."""
    largest = (1 << 63) - 1 - 65535
    with open(mount.path / "file", "w+b") as file, open(mount.path / "small", "w+b") as small:
        fd = file.fileno()
        small.write(b"small")
        small.flush()
        os.ftruncate(fd, largest)
        assert os.fstat(fd).st_size == largest
        for wrong in (
            lambda: os.ftruncate(fd, largest + 1),
            lambda: os.pwrite(fd, b"x", largest),
            lambda: os.pwrite(fd, b"xx", (1 << 63) - 10),
            lambda: syscalls.fallocate(fd, 0, largest, 1),
            lambda: syscalls.fallocate(fd, 0, largest - 4096, 4097),
            lambda: syscalls.copy_range(small.fileno(), 0, fd, largest, 5),
        ):
            assert answer(wrong, ()) == "EFBIG", inspect.getsource(wrong)
        assert os.pwrite(fd, b"end", largest - 3) == 3
        assert os.pwrite(fd, b"both sides", largest - 4) == 4, "a write is cut short at the limit"
        assert os.pread(fd, 100, largest - 8) == b"\0\0\0\0both"
        assert os.lseek(fd, 0, os.SEEK_DATA) == largest - 4096
        assert os.lseek(fd, 0, os.SEEK_END) == largest
        assert os.fstat(fd).st_blocks == 8
        os.ftruncate(fd, 0)
        assert os.fstat(fd).st_blocks == 0


@pytest.mark.parametrize("verb", [name for name, _ in PATH_VERBS])
def test_paths_that_lead_nowhere(verb: str, shared_mount: Mounted, shared_peer: Path) -> None:
    """Every verb over every bad path answers as tmpfs does, and as the table says where the verb resolves the path."""
    function = dict(PATH_VERBS)[verb]

    def probe(t: parity.Recorder) -> None:
        plant()
        for _, path in PATH_TROUBLES:
            t(function, path)
        t.note("nothing was made", sorted(os.listdir()))

    parity.compare(probe, shared_mount.fresh_directory(), shared_mount.fresh_directory(shared_peer))


def test_running_program_is_busy(mount: Mounted, peer: Path) -> None:
    """ETXTBSY both ways: writing what runs, running what is open for writing."""

    def probe(t: parity.Recorder) -> None:
        with open("/bin/sleep", "rb") as source:
            Path("sleep").write_bytes(source.read())
        os.chmod("sleep", 0o755)
        fd = os.open("sleep", os.O_WRONLY)
        t.note("run while open for writing", spawn("./sleep"))
        os.close(fd)
        pid = os.posix_spawn("./sleep", ["sleep", "60"], {})
        try:
            t(opened, W, "sleep")
            t(opened, W | TRUNC, "sleep")
            t(opened, R | TRUNC, "sleep")
            t(lambda: os.stat("sleep").st_size)
            t(os.truncate, "sleep", 0)
            t(opened, R, "sleep")
            t(os.unlink, "sleep")
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

    def spawn(path: str) -> str:
        try:
            pid = os.posix_spawn(path, [path, "0"], {})
        except OSError as problem:
            return errno.errorcode[problem.errno or 0]
        os.waitpid(pid, 0)
        return "ran"

    parity.compare(probe, mount.path, peer)


def test_read_only_mount(mount: Mounted) -> None:
    """EROFS for everything that would change something; reading works."""
    with parity.working_in(mount.path):
        plant()
    mount.remount("ro")
    changes: list[Row] = [
        ("EROFS", opened, (W, "file")),
        ("EROFS", opened, (RW | CREAT, "fresh")),
        ("EROFS", opened, (R | TRUNC, "file")),
        ("EROFS", opened, (RW | os.O_TMPFILE, "dir")),
        ("EROFS", os.mkdir, ("fresh",)),
        ("EROFS", os.mknod, ("fresh", stat.S_IFIFO)),
        ("EROFS", os.symlink, ("x", "fresh")),
        ("EROFS", os.link, ("file", "fresh")),
        ("EROFS", os.unlink, ("file",)),
        ("EROFS", os.rmdir, ("empty",)),
        ("EROFS", os.rename, ("file", "fresh")),
        ("EROFS", syscalls.rename2, ("file", "other", 2)),
        ("EROFS", os.truncate, ("file", 0)),
        ("EROFS", os.chmod, ("file", 0o600)),
        ("EROFS", os.chown, ("file", 1, 1)),
        ("EROFS", syscalls.utimens, ("file", (0, 0), (0, 0))),
        ("EROFS", os.setxattr, ("file", "user.a", b"")),
        ("EROFS", os.removexattr, ("file", "user.a")),
        ("ok", opened, (R, "file")),
        ("ok", os.listdir, (".",)),
        ("EEXIST", os.mkdir, ("dir",)),
    ]
    with parity.working_in(mount.path):
        wrong = judge(changes)
        assert Path("file").read_bytes() == b"12345678"
    assert not wrong, "\n".join(wrong)
