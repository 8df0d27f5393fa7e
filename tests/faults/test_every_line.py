"""A failure that nobody expected (memory that runs out, a bug) in the middle of any call of the core, at any line of it: the
daemon answers EIO and makes the volume read-only (daemon/service.py). What is on media is then the state before the call or
the one after it, whatever the line was, and it can be read all the time.

The lines are chosen at random, DAXFS_TEST_LINES of each call (4).
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import daxfs.core
from daxfs.core import fsck, holding
from daxfs.core.volume import Volume
from daxfs.errors import FsError
from daxfs.lab.crash import calls, state
from daxfs.lab.crash.calls import ALPHABET, Call, Outcome, World, perform
from daxfs.lab.crash.medium import RecordingPmem
from tests.lab.crash.test_calls import ENABLED_BY
from tests.mount.test_crash import fresh_seed

LINES = int(os.environ.get("DAXFS_TEST_LINES") or 4)
CORE = str(Path(daxfs.core.__file__ or "").parent)
SEED = fresh_seed()


class Injected(Exception):
    """Nothing in the core knows of it."""


class Lines:
    """Counts the lines of the core that run, and raises at one of them, once. A context manager."""

    def __init__(self, at: int = 0, problem: BaseException | None = None) -> None:
        self.count, self.at, self.problem, self.where = 0, at, problem, ""

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(CORE) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at and self.problem is not None:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
                raise self.problem
        return self._line

    def __enter__(self) -> Lines:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def begin(call: Call) -> World:
    holding._check_flags.cache_clear()  # each run of a call goes through the same lines
    medium = RecordingPmem(calls.IMAGE_SIZE)
    medium.put(calls.base_image())
    world = World.begin(Volume.open(medium, now=calls.START, boot_id=calls.BOOT))
    for name in ENABLED_BY.get(call.name, ()):
        perform(world, ALPHABET[name])
    return world


def recovered(world: World) -> state.State:
    """What the next mount finds, on another boot of the host; fsck finds nothing."""
    image = world.volume.pmem
    assert isinstance(image, RecordingPmem)
    medium = RecordingPmem(calls.IMAGE_SIZE)
    medium.put(image.raw)
    volume = Volume.open(medium, now=world.now + calls.SECOND, boot_id=b"boot after fault")
    found = state.state_of(volume)
    volume.check()
    report = fsck.check(medium)
    assert report.errors == 0, [str(one) for one in report.findings]
    return found


@pytest.mark.parametrize("name", [name for name, call in ALPHABET.items() if not call.unmounts])
def test_a_failure_at_any_line(name: str) -> None:
    call = ALPHABET[name]
    world = begin(call)
    before = recovered(world)
    with Lines() as lines:
        perform(world, call)
    after = recovered(world)
    choose = random.Random(f"{SEED} {name}")
    for at in sorted(choose.sample(range(1, lines.count + 1), min(LINES, lines.count))):
        world = begin(call)
        problem = choose.choice((MemoryError, Injected, RecursionError))("injected")
        outcome: Outcome | BaseException
        with Lines(at, problem) as lines:
            try:
                outcome = perform(world, call)
            except Exception as raised:
                outcome = raised
        told = f"DAXFS_TEST_SEED={SEED}: {problem!r} at line {at} of {name}, {lines.where}; {outcome!r}"
        assert lines.where, f"{told}: the call does not repeat itself"
        assert outcome is problem or isinstance(outcome, Outcome) or world.volume.failed, f"{told}: it became another one"
        world.volume.fail("as Service.crashed does")
        try:
            state.state_of(world.volume)  # it can be read
            found = recovered(world)
        except FsError as unreadable:
            raise AssertionError(f"{told}: then {unreadable!r}") from unreadable
        why = state.explains(found, before, after, call, returned=isinstance(outcome, Outcome) and not outcome.errno)
        assert why is None, f"{told}: {why}"
