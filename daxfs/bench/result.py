"""The results of a run: samples by round, medians, the spread, ratios, verdicts; to JSON and back.

The subject is what the ratios are of: daxfs, or the directory that was named. A ratio is taken within each round, where both
sides met the same machine, and the median of the rounds' ratios counts. A cell that failed is None in its round.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from daxfs.bench.machine import Machine
from daxfs.bench.pins import Cell as PinCell
from daxfs.bench.pins import PinRow
from daxfs.bench.rows import Goal, Row

FORMAT = 1


@dataclass(frozen=True)
class Verdict:
    """One goal of a row, and what came of it."""

    row: str
    peer: str
    goal: float
    ratio: float
    lower: bool
    met: bool

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.lower else 'at least'} {self.goal:g}x"


@dataclass
class Samples:
    """A row and what was measured for it; lists have one entry per round."""

    row: Row
    values: dict[str, list[float | None]] = field(default_factory=dict)  # by target
    cpu_us: dict[str, list[float]] = field(default_factory=dict)  # of the server, for each request
    latency: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, target: str, value: float | None) -> None:
        self.values.setdefault(target, []).append(value)

    def fail(self, target: str, why: str) -> None:
        self.add(target, None)
        self.failures[target] = why

    def measured(self, target: str) -> list[float]:
        return [value for value in self.values.get(target, []) if value is not None]

    def median(self, target: str) -> float | None:
        samples = self.measured(target)
        return statistics.median(samples) if samples else None

    def spread(self, target: str) -> float:
        """Half of the distance between best and worst round, as a share of the median."""
        samples = self.measured(target)
        return (max(samples) - min(samples)) / 2 / statistics.median(samples) if samples else 0.0

    def ratio(self, subject: str, peer: str) -> float | None:
        pairs = zip(self.values.get(subject, []), self.values.get(peer, []), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        return statistics.median(ratios) if ratios else None


@dataclass
class Result:
    subject: str
    targets: list[str]  # the subject among them
    rows: list[Samples]
    pins: list[PinRow] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # peers, and rows, that could not be had: why
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    is_daxfs: bool = True  # what the goals are about
    time: str = ""  # when it began, ISO 8601
    version: str = ""
    scale: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0
    notes: list[str] = field(default_factory=list)  # what a reader has to know

    @property
    def others(self) -> list[str]:
        return [target for target in self.targets if target != self.subject]

    def verdict(self, samples: Samples, goal: Goal) -> Verdict | None:
        """None: there is nothing to judge."""
        ratio = samples.ratio(self.subject, goal.peer) if self.is_daxfs else None
        if ratio is None:
            return None
        row = samples.row
        return Verdict(row.name, goal.peer, goal.ratio, ratio, row.lower, row.meets(ratio, goal))

    def verdicts(self) -> list[Verdict]:
        every = [self.verdict(samples, goal) for samples in self.rows for goal in samples.row.goals]
        return [verdict for verdict in every if verdict]

    def filtered(self, only: str) -> Result:
        """The same run with the rows that are called so."""
        rows = [samples for samples in self.rows if samples.row.matches(only)]
        return replace(self, rows=rows, pins=[row for row in self.pins if only in f"pins: {row.name}"])

    def goals_met(self) -> tuple[int, int]:
        """So many, of so many that could be judged; those of pins, too."""
        judged = [verdict.met for verdict in self.verdicts()] + [row.met for row in self.pins if row.met is not None]
        return sum(judged), len(judged)

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "time": self.time,
            "version": self.version,
            "took_s": self.took_s,
            "subject": self.subject,
            "is_daxfs": self.is_daxfs,
            "targets": self.targets,
            "scale": self.scale,
            "rows": [self._row(samples) for samples in self.rows if samples.values],
            "pins": [_pin_row(row) for row in self.pins if row.cells],
            "memory": self.memory,
            "missing": self.missing,
            "notes": self.notes,
            "machine": self.machine.as_dict(),
        }

    def _row(self, samples: Samples) -> dict[str, Any]:
        row = samples.row
        return {
            "name": row.name,
            "group": row.group,
            "unit": row.unit,
            "lower": row.lower,
            "median": {target: samples.median(target) for target in samples.values},
            "spread": {target: samples.spread(target) for target in samples.values},
            "ratio": {target: samples.ratio(self.subject, target) for target in self.others},
            "goals": [asdict(verdict) for goal in row.goals if (verdict := self.verdict(samples, goal))],
            "wanted": [asdict(goal) for goal in row.goals],
            "samples": samples.values,
            "cpu_us": samples.cpu_us,
            "latency": samples.latency,
            "failures": samples.failures,
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Result:
        """What as_dict gave. ValueError: that is not what this is."""
        try:
            if facts["format"] != FORMAT:
                raise ValueError(f"a result of format {facts['format']}, this knows {FORMAT}")
            return cls(
                facts["subject"], facts["targets"], [_samples(row) for row in facts["rows"]],
                [_read_pin_row(row) for row in facts["pins"]], facts["missing"], facts["memory"],
                Machine.from_dict(facts["machine"]), facts["is_daxfs"], facts["time"], facts["version"], facts["scale"],
                facts["took_s"], facts["notes"],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"not the JSON of a run: {problem}") from None


def _samples(facts: dict[str, Any]) -> Samples:
    goals = tuple(Goal(goal["peer"], goal["ratio"]) for goal in facts["wanted"])
    row = Row(facts["name"], facts["group"], facts["unit"], goals, facts["lower"])
    return Samples(row, facts["samples"], facts["cpu_us"], facts["latency"], facts["failures"])


def _pin_row(row: PinRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "seconds": row.seconds,
        "beside": row.beside,
        "ratio": row.ratio,
        "ratio_max": row.most,
        "per_s_min": row.least_per_s,
        "extents": row.extents,
        "stall_s": row.stall,
        "stall_s_max": row.stall_most,
        "met": row.met,
        "rounds": [asdict(cell) for cell in row.cells],
    }


def _read_pin_row(facts: dict[str, Any]) -> PinRow:
    cells = [PinCell(**cell) for cell in facts["rounds"]]
    limits = facts["ratio_max"], facts["extents"], facts["stall_s_max"], facts["per_s_min"]
    return PinRow(facts["name"], facts["beside"], *limits, cells=cells)
