"""Make daxfs/include/daxfs.h, the pin ABI for C, from `daxfs/abi.py`.

    python tools/c_header.py           rewrite the header
    python tools/c_header.py --check   exit 1 if it is not up to date

Everything comes from the source of abi.py: constants by their values; a structure's members from the comment behind its
format, which names one for each code; comments as they are. What the header cannot say is an error.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from daxfs import abi

SOURCE = Path(abi.__file__)
HEADER = SOURCE.parent / "include" / "daxfs.h"

_TYPES = {"Q": "uint64_t", "I": "uint32_t"}
_RECORDS = ("RUN", "EXTENT", "PAGE_STATE")  # come in pages, so many as fit
_NOT_FOR_C = {"IOC_SIZE_MAX"}

_TOP = """\
/*
 * Made by tools/c_header.py from daxfs/abi.py: change that.
 *
{prose}
 *
 * Every ioctl both takes and gives its structure. Members that are called zero must be 0.
 */
#ifndef DAXFS_H
#define DAXFS_H

#include <linux/ioctl.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "daxfs runs on little-endian machines only"
#endif

#ifdef __cplusplus
#define DAXFS_SIZE(name, size) static_assert(sizeof(struct name) == (size), "the size of an ABI structure")
#else
#define DAXFS_SIZE(name, size) _Static_assert(sizeof(struct name) == (size), "the size of an ABI structure")
#endif
"""


def comments_of(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """The comments of a source by line: those behind code, and those that have their line for themselves."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            (alone if token.line.lstrip().startswith("#") else behind)[token.start[0]] = text
    return behind, alone


def members(name: str, structure: struct.Struct, comment: str) -> Iterator[str]:
    """The members of a structure; in the comment, brackets say more about one. ValueError if it names more or fewer."""
    parts = re.split(r",\s*(?![^(]*\))", comment)
    codes = re.findall(r"\d+s|[A-Z]", structure.format)
    if len(parts) != len(codes):
        raise ValueError(f"the comment behind {name} must name its {len(codes)} members: {comment!r}")
    for code, part in zip(codes, parts, strict=True):
        match = re.fullmatch(r"([a-z][a-z ]*)(?: \((.*)\))?", part)
        if match is None:
            raise ValueError(f"the comment behind {name}: {part!r} is not the name of a member")
        more = f" /* {match[2]} */" if match[2] else ""
        kind, length = ("char", f"[{code[:-1]}]") if code.endswith("s") else (_TYPES[code], "")
        yield f"\t{kind} {match[1].replace(' ', '_')}{length};{more}"


def c_name(name: str) -> str:
    return f"daxfs_{name.lower()}"


def structure_text(name: str, structure: struct.Struct, comment: str) -> Iterator[str]:
    yield f"struct {c_name(name)} {{"
    yield from members(name, structure, comment)
    yield "};"
    yield f"DAXFS_SIZE({c_name(name)}, {structure.size});"
    if name in _RECORDS:
        room = abi.PAGE_BYTES - abi.PAGE.size
        count, rest = divmod(room, structure.size)
        yield f"struct {c_name(name)}_page {{"
        yield f"\tstruct {c_name('PAGE')} page;"
        yield f"\tstruct {c_name(name)} records[{count}];"
        if rest:
            yield f"\tunsigned char rest[{rest}];"
        yield "};"
        yield f"DAXFS_SIZE({c_name(name)}_page, DAXFS_PAGE_BYTES);"


def constant_text(name: str, value: ast.expr, comment: str) -> str:
    """A #define of a number, or of an ioctl's."""
    if isinstance(value, ast.BinOp) and isinstance(value.right, ast.Attribute):  # of flags that each machine has its own of
        text = f"({ast.unparse(value).replace('os.', '')})"
    elif isinstance(value, ast.Call):
        number, size = value.args
        if isinstance(size, ast.Attribute) and isinstance(size.value, ast.Name):
            text = f"_IOWR(DAXFS_IOC_TYPE, {ast.literal_eval(number)}, struct {c_name(size.value.id)})"
        else:
            text = f"_IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, {ast.literal_eval(number)}, DAXFS_PAGE_BYTES)"
    else:
        known: int = getattr(abi, name)
        text = str(known) if isinstance(value, ast.Constant) and known < 10 else f"{known:#x}u"
        if name == "PAGE_BYTES":
            text = str(known)
    return f"#define DAXFS_{name} {text}" + (f" /* {comment} */" if comment else "")


def assignments(tree: ast.Module) -> Iterator[tuple[int, str, ast.expr]]:
    """(line, name, value) of what the module assigns, in its order."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        else:
            pairs = [(target, node.value)]
        for at, (one, value) in enumerate(pairs):
            if not isinstance(one, ast.Name):
                raise ValueError(f"line {node.lineno}: only names are assigned")
            if one.id not in _NOT_FOR_C:
                yield (node.lineno if at == 0 else -1), one.id, value


def lines_of(source: str) -> Iterator[str]:
    """The lines of the header behind its top."""
    behind, alone = comments_of(source)
    for line, name, value in assignments(ast.parse(source)):
        above: list[str] = []
        while line - 1 in alone:
            line -= 1
            above.insert(0, alone[line])
        if above:
            yield ""
            yield "/*"
            yield from (f" * {text}".rstrip() for text in above)
            yield " */"
            line += len(above)
        elif isinstance(getattr(abi, name), struct.Struct):
            yield ""
        known = getattr(abi, name)
        if isinstance(known, struct.Struct):
            yield from structure_text(name, known, behind.get(line, ""))
        else:
            yield constant_text(name, value, behind.get(line, ""))


def render(source: str | None = None) -> str:
    """The text of the header. ValueError if abi.py says something that it cannot."""
    source = SOURCE.read_text(encoding="utf-8") if source is None else source
    prose = ast.get_docstring(ast.parse(source)) or ""
    top = _TOP.format(prose="\n".join(f" * {line}".rstrip() for line in prose.splitlines()))
    return top + "\n" + "\n".join(lines_of(source)) + "\n\n#endif\n"


def main(arguments: list[str]) -> int:
    fresh = render()
    if HEADER.exists() and HEADER.read_text(encoding="utf-8") == fresh:
        return 0
    if arguments == ["--check"]:
        print(f"{HEADER} is not up to date: run python tools/c_header.py", file=sys.stderr)
        return 1
    HEADER.parent.mkdir(exist_ok=True)
    HEADER.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
