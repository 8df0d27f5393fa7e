"""The commands on a real mount: JSON keys, pins that hold, the fill engine, umount that waits, the scripts."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.harness import DAXFS, REPOSITORY, Mounted, alive, daxfs, eventually

pytestmark = pytest.mark.mount

INFO = {"uuid", "image", "block_size", "blocks", "free", "used", "busy", "pinned", "policy", "dirty_shutdowns"}
PIN = {
    "id", "pid", "comm", "holders", "ino", "path", "offset", "length", "mode", "flags", "state", "label", "age_s", "blocks",
    "withheld", "runs",
}  # fmt: skip


def shown(*words: str | Path) -> Any:
    return json.loads(daxfs(*words, "--json").stdout)


@contextmanager
def holding(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A running `daxfs pin` and the JSON it printed."""
    command = [*DAXFS, "pin", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            line = holder.stdout.readline()
            assert line, holder.communicate()[1]
            yield holder, json.loads(line)
        finally:
            if holder.poll() is None:
                holder.kill()


@pytest.fixture
def file(shared_mount: Mounted) -> Path:
    path = shared_mount.fresh_directory() / "file"
    path.write_bytes(b"f" * 65536)
    return path


def test_info_of_a_mount_and_of_its_image(mount: Mounted) -> None:
    of_mount = shown("info", mount.path)
    assert set(of_mount) >= INFO | {"pid"}
    assert of_mount["pid"] == mount.pid
    assert of_mount["blocks"] == of_mount["free"] + of_mount["used"] + of_mount["busy"]
    assert of_mount["image"] == str(mount.image)
    assert shown("info", mount.image)["pid"] == mount.pid
    text = daxfs("info", mount.path).stdout
    assert of_mount["uuid"] in text
    mount.umount()
    of_image = shown("info", mount.image)
    assert set(of_image) >= INFO
    assert "pid" not in of_image
    same = ("uuid", "block_size", "blocks", "free", "used", "dirty_shutdowns")
    assert {key: of_image[key] for key in same} == {key: of_mount[key] for key in same}
    mount.mount()


def test_extents(file: Path) -> None:
    with open(file, "r+b") as opened:
        os.posix_fallocate(opened.fileno(), 131072, 8192)
    found = shown("extents", file)
    assert [set(e) for e in found] == [{"logical", "physical", "count", "unwritten"}] * len(found)
    assert sum(e["count"] for e in found if not e["unwritten"]) == 16
    assert [e["logical"] for e in found if e["unwritten"]] == [32]
    assert "unwritten" in daxfs("extents", file).stdout


def test_a_pin_is_shown_and_released(shared_mount: Mounted, file: Path) -> None:
    with holding("--offset", "4K", "--length", "8K", file) as (holder, printed):
        assert set(printed) == {"pin", "runs"}
        (pin,) = shown("pins", shared_mount.path)
        assert set(pin) >= PIN
        assert (pin["id"], pin["pid"], pin["runs"]) == (printed["pin"], holder.pid, printed["runs"])
        assert (pin["offset"], pin["length"], pin["path"]) == (4096, 8192, str(file))
        assert pin["ino"] == file.stat().st_ino
        assert 0 <= pin["age_s"] < 60
        assert str(file) in daxfs("pins", shared_mount.path).stdout
        assert shared_mount.info()["pinned"] == 2
        holder.terminate()
        assert holder.wait(10) == 0
    assert shown("pins", shared_mount.path) == []
    assert shared_mount.info()["pinned"] == 0


@pytest.mark.parametrize("name", [b"a b\n\t\x1b[31m", b"\xff\xfe", "gr\u00f6\u00dfe \u96ea".encode(), b"-n"])
def test_any_name_can_be_pinned_and_shown(shared_mount: Mounted, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(shared_mount.fresh_directory()) + b"/" + name))
    path.write_bytes(b"x" * 4096)
    with holding(path) as (holder, _):
        assert [p["path"] for p in shown("pins", shared_mount.path)] == [str(path)]
        text = daxfs("pins", shared_mount.path).stdout
        assert "\x1b" not in text
        assert len(text.splitlines()) == 2
        assert len(shown("extents", path)) == 1
        holder.terminate()
        assert holder.wait(10) == 0


def test_busy_blocks_are_shown(shared_mount: Mounted, file: Path) -> None:
    with holding(file) as (holder, printed):
        os.truncate(file, 0)
        found = shown("busy", shared_mount.path)
        assert all(set(b) >= {"start", "count", "bytes", "pins", "holders", "path", "age_s"} for b in found)
        assert [[b["start"], b["count"]] for b in found] == printed["runs"]
        assert all(b["pins"] == [printed["pin"]] for b in found)
        assert str(found[0]["start"]) in daxfs("busy", shared_mount.path).stdout
        holder.terminate()
        assert holder.wait(10) == 0
    eventually("the busy blocks are freed", lambda: shown("busy", shared_mount.path) == [])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_pin_well(file: Path, end: signal.Signals) -> None:
    with holding("--longterm", file) as (holder, _):
        holder.send_signal(end)
        assert holder.wait(10) == 0


def test_hold_ends_by_itself(file: Path) -> None:
    with holding("--hold", "0.2", file) as (holder, _):
        assert holder.wait(10) == 0


def test_the_fill_engine_fills_and_reports(file: Path) -> None:
    with holding("--length", "8K", "--fill", "0xa5", "--hold", "0.3", file) as (holder, printed):
        out, err = holder.communicate(timeout=20)
    report = json.loads(out)
    assert holder.returncode == 0
    assert (report["pin"], report["foreign_bytes"], report["first_foreign"]) == (printed["pin"], 0, None)
    assert "no byte but 0xa5 was ever seen" in err
    assert file.read_bytes() == b"\xa5" * 8192 + b"f" * 57344


def test_the_fill_engine_sees_a_write(file: Path) -> None:
    with holding("--length", "8K", "--fill", "7", file) as (holder, _):
        eventually("it has filled", lambda: file.read_bytes()[:8192] == b"\7" * 8192)
        with open(file, "r+b", buffering=0) as opened:
            opened.seek(5000)
            opened.write(b"\x99")
        holder.terminate()
        out, err = holder.communicate(timeout=20)
    report = json.loads(out)
    assert holder.returncode == 1
    assert report["foreign_bytes"] == 1
    assert report["first_foreign"] == {"offset": 5000, "byte": 0x99}
    assert err.count("\n") == 1


def test_umount_waits_for_the_image(mount: Mounted) -> None:
    (mount.path / "file").write_bytes(os.urandom(1 << 20))
    pid = mount.pid
    daxfs("umount", mount.path)
    assert not alive(pid)
    with open(mount.image, "rb") as image:
        fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
    mount.mount()


def test_a_lazy_umount_serves_who_is_in(mount: Mounted) -> None:
    with open(mount.path / "file", "w+b", buffering=0) as file:
        daxfs("umount", "--lazy", mount.path)
        assert not os.path.ismount(mount.path)
        file.write(b"still here")
        file.seek(0)
        assert file.read() == b"still here"
    eventually("the daemon has ended", lambda: not alive(mount.pid), within_s=20)
    mount.mount()
    assert (mount.path / "file").read_bytes() == b"still here"


def test_the_default_image(base: Path) -> None:
    """Made once (1 GiB, sparse, 0600, in the data directory) and used again."""
    place = base / "default-mnt"
    place.mkdir()
    image = base / "data" / "daxfs" / "default.img"
    environment = os.environ | {"XDG_DATA_HOME": str(base / "data"), "XDG_STATE_HOME": str(base / "state")}

    def run(*words: str | Path) -> str:
        return subprocess.run(
            [*DAXFS, *map(str, words)], env=environment, check=True, capture_output=True, text=True, cwd=REPOSITORY
        ).stdout

    try:
        run("mount", place)
        status = image.stat()
        assert status.st_size == 1 << 30
        assert status.st_mode & 0o777 == 0o600
        assert status.st_blocks * 512 < 64 << 20
        (place / "file").write_text("kept")
        run("umount", place)
        run("mount", place)
        assert (place / "file").read_text() == "kept"
    finally:
        run("umount", place)
        place.rmdir()
        for directory in ("data", "state"):
            for path in sorted((base / directory).rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()


def test_pin_starts_quickly(file: Path) -> None:
    """What `daxfs pin` need not have, it does not import."""
    program = "import sys; from daxfs.cli.app import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program, "pin", "--hold", "0", str(file)],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    loaded = set(done.stderr.split())
    assert "daxfs.client" in loaded
    assert not loaded & {"numpy", "trio", "pyfuse3", "daxfs.core.volume", "daxfs.daemon", "rich.table"}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(p.name for p in (REPOSITORY / "tools" / "scripts").glob("*-pinned.sh")))
def test_the_scripts_hold(mount: Mounted, script: str, tmp_path: Path) -> None:
    shim = tmp_path / "daxfs"
    shim.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {" ".join(DAXFS)} "$@"\n')
    shim.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [REPOSITORY / "tools" / "scripts" / script, mount.path],
        env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== HOLDS" in done.stdout
    assert os.listdir(mount.path) == []
    assert shown("pins", mount.path) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(p.name for p in (REPOSITORY / "tools" / "fio").glob("*.fio")))
def test_the_fio_jobs_verify(shared_mount: Mounted, job: str, tmp_path: Path) -> None:
    place = shared_mount.fresh_directory()
    report = tmp_path / "report.json"
    done = subprocess.run(
        ["fio", f"--directory={place}", "--output-format=json", f"--output={report}", REPOSITORY / "tools/fio" / job],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    jobs = json.loads(text[text.index("{") :])["jobs"]
    assert jobs
    assert all(j["error"] == 0 for j in jobs)
    assert os.listdir(place) == []
