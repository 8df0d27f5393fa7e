"""`daxfs scenario`: the lab's scenarios by name, the matrix of all of them, and the storm."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daxfs.cli.output import Failure, print_json, print_table, say

if TYPE_CHECKING:
    from daxfs.lab.runner import Result
    from daxfs.lab.scenario import Scenario

FILES = Annotated[
    list[Path] | None,
    typer.Option("--file", metavar="FILE.py", help="Scenarios of your own, besides the catalogue. Repeat for more."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SIGNS = {"pass": "[green]pass[/]", "fail": "[red]FAIL[/]", "n/a": "[dim]n/a[/]"}


def catalogue(
    words: Annotated[list[str] | None, typer.Argument(metavar="WORD", help="Only those whose name has a word.")] = None,
    file: FILES = None,
    json: JSON = False,
) -> None:
    """List the scenarios: name, where they come from, what they are about."""
    from daxfs.lab import runner

    found = [s for s in runner.load(file or ()).values() if not words or any(word in s.name for word in words)]
    if json:
        print_json([_declaration(s) for s in found])
        return
    rows = ((s.name, s.source, s.title) for s in found)
    print_table(("name", "source", "what"), rows, left=("name", "source", "what"))


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A scenario.")], file: FILES = None, json: JSON = False
) -> None:
    """Show one scenario: who pins, what is called, what must be seen under each policy."""
    from daxfs.lab import runner

    (scenario,) = runner.select(runner.load(file or ()), [name])
    declaration = _declaration(scenario)
    if json:
        print_json(declaration)
        return
    print(f"{scenario.name}: {scenario.title}")
    for what in ("source", "pins", "call"):
        print(f"  {what:<8}  {declaration[what]}")
    if scenario.options:
        print(f"  {'mount':<8}  -o {','.join(f'{k}={v}' for k, v in scenario.options.items())}")
    for policy, sees in scenario.sees.items():
        print(f"  {policy:<8}  {sees}")


def _declaration(scenario: Scenario) -> dict[str, object]:
    return {
        "name": scenario.name, "title": scenario.title, "source": scenario.source, "pins": scenario.pins,
        "call": scenario.call, "sees": dict(scenario.sees), "options": dict(scenario.options),
    }  # fmt: skip


def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Which ones; see: daxfs scenario list.")] = None,
    all: Annotated[bool, typer.Option("--all", help="All scenarios.")] = False,
    policy: Annotated[str, typer.Option(metavar="POLICY", help="A policy, several with commas, or all.")] = "all",
    mount: Annotated[
        Path | None,
        typer.Option(metavar="MNT", help="Run there, in a new directory.", show_default="a temporary image and mount"),
    ] = None,
    file: FILES = None,
    full: Annotated[bool, typer.Option("--full", help="Races as often as the catalogue says: minutes.")] = False,
    json: JSON = False,
) -> int:
    """Run scenarios and print what came of them, under each policy.

    JSON is a list of: name, policy, outcome (pass, fail, n/a), errno of the scenario's call, seconds, reason of any outcome
    but pass, log (what there is to see). The exit code is 1 if one failed.
    """
    from daxfs.lab import runner

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the temporary mount is taken away, as with Ctrl-C
    scenarios = runner.load(file or ())
    if not names and not all:
        raise Failure("which ones? Name some (daxfs scenario list), or say --all", 2)
    chosen = list(scenarios.values()) if all else runner.select(scenarios, names or [])
    place = None if mount is None else str(mount.resolve())
    paths = [str(one.resolve().parent) for one in file or ()]
    results: list[Result] = []
    for result in runner.run(chosen, _policies(policy), mount=place, paths=paths, full=full):
        results.append(result)
        if not json:
            _report(result, brief=len(chosen) > 1)
    if json:
        print_json([result.as_json() for result in results])
    elif len(chosen) > 1:
        _matrix(results)
    failed = [result for result in results if result.outcome == runner.FAIL]
    if failed:
        say(f"{len(failed)} of {len(results)} failed")
    return 1 if failed else 0


def _policies(text: str) -> Sequence[str]:
    from daxfs.core import policy

    return tuple(policy.POLICIES) if text == "all" else [policy.check(name) for name in text.split(",")]


def _report(result: Result, *, brief: bool) -> None:
    """A line for each on stderr while a matrix is made (on a terminal, or if it failed); all that there is for a
    single one."""
    if not brief:
        code = f" ({result.errno})" if result.errno else ""
        print(f"{result.name} under {result.policy}: {result.outcome}{code}, {result.seconds:.2f} s", flush=True)
        for line in [*result.log, *filter(None, [result.reason])]:
            print(f"  {line}", flush=True)
    elif result.outcome == "fail" or sys.stderr.isatty():
        say(f"{result.policy:<7} {result.name}: {result.outcome} {result.reason}")


def _matrix(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    policies = list(dict.fromkeys(result.policy for result in results))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("scenario", *policies, "s"):
        table.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
    cells = {(result.name, result.policy): result for result in results}
    for name in dict.fromkeys(result.name for result in results):
        mine = [cells[name, policy] for policy in policies]
        signs = (_SIGNS[cell.outcome] + (f" [dim]{cell.errno}[/]" if cell.errno else "") for cell in mine)
        table.add_row(name, *signs, f"{sum(cell.seconds for cell in mine):.1f}")
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    count = {outcome: sum(result.outcome == outcome for result in results) for outcome in _SIGNS}
    print(f"{count['pass']} pass, {count['fail']} fail, {count['n/a']} not applicable")


def storm(
    steps: Annotated[int, typer.Option(min=100, metavar="N", help="How many steps, all processes together.")] = 100_000,
    policy: Annotated[str, typer.Option(metavar="POLICY", help="A break policy.")] = "busy",
    seed: Annotated[int | None, typer.Option(metavar="N", help="To repeat a run.", show_default="random")] = None,
    json: JSON = False,
) -> int:
    """Holders with DMA, truncaters, punchers, mappers and a filler at random, on a temporary mount, watched by an oracle.

    No byte of another file may change, no pinned byte may change under its holder, no store into a page that a device
    and programs share may be lost, and free + used + busy stays the same. Under `unsafe` the same run must find
    corruption: the exit code is 1 if it does not, or if another policy shows any.
    """
    from daxfs.core import policy as policies
    from daxfs.lab import storm as storms

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = storms.run(policies.check(policy), steps, seed)
    if json:
        print_json(report.as_json())
    else:
        for line in report.lines():
            print(line)
    return 0 if report.as_expected else 1
