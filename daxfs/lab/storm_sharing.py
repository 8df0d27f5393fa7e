"""The storm's shared pages: a device, two processes with mappings of the mount, and a shaper, all in the same blocks.

Each has stripes of its own in every block (storm_stripes.py), and knows what must be there.

Files of `shared/`, all of `BLOCKS` blocks:
- `watched`: pinned for writing by the device from first to last. Mappers only store and look: what they stored must be in
  the block, and what the device wrote in their mapping, within `BOUND_S`, although nobody asks for it.
- `written`: pinned likewise. Mappers store, write(2), read(2), msync, unmap, fork and end. Every stripe has at any time what
  its owner last stored there.
- `kept-*`: the same, but for write(2), and pinned now and then. Without a pin a write(2) that meets another one's store into
  the same page may be lost: it goes past the kernel's page, which is written back as a whole.
- `shaped-*`: the shaper truncates, punches, zeroes and replaces them. What was stored there may have become zero, but only
  if the layout changed since the store; the shaper counts its changes on the board.

A store beyond the end of a file is a SIGBUS: children store in `shaped-*`, and may die of it. A store over a hole is lost
when the volume is full at write-back, as the kernel asks nobody before: the block is allocated first.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from daxfs import abi, client
from daxfs.client import PinError
from daxfs.lab import acts
from daxfs.lab.storm_actors import BLOCK, Actor, Part, Violation, grow
from daxfs.lab.storm_stripes import CHANGED, DEVICE, MAPPERS, STRIPES, UNKNOWN, Known, difference, is_of

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS = 4
BOUND_S = 8.0
WATCHED, WRITTEN = HELD = "watched", "written"
KEPT, SHAPED = (WRITTEN, "kept-1", "kept-2"), ("shaped-1", "shaped-2")
FILES = (WATCHED, *KEPT, *SHAPED)
PINS_MAX = 12


class Sharer(Actor):
    """What the device and the mappers have in common."""

    owner = DEVICE

    def __init__(self, part: Part) -> None:
        from daxfs.lab.storm import Board

        super().__init__(part)
        self.board = Board(part.board)
        with open(part.image, "r+b") as image:
            self.medium = mmap.mmap(image.fileno(), 0)

    def path(self, name: str) -> str:
        return f"{self.part.mount}/shared/{name}"

    def changes(self, name: str) -> int:
        return self.board.changes(FILES.index(name)) if name in SHAPED else 0

    def choose(self) -> list[int]:
        """Some stripes of a block."""
        return self.random.sample(range(len(STRIPES[self.owner])), self.random.randint(1, 4))

    def block(self, number: int) -> bytes:
        """A block of the image."""
        return self.medium[number * BLOCK : number * BLOCK + BLOCK]

    def compare(self, name: str, known: Known, look: Callable[[], bytes], where: str) -> None:
        """Look at a block, and hold it against what is known."""
        before = self.changes(name)
        found = look()
        known.check(found, before if not before % 2 and self.changes(name) == before else UNKNOWN, where)

    def settle(self, name: str, known: Known, before: int, stripes: list[int]) -> None:
        """These stripes have been stored, since `before`."""
        since = before if not before % 2 and self.changes(name) == before else CHANGED
        for n in stripes:
            known.made(n, since)

    def child(self, act: Callable[[], None], end: str) -> bool:
        """Fork a child that acts and ends: by `_exit`, by a `signal`, or by `unwinding`. Whether it could act."""
        pid = os.fork()
        if pid:
            status = os.waitpid(pid, 0)[1]
            self.seen.calls[f"child {end}"] += 1
            return not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL
        with _ends_here(end):
            act()
        os._exit(0)


@contextmanager
def _ends_here(end: str) -> Iterator[None]:
    """How a child ends when it has acted. `unwinding` goes up the whole stack of the actor and ends the interpreter."""
    try:
        yield
    except Exception:
        os._exit(1)
    if end == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "unwinding":
        raise SystemExit(0)


class Device(Sharer):
    """Pins, writes by DMA into its stripes, and must see them as it wrote them as long as the blocks are its own or the
    file's."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.files: list[tuple[str, client.File]] = []
        self.pins: dict[client.Pin, tuple[str, list[int]]] = {}
        self.known: dict[int, Known] = {}  # block on the image -> what it has
        self.held: dict[int, int] = {}  # how many pins have it
        self.kept: dict[int, str] = {}  # blocks of files with a layout that does not change
        for name in (WATCHED, *KEPT):
            for start, count in acts.blocks_of(self.path(name)):
                for block in range(start, start + count):
                    self.kept[block] = name
                    self.known[block] = Known(self.owner, 0)
        self.to_the_end = [client.open(self.path(name), "r+") for name in HELD]
        for name, file in zip(HELD, self.to_the_end, strict=True):
            self.grant(name, file.pin(0, BLOCKS * BLOCK, write=True))
        self.board.mark(part.slot)

    def step(self) -> None:
        self.hear()
        move = self.random.random()
        if len(self.files) < 3:
            self.open()
        elif move < 0.25 and len(self.pins) < PINS_MAX:
            self.pin()
        elif move < 0.7:
            self.dma()
        elif move < 0.8:
            block, name = self.random.choice(list(self.kept.items()))
            self.look(name, block)
        elif move < 0.96:
            self.unpin(self.random.choice(list(self.pins)))
        elif move < 0.98:
            self.close(*self.random.choice(self.files))
        elif move < 0.985:
            self.fork()

    def finish(self) -> None:
        for one in list(self.files):
            self.close(*one)
        mappers = [self.part.slot + owner for owner in MAPPERS]
        while not self.board.stopped and not all(map(self.board.marked, mappers)):
            time.sleep(0.001)  # what they do with `written` needs its pin
        for block, name in self.kept.items():
            self.look(name, block)
        for pin in list(self.pins):
            self.give_back(pin)
        for file in self.to_the_end:
            file.close()

    def open(self) -> None:
        name = self.random.choice((*KEPT, *SHAPED))

        def call() -> None:
            self.files.append((name, client.open(self.path(name), "r+")))

        self.attempt("device open", call)

    def close(self, name: str, file: client.File) -> None:
        for pin in [pin for pin in self.pins if pin.file is file]:
            self.look_at(pin)
            self.forget(pin)
        self.files.remove((name, file))
        self.attempt("device close", file.close)  # close(2) tells of others' stores that found no space

    def pin(self) -> None:
        name, file = self.random.choice(self.files)
        first = self.random.randrange(BLOCKS)
        count = self.random.randint(1, BLOCKS - first)
        take = file.register if self.random.random() < 0.15 else file.pin

        def call() -> None:
            self.grant(name, take(first * BLOCK, count * BLOCK, write=True, wait=False))

        self.attempt(f"device {take.__name__}", call)

    def grant(self, name: str, pin: client.Pin) -> None:
        blocks = [block for start, n in pin.runs for block in range(start, start + n)]
        self.pins[pin] = name, blocks
        for block in blocks:
            self.held[block] = self.held.get(block, 0) + 1
            self.known.setdefault(block, Known(self.owner))
        self.look_at(pin)
        if self.random.random() < 0.2:
            pin.map()

    def look_at(self, pin: client.Pin) -> None:
        name, blocks = self.pins[pin]
        for block in blocks:
            self.look(name, block)

    def look(self, name: str, block: int) -> None:
        self.compare(name, self.known[block], lambda: self.block(block), f"block {block} of {name} in the image")

    def dma(self) -> None:
        pin = self.random.choice(list(self.pins))
        name, blocks = self.pins[pin]
        block = self.random.choice(blocks)
        self.look(name, block)
        stripes, before = self.choose(), self.changes(name)
        for n in stripes:
            stripe = STRIPES[self.owner][n]
            self.medium[block * BLOCK + stripe.start : block * BLOCK + stripe.stop] = self.known[block].next(n)
        self.settle(name, self.known[block], before, stripes)
        self.seen.calls["device dma"] += 1

    def unpin(self, pin: client.Pin) -> None:
        if pin.file not in self.to_the_end:
            self.give_back(pin)

    def give_back(self, pin: client.Pin) -> None:
        self.look_at(pin)
        dirty = self.random.random() < 0.5
        self.forget(pin)
        try:
            pin.close(dirty=dirty)
        except PinError as problem:
            if problem.errno != errno.ENOENT:
                raise
            raise Violation(f"pin {pin.id} was this process's, and is gone: {problem}") from None
        self.seen.calls["device unpin dirty" if dirty else "device unpin"] += 1

    def forget(self, pin: client.Pin) -> None:
        for block in self.pins.pop(pin)[1]:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                if block not in self.kept:
                    del self.known[block]

    def hear(self) -> None:
        """Obey events, sometimes late."""
        if self.random.random() < 0.1:
            return
        for _, file in self.files:
            while (event := acts.next_event(file.fileno())) is not None:
                self.seen.calls[f"device event {event.type}"] += 1
                pin = next((pin for pin in self.pins if pin.file is file and pin.id == event.pin), None)
                if pin is None:
                    continue  # given back before it was told
                if event.type == abi.EVENT_INVALIDATE:
                    self.look_at(pin)
                    self.forget(pin)
                    pin.acknowledge()
                    self.attempt("device unregister", pin.close)
                else:
                    self.give_back(pin)

    def fork(self) -> None:
        """A child has copies of all, and ends; the pins are still this process's."""

        def leave() -> None:
            with ExitStack() as stack:
                for _, file in self.files:
                    stack.enter_context(file)
                for pin in self.pins:
                    stack.enter_context(pin)

        end = self.random.choice(("_exit", "signal", "unwinding"))
        self.child(leave if end == "unwinding" else lambda: None, end)
        for pin in self.pins:
            self.look_at(pin)


class File:
    """A file that a mapper has open and, but for a shaped one that is too short just now, mapped."""

    def __init__(self, name: str, path: str, owner: int, identity: int) -> None:
        self.name = name
        self.path = path
        self.identity = identity
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.known = [Known(owner, UNKNOWN if name in SHAPED else 0) for _ in range(BLOCKS)]
        self.mapping: mmap.mmap | None = None
        self.blocks: list[int] = []  # of one with a layout that does not change
        if name not in SHAPED:
            self.blocks = [block for start, n in acts.blocks_of(path) for block in range(start, start + n)]
            self.map()

    def map(self) -> mmap.mmap:
        if self.mapping is None:
            self.mapping = mmap.mmap(self.fd, BLOCKS * BLOCK)
            if self.name == WATCHED:
                self.mapping.madvise(mmap.MADV_DONTFORK)  # the end of a child with a mapping writes the file back
        return self.mapping

    def unmap(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None

    def reopen(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        self.unmap()
        os.close(self.fd)


class Map(Sharer):
    """Stores through MAP_SHARED mappings of the mount, also from children."""

    pace = 2.0

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.owner = int(part.role[-1])
        device = part.slot - self.owner
        while not self.board.stopped and not self.board.marked(device):
            time.sleep(0.001)  # until it has its pins
        self.files = {name: self.opened(name) for name in (WATCHED, *KEPT)}
        self.due: dict[tuple[int, int], float] = {}  # (block, stripe) of `watched`: when the block must have it
        self.stale: dict[tuple[int, int], tuple[bytes, float]] = {}  # (block, stripe of the device): what it must see, when
        self.moves: list[tuple[float, Callable[[], None]]] = [
            (0.35, self.store), (0.45, self.look_mapped), (0.53, self.look_read), (0.61, self.msync), (0.67, self.write),
            (0.72, self.remap), (0.75, self.fork), (0.81, self.watch_store), (0.88, self.watch),
            (0.92, self.shaped_store), (0.98, self.shaped_read), (1.0, self.drop_clean),
        ]  # fmt: skip

    def step(self) -> None:
        move = self.random.random()
        next(act for limit, act in self.moves if move < limit)()

    def finish(self) -> None:
        for name in KEPT:
            file = self.files[name]
            file.map().flush()
            for n in range(BLOCKS):
                self.look_everywhere(file, n)
        for file in self.files.values():
            self.attempt("mapper close", file.close)
        self.board.mark(self.part.slot)

    def opened(self, name: str) -> File:
        return File(name, self.path(name), self.owner, self.board.identity(FILES.index(name)))

    def any(self) -> tuple[File, int]:
        return self.files[self.random.choice(KEPT)], self.random.randrange(BLOCKS)

    # -- looking --

    def mapped(self, file: File, n: int) -> None:
        mapping = file.map()
        where = f"block {n} of {file.name} in its mapping"
        self.compare(file.name, file.known[n], lambda: mapping[n * BLOCK : n * BLOCK + BLOCK], where)

    def in_block(self, file: File, n: int) -> None:
        where = f"block {n} of {file.name} in the image"
        self.compare(file.name, file.known[n], lambda: self.block(file.blocks[n]), where)

    def by_read(self, file: File, n: int) -> None:
        def look() -> bytes:
            found = os.pread(file.fd, BLOCK, n * BLOCK)
            for owner in (DEVICE, *MAPPERS):
                for stripe in STRIPES[owner]:
                    if not is_of(owner, found[stripe]):
                        what = f"foreign bytes in a stripe of {owner}: {found[stripe]!r}"
                        raise Violation(f"block {n} of {file.name} by read(2): {what}")
            return found

        self.compare(file.name, file.known[n], look, f"block {n} of {file.name} by read(2)")

    def look_everywhere(self, file: File, n: int) -> None:
        self.mapped(file, n)
        self.by_read(file, n)
        self.in_block(file, n)  # read(2) has written the page back

    def look_mapped(self) -> None:
        self.mapped(*self.any())
        self.seen.calls["mapper look"] += 1

    def look_read(self) -> None:
        file, n = self.any()
        self.by_read(file, n)
        self.in_block(file, n)
        self.seen.calls["mapper read"] += 1

    # -- storing --

    def put(self, file: File, n: int, stripes: list[int]) -> None:
        mapping = file.map()
        for stripe in stripes:
            at = STRIPES[self.owner][stripe]
            mapping[n * BLOCK + at.start : n * BLOCK + at.stop] = file.known[n].next(stripe)

    def store(self) -> None:
        file, n = self.any()
        self.mapped(file, n)
        stripes = self.choose()
        self.put(file, n, stripes)
        self.settle(file.name, file.known[n], 0, stripes)
        self.seen.calls["mapper store"] += 1

    def write(self) -> None:
        """write(2) of one stripe, beside the mapping."""
        file, n = self.files[WRITTEN], self.random.randrange(BLOCKS)
        stripes = self.choose()[:1]
        os.pwrite(file.fd, file.known[n].next(stripes[0]), n * BLOCK + STRIPES[self.owner][stripes[0]].start)
        self.settle(file.name, file.known[n], 0, stripes)
        self.look_everywhere(file, n)
        self.seen.calls["mapper write"] += 1

    def msync(self) -> None:
        file, n = self.any()
        file.map().flush(n * BLOCK, BLOCK)
        self.in_block(file, n)
        self.by_read(file, n)
        self.seen.calls["mapper msync"] += 1

    def remap(self) -> None:
        """munmap, and mmap again; sometimes the descriptor is closed between."""
        file, n = self.any()
        file.unmap()
        if self.random.random() < 0.5:
            file.reopen()
        file.map()
        self.mapped(file, n)
        self.seen.calls["mapper munmap"] += 1

    def drop_clean(self) -> None:
        """The kernel forgets pages that are not dirty: they are filled again."""
        file, n = self.any()
        file.unmap()
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.mapped(file, n)
        self.seen.calls["mapper drop"] += 1

    def fork(self) -> None:
        """A child stores through the mapping that it shares with this process, and ends."""
        file, n = self.any()
        stripes = self.choose()
        self.child(lambda: self.put(file, n, stripes), self.random.choice(("_exit", "signal", "unwinding")))
        self.settle(file.name, file.known[n], 0, stripes)
        self.mapped(file, n)

    # -- the file where nobody asks for write-back --

    def watch_store(self) -> None:
        """Store where the last store was seen in the block."""
        file, n = self.files[WATCHED], self.random.randrange(BLOCKS)
        stripes = [stripe for stripe in self.choose() if (n, stripe) not in self.due]
        self.put(file, n, stripes)
        self.settle(WATCHED, file.known[n], 0, stripes)
        self.due |= dict.fromkeys(((n, stripe) for stripe in stripes), time.monotonic() + BOUND_S)
        self.seen.calls["mapper watched store"] += 1

    def watch(self) -> None:
        file, n, now = self.files[WATCHED], self.random.randrange(BLOCKS), time.monotonic()
        found = self.block(file.blocks[n])
        for block, stripe in [key for key in self.due if key[0] == n]:
            at = STRIPES[self.owner][stripe]
            if found[at] == file.known[n].bytes[at]:
                del self.due[block, stripe]
            elif now > self.due[block, stripe]:
                odd = difference(self.owner, at.start, found[at], file.known[n].bytes[at])
                raise Violation(f"block {n} of {WATCHED} in the image, {BOUND_S:g} s after the store: {odd}")
        self.mapped(file, n)
        self.watch_device(file, n, found, now)
        self.seen.calls["mapper watch"] += 1

    def watch_device(self, file: File, n: int, found: bytes, now: float) -> None:
        """What the block has had for so long must be in the mapping."""
        mine = file.map()[n * BLOCK : n * BLOCK + BLOCK]
        for stripe, at in enumerate(STRIPES[DEVICE]):
            if mine[at] == found[at]:
                self.stale.pop((n, stripe), None)
                continue
            wanted, until = self.stale.get((n, stripe), (b"", 0.0))
            if wanted != found[at]:
                self.stale[n, stripe] = found[at], now + BOUND_S
            elif now > until:
                odd = difference(DEVICE, at.start, mine[at], found[at])
                raise Violation(f"block {n} of {WATCHED} in a mapping, {BOUND_S:g} s after it was in the block: {odd}")

    # -- files whose layout changes --

    def shaped(self) -> tuple[File, int] | None:
        """One of them, open as what it is now; None if it has no name just now."""
        name = self.random.choice(SHAPED)
        file = self.files.get(name)
        if file is not None and file.identity != self.board.identity(FILES.index(name)):
            self.attempt("mapper close", file.close)  # it tells of stores that found no space
            del self.files[name]
            file = None
        if file is None:
            try:
                file = self.files[name] = self.opened(name)
            except FileNotFoundError:
                return None
        return file, self.random.randrange(BLOCKS)

    def shaped_store(self) -> None:
        """A child stores, and dies of it if the file ends before."""
        if (found := self.shaped()) is None:
            return
        file, n = found
        try:
            file.map()
        except ValueError:  # it is too short just now
            self.seen.calls["mapper shaped mmap refused"] += 1
            return
        stripes, before = self.choose(), self.changes(file.name)
        if not self.attempt("mapper allocate", lambda: acts.fallocate_open(file.fd, acts.KEEP_SIZE, n * BLOCK, BLOCK)):
            return
        if self.child(lambda: self.put(file, n, stripes), "_exit"):
            self.settle(file.name, file.known[n], before, stripes)
        else:
            self.seen.calls["mapper SIGBUS"] += 1
            for stripe in stripes:
                file.known[n].lost_count(stripe)
        self.seen.calls["mapper shaped store"] += 1

    def shaped_read(self) -> None:
        """read(2), which writes the page back first; that may fail for a store that met a punch."""
        if (found := self.shaped()) is None:
            return
        file, n = found
        if not self.attempt("mapper shaped read", lambda: self.by_read(file, n)):
            file.known[n].doubt()


class Reshape(Sharer):
    """Changes the layout of the shaped files, and counts it."""

    pace = 0.4

    def step(self) -> None:
        which = self.random.randrange(len(SHAPED))
        path, size = self.path(SHAPED[which]), self.random.randint(0, BLOCKS * BLOCK)
        if self.random.random() < 0.5:
            size -= size % BLOCK
        length = self.random.choice((self.random.randint(1, 2) * BLOCK, self.random.randint(1, 2 * BLOCK)))
        move = self.random.random()
        with self.board.changing(FILES.index(SHAPED[which])) as replaced:
            if move < 0.45:
                self.attempt("reshape grow", lambda: grow(path, BLOCKS))
            elif move < 0.65:
                self.attempt("reshape truncate", lambda: acts.truncate(path, size))
            elif move < 0.82:
                self.attempt("reshape punch", lambda: acts.punch(path, size, length))
            elif move < 0.92:
                mode = acts.ZERO_RANGE | acts.KEEP_SIZE
                self.attempt("reshape zero range", lambda: acts.fallocate(path, mode, size, length))
            elif move < 0.96:
                self.attempt("reshape O_TRUNC", lambda: acts.open_truncating(path))
            elif self.attempt("reshape unlink", lambda: os.unlink(path)):
                replaced()
                self.attempt("reshape create", lambda: acts.create(path, b""))


PARTS: dict[str, type[Actor]] = {
    "device": Device, **{f"map-{owner}": Map for owner in MAPPERS}, "reshape": Reshape,
}  # fmt: skip
