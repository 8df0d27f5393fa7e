"""Names, statement by statement: who may make, link, rename and remove what, what it answers, which times it moves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.mount.conformance import BAD_ADDRESS, FILES, LINKABLE, TYPES, Watch, ask, end_helpers, expect, make, remove
from tests.mount.harness import Mounted


@pytest.fixture(autouse=True)
def work(shared_mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared_mount.fresh_directory())


@pytest.fixture(scope="module", autouse=True)
def people() -> Iterator[None]:
    yield
    end_helpers()


U, V, W = 65534, 65533, 65532  # users, and their groups
AS_U = (U, U)  # a user, its group, more groups
DENIED = {"EACCES", "EPERM"}
MAKERS = ("regular", "dir", "fifo")


def maker(kind: str, path: str, mode: int) -> tuple[object, ...]:
    if kind == "regular":
        return ("open", path, os.O_CREAT | os.O_WRONLY, mode)
    return ("mkdir", path, mode) if kind == "dir" else ("mkfifo", path, mode)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_name_has_the_mode_without_the_umask(kind: str) -> None:
    for umask, mode in ((0, 0o755), (0, 0o151), (0o77, 0o151), (0o70, 0o345), (0o501, 0o345)):
        expect(0, *maker(kind, "n", mode), umask=umask)
        expect((kind, mode & ~umask), "lstat", "n", "type", "mode")
        remove(kind, "n")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_new_name_belongs_to_its_maker(kind: str) -> None:
    expect(0, "chown", ".", U, U)
    expect(0, *maker(kind, "n", 0o644), by=AS_U)
    expect((U, U), "lstat", "n", "uid", "gid")
    remove(kind, "n")
    expect(0, *maker(kind, "n", 0o644), by=(U, V))
    expect((U, V), "lstat", "n", "uid", "gid")
    remove(kind, "n")
    expect(0, "chmod", ".", 0o777)
    expect(0, *maker(kind, "n", 0o644), by=(V, W))
    expect((V, W), "lstat", "n", "uid", "gid")
    remove(kind, "n")


@pytest.mark.parametrize("kind", TYPES)
def test_a_set_group_id_directory_gives_its_group(kind: str) -> None:
    expect(0, "mkdir", "d", 0o755)
    expect(0, "chown", "d", U, V)
    expect(0, "chmod", "d", 0o2777)
    make(kind, "d/n")
    expect(V, "lstat", "d/n", "gid")
    if kind == "dir":
        expect(0o2755, "lstat", "d/n", "mode")
    remove(kind, "d/n")


def test_a_set_group_id_file_needs_its_group() -> None:
    """Made in somebody else's group, executable by that group: the maker who is not in it does not get the bit."""
    expect(0, "chown", ".", 0, V)
    expect(0, "chmod", ".", 0o2777)
    expect(0, "create", "n", 0o2775, by=AS_U)
    expect((V, 0o775), "lstat", "n", "gid", "mode")
    expect(0, "create", "m", 0o2775, by=(U, U, V))
    expect((V, 0o2775), "lstat", "m", "gid", "mode")


@pytest.mark.parametrize("kind", TYPES)
def test_making_moves_the_times_of_the_directory(kind: str) -> None:
    with Watch(".", moved=("mtime", "ctime"), still=("atime",)):
        make(kind, "n")
    before = os.lstat(".").st_ctime_ns
    made = os.lstat("n")
    expect(1 if kind != "dir" else 2, "lstat", "n", "nlink")
    assert min(made.st_atime_ns, made.st_mtime_ns, made.st_ctime_ns) >= before - 10_000_000
    assert made.st_atime_ns == made.st_mtime_ns == made.st_ctime_ns
    remove(kind, "n")


@pytest.mark.parametrize("kind", TYPES)
def test_removing_moves_the_times_of_the_directory(kind: str) -> None:
    make(kind, "n")
    with Watch(".", moved=("mtime", "ctime"), still=("atime",)):
        remove(kind, "n")
    expect("ENOENT", "lstat", "n", "type")


@pytest.mark.parametrize("kind", TYPES)
def test_what_exists_cannot_be_made_again(kind: str) -> None:
    make(kind, "n")
    make("regular", "other")
    with Watch(".", still=("mtime", "ctime")), Watch("n", still=("mtime", "ctime")):
        expect("EEXIST", "open", "n", os.O_CREAT | os.O_EXCL, 0o644)
        expect("EEXIST", "mkdir", "n", 0o755)
        expect("EEXIST", "mkfifo", "n", 0o644)
        expect("EEXIST", "mknod", "n", "char", 0o644)
        expect("EEXIST", "symlink", "test", "n")
        expect("EEXIST", "link", "other", "n")
        expect({"EADDRINUSE"}, "bind", "n")
    remove(kind, "n")


@pytest.mark.parametrize("kind", ["char", "block"])
def test_device_numbers_are_kept(kind: str) -> None:
    for major, minor in ((1, 2), (255, 255), (4095, 1048575)):
        expect(0, "mknod", "n", kind, 0o755, major, minor)
        expect((kind, 0o755, major, minor), "lstat", "n", "type", "mode", "major", "minor")
        remove(kind, "n")
    expect(0, "chmod", ".", 0o777)
    expect("EPERM", "mknod", "n", kind, 0o644, by=AS_U)


def test_a_mode_of_nothing_lets_its_maker_write() -> None:
    expect(0, "chmod", ".", 0o777)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        expect(0, "open", "n", os.O_CREAT | flags, 0, by=AS_U)
        expect(("regular", 0), "lstat", "n", "type", "mode")
        remove("regular", "n")
    expect(0, ("open", "n", os.O_CREAT | os.O_RDWR, 0), ("write", 0, b"x"), ("ftruncate", 0, 0), by=AS_U)


def test_opening_what_exists_leaves_the_directory_alone() -> None:
    make("regular", "n")
    with Watch(".", still=("mtime", "ctime")):
        expect(0, "open", "n", os.O_CREAT | os.O_RDONLY, 0o644)


def test_truncating_open_moves_the_times() -> None:
    expect(0, ("open", "n", os.O_CREAT | os.O_WRONLY, 0o644), ("write", 0, b"test\n"))
    expect(5, "stat", "n", "size")
    with Watch("n", moved=("mtime", "ctime")):
        expect(0, "open", "n", os.O_WRONLY | os.O_TRUNC)
    expect(0, "stat", "n", "size")


@pytest.mark.parametrize("bits", range(8))
def test_open_needs_the_permissions_of_its_class(bits: int) -> None:
    """The owner's bits count for the owner, the group's for the group: never the most friendly ones."""
    expect(0, "chown", ".", U, U)
    expect(0, ("open", "n", os.O_CREAT | os.O_WRONLY, 0o644), ("write", 0, b"x"), by=AS_U)
    readable, writable = bits & 4, bits & 2
    everybody_else = 7
    for shift, user, group in ((6, U, U), (3, V, U), (0, V, V)):
        mode = bits << shift
        for other in (6, 3, 0):
            mode |= everybody_else << other if other != shift else 0
        expect(0, "chmod", "n", mode, by=AS_U)
        who = (user, group)
        expect(0 if readable else "EACCES", "open", "n", os.O_RDONLY, by=who)
        expect(0 if writable else "EACCES", "open", "n", os.O_WRONLY, by=who)
        expect(0 if readable and writable else "EACCES", "open", "n", os.O_RDWR, by=who)
        if not writable:
            expect("EACCES", "open", "n", os.O_RDONLY | os.O_TRUNC, by=who)
            expect(1, "stat", "n", "size")
    expect(0, "mkdir", "d", 0o755, by=AS_U)
    for shift, user, group in ((6, U, U), (3, V, U), (0, V, V)):
        mode = bits << shift
        for other in (6, 3, 0):
            mode |= everybody_else << other if other != shift else 0
        expect(0, "chmod", "d", mode, by=AS_U)
        who = (user, group)
        expect(0 if readable else "EACCES", "open", "d", os.O_RDONLY, by=who)
        if bits & 1:
            expect("ENOENT", "lstat", "d/x", "type", by=who)
        else:
            expect("EACCES", "lstat", "d/x", "type", by=who)
        if writable and bits & 1:
            expect(0, "create", "d/x", 0o644, by=who)
            expect(0, "unlink", "d/x", by=who)
        else:
            expect("EACCES", "create", "d/x", 0o644, by=who)


def test_open_of_odd_things() -> None:
    make("dir", "d")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
        expect("EISDIR", "open", "d", flags)
    expect({"EISDIR", "EINVAL"}, "open", "d", os.O_CREAT, 0o644)
    make("symlink", "s")
    expect("ELOOP", "open", "s", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    expect("ELOOP", "open", "s", os.O_RDONLY | os.O_NOFOLLOW)
    make("fifo", "f")
    expect("ENXIO", "open", "f", os.O_WRONLY | os.O_NONBLOCK)
    expect(0, "open", "f", os.O_RDONLY | os.O_NONBLOCK)
    make("socket", "k")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        expect("ENXIO", "open", "k", flags)
    make("regular", "r")
    expect("ENOTDIR", "open", "r", os.O_RDONLY | os.O_DIRECTORY)
    expect("ENOENT", "open", "nothing", os.O_RDONLY)
    expect("ECONNREFUSED", "connect", "k")


def test_far_away_bytes() -> None:
    for offset in ((1 << 31) - 1, (1 << 31) + 1, (1 << 32) + 5, 1 << 40):
        expect(0, ("open", "n", os.O_CREAT | os.O_WRONLY, 0o755), ("pwrite", 0, b"a", offset))
        expect(offset + 1, "lstat", "n", "size")
        expect(b"a", ("open", "n", os.O_RDONLY), ("pread", 0, 1, offset))
        expect(b"\0\0", ("open", "n", os.O_RDONLY), ("pread", 0, 2, offset - 2))
        remove("regular", "n")


# link


@pytest.mark.parametrize("kind", LINKABLE)
def test_links_are_one_file(kind: str) -> None:
    make(kind, "a")
    expect((kind, 1), "lstat", "a", "type", "nlink")
    expect(0, "link", "a", "b")
    expect(0, "link", "b", "c")
    inode = ask("lstat", "a", "inode")
    for name in "abc":
        expect((kind, 3, inode), "lstat", name, "type", "nlink", "inode")
    expect(0, "chmod", "b", 0o201)
    expect(0, "chown", "b", U, V)
    for name in "abc":
        expect((kind, 0o201, 3, U, V), "lstat", name, "type", "mode", "nlink", "uid", "gid")
    expect(0, "unlink", "a")
    expect("ENOENT", "lstat", "a", "type")
    for name in "bc":
        expect((kind, 0o201, 2, U, V), "lstat", name, "type", "mode", "nlink", "uid", "gid")
    expect(0, "unlink", "c")
    expect((kind, 0o201, 1, U, V), "lstat", "b", "type", "mode", "nlink", "uid", "gid")
    expect(0, "unlink", "b")
    for name in "abc":
        expect("ENOENT", "lstat", name, "type")


@pytest.mark.parametrize("kind", LINKABLE)
def test_link_and_unlink_move_the_change_time(kind: str) -> None:
    make(kind, "a")
    with Watch("a", moved=("ctime",), still=("mtime", "atime")), Watch(".", moved=("ctime", "mtime")):
        expect(0, "link", "a", "b")
    with Watch("a", moved=("ctime",), still=("mtime", "atime")), Watch(".", moved=("ctime", "mtime")):
        expect(0, "unlink", "b")
    expect(0, "lchown", "a", U, -1)
    with Watch("a", still=("ctime",)), Watch(".", still=("ctime", "mtime")):
        expect("EACCES", "link", "a", "b", by=(U, 0))
        expect("EACCES", "unlink", "a", by=(U, 0))


def test_a_directory_has_one_name() -> None:
    expect(0, "chown", ".", U, U)
    expect(0, "mkdir", "d", 0o755, by=AS_U)
    expect("EPERM", "link", "d", "e")
    expect("EPERM", "link", "d", "e", by=AS_U)


def test_links_of_symlinks() -> None:
    make("symlink", "s")
    expect(0, "raw", "link", b"s", b"t")
    expect(("symlink", 2), "lstat", "t", "type", "nlink")


# unlink, rmdir


@pytest.mark.parametrize("kind", FILES)
def test_unlink_takes_everything_but_directories(kind: str) -> None:
    make(kind, "n")
    expect(kind, "lstat", "n", "type")
    expect("ENOTDIR", "rmdir", "n")
    expect(0, "unlink", "n")
    expect("ENOENT", "lstat", "n", "type")
    make("dir", "d")
    expect("EISDIR", "unlink", "d")
    expect("dir", "lstat", "d", "type")


@pytest.mark.parametrize("kind", TYPES)
def test_rmdir_wants_it_empty(kind: str) -> None:
    make("dir", "d")
    make(kind, "d/n")
    expect("ENOTEMPTY", "rmdir", "d")
    remove(kind, "d/n")
    expect(0, "rmdir", "d")
    expect("ENOENT", "rmdir", "d")


def test_rmdir_of_dots() -> None:
    expect(0, "mkdir", "a", 0o755)
    expect(0, "mkdir", "a/b", 0o755)
    expect("EINVAL", "rmdir", "a/b/.")
    expect("ENOTEMPTY", "rmdir", "a/b/..")
    expect(3, "lstat", "a", "nlink")
    expect(0, "rmdir", "a/b")
    expect(2, "lstat", "a", "nlink")


def test_an_open_file_outlives_its_name() -> None:
    expect(0, ("open", "n", os.O_CREAT | os.O_RDWR, 0o644), ("unlink", "n"), ("fstat", 0, "nlink"))
    expect(
        b"Hello, World!",
        ("open", "n", os.O_CREAT | os.O_RDWR, 0o644),
        ("write", 0, b"Hello, World!"),
        ("unlink", "n"),
        ("pread", 0, 100, 0),
    )
    expect("ENOENT", "lstat", "n", "type")
    replaced = (("open", "n", os.O_CREAT | os.O_RDWR, 0o644), ("unlink", "n"), ("create", "n", 0o600))
    expect(0, *replaced, ("fstat", 0, "nlink"))
    expect((1, 0o600), "lstat", "n", "nlink", "mode")
    expect("ENOENT", ("open", "n", os.O_RDWR), ("unlink", "n"), ("link", "n", "m"))


# the sticky bit

OWNERS = [(dir_owner, file_owner) for dir_owner in (U, 0, V) for file_owner in (U, 0, V)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("directory", "file"), OWNERS)
def test_sticky_unlink(kind: str, directory: int, file: int) -> None:
    make("dir", "d", mode=0o1777, owner=(directory, directory))
    make(kind, "d/n", owner=(file, file))
    verb = "rmdir" if kind == "dir" else "unlink"
    if U in (directory, file):
        expect(0, verb, "d/n", by=AS_U)
        expect("ENOENT", "lstat", "d/n", "type")
    else:
        with Watch("d", still=("mtime", "ctime")):
            expect(DENIED, verb, "d/n", by=AS_U)
        expect((kind, file, file), "lstat", "d/n", "type", "uid", "gid")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("directory", "file"), OWNERS)
def test_sticky_rename_away(kind: str, directory: int, file: int) -> None:
    make("dir", "from", mode=0o1777, owner=(directory, directory))
    make("dir", "to", owner=(U, U))
    make(kind, "from/n", owner=(file, file))
    inode = ask("lstat", "from/n", "inode")
    for other in ("none", *FILES):
        make(other, "to/m", owner=(U, U))
        if U in (directory, file):
            expect(0, "rename", "from/n", "to/m", by=AS_U)
            expect("ENOENT", "lstat", "from/n", "type")
            expect((inode, file, file), "lstat", "to/m", "inode", "uid", "gid")
            expect(0, "rename", "to/m", "from/n", by=AS_U)
            expect("ENOENT", "lstat", "to/m", "type")
        else:
            expect(DENIED, "rename", "from/n", "to/m", by=AS_U)
            expect((inode, file, file), "lstat", "from/n", "inode", "uid", "gid")
            remove(other, "to/m")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("directory", "file"), OWNERS)
def test_sticky_rename_over(kind: str, directory: int, file: int) -> None:
    make("dir", "from", owner=(U, U))
    make("dir", "to", mode=0o1777, owner=(directory, directory))
    make(kind, "from/n", owner=(U, U))
    inode = ask("lstat", "from/n", "inode")
    for other in FILES:
        make(other, "to/m", owner=(file, file))
        if U in (directory, file):
            expect(0, "rename", "from/n", "to/m", by=AS_U)
            expect("ENOENT", "lstat", "from/n", "type")
            expect(inode, "lstat", "to/m", "inode")
            expect(0, "rename", "to/m", "from/n", by=AS_U)
        else:
            expect(DENIED, "rename", "from/n", "to/m", by=AS_U)
            expect(inode, "lstat", "from/n", "inode")
            expect((other, file, file), "lstat", "to/m", "type", "uid", "gid")
            remove(other, "to/m")


@pytest.mark.parametrize(("directory", "moved"), OWNERS)
def test_sticky_rename_of_a_directory(directory: int, moved: int) -> None:
    """Into another parent it needs write permission on the directory itself, whose `..` changes."""
    make("dir", "from", mode=0o1777, owner=(directory, directory))
    make("dir", "to", owner=(U, U))
    make("dir", "from/n", owner=(moved, moved))
    inode = ask("lstat", "from/n", "inode")
    for target in ("none", "dir"):
        if target == "dir":
            expect(0, "mkdir", "to/m", 0o755, by=AS_U)
        if moved == U:
            expect(0, "rename", "from/n", "to/m", by=AS_U)
            expect((inode, moved), "lstat", "to/m", "inode", "uid")
            expect(inode, "lstat", "to/m", "inode")
            expect(ask("lstat", "to", "inode"), "lstat", "to/m/..", "inode")
            expect(0, "rename", "to/m", "from/n")
        else:
            expect(DENIED, "rename", "from/n", "to/m", by=AS_U)
            expect((inode, moved), "lstat", "from/n", "inode", "uid")
            if target == "dir":
                expect(0, "rmdir", "to/m")
    allowed = U in (directory, moved)
    expect(0 if allowed else DENIED, "rename", "from/n", "from/m", by=AS_U)


@pytest.mark.parametrize(("directory", "replaced"), OWNERS)
def test_sticky_rename_over_a_directory(directory: int, replaced: int) -> None:
    make("dir", "from", owner=(U, U))
    make("dir", "to", mode=0o1777, owner=(directory, directory))
    make("dir", "from/n", owner=(U, U))
    make("dir", "to/m", owner=(replaced, replaced))
    inode = ask("lstat", "from/n", "inode")
    if U in (directory, replaced):
        expect(0, "rename", "from/n", "to/m", by=AS_U)
        expect("ENOENT", "lstat", "from/n", "type")
        expect(inode, "lstat", "to/m", "inode")
    else:
        expect(DENIED, "rename", "from/n", "to/m", by=AS_U)
        expect(inode, "lstat", "from/n", "inode")


# rename


@pytest.mark.parametrize("kind", LINKABLE)
def test_rename_keeps_the_file(kind: str) -> None:
    make(kind, "a", mode=0o644)
    inode = ask("lstat", "a", "inode")
    expect((kind, 0o644, 1), "lstat", "a", "type", "mode", "nlink")
    with Watch("a", moved=("ctime",), still=("mtime", "atime"), after="b"), Watch(".", moved=("ctime", "mtime")):
        expect(0, "rename", "a", "b")
    expect("ENOENT", "lstat", "a", "type")
    expect((kind, inode, 0o644, 1), "lstat", "b", "type", "inode", "mode", "nlink")
    expect(0, "link", "b", "a")
    expect(0, "rename", "b", "c")
    expect("ENOENT", "lstat", "b", "type")
    for name in "ac":
        expect((kind, inode, 0o644, 2), "lstat", name, "type", "inode", "mode", "nlink")
    expect(0, "rename", "a", "c")  # two names of one file: nothing happens
    expect((kind, inode, 2), "lstat", "a", "type", "inode", "nlink")


def test_rename_of_symlinks_and_directories() -> None:
    make("regular", "r")
    expect(0, "symlink", "r", "s")
    target, link = ask("stat", "s", "inode"), ask("lstat", "s", "inode")
    expect(0, "rename", "s", "t")
    expect(target, "stat", "t", "inode")
    expect(("symlink", link), "lstat", "t", "type", "inode")
    expect("ENOENT", "lstat", "s", "type")
    make("dir", "d")
    inode = ask("lstat", "d", "inode")
    with Watch("d", moved=("ctime",), after="e"):
        expect(0, "rename", "d", "e")
    expect(("dir", inode, 0o755), "lstat", "e", "type", "inode", "mode")


@pytest.mark.parametrize("kind", TYPES)
def test_a_refused_rename_changes_nothing(kind: str) -> None:
    make(kind, "a")
    with Watch("a", still=("ctime", "mtime")), Watch(".", still=("ctime", "mtime")):
        expect("EACCES", "rename", "a", "b", by=(U, 0))


def test_rename_of_a_directory_moves_its_parent() -> None:
    expect(0, "mkdir", "p", 0o755)
    expect(0, "mkdir", "q", 0o755)
    expect(0, "mkdir", "p/d", 0o755)
    expect(3, "lstat", "p", "nlink")
    expect(2, "lstat", "q", "nlink")
    expect(ask("lstat", "p", "inode"), "lstat", "p/d/..", "inode")
    with Watch("p", moved=("mtime", "ctime")), Watch("q", moved=("mtime", "ctime")):
        expect(0, "rename", "p/d", "q/e")
    expect(2, "lstat", "p", "nlink")
    expect(3, "lstat", "q", "nlink")
    expect(ask("lstat", "q", "inode"), "lstat", "q/e/..", "inode")
    expect(0, "mkdir", "q/f", 0o755)
    expect(4, "lstat", "q", "nlink")
    expect(0, "rename", "q/e", "q/f")
    expect(3, "lstat", "q", "nlink")


def test_rename_into_itself() -> None:
    expect(0, "mkdir", "a", 0o755)
    expect(0, "mkdir", "a/b", 0o755)
    expect("EINVAL", "rename", "a", "a/b")
    expect("EINVAL", "rename", "a", "a/c")
    expect("EINVAL", "rename", "a", "a/b/c")
    expect({"EBUSY", "EINVAL"}, "rename", "a/.", "b")
    expect({"EBUSY", "EINVAL"}, "rename", "a/b/..", "b")
    expect({"ENOTEMPTY", "EEXIST"}, "rename", "a/b", "a")


@pytest.mark.parametrize("kind", TYPES)
def test_rename_over_the_wrong_thing(kind: str) -> None:
    make("dir", "d")
    make(kind, "n")
    if kind != "dir":
        expect("EISDIR", "rename", "n", "d")
        expect("ENOTDIR", "rename", "d", "n")
        expect("dir", "lstat", "d", "type")
        expect(kind, "lstat", "n", "type")
    make("dir", "full")
    make(kind, "full/x")
    expect({"ENOTEMPTY", "EEXIST"}, "rename", "d", "full")
    remove(kind, "full/x")
    expect(0, "rename", "d", "full")


@pytest.mark.parametrize("kind", LINKABLE)
def test_rename_over_one_of_several_links(kind: str) -> None:
    make(kind, "new")
    make(kind, "old")
    expect(0, "link", "old", "other")
    with Watch("other", moved=("ctime",), still=("mtime",)):
        expect(0, "rename", "new", "old")
    expect((kind, 1), "lstat", "other", "type", "nlink")


def test_what_rename_needs_of_subdirectories() -> None:
    expect(0, "mkdir", "p", 0o777)
    expect(0, "mkdir", "q", 0o777)
    expect(0, "mkdir", "p/d", 0o700)
    expect(0, "rename", "p/d", "p/e", by=AS_U)
    expect("EACCES", "rename", "p/e", "q/e", by=AS_U)
    make("regular", "p/n")
    expect(0, "rename", "p/n", "q/n", by=AS_U)


# errors that every call with a path has

LONG = "x" * 255
VERBS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("open", (os.O_RDONLY,)),
    ("open", (os.O_CREAT | os.O_WRONLY, 0o644)),
    ("mkdir", (0o755,)),
    ("mkfifo", (0o644,)),
    ("mknod", ("char", 0o644)),
    ("unlink", ()),
    ("rmdir", ()),
    ("chmod", (0o644,)),
    ("chown", (1, 1)),
    ("lchown", (1, 1)),
    ("truncate", (5,)),
    ("stat", ("size",)),
    ("lstat", ("size",)),
    ("utimens", ((1, 0), (1, 0))),
)
NEW = ("mkdir", "mkfifo", "mknod")


def is_new(verb: str, more: tuple[object, ...]) -> bool:
    return verb in NEW or bool(verb == "open" and isinstance(more[0], int) and more[0] & os.O_CREAT)


@pytest.mark.parametrize(("verb", "more"), VERBS)
def test_paths_that_lead_nowhere(verb: str, more: tuple[object, ...]) -> None:
    for kind in LINKABLE:
        make(kind, "n")
        expect("ENOTDIR", verb, "n/x", *more)
        remove(kind, "n")
    expect("ENOENT", verb, "nothing/x", *more)
    expect("ENAMETOOLONG", verb, LONG + "x", *more)
    expect("ENAMETOOLONG", verb, "d/" * 2047 + "ab", *more)
    expect(0, "symlink", "a", "b")
    expect(0, "symlink", "b", "a")
    expect("ELOOP", verb, "a/x", *more)
    if verb in ("open", "chmod", "chown", "truncate", "stat", "utimens"):
        expect("ELOOP", verb, "a", *more)
    if not is_new(verb, more):
        expect("ENOENT", verb, "nothing", *more)


@pytest.mark.parametrize(("verb", "more"), VERBS)
def test_a_directory_that_denies_search(verb: str, more: tuple[object, ...]) -> None:
    make("dir", "d", owner=(U, U))
    kind = "dir" if verb == "rmdir" else "regular"
    if not is_new(verb, more):
        make(kind, "d/n", owner=(U, U))
    expect(0, "chmod", "d", 0o644)
    expect("EACCES", verb, "d/n", *more, by=AS_U)
    if verb in ("mkdir", "mkfifo", "unlink", "rmdir") or (is_new(verb, more) and verb == "open"):
        expect(0, "chmod", "d", 0o555)
        expect("EACCES", verb, "d/n", *more, by=AS_U)


@pytest.mark.parametrize("kind", TYPES)
def test_the_longest_names(kind: str) -> None:
    make(kind, LONG)
    expect(kind, "lstat", LONG, "type")
    if kind not in ("dir",):
        expect(0, "raw", "link", LONG.encode(), b"y" * 255)
        expect("ENAMETOOLONG", "raw", "link", LONG.encode(), b"y" * 256)
        expect(0, "unlink", "y" * 255)
    expect(0, "rename", LONG, "z" * 255)
    expect("ENAMETOOLONG", "rename", "z" * 255, "z" * 256)
    expect("ENAMETOOLONG", "rename", "z" * 256, "z" * 255)
    remove(kind, "z" * 255)


def test_the_longest_targets() -> None:
    for length in (1, 59, 60, 61, 255, 256, 1000, 4094, 4095):
        target = ("t/" * 2048)[:length]
        expect(0, "symlink", target, "s")
        expect(target, "readlink", "s")
        expect((length, 0o777), "lstat", "s", "size", "mode")
        expect(0, "unlink", "s")
    expect("ENAMETOOLONG", "symlink", "x" * 4096, "s")
    expect("ENOENT", "symlink", "", "s")
    make("regular", "n")
    expect("EINVAL", "readlink", "n")


def test_bad_addresses() -> None:
    make("regular", "n")
    for verb, *more in (("unlink",), ("rmdir",), ("mkdir", 0o755), ("chmod", 0o644), ("truncate", 0), ("open", 0)):
        expect("EFAULT", "raw", verb, BAD_ADDRESS, *more)
    for verb in ("link", "rename", "symlink"):
        expect("EFAULT", "raw", verb, b"n", BAD_ADDRESS)
        expect("EFAULT", "raw", verb, BAD_ADDRESS, b"m")


def test_running_programs_are_not_written() -> None:
    shutil.copy("/bin/sleep", "program")
    with subprocess.Popen(["./program", "30"]) as process:
        try:
            expect("ETXTBSY", "open", "program", os.O_WRONLY)
            expect("ETXTBSY", "open", "program", os.O_RDWR)
            expect("ETXTBSY", "open", "program", os.O_RDONLY | os.O_TRUNC)
            expect("ETXTBSY", "truncate", "program", 123)
            expect(0, "open", "program", os.O_RDONLY)
        finally:
            process.kill()
