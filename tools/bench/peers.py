"""The file systems of a benchmark run: how each is started, found, measured and ended.

A peer is made in three steps: `prepare` (an image, a compiled server), `start` (the mount is really served when it
returns), `end` (unmounted, the process gone). Everything lies in one directory on tmpfs: no peer waits for a disk.
`Missing` says that a peer cannot take part on this machine and what to do about it; the run goes on without it.

Not here: what is measured (work.py) and how it is shown (report.py).
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

START_S = 15.0
END_S = 15.0
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
MEMORY_FIELDS = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}


class Missing(Exception):
    """This peer cannot run here: the text says why and what to do."""


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


class Peer:
    """One file system and its server process."""

    name: ClassVar[str]

    def __init__(self, scratch: Path, image_bytes: int) -> None:
        self.scratch = scratch / self.name
        self.image_bytes = image_bytes
        self.mount = self.scratch / "mount"
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
        self.process = None

    def memory(self) -> dict[str, int]:
        """Bytes of the server's memory. A mapped image counts as file or shared pages, not as anonymous ones."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {ours: int(fields[theirs].split()[0]) << 10 for theirs, ours in MEMORY_FIELDS.items()}


class Daxfs(Peer):
    name = "daxfs"

    def prepare(self) -> list[str]:
        beside = Path(sys.executable).parent / "daxfs"
        command = str(beside) if beside.exists() else shutil.which("daxfs")
        if command is None:
            raise Missing("daxfs is not installed here: make install")
        image = self.scratch / "image"
        run(command, "mkfs", "--size", str(self.image_bytes), image)
        return [command, "mount", "--foreground", "--image", str(image), str(self.mount)]


class NullFS(Peer):
    name = "nullfs"

    def prepare(self) -> list[str]:
        return [sys.executable, str(Path(__file__).parent.parent / "nullfs.py"), str(self.mount)]


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
        flags = run(program("pkg-config", "pkg-config"), "--cflags", "--libs", "fuse3").split()
        binary, source = self.scratch / "passthrough_ll", self.scratch / "source"
        run(program("cc", "gcc"), "-O2", "-o", binary, self.scratch / "passthrough_ll.c", *flags)
        source.mkdir()
        return [str(binary), "-f", "-o", f"source={source}", str(self.mount)]


class Fuse2fs(Peer):
    """A file system with a format of its own behind FUSE, as daxfs is, written in C."""

    name = "fuse2fs"

    def prepare(self) -> list[str]:
        server = program("fuse2fs", "fuse2fs")
        image = self.scratch / "image"
        run("truncate", "-s", str(self.image_bytes), image)
        run(program("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-E", "lazy_itable_init=0", image)
        return [server, str(image), str(self.mount), "-f", "-o", "rw"]


PEERS: tuple[type[Peer], ...] = (Daxfs, NullFS, PassthroughLL, Fuse2fs)
