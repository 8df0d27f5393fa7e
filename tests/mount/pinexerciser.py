"""The exerciser with pins: between the ordinary calls ranges are pinned, written and read through the image, and let go.

The model of a pinned block is the file's block while it is the file's: a write shows in the pin, a store of the holder in
the file. When a truncate or punch takes the whole block away it goes on alone: what the file does no longer reaches it, nor
it the file. Mappings of the file are left out: those go through the kernel's page cache, which knows nothing of the holder.
"""

from __future__ import annotations

from daxfs import client
from tests.mount.exerciser import BLOCK, WINDOW, Exerciser, Mismatch, Subject

HELD_MAX = 12


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
        super().__init__(path, base)

    def block(self, index: int) -> bytearray:
        return self.data[index * BLOCK : (index + 1) * BLOCK].ljust(BLOCK, b"\0")

    def create(self) -> None:
        self._leave(0, WINDOW)
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
        for unfit in (self.write_mapped, self.read_mapped, self.read_private, self.remap):
            del self.operations[unfit]
        self.operations |= {self.pin: 6, self.unpin: 4, self.store: 10, self.load: 10, self.invariants: 1}  # type: ignore[dict-item]

    def close(self) -> None:
        for held in self.held:
            held.file.close()
        super().close()

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
        for n in range(len(held.alone)):
            got, want = bytes(held.view[n * BLOCK : (n + 1) * BLOCK]), held.expected(n)
            if got != want:
                at = next(i for i in range(BLOCK) if got[i] != want[i])
                state = "the file's" if held.alone[n] is None else "busy"
                raise Mismatch(
                    f"pin {held.pin.id} of {held.subject.path}, block {n} ({state}): byte {at:#x} is {got[at]:#x}, "
                    f"model {want[at]:#x}; runs {held.pin.runs}"
                )
        return f"load pin {held.pin.id}"

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
