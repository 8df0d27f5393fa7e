"""The manual pages are what their sources say, and manual pages."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from daxfs.cli import app as cli
from tools import man_pages

PAGES = man_pages.pages()
CHECKERS = {"groff": ["groff", "-man", "-Tutf8", "-ww", "-z"], "mandoc": ["mandoc", "-T", "lint", "-W", "error"]}


def test_they_are_current() -> None:
    stored = {path.name: path.read_text(encoding="utf-8") for path in man_pages.DIRECTORY.iterdir()}
    assert stored == PAGES, "run: python -m tools.man_pages"


def test_there_is_one_for_each_command() -> None:
    assert {"daxfs.1", "mount.daxfs.8", *(f"daxfs-{name.replace(' ', '-')}.1" for name in cli._COMMANDS)} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_it_has_what_a_manual_page_has(name: str) -> None:
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "EXAMPLES", "SEE ALSO"):
        assert PAGES[name].count(f".SH {heading}\n") == 1
    assert "| ---" not in PAGES[name]


@pytest.mark.parametrize("checker", [name for name in CHECKERS if shutil.which(name)])
def test_formatters_do_not_complain(checker: str) -> None:
    for path in sorted(man_pages.DIRECTORY.iterdir()):
        done = subprocess.run([*CHECKERS[checker], path], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), path.name
