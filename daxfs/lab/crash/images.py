"""Which images a power cut can leave, at a point of a record of stores, flushes and fences.

The model (domain `adr`: caches are lost)
- A line has 64 bytes. The stores to one line reach the medium in program order: what is left of it is a prefix of them.
- An aligned 8-byte word is never torn. A larger store may be: of the last store of the prefix, any of its words.
- Lines are independent: any mix of what is left of each. A dirty line may be evicted, and so durable, at any time.
- A flush (clwb) and then a fence (sfence) make durable what the line held at the flush. A non-temporal store needs only the
  fence. At a fence itself nothing is promised yet: a crash point lies before it.
Domain `eadr`: caches are persistent. What is left is all stores so far, in program order (x86 keeps the order of stores),
the last one torn between two of its words, which are taken to be stored upwards.

A point that is looked at before each fence covers every moment since the fence before: what an earlier crash could leave is
among what this one can. A word that a store does not change is no store.

How many: all images when there are at most `Limits.all`. Else none, all, each line alone (with all stores, with each
prefix of them, and torn), all but one line, pairs of lines, and mixes at random. Only lines that the caller names as read
are varied; in "all" every pending line is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations, islice, product
from random import Random
from typing import Protocol

from daxfs.lab.crash.medium import LINE, Event, Fence, Flush, Return, Seen, Store

WORD = 8
DOMAINS = ("adr", "eadr")

Choice = dict[int, bytes]  # number of a line -> what is left of it; the other lines are as the last fences made them
Word = tuple[int, bytes]  # offset in the line, the bytes of one word that a store changes


@dataclass(frozen=True)
class Limits:
    """`all`: so many images of a point are not too many. Otherwise at most `lines` lines alone and left out, `pairs` pairs
    and `random` mixes."""

    all: int = 256
    lines: int = 48
    pairs: int = 48
    random: int = 32


class Tracker(Protocol):
    """What is durable for certain, and what may be besides. `digest` is that of `durable`."""

    durable: bytearray
    digest: int

    def feed(self, event: Event) -> bool:
        """Go on by one event. False if it was a flush or fence that did nothing."""

    def pending(self) -> list[int]:
        """Lines of which more than one version may be left."""

    def latest(self) -> Choice:
        """All stores so far: what the death of the daemon alone leaves."""

    def images(self, seen: Seen, rng: Random, limits: Limits) -> Iterator[Choice]:
        """What a power cut can leave now; some choices may come twice."""


def tracker(domain: str, image: bytes | bytearray, digest: int | None = None) -> Tracker:
    if domain not in DOMAINS:
        raise ValueError(f"{domain} is not a persistence domain: {', '.join(DOMAINS)}")
    kind = AdrTracker if domain == "adr" else EadrTracker
    return kind(image, digest_of(image) if digest is None else digest)


def lines_of(at: int, n: int) -> range:
    """The lines that some bytes lie in."""
    return range(at // LINE, -(-(at + n) // LINE))


def line_digest(line: int, content: bytes | bytearray) -> int:
    """64 bits; those of an image are the exclusive or over all its lines, so a few changed lines cost little."""
    return int.from_bytes(blake2b(content, digest_size=8, salt=line.to_bytes(8, "little")).digest(), "little")


def digest_of(image: bytes | bytearray) -> int:
    out = 0
    for line in range(len(image) // LINE):
        out ^= line_digest(line, image[line * LINE : (line + 1) * LINE])
    return out


def digest_with(base: Tracker, choice: Choice) -> int:
    """The digest of the image that a choice makes."""
    out = base.digest
    for line, content in choice.items():
        out ^= line_digest(line, base.durable[line * LINE : (line + 1) * LINE]) ^ line_digest(line, content)
    return out


def changed_words(current: bytearray, event: Store) -> Iterator[tuple[int, list[Word]]]:
    """(line, words) of what a store changes; `current` has it afterwards."""
    at, data = event.at, event.data
    end = at + len(data)
    for line in lines_of(at, len(data)):
        base = line * LINE
        low, high = max(at, base), min(end, base + LINE)
        piece = data[low - at : high - at]
        if current[low:high] == piece:
            continue
        words: list[Word] = []
        for start in range(low & -WORD, high, WORD):
            first, last = max(start, low), min(start + WORD, high)
            word = data[first - at : last - at]
            if current[first:last] != word:
                words.append((first - base, word))
        current[low:high] = piece
        yield line, words


@dataclass(slots=True)
class Line:
    """Stores since the line was last durable, each as the words that it changes; `flushed` of them a flush has covered."""

    stores: list[list[Word]] = field(default_factory=list)
    flushed: int = 0

    def versions(self) -> int:
        return 1 + sum((1 << len(words)) - 1 for words in self.stores)


class AdrTracker:
    def __init__(self, image: bytes | bytearray, digest: int) -> None:
        self.durable = bytearray(image)
        self.digest = digest
        self._current = bytearray(image)
        self._lines: dict[int, Line] = {}
        self._dirty: set[int] = set()  # lines stored to since they were flushed, whether it changed them or not
        self._unfenced = False  # something was flushed since the last fence

    def feed(self, event: Event) -> bool:
        if isinstance(event, Store):
            for number, words in changed_words(self._current, event):
                line = self._lines.setdefault(number, Line())
                line.stores.append(words)
                if event.streamed:
                    line.flushed = len(line.stores)
            if event.streamed:
                self._unfenced = True
            else:
                self._dirty.update(lines_of(event.at, len(event.data)))
        elif isinstance(event, Flush):
            return self._flush(event)
        elif isinstance(event, Fence):
            return self._fence()
        return True

    def _flush(self, event: Flush) -> bool:
        before = len(self._dirty)
        for number in lines_of(event.at, event.n):
            self._dirty.discard(number)
            line = self._lines.get(number)
            if line is not None:
                line.flushed = len(line.stores)
        useful = len(self._dirty) < before
        self._unfenced |= useful
        return useful

    def _fence(self) -> bool:
        for number in [number for number, line in self._lines.items() if line.flushed]:
            line = self._lines[number]
            base = number * LINE
            self.digest ^= line_digest(number, self.durable[base : base + LINE])
            for words in line.stores[: line.flushed]:
                for offset, word in words:
                    self.durable[base + offset : base + offset + len(word)] = word
            self.digest ^= line_digest(number, self.durable[base : base + LINE])
            del line.stores[: line.flushed]
            line.flushed = 0
            if not line.stores:
                del self._lines[number]
        useful, self._unfenced = self._unfenced, False
        return useful

    def pending(self) -> list[int]:
        return list(self._lines)

    def latest(self) -> Choice:
        return {number: self._whole(number) for number in self._lines}

    def images(self, seen: Seen, rng: Random, limits: Limits) -> Iterator[Choice]:
        everything = self.latest()
        yield {}
        if not everything:
            return
        yield everything
        varied = [number for number in self._lines if seen[number]]
        if math.prod(self._lines[number].versions() for number in varied) <= limits.all:
            yield from self._all(varied)
        else:
            yield from self._some(varied, everything, rng, limits)

    def _all(self, varied: list[int]) -> Iterator[Choice]:
        versions = [[None, *self._versions(number)] for number in varied]
        for mix in product(*versions):
            yield {number: content for number, content in zip(varied, mix, strict=True) if content is not None}

    def _some(self, varied: list[int], everything: Choice, rng: Random, limits: Limits) -> Iterator[Choice]:
        few = varied if len(varied) <= limits.lines else sorted(rng.sample(varied, limits.lines))
        for number in few:
            for content in self._telling(number, rng):
                yield {number: content}
        for number in few:
            yield {n: content for n, content in everything.items() if n != number}
        pairs = list(islice(combinations(few, 2), 1 << 16))
        for pair in pairs if len(pairs) <= limits.pairs else rng.sample(pairs, limits.pairs):
            yield {number: everything[number] for number in pair}
        for _ in range(limits.random):
            share = rng.random()
            yield {number: self._any(number, rng) for number in varied if rng.random() < share}

    # -- versions of one line --

    def _content(self, number: int, stores: int, mask: int = 0) -> bytes:
        """The line after some stores, and those words of the next one that the mask has."""
        line, base = self._lines[number], number * LINE
        out = bytearray(self.durable[base : base + LINE])
        for words in line.stores[:stores]:
            for offset, word in words:
                out[offset : offset + len(word)] = word
        if mask:
            for i, (offset, word) in enumerate(line.stores[stores]):
                if mask >> i & 1:
                    out[offset : offset + len(word)] = word
        return bytes(out)

    def _whole(self, number: int) -> bytes:
        base = number * LINE
        return bytes(self._current[base : base + LINE])

    def _versions(self, number: int) -> Iterator[bytes]:
        """All but the durable one."""
        for i, words in enumerate(self._lines[number].stores):
            for mask in range(1, 1 << len(words)):
                yield self._content(number, i, mask)

    def _telling(self, number: int, rng: Random) -> Iterator[bytes]:
        """Each prefix of the stores, and of each larger store its first words, its last words, and any."""
        for i, words in enumerate(self._lines[number].stores):
            yield self._content(number, i + 1)
            if len(words) > 1:
                cut = rng.randrange(1, len(words))
                low = (1 << cut) - 1
                for mask in {low, (1 << len(words)) - 1 - low, rng.randrange(1, (1 << len(words)) - 1)}:
                    yield self._content(number, i, mask)

    def _any(self, number: int, rng: Random) -> bytes:
        stores = self._lines[number].stores
        if rng.random() < 0.5:
            return self._whole(number)
        i = rng.randrange(len(stores))
        return self._content(number, i, rng.randrange(1, 1 << len(stores[i])))


class EadrTracker:
    """`durable` is what was stored before the last fence or return; what came since may be left up to any word."""

    def __init__(self, image: bytes | bytearray, digest: int) -> None:
        self.durable = bytearray(image)
        self.digest = digest
        self._current = bytearray(image)
        self._stores: list[list[tuple[int, Word]]] = []

    def feed(self, event: Event) -> bool:
        if isinstance(event, Store):
            words = [(line, word) for line, words in changed_words(self._current, event) for word in words]
            if words:
                self._stores.append(words)
        elif isinstance(event, Fence | Return):
            useful = bool(self._stores)
            for number in self.pending():
                base = number * LINE
                self.digest ^= line_digest(number, self.durable[base : base + LINE])
                self.durable[base : base + LINE] = self._current[base : base + LINE]
                self.digest ^= line_digest(number, self.durable[base : base + LINE])
            self._stores.clear()
            return useful or isinstance(event, Return)
        return not isinstance(event, Flush)  # no flush does anything here

    def pending(self) -> list[int]:
        return list(dict.fromkeys(line for store in self._stores for line, _ in store))

    def latest(self) -> Choice:
        return {n: bytes(self._current[n * LINE : (n + 1) * LINE]) for n in self.pending()}

    def images(self, seen: Seen, rng: Random, limits: Limits) -> Iterator[Choice]:
        boundaries = [0]
        for store in self._stores:
            boundaries.append(boundaries[-1] + len(store))
        words = [word for store in self._stores for word in store]
        telling = [i + 1 for i, (line, _) in enumerate(words) if seen[line]]
        if len(telling) > limits.all:
            telling = sorted(rng.sample(telling, limits.all - min(len(boundaries), limits.all // 2)))
            inner = boundaries[1:-1]
            telling += inner if len(inner) <= limits.all // 2 else rng.sample(inner, limits.all // 2)
        wanted = sorted({0, len(words), *telling})
        choice: dict[int, bytearray] = {}
        done = 0
        for count in wanted:
            for line, (offset, word) in words[done:count]:
                content = choice.setdefault(line, self.durable[line * LINE : (line + 1) * LINE])
                content[offset : offset + len(word)] = word
            done = count
            yield {line: bytes(content) for line, content in choice.items()}
