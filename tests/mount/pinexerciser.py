"""The exerciser with pins: between the ordinary calls ranges are pinned, written and read through the image, and let go.

The model of a pinned block is the file's block while it is the file's: a write shows in the pin, a store of the holder in
the file. When a truncate or punch takes the whole block away it goes on alone: what the file does no longer reaches it, nor
it the file.

Mappings of the file go through the kernel's pages, so each side may be late, but must lose nothing. Bytes that a program
stored through a mapping, also from a child that ends, are *late* for the holder until they are written back; bytes of the
holder are late for a mapping until the page is dropped. read(2) is never late. The model keeps apart what nobody can tell: a
holder stores over a program's late byte when that is written back, a program stores another value than it sees.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from daxfs import client
from tests.mount.exerciser import BLOCK, WINDOW, Exerciser, Mismatch, Subject

HELD_MAX = 12
SEEN_S = 20.0  # for what comes without being asked for
LATE_HOLDER, LATE_MAPPING = 1, 2  # for whom


class Held:
    """One pin. `alone[n]` is the content of its n-th block once that is not the file's any more."""

    def __init__(self, subject: PinnedSubject, first: int, file: client.File, pin: client.Pin) -> None:
        self.subject = subject
        self.first = first
        self.file = file
        self.pin = pin
        self.view = pin.map()
        self.alone: list[bytearray | None] = [None] * (pin.length // BLOCK)

    def leave(self, start: int, end: int, gone: dict[int, bytearray]) -> None:
        """These blocks of the file are given up: keep what they hold, together with other pins of the same block."""
        for n, content in enumerate(self.alone):
            if content is None and start <= self.first + n < end:
                self.alone[n] = gone.setdefault(self.first + n, self.subject.block(self.first + n))

    def expected(self, n: int) -> bytes:
        content = self.alone[n]
        return bytes(self.subject.block(self.first + n) if content is None else content)


class PinnedSubject(Subject):
    def __init__(self, path: str, base: int) -> None:
        self.held: list[Held] = []
        self.late = bytearray(WINDOW + BLOCK)
        super().__init__(path, base)

    def delay(self, at: int, length: int, whom: int) -> None:
        """These bytes may be late for them."""
        self.late[at : at + length] = self.late[at : at + length].translate(bytes(n | whom for n in range(256)))

    def arrived(self, at: int, length: int, whom: int) -> None:
        self.late[at : at + length] = self.late[at : at + length].translate(bytes(n & ~whom for n in range(256)))

    def is_late(self, at: int, length: int, whom: int) -> bool:
        """Whether any of these bytes may be."""
        return any(n in self.late[at : at + length] for n in {whom, LATE_HOLDER | LATE_MAPPING})

    def in_time(self, at: int, got: bytes | bytearray, whom: int) -> bytes | bytearray:
        """What was seen, with the bytes that may be late as they will be."""
        if got == self.data[at : at + len(got)]:
            return got
        known = bytearray(got)
        for n in range(min(len(got), self.size - at)):
            if self.late[at + n] & whom:
                known[n] = self.data[at + n]
        return known

    def write_back(self) -> None:
        """What programs stored is in the blocks."""
        if self.handles and self.is_late(0, len(self.late), LATE_HOLDER):
            os.fsync(self.handles[0].fd)
            self.arrived(0, len(self.late), LATE_HOLDER)

    def block(self, index: int) -> bytearray:
        return self.data[index * BLOCK : (index + 1) * BLOCK].ljust(BLOCK, b"\0")

    def create(self) -> None:
        self._leave(0, WINDOW)
        self.late = bytearray(WINDOW + BLOCK)
        super().create()

    def resize(self, size: int) -> None:
        self._leave(-(-size // BLOCK), WINDOW)
        super().resize(size)

    def punch(self, at: int, length: int) -> None:
        self._leave(-(-at // BLOCK), (at + length) // BLOCK)
        super().punch(at, length)

    def _leave(self, start: int, end: int) -> None:
        gone: dict[int, bytearray] = {}
        for held in self.held:
            held.leave(start, end, gone)


class PinExerciser(Exerciser):
    subject = PinnedSubject
    subjects: list[PinnedSubject]  # type: ignore[assignment]

    def __init__(self, directory: str, seed: int) -> None:
        super().__init__(directory, seed)
        self.held: list[Held] = []
        self.operations |= {  # type: ignore[dict-item]
            self.pin: 6, self.unpin: 4, self.store: 10, self.load: 10, self.write_forked: 2, self.invariants: 1,
        }  # fmt: skip

    def close(self) -> None:
        for held in self.held:
            held.file.close()
        super().close()

    # -- mappings beside pins --

    def write_mapped(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        return self._write_mapped(subject, self._put)

    def write_forked(self, subject: PinnedSubject) -> str:
        """A child stores through the mapping that it shares with this process, and ends in some way."""
        return self._write_mapped(subject, self._put_forked)

    def _write_mapped(self, subject: PinnedSubject, put: Callable[[PinnedSubject, int, bytes], str]) -> str:
        if not subject.size:
            return self.write(subject)
        at, length = self.span(subject.size)
        seen = self.mapped(subject, at + length)[at : at + length]
        data = bytearray(self.random.randbytes(length))
        for n in range(length):
            if data[n] == seen[n]:
                data[n] ^= 1
        how = put(subject, at, bytes(data))
        subject.put(at, data)
        subject.delay(at, length, LATE_HOLDER)
        subject.arrived(at, length, LATE_MAPPING)
        return f"{how} [{at:#x}, {at + length:#x})"

    def _put(self, subject: PinnedSubject, at: int, data: bytes) -> str:
        self.mapped(subject, at + len(data))[at : at + len(data)] = data
        return "write_mapped"

    def _put_forked(self, subject: PinnedSubject, at: int, data: bytes) -> str:
        end = self.random.choice(("exit", "munmap", "kill"))
        if (child := os.fork()) == 0:
            try:
                self._put(subject, at, data)
                if end == "munmap":
                    subject.unmap()
                if end == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1] not in (0, signal.SIGKILL):
            raise Mismatch("the child that stores failed")
        return f"write_forked, {end}"

    def compare(self, subject: PinnedSubject, at: int, got: bytes | bytearray, length: int, how: str) -> None:  # type: ignore[override]
        """What goes through the kernel's pages may be late; now and then it is waited for."""
        if how == "read_mapped":
            if self.random.random() < 0.1:
                end = time.monotonic() + SEEN_S
                while got != subject.data[at : at + length] and time.monotonic() < end:
                    got = self.mapped(subject, at + length)[at : at + length]
                subject.arrived(at, length, LATE_MAPPING)
            got = subject.in_time(at, got, LATE_MAPPING)
        elif how in ("read_private", "splice"):
            got = subject.in_time(at, got, LATE_MAPPING)
        super().compare(subject, at, got, length, how)

    def truncate(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        subject.write_back()
        return super().truncate(subject)

    def truncate_path(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        subject.write_back()
        return super().truncate_path(subject)

    def punch(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        subject.write_back()
        return super().punch(subject)

    def reopen(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        subject.write_back()
        return super().reopen(subject)

    def forget_name(self, subject: PinnedSubject) -> str:  # type: ignore[override]
        subject.write_back()
        return super().forget_name(subject)

    # -- pins --

    def pin(self, subject: PinnedSubject) -> str:
        if not subject.size or len(self.held) >= HELD_MAX:
            return self.unpin(subject)
        blocks = -(-subject.size // BLOCK)
        first = self.random.randrange(blocks)
        count = self.random.randint(1, min(blocks - first, 16))
        file = client.open(subject.place(), "r+")
        pin = file.pin(subject.base + first * BLOCK, count * BLOCK, write=True)
        held = Held(subject, first, file, pin)
        self.held.append(held)
        subject.held.append(held)
        return f"pin {pin.id}: blocks [{first}, {first + count}) at {pin.runs}"

    def unpin(self, subject: PinnedSubject) -> str:
        """By UNPIN, or by closing the descriptor."""
        if not self.held:
            return "nothing to unpin"
        held = self.held.pop(self.random.randrange(len(self.held)))
        held.subject.held.remove(held)
        if self.random.random() < 0.5:
            held.pin.close()
        held.file.close()
        return f"unpin {held.pin.id}"

    def store(self, subject: PinnedSubject) -> str:
        """The holder writes, as a device would: below the end of the file in a block that is still the file's."""
        if not self.held:
            return self.write(subject)
        held = self.random.choice(self.held)
        n = self.random.randrange(len(held.alone))
        content, at = held.alone[n], (held.first + n) * BLOCK
        limit = BLOCK if content is not None else min(BLOCK, held.subject.size - at)
        start, length = self.random.randrange(limit), self.random.randint(1, limit)
        data = self.random.randbytes(min(length, limit - start))
        if content is None:
            if held.subject.is_late(at + start, len(data), LATE_HOLDER):
                held.subject.write_back()
            held.subject.delay(at + start, len(data), LATE_MAPPING)
        held.view[n * BLOCK + start : n * BLOCK + start + len(data)] = data
        if content is None:
            held.subject.data[at + start : at + start + len(data)] = data
        else:
            content[start : start + len(data)] = data
        state = "the file's" if content is None else "busy"
        return f"store pin {held.pin.id} block {n} ({state}) [{start:#x}, {start + len(data):#x})"

    def load(self, subject: PinnedSubject) -> str:
        """The holder reads all of its blocks."""
        if not self.held:
            return self.read(subject)
        held = self.random.choice(self.held)
        wait = self.random.random() < 0.1
        for n in range(len(held.alone)):
            got, want = self._load(held, n, wait), held.expected(n)
            if got != want:
                at = next(i for i in range(BLOCK) if got[i] != want[i])
                state = "the file's" if held.alone[n] is None else "busy"
                raise Mismatch(
                    f"pin {held.pin.id} of {held.subject.path}, block {n} ({state}): byte {at:#x} is {got[at]:#x}, "
                    f"model {want[at]:#x}; runs {held.pin.runs}"
                )
        return f"load pin {held.pin.id}"

    def _load(self, held: Held, n: int, wait: bool) -> bytes:
        """A block as its holder sees it. `wait`: until it is as the model has it, if it comes to that."""
        end = time.monotonic() + (SEEN_S if wait and held.alone[n] is None else 0)
        while True:
            got = bytes(held.view[n * BLOCK : (n + 1) * BLOCK])
            if got == held.expected(n) or time.monotonic() > end:
                break
        if wait or held.alone[n] is not None:
            return got
        return bytes(held.subject.in_time((held.first + n) * BLOCK, got, LATE_HOLDER))

    def invariants(self, subject: PinnedSubject) -> str:
        """All blocks are accounted for; busy extents do not overlap; no block is of two files, or of one and busy.

        Pinned blocks of an unlinked file are reported as busy already, though it lives until its last close.
        """
        info = client.info(self.directory)
        if info["free"] + info["used"] + info["busy"] != info["blocks"]:
            raise Mismatch(f"blocks do not add up: {info}")
        busy: set[int] = set()
        for extent in client.busy(self.directory):
            run = set(range(extent["start"], extent["start"] + extent["count"]))
            if run & busy:
                raise Mismatch(f"busy extents overlap in {run & busy}")
            busy |= run
        owned: set[int] = set()
        for one in self.subjects:
            with client.open(one.place()) as file:
                for piece in file.extents():
                    run = set(range(piece.physical, piece.physical + piece.count))
                    taken = owned | busy if one.named else owned
                    if run & taken:
                        raise Mismatch(f"{one.path}: blocks {run & taken} are busy, or another file's as well")
                    owned |= run
        return f"invariants: {len(busy)} busy"
