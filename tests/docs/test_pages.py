"""The pages say what is there: every option is in the reference, every link leads somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer

from daxfs.cli import app as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(command: str) -> str:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    found = re.search(rf"^## daxfs {command}\b.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/cli.md has no section for {command}"
    return found[0]


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_option_is_in_the_reference(command: str) -> None:
    text = section(command)
    for name, parameter in inspect.signature(cli._COMMANDS[command], eval_str=True).parameters.items():
        option = parameter.annotation.__metadata__[0]
        if isinstance(option, typer.models.OptionInfo):
            first = [option.default] if str(option.default).startswith("-") else []  # where typer puts the first spelling
            for spelling in [*first, *(option.param_decls or ())] or [f"--{name.replace('_', '-')}"]:
                assert f"`{spelling}" in text, f"docs/cli.md, {command}: {spelling} is missing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"tools/[\w./-]+", text):
        assert (ROOT / path).exists(), path
