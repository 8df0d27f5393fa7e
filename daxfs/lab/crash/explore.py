"""The explorer: runs a workload on the recording medium, recovers every image that a crash can leave, and judges it.

A workload is a sequence of calls. It is run once; the state of the volume after each acknowledged call is kept. A crash
within a call must recover to what was before it or after it, a crash at its return to what is after it (state.explains).

An image is judged in full (`Judge`): it is mounted by the production `Volume.open` with a new boot id; the state is read;
`Volume.check()` proves the structures against media, fsck must find no error, no pin may be left; then the volume is used
(create, write, read, rename, delete), checked again, and mounted a second time: every byte behind the superblocks must stay,
and every file; at last files are made longer, and nothing old may show. All that is deterministic, so images that agree
in every line that a part of it reads, and whose mounted volumes agree in memory, share the result of that part: it is done
once. And while an image is recovered the power may go again: for each different course that a recovery takes, its own
crash images are recovered too, and must end in the very same state; fsck of the image, unmounted, must find no error.

At each point the daemon alone dies as well: all stores are there and the boot is the same, so the pins must be there, too.

Not here: what a crash can leave (images.py), more than one core (parallel.py).
"""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daxfs.core import fileops, fsck, layout, namespace
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume
from daxfs.errors import FsError, NoSpace
from daxfs.lab.crash import calls, state
from daxfs.lab.crash.calls import ALPHABET, Call, World, perform
from daxfs.lab.crash.images import Choice, Limits, Tracker, digest_of, digest_with, tracker
from daxfs.lab.crash.medium import LINE, Event, Fence, Flush, RecordingPmem, Return, Seen, Store
from daxfs.lab.crash.places import Places
from daxfs.lab.crash.state import State

Workload = tuple[str, ...]
Pins = frozenset[tuple[int, int, int]]  # (pin, first block, blocks)

AFTER = calls.START + (1 << 20) * calls.SECOND  # ns since 1970: when the volume is mounted again
_BOOTS = (b"boot after crash", b"boot after next1")
_NAME, _OTHER = b"used after a crash", b"renamed after a crash"
_CALLER = Caller(0, 0, 0o022)
_MEMOS = 12
_KNOWN_MAX = 1 << 18  # images whose verdict is kept, and
_STATES_MAX = 500  # different states among them: each has the bytes of all files


@dataclass(frozen=True)
class Verdict:
    """What came of an image: the state of the volume, or what is wrong; `seen`: which of its lines were read."""

    state: State | None
    problem: str
    seen: Seen


class _Memo(NamedTuple):
    """A result, and all that it depends on: lines, their bytes after recovery, and the mounted volume in memory."""

    memory: tuple[Any, ...]
    lines: npt.NDArray[np.intp]
    content: npt.NDArray[np.uint8]
    result: Any


class _Part:
    """One part of the judgement: results of the last images. `done` counts them, `shared` those that took one over."""

    def __init__(self) -> None:
        self.shared = self.done = 0
        self._memos: list[_Memo] = []

    def find(self, memory: tuple[Any, ...], rows: npt.NDArray[np.uint8]) -> _Memo | None:
        for at, memo in enumerate(self._memos):
            if memo.memory == memory and np.array_equal(rows[memo.lines], memo.content):
                self._memos.insert(0, self._memos.pop(at))
                self.shared += 1
                return memo
        return None

    def keep(self, memo: _Memo) -> _Memo:
        self.done += 1
        self._memos.insert(0, memo)
        del self._memos[_MEMOS:]
        return memo


class Judge:
    """Recovers and judges images. Three parts, each done once for all images that agree in what it reads: the state of the
    files; the soundness of the volume, and its use; the bytes behind the ends of files."""

    def __init__(self, size: int) -> None:
        self.medium = RecordingPmem(size)
        self.states, self.soundness, self.tails = _Part(), _Part(), _Part()
        self._rows = self.medium.rows
        self._seen: dict[bytes, Seen] = {}

    def forget(self) -> None:
        """Nobody has a verdict any more."""
        self.states.done = 0
        self._seen.clear()

    def put(self, base: Tracker, choice: Choice) -> None:
        """Make the image of a choice."""
        self.medium.put(base.durable)
        for line, content in choice.items():
            self.medium.raw[line * LINE : (line + 1) * LINE] = content

    def judge(self, base: Tracker, choice: Choice, boot: bytes) -> tuple[Verdict, list[Event]]:
        """The verdict on an image, and what its recovery did to the medium."""
        medium = self.medium
        self.put(base, choice)
        found: State | None = None
        log: list[Event] = []
        seen = medium.needed
        try:
            volume = Volume.open(medium, now=AFTER, boot_id=boot)
            log, seen = list(medium.log), medium.needed
            memory = _memory(volume)
            memo = self.states.find(memory, self._rows) or self._do(self.states, _look, volume, memory)
            seen[memo.lines] = True
            found = memo.result
            for part, look in ((self.soundness, partial(_prove, boot)), (self.tails, partial(_stretch, boot, found))):
                memo = part.find(memory, self._rows) or self._do(part, look, volume, memory)
                seen[memo.lines] = True
                if memo.result:
                    return self._verdict(found, memo.result, seen), log
            return self._verdict(found, "", seen), log
        except FsError as e:
            problem = f"it does not mount: {e.why}" if not log else f"it cannot be used: {type(e).__name__}: {e.why}"
        except Exception as e:
            problem = _told(e)
        return self._verdict(found, problem, seen | medium.needed), log

    def _do(self, part: _Part, look: Look, volume: Volume, memory: tuple[Any, ...]) -> _Memo:
        """A part of the judgement, on a recovered volume; its medium is as before afterwards."""
        medium = self.medium
        image = self._rows.copy()
        medium.clear()
        result, beside = look(volume, medium)
        medium.seen[beside] = False
        lines = np.flatnonzero(medium.needed)
        self._rows[:] = image
        return part.keep(_Memo(memory, lines, image[lines], result))

    def _verdict(self, found: State | None, problem: str, seen: Seen) -> Verdict:
        return Verdict(found, problem, self._seen.setdefault(seen.tobytes(), seen))


def _pins(volume: Volume) -> Pins:
    """The runs that each pin keeps from everybody."""
    return frozenset((pin.id, start, count) for pin in volume.pins if pin.counted for start, count in pin.runs)


def _told(e: Exception) -> str:
    where = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {e} ({where.name} in {where.filename.rpartition('/')[2]}:{where.lineno})"


def _course(log: Sequence[Event]) -> int:
    """A number for what a recovery did, the same in every process."""
    digest = blake2b(digest_size=8)
    for event in log:
        digest.update(f"{type(event).__name__} {event[:1]}".encode())
        if isinstance(event, Store):
            digest.update(event.data)
    return int.from_bytes(digest.digest(), "little")


def _memory(volume: Volume) -> tuple[Any, ...]:
    """What a freshly mounted volume keeps in memory."""
    return (
        volume.alloc.free.runs(), list(volume.free_inodes), list(volume.chunks), list(volume.ledger.blocks),
        volume.journal.sequence, volume.busy_list.extents.runs(), len(volume.pins), dict(volume.sb), volume.last_shutdown,
    )  # fmt: skip


# The parts of the judgement. Each gives its result, and those lines among the ones it reads that do not matter to it.

Look = Callable[[Volume, RecordingPmem], tuple[Any, npt.NDArray[np.intp]]]
_NONE = np.zeros(0, np.intp)


def _look(volume: Volume, medium: RecordingPmem) -> tuple[State, npt.NDArray[np.intp]]:
    return state.state_of(volume), _NONE


def _prove(boot: bytes, volume: Volume, medium: RecordingPmem) -> tuple[str, npt.NDArray[np.intp]]:
    """Soundness, use, and a second mount. What is in files does not matter: it is only compared with itself."""
    idle = _idle_journal(volume)
    problem = _examine(volume, medium) or _use(volume)
    if problem:
        return problem, _NONE
    start = 2 * volume.block_size
    was, image = state.state_of(volume), bytes(medium.raw[start:])
    again = Volume.open(medium, now=AFTER, boot_id=boot)
    if bytes(medium.raw[start:]) != image:
        return "mounting it once more changes bytes of the image", _NONE
    if state.state_of(again) != was:
        return "mounted once more it has other files", _NONE
    per_block = volume.block_size // LINE
    data = [np.arange(start * per_block, (start + count) * per_block)
            for inode in again.in_memory() if inode.is_file for _, start, count, _ in inode.map]  # fmt: skip
    return "", np.concatenate([idle, *data])


def _stretch(boot: bytes, found: State, volume: Volume, medium: RecordingPmem) -> tuple[str, npt.NDArray[np.intp]]:
    """Whether anything old shows when files are made longer."""
    again = Volume.open(medium, now=AFTER, boot_id=boot)  # the volume may have been used
    return state.tails(again, AFTER, found) or "", _idle_journal(again)


def _examine(volume: Volume, medium: RecordingPmem) -> str:
    volume.check()
    if volume.pinned or volume.busy:
        return f"{volume.pinned} blocks are pinned and {volume.busy} busy after a power cut"
    report = fsck.check(medium)
    error = _errors(report)
    if error:
        return f"fsck: {error}"
    if report.counts["free"] != volume.free:
        return f"fsck counts {report.counts['free']} free blocks, the volume {volume.free}"
    return ""


def _idle_journal(volume: Volume) -> npt.NDArray[np.intp]:
    """The lines of the journal's body, if it is idle after recovery: then all that counts of them is the next sequence,
    which is part of `_memory`."""
    start, count, size = volume.sb["journal_start"], volume.sb["journal_blocks"], volume.block_size
    if volume.pmem.load_word(start * size + layout.JOURNAL_COMMIT_AT):
        return _NONE
    return np.arange((start + 1) * size // LINE, (start + count) * size // LINE)


def _errors(report: fsck.Report) -> str:
    """The first error of a report."""
    return next((finding.text for finding in report.findings if finding.severity == fsck.ERROR), "")


def _use(volume: Volume) -> str:
    """Create, write, read, rename, delete. A full volume may say so."""
    root, data = volume.root, calls.pattern(4711, volume.block_size + LINE)  # whole lines: what they held does not matter
    free = volume.free
    try:
        inode = namespace.create(volume, AFTER, root, _NAME, 0o644, _CALLER)
    except NoSpace:
        return ""
    try:
        n = fileops.write(volume, AFTER, inode, LINE, data)
        if fileops.read(volume, inode, 0, 1 << 20) != bytes(LINE) + data[:n]:
            return "a file that was written after recovery does not read as it was written"
    except NoSpace:
        pass
    namespace.rename(volume, AFTER, root, _NAME, root, _OTHER)
    namespace.unlink(volume, AFTER, root, _OTHER)
    fileops.reap(volume, AFTER, inode)
    volume.check()
    if volume.free < free - 5:  # a block of the directory, a chunk of inodes
        return f"{free - volume.free} blocks were lost to a file that came and went"
    return ""


# -- one workload --


@dataclass(frozen=True)
class Options:
    """`limits` for crashes of calls, `inner` for crashes of recoveries. `mutant`: of mutants.py, with which daxfs runs."""

    domain: str = "adr"
    seed: int = 1
    mutant: str = ""
    limits: Limits = field(default_factory=Limits)
    inner: Limits = field(default_factory=lambda: Limits(all=64, lines=16, pairs=16, random=8))


@dataclass(frozen=True)
class Crash:
    """Where the power went: before `event` of the record (at the return, if that is what it is) of call `call`."""

    call: int
    event: int
    at_return: bool
    choice: Choice = field(repr=False)
    daemon: bool = False  # only the daemon died


@dataclass
class Found:
    """A violation, as it was found."""

    workload: Workload
    crash: Crash
    why: str


@dataclass
class Tally:
    """What came of some workloads. `redundant`: (call, "flush" or "fence") -> how many did nothing."""

    workloads: int = 0
    images: int = 0
    shared: int = 0
    recoveries: int = 0  # courses of recovery that were crashed, too
    points: int = 0
    digests: set[int] = field(default_factory=set)
    found: list[Found] = field(default_factory=list)
    redundant: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.workloads += other.workloads
        self.images += other.images
        self.shared += other.shared
        self.recoveries += other.recoveries
        self.points += other.points
        self.digests |= other.digests
        self.found += other.found
        self.redundant += other.redundant


@dataclass
class Run:
    """A workload that was run: `log`; states, pins and the host's boot around each call; where in the log each begins."""

    workload: Workload
    log: list[Event]
    states: list[State]
    pins: list[Pins]
    boots: list[bytes]
    starts: list[int]


class Explorer:
    """Explores workloads, one after the other, on one core. `alphabet` and `base_image`: others than the usual ones."""

    def __init__(self, options: Options | None = None, alphabet: dict[str, Call] = ALPHABET,
                 base_image: bytes | None = None) -> None:  # fmt: skip
        self.options = options or Options()
        self.alphabet = alphabet
        self.base_image = base_image or calls.base_image()
        self._begin = World if base_image else World.begin
        self._digest = digest_of(self.base_image)
        self._judge = Judge(len(self.base_image))
        self._known: dict[tuple[int, bytes], Verdict] = {}
        self._courses: set[int] = set()

    def explore(self, workload: Workload, tally: Tally, first: int = 0, until: float = math.inf) -> None:
        """Crash calls `first` and later of a workload. At most one violation per call is kept. `until` (s since 1970) it
        may take; if that is too short, it is not counted."""
        run = self.run(workload)
        failed = set[int]()
        for base, point in self._points(run, first, tally):
            if time.time() > until:
                return
            if point.call in failed:
                continue
            tally.points += 1
            found = self._point(run, base, point, tally)
            if found:
                failed.add(point.call)
                tally.found.append(found)
        tally.workloads += 1

    def run(self, workload: Workload) -> Run:
        """Run it to the end, recording."""
        medium = RecordingPmem(len(self.base_image))
        medium.put(self.base_image)
        volume = Volume.open(medium, now=calls.START, boot_id=calls.BOOT)
        world = self._begin(volume)
        states, pins, boots, starts = [state.state_of(world.volume)], [_pins(world.volume)], [world.boot], []
        for index, name in enumerate(workload):
            starts.append(len(medium.log))
            perform(world, self.alphabet[name])
            medium.returned(index)
            states.append(state.state_of(world.volume))
            pins.append(_pins(world.volume))
            boots.append(world.boot)
        return Run(workload, medium.log, states, pins, boots, starts)

    def _points(self, run: Run, first: int, tally: Tally) -> Iterator[tuple[Tracker, Crash]]:
        """The crash points of the calls from `first` on, each with what is durable there."""
        base = tracker(self.options.domain, self.base_image, self._digest)
        call = 0
        begin = run.starts[first] if first < len(run.starts) else len(run.log)
        for at, event in enumerate(run.log):
            if at >= begin and isinstance(event, Fence | Return):
                yield base, Crash(call, at, isinstance(event, Return), {})
            if not base.feed(event) and at >= begin and self.options.domain == "adr":
                tally.redundant[run.workload[call], "flush" if isinstance(event, Flush) else "fence"] += 1
            if isinstance(event, Return):
                call = event.call + 1

    def still(self, found: Found, choice: Choice) -> str:
        """What is wrong with another choice of lines at the point of a violation; nothing is taken from earlier images."""
        run = self.run(found.workload)
        self._known.clear()
        self._courses.clear()
        for base, point in self._points(run, found.crash.call, Tally()):
            if point.event == found.crash.event:
                crash = Crash(point.call, point.event, point.at_return, choice)
                verdict = self._verdict(base, crash, digest_with(base, choice), Tally())
                return verdict.problem or self._why(run, point, verdict)
        raise ValueError(f"no crash point {found.crash.event} in {'+'.join(found.workload)}")

    def _point(self, run: Run, base: Tracker, point: Crash, tally: Tally) -> Found | None:
        """All images of a point. Which lines matter is learnt from those that are recovered first: lines that a later one
        reads, and no earlier one did, are varied in another round."""
        rng = Random(f"{self.options.seed} {run.workload} {point.event}")
        tried: set[int] = set()
        seen = np.zeros(len(base.durable) // LINE, np.bool_)
        while True:
            pending = base.pending()
            varied = seen[pending].sum()
            for choice in base.images(seen, rng, self.options.limits):
                digest = digest_with(base, choice)
                if digest in tried:
                    continue
                tried.add(digest)
                crash = Crash(point.call, point.event, point.at_return, choice)
                verdict = self._verdict(base, crash, digest, tally)
                seen |= verdict.seen
                why = verdict.problem or self._why(run, point, verdict)
                if why:
                    return Found(run.workload, crash, why)
            if seen[pending].sum() == varied:
                break
        why = self._daemon_dies(run, base, point)
        if why:
            return Found(run.workload, Crash(point.call, point.event, point.at_return, base.latest(), True), why)
        return None

    def _daemon_dies(self, run: Run, base: Tracker, point: Crash) -> str:
        """The same boot of the host finds all stores, and the pins of holders that live on."""
        self._judge.put(base, base.latest())
        try:
            volume = Volume.open(self._judge.medium, now=AFTER, boot_id=run.boots[point.call + 1])
            volume.check()
            found, pins = state.state_of(volume), _pins(volume)
        except Exception as e:
            return f"the daemon dies: {_told(e)}"
        before, after = run.pins[point.call : point.call + 2]
        if pins != after and (point.at_return or not before & after <= pins <= before | after):
            return f"the daemon dies: pins {sorted(before & after)} become {sorted(pins)}"
        why = self._why(run, point, Verdict(found, "", self._judge.medium.seen))
        return f"the daemon dies: {why}" if why else ""

    def _why(self, run: Run, point: Crash, verdict: Verdict) -> str:
        """What is wrong with the state, if anything is."""
        assert verdict.state is not None
        before, after = run.states[point.call : point.call + 2]
        call = self.alphabet[run.workload[point.call]]
        return state.explains(verdict.state, before, after, call, returned=point.at_return) or ""

    def _verdict(self, base: Tracker, crash: Crash, digest: int, tally: Tally) -> Verdict:
        known = self._known.get((digest, _BOOTS[0]))
        if known is not None:
            return known
        verdict, log = self._recover(base, crash.choice, digest, 0, tally)
        if not verdict.problem:
            problem = self._crash_recovery(base, crash, digest, log, verdict, tally)
            if problem:
                verdict = Verdict(verdict.state, problem, verdict.seen)
                self._known[digest, _BOOTS[0]] = verdict
        return verdict

    def _recover(self, base: Tracker, choice: Choice, digest: int, boot: int, tally: Tally) -> tuple[Verdict, list[Event]]:
        judge = self._judge
        shared = judge.soundness.shared
        verdict, log = judge.judge(base, choice, _BOOTS[boot])
        tally.images += 1
        tally.shared += judge.soundness.shared - shared
        tally.digests.add(digest)
        if len(self._known) >= _KNOWN_MAX or judge.states.done >= _STATES_MAX:
            self._known.clear()
            judge.forget()
        self._known[digest, _BOOTS[boot]] = verdict
        return verdict, log

    def _crash_recovery(self, base: Tracker, crash: Crash, digest: int, log: Sequence[Event], wanted: Verdict,
                        tally: Tally) -> str:  # fmt: skip
        """Crash a recovery at each of its fences and at its end: every image must recover to the same state."""
        course = _course(log)
        if course in self._courses:
            return ""
        self._courses.add(course)
        tally.recoveries += 1
        self._judge.put(base, crash.choice)
        error = _errors(fsck.check(self._judge.medium))
        if error:
            return f"fsck before the mount: {error}"
        image = bytearray(base.durable)
        for line, content in crash.choice.items():
            image[line * LINE : (line + 1) * LINE] = content
        inner = tracker(self.options.domain, image, digest)
        rng = Random(f"{self.options.seed} {course}")
        fences = 0
        for event in [*log, Return(0)]:
            if isinstance(event, Fence | Return):
                fences += 1
                for choice in inner.images(wanted.seen, rng, self.options.inner):
                    inner_digest = digest_with(inner, choice)
                    verdict = self._known.get((inner_digest, _BOOTS[1]))
                    if verdict is None:
                        verdict, _ = self._recover(inner, choice, inner_digest, 1, tally)
                    why = verdict.problem
                    if not why and verdict.state != wanted.state:
                        why = "other files than recovery finds without that crash"
                    if why:
                        left = Places(image).names(choice)
                        return f"recovery crashes before its fence {fences}, leaving {left}; after that: {why}"
            inner.feed(event)
        return ""
