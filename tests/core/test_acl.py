"""ACL arithmetic, held against the rules of Linux's fs/posix_acl.c."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import acl
from daxfs.core.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from daxfs.errors import BadArgument, NotSupported

SMALL = [Entry(USER_OBJ, 6), Entry(GROUP_OBJ, 4), Entry(OTHER, 0)]
FULL = [
    Entry(USER_OBJ, 7), Entry(USER, 6, 1000), Entry(USER, 4, 1001), Entry(GROUP_OBJ, 5), Entry(GROUP, 7, 50),
    Entry(MASK, 6), Entry(OTHER, 1),
]  # fmt: skip

perms = st.integers(0, 7)
modes = st.integers(0, 0o7777)


@st.composite
def acls(draw: st.DrawFn) -> list[Entry]:
    """Valid ACLs of every shape."""
    named = st.lists(st.tuples(perms, st.integers(0, 1 << 31)), max_size=3)
    users, groups = draw(named), draw(named)
    entries = [Entry(USER_OBJ, draw(perms)), *(Entry(USER, p, i) for p, i in users)]
    entries += [Entry(GROUP_OBJ, draw(perms)), *(Entry(GROUP, p, i) for p, i in groups)]
    masked: bool = draw(st.booleans())
    if users or groups or masked:
        entries.append(Entry(MASK, draw(perms)))
    return [*entries, Entry(OTHER, draw(perms))]


@pytest.mark.parametrize("entries", [SMALL, FULL, [*SMALL[:2], Entry(MASK, 7), SMALL[2]], []])
def test_pack_and_parse(entries: list[Entry]) -> None:
    assert acl.parse(acl.pack(entries)) == entries


def test_format_is_the_kernels() -> None:
    assert acl.pack([Entry(USER, 5, 1000)]) == struct.pack("<IHHI", 2, 2, 5, 1000)
    assert acl.from_mode(0o640) == acl.pack(SMALL)


@pytest.mark.parametrize(
    "entries",
    [
        SMALL[:2],  # no other
        SMALL[1:],  # no owner
        [SMALL[0], SMALL[2]],  # no group
        [SMALL[1], SMALL[0], SMALL[2]],  # order
        [*SMALL, SMALL[2]],  # twice
        [*FULL[:5], FULL[6]],  # named entries without a mask
        [FULL[0], FULL[1], FULL[3], FULL[6]],
        [SMALL[0], Entry(USER, 6, acl.NO_ID), SMALL[1], Entry(MASK, 7), SMALL[2]],
        [SMALL[0], SMALL[1], Entry(OTHER, 8)],
        [SMALL[0], SMALL[1], Entry(0x40, 1), SMALL[2]],
    ],
)
def test_invalid_entries(entries: list[Entry]) -> None:
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)
    with pytest.raises(BadArgument):
        acl.parse(value)


@pytest.mark.parametrize("value", [b"", b"\2\0\0", acl.pack(SMALL)[:-1], acl.pack(SMALL) + b"\0"])
def test_invalid_length(value: bytes) -> None:
    with pytest.raises(BadArgument):
        acl.parse(value)


def test_other_version() -> None:
    with pytest.raises(NotSupported):
        acl.parse(struct.pack("<I", 1) + acl.pack(SMALL)[4:])


@given(st.binary(max_size=64))
def test_any_bytes_are_judged(value: bytes) -> None:
    try:
        entries = acl.parse(value)
    except (BadArgument, NotSupported):
        return
    assert acl.parse(acl.pack(entries)) == entries


def test_equivalent_mode() -> None:
    assert acl.equivalent_mode(acl.pack(SMALL)) == (0o640, True)
    assert acl.equivalent_mode(acl.pack(FULL)) == (0o761, False)
    assert acl.equivalent_mode(acl.pack([*SMALL[:2], Entry(MASK, 7), SMALL[2]])) == (0o670, False)


def test_chmod_moves_the_mask_not_the_group() -> None:
    entries = acl.parse(acl.chmod(acl.pack(FULL), 0o4520))
    assert [(e.tag, e.perm) for e in entries if e.tag in (USER_OBJ, GROUP_OBJ, MASK, OTHER)] == [
        (USER_OBJ, 5), (GROUP_OBJ, 5), (MASK, 2), (OTHER, 0),
    ]  # fmt: skip
    assert acl.chmod(acl.pack(SMALL), 0o751) == acl.from_mode(0o751)


@given(acls(), modes)
def test_mode_after_chmod_is_the_mode(entries: list[Entry], mode: int) -> None:
    changed = acl.chmod(acl.pack(entries), mode)
    assert acl.equivalent_mode(changed)[0] == mode & 0o777
    assert [(e.tag, e.id) for e in acl.parse(changed)] == [(e.tag, e.id) for e in entries]


def test_inherit() -> None:
    access, mode = acl.inherit(acl.pack(FULL), 0o2666)
    assert mode == 0o2660
    assert access is not None
    assert [e.perm for e in acl.parse(access)] == [6, 6, 4, 5, 7, 6, 0]
    assert acl.inherit(acl.pack(SMALL), 0o666) == (None, 0o640)


@given(acls(), modes)
def test_inherit_takes_the_lesser(entries: list[Entry], mode: int) -> None:
    access, got = acl.inherit(acl.pack(entries), mode)
    assert got == mode & ~0o777 | mode & acl.equivalent_mode(acl.pack(entries))[0]
    assert (access is None) == acl.equivalent_mode(acl.pack(entries))[1]
    if access is not None:
        assert acl.equivalent_mode(access)[0] == got & 0o777


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a tmpfs to compare with")
@given(acls(), modes)
def test_the_kernel_agrees(entries: list[Entry], mode: int) -> None:
    """The same default ACL on a tmpfs directory gives a new file the same mode and the same access ACL."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = os.path.join(directory, "file")
        try:
            os.setxattr(directory, acl.DEFAULT, acl.pack(entries))
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                pytest.skip("/dev/shm has no ACLs")
            raise
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode & 0o777))
        access, got = acl.inherit(acl.pack(entries), mode & 0o777)
        assert os.stat(path).st_mode & 0o777 == got
        assert (acl.ACCESS.decode() in os.listxattr(path)) == (access is not None)
        if access is not None:
            assert os.getxattr(path, acl.ACCESS) == access
        os.chmod(path, mode)
        if access is not None:
            assert os.getxattr(path, acl.ACCESS) == acl.chmod(access, mode)
