"""The rules of the house: which part may import which, and that the core cannot wait."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "daxfs"

# Part -> parts of daxfs that it may import (and itself).
MAY_IMPORT = {
    "core": {"abi", "errors"},
    "daemon": {"abi", "abi_hca", "core", "errors"},
    "client": {"abi", "abi_hca"},
    "lab": {"client", "daemon", "core", "abi", "errors"},
    "bench": {"client", "core", "abi", "errors"},
    "cli": {"bench", "lab", "client", "daemon", "core", "errors"},
    "abi.py": set(),
    "abi_hca.py": {"abi"},
    "gup.py": {"client"},
    "kernel.py": {"client"},
    "verbs.py": {"client"},
    "errors.py": set(),
}
# What only this module of the client may import besides; a program that uses it has it anyway.
OPTIONAL = {"aio.py": {"trio"}}
# What waits, knows the time, or talks to somebody has no business in the core.
NOT_IN_CORE = {
    "asyncio", "concurrent", "multiprocessing", "pyfuse3", "rich", "select", "signal", "socket", "subprocess", "threading",
    "time", "trio", "typer",
}  # fmt: skip


def sources(part: str) -> list[Path]:
    place = PACKAGE / part
    return [place] if place.is_file() else sorted(p for s in ("*.py", "*.pyx") for p in place.rglob(s))


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all imported modules, also those imported inside functions."""
    if file.suffix == ".pyx":
        yield from re.findall(r"^\s*(?:c?import|from)\s+([\w.]+)", file.read_text(), re.MULTILINE)
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            if node.module == "daxfs":
                yield from (f"daxfs.{name.name}" for name in node.names)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part: str) -> None:
    files = sources(part)
    assert files
    allowed = MAY_IMPORT[part] | {part.removesuffix(".py")}
    for file in files:
        for name in imports(file):
            pieces = name.split(".")
            if pieces[0] == "daxfs" and len(pieces) > 1 and not pieces[1].startswith("__"):
                assert pieces[1] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_the_core_cannot_wait() -> None:
    for file in sources("core"):
        for name in imports(file):
            assert name.split(".")[0] not in NOT_IN_CORE, f"{file.relative_to(ROOT)} imports {name}"
        if file.suffix == ".py":
            for node in ast.walk(ast.parse(file.read_text())):
                assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{file.relative_to(ROOT)} waits"


@pytest.mark.parametrize("part", ["client", "abi.py", "abi_hca.py", "errors.py", "gup.py", "kernel.py", "verbs.py"])
def test_what_runs_in_other_peoples_processes_needs_only_the_standard_library(part: str) -> None:
    for file in sources(part):
        for name in imports(file):
            known = sys.stdlib_module_names | {"daxfs"} | OPTIONAL.get(file.name, set())
            assert name.split(".")[0] in known, f"{file.relative_to(ROOT)} imports {name}"


def test_every_module_opens_with_what_it_owns() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{file.relative_to(ROOT)} has no docstring"
