"""The file systems of a run: how each is started, found, measured and ended.

A peer is made in three steps: `prepare` (an image, a compiled server), `start` (the mount is really served when it
returns), `end` (unmounted, the process gone). Everything lies in one directory on tmpfs: no peer waits for a disk. All are
mounted as a user starts them, with the defaults that each has. `Here` is a directory that somebody else mounted.
`Missing` says that a peer cannot take part on this machine and what to do about it; the run goes on without it.

Not here: what is measured (rows.py, work.py) and how it is shown (show.py).
"""

from __future__ import annotations

import ctypes
import gzip
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from daxfs import client
from daxfs.bench.machine import cpu_seconds

START_S = 15.0
END_S = 15.0
QUIET_S, QUIET_MOST_S = 0.05, 20.0
DESCRIPTORS = 1 << 20  # passthrough_ll keeps one for each file the kernel knows
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
MEMORY_FIELDS = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
MS_NOSUID, MS_NODEV, MS_REMOUNT = 2, 4, 32
EXT4_INODES = 200_000
_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """This peer, or this row, cannot be had here: the text says why and what to do."""


def program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        raise Missing(f"{name} is not installed: apt-get install {package}")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{command[0]} failed: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout


def compiled(source: Path, binary: Path, *packages: str) -> Path:
    """A C program for this run; `packages` are those of pkg-config."""
    flags = run(program("pkg-config", "pkg-config"), "--cflags", "--libs", *packages).split() if packages else []
    run(program("cc", "gcc"), "-O2", "-o", binary, source, *flags)
    return binary


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Missing(f"{what} needs root")


class Target:
    """A directory to work in, and the process that serves it, if there is one."""

    name: str
    directory: Path
    server: int | None = None  # its pid
    entries_most: int | None = None  # of a directory that it can list
    entries_why = ""

    def cpu_seconds(self) -> float | None:
        """CPU time of the server so far."""
        if self.server is None:
            return None
        try:
            return cpu_seconds(self.server)
        except ProcessLookupError:
            return None

    def big_directory(self, name: str) -> Path:
        """Where the files of a large directory are made that is then seen as directory/name."""
        return self.directory / name

    def forget_names(self) -> None:
        """The kernel's caches of names and attributes are empty afterwards. Missing where they cannot be emptied."""
        if os.geteuid() != 0:
            raise Missing("a cold directory needs root, to empty the kernel's caches")
        Path("/proc/sys/vm/drop_caches").write_text("2")

    def settle(self) -> None:
        """Until the server does nothing any more, so that the work of one row is not in the time of the next."""
        until, before = time.monotonic() + QUIET_MOST_S, self.cpu_seconds()
        while before is not None and time.monotonic() < until:
            time.sleep(QUIET_S)
            now = self.cpu_seconds()
            if now is None or now - before < QUIET_S * 0.1:
                return
            before = now

    @contextmanager
    def on_one_cpu(self) -> Iterator[None]:
        """The server, and whoever is started by this thread meanwhile, run on the same CPU."""
        cpu = {max(os.sched_getaffinity(0))}
        threads = [0, *map(int, os.listdir(f"/proc/{self.server}/task") if self.server else ())]  # 0 is our own
        before = {thread: os.sched_getaffinity(thread) for thread in threads}
        try:
            for thread in threads:
                os.sched_setaffinity(thread, cpu)
            yield
        finally:
            for thread, usual in before.items():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, usual)


class Here(Target):
    """A directory that is there: of any file system. What the run makes is in a directory of its own below it."""

    def __init__(self, place: Path) -> None:
        self.name = str(place)
        self.directory = Path(tempfile.mkdtemp(prefix=".daxfs-bench-", dir=place))
        self.daxfs = False
        with suppress(OSError, ValueError):
            self.server = int(client.info(place)["pid"])
            self.daxfs = True

    def end(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class Peer(Target):
    """One file system that is mounted for the run."""

    def __init__(self, scratch: Path, image_bytes: int) -> None:
        self.scratch = scratch / self.name
        self.image_bytes = image_bytes
        self.directory = self.mount = self.scratch / "mount"
        self.log = self.scratch / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> list[str]:
        """Makes what the server needs; the answer is its command, which stays in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        self.mount.mkdir(parents=True)
        command = self.prepare()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not os.path.ismount(self.mount):
            if self.process.poll() is not None or time.monotonic() > until:
                self.end()
                lines = self.log.read_text(errors="replace").strip().splitlines()
                raise Missing(f"{command[0]} did not mount: {lines[-1] if lines else 'it says nothing'}")
            time.sleep(0.02)
        self.server = self.process.pid

    def end(self) -> None:
        if os.path.ismount(self.mount):
            unmount = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
            if subprocess.run([*unmount, str(self.mount)], check=False).returncode:
                subprocess.run([*unmount, "-l" if os.geteuid() == 0 else "-z", str(self.mount)], check=False)
        if self.process is None:
            return
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = self.server = None

    def forget_names(self) -> None:
        """A remount drops what the kernel knows of this mount, and of no other one."""
        if os.geteuid() != 0:
            raise Missing("a cold directory needs root, to empty the kernel's caches")
        if _libc.mount(None, os.fsencode(self.mount), None, MS_REMOUNT | MS_NOSUID | MS_NODEV, None):
            raise OSError(ctypes.get_errno(), "remount")
        self.settle()

    def memory(self) -> dict[str, int]:
        """Bytes of the server's memory. A mapped image counts as file or shared pages, not as anonymous ones."""
        if self.process is None:
            return {}
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {ours: int(fields[theirs].split()[0]) << 10 for theirs, ours in MEMORY_FIELDS.items()}


class Daxfs(Peer):
    name = "daxfs"

    def prepare(self) -> list[str]:
        command = [sys.executable, "-m", "daxfs.cli"]
        image = self.scratch / "image"
        run(*command, "mkfs", "--size", str(self.image_bytes), image)
        return [*command, "mount", "--foreground", "--image", str(image), str(self.mount)]


class NullFS(Peer):
    """What a plain pyfuse3 file system pays: see nullfs.py."""

    name = "nullfs"

    def prepare(self) -> list[str]:
        return [sys.executable, "-m", "daxfs.bench.nullfs", str(self.mount)]


class MinimalLL(Peer):
    """What a plain single-threaded C server pays: see minimal_ll.c."""

    name = "minimal_ll"

    def prepare(self) -> list[str]:
        binary = compiled(Path(__file__).with_name("minimal_ll.c"), self.scratch / "minimal_ll", "fuse3")
        return [str(binary), str(self.mount)]


class PassthroughLL(Peer):
    """libfuse's low-level example over a tmpfs directory, compiled from the source that Debian installs."""

    name = "passthrough_ll"

    def prepare(self) -> list[str]:
        for name in ("passthrough_ll.c", "passthrough_helpers.h"):
            plain, packed = EXAMPLES / name, EXAMPLES / f"{name}.gz"
            if plain.exists():
                shutil.copy(plain, self.scratch / name)
            elif packed.exists():
                (self.scratch / name).write_bytes(gzip.decompress(packed.read_bytes()))
            else:
                raise Missing(f"{plain} is not there: apt-get install libfuse3-dev")
        binary = compiled(self.scratch / "passthrough_ll.c", self.scratch / "passthrough_ll", "fuse3")
        self.source.mkdir()
        return [str(binary), "-f", "-o", f"source={self.source}", str(self.mount)]

    def start(self) -> None:
        super().start()
        assert self.server is not None
        _, most = resource.prlimit(self.server, resource.RLIMIT_NOFILE)
        try:
            resource.prlimit(self.server, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            most = DESCRIPTORS
        except (OSError, ValueError):
            resource.prlimit(self.server, resource.RLIMIT_NOFILE, (most, most))
        self.entries_most = most * 3 // 4
        self.entries_why = "it keeps a descriptor for each, and may not have more"

    @property
    def source(self) -> Path:
        return self.scratch / "source"

    def big_directory(self, name: str) -> Path:
        return self.source / name  # it searches a list of all files it knows for each that is made


class Fuse2fs(Peer):
    """A file system with a format of its own behind FUSE, as daxfs is, written in C."""

    name = "fuse2fs"
    entries_most = 5_000
    entries_why = "it searches the whole directory for each name"

    def prepare(self) -> list[str]:
        server = program("fuse2fs", "fuse2fs")
        image = _ext4_image(self)
        return [server, str(image), str(self.mount), "-f", "-o", "rw"]


class Ntfs3g(Peer):
    """Another one, which many machines have in use."""

    name = "ntfs-3g"

    def prepare(self) -> list[str]:
        server = program("ntfs-3g", "ntfs-3g")
        image = self.scratch / "image"
        run("truncate", "-s", str(self.image_bytes), image)
        run(program("mkfs.ntfs", "ntfs-3g"), "-q", "-F", image)
        return [server, "-o", "rw,no_detach", str(image), str(self.mount)]


class Ext4(Peer):
    """The kernel's own, on a loop device."""

    name = "ext4"

    def start(self) -> None:
        need_root("ext4 on a loop device")
        self.mount.mkdir(parents=True)
        run(program("mount", "mount"), "-o", "loop", _ext4_image(self), self.mount)


class Tmpfs(Peer):
    """Memory: the directory in which all the others have their images. Its names are never cold."""

    name = "tmpfs"

    def start(self) -> None:
        self.mount.mkdir(parents=True)
        if run("stat", "-f", "-c", "%T", self.mount).strip() != "tmpfs":
            raise Missing(f"{self.mount} is not on a tmpfs")

    def forget_names(self) -> None:
        pass


def _ext4_image(peer: Peer) -> Path:
    image = peer.scratch / "image"
    run("truncate", "-s", str(peer.image_bytes), image)
    mkfs = program("mkfs.ext4", "e2fsprogs")
    run(mkfs, "-q", "-F", "-N", str(EXT4_INODES), "-E", "lazy_itable_init=0", image)
    return image


PEERS: tuple[type[Peer], ...] = (Daxfs, NullFS, MinimalLL, PassthroughLL, Fuse2fs, Ntfs3g, Tmpfs, Ext4)
