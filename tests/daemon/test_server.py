"""A mount's life, with real mounts: where it may begin, how it ends, and what a failure in a handler does to it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs.daemon import mountpoint, server
from daxfs.errors import Busy, FsError, NoEntry, NotDirectory, NotEmpty
from tests.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted, alive, daxfs, eventually, mounts_below

pytestmark = [pytest.mark.mount, pytest.mark.root]

# A daemon in the foreground, with a bug put into one verb of the core.
BROKEN = """
import sys
from daxfs.core import fileops, namespace
from daxfs.daemon import server
def bug(*args, **more):
    raise ZeroDivisionError("a bug for the test")
{fault}
server.mount(server.MountRequest(sys.argv[2], sys.argv[1], foreground=True))
"""


@pytest.fixture
def home(base: Path) -> Iterator[Path]:
    path = base / f"server-{os.urandom(4).hex()}"
    (path / "mnt").mkdir(parents=True)
    yield path
    for place in mounts_below(path):
        subprocess.run(["umount", "--lazy", place], check=False)
    subprocess.run(["rm", "-r", str(path)], check=True)


@contextmanager
def foreground(home: Path, program: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that is our child, on home/mnt; its log goes to home/log."""
    image, mnt = home / "image", home / "mnt"
    if not image.exists():
        daxfs("mkfs", "--size", "16M", image)
    with open(home / "log", "w") as log:
        command = [sys.executable, "-c", program, str(image), str(mnt)]
        daemon = subprocess.Popen(command, cwd=REPOSITORY, stderr=log, text=True)
    try:
        eventually("the mount is served", lambda: "is served on" in (home / "log").read_text(), 20)
        yield daemon
    finally:
        if daemon.poll() is None:
            daemon.kill()
        daemon.wait()


def ended(daemon: subprocess.Popen[str], within_s: float = 10) -> int:
    return daemon.wait(timeout=within_s)


# -- where a mount may begin --


def test_places_that_cannot_be_mounted_on(home: Path) -> None:
    (home / "file").touch()
    (home / "full").mkdir()
    (home / "full" / "x").touch()
    for place, refusal in (("nowhere", NoEntry), ("file", NotDirectory), ("full", NotEmpty), ("file/below", FsError)):
        with pytest.raises(refusal) as problem:
            mountpoint.prepare(home / place)
        assert str(home / place) in problem.value.why
        assert "\n" not in problem.value.why
    assert mountpoint.prepare(home / "full", nonempty=True) == str(home / "full")
    (home / "link").symlink_to("mnt")
    assert mountpoint.prepare(home / "link") == str(home / "mnt")


def test_nothing_is_changed_by_a_refused_request(home: Path) -> None:
    image = home / "new.img"
    for wrong in (
        server.MountRequest(home / "nowhere", image, 1 << 24),
        server.MountRequest(home / "mnt", image),
        server.MountRequest(home / "mnt", image, 1000),
        server.MountRequest(home / "mnt", image, 1 << 24, policy="hope"),
        server.MountRequest(home / "mnt", image, 1 << 24, options=["unknown"]),
    ):
        with pytest.raises(FsError) as problem:
            server.mount(wrong)
        assert "\n" not in problem.value.why
        assert not image.exists()
        assert not mounts_below(home)


def test_an_image_that_is_mounted_elsewhere(mount: Mounted, home: Path) -> None:
    with pytest.raises(FsError) as problem:
        server.mount(server.MountRequest(home / "mnt", mount.image, log=home / "log"))
    assert f"mounted on {mount.path}" in problem.value.why


def test_a_place_that_has_daxfs_already(mount: Mounted) -> None:
    with pytest.raises(Busy) as problem:
        mountpoint.prepare(mount.path)
    assert f"daxfs umount {mount.path}" in problem.value.why


def test_errors_of_the_daemon_reach_the_caller(home: Path) -> None:
    (home / "image").write_bytes(b"no image at all" * 5000)
    with pytest.raises(FsError) as problem:
        server.mount(server.MountRequest(home / "mnt", home / "image", log=home / "log"))
    assert "is not a daxfs image" in problem.value.why
    assert "is not a daxfs image" in (home / "log").read_text()
    with pytest.raises(FsError) as problem2:
        server.mount(server.MountRequest(home / "mnt", home / "image", log=home / "image" / "log"))
    assert "cannot write the log" in problem2.value.why


def test_a_default_image_is_made_and_used_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "XDG_DATA_HOME": str(home / "data"), "XDG_STATE_HOME": str(home / "state")}
    for text in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-m", "daxfs.cli", "mount", str(home / "mnt")], cwd=REPOSITORY, env=environment, check=True
        )
        assert done.returncode == 0
        with open(home / "mnt" / "diary", "a+") as diary:
            diary.write(text)
        daxfs("umount", home / "mnt")
    image = home / "data" / "daxfs" / "default.img"
    assert image.stat().st_size == 1 << 30
    assert image.stat().st_blocks * 512 < 1 << 26
    assert image.stat().st_mode & 0o777 == 0o600
    assert list((home / "state").rglob("*.log"))
    daxfs("mount", "-o", "ro", "--image", image, "--log", home / "log", home / "mnt")
    assert (home / "mnt" / "diary").read_text() == "firstsecond"
    with pytest.raises(OSError, match="Read-only"):
        (home / "mnt" / "new").touch()
    daxfs("umount", home / "mnt")


def test_the_mount_table_shows_image_and_type(mount: Mounted) -> None:
    mounted = mountpoint.top(str(mount.path))
    assert mounted is not None
    assert (mounted.fstype, mounted.source) == ("fuse.daxfs", str(mount.image))


def test_strange_paths(home: Path) -> None:
    strange = home / 'a, b\\c "ä\n'
    (strange / "m nt").mkdir(parents=True)
    daxfs("mkfs", "--size", "16M", strange / "i,mage")
    daxfs("mount", "--image", strange / "i,mage", "--log", home / "log", strange / "m nt")
    (strange / "m nt" / "file").write_text("x")
    mounted = mountpoint.top(str(strange / "m nt"))
    assert mounted is not None
    assert mounted.source == str(strange / "i,mage")
    daxfs("umount", strange / "m nt")


# -- how it ends --


def test_the_dead_mount_of_a_killed_daemon_is_cleared(make_mount: object, mount: Mounted) -> None:
    (mount.path / "kept").write_text("yes")
    mount.kill()
    with pytest.raises(OSError, match=r".") as problem:
        os.listdir(mount.path)
    assert problem.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    mount.mount()
    assert (mount.path / "kept").read_text() == "yes"
    assert len(mounts_below(mount.path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_cleanly(mount: Mounted, number: int) -> None:
    (mount.path / "kept").write_text("yes")
    pid = mount.pid
    os.kill(pid, number)
    eventually("the daemon has ended", lambda: not alive(pid), 10)
    assert not mounts_below(mount.path)
    mount.mount()
    assert (mount.path / "kept").read_text() == "yes"
    assert mount.info()["dirty_shutdowns"] == 0


def test_plain_umount_ends_the_daemon(mount: Mounted) -> None:
    pid = mount.pid
    subprocess.run(["umount", str(mount.path)], check=True)
    mount.mount()  # at once: it waits until the image is closed
    assert not alive(pid)
    assert mount.info()["dirty_shutdowns"] == 0


def test_a_mount_in_use_is_served_until_its_last_user_lets_go(mount: Mounted) -> None:
    pid = mount.pid
    with open(mount.path / "file", "w+b", buffering=0) as file:
        file.write(b"before")
        os.kill(pid, signal.SIGTERM)
        eventually("the mount has left the tree", lambda: not mounts_below(mount.path), 10)
        file.write(b" after")
        assert os.pread(file.fileno(), 100, 0) == b"before after"
        assert alive(pid)
    eventually("the daemon has ended", lambda: not alive(pid), 10)
    mount.mount()
    assert (mount.path / "file").read_bytes() == b"before after"


def test_a_second_signal_ends_it_at_once(mount: Mounted) -> None:
    pid = mount.pid
    fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x")
    os.kill(pid, signal.SIGTERM)
    eventually("the mount has left the tree", lambda: not mounts_below(mount.path), 10)
    os.kill(pid, signal.SIGTERM)
    eventually("the daemon has ended", lambda: not alive(pid), 10)
    with pytest.raises(OSError, match=r".") as problem:
        os.write(fd, b"y")
    assert problem.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):
        os.close(fd)
    mount.mount()
    assert (mount.path / "file").read_bytes() == b"x"


def test_foreground_logs_to_the_terminal_and_ends_with_the_mount(home: Path) -> None:
    with foreground(home, BROKEN.format(fault="")) as daemon:
        (home / "mnt" / "file").write_text("x")
        subprocess.run(["umount", str(home / "mnt")], check=True)
        assert ended(daemon) == 0
    assert "is unmounted" in (home / "log").read_text()


# -- a bug in a handler --

FAULTS = {  # where a bug is put in, and a call that meets it
    "a pyfuse3 handler": ("namespace.symlink = bug", lambda mnt: os.symlink("x", mnt / "link")),
    "a raw request": ("namespace.create = bug", lambda mnt: (mnt / "new").touch()),
    "a write": ("fileops.write = bug", lambda mnt: (mnt / "file").write_text("y" * 10000)),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_bug_is_eio_then_the_volume_is_read_only_and_the_loop_lives(home: Path, where: str) -> None:
    mnt = home / "mnt"
    with foreground(home, BROKEN.format(fault="")):
        (mnt / "file").write_text("content")
        (mnt / "directory").mkdir()
        daxfs("umount", mnt)
    fault, call = FAULTS[where]
    with foreground(home, BROKEN.format(fault=fault)) as daemon:
        with pytest.raises(OSError, match=r".") as problem:
            call(mnt)
        assert problem.value.errno == errno.EIO
        for change in (lambda: (mnt / "more").mkdir(), lambda: os.rename(mnt / "file", mnt / "other")):
            with pytest.raises(OSError, match=r".") as refusal:
                change()
            assert refusal.value.errno == errno.EROFS
        assert {"file", "directory"} <= set(os.listdir(mnt))
        os.statvfs(mnt)
        os.kill(daemon.pid, signal.SIGTERM)
        assert ended(daemon) == 0
    log = (home / "log").read_text()
    assert log.count("ZeroDivisionError: a bug for the test") >= 1
    assert "read-only" in log
    assert not mounts_below(home)
    assert daxfs("fsck", home / "image", check=False).returncode == 0


def test_a_mount_that_is_not_served_in_time_is_an_error(home: Path) -> None:
    slow = "import time; namespace.lookup = lambda *a: time.sleep(0); server.SERVED_S_MAX = 0"
    program = BROKEN.format(fault=slow).replace("foreground=True", f"log={str(home / 'log2')!r}")
    daxfs("mkfs", "--size", "16M", home / "image")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(home / "image"), str(home / "mnt")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode != 0
    assert "does not answer" in done.stderr
    assert time.monotonic() - start < 20
    eventually("nothing is left mounted", lambda: not mounts_below(home), 10)


# -- where it runs --


def cpus_of_threads(pid: int) -> dict[int, set[int]]:
    return {int(task): os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")}


def test_cpu_pins_the_serving_thread_and_no_other(make_mount: Maker) -> None:
    everywhere = os.sched_getaffinity(0)
    chosen = max(everywhere)
    mounted = make_mount(options=f"allow_other,cpu={chosen}")
    threads = cpus_of_threads(mounted.pid)
    assert threads.pop(mounted.pid) == {chosen}
    assert threads, "the thread that looked whether the mount answers is kept for 10 s"
    assert all(cpus == everywhere for cpus in threads.values())
