"""How the commands speak: JSON and tables on stdout, messages and progress bars on stderr, failures as one line.

rich is imported only where something is drawn, so that `daxfs pin` and `--json` start quickly.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PIPE_WIDTH = 400  # columns of a table that goes into a pipe: nothing is folded there
Progress = Callable[[str, int, int], None]  # what is worked on, how much is done, of how much


class Failure(Exception):
    """The command cannot do what was asked: one line for people, and the exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def say(text: str) -> None:
    """A message for people, on one line."""
    print("daxfs: " + " ".join(text.split("\n")), file=sys.stderr, flush=True)


def print_json(value: Any, *, line: bool = False) -> None:
    """JSON in plain ASCII: names are any bytes, and not every terminal or pipe takes them."""
    print(json.dumps(value, indent=None if line else 2), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[str] = ()) -> None:
    """A table; columns named in `left` are text, the others numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False).print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values, a pair per line."""
    pairs = list(facts)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{name:<{width}}  {printable(value)}")


def printable(text: str) -> str:
    """The text with escapes for what a terminal cannot take: control characters, bytes of a name that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def human_size(size: int) -> str:
    """Bytes in binary units, exact when below 1 KiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def counted(count: int, thing: str) -> str:
    """A number of things: 1 pin, 2 pins."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def human_age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def runs_text(runs: Iterable[Sequence[int]], at_most: int = 4) -> str:
    """Runs as `start+count`, the first few of them."""
    pieces = [f"{start}+{count}" for start, count in runs]
    more = len(pieces) - at_most
    return " ".join(pieces[:at_most]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A callback that draws a bar on a terminal; None when stderr is not one."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
