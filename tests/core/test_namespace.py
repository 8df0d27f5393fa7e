"""The verbs of names: what they refuse, what they leave behind when they are refused, links, renames, and a full volume."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

import pytest

from daxfs import errors
from daxfs.core import acl, attributes, fileops, layout, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    Caller,
    create,
    link,
    lookup,
    mkdir,
    readlink,
    rename,
    rmdir,
    symlink,
    tmpfile,
    unlink,
)
from daxfs.core.volume import Volume

from .image import NOW
from .power import state

B = 4096
LATER = NOW + 10**9
ROOT = Caller(0, 0)
USER = Caller(1000, 100, 0o027)


@pytest.fixture
def tree(vol: Volume) -> Iterator[Volume]:
    """/d (with /d/e, /d/f), /f, /g (two names: /g, /h), /l -> f. Memory and media say the same at the end."""
    d = mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
    mkdir(vol, NOW, d, b"e", 0o755, ROOT)
    for parent, name in ((d, b"f"), (vol.root, b"f"), (vol.root, b"g")):
        fileops.write(vol, NOW, create(vol, NOW, parent, name, 0o644, ROOT), 0, name * 100)
    link(vol, NOW, at(vol, b"g"), vol.root, b"h")
    symlink(vol, NOW, vol.root, b"l", b"f", ROOT)
    yield vol
    seen = state(vol)
    for inode in list(vol._inodes.values()):
        inode.revert()
    assert state(vol) == seen


def at(vol: Volume, path: bytes) -> Inode:
    inode = vol.root
    for name in path.split(b"/"):
        found = lookup(vol, inode, name)
        assert found is not None
        inode = found
    return inode


def names(vol: Volume, directory: Inode) -> set[bytes]:
    return {name for name, _, _, _ in namespace.entries(vol, directory, 0)}


# -- what is refused, and leaves nothing --

Call = Callable[[Volume], object]
REFUSED: dict[str, tuple[Call, type[errors.FsError]]] = {
    "create what is there": (lambda v: create(v, LATER, v.root, b"f", 0o644, ROOT), errors.Exists),
    "mkdir what is there": (lambda v: mkdir(v, LATER, v.root, b"d", 0o755, ROOT), errors.Exists),
    "symlink what is there": (lambda v: symlink(v, LATER, v.root, b"d", b"x", ROOT), errors.Exists),
    "link what is there": (lambda v: link(v, LATER, at(v, b"f"), v.root, b"d"), errors.Exists),
    "link a directory": (lambda v: link(v, LATER, at(v, b"d"), v.root, b"x"), errors.NotPermitted),
    "create in a file": (lambda v: create(v, LATER, at(v, b"f"), b"x", 0o644, ROOT), errors.NotDirectory),
    "lookup in a file": (lambda v: lookup(v, at(v, b"f"), b"x"), errors.NotDirectory),
    "tmpfile in a file": (lambda v: tmpfile(v, LATER, at(v, b"f"), 0o600, ROOT), errors.NotDirectory),
    "mknod a directory": (lambda v: create(v, LATER, v.root, b"x", stat.S_IFDIR, ROOT), errors.BadArgument),
    "mknod a link": (lambda v: create(v, LATER, v.root, b"x", stat.S_IFLNK, ROOT), errors.BadArgument),
    "no name": (lambda v: create(v, LATER, v.root, b"", 0o644, ROOT), errors.BadArgument),
    "dot": (lambda v: mkdir(v, LATER, v.root, b".", 0o755, ROOT), errors.BadArgument),
    "dots": (lambda v: symlink(v, LATER, v.root, b"..", b"x", ROOT), errors.BadArgument),
    "a slash": (lambda v: create(v, LATER, v.root, b"a/b", 0o644, ROOT), errors.BadArgument),
    "a NUL": (lambda v: create(v, LATER, v.root, b"a\0", 0o644, ROOT), errors.BadArgument),
    "a long name": (lambda v: create(v, LATER, v.root, b"n" * 256, 0o644, ROOT), errors.NameTooLong),
    "lookup of a long name": (lambda v: lookup(v, v.root, b"n" * 256), errors.NameTooLong),
    "rename to a long name": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"n" * 256), errors.NameTooLong),
    "an empty target": (lambda v: symlink(v, LATER, v.root, b"x", b"", ROOT), errors.NoEntry),
    "a long target": (lambda v: symlink(v, LATER, v.root, b"x", b"t" * 4096, ROOT), errors.NameTooLong),
    "unlink nothing": (lambda v: unlink(v, LATER, v.root, b"x"), errors.NoEntry),
    "unlink a directory": (lambda v: unlink(v, LATER, v.root, b"d"), errors.IsDirectory),
    "rmdir nothing": (lambda v: rmdir(v, LATER, v.root, b"x"), errors.NoEntry),
    "rmdir a file": (lambda v: rmdir(v, LATER, v.root, b"f"), errors.NotDirectory),
    "rmdir a full one": (lambda v: rmdir(v, LATER, v.root, b"d"), errors.NotEmpty),
    "readlink a file": (lambda v: readlink(v, at(v, b"f")), errors.BadArgument),
    "rename nothing": (lambda v: rename(v, LATER, v.root, b"x", v.root, b"y"), errors.NoEntry),
    "rename over, no replace": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"g", RENAME_NOREPLACE), errors.Exists),
    "no replace of itself": (lambda v: rename(v, LATER, v.root, b"g", v.root, b"h", RENAME_NOREPLACE), errors.Exists),
    "exchange with nothing": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"x", RENAME_EXCHANGE), errors.NoEntry),
    "flags that exclude each other": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"g", 3), errors.BadArgument),
    "exchange and whiteout": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"g", 6), errors.BadArgument),
    "unknown flags": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"y", 8), errors.BadArgument),
    "a file over a directory": (lambda v: rename(v, LATER, v.root, b"f", v.root, b"d"), errors.IsDirectory),
    "a directory over a file": (lambda v: rename(v, LATER, v.root, b"d", v.root, b"f"), errors.NotDirectory),
    "over a full directory": (lambda v: rename(v, LATER, at(v, b"d"), b"e", v.root, b"d"), errors.NotEmpty),
    "into itself": (lambda v: rename(v, LATER, v.root, b"d", at(v, b"d/e"), b"x"), errors.BadArgument),
    "onto its own child": (lambda v: rename(v, LATER, v.root, b"d", at(v, b"d"), b"e"), errors.BadArgument),
    "exchange with an ancestor": (lambda v: rename(v, LATER, at(v, b"d"), b"e", v.root, b"d", RENAME_EXCHANGE),
                                  errors.BadArgument),
    "rename dot": (lambda v: rename(v, LATER, v.root, b".", v.root, b"x"), errors.NoEntry),
    "rename to dots": (lambda v: rename(v, LATER, v.root, b"f", v.root, b".."), errors.BadArgument),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tree: Volume, what: str) -> None:
    call, error = REFUSED[what]
    before, free, inodes = state(tree), tree.free, sorted(tree.free_inodes)
    with pytest.raises(error):
        call(tree)
    assert state(tree) == before
    assert (tree.free, sorted(tree.free_inodes)) == (free, inodes)
    tree.check()


# -- the same on a full volume --

FULL: dict[str, Call] = {
    "create": lambda v: create(v, LATER, at(v, b"d/e"), b"x", 0o644, ROOT),
    "mkdir": lambda v: mkdir(v, LATER, at(v, b"d/e"), b"x", 0o755, ROOT),
    "symlink": lambda v: symlink(v, LATER, at(v, b"d/e"), b"x", b"t", ROOT),
    "long symlink": lambda v: symlink(v, LATER, v.root, b"x", b"t" * 300, ROOT),
    "link": lambda v: link(v, LATER, at(v, b"f"), at(v, b"d/e"), b"x"),
    "rename a file": lambda v: rename(v, LATER, v.root, b"f", at(v, b"d/e"), b"x"),
    "rename a directory": lambda v: rename(v, LATER, v.root, b"d2", at(v, b"d/e"), b"x"),
    "xattr": lambda v: attributes.setxattr(v, LATER, at(v, b"f"), b"user.a", b"x" * 300),
    "default ACL": lambda v: attributes.setxattr(v, LATER, at(v, b"d"), acl.DEFAULT, long_acl()),
    "mkdir that inherits": lambda v: mkdir(v, LATER, at(v, b"inherits"), b"x", 0o755, ROOT),
}


def long_acl() -> bytes:
    users = [acl.Entry(acl.USER, 7, who) for who in range(60)]
    return acl.pack([acl.Entry(acl.USER_OBJ, 7), *users, acl.Entry(acl.GROUP_OBJ, 5), acl.Entry(acl.MASK, 7),
                     acl.Entry(acl.OTHER, 5)])  # fmt: skip


def fill(vol: Volume, leave: int = 0) -> None:
    hog = create(vol, NOW, vol.root, b"hog", 0o644, ROOT)
    fileops.fallocate(vol, NOW, hog, 0, 0, (vol.alloc.available - leave) * B)
    assert vol.alloc.available == leave


@pytest.mark.parametrize("what", FULL)
def test_refused_on_a_full_volume(tree: Volume, what: str) -> None:
    """NoSpace, and neither memory nor media have changed; with enough space the same call works."""
    mkdir(tree, NOW, tree.root, b"d2", 0o755, ROOT)
    inherits = mkdir(tree, NOW, tree.root, b"inherits", 0o755, ROOT)
    attributes.setxattr(tree, NOW, inherits, acl.DEFAULT, long_acl())
    fill(tree)
    before, free, inodes = state(tree), tree.free, sorted(tree.free_inodes)
    with pytest.raises(errors.NoSpace):
        FULL[what](tree)
    assert state(tree) == before
    assert (tree.free, sorted(tree.free_inodes)) == (free, inodes)
    tree.check()
    for inode in list(tree._inodes.values()):
        inode.revert()
    assert state(tree) == before
    unlink(tree, NOW, tree.root, b"hog")
    fileops.truncate(tree, NOW, tree.inode(max(tree._inodes)), 0)
    FULL[what](tree)
    tree.check()


def test_no_inode_left_for_a_whiteout(tree: Volume) -> None:
    """The second half of a rename fails: the first one has not happened."""
    fill(tree, 100)
    while tree.free_inodes:
        create(tree, NOW, tree.root, b"%d" % len(tree.free_inodes), 0o644, ROOT)
    fileops.fallocate(tree, NOW, at(tree, b"hog"), 1, 0, (at(tree, b"hog").map.blocks + tree.alloc.available) * B)
    before = state(tree)
    for name, new_parent in ((b"f", tree.root), (b"d", tree.root), (b"e", tree.root)):
        parent = tree.root if name != b"e" else at(tree, b"d")
        with pytest.raises(errors.NoSpace):
            rename(tree, LATER, parent, name, new_parent, b"new", RENAME_WHITEOUT)
        assert state(tree) == before
    tree.check()


# -- making --


def test_who_owns_what_is_made(vol: Volume) -> None:
    file = create(vol, NOW, vol.root, b"f", stat.S_IFREG | 0o6777, USER)
    directory = mkdir(vol, NOW, vol.root, b"d", 0o1777, USER)
    device = create(vol, NOW, vol.root, b"n", stat.S_IFCHR | 0o666, USER, rdev=0x103)
    assert [(i.mode, i.uid, i.gid, i.nlink, i.rdev) for i in (file, directory, device)] == [
        (stat.S_IFREG | 0o6750, 1000, 100, 1, 0),
        (stat.S_IFDIR | 0o1750, 1000, 100, 2, 0),
        (stat.S_IFCHR | 0o640, 1000, 100, 1, 0x103),
    ]
    assert symlink(vol, NOW, vol.root, b"l", b"x", USER).mode == stat.S_IFLNK | 0o777
    assert {i.mtime for i in (file, directory, device)} == {NOW}
    assert (vol.root.nlink, directory.parent, file.parent) == (3, 1, 0)


def test_what_an_sgid_directory_passes_on(vol: Volume) -> None:
    shared = mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
    attributes.setattr(vol, NOW, shared, attributes.Attributes(mode=0o2775, gid=42))
    assert create(vol, NOW, shared, b"f", 0o644, USER).gid == 42
    assert symlink(vol, NOW, shared, b"l", b"x", USER).gid == 42
    sub = mkdir(vol, NOW, shared, b"s", 0o755, USER)
    assert (sub.gid, stat.S_IMODE(sub.mode)) == (42, 0o2750)


def test_a_default_acl_replaces_the_umask(vol: Volume) -> None:
    directory = mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
    attributes.setxattr(vol, NOW, directory, acl.DEFAULT, long_acl())
    file = create(vol, NOW, directory, b"f", 0o666, USER)
    assert stat.S_IMODE(file.mode) == 0o664
    assert attributes.listxattr(vol, file) == [acl.ACCESS]
    sub = mkdir(vol, NOW, directory, b"s", 0o777, USER)
    assert attributes.getxattr(vol, sub, acl.DEFAULT) == long_acl()


@pytest.mark.parametrize("length", [1, layout.INLINE_TARGET_MAX, layout.INLINE_TARGET_MAX + 1, 4095])
def test_targets(vol: Volume, length: int) -> None:
    target = bytes(range(1, 256)) * 17
    inode = symlink(vol, NOW, vol.root, b"l", target[:length], ROOT)
    vol.forget(inode)
    again = at(vol, b"l")
    assert readlink(vol, again) == target[:length]
    assert (again.size, again.map.blocks) == (length, length > layout.INLINE_TARGET_MAX)
    free = vol.free
    unlink(vol, NOW, vol.root, b"l")
    fileops.reap(vol, NOW, again)
    assert vol.free == free + (length > layout.INLINE_TARGET_MAX)


def test_a_target_that_is_none(vol: Volume) -> None:
    inode = symlink(vol, NOW, vol.root, b"l", b"t" * 300, ROOT)
    vol.pmem.store(inode.block(0) * B + 7, b"\0")
    with pytest.raises(errors.Corrupt, match="no valid target"):
        readlink(vol, inode)


@pytest.mark.parametrize("name", [b"n" * 255, b"\xff\x01 \n", b"...", "größe".encode(), b"a"])
def test_names_are_bytes(vol: Volume, name: bytes) -> None:
    inode = create(vol, NOW, vol.root, name, 0o644, ROOT)
    assert names(vol, vol.root) == {name}
    assert lookup(vol, vol.root, name) is inode
    assert lookup(vol, vol.root, name[:-1] + b"\x02") is None


def test_dot_and_dots(tree: Volume) -> None:
    e = at(tree, b"d/e")
    assert lookup(tree, e, b".") is e
    assert lookup(tree, e, b"..") is at(tree, b"d")
    assert lookup(tree, tree.root, b"..") is tree.root
    rename(tree, NOW, at(tree, b"d"), b"e", tree.root, b"e")
    assert lookup(tree, e, b"..") is tree.root


# -- links and ends --


def test_links_are_counted(tree: Volume) -> None:
    g = at(tree, b"g")
    assert g.nlink == 2
    link(tree, LATER, g, at(tree, b"d"), b"g")
    assert (g.nlink, g.ctime, g.mtime) == (3, LATER, NOW)
    for parent, name in ((tree.root, b"g"), (at(tree, b"d"), b"g"), (tree.root, b"h")):
        unlink(tree, NOW, parent, name)
    assert g.nlink == 0
    fileops.reap(tree, NOW, g)
    assert g.dead


def test_as_many_links_as_there_can_be(tree: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LINK_MAX", 3)
    link(tree, NOW, at(tree, b"g"), tree.root, b"i")
    before = state(tree)
    with pytest.raises(errors.TooManyLinks):
        link(tree, NOW, at(tree, b"g"), tree.root, b"j")
    with pytest.raises(errors.TooManyLinks):
        mkdir(tree, NOW, at(tree, b"d"), b"x", 0o755, ROOT)
    with pytest.raises(errors.TooManyLinks):
        mkdir(tree, NOW, tree.root, b"x", 0o755, ROOT)
    assert state(tree) == before
    rename(tree, NOW, tree.root, b"d", tree.root, b"still")  # no link more


def test_a_removed_directory_takes_no_names(tree: Volume) -> None:
    e = at(tree, b"d/e")
    e.opens = 1
    rmdir(tree, LATER, at(tree, b"d"), b"e")
    assert (e.nlink, at(tree, b"d").nlink) == (0, 2)
    for call in (
        lambda: create(tree, NOW, e, b"x", 0o644, ROOT),
        lambda: mkdir(tree, NOW, e, b"x", 0o755, ROOT),
        lambda: link(tree, NOW, at(tree, b"f"), e, b"x"),
        lambda: rename(tree, NOW, tree.root, b"f", e, b"x"),
    ):
        with pytest.raises(errors.NoEntry):
            call()
    assert names(tree, e) == set()
    e.opens = 0
    fileops.reap(tree, NOW, e)


def test_a_directory_gives_its_blocks_back(vol: Volume) -> None:
    directory = mkdir(vol, NOW, vol.root, b"d", 0o755, ROOT)
    free = vol.free
    for i in range(60):
        create(vol, NOW, directory, b"%0250d" % i, 0o644, ROOT)
    assert directory.size == directory.map.blocks * B > B
    for i in range(60):
        inode = at(vol, b"d/%0250d" % i)
        unlink(vol, NOW, directory, b"%0250d" % i)
        fileops.reap(vol, NOW, inode)
    rmdir(vol, NOW, vol.root, b"d")
    fileops.reap(vol, NOW, directory)
    assert vol.free == free - 4 * (len(vol.chunks) - 1)


def test_tmpfile(vol: Volume) -> None:
    inode = tmpfile(vol, NOW, vol.root, 0o666, USER)
    inode.opens = 1
    fileops.write(vol, NOW, inode, 0, b"x" * B)
    assert (inode.nlink, names(vol, vol.root), stat.S_IMODE(inode.mode)) == (0, set(), 0o640)
    link(vol, NOW, inode, vol.root, b"f")
    assert (inode.nlink, names(vol, vol.root)) == (1, {b"f"})
    inode.opens = 0
    fileops.reap(vol, NOW, inode)
    assert fileops.read(vol, at(vol, b"f"), 0, 1) == b"x"


def test_an_entry_of_a_free_inode(vol: Volume) -> None:
    inode = create(vol, NOW, vol.root, b"f", 0o644, ROOT)
    vol.drop(inode)
    record = vol.pmem.load(inode.at, layout.INODE_SIZE)
    vol.pmem.fill_zero(inode.at, layout.INODE_SIZE)
    for call in (lambda: lookup(vol, vol.root, b"f"), lambda: unlink(vol, NOW, vol.root, b"f")):
        with pytest.raises(errors.Corrupt, match="which is free"):
            call()
    vol.pmem.store(inode.at, record)
    assert at(vol, b"f").ino == inode.ino


# -- rename --


def test_rename_moves(tree: Volume) -> None:
    f, d = at(tree, b"f"), at(tree, b"d")
    rename(tree, LATER, tree.root, b"f", d, b"new")
    assert at(tree, b"d/new") is f
    assert lookup(tree, tree.root, b"f") is None
    assert (f.ctime, tree.root.mtime, d.mtime, f.mtime) == (LATER, LATER, LATER, NOW)


def test_rename_of_a_directory_moves_its_parent(tree: Volume) -> None:
    e = at(tree, b"d/e")
    rename(tree, NOW, at(tree, b"d"), b"e", tree.root, b"e")
    assert (e.parent, tree.root.nlink, at(tree, b"d").nlink) == (1, 4, 2)
    rename(tree, NOW, tree.root, b"d", e, b"d")
    assert (at(tree, b"e/d").parent, tree.root.nlink, e.nlink) == (e.ino, 3, 3)


def test_rename_over(tree: Volume) -> None:
    f, g = at(tree, b"f"), at(tree, b"g")
    rename(tree, LATER, tree.root, b"f", tree.root, b"g")
    assert at(tree, b"g") is f
    assert (g.nlink, g.ctime, f.nlink) == (1, LATER, 1)
    assert names(tree, tree.root) == {b"d", b"g", b"h", b"l"}
    empty = mkdir(tree, NOW, tree.root, b"empty", 0o755, ROOT)
    rename(tree, NOW, at(tree, b"d"), b"e", tree.root, b"empty")
    assert (empty.nlink, tree.root.nlink, at(tree, b"d").nlink, at(tree, b"empty").parent) == (0, 4, 2, 1)
    fileops.reap(tree, NOW, empty)


def test_two_names_of_one_file(tree: Volume) -> None:
    before = state(tree)
    rename(tree, LATER, tree.root, b"g", tree.root, b"h")
    rename(tree, LATER, tree.root, b"g", tree.root, b"g")
    rename(tree, LATER, tree.root, b"g", tree.root, b"h", RENAME_EXCHANGE)
    assert state(tree) == before


def test_exchange(tree: Volume) -> None:
    f, e, d = at(tree, b"f"), at(tree, b"d/e"), at(tree, b"d")
    rename(tree, LATER, tree.root, b"f", d, b"e", RENAME_EXCHANGE)
    assert (at(tree, b"d/e"), at(tree, b"f")) == (f, e)
    assert (e.parent, tree.root.nlink, d.nlink, f.ctime, e.ctime) == (1, 4, 2, LATER, LATER)
    rename(tree, NOW, tree.root, b"l", tree.root, b"f", RENAME_EXCHANGE)
    assert at(tree, b"l") is e
    assert readlink(tree, at(tree, b"f")) == b"f"
    kinds = {name: dtype for name, _, dtype, _ in namespace.entries(tree, tree.root, 0)}
    assert (kinds[b"l"], kinds[b"f"]) == (4, 10)


def test_whiteout(tree: Volume) -> None:
    f = at(tree, b"f")
    rename(tree, NOW, tree.root, b"f", tree.root, b"new", RENAME_WHITEOUT | RENAME_NOREPLACE)
    left = at(tree, b"f")
    assert (left.mode, left.rdev, left.nlink) == (stat.S_IFCHR, 0, 1)
    assert at(tree, b"new") is f


def test_deep_chains_of_directories(vol: Volume) -> None:
    directory = vol.root
    for _ in range(200):
        directory = mkdir(vol, NOW, directory, b"d", 0o755, ROOT)
    top = at(vol, b"d")
    with pytest.raises(errors.BadArgument):
        rename(vol, NOW, vol.root, b"d", directory, b"x")
    rename(vol, NOW, top, b"d", vol.root, b"other")
    assert at(vol, b"other").parent == 1
