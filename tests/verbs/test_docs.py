"""The programs of docs/verbs.md do what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from daxfs.core.policy import POLICIES
from tests.mount.harness import REPOSITORY, Mounted

pytestmark = pytest.mark.mount

PAGE = REPOSITORY / "docs" / "verbs.md"


def programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def start(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


def output(*processes: subprocess.Popen[str]) -> list[list[str]]:
    ended = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said[1] for said in ended)
    return [said.splitlines() for said, _ in ended]


def test_ping_pong(mount: Mounted, tmp_path: Path) -> None:
    pong, ping, _ = programs()
    server = start(pong, mount.path, tmp_path / "meeting")
    client = start(ping, mount.path, tmp_path / "meeting")
    said, answered = output(client, server)
    assert said[0].startswith("IBV_WC_SUCCESS wr_id=1 ")
    assert said[1:] == ["read what the server has", "got pong"]
    assert answered[0] == "got ping"
    assert answered[1].startswith("IBV_WC_SUCCESS wr_id=2 ")
    assert (mount.path / "offered").read_bytes()[:4] == b"pong"
    assert mount.info()["pinned"] == 0


def test_truncate_in_flight(mount: Mounted) -> None:
    *_, program = programs()
    [said] = output(start(program, mount.path))
    assert said == ["IBV_WC_SUCCESS", "b'fromfrom'"]
    assert (mount.path / "to").read_bytes() == b""


def test_every_policy_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == list(POLICIES)
