"""`daxfs bench`: the benchmark, on a directory or against the peers."""

from __future__ import annotations

import json as codec
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daxfs.cli.output import Failure, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from daxfs.bench.result import Result
    from daxfs.bench.run import Plan


def bench(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIRECTORY", help="Measure here: any file system.", show_default="the peers")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With commas: daxfs, nullfs, minimal_ll, passthrough_ll, fuse2fs, ntfs-3g, tmpfs, ext4; or all.",
            show_default="all; none beside DIRECTORY",
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only rows with this in their name, or of a group: data, names, list, cpu.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", "-q", help="Two minutes instead of fifteen.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="So often everything.", show_default="5; quick: 2")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.05, max=3600, metavar="S", help="Of each row of fio.", show_default="1; quick: 0.4")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it as SVG.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Measure nothing; show what --json once printed.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the history is kept.", show_default="bench.jsonl in your state directory"),
    ] = None,
    trend: Annotated[bool, typer.Option("--trend", help="Measure nothing; show the history of the rows.")] = False,
) -> int:
    """Measure a file system: requests, names, a large directory, CPU, pins.

    Without DIRECTORY daxfs is measured beside its peers, each mounted for it, in alternating order. With one, what it is on
    is measured; the ratios are of it to the peers that are named. Numbers and ratios are medians over the rounds. A peer
    that cannot run here is left out, and the report says why. Needs fio, and a C compiler. JSON has rows, pins, memory,
    machine, and more.
    """
    from daxfs.bench import history as past

    file = history or past.default_file()
    if trend:
        return _show_trend(file, only, json)
    if source is not None:
        result = _read(source).filtered(only)
    else:
        result = _measure(_plan(directory, peers, only, quick, rounds, seconds))
    if plot is not None:
        from daxfs.bench.plot import svg

        plot.write_text(svg(result), encoding="utf-8")
    if json:
        print_json(result.as_dict())
    elif markdown:
        from daxfs.bench.show import markdown as as_markdown

        print(as_markdown(result), end="")
    else:
        _draw(result)
    if source is None:
        for text in past.changes(past.read(file), result):
            say(f"changed: {text}")
        past.add(file, result)
    return 0


def _plan(
    directory: Path | None, peers: str | None, only: str, quick: bool, rounds: int | None, seconds: float | None
) -> Plan:
    from daxfs.bench import pins, rows
    from daxfs.bench.peers import PEERS
    from daxfs.bench.run import Plan

    every = [kind.name for kind in PEERS]
    if directory is not None and not directory.is_dir():
        raise Failure(f"{directory} is not a directory; name one on the file system to measure")
    wanted = every if peers == "all" or (peers is None and directory is None) else (peers or "").split(",")
    wanted = [name for name in wanted if name]
    for name in wanted:
        if name not in every:
            raise typer.BadParameter(f"there is no peer {name}; there are: {', '.join(every)}")
    scale = rows.QUICK if quick else rows.FULL
    scale = replace(scale, rounds=rounds or scale.rounds, seconds=seconds or scale.seconds)
    plan = Plan(scale, tuple(wanted), directory, only, pins.QUICK if quick else pins.FULL)
    if not any(plan.wants(row) for row in rows.ROWS) and not pins.PinRows(plan.pins, only, Path()).rows:
        raise typer.BadParameter(f"no row has {only!r} in its name")
    return plan


def _measure(plan: Plan) -> Result:
    from daxfs.bench.peers import Missing
    from daxfs.bench.run import Run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was mounted is unmounted
    with progress_bar() as bar:
        try:
            return Run(plan, bar).measure()
        except Missing as why:
            raise Failure(f"nothing can be measured here: {why}") from None


def _read(source: Path) -> Result:
    from daxfs.bench.result import Result

    try:
        facts = codec.loads(source.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("not the JSON of a run")
        return Result.from_dict(facts)
    except ValueError as problem:
        raise Failure(f"{source}: {problem}; it should be what `daxfs bench --json` printed") from None


def _draw(result: Result) -> None:
    from rich.console import Console

    from daxfs.bench import show

    show.draw(result, Console())


def _show_trend(file: Path, only: str, json: bool) -> int:
    from daxfs.bench import history as past

    runs = past.read(file)
    if not runs:
        raise Failure(f"there is no history in {file}; every run of `daxfs bench` adds to it")
    if json:
        print_json(runs)
    else:
        columns, rows = past.trend(runs, only)
        print_table(columns, rows, left=columns[:1])
    return 0
