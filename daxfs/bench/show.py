"""A result for people: tables for a terminal, the same as Markdown for a page.

In a peer's column is its own median (± half of the spread over the rounds), and below it the ratio of the subject to it,
with the goal that the row has beside this peer and whether it is met.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from daxfs.bench.peers import MEMORY_FIELDS
from daxfs.bench.pins import PinRow
from daxfs.bench.result import Result, Samples

WIDEST = 1000  # columns of a terminal
MET, MISSED = "✓", "✗"
NAMES_OF_GROUPS = {
    "data": "Data: one file, direct I/O",
    "names": "Names: one process, one call after the other",
    "list": "A large directory",
    "cpu": "CPU time of the server for each request (lower is better)",
}


def number(value: float) -> str:
    """Three digits that count: 947, 22.3k, 1.25M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            value /= size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def goal_text(ratio: float, lower: bool) -> str:
    return f"{'≤' if lower else '≥'}{ratio:g}"


def _ratio_cell(result: Result, samples: Samples, peer: str) -> tuple[str, bool | None]:
    """The text below a peer's median, and whether its goal is met (None: it has none)."""
    ratio = samples.ratio(result.subject, peer)
    if ratio is None:
        return "", None
    text = f"{ratio:.2f}x"
    for goal in samples.row.goals:
        verdict = result.verdict(samples, goal) if goal.peer == peer else None
        if verdict:
            return f"{text} {goal_text(goal.ratio, samples.row.lower)} {MET if verdict.met else MISSED}", verdict.met
    return text, None


def _groups(result: Result) -> Iterator[tuple[str, list[Samples]]]:
    for group, title in NAMES_OF_GROUPS.items():
        found = [samples for samples in result.rows if samples.row.group == group and samples.values]
        if found:
            yield title, found


def draw(result: Result, console: Console) -> None:
    """Everything, on a terminal or into a pipe; the console grows as wide as the tables are."""
    for title, rows in _groups(result):
        _print(console, _rows_table(result, title, rows))
    if any(row.cells for row in result.pins):
        _print(console, _pins_table(result.pins))
    if result.memory:
        _print(console, _memory_table(result))
    for name, why in result.missing.items():
        console.print(f"[yellow]not measured:[/] {name}: {why}", highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)
    for samples in result.rows:
        for target, why in samples.failures.items():
            console.print(f"[red]failed:[/] {samples.row.name} on {target}: {why}", highlight=False)
    met, judged = result.goals_met()
    if judged:
        console.print(f"goals: {met} of {judged} met", highlight=False)
    for text in missed(result):
        console.print(f"[red]missed:[/] {text}", highlight=False)
    console.print(machine_line(result), highlight=False)
    for complaint in result.machine.complaints():
        console.print(f"[yellow]noisy:[/] {complaint}; trust the ratios, not the numbers", highlight=False)


def _print(console: Console, table: Table) -> None:
    wanted = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    console.width = max(console.width, wanted)
    console.print(table)


def missed(result: Result) -> list[str]:
    """The goals that were not met, one line each."""
    lines = [f"{v.row}: {v.ratio:.2f}x {v.peer}, goal {v.wanted}" for v in result.verdicts() if not v.met]
    return lines + [f"pins: {row.name}: {_pin_facts(row)}, goal {row.goal}" for row in result.pins if row.met is False]


def machine_line(result: Result) -> str:
    machine = result.machine
    return (
        f"machine: {machine.cpus} CPUs, Linux {machine.kernel}, load {machine.load:.1f}, "
        f"others used {machine.others:.2f} CPUs, stolen {machine.stolen:.1%}, "
        f"a fixed computation varied by {machine.uneven:.0%}; the run took {result.took_s:.0f} s"
    )


def _rows_table(result: Result, title: str, rows: list[Samples]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", row_styles=("", ""))
    table.add_column("")
    for target in (result.subject, *result.others):
        table.add_column(target, justify="right", no_wrap=True)
    for samples in rows:
        cells = [f"{samples.row.name}\n[dim]{samples.row.unit}[/]"]
        for target in (result.subject, *result.others):
            median = samples.median(target)
            if median is None:
                cells.append("[dim]-[/]")
                continue
            first = f"{number(median)} [dim]±{samples.spread(target):.0%}[/]"
            second, met = _ratio_cell(result, samples, target) if target != result.subject else ("", None)
            style = {True: "green", False: "bold red", None: "dim"}[met]
            cells.append(f"{first}\n[{style}]{second}[/]")
        table.add_row(*cells)
    return table


def _pin_facts(row: PinRow) -> str:
    if row.least_per_s is not None:
        return f"{1 / row.seconds:,.0f}/s"
    if row.most is not None and row.ratio is not None:
        return f"{row.ratio:.2f}x {row.beside}"
    return f"{(row.stall or 0) * 1e3:.1f} ms" if row.stall is not None else ""


def _pin_cells(row: PinRow) -> list[str]:
    each = f"{row.seconds / row.extents * 1e6:,.2f}" if row.extents else "-"
    ratio = f"{row.ratio:.2f}x {row.beside}" if row.ratio is not None else "-"
    stall = f"{row.stall * 1e3:,.1f}" if row.stall is not None else "-"
    goal = f"{row.goal} {MET if row.met else MISSED}" if row.met is not None else ""
    return [row.name, f"{row.seconds * 1e6:,.2f}", each, ratio, stall, goal]


PIN_COLUMNS = ("", "µs", "µs an extent", "beside", "longest wait, ms", "goal")


def _pins_table(rows: list[PinRow]) -> Table:
    title = "Pins: medians over the rounds; how long another client's longest getattr took meanwhile"
    table = Table(*PIN_COLUMNS, title=title, title_justify="left", title_style="bold", header_style="bold")
    for row in rows:
        if row.cells:
            style = {True: "green", False: "bold red", None: ""}[row.met]
            *facts, goal = _pin_cells(row)
            table.add_row(*facts, f"[{style}]{goal}[/]" if style else goal)
    for column in (*table.columns[1:3], table.columns[4]):
        column.justify = "right"
    return table


def _memory_table(result: Result) -> Table:
    title = "Memory of the servers, MiB (a mapped image counts as file or shared pages)"
    table = Table("", title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in MEMORY_FIELDS.values():
        table.add_column(column, justify="right")
    for peer, memory in result.memory.items():
        table.add_row(peer, *_memory_cells(memory))
    return table


def _memory_cells(memory: dict[str, int]) -> list[str]:
    return [f"{memory[key] / (1 << 20):,.1f}" for key in MEMORY_FIELDS.values()]


def markdown(result: Result) -> str:
    """The tables of a page."""
    lines = []
    for title, rows in _groups(result):
        lines += [f"**{title}**", "", "| | " + " | ".join((result.subject, *result.others)) + " |"]
        lines.append("| --- |" + " ---: |" * len(result.targets))
        for samples in rows:
            cells = [f"{samples.row.name}, {samples.row.unit}"]
            for target in (result.subject, *result.others):
                median = samples.median(target)
                text = number(median) if median is not None else "-"
                second, met = _ratio_cell(result, samples, target) if target != result.subject else ("", None)
                cells.append(f"{text}<br>{f'**{second}**' if met is False else second}" if second else text)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if any(row.cells for row in result.pins):
        lines += ["**Pins**", "", "| " + " | ".join(PIN_COLUMNS) + " |", "| --- | ---: | ---: | --- | ---: | --- |"]
        lines += ["| " + " | ".join(_pin_cells(row)) + " |" for row in result.pins if row.cells]
        lines.append("")
    if result.memory:
        lines += ["**Memory of the servers, MiB**", "", "| | " + " | ".join(MEMORY_FIELDS.values()) + " |"]
        lines.append("| --- |" + " ---: |" * len(MEMORY_FIELDS))
        lines += [f"| {peer} | {' | '.join(_memory_cells(memory))} |" for peer, memory in result.memory.items()]
        lines.append("")
    reached, judged = result.goals_met()
    lines.append(f"Goals: {reached} of {judged} met; {machine_line(result)}.")
    notes = [f"- not measured: {name}: {why}" for name, why in result.missing.items()]
    notes += [f"- {note}" for note in result.notes] + [f"- noisy: {complaint}" for complaint in result.machine.complaints()]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"
