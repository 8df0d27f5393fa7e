"""What `daxfs pins`, `busy` and `device` print, and how they fail. (What they do is tested in tests/pins.)"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.test_commands import holding
from tests.mount.harness import Mounted, daxfs

pytestmark = pytest.mark.mount


@pytest.fixture
def file(shared_mount: Mounted) -> Path:
    path = shared_mount.fresh_directory() / "file"
    path.write_bytes(b"f" * 65536)
    return path


def test_the_tables(shared_mount: Mounted, file: Path) -> None:
    with holding("--label", "rx ring", "--longterm", file) as (holder, printed):
        os.truncate(file, 32768)
        head, line = daxfs("pins", shared_mount.path).stdout.splitlines()
        assert head.split() == [
            "id",
            "holders",
            "state",
            "flags",
            "offset",
            "length",
            "age",
            "withheld",
            "runs",
            "label",
            "path",
        ]
        for text in (f"({holder.pid})", "held", "FOLL_LONGTERM|FOLL_PIN", "64.0 KiB", "32.0 KiB", "rx ring", str(file)):
            assert text in line
        head, *lines = daxfs("busy", shared_mount.path).stdout.splitlines()
        assert head.split() == ["start", "count", "size", "pins", "holders", "age", "path"]
        assert all(f"({holder.pid})" in line and str(file) in line for line in lines)
        done = daxfs("pins", "--release", str(printed["pin"]), "--json", shared_mount.path)
        assert json.loads(done.stdout) == {"pin": printed["pin"], "gone": False, "blocks_kept": 16}
        assert " revoked " in daxfs("pins", shared_mount.path).stdout
        holder.terminate()
        holder.wait(10)


def test_reaping_nothing(shared_mount: Mounted) -> None:
    done = daxfs("busy", "--reap", "--json", shared_mount.path)
    assert json.loads(done.stdout) == {"blocks_freed": 0, "pins_released": 0}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("pins", "--release", "999999"), "no such pin"),
        (("device", "inject-error", "--block", "999999999"), "not in the image"),
    ],
)
def test_refusals_are_one_line(shared_mount: Mounted, words: tuple[str, ...], text: str) -> None:
    done = daxfs(*words, shared_mount.path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["status", "remove"])
def test_what_is_no_mount(tmp_path: Path, verb: str) -> None:
    done = daxfs("device", verb, tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not on a daxfs mount" in done.stderr
    assert done.stderr.count("\n") == 1


def test_status_in_words(shared_mount: Mounted) -> None:
    lines = dict(line.split("  ", 1) for line in daxfs("device", "status", shared_mount.path).stdout.splitlines())
    assert lines["state"].strip() == "live"
    assert lines["image"].strip() == str(shared_mount.image)
