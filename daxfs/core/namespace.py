"""The verbs of names: lookup, create, link, unlink, rename, and what directories list.

Rules
- Each call is one transaction: entries, link counts, parents and times change together or not at all.
- An inode whose last name goes is not freed here: a descriptor or the kernel may still refer to it (`fileops.reap`).
- A directory's link count is 2 and one for each directory in it; `..` is the inode's `parent`.
- Permissions and path walking are the kernel's; what a hostile or mistaken caller could still break is checked again.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import NamedTuple

from daxfs.core import acl, layout, xattr
from daxfs.core.directory import Directory
from daxfs.core.inode import Inode
from daxfs.core.volume import Transaction, Volume
from daxfs.errors import (
    BadArgument,
    BadHandle,
    Corrupt,
    Exists,
    IsDirectory,
    NameTooLong,
    NoEntry,
    NotDirectory,
    NotEmpty,
    NotPermitted,
    TooManyLinks,
)  # fmt: skip

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
_KIND = 0o170000  # the bits of stat.S_IFMT
SYMLINK_MODE = stat.S_IFLNK | 0o777


class Caller(NamedTuple):
    """Who makes a new file: its owner, and the umask that applies unless the directory has a default ACL."""

    uid: int
    gid: int
    umask: int = 0


def index(vol: Volume, parent: Inode) -> Directory:
    """The directory's entries. NotDirectory."""
    if not parent.is_dir:
        raise NotDirectory
    if parent.directory is None:
        parent.directory = Directory(vol, parent)
    return parent.directory


def lookup(vol: Volume, parent: Inode, name: bytes) -> Inode | None:
    """The inode of a name, `.` and `..` included, or None. NameTooLong."""
    if len(name) > layout.NAME_MAX:
        raise NameTooLong
    if name == b".":  # asked of files as well: open_by_handle_at
        return parent if parent.nlink else None
    entries = index(vol, parent)
    if name == b"..":
        return vol.inode(parent.parent)
    found = entries.lookup(name)
    return _inode(vol, found[0], name) if found else None


def _inode(vol: Volume, ino: int, name: bytes) -> Inode:
    try:
        return vol.inode(ino)
    except BadHandle:
        raise Corrupt(f"the entry {name!r} refers to inode {ino}, which is free") from None


def entries(vol: Volume, parent: Inode, position: int) -> Iterator[tuple[bytes, int, int, int]]:
    """(name, ino, type, next position) of what is in a directory, from a position on, without `.` and `..`."""
    return index(vol, parent).entries(position)


# -- making --


def create(vol: Volume, now: int, parent: Inode, name: bytes, mode: int, caller: Caller, rdev: int = 0) -> Inode:
    """A file, fifo, socket or device node. Exists, NoSpace."""
    kind = mode & _KIND
    if kind == 0:
        mode |= stat.S_IFREG
    if kind in (stat.S_IFDIR, stat.S_IFLNK):
        raise BadArgument("mknod makes no directories or links")
    with vol.transaction(now) as txn:
        directory = _place(vol, parent, name)
        inode = _new(vol, txn, parent, mode, caller, rdev=rdev)
        _enter(txn, directory, parent, name, inode)
    return inode


def mkdir(vol: Volume, now: int, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
    """A directory. Exists, NoSpace, TooManyLinks."""
    with vol.transaction(now) as txn:
        directory = _place(vol, parent, name)
        if parent.nlink >= layout.LINK_MAX:
            raise TooManyLinks
        inode = _new(vol, txn, parent, stat.S_IFDIR | mode & 0o7777, caller)
        _enter(txn, directory, parent, name, inode)
        parent.nlink += 1  # after what can fail: from `_enter` on an abort reverts the parent
    return inode


def symlink(vol: Volume, now: int, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
    """A symbolic link; a short target is kept in the inode. NameTooLong, NoEntry (empty target)."""
    if not target:
        raise NoEntry("the target of a symbolic link is empty")
    if len(target) > layout.SYMLINK_MAX:
        raise NameTooLong
    with vol.transaction(now) as txn:
        directory = _place(vol, parent, name)
        inode = vol.new_inode(txn, SYMLINK_MODE, caller.uid, _group(parent, caller))
        if len(target) <= layout.INLINE_TARGET_MAX:
            inode.target = target
        else:
            block = txn.take(1)[0][0]
            txn.fresh(block * vol.block_size, target.ljust(vol.block_size, b"\0"))
            inode.map.insert(0, block, 1)
        inode.size = len(target)
        _enter(txn, directory, parent, name, inode)
    return inode


def tmpfile(vol: Volume, now: int, parent: Inode, mode: int, caller: Caller) -> Inode:
    """A file without a name (O_TMPFILE): it dies with its last descriptor unless `link` gives it one."""
    index(vol, parent)
    with vol.transaction(now) as txn:
        inode = _new(vol, txn, parent, stat.S_IFREG | mode & 0o7777, caller)
        inode.nlink = 0
    vol.unlinked[inode.ino] = inode
    return inode


def _place(vol: Volume, parent: Inode, name: bytes) -> Directory:
    """The directory that shall get a new name. NoEntry (it was removed), Exists, NameTooLong."""
    if len(name) > layout.NAME_MAX:
        raise NameTooLong
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise BadArgument("not a name")
    directory = index(vol, parent)
    if parent.nlink == 0:
        raise NoEntry("the directory was removed")
    if directory.lookup(name):
        raise Exists
    return directory


def _group(parent: Inode, caller: Caller) -> int:
    return parent.gid if parent.mode & stat.S_ISGID else caller.gid


def _new(vol: Volume, txn: Transaction, parent: Inode, mode: int, caller: Caller, *, rdev: int = 0) -> Inode:
    """A new inode with what it inherits: group and sgid, and the default ACL or else the umask."""
    is_dir = stat.S_ISDIR(mode)
    if is_dir and parent.mode & stat.S_ISGID:
        mode |= stat.S_ISGID
    default = None
    if parent.xattr_inline or parent.xattr_block:
        default = xattr.get(vol, parent, acl.DEFAULT) if acl.DEFAULT in xattr.names(vol, parent) else None
    access = None
    if default is None:
        mode &= ~caller.umask | ~0o777
    else:
        access, mode = acl.inherit(default, mode)
    inode = vol.new_inode(txn, mode, caller.uid, _group(parent, caller), rdev=rdev,
                          parent=parent.ino if is_dir else 0)  # fmt: skip
    if access is not None:
        xattr.set(vol, txn, inode, acl.ACCESS, access, 0)
    if default is not None and is_dir:
        xattr.set(vol, txn, inode, acl.DEFAULT, default, 0)
    return inode


def _enter(txn: Transaction, directory: Directory, parent: Inode, name: bytes, inode: Inode) -> None:
    directory.insert(txn, name, inode.ino, (inode.mode & _KIND) >> 12)
    _changed(txn, parent)


def _changed(txn: Transaction, directory: Inode) -> None:
    directory.mtime = directory.ctime = txn.now
    txn.dirty(directory)


# -- links --


def link(vol: Volume, now: int, inode: Inode, parent: Inode, name: bytes) -> None:
    """One more name. NotPermitted (a directory), TooManyLinks, Exists."""
    if inode.is_dir:
        raise NotPermitted("a directory has one name")
    if inode.nlink >= layout.LINK_MAX:
        raise TooManyLinks
    with vol.transaction(now) as txn:
        directory = _place(vol, parent, name)
        inode.nlink += 1
        inode.ctime = now
        txn.dirty(inode)
        _enter(txn, directory, parent, name, inode)


def unlink(vol: Volume, now: int, parent: Inode, name: bytes) -> Inode:
    """Remove a name of anything but a directory. What had it."""
    directory, inode = _found(vol, parent, name)
    if inode.is_dir:
        raise IsDirectory
    with vol.transaction(now) as txn:
        directory.remove(txn, name)
        _unlinked(vol, txn, inode)
        _changed(txn, parent)
    return inode


def rmdir(vol: Volume, now: int, parent: Inode, name: bytes) -> Inode:
    """Remove an empty directory; it. NotDirectory, NotEmpty."""
    directory, inode = _found(vol, parent, name)
    if not index(vol, inode).is_empty():
        raise NotEmpty
    with vol.transaction(now) as txn:
        directory.remove(txn, name)
        parent.nlink -= 1
        _unlinked(vol, txn, inode)
        _changed(txn, parent)
    return inode


def _found(vol: Volume, parent: Inode, name: bytes) -> tuple[Directory, Inode]:
    directory = index(vol, parent)
    found = directory.lookup(name)
    if not found:
        raise NoEntry
    return directory, _inode(vol, found[0], name)


def _unlinked(vol: Volume, txn: Transaction, inode: Inode) -> None:
    inode.nlink = 0 if inode.is_dir else inode.nlink - 1
    if not inode.nlink:
        vol.unlinked[inode.ino] = inode
    inode.ctime = txn.now
    txn.dirty(inode)


def readlink(vol: Volume, inode: Inode) -> bytes:
    """The target. BadArgument if this is no symbolic link, Corrupt if the target is not one."""
    if not inode.is_symlink:
        raise BadArgument("not a symbolic link")
    target = inode.target
    if not target and 0 < inode.size <= layout.SYMLINK_MAX and inode.block(0):
        target = vol.pmem.load(inode.block(0) * vol.block_size, inode.size)
    if len(target) != inode.size or not target or b"\0" in target:
        raise Corrupt(f"inode {inode.ino}: the symbolic link has no valid target")
    return target


# -- rename --


def rename(vol: Volume, now: int, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes,
           flags: int = 0) -> tuple[Inode, Inode | None]:  # fmt: skip
    """rename(2) with NOREPLACE, EXCHANGE, WHITEOUT. Two names of one inode: nothing happens. Who had them."""
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT) or (
        flags & RENAME_EXCHANGE and flags & (RENAME_NOREPLACE | RENAME_WHITEOUT)
    ):
        raise BadArgument("rename: flags that do not go together")
    if len(new_name) > layout.NAME_MAX:
        raise NameTooLong
    source, inode = _found(vol, parent, name)
    target = index(vol, new_parent)
    found = target.lookup(new_name)
    other = _inode(vol, found[0], new_name) if found else None
    if other is None and flags & RENAME_EXCHANGE:
        raise NoEntry
    if other is not None and flags & RENAME_NOREPLACE:
        raise Exists
    if other is inode:
        return inode, other
    if inode.is_dir:
        _not_below(vol, inode, new_parent)
    with vol.transaction(now) as txn:
        txn.dirty(inode)
        if flags & RENAME_EXCHANGE and other is not None:
            if other.is_dir:
                _not_below(vol, other, parent)
            _replace(txn, source, parent, name, inode, other)
            _replace(txn, target, new_parent, new_name, other, inode)
        else:
            _move(vol, txn, parent, name, new_parent, new_name, inode, other)
            if flags & RENAME_WHITEOUT:
                _enter(txn, source, parent, name, vol.new_inode(txn, stat.S_IFCHR, 0, 0))
        inode.ctime = now
    return inode, other


def _not_below(vol: Volume, inode: Inode, directory: Inode) -> None:
    """BadArgument if a directory would be moved into itself."""
    steps = 0
    while directory is not inode and directory.ino != layout.ROOT_INO and steps < 1 << 16:
        directory = vol.inode(directory.parent)
        steps += 1
    if directory is inode:
        raise BadArgument("a directory cannot be moved into itself")


def _replace(txn: Transaction, directory: Directory, parent: Inode, name: bytes, old: Inode, new: Inode) -> None:
    """One half of an exchange: `name` is now of `new`."""
    directory.replace(txn, name, new.ino, (new.mode & _KIND) >> 12)
    parent.nlink += new.is_dir - old.is_dir
    if new.is_dir:
        new.parent = parent.ino
    new.ctime = txn.now
    txn.dirty(new)
    _changed(txn, parent)


def _move(vol: Volume, txn: Transaction, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, inode: Inode,
          other: Inode | None) -> None:  # fmt: skip
    source, target = index(vol, parent), index(vol, new_parent)
    dtype = (inode.mode & _KIND) >> 12
    if other is None:
        _place(vol, new_parent, new_name)
        if inode.is_dir and parent is not new_parent and new_parent.nlink >= layout.LINK_MAX:
            raise TooManyLinks
        target.insert(txn, new_name, inode.ino, dtype)
    else:
        if other.is_dir and not inode.is_dir:
            raise IsDirectory
        if inode.is_dir and not index_is_empty(vol, other):
            raise NotEmpty
        target.replace(txn, new_name, inode.ino, dtype)
        if other.is_dir:
            new_parent.nlink -= 1
        _unlinked(vol, txn, other)
    source.remove(txn, name)
    if inode.is_dir and parent is not new_parent:
        parent.nlink -= 1
        new_parent.nlink += 1
        inode.parent = new_parent.ino
    _changed(txn, parent)
    _changed(txn, new_parent)


def index_is_empty(vol: Volume, directory: Inode) -> bool:
    """Whether a directory has no entries. NotDirectory."""
    return index(vol, directory).is_empty()
