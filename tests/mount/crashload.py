"""Load for crash tests: random calls on one directory, each known to be done, not done, or under way when the daemon died.

A `Worker` keeps a model of its directory. The model changes when a call has returned; the call under way at the crash is
remembered. After the next mount the directory must be exactly the model, or the model with that one call carried out in
whole. One thing is allowed in between: bytes that a write or copy overwrites in place may be new though the call is not
finished (data is overwritten in place, D4); its size, blocks and everything else may not.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.mount import parity, syscalls

NAMES = tuple(bytes([c]) * n for c in b"abcde" for n in (1, 20))
SIZE_MAX = 96 * 1024
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ECONNREFUSED)
Tree = dict[bytes, dict[str, object]]


@dataclass
class Node:
    mode: int
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Call:
    """One system call: what it does to the file system, and what to the model."""

    text: str
    do: Callable[[], None]
    apply: Callable[[dict[bytes, Node]], None]
    torn: tuple[bytes, int, int] | None = None  # path and range of what is overwritten in place


class Worker:
    def __init__(self, root: str | os.PathLike[str], seed: int) -> None:
        self.root = os.fsencode(root)
        self.random = random.Random(seed)
        self.names: dict[bytes, Node] = {}  # path -> node; hard links share one
        self.pending: Call | None = None
        self.done = 0
        self.last: list[str] = []

    # -- load -------------------------------------------------------------------------------------------------------

    def run(self, *, at_most: int = 1 << 30) -> None:
        """Call until the daemon is gone. Any other failure is one of the file system."""
        self.pending = None
        for _ in range(at_most):
            call = self.choose()
            self.pending = call
            self.last = [*self.last[-15:], call.text]
            try:
                call.do()
            except OSError as problem:
                if problem.errno in GONE:
                    return
                raise AssertionError(f"{call.text}: {problem}") from problem
            call.apply(self.names)
            self.pending = None
            self.done += 1

    def choose(self) -> Call:
        makers = (
            (self.create, 12), (self.mkdir, 5), (self.symlink, 3), (self.link, 4), (self.remove, 9), (self.rename, 8),
            (self.exchange, 3), (self.write, 20), (self.append, 8), (self.truncate, 8), (self.punch, 6), (self.zero, 4),
            (self.allocate, 4), (self.copy, 5), (self.chmod, 3), (self.setxattr, 4), (self.sync, 1),
        )  # fmt: skip
        while True:
            maker = self.random.choices([m for m, _ in makers], [w for _, w in makers])[0]
            if (call := maker()) is not None:
                return call

    def path(self, name: bytes) -> bytes:
        return self.root + b"/" + name

    def some(self, kind: int = 0) -> bytes | None:
        found = [p for p, node in self.names.items() if kind in (0, stat.S_IFMT(node.mode))]
        return self.random.choice(found) if found else None

    def free_name(self) -> bytes | None:
        folders = [b"", *(p + b"/" for p, node in self.names.items() if stat.S_ISDIR(node.mode) and p.count(b"/") < 3)]
        path = self.random.choice(folders) + self.random.choice(NAMES)
        return None if path in self.names else path

    def span(self, size: int) -> tuple[int, int]:
        at = self.random.randint(0, size)
        if self.random.random() < 0.4:
            at -= at % 4096
        length = self.random.choice((100, 4096, 5000, 20_000, 60_000))
        return at, max(1, min(length, SIZE_MAX - at))

    # -- calls ------------------------------------------------------------------------------------------------------

    def create(self) -> Call | None:
        if (path := self.free_name()) is None or len(self.names) > 60:
            return None
        mode = self.random.choice((0o600, 0o644, 0o755))

        def do() -> None:
            fd = syscall_open(self.path(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            close_quietly(fd)

        return Call(f"create {path!r}", do, lambda names: names.update({path: Node(stat.S_IFREG | mode)}))

    def mkdir(self) -> Call | None:
        if (path := self.free_name()) is None:
            return None
        return Call(
            f"mkdir {path!r}",
            lambda: os.mkdir(self.path(path), 0o755),
            lambda names: names.update({path: Node(stat.S_IFDIR | 0o755)}),
        )

    def symlink(self) -> Call | None:
        if (path := self.free_name()) is None:
            return None
        target = b"t" * self.random.choice((5, 200, 3000))
        return Call(
            f"symlink {path!r}",
            lambda: os.symlink(target, self.path(path)),
            lambda names: names.update({path: Node(stat.S_IFLNK | 0o777, target=target)}),
        )

    def link(self) -> Call | None:
        old, new = self.some(stat.S_IFREG), self.free_name()
        if old is None or new is None:
            return None
        return Call(
            f"link {old!r} {new!r}",
            lambda: os.link(self.path(old), self.path(new)),
            lambda names: names.update({new: names[old]}),
        )

    def remove(self) -> Call | None:
        path = self.some()
        if path is None or any(p.startswith(path + b"/") for p in self.names):
            return None
        remove = os.rmdir if stat.S_ISDIR(self.names[path].mode) else os.unlink

        def apply(names: dict[bytes, Node]) -> None:
            del names[path]

        return Call(f"{remove.__name__} {path!r}", lambda: remove(self.path(path)), apply)

    def rename(self) -> Call | None:
        """To a free name, or over a file."""
        old = self.some()
        new = self.free_name() if self.random.random() < 0.5 else self.some(stat.S_IFREG)
        if old is None or new is None or old == new or new.startswith(old + b"/"):
            return None
        over = self.names.get(new)
        if over is not None and (stat.S_ISDIR(self.names[old].mode) or over is self.names[old]):
            return None

        def apply(names: dict[bytes, Node]) -> None:
            names.pop(new, None)
            move(names, {old: new})

        return Call(f"rename {old!r} {new!r}", lambda: os.rename(self.path(old), self.path(new)), apply)

    def exchange(self) -> Call | None:
        a, b = self.some(), self.some()
        if a is None or b is None or a == b or a.startswith(b + b"/") or b.startswith(a + b"/"):
            return None
        if self.names[a] is self.names[b]:
            return None
        return Call(
            f"exchange {a!r} {b!r}",
            lambda: syscalls.rename2(self.path(a), self.path(b), syscalls.RENAME_EXCHANGE),
            lambda names: move(names, {a: b, b: a}),
        )

    def write(self) -> Call | None:
        if (path := self.some(stat.S_IFREG)) is None:
            return None
        at, length = self.span(min(len(self.names[path].data) + 8192, SIZE_MAX - 1))
        return self._write(path, at, self.random.randbytes(length), os.O_WRONLY)

    def append(self) -> Call | None:
        path = self.some(stat.S_IFREG)
        if path is None or len(self.names[path].data) > SIZE_MAX - 20_000:
            return None
        data = self.random.randbytes(self.random.choice((10, 4096, 20_000)))
        return self._write(path, len(self.names[path].data), data, os.O_WRONLY | os.O_APPEND)

    def _write(self, path: bytes, at: int, data: bytes, flags: int) -> Call:
        def do() -> None:
            fd = syscall_open(self.path(path), flags)
            try:
                written = os.write(fd, data) if flags & os.O_APPEND else os.pwrite(fd, data, at)
                assert written == len(data), f"wrote {written} of {len(data)}"
            finally:
                close_quietly(fd)

        def apply(names: dict[bytes, Node]) -> None:
            put(names[path].data, at, data)

        old = len(self.names[path].data)
        torn = (path, at, min(at + len(data), old)) if at < old else None
        return Call(f"write {path!r} [{at}, {at + len(data)}) flags {flags:#o}", do, apply, torn)

    def truncate(self) -> Call | None:
        if (path := self.some(stat.S_IFREG)) is None:
            return None
        size = self.random.choice((0, 1, 4096, 10_000, self.random.randrange(SIZE_MAX)))

        def apply(names: dict[bytes, Node]) -> None:
            data = names[path].data
            del data[size:]
            data.extend(bytes(max(0, size - len(data))))

        return Call(f"truncate {path!r} {size}", lambda: os.truncate(self.path(path), size), apply)

    def punch(self) -> Call | None:
        return self._fallocate(syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, zeroes=True)

    def zero(self) -> Call | None:
        return self._fallocate(syscalls.ZERO_RANGE, zeroes=True)

    def allocate(self) -> Call | None:
        return self._fallocate(0, zeroes=False)

    def _fallocate(self, mode: int, *, zeroes: bool) -> Call | None:
        if (path := self.some(stat.S_IFREG)) is None:
            return None
        at, length = self.span(SIZE_MAX - 1)

        def do() -> None:
            fd = syscall_open(self.path(path), os.O_WRONLY)
            try:
                syscalls.fallocate(fd, mode, at, length)
            finally:
                close_quietly(fd)

        def apply(names: dict[bytes, Node]) -> None:
            data = names[path].data
            if not mode & syscalls.KEEP_SIZE:
                data.extend(bytes(max(0, at + length - len(data))))
            if zeroes and at < len(data):
                end = min(at + length, len(data))
                data[at:end] = bytes(end - at)

        return Call(f"fallocate {path!r} mode {mode} [{at}, {at + length})", do, apply)

    def copy(self) -> Call | None:
        source, target = self.some(stat.S_IFREG), self.some(stat.S_IFREG)
        if source is None or target is None or self.names[source] is self.names[target]:
            return None
        size = len(self.names[source].data)
        if not size:
            return None
        at = self.random.randrange(size)
        length = min(size - at, 30_000)
        to = self.random.randrange(SIZE_MAX - length)

        def do() -> None:
            a = syscall_open(self.path(source), os.O_RDONLY)
            b = -1
            try:
                b = syscall_open(self.path(target), os.O_WRONLY)
                copied = syscalls.copy_range(a, at, b, to, length)
                assert copied == length, f"copied {copied} of {length}"
            finally:
                close_quietly(a)
                close_quietly(b)

        def apply(names: dict[bytes, Node]) -> None:
            put(names[target].data, to, bytes(names[source].data[at : at + length]))

        old = len(self.names[target].data)
        torn = (target, to, min(to + length, old)) if to < old else None
        return Call(f"copy {source!r} [{at}, +{length}) to {target!r} {to}", do, apply, torn)

    def chmod(self) -> Call | None:
        path = self.some()
        if path is None or stat.S_ISLNK(self.names[path].mode):
            return None
        mode = self.random.choice((0o700, 0o755, 0o711))

        def apply(names: dict[bytes, Node]) -> None:
            names[path].mode = stat.S_IFMT(names[path].mode) | mode

        return Call(f"chmod {path!r} {mode:o}", lambda: os.chmod(self.path(path), mode), apply)

    def setxattr(self) -> Call | None:
        path = self.some()
        if path is None or stat.S_ISLNK(self.names[path].mode):
            return None
        name, value = self.random.choice(("user.a", "user.b")), self.random.randbytes(self.random.choice((0, 20, 5000)))
        if name in self.names[path].xattrs and self.random.random() < 0.3:

            def drop(names: dict[bytes, Node]) -> None:
                del names[path].xattrs[name]

            return Call(f"removexattr {path!r} {name}", lambda: os.removexattr(self.path(path), name), drop)

        def apply(names: dict[bytes, Node]) -> None:
            names[path].xattrs[name] = value

        return Call(f"setxattr {path!r} {name} {len(value)}", lambda: os.setxattr(self.path(path), name, value), apply)

    def sync(self) -> Call | None:
        if (path := self.some(stat.S_IFREG)) is None:
            return None

        def do() -> None:
            fd = syscall_open(self.path(path), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                close_quietly(fd)

        return Call(f"fsync {path!r}", do, lambda names: None)

    # -- after the crash --------------------------------------------------------------------------------------------

    def verify(self) -> bool:
        """Compare, and let the model follow what happened to the call under way: True if it was carried out."""
        found = parity.tree(self.root)
        if found == as_tree(self.names):
            return False
        problem = "\n  ".join(parity.differences(found, as_tree(self.names))[:10])
        where = f"{self.root!r} after {self.done} calls, the last ones:\n  " + "\n  ".join(self.last)
        if self.pending is None:
            raise AssertionError(f"acknowledged calls are lost:\n  {problem}\nin {where}")
        after = copy.deepcopy(self.names)
        self.pending.apply(after)
        if found == as_tree(after):
            self.names = after
            return True
        if self._torn(found, after):
            return False
        other = "\n  ".join(parity.differences(found, as_tree(after))[:10])
        raise AssertionError(
            f"{self.pending.text} was under way; it is neither absent:\n  {problem}\nnor whole:\n  {other}\nin {where}"
        )

    def _torn(self, found: Tree, after: dict[bytes, Node]) -> bool:
        """Only bytes overwritten in place are new: the model takes them over."""
        assert self.pending
        if self.pending.torn is None:
            return False
        path, start, end = self.pending.torn
        mixed = copy.deepcopy(self.names)
        seen = found.get(path, {}).get("data")
        if not isinstance(seen, bytes) or len(seen) != len(mixed[path].data):
            return False
        for at in range(start, end):
            if seen[at] == after[path].data[at]:
                mixed[path].data[at] = seen[at]
        if found != as_tree(mixed):
            return False
        self.names = mixed
        return True


def syscall_open(path: bytes, flags: int, mode: int = 0) -> int:
    return os.open(path, flags, mode)


def close_quietly(fd: int) -> None:
    """close() of a dead mount's file fails; what counts has been answered before."""
    if fd >= 0:
        try:
            os.close(fd)
        except OSError as problem:
            if problem.errno not in GONE:
                raise


def put(into: bytearray, at: int, data: bytes) -> None:
    into.extend(bytes(max(0, at + len(data) - len(into))))
    into[at : at + len(data)] = data


def move(names: dict[bytes, Node], moves: dict[bytes, bytes]) -> None:
    """Rename each key of `moves` and everything below it, all at once."""
    taken: dict[bytes, Node] = {}
    for old, new in moves.items():
        for path in [p for p in names if p == old or p.startswith(old + b"/")]:
            taken[new + path[len(old) :]] = names.pop(path)
    names.update(taken)


def as_tree(names: dict[bytes, Node]) -> Tree:
    """The model in the form of parity.tree."""
    first: dict[int, bytes] = {}
    out: Tree = {}
    for path in sorted(names):
        node = names[path]
        below = [p for p in names if p.startswith(path + b"/") and p.count(b"/") == path.count(b"/") + 1]
        is_dir = stat.S_ISDIR(node.mode)
        links = 2 + sum(stat.S_ISDIR(names[p].mode) for p in below) if is_dir else sum(n is node for n in names.values())
        item: dict[str, object] = {"mode": oct(node.mode), "uid": 0, "gid": 0, "nlink": links}
        if stat.S_ISREG(node.mode):
            item |= {"size": len(node.data), "data": bytes(node.data)}
        elif stat.S_ISLNK(node.mode):
            item |= {"size": len(node.target), "target": node.target}
        if not stat.S_ISLNK(node.mode):
            item["xattrs"] = dict(sorted(node.xattrs.items()))
        item["same"] = first.setdefault(id(node), path)
        out[path] = item
    return out
