"""System calls as other people, for statements of the form "this call, made by that user, answers so".

`expect(wanted, verb, ...)` makes one call (or `expect(wanted, *chain)` a chain of them on its own descriptors) in a
process that has the identity asked for (`by`: uid, gid, more groups), and compares the answer: 0 or the value for
success, the errno's name for failure; a set means "one of". Identities are helper processes, one for each, started when
first needed; `end_helpers()` ends them. Paths are relative to the current directory.

Verbs that answer a value: stat, lstat and fstat (the fields asked for, one or a tuple), pread and readlink.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.mount.harness import REPOSITORY

TYPES = ("regular", "dir", "fifo", "block", "char", "socket", "symlink")
FILES = tuple(kind for kind in TYPES if kind != "dir")
FOLLOWED = tuple(kind for kind in TYPES if kind != "symlink")
LINKABLE = tuple(kind for kind in FILES if kind != "symlink")
KINDS = {
    stat.S_IFREG: "regular",
    stat.S_IFDIR: "dir",
    stat.S_IFIFO: "fifo",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "char",
    stat.S_IFSOCK: "socket",
    stat.S_IFLNK: "symlink",
}
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100
BAD_ADDRESS = ctypes.c_void_p(0xDEADC0DE)
SUN_PATH = 108  # bytes of a socket's address: longer names are made by mknod
TICK_S = 0.02  # longer than the kernel's coarse clock needs to move

libc = ctypes.CDLL(None, use_errno=True)


def raw(function: str, *arguments: Any) -> int:
    """A libc call with arguments that Python would not let through, such as a bad address."""
    result: int = getattr(libc, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), function)
    return 0


def field(status: os.stat_result, name: str) -> Any:
    if name == "type":
        return KINDS[stat.S_IFMT(status.st_mode)]
    if name == "mode":
        return stat.S_IMODE(status.st_mode)
    if name in ("major", "minor"):
        return getattr(os, name)(status.st_rdev)
    if name == "inode":
        return status.st_ino
    if name in ("atime", "mtime", "ctime"):
        return getattr(status, f"st_{name}_ns") // 10**9
    return getattr(status, f"st_{name}")


class Calls:
    """One chain of calls: it has its own descriptors, closed at its end."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def run(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        method: Callable[..., Any] | None = getattr(self, f"do_{verb}", None)
        result = method(*arguments) if method else getattr(os, verb)(*arguments)
        return 0 if result is None else result

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def do_raw(self, function: str, *arguments: Any) -> int:
        return raw(function, *arguments)

    def do_open(self, path: str, flags: int, mode: int = 0) -> None:
        self.fds.append(os.open(path, flags, mode))

    def do_create(self, path: str, mode: int) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode))

    def do_mknod(self, path: str, kind: str, mode: int, major: int = 1, minor: int = 2) -> None:
        formats = {name: number for number, name in KINDS.items()}
        os.mknod(path, formats[kind] | mode, os.makedev(major, minor))

    def do_bind(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)

    def do_connect(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.connect(path)

    def do_write(self, fd: int, data: bytes) -> int:
        return os.write(self.fds[fd], data) - len(data)

    def do_pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.fds[fd], data, offset) - len(data)

    def do_pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(self.fds[fd], length, offset)

    def do_fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(self.fds[fd], mode)

    def do_fchown(self, fd: int, uid: int, gid: int) -> None:
        os.fchown(self.fds[fd], uid, gid)

    def do_ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(self.fds[fd], size)

    def do_fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        return raw("fallocate64", self.fds[fd], mode, ctypes.c_int64(offset), ctypes.c_int64(length))

    def do_utimens(self, path: str, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> int:
        return raw("utimensat", AT_FDCWD, os.fsencode(path), struct.pack("4q", *atime, *mtime), flags)

    def do_stat(self, path: str, *names: str) -> Any:
        return self.fields(os.stat(path), names)

    def do_lstat(self, path: str, *names: str) -> Any:
        return self.fields(os.lstat(path), names)

    def do_fstat(self, fd: int, *names: str) -> Any:
        return self.fields(os.fstat(self.fds[fd]), names)

    @staticmethod
    def fields(status: os.stat_result, names: tuple[str, ...]) -> Any:
        values = tuple(field(status, name) for name in names)
        return values[0] if len(values) == 1 else values


def answer(chain: list[tuple[Any, ...]], umask: int) -> Any:
    before = os.umask(umask)
    calls = Calls()
    try:
        result: Any = 0
        for verb, *arguments in chain:
            result = calls.run(verb, tuple(arguments))
        return result
    except OSError as problem:
        return errno.errorcode.get(problem.errno or 0, problem.errno)
    finally:
        calls.close()
        os.umask(before)


Identity = tuple[int, ...]  # uid, gid, more groups


class Helper:
    """A process with another identity that answers chains."""

    def __init__(self, who: Identity) -> None:
        words = [sys.executable, "-m", "tests.mount.conformance", *map(str, who)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)

    def __call__(self, chain: list[tuple[Any, ...]], umask: int) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        pickle.dump((os.getcwd(), chain, umask), self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def end(self) -> None:
        self.process.communicate()


def help_as(uid: int, *groups: int) -> None:
    """The helper's side: become somebody else, then answer until there are no more questions."""
    os.setgroups(groups)
    os.setresgid(groups[0], groups[0], groups[0])
    os.setresuid(uid, uid, uid)
    while True:
        try:
            directory, chain, umask = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.chdir(directory)
        pickle.dump(answer(chain, umask), sys.stdout.buffer)
        sys.stdout.buffer.flush()
        os.chdir("/")


helpers: dict[Identity, Helper] = {}


def end_helpers() -> None:
    while helpers:
        helpers.popitem()[1].end()



def ask(*call: Any, by: Identity | None = None, umask: int = 0) -> Any:
    """The answer to one call `verb, arguments...`, or to a chain of such tuples."""
    chain = list(call) if isinstance(call[0], tuple) else [call]
    if by is None:
        return answer(chain, umask)
    if by not in helpers:
        helpers[by] = Helper(by)
    return helpers[by](chain, umask)


def expect(wanted: Any, *call: Any, by: Identity | None = None, umask: int = 0) -> None:
    got = ask(*call, by=by, umask=umask)
    fine = got in wanted if isinstance(wanted, set) else got == wanted
    assert fine, f"{call} by {by or 'root'}: wanted {wanted}, got {got}"


def make(kind: str, path: str, *, mode: int | None = None, owner: tuple[int, int] | None = None) -> None:
    """A file of that kind, with the modes that the calls give it; then chmod and lchown as asked."""
    if kind == "none":
        return
    if kind == "regular":
        expect(0, "create", path, 0o644)
    elif kind == "dir":
        expect(0, "mkdir", path, 0o755)
    elif kind == "socket" and len(os.path.basename(path)) < SUN_PATH:
        expect(0, "bind", path)
    elif kind == "symlink":
        expect(0, "symlink", "test", path)
    else:
        expect(0, "mknod", path, kind, 0o644)
    if mode is not None and kind != "symlink":
        expect(0, "chmod", path, mode)
    if owner is not None:
        expect(0, "lchown", path, *owner)


def remove(kind: str, path: str) -> None:
    if kind != "none":
        expect(0, "rmdir" if kind == "dir" else "unlink", path)


def times(path: str) -> dict[str, int]:
    status = os.lstat(path)
    return {"atime": status.st_atime_ns, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}


class Watch:
    """`with Watch(path, moved=("ctime",), still=("mtime",)):` says which times the body moves and which it must not."""

    def __init__(
        self, path: str, *, moved: tuple[str, ...] = (), still: tuple[str, ...] = (), after: str | None = None
    ) -> None:
        self.path, self.moved, self.still, self.after = path, moved, still, after or path

    def __enter__(self) -> None:
        self.before = times(self.path)
        time.sleep(TICK_S)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            return
        now = times(self.after)
        for name in self.moved:
            assert now[name] > self.before[name], f"{name} of {self.after} did not move"
        for name in self.still:
            assert now[name] == self.before[name], f"{name} of {self.after} moved"


if __name__ == "__main__":
    help_as(*map(int, sys.argv[1:]))
