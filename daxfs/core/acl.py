"""POSIX ACLs as their xattrs carry them: pure functions over bytes, after Linux's fs/posix_acl.c.

Owns the format (version 2: a header and entries of tag, permissions, id) and its arithmetic with file modes. An ACL
that says no more than a mode is not stored; the mode says it.

Not here: permission checks (the kernel does them, default_permissions) and storing (xattr.py).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from daxfs.errors import BadArgument, NotSupported

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFF_FFFF

_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")

# Which tags may follow each tag; a USER or GROUP entry makes the mask necessary.
_FOLLOWS = {
    0: {USER_OBJ},
    USER_OBJ: {USER, GROUP_OBJ},
    USER: {USER, GROUP_OBJ},
    GROUP_OBJ: {GROUP, MASK, OTHER},
    GROUP: {GROUP, MASK},
    MASK: {OTHER},
    OTHER: set(),
}


class Entry(NamedTuple):
    tag: int
    perm: int
    id: int = NO_ID


def parse(value: bytes) -> list[Entry]:
    """The entries of a valid ACL; an empty list for a value without entries, which means: no ACL."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise BadArgument("the length of the ACL is not valid")
    if _HEADER.unpack_from(value)[0] != VERSION:
        raise NotSupported(f"the ACL is not of version {VERSION}")
    entries = [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    last, needs_mask = 0, False
    for tag, perm, who in entries:
        if tag not in _FOLLOWS[last] or perm & ~7 or (tag in (USER, GROUP) and who == NO_ID):
            raise BadArgument("the ACL has an entry that is not valid")
        if tag == OTHER and needs_mask and last != MASK:
            raise BadArgument("the ACL lacks a mask")
        needs_mask |= tag in (USER, GROUP)
        last = tag
    if entries and last != OTHER:
        raise BadArgument("the ACL lacks an entry")
    return entries


def pack(entries: list[Entry]) -> bytes:
    return _HEADER.pack(VERSION) + b"".join(
        _ENTRY.pack(tag, perm, who if tag in (USER, GROUP) else NO_ID) for tag, perm, who in entries
    )


def from_mode(mode: int) -> bytes:
    """The ACL that says what the mode says."""
    return pack([Entry(USER_OBJ, mode >> 6 & 7), Entry(GROUP_OBJ, mode >> 3 & 7), Entry(OTHER, mode & 7)])


def equivalent_mode(value: bytes) -> tuple[int, bool]:
    """The nine permission bits of an ACL, and whether they say all that it says (posix_acl_equiv_mode)."""
    perms = {tag: perm for tag, perm, _ in parse(value)}
    group = perms.get(MASK, perms.get(GROUP_OBJ, 0))
    mode = perms.get(USER_OBJ, 0) << 6 | group << 3 | perms.get(OTHER, 0)
    return mode, not perms.keys() & {USER, GROUP, MASK}


def chmod(value: bytes, mode: int) -> bytes:
    """The access ACL after chmod (posix_acl_chmod_masq): the group bits are the mask's if there is one."""
    entries = parse(value)
    group = MASK if any(e.tag == MASK for e in entries) else GROUP_OBJ
    perms = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return pack([Entry(tag, perms.get(tag, perm), who) for tag, perm, who in entries])


def inherit(default: bytes, mode: int) -> tuple[bytes | None, int]:
    """What a new file gets from its directory's default ACL and the mode asked for (posix_acl_create): its access ACL,
    None if the mode says it all, and its mode. A new directory gets the default ACL as its own default, too."""
    entries = parse(default)
    group = MASK if any(e.tag == MASK for e in entries) else GROUP_OBJ
    asked = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    entries = [Entry(tag, perm & asked.get(tag, 7), who) for tag, perm, who in entries]
    access = pack(entries)
    bits, equivalent = equivalent_mode(access)
    return None if equivalent else access, mode & ~0o777 | bits
