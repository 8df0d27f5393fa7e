"""What a check found: findings, one sentence each, and counts. Bounded, however broken the image is."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]  # what is looked at, how much is done, of how much
Step = Progress

FINDINGS_MAX = 1000  # of each severity; the others are counted

ERROR, NOTE, FIXED, LEFT = "error", "note", "fixed", "left"


@dataclass(frozen=True)
class Finding:
    """`severity`: "error" (the image is damaged), "note" (as it should be after what happened, but worth saying), "fixed"
    (what a repair did) or "left" (an error that a repair did not correct)."""

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


@dataclass
class Report:
    """`errors`, `notes`, `fixed` and `left` count all that was found or done, `findings` holds the first ones of each."""

    path: str
    errors: int = 0
    notes: int = 0
    fixed: int = 0
    left: int = 0
    repaired: bool = False  # a repair was tried: what counts is what it left
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    _reasons: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """As fsck(8) has it: 0 nothing wrong, 1 errors corrected, 4 errors left, 5 some of each. (8, could not run, is an
        ImageError.)"""
        if self.repaired:
            return (1 if self.errors and self.fixed else 0) | (4 if self.left else 0)
        return 4 if self.errors else 0

    @property
    def omitted(self) -> int:
        """Findings beyond the limit."""
        kept = collections.Counter(finding.severity for finding in self.findings)
        counts = {ERROR: self.errors, NOTE: self.notes, FIXED: self.fixed, LEFT: self.left}
        return sum(max(0, count - kept[severity]) for severity, count in counts.items())

    def error(self, text: str) -> None:
        self.errors += 1
        if self.errors <= FINDINGS_MAX:
            self.findings.append(Finding(ERROR, text))

    def note(self, text: str) -> None:
        self.notes += 1
        if self.notes <= FINDINGS_MAX:
            self.findings.append(Finding(NOTE, text))

    def fix(self, text: str) -> None:
        self.fixed += 1
        if self.fixed <= FINDINGS_MAX:
            self.findings.append(Finding(FIXED, text))

    def leave(self, text: str) -> None:
        """Why something is not corrected. A later round may correct it after all: `finish` counts."""
        self._reasons.append(text)

    def finish(self, last: Report) -> None:
        """After a repair: what the last check found is left."""
        self.left, self.counts = last.errors, last.counts
        if self.left:
            texts = [*self._reasons, *(finding.text for finding in last.findings if finding.severity == ERROR)]
            self.findings += [Finding(LEFT, text) for text in dict.fromkeys(texts)]

    def each(self, text: str, *columns: Array) -> None:
        """One error per row of the columns, which fill the placeholders of `text` in turn."""
        room = max(0, FINDINGS_MAX - self.errors)
        for values in zip(*(column[:room].tolist() for column in columns), strict=True):
            self.findings.append(Finding(ERROR, text.format(*values)))
        self.errors += len(columns[0])
