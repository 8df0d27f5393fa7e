"""The results of a run: medians, ratios, goals; as a table for people and as a dict for JSON."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.peers import MEMORY_FIELDS
from tools.bench.pins import PinRow

# (kind or name of rows, peer, ratio that daxfs has to reach)
GOALS = (("data", "nullfs", 0.7), ("create", "passthrough_ll", 0.3))
NOISY = 0.10


@dataclass
class Row:
    name: str
    kind: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)  # by peer, one per round
    latency: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, peer: str) -> float | None:
        samples = self.samples.get(peer)
        return statistics.median(samples) if samples else None

    def spread(self, peer: str) -> float:
        """Half of the distance between best and worst round, as a share of the median."""
        samples = self.samples[peer]
        return (max(samples) - min(samples)) / 2 / statistics.median(samples)

    def ratio(self, peer: str) -> float | None:
        """The median of the rounds' own ratios: within a round both met the same machine."""
        pairs = zip(self.samples.get("daxfs", []), self.samples.get(peer, []), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs if theirs]
        return statistics.median(ratios) if ratios else None


@dataclass
class Report:
    rows: list[Row]
    peers: list[str]
    missing: dict[str, str]
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    calibration_ms: list[float] = field(default_factory=list)
    stolen: float = 0.0
    one_cpu: bool = False
    pins: list[PinRow] = field(default_factory=list)

    def goals(self) -> list[dict[str, Any]]:
        """One entry per row that has a goal and was measured on both sides."""
        found = []
        for which, peer, wanted in GOALS:
            for row in self.rows:
                ratio = row.ratio(peer)
                if which in (row.kind, row.name) and ratio is not None:
                    goal = {"row": row.name, "peer": peer, "goal": wanted, "ratio": ratio, "met": ratio >= wanted}
                    found.append(goal)
        return found

    def noise(self) -> float:
        """By how much a fixed computation took longer now and then (the ninth decile, against the quickest)."""
        if len(self.calibration_ms) < 2:
            return 0.0
        return statistics.quantiles(self.calibration_ms, n=10)[-1] / min(self.calibration_ms) - 1

    def as_dict(self) -> dict[str, Any]:
        def row(one: Row) -> dict[str, Any]:
            return {
                "name": one.name,
                "kind": one.kind,
                "unit": one.unit,
                "median": {peer: one.median(peer) for peer in one.samples},
                "samples": one.samples,
                "latency": one.latency,
                "ratio": {peer: one.ratio(peer) for peer in self.peers if peer != "daxfs"},
                "failures": one.failures,
            }

        def pin_row(one: PinRow) -> dict[str, Any]:
            return {
                "name": one.name,
                "seconds": one.seconds,
                "beside": one.beside,
                "ratio": one.ratio,
                "ratio_max": one.most,
                "extents": one.extents,
                "stall_s": one.stall,
                "stall_s_max": one.stall_most,
                "met": one.met,
                "rounds": [asdict(cell) for cell in one.cells],
            }

        return {
            "rows": [row(one) for one in self.rows],
            "goals": self.goals(),
            "pins": [pin_row(one) for one in self.pins if one.cells],
            "memory": self.memory,
            "missing": self.missing,
            "machine": {
                "kernel": platform.release(),
                "cpus": os.cpu_count(),
                "one_cpu": self.one_cpu,
                "load": os.getloadavg(),
                "stolen": self.stolen,
                "calibration_ms": self.calibration_ms,
                "noise": self.noise(),
            },
        }

    def show(self, console: Console) -> None:
        if self.rows:
            self.show_rows(console)
        if any(row.cells for row in self.pins):
            self.show_pins(console)
        self.show_memory(console)
        for peer, why in self.missing.items():
            console.print(f"[yellow]not measured:[/] {peer}: {why}", highlight=False)
        for row in self.rows:
            for peer, why in row.failures.items():
                console.print(f"[red]failed:[/] {row.name} on {peer}: {why}", highlight=False)
        for goal in self.goals():
            text = f"{goal['row']}: {goal['ratio']:.2f}x {goal['peer']}, goal {goal['goal']:g}x"
            console.print(f"{_verdict(goal['met'])} {text}", highlight=False)
        for pin_row in self.pins:
            if pin_row.met is not None:
                console.print(f"{_verdict(pin_row.met)} {_pin_goal(pin_row)}", highlight=False)
        noise = self.noise()
        text = f"machine: {os.cpu_count()} CPUs{', all on one' if self.one_cpu else ''}, "
        text += f"load {os.getloadavg()[0]:.1f}, stolen {self.stolen:.1%}, a fixed computation varied by {noise:.0%}"
        text += "; [yellow]noisy: trust the ratios, not the numbers[/]" if noise > NOISY else ""
        console.print(text, highlight=False)

    def show_rows(self, console: Console) -> None:
        others = [peer for peer in self.peers if peer != "daxfs"]
        ours = "daxfs" in self.peers
        table = Table(title="medians over the rounds (± half of their spread), and the ratios of daxfs to the others")
        table.add_column("", no_wrap=True)
        for peer in self.peers:
            table.add_column(peer, justify="right", no_wrap=True)
        for peer in others if ours else []:
            table.add_column(f"/ {peer}", justify="right", no_wrap=True)
        for row in self.rows:
            cells = [f"{row.name} [dim]{row.unit}[/]"]
            for peer in self.peers:
                median = row.median(peer)
                cells.append("-" if median is None else f"{median:,.0f} [dim]±{row.spread(peer):.0%}[/]")
            for peer in others if ours else []:
                ratio = row.ratio(peer)
                cells.append("-" if ratio is None else f"{ratio:.2f}x")
            table.add_row(*cells)
        console.print(table)

    def show_pins(self, console: Console) -> None:
        title = "pins: medians over the rounds; how long another client's longest getattr took meanwhile"
        table = Table("", "µs", "µs an extent", "beside", "longest wait, ms", title=title)
        for row in self.pins:
            if row.cells:
                each = f"{row.seconds / row.extents * 1e6:,.2f}" if row.extents else "-"
                ratio = f"{row.ratio:.2f}x {row.beside}" if row.ratio is not None else "-"
                stall = f"{row.stall * 1e3:,.1f}" if row.stall is not None else "-"
                table.add_row(row.name, f"{row.seconds * 1e6:,.2f}", each, ratio, stall)
        for column in (*table.columns[1:3], table.columns[4]):
            column.justify = "right"
        console.print(table)

    def show_memory(self, console: Console) -> None:
        table = Table(title="memory of the servers, MiB (a mapped image counts as file or shared pages)")
        table.add_column("")
        for column in MEMORY_FIELDS.values():
            table.add_column(column, justify="right")
        for peer, memory in self.memory.items():
            table.add_row(peer, *(f"{memory[key] / (1 << 20):,.1f}" for key in MEMORY_FIELDS.values()))
        console.print(table)


def _verdict(met: bool) -> str:
    return "[green]met[/]   " if met else "[red]missed[/]"


def _pin_goal(row: PinRow) -> str:
    if row.most is not None and row.ratio is not None:
        return f"{row.name}: {row.ratio:.2f}x {row.beside}, goal at most {row.most:g}x"
    assert row.stall is not None
    assert row.stall_most is not None
    return f"{row.name}: {row.stall * 1e3:.1f} ms another client waited, goal at most {row.stall_most * 1e3:g} ms"
