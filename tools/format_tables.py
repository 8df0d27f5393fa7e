"""Put the tables of `daxfs/core/layout.py` into docs/format.md, between `<!-- table: NAME -->` and `<!-- end -->`.

    python tools/format_tables.py           rewrite the page
    python tools/format_tables.py --check   exit 1 if the page is not up to date

The prose around the tables is written by hand; a table of layout.py that the page does not have is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from daxfs.core import layout

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
_SLOT = re.compile(r"<!-- table: (?P<title>[^>]+) -->\n.*?<!-- end -->", re.DOTALL)
_KINDS = {"Q": "u64", "I": "u32", "H": "u16", "B": "u8"}


def table_text(table: layout.Table) -> str:
    """One table as Markdown."""
    lines = [f"{table.size} bytes", "", "| offset | type | field | |", "| ---: | --- | --- | --- |"]
    for field in table.fields:
        kind = _KINDS.get(field.code) or f"{field.code.removesuffix('s')} bytes"
        lines.append(f"| {table.offset[field.name]} | {kind} | `{field.name}` | {field.means} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with every table as layout.py has it now. ValueError if a table or a slot has no partner."""
    tables = {table.title: table_text(table) for table in layout.TABLES}
    slots = [match["title"] for match in _SLOT.finditer(page)]
    if sorted(slots) != sorted(tables):
        raise ValueError(f"the page has slots for {sorted(slots)}, layout.py has {sorted(tables)}")
    return _SLOT.sub(lambda m: f"<!-- table: {m['title']} -->\n{tables[m['title']]}\n<!-- end -->", page)


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = render(page)
    if fresh == page:
        return 0
    if arguments == ["--check"]:
        print(f"{PAGE} is not up to date: run python tools/format_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
