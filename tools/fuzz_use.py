"""What any image must go through unharmed: fsck, mount, use, check, unmount, fsck, mount read-only.

`ordeal` returns what became of the image ("mounted", "refused"). Whatever must not happen raises Harm: an exception that
is not ours (FsError), a text of more than one line, an extent that points outside the volume's data (the native session
would follow it), or more than LIMIT_S of computing. A refusal to do something with a broken file is as good as doing it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from daxfs import abi
from daxfs.core import attributes, fileops, fsck, holding, layout, namespace, policy
from daxfs.core.inode import Inode
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.daemon import protocol, requests
from daxfs.errors import FsError, ImageError
from tools.fuzz_image import BOOT, NOW, ROOT

LIMIT_S = 20  # of computing, for one image
_VISITS_MAX = 200
_READ = 65536
_NAME = b"made by the fuzzer"


class Harm(Exception):
    """What no image may do to daxfs."""


class _TooLong(BaseException):
    """Not to be caught on the way."""


@contextmanager
def limited() -> Iterator[None]:
    """Harm after LIMIT_S of computing."""
    seconds = LIMIT_S

    def stop(_: int, frame: FrameType | None) -> None:
        raise _TooLong(f"at {frame.f_code.co_qualname}" if frame else "")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TooLong as e:
        raise Harm(f"more than {seconds} s of computing, {e}") from e
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def ordeal(path: Path, *, brief: bool = False) -> str:
    """Which of the files it finds are changed, and how, depends on the image's bytes: all of it in many images. `brief`:
    they are looked at only, and the second half of the ordeal is left out; for very many images that differ little."""
    with limited():
        if brief:
            _check(path)
            return _mount(path, None)
        which = zlib.crc32(path.read_bytes())
        _check(path)
        outcome = _mount(path, which)
        if outcome != "refused":
            _check(path)
        if which % 2:
            _look(path)
    return outcome


def _check(path: Path) -> None:
    """fsck finds a verdict."""
    with _only_ours("fsck"):
        try:
            report = fsck.check(path)
        except ImageError as e:
            _one_line(e.why)
            return
        for finding in report.findings:
            _one_line(str(finding))


def _mount(path: Path, which: int | None) -> str:
    with _only_ours("mount"):
        try:
            volume = Volume.open(path, now=NOW, boot_id=BOOT)
        except ImageError as e:
            _one_line(e.why)
            if str(path) not in e.why or "memory" in e.why:
                raise Harm(f"a refusal that does not help: {e.why}") from None
            return "refused"
    try:
        if which is None:
            Use(volume).little()
        else:
            Use(volume, which).all()
    finally:
        with _only_ours("unmount"):
            volume.close(NOW)
    return "failed" if volume.failed else "mounted"


def _look(path: Path) -> None:
    """A read-only mount leaves the image as it is."""
    before = path.read_bytes()
    with _only_ours("read-only mount"):
        try:
            volume = Volume.open(path, readonly=True, now=NOW)
        except ImageError as e:
            _one_line(e.why)
            return
    try:
        Use(volume).walk()
    finally:
        with _only_ours("unmount"):
            volume.close(NOW)
    if path.read_bytes() != before:
        raise Harm("a read-only mount changed the image")


def _one_line(text: str) -> None:
    if "\n" in text or not text:
        raise Harm(f"a message of several lines: {text!r}")


@contextmanager
def _only_ours(what: str) -> Iterator[None]:
    try:
        yield
    except (Harm, FsError, _TooLong):
        raise
    except Exception as e:
        raise Harm(f"{what}: {e!r}") from e


class Use:
    """A volume in use, by somebody who takes errors as they come."""

    def __init__(self, volume: Volume, which: int = 0) -> None:
        self.volume = volume
        self.which = which
        self.found: dict[int, tuple[Inode, Inode, bytes]] = {}  # by number: the inode, its parent and its name

    def all(self) -> None:
        self.walk()
        self._change_found()
        self._make()
        self.walk()
        self._prove()

    def little(self) -> None:
        """As much as there is time for when a hundred thousand images wait."""
        self.walk()
        volume, root = self.volume, self.volume.root
        file = self._try(namespace.create, volume, NOW, root, _NAME, stat.S_IFREG | 0o600, ROOT)
        if file is not None:
            self._try(fileops.write, volume, NOW, file, 0, b"new" * 3000)
            self._try(namespace.rename, volume, NOW, root, _NAME, root, b"short")
        self._remove(root, b"small")
        self._prove()

    def _prove(self) -> None:
        with _only_ours("check"), contextlib.suppress(ValueError, FsError):  # it says what is wrong
            self.volume.check()

    def _try(self, verb: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with _only_ours(getattr(verb, "__name__", "verb")):
            try:
                return verb(*arguments, **named)
            except FsError as e:
                _one_line(e.why)
                return None

    # -- looking --

    def walk(self) -> None:
        """Everything that can be reached from the root."""
        volume = self.volume
        todo, listed = [volume.root], set[int]()
        self.found.clear()
        while todo and len(self.found) < _VISITS_MAX:
            directory = todo.pop()
            if directory.ino in listed:
                continue
            listed.add(directory.ino)
            self._try(namespace.lookup, volume, directory, b"..")
            for name, _, _, _ in self._try(lambda d=directory: list(namespace.entries(volume, d, 0))) or ():
                inode = self._try(namespace.lookup, volume, directory, name)
                if inode is None:
                    continue
                self.found[inode.ino] = inode, directory, name
                self._look_at(inode)
                if inode.is_dir:
                    todo.append(inode)

    def _look_at(self, inode: Inode) -> None:
        volume = self.volume
        with _only_ours(f"attributes of inode {inode.ino}"):
            requests.entry_out(inode)
            protocol.statx_out(inode, volume.block_size)
        for name in self._try(attributes.listxattr, volume, inode) or ():
            self._try(attributes.getxattr, volume, inode, name)
        if inode.is_symlink:
            self._try(namespace.readlink, volume, inode)
        if not inode.is_file:
            return
        inode.opens += 1
        self._try(inode.set_hot)
        inode.opens -= 1
        extents = self._try(lambda: list(inode.map)) or []
        for logical, physical, count, _ in extents:
            if physical not in volume.data_blocks or count > volume.blocks - physical:
                raise Harm(f"inode {inode.ino}: an extent at {physical}+{count} of {volume.blocks} blocks is believed")
            if (logical + count) * volume.block_size > 1 << 63:
                raise Harm(f"inode {inode.ino}: an extent at file block {logical} is beyond all files")
            self._try(fileops.read, volume, inode, logical * volume.block_size, _READ)
        for offset in (0, max(0, inode.size - _READ), inode.size):
            self._try(fileops.read, volume, inode, offset, _READ)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            self._try(fileops.seek, volume, inode, 0, whence)

    # -- changing --

    def _change_found(self) -> None:
        """Every file that was found gets its share."""
        volume, size = self.volume, self.volume.block_size
        for number, (inode, parent, name) in enumerate(list(self.found.values()), self.which):
            if number % 3 == 0:
                continue
            self._try(attributes.setattr, volume, NOW, inode, attributes.Attributes(mode=0o640))
            self._try(attributes.setxattr, volume, NOW, inode, b"user.fuzz", b"x" * (400 if number % 2 else 5000))
            self._try(attributes.removexattr, volume, NOW, inode, b"user.fuzz")
            if inode.is_file:
                self._change_file(inode, number)
            elif inode.is_dir:
                self._change_directory(inode)
            new = b"%s %d" % (_NAME, number)
            self._try(namespace.link, volume, NOW, inode, volume.root, new)
            self._try(namespace.rename, volume, NOW, parent, name, volume.root, new)
            if number % 4 == 0:
                self._remove(parent, name)
                self._remove(volume.root, new)
            elif inode.is_file:
                self._try(fileops.write, volume, NOW, inode, inode.size, b"appended" * (size // 8))
        inodes = list(self.found.values())
        for (_, parent, name), (_, other, other_name) in zip(inodes[self.which % 5 :: 5], inodes[1::4], strict=False):
            self._try(namespace.rename, volume, NOW, parent, name, other, other_name, namespace.RENAME_EXCHANGE)

    def _change_file(self, inode: Inode, number: int) -> None:
        volume, size = self.volume, self.volume.block_size
        self._try(fileops.write, volume, NOW, inode, 100, b"overwritten")
        self._try(fileops.write, volume, NOW, inode, 3 * size + 7, b"a hole is filled", kill_priv=True)
        flags = abi.FOLL_PIN | (abi.FOLL_WRITE if number % 2 else 0)
        holder = Holder(os.getpid(), "fuzz", 1)
        pin = self._try(holding.pin, volume, NOW, inode, 0, size, flags, 7, holder, writable=True)
        self._try(fileops.fallocate, volume, NOW, inode, fileops.FALLOC_ZERO_RANGE, size // 2, 2 * size)
        self._try(fileops.fallocate, volume, NOW, inode, fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE, 0, 2 * size)
        self._try(fileops.copy_range, volume, NOW, inode, 0, inode, 1 << 20, 3 * size)
        self._try(fileops.truncate, volume, NOW, inode, 5)
        if pin is not None:
            self._try(holding.unpin, volume, NOW, 7, pin.id, dirty=True)
        self._try(volume.free_unpinned, NOW, 100)

    def _change_directory(self, inode: Inode) -> None:
        volume = self.volume
        for i in range(3):
            self._try(namespace.create, volume, NOW, inode, b"%d" % i * 180, stat.S_IFREG | 0o600, ROOT)
        below = self._try(namespace.mkdir, volume, NOW, inode, _NAME, 0o700, ROOT)
        if below is not None:
            self._try(namespace.rename, volume, NOW, inode, _NAME, below, b"into itself")
        for i in range(0, 3, 2):
            self._remove(inode, b"%d" % i * 180)

    def _make(self) -> None:
        volume, root, size = self.volume, self.volume.root, self.volume.block_size
        file = self._try(namespace.create, volume, NOW, root, _NAME, stat.S_IFREG | 0o600, ROOT)
        if file is not None:
            for i in range(12):
                self._try(fileops.write, volume, NOW, file, 2 * i * size, b"new" * 100)
            self._try(attributes.setxattr, volume, NOW, file, policy.POLICY_XATTR, b"wait")
        self._try(namespace.symlink, volume, NOW, root, _NAME + b" link", b"t" * 300, ROOT)
        self._try(namespace.rename, volume, NOW, root, _NAME, root, _NAME + b" link")
        self._remove(root, _NAME + b" link")
        anonymous = self._try(namespace.tmpfile, volume, NOW, root, 0o600, ROOT)
        if anonymous is not None:
            self._try(fileops.write, volume, NOW, anonymous, 0, bytes(3 * size))
            self._try(fileops.reap, volume, NOW, anonymous)
        for ino in (0, layout.ROOT_INO + 1, volume.ino_end, (1 << 64) - 1):  # as a file handle from elsewhere would
            self._try(volume.inode, ino)

    def _remove(self, parent: Inode, name: bytes) -> None:
        """As the daemon does it: what has lost its last name dies."""
        inode = self._try(namespace.lookup, self.volume, parent, name)
        if inode is None:
            return
        self._try(namespace.rmdir if inode.is_dir else namespace.unlink, self.volume, NOW, parent, name)
        self._try(fileops.reap, self.volume, NOW, inode)
