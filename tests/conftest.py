"""Fixtures of the mount tests: a fresh mount per test, checked and taken down at its end; a tmpfs to compare with."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount import harness, syscalls, warm
from tests.mount.harness import WATCHDOG_S, Mounted, alive, eventually, mounts_below
from tests.mount.holder import Holder
from tests.mount.pincase import Case

HERE = Path(__file__).parent
WITHOUT_MOUNT = {"core"}  # folders of tests that anybody can run anywhere

# Python 3.12 warns of a fork beside threads; the only other thread here is the watchdog, which holds no lock.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hotpath", choices=("on", "off"), help="mount with -o hotpath=..., where a test does not say")


def pytest_configure(config: pytest.Config) -> None:
    if hotpath := config.getoption("--hotpath"):
        os.environ[harness.HOTPATH] = hotpath


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE / "mount" in item.path.parents:
            item.add_marker(pytest.mark.mount)
            item.add_marker(FORKS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the logs of its daemons."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Mounted):
                report.sections.append(("log of the daemon", value.log_text()[-8000:]))
    return report


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """Where all mounts of this run are; when it ends no mount, process or image of it may be left."""
    if not os.path.exists("/dev/fuse"):
        pytest.fail("/dev/fuse is missing: load the module (modprobe fuse); these tests do not run without it")
    if os.geteuid() != 0:
        pytest.fail("the mount tests act as several users: run them as root")
    token = f"DAXFS_TEST_RUN_{uuid.uuid4().hex}"
    os.environ[token] = "1"
    place = Path(tempfile.mkdtemp(prefix="daxfs-test-", dir="/dev/shm"))
    os.chmod(place, 0o755)
    os.environ["XDG_DATA_HOME"] = os.environ["XDG_STATE_HOME"] = str(place / "data")
    yield place
    warm.end()
    with suppress(AssertionError):  # a daemon ends a little after its mount
        eventually("all processes have ended", lambda: not of_this_run(token), 10)
    left = [f"mount {point}" for point in mounts_below(place)]
    left += [f"file {path}" for path in place.rglob("*") if not path.is_dir()]
    left += [f"process {pid}: {words}" for pid, words in of_this_run(token)]
    for point in mounts_below(place):
        syscalls.umount(point, detach=True)
    shutil.rmtree(place)
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def at_home(request: pytest.FixtureRequest) -> None:
    """Tests with mounts have `base`, and its environment, from the first to the last."""
    folder = request.path.relative_to(HERE).parts[0]
    if folder not in WITHOUT_MOUNT and not folder.endswith(".py"):
        request.getfixturevalue("base")


def of_this_run(token: str) -> list[tuple[int, str]]:
    """Processes that inherited our environment, but for this one and its ancestors."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if token.encode() in Path("/proc", name, "environ").read_bytes() and alive(int(name)):
                found.append((int(name), Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        except OSError:
            continue  # it ended meanwhile
    return [(pid, words) for pid, words in found if pid != os.getpid()]


@contextmanager
def serving(home: Path, **more: Any) -> Iterator[Mounted]:
    mounted = Mounted(home, **more)
    timer = mounted.watchdog()
    try:
        mounted.mount()
        yield mounted
    except BaseException:
        mounted.remove()
        raise
    else:
        mounted.finish()
    finally:
        timer.cancel()


Maker = Callable[..., Mounted]


@pytest.fixture
def make_mount(base: Path) -> Iterator[Maker]:
    """Mounts with settings of one's own: make_mount(size="64M", options="...")."""
    open_mounts: list[tuple[Mounted, Any]] = []

    def make(*, watchdog_s: float = WATCHDOG_S, **more: Any) -> Mounted:
        mounted = Mounted(base / f"made-{uuid.uuid4().hex[:8]}", **more)
        open_mounts.append((mounted, mounted.watchdog(watchdog_s)))
        mounted.mount()
        return mounted

    yield make
    problems = []
    for mounted, timer in open_mounts:
        try:
            mounted.finish()
        except AssertionError as problem:
            problems.append(problem)
        timer.cancel()
    if problems:
        raise problems[0]


@pytest.fixture
def mount(base: Path) -> Iterator[Mounted]:
    """A fresh mount (allow_other), unmounted, checked by fsck and removed at the end."""
    with serving(base / f"mount-{uuid.uuid4().hex[:8]}") as mounted:
        yield mounted


@pytest.fixture(scope="module")
def shared_mount(base: Path) -> Iterator[Mounted]:
    """One mount for a module of many small cases; each works in a `fresh_directory`."""
    with serving(base / f"shared-{uuid.uuid4().hex[:8]}") as mounted:
        yield mounted


@contextmanager
def tmpfs(home: Path, size: str = "512M") -> Iterator[Path]:
    home.mkdir()
    syscalls.mount_tmpfs(home, size)
    try:
        yield home
    finally:
        syscalls.umount(home, detach=True)
        eventually("the tmpfs is gone", lambda: not mounts_below(home))
        home.rmdir()


@pytest.fixture
def peer(base: Path) -> Iterator[Path]:
    """An empty tmpfs to compare with."""
    with tmpfs(base / f"tmpfs-{uuid.uuid4().hex[:8]}") as path:
        yield path


@pytest.fixture(scope="module")
def shared_peer(base: Path) -> Iterator[Path]:
    with tmpfs(base / f"tmpfs-{uuid.uuid4().hex[:8]}") as path:
        yield path


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as process:
        yield process


@pytest.fixture
def case(mount: Mounted, holder: Holder) -> Case:
    return Case(mount, holder)


@pytest.fixture
def small(make_mount: Maker, holder: Holder) -> Case:
    """On a volume that is quickly filled."""
    return Case(make_mount(size="8M"), holder)
