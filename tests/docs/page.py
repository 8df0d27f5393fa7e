"""Pages of docs/ as a reader would follow them: one block after the other, on a mount.

What the fences of such a page may be:
    python, c    a program, which begins with a comment that is its file name: it is saved under that name
    console      a shell session: lines behind `$ ` are run (`> ` goes on with one), the others are what comes out,
                 stdout and stderr together; `...` in it stands for what differs from run to run
    text         a figure; the line above it says so: `**Figure: what it shows.**`
Every program is named by a command after it. A command that fails says why. `/mnt/x` on the page is a mount point of
our own, `~` and `/dev/shm` a directory of our own. The reader sits in the top directory of the sources, with `.venv/bin` in
PATH; the setting up that `make mount` does before it mounts has been done.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.mount.harness import REPOSITORY

MOUNT = "/mnt/x"
SHARED_MEMORY = "/dev/shm"
COMMAND_S = 60.0
LATE_S = 20.0  # what comes from the background may take a moment
_FENCE = re.compile(r"(?P<above>[^\n]*)\n\n?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
# Commands come on the shell's own input, each with a NUL behind it: none of them may read it in place of the shell.
_SHELL = r"""exec 9<&0 </dev/null; while IFS= read -r -d "" -u 9 c; do eval "$c" 9<&-; echo "$mark $?"; done"""
_NAME = re.compile(r"(?:# |/\* )([\w.]+\.(?:py|c))(?: \*/)?\n")


@dataclass
class Step:
    """A command and what the page shows of it."""

    command: str
    shown: str = ""


@dataclass
class Block:
    """A program to save (`name`, `text`), or a session."""

    name: str = ""
    text: str = ""
    steps: list[Step] = field(default_factory=list)


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run, in order. AssertionError for one that would not be."""
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        language, text = match["language"], match["text"]
        if language in ("python", "c"):
            name = _NAME.match(text)
            assert name, f"{page.name}: a program without a file name in its first line:\n{text}"
            yield Block(name=name[1], text=text)
        elif language == "console":
            yield Block(steps=_steps(page, text))
        else:
            assert language == "text", f"{page.name}: a fence of language {language!r}"
            assert match["above"].startswith("**Figure"), f"{page.name}: what is this, if no figure?\n{text}"
            assert "$ " not in text, f"{page.name}: commands in a figure:\n{text}"


def _steps(page: Path, text: str) -> list[Step]:
    steps: list[Step] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            steps.append(Step(line[2:]))
        elif line.startswith("> ") and steps and not steps[-1].shown:
            steps[-1].command += line[2:]
        else:
            assert steps, f"{page.name}: output before any command:\n{text}"
            steps[-1].shown += line
    return steps


def agrees(shown: str, said: str) -> bool:
    """Whether the output is the one that is shown; `...` is anything, blanks in a row are one."""
    pattern = ".*".join(re.escape(" ".join(part.split(" "))) for part in _plain(shown).split("..."))
    return re.fullmatch(pattern, _plain(said), re.DOTALL) is not None


def _plain(text: str) -> str:
    return "\n".join(re.sub(" +", " ", line).strip() for line in text.splitlines())


class Reader:
    """Somebody with a shell, a home and a place to mount. A context manager; `unused` finds what was not followed."""

    def __init__(self, home: Path, skip: Callable[[str], bool] = lambda command: False) -> None:
        """`skip`: commands that this host cannot run."""
        self.home = home
        self.mount = home / "mnt"
        self._skip = skip
        self._work = home / "work"
        self._mark = f"<<{os.urandom(8).hex()}>>"
        self._saved: set[str] = set()

    def __enter__(self) -> Self:
        self.mount.mkdir(parents=True)
        self._work.mkdir()
        for name in ("daxfs", "tools"):
            (self._work / name).symlink_to(REPOSITORY / name)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "LC_ALL": "C.UTF-8",
            "mark": self._mark,
        }
        self._shell = subprocess.Popen(
            ["bash", "-c", _SHELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, cwd=self._work, bufsize=0, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.close()  # bash ends; what it leaves in the background is found by the fixture `base`
        if kind is not None:
            os.killpg(self._shell.pid, signal.SIGTERM)
        self._shell.wait(timeout=COMMAND_S)
        self._shell.stdout.close()

    def follow(self, page: Path) -> None:
        for block in blocks(page):
            if block.name:
                (self._work / block.name).write_text(self._ours(block.text), encoding="utf-8")
                self._saved.add(block.name)
            for step in block.steps:
                self._used(step.command)
                if not self._skip(step.command):
                    self._run(page, step)
        assert not self._saved, f"{page.name}: nobody runs {', '.join(sorted(self._saved))}"

    def _used(self, command: str) -> None:
        self._saved -= {name for name in self._saved if name in command}

    def _ours(self, text: str) -> str:
        text = text.replace("make mount\n", f"daxfs mount {MOUNT}\n")
        return text.replace(SHARED_MEMORY, str(self.home)).replace(MOUNT, str(self.mount))

    def _theirs(self, text: str) -> str:
        text = text.replace(str(self.mount), MOUNT).replace(f"{self.home}/.local", "/root/.local")
        return text.replace(str(self.home), SHARED_MEMORY)

    def _run(self, page: Path, step: Step) -> None:
        mark = self._mark
        assert self._shell.stdin
        self._shell.stdin.write(self._ours(step.command).encode() + b"\0")
        said, end = "", time.monotonic() + COMMAND_S
        while (at := said.find(mark)) < 0 or "\n" not in said[at:]:
            said += self._more(end, f"{page.name}: {step.command}")
        if "is in use by stress-ng" in said:  # a stressor of the other test process opens every mount for a moment
            time.sleep(0.1)
            self._run(page, step)
            return
        code = int(said[at + len(mark) :].split("\n")[0])
        said, late = said[:at] + said[at + len(mark) :].partition("\n")[2], time.monotonic() + LATE_S
        while not agrees(step.shown, self._theirs(said)):
            what = f"{page.name} shows\n$ {step.command}{step.shown}and what came is\n{self._theirs(said)}"
            said += self._more(late, what)
        assert code == 0 or step.shown, f"{page.name}: exit code {code} and no word about it: {step.command}"

    def _more(self, end: float, what: str) -> str:
        """Some more output. AssertionError when none comes before the end."""
        assert self._shell.stdout
        ready, _, _ = select.select([self._shell.stdout], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(self._shell.stdout.fileno(), 1 << 16) if ready else b""
        assert piece, what
        return piece.decode(errors="replace")
