"""What a check found: findings, one sentence each, and counts. Bounded, however broken the image is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]  # what is looked at, how much is done, of how much

FINDINGS_MAX = 1000  # of each severity; the others are counted

ERROR, NOTE = "error", "note"


@dataclass(frozen=True)
class Finding:
    """`severity`: "error" (the image is damaged) or "note" (as it should be after what happened, but worth saying)."""

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


@dataclass
class Report:
    """`errors` and `notes` count all that was found, `findings` holds the first ones of each."""

    path: str
    errors: int = 0
    notes: int = 0
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """As fsck(8) has it: 0 nothing wrong, 4 errors left. (8, could not run, is an ImageError.)"""
        return 4 if self.errors else 0

    @property
    def omitted(self) -> int:
        """Findings beyond the limit."""
        return self.errors + self.notes - len(self.findings)

    def error(self, text: str) -> None:
        self.errors += 1
        if self.errors <= FINDINGS_MAX:
            self.findings.append(Finding(ERROR, text))

    def note(self, text: str) -> None:
        self.notes += 1
        if self.notes <= FINDINGS_MAX:
            self.findings.append(Finding(NOTE, text))

    def each(self, text: str, *columns: Array) -> None:
        """One error per row of the columns, which fill the placeholders of `text` in turn."""
        room = max(0, FINDINGS_MAX - self.errors)
        for values in zip(*(column[:room].tolist() for column in columns), strict=True):
            self.findings.append(Finding(ERROR, text.format(*values)))
        self.errors += len(columns[0])
