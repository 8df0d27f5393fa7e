"""From a violation to the least that shows it: a shorter workload, and fewer lines that made the difference.

Calls before the failing one are left out while it still fails; then lines are moved from "left behind" to "lost" while it
still fails, and the other way round, and the shorter of the two lists is told. Everything is repeatable: the command that
is given explores that workload again and finds the violation again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from daxfs.lab.crash import sequences
from daxfs.lab.crash.explore import Explorer, Found, Tally
from daxfs.lab.crash.images import Choice, tracker
from daxfs.lab.crash.medium import LINE, Fence
from daxfs.lab.crash.places import Places

_TRIES_MAX = 150  # recoveries to shorten one list of lines
_SHOWN = 12


@dataclass(frozen=True)
class Violation:
    """`where`: which moment of which call; `lines`: what made the difference, a sentence each; `command` finds it again."""

    workload: str
    where: str
    why: str
    lines: tuple[str, ...]
    command: str

    def __str__(self) -> str:
        return "\n".join([f"{self.workload}: {self.where}: {self.why}", *(f"  {line}" for line in self.lines),
                          f"  again: {self.command}"])  # fmt: skip


def reproduce(found: Found, explorer: Explorer) -> Violation:
    """The least that shows a violation."""
    found = _shorter(found, explorer)
    options, run = explorer.options, explorer.run(found.workload)
    base = tracker(options.domain, explorer.base_image)
    for event in run.log[: found.crash.event]:
        base.feed(event)
    crash = found.crash
    fences = sum(isinstance(event, Fence) for event in run.log[run.starts[crash.call] : crash.event])
    call = found.workload[crash.call]
    where = f"at the return of {call}" if crash.at_return else f"within {call}, before its fence {fences + 1}"
    lines = [] if crash.daemon else _lines(found, explorer, base.latest(), bytes(base.durable))
    name = "+".join(found.workload)
    command = f"daxfs lab crash --workloads {name} --domain {options.domain} --seed {options.seed}"
    if options.mutant:
        command += f" --mutant {options.mutant}"
    return Violation(name, where, found.why, tuple(lines), command)


def _shorter(found: Found, explorer: Explorer) -> Found:
    """The same call failing after fewer others."""
    last = found.workload[found.crash.call]
    best = replace(found, workload=found.workload[: found.crash.call + 1])

    def fails(prefix: sequences.Sequence) -> bool:
        nonlocal best
        tally = Tally()
        Explorer(explorer.options, explorer.alphabet).explore((*prefix, last), tally, len(prefix))
        if tally.found:
            best = tally.found[0]
        return bool(tally.found)

    prefix = best.workload[:-1]
    if prefix and not fails(()):
        sequences.shrink(prefix, fails)
    return best


def _lines(found: Found, explorer: Explorer, latest: Choice, durable: bytes) -> list[str]:
    """What was left behind, or what was lost, in few lines."""
    choice = found.crash.choice
    present = _least(choice, lambda some: bool(explorer.still(found, some)))
    missing = {line: content for line, content in latest.items() if choice.get(line) != content}

    def without(lost: Choice) -> Choice:
        return {n: choice.get(n, durable[n * LINE : (n + 1) * LINE]) if n in lost else latest[n] for n in latest}

    if explorer.options.domain == "eadr":
        return [f"left behind: {len(choice)} lines, up to {Places(durable).name(max(choice, default=0))}"]
    names = Places(durable)
    absent = _least(missing, lambda some: bool(explorer.still(found, without(some))))
    lost = bool(absent) and not 0 < len(present) <= len(absent)
    what, told = ("lost", absent) if lost else ("left behind", present)
    shown = [f"{what}: {names.name(line)}{_torn(line, choice, latest)}" for line in sorted(told)[:_SHOWN]]
    shown += [f"and {len(told) - _SHOWN} more lines"] if len(told) > _SHOWN else []
    rest = "all other pending stores were left behind" if lost else "all other pending stores were lost"
    return [*shown, rest]


def _torn(line: int, choice: Choice, latest: Choice) -> str:
    return " (in part)" if line in choice and choice[line] != latest[line] else ""


def _least(choice: Choice, fails: Callable[[Choice], bool]) -> Choice:
    """As few lines as will do: larger pieces are left out first."""
    lines, piece, tries = sorted(choice), len(choice), 0
    if not fails(choice):
        return choice
    while piece:
        at = 0
        while at < len(lines) and tries < _TRIES_MAX:
            fewer = lines[:at] + lines[at + piece :]
            tries += 1
            if fails({line: choice[line] for line in fewer}):
                lines = fewer
            else:
                at += piece
        piece //= 2
    return {line: choice[line] for line in lines}
