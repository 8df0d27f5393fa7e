"""Help, usage errors, and the rule that nobody ever sees a traceback."""

from __future__ import annotations

import inspect
import re

import pytest

from daxfs import __version__
from daxfs.cli import app as cli
from daxfs.cli.app import run

COMMANDS = [
    "mkfs", "mount", "umount", "fsck", "info", "extents", "pin", "pins", "busy", "policy", "device status", "device remove",
    "device inject-error", "scenario list", "scenario show", "scenario run", "scenario storm", "lab crash",
    "bench",
]  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_these_are_the_commands() -> None:
    assert list(cli._COMMANDS) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_an_example(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), flag]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"Example: daxfs {command} .*\S", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example parses: the command is called with it. (What the commands do is tested elsewhere.)"""
    called = []

    def stand_in(**values: object) -> None:
        called.append(values)

    stand_in.__signature__ = inspect.signature(cli._COMMANDS[command], eval_str=True)  # type: ignore[attr-defined]
    stand_in.__annotations__ = {}
    monkeypatch.setitem(cli._COMMANDS, command, stand_in)
    assert run(cli._EXAMPLES[command].split()[1:]) == 0
    assert len(called) == 1


@pytest.mark.parametrize(
    "command", ["info", "extents", "pins", "busy", "fsck", "device status", "device remove", "device inject-error"]
)
def test_json_wherever_data_is_shown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"daxfs {__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate",
        "--frobnicate",
        "pin",
        "pin /x --frobnicate",
        "pin /x --offset one",
        "pin /x --length -4096",
        "pin /x --fill 256",
        "pin /x --hold soon",
        "mkfs /x --size 1.5G",
        "mkfs /x --size 10MB",
        "mkfs /x --uuid 12",
        "mount /x --size lots",
        "mount /x --policy maybe",
        "pins /x --force",
        "pins /x --release one",
        "device frobnicate",
        "device inject-error /x",
        "device inject-error /x --block -1",
        "device inject-error /x --block 1 --count 0",
        "device remove /x --deadline soon",
        "info",
        "info /x /y",
    ],
)
def test_usage_errors_are_one_line_and_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("daxfs: ")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "/x: No such file or directory"),
        (OSError("two\nlines"), 1, "two lines"),
        (MemoryError(), 1, "internal error: MemoryError"),
    ],
)
def test_every_exception_is_one_line(
    problem: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(cli, "_app", broken)
    assert run(["info", "/x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"daxfs: {text}")
    assert err.count("\n") == 1
