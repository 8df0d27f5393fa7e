"""The core touches the world in two places: pmem.py has the image mapped, format.py makes its file. (tests/test_house.py
has the rules of imports between the parts.)"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import daxfs.core

CORE = Path(daxfs.core.__file__).parent
FILES = sorted(CORE.rglob("*.py"))
TOUCH_FILES = {"pmem.py", "format.py"}
FILE_MODULES = {"fcntl", "io", "mmap", "pathlib", "shutil", "tempfile"}
NO_CHANCE = {"random", "secrets", "uuid"}  # format.py makes the volume's UUID; else a run depends on its arguments alone
THIRD_PARTY = {"crc32c", "numpy", "sortedcontainers"}
OF_OS = {"PathLike", "fspath", "strerror"}  # and constants


def modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_no_file_is_touched_elsewhere(file: Path) -> None:
    tree = ast.parse(file.read_text())
    found = set(modules(tree))
    assert found <= sys.stdlib_module_names | THIRD_PARTY | {"daxfs"}
    if file.name in TOUCH_FILES:
        return
    assert found.isdisjoint(FILE_MODULES | NO_CHANCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr in OF_OS or node.attr.isupper(), f"line {node.lineno}: os.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "input", "print", "exec", "eval"), f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            raise AssertionError(f"line {node.lineno}: import os, so that what is used can be seen")


def test_the_core_loads_alone() -> None:
    """In a process of its own: neither the daemon nor what it stands on comes along."""
    paths = [f.relative_to(CORE).with_suffix("") for f in FILES if f.name != "__init__.py"]
    names = [".".join(("daxfs", "core", *path.parts)) for path in paths]
    names += ["daxfs.core", "daxfs.core.fsck"]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint(*sorted(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert set(names) <= loaded
    assert loaded.isdisjoint({"asyncio", "pyfuse3", "rich", "trio", "typer", "daxfs.daemon", "daxfs.cli", "daxfs.client"})


def test_the_client_loads_alone() -> None:
    code = "import sys\nimport daxfs.client\nprint(*sorted(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    parts = {name for name in loaded if name.startswith("daxfs.")}
    assert {name for name in parts if not name.startswith("daxfs.client")} == {"daxfs.abi"}
    assert loaded.isdisjoint({"asyncio", "crc32c", "numpy", "trio"})
