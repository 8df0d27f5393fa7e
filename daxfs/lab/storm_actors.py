"""The parts of the storm: what each process does at random, and what it knows about its bytes.

A block of data is a stamp of 32 bytes, again and again: who wrote it, where, and which version. So a foreign block says
whose it is. Holders work in files of `arena/`, which others truncate, punch, rename and unlink; each has block numbers
of its own there, so nobody else writes what it holds. They reach their blocks through a mapping of the whole image, as
a device does: nobody checks what they write. Writers and the filler have files in `own/` that nobody else touches.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from daxfs import abi, client
from daxfs.client import calls
from daxfs.lab import acts

BLOCK = 4096
STAMP = 32
ZEROS = bytes(BLOCK)
FILES = 6  # in the arena
REGION = 12  # blocks of each arena file that one holder uses
HOLDERS = 3
ARENA_BLOCKS = REGION * HOLDERS
PINS_MAX = 24
REFUSALS = {errno.ENXIO, errno.EFAULT, errno.ENOSPC, errno.EAGAIN, errno.ETXTBSY, errno.ENOENT, errno.EBUSY}


class Part(NamedTuple):
    """Who plays: `slot` on the board; `steps` of all together."""

    role: str
    slot: int
    mount: str
    image: str
    board: str
    steps: int
    blocks: int
    seed: int


@dataclass
class Seen:
    """What an actor saw that must not be, and how often which call ended how."""

    violations: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


class Violation(Exception):
    """A byte is not what it must be."""


def play(part: Part) -> Seen:
    """Play a part until all have made their steps together, or somebody stops the run."""
    from daxfs.lab import storm_sharing
    from daxfs.lab.storm import Board

    board = Board(part.board)
    actor = (_PARTS | storm_sharing.PARTS)[part.role](part)
    made = 0
    try:
        while not board.stopped and (made % 8 or board.steps < part.steps):
            if made > actor.pace * board.holders_steps + 50:
                time.sleep(0.001)  # the holders have more to do in a step, and they matter
                made -= made % 8
                continue
            actor.step()
            made += 1
            board.set(part.slot, made)
        actor.finish()
    except Violation as found:
        actor.seen.violations.append(f"{part.role} {part.slot} at its step {made}: {found}")
        board.stop()
    return actor.seen


def stamp(words: str) -> bytes:
    """A block full of a stamp."""
    return words.encode().ljust(STAMP, b".")[:STAMP] * (BLOCK // STAMP)


class Actor:
    pace = 1.0  # steps, for each of a holder

    def __init__(self, part: Part) -> None:
        self.part = part
        self.random = random.Random(f"{part.seed}/{part.slot}")
        self.seen = Seen()
        self.version = 0

    def step(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Check all, give all back."""

    def attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Make a call that may be refused. Whether it succeeded."""
        try:
            call()
        except OSError as problem:
            if problem.errno not in REFUSALS:
                raise
            self.seen.calls[f"{name} {errno.errorcode[problem.errno or 0]}"] += 1
            return False
        self.seen.calls[name] += 1
        return True

    def arena(self) -> str:
        return f"{self.part.mount}/arena/F{self.random.randrange(FILES)}"


class Hold(Actor):
    """Pins ranges, writes by DMA, and knows what every block that it holds must have."""

    pace = 1e9

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        with open(part.image, "r+b") as image:
            self.medium = mmap.mmap(image.fileno(), 0)
        self.files: list[int] = []
        self.pins: dict[int, tuple[int, list[int], bool]] = {}  # id -> (file, blocks, on demand)
        self.holds: Counter[int] = Counter()  # pins per block
        self.content: dict[int, bytes] = {}  # of blocks that are held
        self.me = f"<holder {part.slot} v".encode()

    def step(self) -> None:
        self.hear()
        if len(self.files) < 4:
            self.open()
            return
        move = self.random.random()
        if move < 0.4 and len(self.pins) < PINS_MAX:
            self.pin()
        elif move < 0.75 and self.pins:
            self.dma()
        elif move < 0.97 and self.pins:
            self.unpin(self.random.choice(list(self.pins)))
        elif move >= 0.97:
            self.close(self.random.choice(self.files))

    def finish(self) -> None:
        for file in list(self.files):
            self.close(file)

    def open(self) -> None:
        def call() -> None:
            self.files.append(os.open(self.arena(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

        self.attempt("open", call)

    def close(self, file: int) -> None:
        """The last close releases the pins of the description."""
        for pin, (of, blocks, _) in list(self.pins.items()):
            if of == file:
                self.look(blocks)
                self.forget(pin)
        os.close(file)
        self.files.remove(file)
        self.seen.calls["close"] += 1

    def pin(self) -> None:
        file = self.random.choice(self.files)
        first = self.part.slot * REGION + self.random.randrange(REGION)
        count = self.random.randint(1, (self.part.slot + 1) * REGION - first)
        on_demand = self.random.random() < 0.15
        flags = (abi.PIN_ON_DEMAND if on_demand else abi.FOLL_PIN) | abi.FOLL_WRITE | abi.PIN_NOWAIT
        got: list[int] = []

        def call() -> None:
            got.append(calls.pin(file, first * BLOCK, count * BLOCK, flags)[0])

        if not self.attempt("register" if on_demand else "pin", call):
            return
        blocks = [block for start, n in calls.pin_runs(file, got[0]) for block in range(start, start + n)]
        if len(blocks) != count:
            raise Violation(f"pin {got[0]} of {count} blocks has {len(blocks)}")
        self.pins[got[0]] = file, blocks, on_demand
        for block in blocks:
            self.holds[block] += 1
            if block not in self.content:
                self.content[block] = self.fresh(block)
        self.look(blocks)

    def fresh(self, block: int) -> bytes:
        """What a block has when it is pinned: zeros, or what this holder wrote there before."""
        found = self.medium[block * BLOCK : block * BLOCK + BLOCK]
        if found != ZEROS and not (found.startswith(self.me) and found == found[:STAMP] * (BLOCK // STAMP)):
            raise Violation(f"block {block} was pinned for {self.me!r} and has {_odd(found, ZEROS)}")
        return found

    def look(self, blocks: list[int]) -> None:
        for block in blocks:
            found = self.medium[block * BLOCK : block * BLOCK + BLOCK]
            if found != self.content[block]:
                wrote = self.content[block][:STAMP]
                raise Violation(f"pinned block {block} had {wrote!r} of its holder, now {_odd(found, self.content[block])}")

    def dma(self) -> None:
        _, blocks, _ = self.pins[self.random.choice(list(self.pins))]
        self.look(blocks)
        for block in self.random.sample(blocks, min(len(blocks), 4)):
            self.version += 1
            data = stamp(f"{self.me.decode()}{self.version} b{block}>")
            self.medium[block * BLOCK : block * BLOCK + BLOCK] = data
            self.content[block] = data
        self.seen.calls["dma"] += 1

    def unpin(self, pin: int) -> None:
        file, blocks, _ = self.pins[pin]
        self.look(blocks)
        calls.unpin(file, pin, dirty=self.random.random() < 0.5)
        self.seen.calls["unpin"] += 1
        self.forget(pin)

    def forget(self, pin: int) -> None:
        for block in self.pins.pop(pin)[1]:
            self.holds[block] -= 1
            if not self.holds[block]:
                del self.holds[block], self.content[block]

    def hear(self) -> None:
        """Obey events: most of the time at once, sometimes late."""
        if self.random.random() < 0.05:
            return
        for file in self.files:
            while (event := acts.next_event(file)) is not None:
                self.seen.calls[f"event {event.type}"] += 1
                if event.pin not in self.pins:
                    continue  # given back before it was told
                self.look(self.pins[event.pin][1])
                if event.type == abi.EVENT_INVALIDATE:
                    acts.acknowledge(file, event.pin)
                    self.forget(event.pin)
                    self.let_go(file, event.pin)
                else:
                    self.unpin(event.pin)

    def let_go(self, file: int, pin: int) -> None:
        """The registration is invalid, but still there (if it was fenced meanwhile, the acknowledgement ended it)."""
        self.attempt("unregister", lambda: calls.unpin(file, pin, dirty=False))


class Shape(Actor):
    """Changes the layout of the arena's files, under the feet of the holders."""

    pace = 0.7

    def step(self) -> None:
        path, size = self.arena(), self.random.randint(0, ARENA_BLOCKS) * BLOCK
        move = self.random.random()
        if move < 0.35:
            self.attempt("grow", lambda: grow(path))
        elif move < 0.6:
            self.attempt("truncate", lambda: acts.truncate(path, size))
        elif move < 0.94:
            length = self.random.randint(1, 16) * BLOCK
            self.attempt("punch", lambda: acts.punch(path, size, length))
        elif move < 0.97:
            self.attempt("open O_TRUNC", lambda: acts.open_truncating(path))
        elif move < 0.985:
            self.attempt("rename", lambda: os.rename(path, self.arena()))
        else:
            self.attempt("unlink", lambda: os.unlink(path))


def grow(path: str, blocks: int = ARENA_BLOCKS) -> None:
    """Make the file if it is not there, and give it its full size."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, blocks * BLOCK)
    finally:
        os.close(fd)


class Write(Actor):
    """Has files of its own, and knows all their bytes."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.files: dict[str, dict[int, bytes]] = {}  # name -> block number -> content; others are holes
        self.sizes: dict[str, int] = {}  # in blocks
        self.directory = f"{part.mount}/own/{part.slot}"
        os.mkdir(self.directory)

    def step(self) -> None:
        name = f"O{self.random.randrange(8)}"
        path = f"{self.directory}/{name}"
        move = self.random.random()
        if name not in self.files:
            self.create(name, path)
        elif move < 0.4:
            self.write(name, path)
        elif move < 0.75:
            self.verify(name, path)
        elif move < 0.85:
            self.truncate(name, path)
        elif move < 0.95:
            self.punch(name, path)
        else:
            os.unlink(path)
            self.seen.calls["own unlink"] += 1
            del self.files[name], self.sizes[name]

    def finish(self) -> None:
        for name in list(self.files):
            self.verify(name, f"{self.directory}/{name}")
            os.unlink(f"{self.directory}/{name}")

    def create(self, name: str, path: str) -> None:
        def call() -> None:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

        if self.attempt("own create", call):
            self.files[name], self.sizes[name] = {}, 0

    def write(self, name: str, path: str) -> None:
        first, count = self.random.randrange(48), self.random.randint(1, 16)
        self.version += 1
        blocks = [stamp(f"<writer {self.part.slot} {name} b{first + n} v{self.version}>") for n in range(count)]
        done = [0]

        def call() -> None:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                done[0] = os.pwrite(fd, b"".join(blocks), first * BLOCK)
            finally:
                os.close(fd)

        self.attempt("own write", call)
        whole = done[0] // BLOCK
        self.files[name].update({first + n: blocks[n] for n in range(whole)})
        if whole:
            self.sizes[name] = max(self.sizes[name], first + whole)

    def truncate(self, name: str, path: str) -> None:
        size = self.random.randrange(64)
        if self.attempt("own truncate", lambda: acts.truncate(path, size * BLOCK)):
            self.sizes[name] = size
            self.files[name] = {n: data for n, data in self.files[name].items() if n < size}

    def punch(self, name: str, path: str) -> None:
        first, count = self.random.randrange(48), self.random.randint(1, 16)
        if self.attempt("own punch", lambda: acts.punch(path, first * BLOCK, count * BLOCK)):
            self.files[name] = {n: data for n, data in self.files[name].items() if not first <= n < first + count}

    def verify(self, name: str, path: str) -> None:
        found = acts.read(path)
        self.seen.calls["own read"] += 1
        if len(found) != self.sizes[name] * BLOCK:
            raise Violation(f"{name} has {len(found)} bytes, {self.sizes[name] * BLOCK} were written")
        for n in range(self.sizes[name]):
            wanted = self.files[name].get(n, ZEROS)
            if found[n * BLOCK : n * BLOCK + BLOCK] != wanted:
                odd = _odd(found[n * BLOCK : n * BLOCK + BLOCK], wanted)
                raise Violation(f"block {n} of file {name} was written as {wanted[:STAMP]!r}, now {odd}")


class Fill(Actor):
    """Takes every free block, looks whether it keeps its bytes, and gives back."""

    PIECE = 32

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.path = f"{part.mount}/own/filler"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.blocks = 0
        self.full = 0

    def step(self) -> None:
        if self.full > 3 and self.random.random() < 0.02:
            self.verify(0, self.blocks)
            os.ftruncate(self.fd, 0)
            self.blocks = self.full = 0
            self.seen.calls["fill again"] += 1
        elif self.full > 3 or (self.blocks and self.random.random() < 0.3):
            first = self.random.randrange(self.blocks) if self.blocks else 0
            self.verify(first, min(self.blocks, first + self.PIECE))
            self.full += self.full and self.random.random() < 0.1
            if self.full:
                time.sleep(0.001)
                self.more()
        else:
            self.more()

    def more(self) -> None:
        data = b"".join(stamp(f"<filler b{self.blocks + n}>") for n in range(self.PIECE))

        def call() -> None:
            self.blocks += os.pwrite(self.fd, data, self.blocks * BLOCK) // BLOCK

        if not self.attempt("fill", call):
            self.full += 1

    def verify(self, first: int, end: int) -> None:
        while first < end:
            count = min(self.PIECE, end - first)
            found = os.pread(self.fd, count * BLOCK, first * BLOCK)
            self.seen.calls["fill read"] += 1
            for n in range(count):
                wanted = stamp(f"<filler b{first + n}>")
                if found[n * BLOCK : n * BLOCK + BLOCK] != wanted:
                    odd = _odd(found[n * BLOCK : n * BLOCK + BLOCK], wanted)
                    raise Violation(f"block {first + n} of the filler was written as {wanted[:STAMP]!r}, now {odd}")
            first += count

    def finish(self) -> None:
        self.verify(0, self.blocks)
        os.close(self.fd)
        os.unlink(self.path)


class Audit(Actor):
    """Looks at the sums."""

    busy_max = 0

    def finish(self) -> None:
        self.seen.calls["busy blocks at most"] = self.busy_max

    def step(self) -> None:
        time.sleep(0.02)
        info = client.info(self.part.mount)
        self.seen.calls["audit"] += 1
        self.busy_max = max(self.busy_max, info["busy"])
        total = info["free"] + info["used"] + info["busy"]
        if total != self.part.blocks:
            raise Violation(
                f"free {info['free']} + used {info['used']} + busy {info['busy']} = {total}, not {self.part.blocks}"
            )
        if info["failed"]:
            raise Violation(f"the volume has turned read-only: {info['failed']}")


def _odd(found: bytes, wanted: bytes) -> str:
    """What a block has, from where it is not as it should be."""
    at = next((n for n, (x, y) in enumerate(zip(found, wanted, strict=False)) if x != y), len(found)) // STAMP * STAMP
    return repr(found[at : at + STAMP])


_PARTS: dict[str, type[Actor]] = {"hold": Hold, "shape": Shape, "write": Write, "fill": Fill, "audit": Audit}
