"""What a mount is asked, and who answers: how many requests a call costs, what needs no Python, what the kernel keeps."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from daxfs import client
from tests.conftest import Maker
from tests.mount.harness import Mounted, eventually

FILES = 40
ASKED = ("quick", "raw", "passed", "hot_reads", "hot_writes")


def asked(mounted: Mounted) -> dict[str, int]:
    """Requests so far, without the one that asks (an ioctl, and the open and close of the root around it)."""
    counted = mounted.info()["requests"]
    return {name: counted[name] for name in ASKED}


class Calls:
    """One call on each of many files, by its name."""

    def __init__(self, root: Path) -> None:
        self.paths = [os.fspath(root / f"file {n:03}") for n in range(FILES)]

    def create(self, path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    def open_write_close(self, path: str) -> None:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"w" * 4096)
        os.close(fd)

    def open_read_close(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        assert os.read(fd, 4096) == b"w" * 4096
        os.close(fd)

    def open_close(self, path: str) -> None:
        os.close(os.open(path, os.O_RDONLY))

    def stat(self, path: str) -> None:
        os.stat(path)

    def stat_again(self, path: str) -> None:
        os.stat(path)

    def absent(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.stat(path + " is not there")

    def absent_again(self, path: str) -> None:
        self.absent(path)

    def truncate(self, path: str) -> None:
        os.truncate(path, 100)

    def chmod(self, path: str) -> None:
        os.chmod(path, 0o600)

    def rename(self, path: str) -> None:
        os.rename(path, path + " elsewhere")

    def unlink(self, path: str) -> None:
        os.unlink(path + " elsewhere")


# (requests that a call may cost, of them in Python). In a directory that has just changed it begins with a GETATTR of that.
COSTS = {
    "create": (4, 1),  # GETATTR, LOOKUP, CREATE, RELEASE
    "open_write_close": (3, 1),  # OPEN, WRITE into new blocks, RELEASE
    "open_read_close": (3, 0),
    "open_close": (2, 0),
    "stat": (1, 0),  # the read has changed the access time
    "stat_again": (0, 0),
    "absent": (1, 0),
    "absent_again": (0, 0),
    "truncate": (2, 1),  # GETXATTR of security.capability, SETATTR
    "chmod": (1, 1),
    "rename": (3, 1),  # GETATTR, LOOKUP, RENAME
    "unlink": (3, 2),  # GETATTR, UNLINK, FORGET
}
_SLACK = 8  # of asking, and of what was still under way


@pytest.mark.mount
def test_what_calls_cost(make_mount: Maker) -> None:
    mounted = make_mount(options="")
    calls = Calls(mounted.path)
    for name, (total, python) in COSTS.items():
        call: Callable[[str], None] = getattr(calls, name)
        before = asked(mounted)
        for path in calls.paths:
            call(path)
        after = asked(mounted)
        cost = {key: after[key] - before[key] for key in ASKED}
        assert sum(cost.values()) <= total * FILES + _SLACK, (name, cost)
        assert cost["raw"] <= python * FILES + _SLACK, (name, cost)
        assert not cost["passed"], (name, cost)


@pytest.mark.mount
def test_poll_of_who_is_no_holder_needs_no_python(mount: Mounted) -> None:
    """A look, as io_uring takes one before each read: no wait, so nobody has to be told later."""
    path = mount.path / "file"
    path.write_bytes(b"x" * 4096)
    with open(path, "rb", buffering=0) as file:
        before = asked(mount)
        for _ in range(FILES):
            assert polled(file.fileno()) == select.POLLIN | select.POLLOUT
        after = asked(mount)
        assert after["quick"] - before["quick"] >= FILES
        assert after["raw"] - before["raw"] <= _SLACK
    with client.open(path, "r+") as holder, holder.pin():
        for _ in range(FILES):
            assert polled(holder.fileno()) == select.POLLOUT  # readable when an event waits
        assert asked(mount)["raw"] - after["raw"] >= FILES


def polled(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT | select.POLLPRI)
    ((_, ready),) = poll.poll(0)
    return ready


@pytest.mark.mount
def test_without_the_hot_path_python_answers_all(make_mount: Maker) -> None:
    mounted = make_mount(options="hotpath=off")
    calls = Calls(mounted.path)
    for name in COSTS:
        for path in calls.paths:
            getattr(calls, name)(path)
    cost = asked(mounted)
    assert (cost["quick"], cost["hot_reads"], cost["hot_writes"]) == (0, 0, 0)
    assert cost["raw"] > 20 * FILES


@pytest.mark.mount
def test_listings_that_the_kernel_keeps_are_dropped_when_something_changes(make_mount: Maker) -> None:
    mounted = make_mount(options="")
    directory = mounted.path / "dir"
    directory.mkdir()
    expected: set[str] = set()

    def check(cheap: bool = False) -> None:
        before = asked(mounted)
        for _ in range(3):
            assert {*os.listdir(directory)} == expected
            assert {entry.name: entry.inode() for entry in os.scandir(directory)} == {
                name: os.lstat(directory / name).st_ino for name in expected
            }
        if cheap:
            assert asked(mounted)["raw"] - before["raw"] <= 2  # asking itself

    for n in range(300):
        (directory / f"{n}").touch()
    expected = {f"{n}" for n in range(300)}
    check()
    check(cheap=True)
    os.unlink(directory / "17")
    expected.remove("17")
    check()
    os.rename(directory / "18", directory / "new")
    expected ^= {"18", "new"}
    check()
    os.rename(directory / "19", directory / "20")
    expected.remove("19")
    check()
    os.rename(directory / "21", mounted.path / "gone")
    os.link(mounted.path / "gone", directory / "linked")
    (directory / "sub").mkdir()
    os.symlink("x", directory / "link")
    os.mkfifo(directory / "fifo")
    expected = expected - {"21"} | {"linked", "sub", "link", "fifo"}
    check()
    (directory / "sub").rmdir()
    expected.remove("sub")
    check()
    check(cheap=True)
    with open(directory / "another", "x"):
        expected.add("another")
        check()


@pytest.mark.mount
def test_a_position_outlives_changes_of_a_listing_that_is_kept(make_mount: Maker) -> None:
    """seekdir(3) to what telldir(3) said, with other names made and removed meanwhile: the rest comes exactly once."""
    mounted = make_mount(options="")
    names = {f"name {n:04}" for n in range(2000)}
    for name in names:
        (mounted.path / name).touch()
    os.listdir(mounted.path)  # kept from now on
    with os.scandir(mounted.path) as entries:
        seen = {next(entries).name for _ in range(100)}  # a first buffer of them is on this side
        ahead = sorted(names - seen)
        os.unlink(mounted.path / ahead[-1])
        (mounted.path / "later").touch()
        rest = [entry.name for entry in entries]
    assert len(rest) == len({*rest})
    assert {*rest} - {"later", ahead[-1]} == names - seen - {ahead[-1]}


@pytest.mark.mount
def test_very_many_are_forgotten_at_once(make_mount: Maker) -> None:
    """One BATCH_FORGET ends thousands of inodes, others are served meanwhile, and all space comes back."""
    mounted = make_mount(size="64M", options="")
    many = 3000

    def used() -> int:
        found = os.statvfs(mounted.path)
        return found.f_files - found.f_ffree

    before, fds = used(), []
    for n in range(many):
        path = mounted.path / f"{n}"
        path.write_bytes(b"x")
        fds.append(os.open(path, os.O_PATH))
        os.unlink(path)
    assert used() == before + many
    os.kill(mounted.pid, signal.SIGSTOP)
    try:
        for fd in fds:
            os.close(fd)
    finally:
        os.kill(mounted.pid, signal.SIGCONT)
    assert client.info(mounted.path)["pid"] == mounted.pid
    eventually("all of them have died", lambda: used() == before, 10)
