"""stress-ng's file system stressors with --verify, and the fio jobs of tools/fio with their checksums."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted

SECONDS = 3
# Left out, as they do nothing here or do not end: fiemap and verity (no such FUSE request), swap, rawdev, binderfs, chattr
# (its flags have no place on media), dev-shm, mmapfork (mallocs, no file), ioprio, eventfd, procfs (not a file system's).
BATCHES = (
    ("access", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep"),
    ("dirmany", "dup", "fallocate", "fcntl", "file-ioctl", "filename", "flock", "fpunch"),
    ("fsize", "fstat", "getdent", "handle", "hdd", "io", "iomix", "lease"),
    ("link", "locka", "lockf", "lockofd", "mknod", "open", "rename", "revio"),
    ("seek", "symlink", "sync-file", "touch", "utime", "xattr", "aio", "aiol"),
    ("mmap", "msync", "mmapmany", "sendfile", "readahead", "splice", "inotify", "dnotify"),
)
LIMITS = {
    "copy-file-bytes": "128M", "fallocate-bytes": "16M", "hdd-bytes": "8M", "iomix-bytes": "8M", "mmap-bytes": "8M",
    "msync-bytes": "8M", "readahead-bytes": "8M", "revio-bytes": "8M", "seek-size": "8M", "sync-file-bytes": "8M",
    "sendfile-size": "4M", "dirdeep-inodes": "2000", "dirdeep-dirs": "5", "dentries": "1000", "hdd-opts": "direct",
}  # fmt: skip
LONG_LOOPS = ("xattr",)  # one turn sets, reads and removes thousands of attributes: it may not be counted in the time
FIO_JOBS = sorted((REPOSITORY / "tools" / "fio").glob("*.fio"))


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"{batch[0]}-to-{batch[-1]}")
def test_stress_ng(batch: tuple[str, ...], make_mount: Maker) -> None:
    """Eight stressors at once, one process each; every one must have done something and found nothing wrong."""
    mounted = make_mount(size="1G")
    idle = stress(mounted.path, batch, SECONDS)
    for name in idle:  # no turn at all beside seven others on a slow machine: it has to do one alone
        assert not stress(mounted.path, (name,), 30), f"{name} did nothing"
    assert os.listdir(mounted.path) == []


def stress(where: str, names: tuple[str, ...], seconds: int) -> list[str]:
    """Run the stressors together. Those that did nothing."""
    command = ["stress-ng", "--temp-path", ".", "--timeout", str(seconds), "--verify", "--metrics-brief", "--mmap-file"]
    command += [word for name, value in LIMITS.items() for word in (f"--{name}", value)]
    command += [word for name in names for word in (f"--{name}", "1")]
    if len(names) == 1:
        command += [f"--{names[0]}-ops", "1"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=100)
    said = done.stdout + done.stderr
    print(said)
    assert done.returncode == 0, said
    assert "fail:" not in said, said
    counts = dict(re.findall(r"\] (\S+) +(\d+) +[0-9.]+ ", said))
    return [name for name in names if int(counts.get(name, "0")) == 0 and name not in LONG_LOOPS]


def test_there_are_fio_jobs() -> None:
    assert len(FIO_JOBS) >= 5


@pytest.mark.parametrize("job", FIO_JOBS, ids=lambda job: job.stem)
def test_fio(job: Path, make_mount: Maker) -> None:
    """Zero verify errors, and what was asked was really written or read."""
    mounted = make_mount(size="1G")
    report = mounted.home / "report.json"
    command = ["fio", f"--directory={mounted.path}", "--output-format=json", f"--output={report}", str(job)]
    done = subprocess.run(command, cwd=mounted.home, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr + report.read_text()
    jobs = json.loads(report.read_text())["jobs"]
    assert [j["error"] for j in jobs] == [0] * len(jobs)
    assert sum(j["read"]["total_ios"] + j["write"]["total_ios"] for j in jobs) > 0
    checked(mounted)


def checked(mounted: Mounted) -> None:
    for leftover in os.listdir(mounted.path):
        os.unlink(mounted.path / leftover)
