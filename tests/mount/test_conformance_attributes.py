"""Attributes, statement by statement: chmod, chown, truncate, times; who may, what it answers, what else it changes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.mount.conformance import (
    AT_SYMLINK_NOFOLLOW,
    FOLLOWED,
    NOW,
    OMIT,
    TYPES,
    Watch,
    ask,
    end_helpers,
    expect,
    make,
)
from tests.mount.harness import Mounted


@pytest.fixture(autouse=True)
def work(shared_mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared_mount.fresh_directory())


@pytest.fixture(scope="module", autouse=True)
def people() -> Iterator[None]:
    yield
    end_helpers()


U, V, W, X = 65534, 65533, 65532, 65531
AS_U = (U, U)  # a user, its group, more groups
EITHER = {0o6555, 0o555}

# chmod


@pytest.mark.parametrize("kind", FOLLOWED)
def test_chmod(kind: str) -> None:
    make(kind, "n")
    with Watch("n", moved=("ctime",), still=("mtime", "atime")):
        expect(0, "chmod", "n", 0o111)
    expect(0o111, "stat", "n", "mode")
    expect(0, "symlink", "n", "s")
    mode = ask("lstat", "s", "mode")
    expect(0, "chmod", "s", 0o222)
    expect(0o222, "stat", "s", "mode")
    expect(0o222, "stat", "n", "mode")
    expect(mode, "lstat", "s", "mode")
    with Watch("n", still=("ctime", "mtime")):
        expect("EPERM", "chmod", "n", 0o111, by=(U, 0))
    for mode in (0o1621, 0o1700, 0o7777, 0, 0o644):
        expect(0, "chmod", "n", mode)
        expect(mode, "stat", "n", "mode")


@pytest.mark.parametrize("kind", FOLLOWED)
def test_chmod_by_the_owner(kind: str) -> None:
    make(kind, "n", mode=0o640, owner=(U, U))
    expect(0, "symlink", "n", "s")
    for name, mode in (("n", 0o642), ("s", 0o642), ("n", 0o1644), ("s", 0o1640), ("n", 0o4711), ("n", 0o2711)):
        expect(0, "chmod", name, mode, by=AS_U)
        expect(mode, "stat", "n", "mode")
        expect("EPERM", "chmod", name, 0o600, by=(V, V))
        expect("EPERM", "chmod", name, 0o600, by=(V, U))
        expect(mode, "stat", "n", "mode")


def test_chmod_gives_set_group_id_to_members_only() -> None:
    make("regular", "n", mode=0o755, owner=(U, U))
    expect(0, "chmod", "n", 0o2755, by=AS_U)
    expect(0o2755, "stat", "n", "mode")
    expect(0, "chmod", "n", 0o755, by=AS_U)
    expect(0, "chmod", "n", 0o2755, by=(U, V))
    expect(0o755, "stat", "n", "mode")
    expect(0, "chmod", "n", 0o2755, by=(U, V, U))
    expect(0o2755, "stat", "n", "mode")


@pytest.mark.parametrize("bits", [0o4000, 0o2000, 0o6000])
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_writing_clears_set_id_bits(bits: int, flags: int) -> None:
    expect(0, "create", "n", bits | 0o777)
    expect(bits | 0o777, "stat", "n", "mode")
    expect(0o777, ("open", "n", flags), ("write", 0, b"x"), ("fstat", 0, "mode"), by=AS_U)
    expect(0o777, "stat", "n", "mode")
    expect(0, "chmod", "n", bits | 0o777)
    expect(bits | 0o777, ("open", "n", flags), ("write", 0, b"x"), ("fstat", 0, "mode"))  # root keeps them
    expect(0, ("open", "n", flags), ("write", 0, b"x" * 8192))
    expect(0o777, ("open", "n", flags), ("ftruncate", 0, 100), ("fstat", 0, "mode"), by=AS_U)
    expect(0, "chmod", "n", bits | 0o777)
    expect(0o777, ("truncate", "n", 50), ("stat", "n", "mode"), by=AS_U)
    expect(0, "chmod", "n", bits | 0o777)
    expect(0o777, ("open", "n", flags | os.O_TRUNC), ("stat", "n", "mode"), by=AS_U)
    expect(0, "chmod", "n", bits | 0o777)
    expect(0o777, ("open", "n", flags), ("fallocate", 0, 0, 0, 8192), ("fstat", 0, "mode"), by=AS_U)


def test_set_group_id_without_execution_is_kept_on_write() -> None:
    """Without the group's execution bit it once meant mandatory locking; a member of the group keeps it."""
    make("regular", "n", owner=(0, U))
    expect(0, "chmod", "n", 0o2766)
    expect(0o2766, ("open", "n", os.O_WRONLY), ("write", 0, b"x"), ("fstat", 0, "mode"), by=(V, U))


# chown


def calls_of(kind: str) -> tuple[tuple[str, str, str], ...]:
    """(name to call with, verb, verb to look with)"""
    direct = (("n", "lchown", "lstat"),)
    return direct if kind == "symlink" else (("n", "chown", "lstat"), ("s", "chown", "stat"), *direct)


@pytest.mark.parametrize("kind", TYPES)
def test_root_gives_to_anybody(kind: str) -> None:
    make(kind, "n")
    expect(0, "symlink", "n", "s")
    for name, verb, look in calls_of(kind):
        for owner in ((123, 456), (0, 0), (U, 7)):
            expect(0, verb, name, *owner)
            expect(owner, look, name, "uid", "gid")
            expect(owner, "lstat", "n", "uid", "gid")
            expect((0, 0), "lstat", "s", "uid", "gid")


@pytest.mark.parametrize("kind", TYPES)
def test_an_owner_chooses_among_its_groups(kind: str) -> None:
    make(kind, "n")
    expect(0, "symlink", "n", "s")
    who = (U, W, X)
    for name, verb, look in calls_of(kind):
        expect(0, verb, name, U, V)
        expect(0, verb, name, -1, W, by=who)
        expect((U, W), look, name, "uid", "gid")
        expect(0, verb, name, U, X, by=who)
        expect((U, X), look, name, "uid", "gid")
        expect("EPERM", verb, name, -1, V, by=who)
        expect("EPERM", verb, name, V, -1, by=who)
        expect("EPERM", verb, name, V, V, by=who)
        expect("EPERM", verb, name, U, U, by=(V, V))
        expect("EPERM", verb, name, V, V, by=(V, V))
        expect((U, X), look, name, "uid", "gid")


@pytest.mark.parametrize("kind", TYPES)
def test_anybody_may_change_nothing(kind: str) -> None:
    make(kind, "n")
    expect(0, "symlink", "n", "s")
    for name, verb, look in calls_of(kind):
        expect(0, verb, name, -1, -1, by=AS_U)
        expect((0, 0), look, name, "uid", "gid")


@pytest.mark.parametrize("kind", FOLLOWED)
def test_chown_clears_set_id_bits(kind: str) -> None:
    make(kind, "n")
    expect(0, "symlink", "n", "s")
    who = (U, V, W)
    for name, verb, look in calls_of(kind):
        for owner in ((U, V), (W, X), (0, 0)):  # of root they may stay
            expect(0, "chmod", "n", 0o6555)
            expect(0, verb, name, *owner)
            expect(EITHER, look, name, "mode")
            expect(owner, look, name, "uid", "gid")
        expect(0, verb, name, U, V)
        for owner in ((U, W), (-1, V), (-1, W), (U, -1)):
            expect(0, "chmod", "n", 0o6555)
            expect(0o6555, look, name, "mode")
            expect(0, verb, name, *owner, by=who)
            expect(0o6555 if kind == "dir" else 0o555, look, name, "mode")
        expect(0, "chmod", "n", 0o6555)
        expect(0, verb, name, -1, -1, by=who)
        expect(EITHER, look, name, "mode")
    expect(0, "chown", "n", U, V)
    if kind == "regular":
        expect(0, "chmod", "n", 0o2644)
        expect(0, "chown", "n", U, W, by=who)
        expect({0o2644, 0o644}, "lstat", "n", "mode")


@pytest.mark.parametrize("kind", TYPES)
def test_chown_moves_the_change_time(kind: str) -> None:
    make(kind, "n")
    expect(0, "symlink", "n", "s")
    for name, verb, _ in calls_of(kind):
        expect(0, verb, name, 0, 0)
        with Watch("n", moved=("ctime",), still=("mtime", "atime")):
            expect(0, verb, name, U, V)
        with Watch("n", moved=("ctime",), still=("mtime", "atime")):
            expect(0, verb, name, U, W, by=(U, W))
        with Watch("n", still=("ctime", "mtime")):
            expect("EPERM", verb, name, U, X, by=(V, X))
            expect("EPERM", verb, name, -1, X, by=(U, W))
            expect("EPERM", verb, name, X, -1, by=(U, W))


# truncate

LIMIT = 1 << 62


def test_truncate_both_ways() -> None:
    for by_name in (True, False):
        make("regular", "n")

        def truncate(size: int, flags: int = os.O_RDWR, by_name: bool = by_name) -> None:
            expect(0, *([("truncate", "n", size)] if by_name else [("open", "n", flags), ("ftruncate", 0, size)]))

        truncate(1234567)
        expect(1234567, "lstat", "n", "size")
        truncate(567, os.O_WRONLY)
        expect(567, "lstat", "n", "size")
        expect(0, ("open", "n", os.O_WRONLY | os.O_TRUNC), ("write", 0, os.urandom(12345)))
        truncate(23456)
        expect(23456, "lstat", "n", "size")
        expect(b"\0" * 100, ("open", "n", os.O_RDONLY), ("pread", 0, 100, 12345))
        truncate(1)
        expect(1, "lstat", "n", "size")
        truncate(8192)
        expect(b"\0" * 8191, ("open", "n", os.O_RDONLY), ("pread", 0, 9000, 1))
        with Watch("n", moved=("ctime", "mtime")):
            truncate(123)
        with Watch("n", moved=("ctime", "mtime")):
            truncate(0)
        expect(0, "unlink", "n")


def test_who_may_truncate() -> None:
    make("regular", "n")
    with Watch("n", still=("ctime", "mtime")):
        expect("EACCES", "truncate", "n", 123, by=(U, 0))
        expect("EINVAL", ("open", "n", os.O_RDONLY), ("ftruncate", 0, 123), by=(U, 0))
        expect("EINVAL", "truncate", "n", -1)
        expect("EINVAL", ("open", "n", os.O_RDWR), ("ftruncate", 0, -1))
        make("dir", "d")
        expect("EISDIR", "truncate", "d", 0)
        make("fifo", "f")
        expect("EINVAL", "truncate", "f", 0)
    for size in (999999999999999, (1 << 63) - 1):
        answer = ask("truncate", "n", size)
        assert answer in (0, "EFBIG", "EINVAL"), answer
        expect(size if answer == 0 else 0, "stat", "n", "size")
        expect(0, "truncate", "n", 0)
    expect(0, "chmod", ".", 0o777)
    expect(0, ("open", "m", os.O_CREAT | os.O_RDWR, 0), ("ftruncate", 0, 0), by=(U, 0))


# times

EARLY, LATE = 1900000000, 1950000000


@pytest.mark.parametrize("kind", FOLLOWED)
def test_times_of_any_kind(kind: str) -> None:
    make(kind, "n")
    with Watch("n", moved=("ctime",)):
        expect(0, "utimens", "n", (EARLY, 0), (LATE, 0))
    expect((EARLY, LATE), "lstat", "n", "atime", "mtime")
    expect((EARLY * 10**9, LATE * 10**9), "lstat", "n", "atime_ns", "mtime_ns")


def test_times_of_a_symlink_itself() -> None:
    make("regular", "n")
    expect(0, "symlink", "n", "s")
    expect(0, "utimens", "n", (EARLY, 0), (LATE, 0))
    expect(0, "utimens", "s", (100, 1), (200, 2), AT_SYMLINK_NOFOLLOW)
    expect((EARLY, LATE), "lstat", "n", "atime", "mtime")
    expect((100 * 10**9 + 1, 200 * 10**9 + 2), "lstat", "s", "atime_ns", "mtime_ns")
    expect(0, "utimens", "s", (300, 0), (400, 0))
    expect((300, 400), "lstat", "n", "atime", "mtime")
    expect(200, "lstat", "s", "mtime")


def test_now_and_omit() -> None:
    make("regular", "n")
    expect(0, "utimens", "n", (EARLY, 0), (LATE, 0))
    expect(0, "utimens", "n", (0, OMIT), (5, 6))
    expect((EARLY, 5 * 10**9 + 6), "lstat", "n", "atime", "mtime_ns")
    expect(0, "utimens", "n", (7, 8), (0, OMIT))
    expect((7 * 10**9 + 8, 5 * 10**9 + 6), "lstat", "n", "atime_ns", "mtime_ns")
    with Watch("n", still=("atime", "mtime", "ctime")):
        expect(0, "utimens", "n", (0, OMIT), (0, OMIT))
    with Watch("n", moved=("atime", "ctime"), still=("mtime",)):
        expect(0, "utimens", "n", (0, NOW), (0, OMIT))
    with Watch("n", moved=("mtime", "ctime"), still=("atime",)):
        expect(0, "utimens", "n", (0, OMIT), (0, NOW))
    made = os.stat("n")
    assert abs(made.st_mtime_ns - made.st_ctime_ns) < 10_000_000
    for atime in (0, NOW), (0, OMIT):
        expect("EINVAL", "utimens", "n", atime, (1, 10**9))


def test_times_without_loss() -> None:
    make("regular", "n")
    for atime, mtime in (
        ((100000000, 100000000), (200000000, 200000000)),
        ((1, 999999999), (2, 123456789)),
        ((0, 0), (0, 1)),
        ((1 << 31, 0), (1 << 32, 0)),
        ((-1, 500000000), (-(1 << 31), 0)),
    ):
        expect(0, "utimens", "n", atime, mtime)
        expect((atime[0] * 10**9 + atime[1], mtime[0] * 10**9 + mtime[1]), "lstat", "n", "atime_ns", "mtime_ns")


def test_who_may_set_times() -> None:
    now, some = ((0, NOW), (0, NOW)), ((EARLY, 0), (LATE, 0))
    make("regular", "n")
    with Watch("n", still=("atime", "mtime", "ctime")):
        expect("EACCES", "utimens", "n", *now, by=(U, 0))
        expect("EPERM", "utimens", "n", *some, by=(U, 0))
        expect("EPERM", "utimens", "n", (0, OMIT), (LATE, 0), by=(U, 0))
        expect("EPERM", "utimens", "n", (EARLY, 0), (0, OMIT), by=(U, 0))
        expect(0, "utimens", "n", (0, OMIT), (0, OMIT), by=(U, 0))
    expect(0, "chmod", "n", 0o666)
    expect(0, "utimens", "n", *now, by=(U, 0))
    expect("EPERM", "utimens", "n", *some, by=(U, 0))
    expect("EPERM", "utimens", "n", (0, NOW), (0, OMIT), by=(U, 0))
    expect(0, "chown", "n", U, U)
    expect(0, "chmod", "n", 0o444)
    expect(0, "utimens", "n", *now, by=(U, 0))
    expect(0, "utimens", "n", *some, by=(U, 0))
    expect(0, "utimens", "n", *some)


def test_writing_moves_times() -> None:
    expect(0, ("open", "n", os.O_CREAT | os.O_WRONLY, 0o644), ("write", 0, b"x"))
    with Watch("n", moved=("mtime", "ctime"), still=("atime",)):
        expect(0, ("open", "n", os.O_WRONLY), ("write", 0, b"y"))
    with Watch("n", moved=("mtime", "ctime")):
        expect(0, ("open", "n", os.O_WRONLY | os.O_APPEND), ("write", 0, b"z" * 5000))
    with Watch("n", still=("mtime", "ctime")):
        expect(b"y", ("open", "n", os.O_RDONLY), ("pread", 0, 1, 0))
    with Watch("n", still=("mtime", "ctime")):
        expect(0, ("open", "n", os.O_WRONLY), ("write", 0, b""))
