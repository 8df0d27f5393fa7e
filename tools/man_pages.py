"""Manual pages, made of what is there already: the command line's own usage and examples, and docs/cli.md.

    python -m tools.man_pages       writes docs/man/*.1 and *.8

A page for each section of docs/cli.md. A test fails if they are not current. Markdown is known as far as that file uses it:
paragraphs, tables, fences, `code`, **strong** and [links](docs/pins.md).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from daxfs.cli import app as cli

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "docs" / "man"
SOURCE = ROOT / "docs" / "cli.md"
_WHAT = "A file system on emulated persistent memory, where a pinned block survives truncate and hole punch"
_ABOUT = """A page of a file on a DAX file system is the block of persistent memory itself. daxfs is such a file system,
over an image file, by FUSE: a truncate or hole punch of blocks that a device has pinned returns at once, and they go to
nobody else before the last pin has gone."""
_TOUR = (
    "daxfs mount /mnt/x", "daxfs pin --length 64K --fill 0xa5 /mnt/x/film &", "truncate -s 0 /mnt/x/film",
    "daxfs busy /mnt/x", "daxfs umount /mnt/x",
)  # fmt: skip
_MOUNT_EXAMPLES = ("mount -t daxfs /var/tmp/x.img /mnt/x", "mount.daxfs /var/tmp/x.img /mnt/x -o allow_other,policy=wait")
_HEADINGS = {"option": "OPTIONS", "`-o`": "MOUNT OPTIONS", "exit code": "EXIT STATUS", "file": "FILES"}


def pages() -> dict[str, str]:
    """File name -> text in the macros of man(7)."""
    first, *sections = re.split(r"^## ", SOURCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    general = first.partition("COMMAND ...\n")[2]
    exits = "".join(re.findall(r"^\| (?:exit code|-+:|0|1|2|130) .*\n", general, re.MULTILINE))
    bodies = dict(section.split("\n", 1) for section in sections)
    files = bodies.pop("Files")
    made = {"daxfs.1": _overview(general, files)}
    for title, body in bodies.items():
        words = re.findall(r"[a-z][a-z.-]*", title)  # the others are arguments
        page, section = "-".join(words), 8 if words[0] == "mount.daxfs" else 1
        examples: tuple[str, ...]
        if section == 8:
            summary, usage, examples = "mount a daxfs volume, for mount(8) and fstab(5)", _bold(title), _MOUNT_EXAMPLES
        else:
            name = " ".join(words[1:])
            summary, usage, examples = _summary(name), _usage(name), (cli._EXAMPLES[name],)
        if page == "daxfs-mount":
            body += f"\n{files}"
        if "\n| exit code " not in body:
            body += f"\n{exits}"
        text = [_head(page, section, summary), ".SH SYNOPSIS", usage, ".SH DESCRIPTION", *_blocks(body)]
        text += [".SH EXAMPLES", ".nf", *map(_escaped, examples), ".fi", ".SH SEE ALSO", f"{_bold('daxfs')}(1)"]
        made[f"{page}.{section}"] = "\n".join(text) + "\n"
    return made


def _overview(general: str, files: str) -> str:
    text = [_head("daxfs", 1, _WHAT[0].lower() + _WHAT[1:]), ".SH SYNOPSIS", f"{_bold('daxfs')} COMMAND ..."]
    text += [".SH DESCRIPTION", _escaped(_ABOUT), ".PP", *_blocks(general), ".SH COMMANDS"]
    for name in cli._COMMANDS:
        text += [".TP", f"{_bold('daxfs-' + name.replace(' ', '-'))}(1)", _inline(_summary(name))]
    text += [*_blocks(files), ".SH EXAMPLES", ".nf", *map(_escaped, _TOUR), ".fi"]
    text += [".SH SEE ALSO", ", ".join(f"{_bold(page)}({n})" for page, n in (("mount.daxfs", 8), ("fuse", 4), ("mount", 8)))]
    return "\n".join(text) + "\n"


def _summary(name: str) -> str:
    """The first sentence of a command's help, as NAME has it."""
    text = " ".join((inspect.getdoc(cli._COMMANDS[name]) or "").split("\n\n")[0].split()).rstrip(".")
    return text[0].lower() + text[1:]


def _usage(name: str) -> str:
    """As `daxfs NAME --help` has it."""
    command: Any = typer.main.get_command(cli._app(name.split()[0]))
    context = typer.Context(command, info_name="daxfs")
    for word in name.split() if hasattr(command, "commands") else ():
        command = command.commands[word]
        context = typer.Context(command, info_name=word, parent=context)
    arguments = " ".join(command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
    return f"{_bold('daxfs ' + name)} {_escaped(arguments)}"


def _head(name: str, section: int, summary: str) -> str:
    title = f'.TH "{name.upper()}" "{section}" "" "daxfs" "daxfs manual"'
    return f"{title}\n.SH NAME\n{_escaped(name)} \\- {_inline(summary)}"


def _blocks(markdown: str) -> Iterator[str]:
    """The lines of a piece of docs/cli.md: what comes behind a table of options is a section of its own."""
    after = ""
    fresh = True  # right behind a heading
    for block in re.findall(r"^```[^`]*^```$|(?:^[^\n]+\n)+", markdown.strip() + "\n", re.MULTILINE):
        if block.startswith("```"):
            yield from (".PP", ".nf", *map(_escaped, block.splitlines()[1:-1]), ".fi")
            fresh = False
        elif block.startswith("|"):
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.strip().splitlines()]
            yield f".SH {_HEADINGS[rows[0][0]]}"
            for term, *rest in rows[2:]:
                yield from (".TP", _inline(term), _inline(" ".join(rest)) or "\\&")
            after = ".SH NOTES"
        else:
            if after:
                yield after
                after, fresh = "", True
            yield from ([] if fresh else [".PP"])
            yield _inline(" ".join(block.split()))
            fresh = False


def _inline(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\(([\w./]+)(#[\w-]+)?\)", lambda m: m[1] if m[1] == m[2] else f"{m[1]} ({m[2]})", text)
    pieces = re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", text.replace("\\|", "|"))
    made = (_bold(piece.strip("`*")) if piece[:1] in "`*" and len(piece) > 1 else _escaped(piece) for piece in pieces)
    line = "".join(made)
    return f"\\&{line}" if line[:1] in (".", "'") else line


def _bold(text: str) -> str:
    return f"\\fB{_escaped(text)}\\fR"


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha").replace("'", "\\(aq")
    text = "".join(char if char.isascii() else f"\\[u{ord(char):04X}]" for char in text.replace("`", "\\(ga"))
    return f"\\&{text}" if text[:1] == "." else text


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    made = pages()
    for old in DIRECTORY.iterdir():
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
