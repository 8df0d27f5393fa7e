"""Mode, owner, times, extended attributes and ACLs, as Linux has them where it leaves them to the file system."""

from __future__ import annotations

import errno
import stat

import pytest

from daxfs.core import acl, attributes, fileops, namespace
from daxfs.core.attributes import Attributes, getxattr, listxattr, removexattr, setxattr
from daxfs.core.extents import HOT_READ, HOT_WRITE
from daxfs.core.inode import Inode
from daxfs.core.layout import TIME_MAX, TIME_MIN
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume
from daxfs.errors import (
    AccessDenied,
    BadArgument,
    Exists,
    FsError,
    NoData,
    NoSpace,
    NotSupported,
    OutOfRange,
    TooBig,
)  # fmt: skip

from .image import NOW
from .power import state

B = 4096
LATER = NOW + 10**9
CAPABILITY = b"security.capability"


@pytest.fixture
def file(vol: Volume) -> Inode:
    return namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))


@pytest.fixture
def directory(vol: Volume) -> Inode:
    return namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, Caller(0, 0))


def rights(user: int, group: int, other: int, *, named: int | None = None, mask: int | None = None) -> bytes:
    """An ACL; with a named user it has a mask."""
    entries = [acl.Entry(acl.USER_OBJ, user)]
    if named is not None:
        entries.append(acl.Entry(acl.USER, named, 77))
    entries.append(acl.Entry(acl.GROUP_OBJ, group))
    if mask is not None:
        entries.append(acl.Entry(acl.MASK, mask))
    return acl.pack([*entries, acl.Entry(acl.OTHER, other)])


def mode(inode: Inode) -> int:
    return stat.S_IMODE(inode.mode)


def change(vol: Volume, inode: Inode, **what: int | bool) -> None:
    attributes.setattr(vol, LATER, inode, Attributes(**what))


# -- setattr --


def test_all_at_once(vol: Volume, file: Inode) -> None:
    fileops.write(vol, NOW, file, 0, b"x" * 3 * B)
    change(vol, file, mode=0o1640, uid=1, gid=2, size=B + 1, atime=3, mtime=4)
    for _ in range(2):
        assert (file.mode, file.uid, file.gid, file.size) == (stat.S_IFREG | 0o1640, 1, 2, B + 1)
        assert (file.atime, file.mtime, file.ctime) == (3, 4, LATER)
        file.revert()  # memory said so, now media


def test_refused_as_a_whole(vol: Volume, file: Inode) -> None:
    before = state(vol)
    with pytest.raises(TooBig):
        change(vol, file, mode=0o600, uid=5, size=1 << 63, atime=1)
    assert state(vol) == before


def test_only_what_is_asked(vol: Volume, file: Inode) -> None:
    change(vol, file, uid=7)
    assert (file.uid, file.gid, mode(file), file.mtime, file.atime, file.ctime) == (7, 0, 0o644, NOW, NOW, LATER)
    change(vol, file, mode=0o7777 | stat.S_IFDIR)
    assert file.mode == stat.S_IFREG | 0o7777


@pytest.mark.parametrize("ns", [0, -1, -(10**9), 1, 999_999_999, TIME_MIN * 10**9, TIME_MAX * 10**9 + 999_999_999])
def test_times_to_the_nanosecond(vol: Volume, file: Inode, ns: int) -> None:
    change(vol, file, atime=ns, mtime=ns)
    file.revert()
    assert (file.atime, file.mtime) == (ns, ns)


def test_times_are_clamped(vol: Volume, file: Inode) -> None:
    change(vol, file, atime=-(1 << 62), mtime=1 << 65)
    assert (file.atime, file.mtime) == (TIME_MIN * 10**9, TIME_MAX * 10**9 + 999_999_999)


@pytest.mark.parametrize(("before", "after"), [(0o4755, 0o755), (0o6755, 0o755), (0o2745, 0o2745), (0o1755, 0o1755)])
@pytest.mark.parametrize("who", [{"uid": 5}, {"gid": 5}, {"uid": 0, "gid": 0}])
def test_a_change_of_owner_drops_privileges(vol: Volume, file: Inode, before: int, after: int, who: dict[str, int]) -> None:
    change(vol, file, mode=before)
    setxattr(vol, NOW, file, CAPABILITY, b"c")
    change(vol, file, **who)
    assert mode(file) == after
    assert listxattr(vol, file) == []


def test_a_directory_keeps_its_bits(vol: Volume, directory: Inode) -> None:
    change(vol, directory, mode=0o6755)
    change(vol, directory, uid=5, gid=6)
    assert mode(directory) == 0o6755


def test_owner_and_mode_in_one_call(vol: Volume, file: Inode) -> None:
    """The mode that is asked for counts, whatever the change of owner drops."""
    change(vol, file, mode=0o755)
    change(vol, file, uid=5, mode=0o4711)
    assert mode(file) == 0o4711


def test_only_files_have_a_size(vol: Volume, directory: Inode) -> None:
    fifo = namespace.create(vol, NOW, vol.root, b"p", stat.S_IFIFO | 0o600, Caller(0, 0))
    before = state(vol)
    for inode, number in ((directory, errno.EISDIR), (fifo, errno.EINVAL)):
        with pytest.raises(FsError) as refused:
            change(vol, inode, size=0, mode=0)
        assert refused.value.errno == number
    assert state(vol) == before


# -- what the native session may do by itself --


def test_hot_files(vol: Volume, file: Inode) -> None:
    """Reads while it is open; writes too, unless a write has to drop something."""

    def hot() -> int:
        return file.map.hot

    assert hot() == 0
    file.opens = 1
    file.set_hot()
    assert hot() == HOT_READ | HOT_WRITE
    for privileged in (0o4644, 0o2755):
        change(vol, file, mode=privileged)
        assert hot() == HOT_READ
        change(vol, file, mode=0o644)
        assert hot() == HOT_READ | HOT_WRITE
    setxattr(vol, NOW, file, CAPABILITY, b"c")
    assert hot() == HOT_READ
    fileops.write(vol, NOW, file, 0, b"x")
    assert hot() == HOT_READ | HOT_WRITE
    vol.fail("test")
    assert hot() == 0
    vol.failed = ""


# -- extended attributes --


def test_namespaces(vol: Volume, file: Inode) -> None:
    for name in (b"user.a", b"trusted.a", b"security.a"):
        setxattr(vol, LATER, file, name, name)
        assert getxattr(vol, file, name) == name
    assert file.ctime == LATER
    assert listxattr(vol, file, trusted=False) == [b"user.a", b"security.a"]
    before = state(vol)
    for name in (b"system.a", b"a", b"os2.a", b"", b"userx.a", b"system.posix_acl_accessx"):
        for call in (lambda n: setxattr(vol, NOW, file, n, b""), lambda n: getxattr(vol, file, n),
                     lambda n: removexattr(vol, NOW, file, n)):  # fmt: skip
            with pytest.raises(NotSupported):
                call(name)
    for name in (b"user.", b"trusted.", b"security."):
        with pytest.raises(BadArgument):
            setxattr(vol, NOW, file, name, b"")
    assert state(vol) == before


def test_create_and_replace(vol: Volume, file: Inode) -> None:
    with pytest.raises(NoData):
        setxattr(vol, NOW, file, b"user.a", b"1", 2)
    setxattr(vol, NOW, file, b"user.a", b"1", 1)
    with pytest.raises(Exists):
        setxattr(vol, NOW, file, b"user.a", b"2", 1)
    setxattr(vol, NOW, file, b"user.a", b"3", 2)
    assert getxattr(vol, file, b"user.a") == b"3"
    removexattr(vol, LATER, file, b"user.a")
    with pytest.raises(NoData):
        removexattr(vol, NOW, file, b"user.a")
    with pytest.raises(NoData):
        getxattr(vol, file, b"user.a")
    assert file.ctime == LATER


def test_a_refused_xattr_leaves_the_time(vol: Volume, file: Inode) -> None:
    before = state(vol)
    for name, value, error in ((b"user." + b"n" * 251, b"", OutOfRange), (b"user.a", b"x" * 65537, FsError)):
        with pytest.raises(error):
            setxattr(vol, LATER, file, name, value)
    assert state(vol) == before


def test_xattrs_of_all_kinds_of_inodes(vol: Volume, directory: Inode) -> None:
    link = namespace.symlink(vol, NOW, vol.root, b"l", b"x" * 300, Caller(0, 0))
    fifo = namespace.create(vol, NOW, vol.root, b"p", stat.S_IFIFO | 0o600, Caller(0, 0))
    free = vol.free
    for inode in (directory, link, fifo):
        setxattr(vol, NOW, inode, b"trusted.a", b"v" * 5000)
        assert getxattr(vol, inode, b"trusted.a") == b"v" * 5000
    assert vol.free == free - 6
    namespace.rmdir(vol, NOW, vol.root, b"d")
    namespace.unlink(vol, NOW, vol.root, b"l")
    namespace.unlink(vol, NOW, vol.root, b"p")
    for inode in (directory, link, fifo):
        fileops.reap(vol, NOW, inode)
    assert vol.free == free + 1


# -- ACLs --


def test_an_acl_that_is_a_mode(vol: Volume, file: Inode) -> None:
    setxattr(vol, LATER, file, acl.ACCESS, rights(6, 4, 0))
    assert (mode(file), listxattr(vol, file), file.ctime) == (0o640, [], LATER)


def test_an_acl_that_says_more(vol: Volume, file: Inode) -> None:
    value = rights(7, 5, 1, named=6, mask=4)
    setxattr(vol, NOW, file, acl.ACCESS, value)
    assert (mode(file), getxattr(vol, file, acl.ACCESS)) == (0o741, value)
    setxattr(vol, NOW, file, acl.ACCESS, rights(6, 6, 6))
    assert (mode(file), listxattr(vol, file)) == (0o666, [])


def test_chmod_keeps_the_acl_right(vol: Volume, file: Inode) -> None:
    setxattr(vol, NOW, file, acl.ACCESS, rights(7, 5, 1, named=6, mask=4))
    change(vol, file, mode=0o4612)
    assert mode(file) == 0o4612
    assert getxattr(vol, file, acl.ACCESS) == rights(6, 5, 2, named=6, mask=1)


def test_an_acl_that_is_taken_away(vol: Volume, file: Inode) -> None:
    setxattr(vol, NOW, file, acl.ACCESS, rights(7, 5, 1, named=6, mask=4))
    removexattr(vol, NOW, file, acl.ACCESS)
    assert (mode(file), listxattr(vol, file)) == (0o741, [])
    setxattr(vol, NOW, file, acl.ACCESS, rights(7, 5, 1, named=6, mask=4))
    setxattr(vol, NOW, file, acl.ACCESS, acl.pack([]))
    assert listxattr(vol, file) == []


def test_sgid_and_acls(vol: Volume, file: Inode) -> None:
    """Setting an ACL without being in the group drops sgid (FUSE_SETXATTR_ACL_KILL_SGID)."""
    for kill, left in ((False, 0o2640), (True, 0o640)):
        change(vol, file, mode=0o2777)
        setxattr(vol, NOW, file, acl.ACCESS, rights(6, 4, 0), kill_sgid=kill)
        assert mode(file) == left


def test_default_acls(vol: Volume, file: Inode, directory: Inode) -> None:
    value = rights(7, 5, 0)
    setxattr(vol, NOW, directory, acl.DEFAULT, value)
    assert (mode(directory), getxattr(vol, directory, acl.DEFAULT)) == (0o755, value)
    setxattr(vol, NOW, directory, acl.DEFAULT, acl.pack([]))
    assert listxattr(vol, directory) == []
    with pytest.raises(AccessDenied):
        setxattr(vol, NOW, file, acl.DEFAULT, value)
    setxattr(vol, NOW, file, acl.DEFAULT, acl.pack([]))


def test_bad_acls(vol: Volume, file: Inode, directory: Inode) -> None:
    link = namespace.symlink(vol, NOW, vol.root, b"l", b"x", Caller(0, 0))
    before = state(vol)
    for value in (b"", b"\2\0\0", rights(7, 5, 1)[:-8], rights(7, 5, 1, named=6), rights(8, 5, 1)):
        for inode, name in ((file, acl.ACCESS), (directory, acl.DEFAULT)):
            with pytest.raises(BadArgument):
                setxattr(vol, LATER, inode, name, value)
    with pytest.raises(NotSupported):
        setxattr(vol, LATER, link, acl.ACCESS, rights(7, 5, 1))
    assert state(vol) == before


def test_chmod_on_a_volume_without_a_block(vol: Volume, file: Inode) -> None:
    """Even the reserve is gone: chmod has to write the ACL anew, cannot, and has changed nothing."""
    entries = [acl.Entry(acl.USER, 7, who) for who in range(60)]
    setxattr(vol, NOW, file, acl.ACCESS, acl.pack([acl.Entry(acl.USER_OBJ, 7), *entries, acl.Entry(acl.GROUP_OBJ, 5),
                                                   acl.Entry(acl.MASK, 7), acl.Entry(acl.OTHER, 5)]))  # fmt: skip
    rest = vol.alloc.take(vol.free, meta=True)
    before = state(vol)
    with pytest.raises(NoSpace):
        change(vol, file, mode=0o600, uid=5)
    assert state(vol) == before
    vol.alloc.give(rest)
    change(vol, file, mode=0o600)
    assert mode(file) == 0o600
