"""Attributes of an inode: mode, owner, size, times, extended attributes and ACLs.

The rules of Linux that the kernel leaves to the file system (FUSE_HANDLE_KILLPRIV_V2, FUSE_POSIX_ACL): a change of owner
takes privileges away (privileges.py); chmod and the access ACL keep each other right. Who may do what the kernel has
checked.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from daxfs.core import acl, fileops, privileges, xattr
from daxfs.core.breaking import NOBODY, Breaker
from daxfs.core.inode import Inode
from daxfs.core.policy import POLICY_XATTR
from daxfs.core.volume import Transaction, Volume
from daxfs.errors import AccessDenied, BadArgument, NotSupported

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


class Attributes(NamedTuple):
    """What setattr changes; None: not this. Times in ns. `kill_priv`: the caller lacks CAP_FSETID. `known_size`: what the
    file is about to have by writes that were made before."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None
    kill_priv: bool = False
    breaker: Breaker = NOBODY
    known_size: int = 0

    @property
    def is_empty(self) -> bool:
        """How the kernel passes on chown(path, -1, -1), and the loss of suid by a write; both take suid away. (With
        dax=never the kernel adds its ctime to whatever it asks for.)"""
        return self[:6] == _NOTHING


_NOTHING = (None,) * 6


def setattr(vol: Volume, now: int, inode: Inode, new: Attributes) -> None:
    """chmod, chown, truncate, utimensat: all that is asked, in one transaction.

    Raises: ReadOnly, NoSpace, Corrupt; of a new size what `fileops.clear_resize` does.
    """
    resize = None
    if new.size is not None:
        resize = fileops.clear_resize(vol, inode, new.size, new.breaker, new.known_size)
    with vol.transaction(now) as txn:
        txn.dirty(inode)
        if resize is not None:
            fileops.resize(vol, txn, inode, resize)
            inode.mtime = now
            privileges.drop(vol, txn, inode, new.kill_priv)
        if new.uid is not None or new.gid is not None or new.is_empty:
            inode.uid = inode.uid if new.uid is None else new.uid
            inode.gid = inode.gid if new.gid is None else new.gid
            if not inode.is_dir:
                privileges.drop(vol, txn, inode, True)
        if new.mode is not None:
            inode.mode = inode.mode & ~0o7777 | new.mode & 0o7777
            _chmod_acl(vol, txn, inode)
        if new.atime is not None:
            inode.atime = new.atime
        if new.mtime is not None:
            inode.mtime = new.mtime
        inode.ctime = now if new.ctime is None else new.ctime
    if resize is not None:
        resize.cleared.carry_out(vol)


def times_of_writes(vol: Volume, inode: Inode, mtime: int, ctime: int) -> None:
    """The times that the kernel kept of writes to its cache. They are stored in place, as those of a write are."""
    vol.check_writable()
    inode.touch_in_place(mtime=mtime, ctime=ctime)


def _chmod_acl(vol: Volume, txn: Transaction, inode: Inode) -> None:
    if not inode.is_symlink and acl.ACCESS in xattr.names(vol, inode):
        value = acl.chmod(xattr.get(vol, inode, acl.ACCESS), inode.mode)
        xattr.set(vol, txn, inode, acl.ACCESS, value, 0)


# -- extended attributes --


def getxattr(vol: Volume, inode: Inode, name: bytes) -> bytes:
    """The value. NoData, NotSupported (a namespace that daxfs does not have)."""
    _check_namespace(name)
    return xattr.get(vol, inode, name)


def listxattr(vol: Volume, inode: Inode, *, trusted: bool = True) -> list[bytes]:
    """All names; those of `trusted.` only for those who may see them."""
    return [name for name in xattr.names(vol, inode) if trusted or not name.startswith(b"trusted.")]


def setxattr(vol: Volume, now: int, inode: Inode, name: bytes, value: bytes, flags: int = 0, *,
             kill_sgid: bool = False) -> None:  # fmt: skip
    """Set an attribute; an ACL changes the mode as well. BadArgument for an ACL that is none."""
    _check_namespace(name)
    with vol.transaction(now) as txn:
        txn.dirty(inode)
        if name in _ACLS:
            _set_acl(vol, txn, inode, name, value, flags, kill_sgid)
        else:
            xattr.set(vol, txn, inode, name, value, flags)
        inode.ctime = now
    if name == POLICY_XATTR:
        vol.rules_changed(inode.ino)


def removexattr(vol: Volume, now: int, inode: Inode, name: bytes) -> None:
    """NoData if there is none of this name; an ACL that is not there is removed without complaint."""
    _check_namespace(name)
    if name in _ACLS and name not in xattr.names(vol, inode):
        return
    with vol.transaction(now) as txn:
        xattr.remove(vol, txn, inode, name)
        inode.ctime = now
    if name == POLICY_XATTR:
        vol.rules_changed(inode.ino)


def _set_acl(vol: Volume, txn: Transaction, inode: Inode, name: bytes, value: bytes, flags: int,
             kill_sgid: bool) -> None:  # fmt: skip
    if inode.is_symlink:
        raise NotSupported("a symbolic link has no ACL")
    keep = bool(acl.parse(value))
    if name == acl.DEFAULT and not inode.is_dir:
        if keep:
            raise AccessDenied("only a directory has a default ACL")
        return
    if name == acl.ACCESS and keep:
        mode, says_all = acl.equivalent_mode(value)
        inode.mode = inode.mode & ~0o777 | mode
        if kill_sgid:
            inode.mode &= ~stat.S_ISGID
        keep = not says_all
    if keep:
        xattr.set(vol, txn, inode, name, value, flags)
    elif name in xattr.names(vol, inode):
        xattr.remove(vol, txn, inode, name)


def _check_namespace(name: bytes) -> None:
    if name in _ACLS:
        return
    if not name.startswith(_NAMESPACES):
        raise NotSupported("extended attributes are in user., trusted., security., or POSIX ACLs")
    if name in _NAMESPACES:
        raise BadArgument("an extended attribute needs a name behind its namespace")
