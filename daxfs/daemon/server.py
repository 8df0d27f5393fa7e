"""`daxfs mount`: from a request to a served mount, and to its end.

A mount's life: options and mount point are checked (a dead daxfs mount is cleared) -> the image is opened and locked ->
the kernel mounts -> requests are served, which a statvfs from a thread of our own proves -> the parent that waits at
the terminal is told and ends with 0 -> umount, SIGTERM or SIGINT -> the image is closed cleanly.

Rules
- Whatever fails before the parent is told reaches it through a pipe, as an FsError with one line for people.
- The daemon never touches its own mount from the trio thread: it would wait for itself.
- A signal unmounts; a mount in use is detached from the tree and served until its last user lets go. A second signal
  ends it at once.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import functools
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import platformdirs
import trio

from daxfs.core import policy
from daxfs.core.format import format_image
from daxfs.core.layout import BLOCK_SIZE
from daxfs.core.pmem import Pmem
from daxfs.core.volume import Volume
from daxfs.daemon import caching, mountpoint, serving, session, survivors, threads
from daxfs.daemon.operations import Operations
from daxfs.daemon.options import MountOptions
from daxfs.daemon.raw import RawRequests
from daxfs.daemon.removal import Removal
from daxfs.daemon.service import Service, now
from daxfs.daemon.threads import in_thread, pin
from daxfs.errors import Busy, FsError, ImageError

import pyfuse3  # isort: skip  # after the native session, which must be in the process first

log = logging.getLogger("daxfs")

IMAGE_SIZE = 1 << 30
SERVED_S_MAX = 30  # from mounting to the first answer
SPARE = 16 << 20  # bytes of memory that are kept back: what the requests under way may need besides
CLOSE_S_MAX = 10  # what an unmounted daemon may take to close the image
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SERVED = b"served"
_NAME_MAX = 100
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

Ready = Callable[[], None]


@dataclass
class MountRequest:
    """What a person asked for. Without an image, a default one is made and used again."""

    mountpoint: str | os.PathLike[str]
    image: str | os.PathLike[str] | None = None
    size: int | None = None  # bytes: of an image that does not exist yet
    policy: str = ""  # as -o policy=
    options: Sequence[str] = ()  # arguments of -o
    foreground: bool = False
    log: str | os.PathLike[str] | None = None


def default_image() -> Path:
    return platformdirs.user_data_path("daxfs") / "default.img"


def default_log(place: str) -> Path:
    return platformdirs.user_state_path("daxfs") / f"{place.strip('/').replace('/', '-')[-_NAME_MAX:]}.log"


def mount(request: MountRequest) -> int:
    """Mount and serve: in the foreground until the end, else in a daemon. The exit code; FsError says why not."""
    chosen = [*request.options, *([f"policy={policy.check(request.policy)}"] if request.policy else [])]
    options = MountOptions.parse(chosen)
    place = mountpoint.prepare(request.mountpoint, nonempty=options.nonempty)
    mounting = Mounting(place, _image(request, options), options)
    if request.foreground:
        logging.basicConfig(format=_LOG_FORMAT, level=logging.INFO)
        return mounting.serve(lambda: log.info("%s is served on %s", mounting.image, place))
    return _daemonise(mounting, Path(request.log or default_log(place)).absolute())


def _image(request: MountRequest, options: MountOptions) -> str:
    """The absolute path of the image; made now if a size is given for a new one, or if it is the default one."""
    path = default_image() if request.image is None else Path(request.image).absolute()
    if not os.path.lexists(path):
        if (request.image is not None and request.size is None) or options.readonly:
            raise ImageError(f"no image {path}; make one with: daxfs mkfs {path}, or give a --size")
        path.parent.mkdir(parents=True, exist_ok=True)
        format_image(path, request.size or IMAGE_SIZE, now=now(), uid=os.getuid(), gid=os.getgid())
    elif request.size is not None and path.is_file() and path.stat().st_size != request.size // BLOCK_SIZE * BLOCK_SIZE:
        raise ImageError(f"{path} exists and has {path.stat().st_size} bytes; leave --size out, or name another image")
    return str(path)


class Mounting:
    """One image on its way to being served on one place, and served there."""

    def __init__(self, place: str, image: str, options: MountOptions) -> None:
        self.place = place
        self.image = image
        self.options = options
        self._problem: FsError | None = None

    def serve(self, ready: Ready) -> int:
        """Mount and serve until the end; `ready` is called once, when the mount answers. FsError if it never did."""
        volume = self._open()
        try:
            service = Service(volume, self.place, self.options.dax, self.options.coherence_ms)
            removal = self._mount(service)
            _calm_gc()
            if self.options.cpu is not None:
                pin(self.options.cpu)
            try:
                threading.stack_size(threads.STACK)
                session.keep_spare(SPARE)
                trio.run(self._run, service, removal, ready)
            except BaseException as e:  # of whatever was going on then: the next mount looks at everything
                service.crashed(e)
                raise
            finally:
                pyfuse3.close(unmount=True)
        finally:
            volume.close(now())
        if self._problem:
            raise self._problem
        log.info("%s is unmounted, %s is closed", self.place, self.image)
        return 1 if volume.failed else 0

    def _open(self) -> Volume:
        self._await_release()
        boot_id = uuid.UUID(_BOOT_ID.read_text().strip()).bytes
        pmem = Pmem(self.image, readonly=self.options.readonly, hostsync=self.options.hostsync)
        session.guard(pmem.address, pmem.size, pmem.fileno())
        volume = Volume.open(pmem, now=now(), boot_id=boot_id)
        if session.lost():
            volume.fail("pages of the image are gone")
            volume.close(now())
            raise ImageError(
                f"{self.image}: pages of it are gone: it was truncated while it was being mounted, or its disk is full;"
                " restore it from a copy, or make room"
            )
        volume.settings = self.options.settings
        log.info("%s: %d of %d blocks are free, policy %s", self.image, volume.free, volume.blocks, volume.policy)
        if volume.policy == "unsafe":
            log.warning("policy unsafe: truncate frees pinned blocks; files WILL be corrupted by their holders")
        return volume

    def _await_release(self) -> None:
        """umount(8) returns before the daemon has closed the image: wait for such a daemon, not for a mounted one."""
        end = time.monotonic() + CLOSE_S_MAX
        while _locked(self.image) and time.monotonic() < end:
            for mounted in mountpoint.table():
                if mounted.fstype == mountpoint.FSTYPE and mounted.source == self.image:
                    place = mounted.place
                    raise ImageError(f"{self.image} is in use: mounted on {place}; unmount it: daxfs umount {place}")
            time.sleep(0.02)

    def _mount(self, service: Service) -> Removal:
        requests = RawRequests(service)
        requests.install(quick=self.options.hotpath)
        service.volume.journal.check_medium = requests.removal.check
        session.configure(
            init_flags=caching.init_flags(self.options.dax),
            hotpath=self.options.hotpath,
            atime=not self.options.readonly,
            spin_us=self.options.spin_us,
            on_crash=service.crashed,
            on_lost=requests.removal.lost,
        )
        with _libfuse_messages() as said:
            try:
                pyfuse3.init(Operations(), self.place, self.options.for_libfuse(self.image))
            except RuntimeError as e:
                raise FsError(f"cannot mount on {self.place}: {said() or e}") from None
        return requests.removal

    async def _run(self, service: Service, removal: Removal, ready: Ready) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._obey_signals, nursery)
            service.work_in(nursery)
            service.start(survivors.reap_worker, service)
            service.start(removal.watch)
            nursery.start_soon(self._announce, service, ready)
            nursery.start_soon(serving.serve)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _announce(self, service: Service, ready: Ready) -> None:
        """Ask the mount something, as anybody would; then it is known to be served."""
        try:
            with trio.fail_after(SERVED_S_MAX):
                await in_thread(os.statvfs, self.place, abandon_on_cancel=True)
        except (OSError, FsError, trio.TooSlowError) as e:
            self._problem = FsError(f"{self.place} is mounted but does not answer ({e!r}); see the log")
        mounted = mountpoint.top(self.place)
        if not session.mounted() or mounted is None or mounted.fstype != mountpoint.FSTYPE:
            self._problem = FsError(f"{self.place} is not served by daxfs's own session: another libfuse came first")
        if self._problem:
            pyfuse3.terminate()
            return
        assert mounted is not None
        service.device, service.mount_id = mounted.device, mounted.id
        service.served.set()
        ready()

    async def _obey_signals(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            await anext(signals)
            nursery.start_soon(self._unmount)
            await anext(signals)
            log.warning("a second signal: ending at once")
            pyfuse3.terminate()

    async def _unmount(self) -> None:
        try:
            try:
                await in_thread(mountpoint.unmount, self.place, abandon_on_cancel=True)
            except Busy:
                log.warning("%s is in use: it is detached, and served until its last user lets go", self.place)
                detach = functools.partial(mountpoint.unmount, self.place, lazy=True)
                await in_thread(detach, abandon_on_cancel=True)
        except FsError as e:
            log.error("%s; ending without it", e.why)
            pyfuse3.terminate()


def _calm_gc() -> None:
    """A full collection visits every inode in memory, tens of ms for 40,000 of them: make it rare. Little here is cyclic."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 1000)


def _locked(image: str) -> bool:
    try:
        with open(image, "rb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # opening it will say what is wrong
    return False


@contextmanager
def _libfuse_messages() -> Iterator[Callable[[], str]]:
    """Catch what libfuse and fusermount3 write to stderr, for the one line of an error."""
    terminal = os.dup(2)
    with open(os.memfd_create("libfuse"), "w+b", buffering=0) as paper:
        os.dup2(paper.fileno(), 2)
        try:
            yield lambda: _one_line(os.pread(paper.fileno(), 4096, 0))
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _one_line(said: bytes) -> str:
    return "; ".join(line.strip() for line in said.decode(errors="replace").splitlines() if line.strip())


def _daemonise(mounting: Mounting, logfile: Path) -> int:
    """Serve in a child; wait until it says that it does, or why not."""
    try:
        logfile.parent.mkdir(parents=True, exist_ok=True)
        log_fd = os.open(logfile, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise FsError(f"cannot write the log {logfile}: {e.strerror}; name another one with --log", e.errno) from None
    told, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(told)
        _daemon(mounting, log_fd, tell)
    os.close(log_fd)
    os.close(tell)
    with open(told, "rb") as pipe:
        answer = pipe.read()
    if answer == _SERVED:
        return 0
    os.waitpid(child, 0)
    if not answer:
        raise FsError(f"the daemon died before the mount was served; see {logfile}")
    code, why = json.loads(answer)
    raise FsError(why, code)


def _daemon(mounting: Mounting, log_fd: int, tell: int) -> NoReturn:
    """The child: reports to the terminal through `tell`, later to the log only, never returns to the caller's code."""

    def ready() -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        for fd in (1, 2):
            os.dup2(log_fd, fd)
        os.close(nothing)
        log.info("%s is served on %s", mounting.image, mounting.place)
        os.write(tell, _SERVED)
        os.close(tell)

    code = 1
    try:
        os.setsid()
        os.chdir("/")
        stream = open(log_fd, "a", closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - to the end
        logging.basicConfig(stream=stream, format=_LOG_FORMAT, level=logging.INFO, force=True)
        faulthandler.enable(stream)
        code = mounting.serve(ready)
    except FsError as e:
        log.error("%s", e.why)
        _tell(tell, e.errno, e.why)
    except BaseException as e:
        log.critical("the daemon ends unexpectedly", exc_info=e)
        _tell(tell, errno.EIO, f"the daemon failed: {e!r}; see its log")
    finally:
        logging.shutdown()
        os._exit(code)


def _tell(pipe: int, code: int, why: str) -> None:
    with contextlib.suppress(OSError):  # closed: the mount was served before, nobody waits, the log has it
        os.write(pipe, json.dumps([code, why]).encode())
