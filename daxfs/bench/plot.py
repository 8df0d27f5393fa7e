"""A result as an SVG: a panel for each row, a bar for each target, whiskers from the worst to the best round.

The subject is the bar in colour; ticks on it show where its goals are, green if met, red if not. A target without a server
(tmpfs, ext4) is shown for orientation: where it is far ahead its bar is cut. Needs nothing but text: no fonts, no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from daxfs.bench.pins import PinRow
from daxfs.bench.result import Result, Samples
from daxfs.bench.show import NAMES_OF_GROUPS, number

COLUMNS, PANEL, GAP, MARGIN = 3, 316, 18, 24
BAR, STEP, TITLE, LABEL, VALUE = 11, 17, 40, 92, 42
HEADER, SECTION = 64, 34
SUBJECT, SERVED, KERNEL = "#1f6feb", "#8c959f", "#d0d7de"
INK, DIM, GREEN, RED, RULE = "#1f2328", "#656d76", "#1a7f37", "#cf222e", "#d8dee4"
KERNELS = ("tmpfs", "ext4")
ROOM = 1.08  # of the longest bar


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float
    high: float
    colour: str


@dataclass(frozen=True)
class Tick:
    """Where a goal is on the subject's bar."""

    value: float
    met: bool
    text: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    bars: Sequence[Bar]
    ticks: Sequence[Tick] = ()
    verdict: bool | None = None

    @property
    def height(self) -> int:
        return TITLE + STEP * len(self.bars)

    @property
    def most(self) -> float:
        """What the longest bar stands for; bars of KERNEL are cut there."""
        values = [bar.high for bar in self.bars if bar.colour != KERNEL] + [tick.value for tick in self.ticks]
        return ROOM * max(values or [bar.high for bar in self.bars])


def svg(result: Result) -> str:
    """The picture. Its height follows from the number of rows."""
    body, y = [], HEADER
    for title, panels in _sections(result):
        body.append(_text(MARGIN, y + 22, title, size=14, weight=600))
        y += SECTION
        for first in range(0, len(panels), COLUMNS):
            line = panels[first : first + COLUMNS]
            body += [_panel(panel, MARGIN + index * (PANEL + GAP), y) for index, panel in enumerate(line)]
            y += max(panel.height for panel in line) + GAP
    width, height = 2 * MARGIN + COLUMNS * PANEL + (COLUMNS - 1) * GAP, y + MARGIN - GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *_header(result, width),
            *body,
            "</svg>\n",
        ]
    )


def _header(result: Result, width: int) -> list[str]:
    machine, rounds = result.machine, result.scale.get("rounds", "?")
    beside = " beside its peers" if result.others else ""
    facts = f"{result.time[:10]}, daxfs {result.version}, Linux {machine.kernel}, {machine.cpus} CPUs"
    facts += f"; medians of {rounds} rounds"
    noisy = "; a noisy machine: trust the ratios" if machine.complaints() else ""
    lines = [
        _text(MARGIN, 30, f"{result.subject}{beside}", size=18, weight=600),
        _text(MARGIN, 50, facts + noisy, size=11, fill=DIM),
    ]
    met, judged = result.goals_met()
    if judged:
        lines.append(_text(width - MARGIN, 30, f"{met} of {judged} goals met", size=13, anchor="end", weight=600))
        legend = "ticks: what the goals ask for; thin lines: worst to best round"
        lines.append(_text(width - MARGIN, 50, legend, size=11, fill=DIM, anchor="end"))
    return lines


def _sections(result: Result) -> list[tuple[str, list[Panel]]]:
    sections = []
    for group, title in NAMES_OF_GROUPS.items():
        panels = [_row_panel(result, samples) for samples in result.rows if samples.row.group == group and samples.values]
        panels = [panel for panel in panels if panel.bars]
        if panels:
            sections.append((title, panels))
    if pins := [_pin_panel(row) for row in result.pins if row.cells and row.ratio is not None]:
        sections.append(("Pins (lower is better)", pins))
    return sections


def _row_panel(result: Result, samples: Samples) -> Panel:
    bars = []
    for target in (result.subject, *result.others):
        median = samples.median(target)
        if median is None:
            continue
        colour = SUBJECT if target == result.subject else KERNEL if target in KERNELS else SERVED
        values = samples.measured(target)
        bars.append(Bar(target, median, min(values), max(values), colour))
    ticks = []
    for goal in samples.row.goals:
        verdict, theirs = result.verdict(samples, goal), samples.median(goal.peer)
        if verdict and theirs:
            text = f"goal: {verdict.wanted} {goal.peer}; it is {verdict.ratio:.2f}x"
            ticks.append(Tick(theirs * goal.ratio, verdict.met, text))
    met = all(tick.met for tick in ticks) if ticks else None
    return Panel(samples.row.name.removeprefix("cpu: "), samples.row.unit, bars, ticks, met)


def _pin_panel(row: PinRow) -> Panel:
    ours = [cell.seconds * 1e6 for cell in row.cells]
    theirs = [cell.beside * 1e6 for cell in row.cells if cell.beside]
    beside = sorted(theirs)[len(theirs) // 2]
    bars = [
        Bar("daxfs", row.seconds * 1e6, min(ours), max(ours), SUBJECT),
        Bar(row.beside, beside, min(theirs), max(theirs), SERVED),
    ]
    tick = None
    if row.least_per_s is not None:
        tick = 1e6 / row.least_per_s
    elif row.most is not None:
        tick = beside * row.most
    ticks = [Tick(tick, bool(row.met), f"goal: {row.goal}")] if tick is not None else []
    return Panel(row.name, "µs", bars, ticks, row.met)


def _panel(panel: Panel, x: int, y: int) -> str:
    mark = {True: "✓", False: "✗", None: ""}[panel.verdict]
    colour = GREEN if panel.verdict else RED
    parts = [
        f'<line x1="{x}" y1="{y}" x2="{x + PANEL}" y2="{y}" stroke="{RULE}"/>',
        _text(x, y + 18, panel.title, size=12, weight=600),
        _text(x + PANEL, y + 18, f"{panel.unit}  {mark}".rstrip(), size=11, fill=colour if mark else DIM, anchor="end"),
    ]
    length, top = PANEL - LABEL - VALUE, y + TITLE - 8
    for index, bar in enumerate(panel.bars):
        parts.append(_bar(bar, x, top + index * STEP, length, panel.most))
    for tick in panel.ticks:
        at = x + LABEL + length * tick.value / panel.most
        colour = GREEN if tick.met else RED
        line = f'<path d="M{at:.1f} {top - 3}V{top + BAR + 3}"'
        parts.append(f'{line} stroke="#ffffff" stroke-width="5"/>')
        parts.append(f'{line} stroke="{colour}" stroke-width="2.5"><title>{escape(tick.text)}</title></path>')
    return "\n".join(parts)


def _bar(bar: Bar, x: int, y: int, length: int, most: float) -> str:
    left, end = x + LABEL, min(length, length * bar.value / most)
    strong = bar.colour == SUBJECT
    ink, weight = (INK, 600) if strong else (DIM, 400)
    label = bar.label if len(bar.label) <= 15 else f"{bar.label[:14]}…"
    parts = [
        _text(left - 6, y + BAR - 2, label, size=10, fill=ink, anchor="end", weight=weight),
        f'<rect x="{left}" y="{y}" width="{max(end, 1):.1f}" height="{BAR}" rx="1.5" fill="{bar.colour}">'
        f"<title>{escape(bar.label)}: {number(bar.value)} ({number(bar.low)} to {number(bar.high)})</title></rect>",
        _text(x + PANEL, y + BAR - 2, number(bar.value), size=10, fill=ink, anchor="end", weight=weight),
    ]
    if bar.value > most:
        parts.append(f'<path d="M{left + end - 9:.1f} {y + BAR + 1}l4 {-BAR - 2}h3l-4 {BAR + 2}z" fill="#ffffff"/>')
    elif bar.high > bar.low:
        low, high = (left + length * min(edge, most) / most for edge in (bar.low, bar.high))
        parts.append(f'<path d="M{low:.1f} {y + BAR / 2}H{high:.1f}" stroke="{INK}" stroke-width="1" opacity="0.55"/>')
    return "\n".join(parts)


def _text(
    x: float, y: float, text: str, *, size: int, fill: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    how = f' text-anchor="{anchor}"' if anchor != "start" else ""
    how += f' font-weight="{weight}"' if weight != 400 else ""
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{fill}"{how}>{escape(text)}</text>'
