"""The same operations on two directories, what they answered compared.

A probe is a function of a `Recorder`; it runs with the directory as its current directory and uses relative names, so that
answers can be compared as they are. `t(function, ...)` notes the value or the errno name and goes on; `t.note(label, value)`
notes anything else. What may differ between file systems (inode numbers, block counts, directory sizes) is not noted.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Probe = Callable[["Recorder"], None]
Entry = tuple[str, Any]


@contextmanager
def working_in(directory: str | os.PathLike[str]) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-12:]}"


class Recorder:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.who = ""

    def note(self, label: str, value: Any) -> None:
        self.entries.append((self.who + label, value))

    def __call__(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        words = [brief(a) for a in args] + [f"{k}={brief(v)}" for k, v in more.items()]
        label = f"{getattr(function, '__name__', function)}({', '.join(words)})"
        try:
            value = function(*args, **more)
        except OSError as problem:
            self.note(label, errno.errorcode.get(problem.errno or 0, problem.errno))
            return None
        self.note(label, "a descriptor" if function is os.open else value)
        return value

    def as_user(self, uid: int, gid: int, probe: Probe, groups: Sequence[int] = ()) -> None:
        """Run a probe in a child process of that user; its notes come back."""
        entries = in_child(lambda: self._collect(uid, gid, groups, probe))
        self.entries += [(f"{self.who}uid {uid} gid {gid}: {label}", value) for label, value in entries]

    @staticmethod
    def _collect(uid: int, gid: int, groups: Sequence[int], probe: Probe) -> list[Entry]:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        child = Recorder()
        probe(child)
        return child.entries


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child; its exception is raised here."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(out)
            try:
                answer: tuple[bool, Any] = (True, work())
            except BaseException:
                answer = (False, traceback.format_exc())
            with os.fdopen(into, "wb") as pipe:
                pipe.write(pickle.dumps(answer))
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        raise AssertionError("the child ended without an answer")
    good, value = pickle.loads(data)
    if not good:
        raise AssertionError(f"in the child:\n{value}")
    return value


def run(probe: Probe, directory: str | os.PathLike[str]) -> list[Entry]:
    recorder = Recorder()
    umask = os.umask(0o022)
    try:
        with working_in(directory):
            probe(recorder)
    finally:
        os.umask(umask)
    return recorder.entries


def compare(probe: Probe, ours: str | os.PathLike[str], theirs: str | os.PathLike[str]) -> None:
    """Run the probe on both; raise AssertionError with every line that differs."""
    mine, peers = run(probe, ours), run(probe, theirs)
    wrong = [
        f"  {label}: {brief(got)}, on tmpfs {brief(want)}"
        for (label, got), (_, want) in zip(mine, peers, strict=False)
        if got != want
    ]
    if len(mine) != len(peers):
        wrong.append(f"  {len(mine)} answers, on tmpfs {len(peers)}")
    assert mine or wrong, "the probe noted nothing"
    assert not wrong, "daxfs differs from tmpfs:\n" + "\n".join(wrong)


def look(path: str | bytes | int, *, times: bool = False) -> dict[str, object]:
    """What of stat() must agree between file systems."""
    s = os.stat(path, follow_symlinks=isinstance(path, int))
    seen: dict[str, object] = {"mode": oct(s.st_mode), "uid": s.st_uid, "gid": s.st_gid, "nlink": s.st_nlink}
    if not stat.S_ISDIR(s.st_mode):
        seen["size"] = s.st_size
    if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode):
        seen["rdev"] = s.st_rdev
    if times:
        seen["times"] = (s.st_atime_ns, s.st_mtime_ns)
    return seen


def tree(root: str | bytes | os.PathLike[str] = b".", *, xattrs: bool = True) -> dict[bytes, dict[str, object]]:
    """Everything below a directory: attributes, contents, link targets, xattrs, and which names are one inode."""
    found: dict[bytes, dict[str, object]] = {}
    first: dict[int, bytes] = {}
    top = os.fsencode(root)
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        for name in sorted(os.listdir(folder)):
            path = folder + b"/" + name
            s = os.lstat(path)
            item = look(path)
            if stat.S_ISDIR(s.st_mode):
                waiting.append(path)
            elif stat.S_ISLNK(s.st_mode):
                item["target"] = os.readlink(path)
            elif stat.S_ISREG(s.st_mode):
                with open(path, "rb") as file:
                    item["data"] = file.read()
            if xattrs and not stat.S_ISLNK(s.st_mode):
                item["xattrs"] = {n: os.getxattr(path, n) for n in sorted(os.listxattr(path))}
            found[path[len(top) + 1 :]] = item
    for path in sorted(found):
        found[path]["same"] = first.setdefault(os.lstat(top + b"/" + path).st_ino, path)
    return found


def differences(ours: dict[bytes, dict[str, object]], theirs: dict[bytes, dict[str, object]]) -> list[str]:
    out = [f"{p!r}: only on daxfs" for p in sorted(ours.keys() - theirs.keys())]
    out += [f"{p!r}: only on tmpfs" for p in sorted(theirs.keys() - ours.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        mine, peer = ours[path], theirs[path]
        out += [
            f"{path!r} {key}: {brief(mine.get(key))}, on tmpfs {brief(peer.get(key))}"
            for key in sorted(mine.keys() | peer.keys())
            if mine.get(key) != peer.get(key)
        ]
    return out
