"""docs/client.md: every program on the page is run, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from daxfs import client
from tests.client.hosts import why_no_ring
from tests.mount.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted, eventually

pytestmark = pytest.mark.mount

PAGE = REPOSITORY / "docs" / "client.md"
FENCE = re.compile(
    r"(?:^<!-- (?P<kind>run|output)(?:: (?P<command>[^\n]+))? -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Program:
    name: str
    arguments: list[str]
    text: str
    output: str = ""


def programs() -> Iterator[Program]:
    """The programs of the page, each with the output that stands behind it."""
    current: Program | None = None
    for match in FENCE.finditer(PAGE.read_text(encoding="utf-8")):
        if match["kind"] == "output":
            assert current is not None
            current.output = match["text"]
        else:
            assert match["kind"] == "run", f"a block that no test runs:\n{match['text']}"
            if current is not None:
                yield current
            name, *arguments = match["command"].split()
            current = Program(name, arguments, match["text"])
    assert current is not None
    yield current


def run(program: Program, place: Path, mounted: Mounted) -> str:
    """Its output. What is called /mnt/x and IMAGE on the page is our mount and its image."""

    def ours(text: str) -> str:
        return text.replace("/mnt/x", str(mounted.path)).replace("IMAGE", str(mounted.image))

    source = place / program.name
    source.write_text(ours(program.text), encoding="utf-8")
    if source.suffix == ".c":
        include = REPOSITORY / "daxfs" / "include"
        built = source.with_suffix("")
        subprocess.run(["cc", "-Wall", "-Werror", f"-I{include}", "-o", built, source], check=True)
        command = [str(built)]
    else:
        command = [sys.executable, "-W", "error", str(source)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *map(ours, program.arguments)], capture_output=True, text=True, timeout=60, env=environment, cwd=place
    )
    assert done.returncode == 0, f"{program.name}:\n{done.stderr}"
    assert done.stderr == "", f"{program.name}:\n{done.stderr}"
    return done.stdout


def test_the_page(make_mount: Maker, tmp_path: Path) -> None:
    mounted = make_mount(size="64M")
    found = list(programs())
    assert {Path(program.name).suffix for program in found} == {".py", ".c"}
    for program in found:
        if "FixedBuffer" in program.text and why_no_ring():
            continue
        assert run(program, tmp_path, mounted) == program.output, program.name
        eventually("the holder is gone", lambda: not client.pins(mounted.path) and not client.busy(mounted.path))


def test_twenty_lines() -> None:
    holder = next(programs())
    assert len([line for line in holder.text.splitlines() if line.strip()]) <= 20
