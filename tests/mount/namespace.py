"""Random operations on names, done on two directories at once: every answer is compared, and now and then the whole trees.

    python -m tests.mount.namespace OURS THEIRS --seed 7 --operations 5000

Both directories start empty; THEIRS is on tmpfs (or any file system one believes). Needs root: operations are done as one of
three users, with different umasks. Names collide on purpose, most paths exist, some pass through symlinks, loops or files.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import stat
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.mount import parity, syscalls

NAMES = (
    *(bytes([c]) for c in b"abcdefgh"), b"long" + b"n" * 251, b"\xff\xfe\x80", b"line\nbreak", b" ", b"...", b"x" * 256,
)  # fmt: skip
USERS = (*[(0, 0, ())] * 4, (1000, 1000, (2000,)), (1001, 1001, (2000, 1000)))
MODES = (*[0o777] * 8, *[0o666] * 4, 0o755, 0o700, 0o644, 0o600, *[0o1777] * 3, *[0o2777] * 3)
MODES += (0o2775, 0o2755, 0o4755, 0o6711, 0o2644, 0o000, 0o070, 0o007, 0o7777)
# Files get no sgid here: when it goes without group execute FUSE cannot tell, see test_attributes.py (losing_suid).
FILE_MODES = tuple(mode & ~stat.S_ISGID for mode in MODES)
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
OPENS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
MORE_FLAGS = (os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_APPEND, os.O_NOATIME)
HISTORY = 50

Work = Callable[[bytes], Any]


class Mismatch(AssertionError):
    """The two directories answered differently."""


def acl(entries: list[tuple[int, int, int]]) -> bytes:
    """An ACL as the xattr holds it, of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


class NamespaceExerciser:
    def __init__(self, ours: str | os.PathLike[str], theirs: str | os.PathLike[str], seed: int) -> None:
        self.roots = (os.fsencode(ours), os.fsencode(theirs))
        self.seed = seed
        self.random = random.Random(seed)
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.known: list[bytes] = []
        self.open: list[tuple[int, int]] = []  # the same file on both sides
        self.operations: dict[Callable[[], tuple[str, Work]], int] = {
            self.mkdir: 10, self.mknod: 4, self.create: 14, self.symlink: 5, self.link: 6, self.tmpfile: 2,
            self.unlink: 8, self.rmdir: 5, self.rename: 14, self.truncate: 3, self.write: 5, self.chmod: 6, self.chown: 4,
            self.utimens: 3, self.setxattr: 4, self.removexattr: 2, self.setacl: 5, self.access: 3, self.stat: 6,
            self.readlink: 2, self.listdir: 3,
        }  # fmt: skip

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, operations: int, *, compare_every: int = 250) -> None:
        kinds, weights = list(self.operations), list(self.operations.values())
        for root in self.roots:
            os.chmod(root, 0o777)
        try:
            for count in range(1, operations + 1):
                user, umask = self.random.choice(USERS), self.random.choice((0o022, 0o002, 0o077, 0))
                text, work = self.random.choices(kinds, weights)[0]()
                text = re.sub(r"(.)\1{30,}", r"\1\1\1~", text)
                self.history.append(f"{count} uid {user[0]} umask {umask:03o}: {text}")
                with acting_as(*user, umask):
                    answers = [self.answer(work, root) for root in self.roots]
                self.history[-1] += f" = {parity.brief(answers[0])}"
                if answers[0] != answers[1]:
                    raise Mismatch(f"{text}: {answers[0]!r}, on tmpfs {answers[1]!r}")
                self.hold(user[0])
                if count % compare_every == 0 or count == operations:
                    self.compare_trees()
        except Mismatch as problem:
            steps = "\n  ".join(self.history)
            raise Mismatch(f"{problem}\n  seed {self.seed} in {self.roots[0]!r}; what led to it:\n  {steps}") from None
        finally:
            self.drop()

    def answer(self, work: Work, root: bytes) -> Any:
        try:
            return work(root + b"/")
        except OSError as problem:
            return errno.errorcode.get(problem.errno or 0, problem.errno)

    def compare_trees(self) -> None:
        ours, theirs = (parity.tree(root) for root in self.roots)
        wrong = parity.differences(ours, theirs)
        for mine, peer in self.open:
            if parity.look(mine) != parity.look(peer):
                wrong.append(f"open file: {parity.look(mine)}, on tmpfs {parity.look(peer)}")
        if wrong:
            raise Mismatch("the trees differ:\n  " + "\n  ".join(wrong[:20]))
        self.known = list(ours)

    def hold(self, uid: int) -> None:
        """Now and then keep a file open, or let one go: unlinked files live on."""
        if self.random.random() < 0.05 and self.known and uid == 0:
            path = self.random.choice(self.known)
            try:
                pair = [os.open(root + b"/" + path, os.O_PATH | os.O_NOFOLLOW) for root in self.roots]
            except OSError:
                return
            self.open.append((pair[0], pair[1]))
        if len(self.open) > 20:
            for fd in self.open.pop(0):
                os.close(fd)

    def drop(self) -> None:
        for pair in self.open:
            for fd in pair:
                os.close(fd)
        self.open = []

    # -- choices ----------------------------------------------------------------------------------------------------

    def path(self, wanted: int = 0) -> bytes:
        """A path: mostly one that exists (of the wanted type), sometimes a random one."""
        path = b"/".join(self.random.choices(NAMES, k=self.random.choice((1, 1, 2, 3))))
        if self.known and self.random.random() < 0.93:
            for _ in range(8):
                path = self.random.choice(self.known)
                if (found := self.type_of(path)) and wanted in (0, found):
                    break
        if self.random.random() < 0.01 and b".." not in path:  # twice would lead out of the root
            path += self.random.choice((b"/", b"/.", b"/..", b"//x", b"/x"))
        return path

    def new(self) -> bytes:
        """Mostly a name that is free in a directory that exists."""
        path = self.path()
        if self.random.random() < 0.85:
            name = self.random.choice(NAMES)
            path = name if self.random.random() < 0.3 else self.path(stat.S_IFDIR) + b"/" + name
        self.known.append(path)
        if len(self.known) > 400:
            del self.known[self.random.randrange(len(self.known))]
        return path

    def type_of(self, path: bytes) -> int:
        """Type bits, 0 if it is not there."""
        try:
            return stat.S_IFMT(os.lstat(self.roots[1] + b"/" + path).st_mode)
        except OSError:
            return 0

    # -- operations: each makes its choices once and returns what to do on each side ----------------------------------

    def mkdir(self) -> tuple[str, Work]:
        path, mode = self.new(), self.random.choice(MODES)
        return f"mkdir {path!r} {mode:o}", lambda root: os.mkdir(root + path, mode)

    def mknod(self) -> tuple[str, Work]:
        path, mode = self.new(), self.random.choice(FILE_MODES)
        kind = self.random.choice((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))
        device = os.makedev(self.random.choice((0, 1, 8, 259)), self.random.choice((0, 3, 1 << 18)))
        return f"mknod {path!r} {kind | mode:o} {device:#x}", lambda root: os.mknod(root + path, kind | mode, device)

    def create(self) -> tuple[str, Work]:
        path, mode = (self.new() if self.random.random() < 0.6 else self.path(stat.S_IFREG)), self.random.choice(FILE_MODES)
        flags = self.random.choice(OPENS) | os.O_NONBLOCK | os.O_NOCTTY
        for more in self.random.sample(MORE_FLAGS, self.random.randint(0, 3)):
            flags |= more

        def work(root: bytes) -> object:
            fd = os.open(root + path, flags, mode)
            try:
                return parity.look(fd)
            finally:
                os.close(fd)

        return f"open {path!r} {flags:#o} {mode:o}", work

    def tmpfile(self) -> tuple[str, Work]:
        where, path, mode = self.path(stat.S_IFDIR), self.new(), self.random.choice(FILE_MODES)

        def work(root: bytes) -> object:
            fd = os.open(root + where, os.O_TMPFILE | os.O_RDWR, mode)
            try:
                os.write(fd, b"once nameless")
                syscalls.link_fd(fd, root + path)
                return parity.look(fd)
            finally:
                os.close(fd)

        return f"O_TMPFILE in {where!r} {mode:o}, link to {path!r}", work

    def symlink(self) -> tuple[str, Work]:
        path = self.new()
        target = self.random.choice((self.path(), b"./" + self.path(), b"nowhere", b"t" * 1000, path.split(b"/")[-1], b""))
        return f"symlink {target!r} {path!r}", lambda root: os.symlink(target, root + path)

    def link(self) -> tuple[str, Work]:
        old, new, follow = self.path(self.random.choice((0, stat.S_IFREG))), self.new(), self.random.random() < 0.3
        return f"link {old!r} {new!r} follow={follow}", lambda root: os.link(root + old, root + new, follow_symlinks=follow)

    def unlink(self) -> tuple[str, Work]:
        path = self.path(self.random.choice((stat.S_IFREG, stat.S_IFLNK, 0)))
        return f"unlink {path!r}", lambda root: os.unlink(root + path)

    def rmdir(self) -> tuple[str, Work]:
        path = self.path(stat.S_IFDIR)
        return f"rmdir {path!r}", lambda root: os.rmdir(root + path)

    def rename(self) -> tuple[str, Work]:
        old = self.path()
        flags = self.random.choice((*[0] * 8, 1, 2, 2, 2, 3, 16))
        new = self.path() if flags == 2 or self.random.random() < 0.4 else self.new()
        return f"rename {old!r} {new!r} flags {flags}", lambda root: syscalls.rename2(root + old, root + new, flags)

    def truncate(self) -> tuple[str, Work]:
        path, size = self.path(stat.S_IFREG), self.random.choice((0, 1, 4096, 5000, 100_000))
        return f"truncate {path!r} {size}", lambda root: os.truncate(root + path, size)

    def write(self) -> tuple[str, Work]:
        path, data, at = (
            self.path(stat.S_IFREG),
            self.random.randbytes(self.random.randint(1, 9000)),
            self.random.choice((0, 100, 9000)),
        )

        def work(root: bytes) -> object:
            fd = os.open(root + path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                return os.pwrite(fd, data, at), parity.look(fd)
            finally:
                os.close(fd)

        return f"write {path!r} {len(data)} bytes at {at}", work

    def chmod(self) -> tuple[str, Work]:
        path = self.path()
        mode = self.random.choice(MODES if self.type_of(path) == stat.S_IFDIR else FILE_MODES)
        return f"chmod {path!r} {mode:o}", lambda root: os.chmod(root + path, mode)

    def chown(self) -> tuple[str, Work]:
        path, follow = self.path(), self.random.random() < 0.5
        uid, gid = self.random.choice((-1, 0, 1000, 1001)), self.random.choice((-1, 0, 1000, 2000))
        if uid == gid == -1:
            uid = 0  # changing nothing is special on FUSE: test_attributes.py
        return (
            f"chown {path!r} {uid}:{gid} follow={follow}",
            lambda root: os.chown(root + path, uid, gid, follow_symlinks=follow),
        )

    def utimens(self) -> tuple[str, Work]:
        path, follow = self.path(), self.random.random() < 0.5
        when = self.random.choice((0, 1_000_000_001, 1 << 60, -5_000_000_000))
        times = (divmod(when, 10**9), self.random.choice((syscalls.UTIME_OMIT, divmod(when + 7, 10**9))))

        def work(root: bytes) -> object:
            syscalls.utimens(root + path, *times, follow=follow)
            s = os.stat(root + path, follow_symlinks=follow)
            return (s.st_atime_ns, s.st_mtime_ns) if isinstance(times[1], tuple) else s.st_atime_ns

        return f"utimens {path!r} {times} follow={follow}", work

    def setxattr(self) -> tuple[str, Work]:
        path, name = (
            self.path(),
            self.random.choice(("user.a", "user.b", "trusted.t", "user." + "n" * 250, "bad.x", "user.", "user")),
        )
        value, flags = self.random.randbytes(self.random.choice((0, 1, 10, 300, 3000))), self.random.choice((0, 0, 1, 2))
        return f"setxattr {path!r} {name} {len(value)} {flags}", lambda root: os.setxattr(root + path, name, value, flags)

    def removexattr(self) -> tuple[str, Work]:
        path, name = self.path(), self.random.choice(("user.a", "user.b", "trusted.t", ACCESS, DEFAULT))
        return f"removexattr {path!r} {name}", lambda root: os.removexattr(root + path, name)

    def setacl(self) -> tuple[str, Work]:
        """A valid ACL: owner, named users and groups, mask when there are any, others."""
        path, name = self.path(), self.random.choice((ACCESS, ACCESS, DEFAULT))
        pick = self.random.randrange
        users = sorted(self.random.sample((1000, 1001, 1002), self.random.randint(0, 2)))
        groups = sorted(self.random.sample((1000, 2000), self.random.randint(0, 1)))
        none = 0xFFFFFFFF
        entries = [
            (1, pick(8), none),
            *((2, pick(8), u) for u in users),
            (4, pick(8), none),
            *((8, pick(8), g) for g in groups),
        ]
        if users or groups or pick(3) == 0:
            entries.append((0x10, pick(8), none))
        entries.append((0x20, pick(8), none))
        if pick(10) == 0:
            entries.pop(pick(len(entries)))  # sometimes one that is not valid
        value = acl(entries)
        return f"setxattr {path!r} {name} {entries}", lambda root: os.setxattr(root + path, name, value)

    def access(self) -> tuple[str, Work]:
        path, mode = self.path(), self.random.randrange(8)
        return f"access {path!r} {mode}", lambda root: os.access(root + path, mode, effective_ids=True)

    def stat(self) -> tuple[str, Work]:
        path = self.path()
        return f"stat {path!r}", lambda root: (parity.look(root + path), os.stat(root + path).st_mode)

    def readlink(self) -> tuple[str, Work]:
        path = self.path(stat.S_IFLNK)
        return f"readlink {path!r}", lambda root: os.readlink(root + path)

    def listdir(self) -> tuple[str, Work]:
        path = self.path(stat.S_IFDIR)
        return f"listdir {path!r}", lambda root: sorted((e.name, kind(e)) for e in os.scandir(root + path))


def kind(entry: os.DirEntry[bytes]) -> str:
    """From d_type alone, without a stat."""
    if entry.is_symlink():
        return "symlink"
    return (
        "directory" if entry.is_dir(follow_symlinks=False) else "file" if entry.is_file(follow_symlinks=False) else "special"
    )


@contextmanager
def acting_as(uid: int, gid: int, groups: tuple[int, ...], umask: int) -> Iterator[None]:
    before = os.getgroups()
    old_umask = os.umask(umask)
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
        os.umask(old_umask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours")
    parser.add_argument("theirs")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--operations", type=int, default=5_000)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.operations} operations", flush=True)
    try:
        NamespaceExerciser(options.ours, options.theirs, options.seed).run(options.operations)
    except Mismatch as problem:
        sys.exit(f"FAILED: {problem}")
    print("ok")


if __name__ == "__main__":
    main()
