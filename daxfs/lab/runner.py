"""Running scenarios: which ones, under which policies, where; and the matrix of what came of it.

Without a mount, each policy (with the mount options that a scenario asks for) gets a temporary one, which its scenarios
share; one that goes wrong is thrown away, and the next scenario gets a fresh one.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daxfs.errors import BadArgument, FsError, NoEntry
from daxfs.lab import place as places
from daxfs.lab.place import Place
from daxfs.lab.processes import Died, Unseen, Zygote, errno_name
from daxfs.lab.scenario import EVERY, SCENARIOS, Lab, NotApplicable, Scenario

REASON_MAX = 600  # characters
PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "n/a"
CATALOGUE = ("truncate", "waiting", "punch", "names", "space", "holders", "revocable", "device", "mapping")


@dataclass(frozen=True)
class Result:
    """A cell of the matrix. `errno`: the name of the errno that the scenario's call gave, "" for none; `reason`: of any
    outcome but pass; `log`: what the scenario has to show."""

    name: str
    policy: str
    outcome: str
    errno: str
    seconds: float
    reason: str
    log: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def load(files: Iterable[Path] = ()) -> dict[str, Scenario]:
    """All scenarios by name: the catalogue's, and those of a person's files. BadArgument for a file that does not load."""
    for module in CATALOGUE:
        importlib.import_module(f"daxfs.lab.catalogue.{module}")
    for file in files:
        if not file.is_file():
            raise NoEntry(f"no scenario file {file}")
        sys.path.insert(0, str(file.resolve().parent))
        try:
            importlib.import_module(file.stem)
        except Exception as problem:
            raise BadArgument(f"{file} cannot be loaded: {type(problem).__name__}: {problem}") from problem
    return SCENARIOS


def select(scenarios: dict[str, Scenario], names: Sequence[str]) -> list[Scenario]:
    """By name; BadArgument for one that does not exist."""
    for name in names:
        if name not in scenarios:
            near = [known for known in scenarios if name in known or known in name]
            raise BadArgument(
                f"no scenario {name!r}" + (f"; is it {', '.join(near[:5])}?" if near else "; see: daxfs scenario list")
            )
    return [scenarios[name] for name in names]


def in_order(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """Those that can share a mount one after the other."""
    return sorted(scenarios, key=lambda s: (s.own_mount, s.size, sorted(s.options.items())))


def run(
    scenarios: Sequence[Scenario], policies: Sequence[str] = EVERY, *, mount: str | None = None, paths: Sequence[str] = (),
    full: bool = False,
) -> Iterator[Result]:
    """Run them all, policy by policy. `paths`: where a person's scenario files are; `full`: every race as often as the
    catalogue says. FsError if there is nothing to mount."""
    with Zygote(paths) as zygote, ExitStack() as stack:
        rooms = Rooms(stack, mount)
        for policy in policies:
            for scenario in in_order(scenarios):
                yield run_one(scenario, policy, rooms, zygote, full=full)
        try:
            rooms.close()
        except Unseen as problem:
            yield Result("the last mount", policies[-1], FAIL, "", 0.0, str(problem))


class Rooms:
    """The mount that scenarios share, until one needs another."""

    def __init__(self, stack: ExitStack, mount: str | None = None) -> None:
        self._stack = stack
        self._mounted: ExitStack | None = None
        self._key: tuple[str, int, dict[str, str]] | None = None
        self._place: Place | None = places.existing(mount) if mount else None
        self._somebodys = mount is not None
        stack.callback(self.throw_away)

    def place(self, scenario: Scenario, policy: str) -> Place:
        """Where it runs. NotApplicable on somebody's mount that does not have what it needs."""
        if self._somebodys:
            assert self._place is not None
            if scenario.own_mount:
                raise NotApplicable("it takes the mount down: run it without --mount")
            missing = {k: v for k, v in scenario.options.items() if not _is(self._place.settings.get(k), v)}
            if missing:
                raise NotApplicable("it needs a mount with -o " + ",".join(f"{k}={v}" for k, v in missing.items()))
            return self._place
        key = policy, scenario.size, dict(scenario.options)
        if self._place is None or self._key != key or scenario.own_mount:
            self.close()
            self._mounted = ExitStack()
            self._place = self._mounted.enter_context(places.temporary(policy, scenario.options, size=scenario.size))
            self._key = key
        return self._place

    def close(self) -> None:
        """Take the shared mount down. Unseen if it ends badly."""
        mounted, self._mounted = self._mounted, None
        if not self._somebodys:
            self._place = None
        if mounted:
            mounted.close()

    def throw_away(self) -> None:
        """Take it down whatever state it is in."""
        try:
            self.close()
        except Unseen as problem:
            print(f"daxfs: the mount of the lab: {problem}", file=sys.stderr)


def _is(has: str | None, wanted: str) -> bool:
    """Whether an option has a value; 1 is 1.0."""
    try:
        return has is not None and float(has) == float(wanted)
    except ValueError:
        return has == wanted


def run_one(scenario: Scenario, policy: str, rooms: Rooms, zygote: Zygote, *, full: bool = False) -> Result:
    """One cell."""
    started = time.monotonic()
    lab: Lab | None = None

    def result(outcome: str, reason: str = "") -> Result:
        code = errno_name(lab.errno if lab else 0)
        seconds = round(time.monotonic() - started, 3)
        why = " ".join(reason.split())[:REASON_MAX]
        return Result(scenario.name, policy, outcome, code, seconds, why, tuple(lab.log) if lab else ())

    if policy not in scenario.sees:
        return result(NOT_APPLICABLE, f"it says nothing about policy {policy}")
    try:
        place = rooms.place(scenario, policy)
    except NotApplicable as why:
        return result(NOT_APPLICABLE, str(why))
    except Unseen as problem:
        return result(FAIL, f"not run: the mount before it ended badly: {problem}")
    started = time.monotonic()
    try:
        lab = Lab(place, policy, zygote, scenario.name, full=full)
        scenario.play(lab)
        lab.finish()
        if scenario.own_mount:
            rooms.close()
        return result(PASS)
    except NotApplicable as why:
        answer = result(NOT_APPLICABLE, str(why))
    except (Unseen, Died, FsError) as problem:
        answer = result(FAIL, str(problem))
    except Exception as problem:
        answer = result(FAIL, f"{type(problem).__name__}: {problem}")
    finally:
        if lab:
            lab.end()
    if lab is None or scenario.own_mount or not lab.abandon():
        rooms.throw_away()
    return answer
