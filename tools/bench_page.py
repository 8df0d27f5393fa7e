"""Puts a run of the benchmark into docs/performance.md: python -m tools.bench_page RUN [--profile FILE] [--page FILE]

RUN is what `daxfs bench --json` printed; its tables go between the marks `<!-- run -->` and `<!-- end of run -->` of the
page, and a picture of each group of rows into img/ beside it. FILE is what `python -m tools.request_profile` printed; it
goes between `<!-- profile -->` and `<!-- end of profile -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from daxfs.bench.plot import svg
from daxfs.bench.result import Result
from daxfs.bench.show import NAMES_OF_GROUPS, markdown

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def put(page: Path, mark: str, text: str) -> None:
    """Replaces what is between two marks. ValueError: they are not there."""
    before = page.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
    after, times = marked.subn(lambda found: f"{found[1]}\n{text.strip()}\n\n{found[2]}", before)
    if times != 1:
        raise ValueError(f"{page} has the marks of `{mark}` {times} times, not once")
    page.write_text(after, encoding="utf-8")


def pictures(result: Result, folder: Path) -> list[str]:
    """Draws each group of rows; the lines that show them."""
    folder.mkdir(exist_ok=True)
    lines = []
    for group, title in (*NAMES_OF_GROUPS.items(), ("pins", "Pins")):
        part = result.filtered(f"{group}:" if group == "pins" else group)
        if group != "pins":
            part.rows = [samples for samples in part.rows if samples.row.group == group]
            part.pins = []
        if part.rows or part.pins:
            (folder / f"bench-{group}.svg").write_text(svg(part), encoding="utf-8")
            lines.append(f"![{title}]({folder.name}/bench-{group}.svg)")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Puts a run of the benchmark into the page about performance.")
    parser.add_argument("run", type=Path, nargs="?", help="what `daxfs bench --json` printed")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="what `python -m tools.request_profile` printed")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    try:
        if args.run:
            result = Result.from_dict(json.loads(args.run.read_text(encoding="utf-8")))
            put(args.page, "run", "\n\n".join([markdown(result), *pictures(result, args.page.parent / "img")]))
        if args.profile:
            put(args.page, "profile", args.profile.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        print(f"bench_page: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
