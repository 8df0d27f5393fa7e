"""A scenario: who pins, what is called, what must be seen under each policy. And the `Lab` that it runs in.

Most scenarios are a `case`: pins, one `Call` and a table of what must be seen; all of them take the same course
(`course.py`). The others are a `story`: the same facts in words, and a function that plays it. Each runs in a directory
of its own with real processes and system calls, and ends with the invariants (`Lab.finish`): pins given back, no busy
block left, free + used + busy as many as ever, and the bytes of every file that nobody was told to change unchanged.

A person's own scenarios are a Python file that does the same as the modules of `catalogue/`: see `daxfs scenario run
--file`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

from daxfs import abi, client
from daxfs.core.policy import POLICIES
from daxfs.lab import acts
from daxfs.lab.place import SIZE, Place
from daxfs.lab.processes import CALL_S, Died, Pending, Process, Unseen, Zygote, errno_name, eventually

P = ParamSpec("P")
T = TypeVar("T")

BLOCK = 4096
EVERY = tuple(POLICIES)
SAFE = tuple(name for name in POLICIES if name != "unsafe")
STILL_S = 0.08  # how long a call must not return to count as waiting
SPACE_MAX = 1 << 30  # bytes that a scenario takes on somebody's mount

FEW = 3  # blocks that a file can have anywhere without a block for its extents
REST = 320  # blocks, more than the allocator keeps for metadata

Range = tuple[int, int]


class NotApplicable(Exception):
    """The scenario makes no sense here: why, in one line."""


@dataclass(frozen=True)
class Scenario:
    """A declaration. `sees`: policy -> what must be seen; under a policy that is not in it the scenario does not apply.
    `options` are mount options that it needs. Who pins and what is called are words for people."""

    name: str
    title: str
    source: str
    pins: str
    call: str
    sees: Mapping[str, str]
    play: Callable[[Lab], None] = field(repr=False)
    options: Mapping[str, str] = field(default_factory=dict)
    size: int = SIZE  # bytes of the temporary volume that it needs
    own_mount: bool = False  # it unmounts, kills or removes: only on a temporary image, which nobody else uses then

    def check(self) -> None:
        unknown = set(self.sees) - set(POLICIES)
        if unknown or not (self.name and self.title and self.source and self.call):
            raise ValueError(f"scenario {self.name!r}: incomplete, or unknown policies {sorted(unknown)}")


SCENARIOS: dict[str, Scenario] = {}


def register(scenario: Scenario) -> Scenario:
    scenario.check()
    if scenario.name in SCENARIOS:
        raise ValueError(f"there are two scenarios {scenario.name!r}")
    SCENARIOS[scenario.name] = scenario
    return scenario


def everywhere(text: str, policies: tuple[str, ...] = EVERY) -> dict[str, str]:
    """The same is seen under all these policies."""
    return dict.fromkeys(policies, text)


def story(
    name: str, title: str, *, source: str, pins: str, call: str, sees: str | Mapping[str, str],
    options: Mapping[str, str] | None = None, size: int = SIZE, own_mount: bool = False,
) -> Callable[[Callable[[Lab], None]], Scenario]:  # fmt: skip
    """Declare a scenario that a function plays."""

    def declare(play: Callable[[Lab], None]) -> Scenario:
        table = everywhere(sees, SAFE) if isinstance(sees, str) else sees
        return register(Scenario(name, title, source, pins, call, table, play, options or {}, size, own_mount))

    return declare


def pattern(name: str, block: int) -> bytes:
    """The bytes of a block of a file: they name it."""
    word = f"<{name}:{block}>".encode()
    return (word * (BLOCK // len(word) + 1))[:BLOCK]


class Held:
    """A pin that is held."""

    def __init__(self, holder: Holder, held: acts.Held, first: int, count: int) -> None:
        self.holder = holder
        self.id = held.id
        self.runs = held.runs
        self.first = first
        self.count = count
        self.released = False

    @property
    def in_order(self) -> list[int]:
        """The blocks on the image, in file order."""
        return [block for start, count in self.runs for block in range(start, start + count)]

    @property
    def blocks(self) -> set[int]:
        return set(self.in_order)

    def view(self) -> bytes:
        """What the holder sees in its blocks."""
        return self.holder.do(acts.view, self.id)

    def dma(self, data: bytes, offset: int = 0) -> None:
        """The device writes."""
        self.holder.do(acts.dma, self.id, offset, data)

    def unpin(self, *, dirty: bool | None = None) -> None:
        self.holder.do(acts.unpin, self.id, dirty)
        self.released = True


class Holder:
    """A process with one open file."""

    def __init__(self, process: Process, path: str, mode: str) -> None:
        self.process = process
        self.path = path
        self.file = process.do(acts.open_file, path, mode)
        self.mode = mode
        self.do = process.do
        self.start = process.start
        self.errno_of = process.errno_of

    def pin(self, first: int = 0, count: int = 1, *, write: bool | None = None, flags: int | None = None) -> Held:
        """Pin blocks; a write pin if the file is open for writing. OSError."""
        write = self.mode != "r" if write is None else write
        flags = abi.FOLL_PIN | (abi.FOLL_WRITE if write else 0) if flags is None else flags
        held = self.process.do(acts.pin, self.file, first * BLOCK, count * BLOCK, flags)
        return Held(self, held, first, count)

    def start_pin(self, first: int, count: int = 1) -> Pending[acts.Held]:
        """Begin to pin (it may have to wait)."""
        return self.process.start(acts.pin, self.file, first * BLOCK, count * BLOCK, abi.FOLL_PIN | abi.FOLL_WRITE)

    def event(self, within_s: float = 2.0) -> acts.Event:
        """The next event of the description. Unseen if none comes."""
        found = self.process.do(acts.await_event, self.file, within_s)
        if found is None:
            raise Unseen(f"no event came to process {self.process.pid}")
        return found

    def no_event(self) -> None:
        found = self.process.do(acts.next_event, self.file)
        if found is not None:
            raise Unseen(f"process {self.process.pid} got {found}")


class Taken(NamedTuple):
    """A file that has taken free space, what it is full of, and which blocks it has that a pin covers."""

    path: str
    full_of: bytes
    lost: set[int]


class Lab:
    """One run of one scenario under one policy."""

    def __init__(self, place: Place, policy: str, zygote: Zygote, name: str, *, full: bool = False) -> None:
        self.place = place
        self.full = full  # as often as the catalogue says, however long that takes
        self.policy = policy
        self.settings = place.settings
        self.errno = 0  # what the call of the scenario gave
        self.log: list[str] = []  # what a person should see besides the outcome
        self._mounted = True
        self._zygote = zygote
        self._processes: list[Process] = []
        self._kept: dict[str, bytes] = {}  # files that must not change
        self.clerk = self.process()  # looks and prepares
        self.directory = f"{place.path}/.lab-{os.getpid()}-{name}-{policy}"
        self.clerk.do(os.mkdir, self.directory)
        self._before = self.info()
        self.keep(self.file("W", blocks=16, policy=False))

    # -- who --

    def process(self) -> Process:
        made = self._zygote.process()
        self._processes.append(made)
        return made

    def adopt(self, pid: int) -> Process:
        """A process that another one has made; it is killed with the others."""
        from multiprocessing.connection import Pipe

        made = Process(pid, Pipe()[0])
        self._processes.append(made)
        return made

    def holder(self, path: str, mode: str = "r+") -> Holder:
        """A new process that has the file open."""
        return Holder(self.process(), path, mode)

    # -- files --

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def file(self, name: str = "A", blocks: int = 8, *, policy: bool = True) -> str:
        """A file of distinct blocks; its path."""
        path = self.path(name)
        own = self.policy if policy and self.policy != self.place.policy else ""
        self.clerk.do(acts.create, path, b"".join(pattern(name, n) for n in range(blocks)), own)
        return path

    def set_policy(self, path: str) -> None:
        """The policy of this run for a file that `file` has not made."""
        if self.policy != self.place.policy:
            self.clerk.do(os.setxattr, path, "user.daxfs.policy", self.policy.encode())

    def keep(self, path: str) -> None:
        """From now on no byte of this file may change."""
        self._kept[path] = self.read(path)

    def release(self, path: str) -> None:
        """It may change again."""
        del self._kept[path]

    def read(self, path: str) -> bytes:
        return self.clerk.do(acts.read, path)

    def status(self, path: str) -> acts.Status:
        return self.clerk.do(acts.status, path)

    def exists(self, path: str) -> bool:
        return self.clerk.do(os.path.exists, path)

    def blocks(self, path: str) -> set[int]:
        """The blocks of a file on the image."""
        return {block for start, count in self.clerk.do(acts.blocks_of, path) for block in range(start, start + count)}

    def take_all(self, *pins: Held, write: bool = False) -> Taken:
        """Somebody takes every free block: does he get some that these pins cover? `write`: he fills his file with a
        pattern."""
        wanted = set().union(*(pin.blocks for pin in pins))
        file, rest = self.path("B"), self.path("B-rest")
        block = (b"<new owner>" * BLOCK)[:BLOCK]
        self.clerk.do(acts.take_space, file, self._space())
        lost = self.blocks(file) & wanted
        for count in FEW, REST:
            if not lost:
                if self.exists(rest):
                    self.clerk.do(os.unlink, rest)
                self.clerk.do(acts.take_rest, file, rest, count)
                lost = self.blocks(rest) & wanted
        if write:
            self.clerk.start(acts.overwrite, rest if lost and self.exists(rest) else file, block).result(60)
        return Taken(rest if lost and self.exists(rest) else file, block, lost)

    def not_reused(self, *pins: Held) -> None:
        """Whoever takes all free space gets none of these blocks."""
        self.equal(self.take_all(*pins).lost, set(), "pinned blocks that were given away")
        for name in ("B", "B-rest"):
            self.clerk.do(os.unlink, self.path(name))

    def fill(self, name: str = "B", word: bytes = b"<new owner>") -> str:
        """write(2) a file until ENOSPC; its path."""
        block = (word * BLOCK)[:BLOCK]
        self.clerk.start(acts.fill, self.path(name), block, self._space()).result(60)
        return self.path(name)

    def can_fill(self) -> bool:
        """Whether `fill` takes all space there is."""
        return self._space() == int(self.info()["free"]) * BLOCK

    def _space(self) -> int:
        free = int(self.info()["free"]) * BLOCK
        return free if self.place.own else min(free, SPACE_MAX)

    # -- looking --

    def info(self) -> dict[str, Any]:
        return self.clerk.do(client.info, self.place.path)

    def pins(self) -> list[dict[str, Any]]:
        """Pins on files of this run."""
        return [pin for pin in self.clerk.do(client.pins, self.place.path) if self.directory in pin["path"]]

    def busy(self) -> int:
        """Busy blocks, besides those that were busy before."""
        return int(self.info()["busy"]) - int(self._before["busy"])

    def busy_blocks(self) -> set[int]:
        found = self.clerk.do(client.busy, self.place.path)
        return {block for b in found for block in range(b["start"], b["start"] + b["count"])}

    # -- what must be seen --

    def see(self, condition: object, what: str) -> None:
        """Unseen, with these words, if the condition does not hold."""
        if not condition:
            raise Unseen(what)

    def equal(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            raise Unseen(f"{what}: {_short(found)} instead of {_short(wanted)}")

    def bytes_equal(self, found: bytes, wanted: bytes, what: str) -> None:
        if found != wanted:
            raise Unseen(f"{what}: {_difference(found, wanted)}")

    def waits(self, pending: Pending[Any]) -> None:
        """It does not return."""
        if pending.done(STILL_S):
            try:
                gave = repr(pending.result())
            except OSError as problem:
                gave = errno_name(problem.errno)
            raise Unseen(f"{pending.what} did not wait: it gave {gave}")

    def returns(self, pending: Pending[T], within_s: float = CALL_S) -> T:
        """It returns, and succeeds."""
        try:
            return pending.result(within_s)
        except OSError as problem:
            self.errno = problem.errno or 0
            raise Unseen(f"{pending.what} failed with {errno_name(problem.errno)}") from None

    def fails(self, code: int, pending: Pending[Any], within_s: float = CALL_S) -> None:
        """It returns with this errno."""
        try:
            value = pending.result(within_s)
        except OSError as problem:
            self.errno = problem.errno or 0
            if problem.errno != code:
                found = errno_name(problem.errno)
                raise Unseen(f"{pending.what} failed with {found}, not with {errno_name(code)}") from None
            return
        raise Unseen(f"{pending.what} gave {_short(value)} instead of {errno_name(code)}")

    def refuses(
        self, code: int, who: Process | Holder, function: Callable[P, object], *args: P.args, **kw: P.kwargs
    ) -> None:
        """A call fails with this errno at once."""
        self.fails(code, who.start(function, *args, **kw))

    @contextmanager
    def refused(self, code: int) -> Iterator[None]:
        """What is called inside fails with this errno."""
        try:
            yield
        except OSError as problem:
            self.errno = problem.errno or 0
            if problem.errno != code:
                raise Unseen(f"{errno_name(problem.errno)} instead of {errno_name(code)}: {problem}") from None
            return
        raise Unseen(f"no error, where {errno_name(code)} was expected")

    def needs(self, condition: object, why: str) -> None:
        """NotApplicable, if the condition does not hold."""
        if not condition:
            raise NotApplicable(why)

    def skip(self, why: str) -> NoReturn:
        raise NotApplicable(why)

    def say(self, line: str) -> None:
        """For the person who watches."""
        self.log.append(line)

    # -- the end --

    def mount_is_gone(self) -> None:
        """The scenario has taken its mount down: end everybody; there is nothing left to look at."""
        self._mounted = False
        for process in self._processes:
            process.kill()

    def finish(self) -> None:
        """The invariants: see the module."""
        for process in self._processes:
            if process is not self.clerk:
                process.kill()
        for process in self._processes[1:]:
            eventually(f"process {process.pid} is gone", lambda: process.gone)  # noqa: B023
        if not self._mounted:
            return
        eventually("all pins of the run are released", lambda: not self.pins())
        eventually("no block of the run is busy", lambda: self.busy() <= 0)
        for path, content in self._kept.items():
            self.bytes_equal(self.read(path), content, f"{os.path.basename(path)}, which nobody was told to change")
        self.identity()
        self.clerk.do(acts.remove_tree, self.directory)
        eventually("the removed files give their blocks back", lambda: self.busy() <= 0)

    def identity(self) -> None:
        """free + used + busy = total, and df says the same."""
        total, free = self.clerk.do(acts.statfs, self.place.path)  # first: more may become free meanwhile
        info = self.info()
        self.equal(info["free"] + info["used"] + info["busy"], info["blocks"], "free + used + busy")
        self.see(not info["failed"], f"the volume has turned read-only: {info['failed']}")
        if self.place.own:
            self.see(free <= info["free"] and total <= info["blocks"], "df shows more than there is")

    def abandon(self) -> bool:
        """After a failure: end everybody and take the files away. Whether the mount is as good as before."""
        self.end()
        self.clerk = self.process()
        try:
            eventually("all pins of the run are released", lambda: not self.pins())
            self.clerk.do(acts.remove_tree, self.directory)
            eventually("no block of the run is busy", lambda: self.busy() <= 0)
            return not self.info()["failed"]
        except (OSError, Unseen, Died, RuntimeError):
            return False
        finally:
            self.end()

    def end(self) -> None:
        """End everybody."""
        for process in self._processes:
            process.end()
        self._processes = []


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else text[:97] + "..."


def _difference(found: bytes, wanted: bytes) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} bytes instead of {len(wanted)}"
    at = next(n for n, (x, y) in enumerate(zip(found, wanted, strict=True)) if x != y)
    return f"byte {at} (block {at // BLOCK}): {found[at : at + 16]!r} instead of {wanted[at : at + 16]!r}"
