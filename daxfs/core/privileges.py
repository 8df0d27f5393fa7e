"""What a file loses when its data or owner changes: suid, sgid where the group may execute, and `security.capability`.

A write or truncate takes the bits only from a caller without CAP_FSETID (`kill_priv`), a new owner always.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from daxfs.core import xattr

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.core.transaction import Transaction
    from daxfs.core.volume import Volume

CAPABILITY = b"security.capability"


def _killed(mode: int, kill_priv: bool) -> int:
    """The suid and sgid bits that a change of data or owner takes away."""
    if not kill_priv:
        return 0
    return mode & (stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))


def any_to_drop(vol: Volume, inode: Inode, kill_priv: bool) -> bool:
    """Whether `drop` has something to do."""
    if _killed(inode.mode, kill_priv):
        return True
    return bool(inode.xattr_inline or inode.xattr_block) and CAPABILITY in xattr.names(vol, inode)


def drop(vol: Volume, txn: Transaction, inode: Inode, kill_priv: bool) -> None:
    if not inode.is_dir and any_to_drop(vol, inode, kill_priv):
        inode.mode &= ~_killed(inode.mode, kill_priv)
        if CAPABILITY in xattr.names(vol, inode):
            xattr.remove(vol, txn, inode, CAPABILITY)
        txn.dirty(inode)
