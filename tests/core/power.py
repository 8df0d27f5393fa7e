"""A medium that dies at a chosen store, and what can be seen of a volume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from daxfs.core import fileops, format, namespace, volume, xattr
from daxfs.core.inode import Inode
from daxfs.core.pmem import Pmem
from daxfs.core.volume import Volume


class PowerLoss(BaseException):
    """The daemon is dead: no handler of the core may see this as an error of a call."""


class DyingPmem(Pmem):
    """After `left` more stores comes the end: that store does nothing, or (torn) its first half, and all others nothing."""

    left: int | None = None
    torn = False
    stores = 0
    closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            super().close()

    def _last(self) -> bool:
        """Whether this store is the one that is torn."""
        self.stores += 1
        if self.left is None:
            return False
        if self.left == 0:
            torn, self.torn = self.torn, False
            if not torn:
                raise PowerLoss
            return True
        self.left -= 1
        return False

    def store(self, at: int, data: bytes | bytearray | memoryview) -> None:
        last = self._last()
        super().store(at, data[: len(data) // 2] if last else data)
        if last:
            raise PowerLoss

    def fill_zero(self, at: int, n: int) -> None:
        last = self._last()
        super().fill_zero(at, n // 2 if last else n)
        if last:
            raise PowerLoss

    def copy(self, source: int, target: int, n: int) -> None:
        last = self._last()
        super().copy(source, target, n // 2 if last else n)
        if last:
            raise PowerLoss

    def store_word(self, at: int, value: int) -> None:
        if self._last():
            raise PowerLoss  # a word is never torn
        super().store_word(at, value)


@contextmanager
def mortal(left: int | None = None, *, torn: bool = False) -> Iterator[None]:
    """Whoever opens an image now gets a DyingPmem."""
    with (
        mock.patch.object(volume, "Pmem", DyingPmem),
        mock.patch.object(format, "Pmem", DyingPmem),
        mock.patch.object(DyingPmem, "left", left),
        mock.patch.object(DyingPmem, "torn", torn),
    ):
        yield


def medium(vol: Volume) -> DyingPmem:
    assert isinstance(vol.pmem, DyingPmem)
    return vol.pmem


State = dict[bytes, tuple[Any, ...]]


def state(vol: Volume) -> State:
    """All that can be seen: path -> attributes, extended attributes, content, and where the holes are."""
    seen: State = {}
    waiting = [(b"", vol.root)]
    while waiting:
        path, inode = waiting.pop()
        seen[path or b"/"] = (*_attributes(vol, inode), _content(vol, inode), _holes(inode))
        if inode.is_dir:
            for name, ino, _, _ in namespace.entries(vol, inode, 0):
                waiting.append((path + b"/" + name, vol.inode(ino)))
    return seen


def _attributes(vol: Volume, inode: Inode) -> tuple[Any, ...]:
    attributes = {name: xattr.get(vol, inode, name) for name in xattr.names(vol, inode)}
    return (inode.ino, inode.generation, inode.mode, inode.uid, inode.gid, inode.nlink, inode.rdev, inode.size, inode.mtime,
            inode.ctime, inode.parent if inode.is_dir else 0, attributes)  # fmt: skip


def _content(vol: Volume, inode: Inode) -> bytes | None:
    if inode.is_symlink:
        return namespace.readlink(vol, inode)
    return fileops.read(vol, inode, 0, inode.size) if inode.is_file else None


def _holes(inode: Inode) -> list[tuple[int, int, int]]:
    return [(logical, count, flags) for logical, _, count, flags in inode.map] if inode.is_file else []
