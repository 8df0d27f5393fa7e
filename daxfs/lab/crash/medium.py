"""The recording medium: persistent memory as anonymous memory, which writes down what is done to it.

The core runs on it without change. Every store, flush and fence goes into `log`, in program order, so that images.py can
say what a power cut would have left; every line that is read is marked in `seen`, so that only what recovery looks at need
be varied.

Nothing is read unseen: `view`, `words` and `bytes` give slices only, and note them; anything else that would reach the
bytes behind the medium's back is a TypeError. Compiled code has the address of the mapping, but in the core it only keeps
it (`ExtentMap.attach`), for the native session, which is not here.

Not here: what a line, a tear or an eviction is (images.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from daxfs.core.pmem import Pmem

LINE = 64
Seen = npt.NDArray[np.bool_]  # by line: whether it was read
NAME = "<recording medium>"


class Store(NamedTuple):
    """`streamed`: non-temporal, past the caches; it needs a fence but no flush."""

    at: int
    data: bytes
    streamed: bool = False


class Flush(NamedTuple):
    at: int
    n: int


class Fence(NamedTuple):
    pass


class Return(NamedTuple):
    """A call was acknowledged."""

    call: int


Event = Store | Flush | Fence | Return
_FENCE = Fence()


class _Window:
    """A buffer that gives slices and single items, and notes which bytes they are."""

    def __init__(self, memory: Any, unit: int, seen: Seen) -> None:
        self._memory, self._per_line, self._seen = memory, LINE // unit, seen

    def __getitem__(self, key: slice | int) -> Any:
        per_line = self._per_line
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self._memory))
            self._seen[start // per_line : -(-stop // per_line)] = True
        else:
            self._seen[key // per_line] = True
        return self._memory[key]

    def __len__(self) -> int:
        return len(self._memory)


class RecordingPmem(Pmem):
    """`raw` is the memory itself, for whoever prepares an image, `rows` the same as lines; `log` and `seen` (which lines
    were read) grow until `clear`. `needed` are the lines that were read before they were overwritten as a whole: nothing
    that was done depends on what the others held."""

    def __init__(self, size: int, *, readonly: bool = False, seen: Seen | None = None) -> None:
        super(Pmem, self).__init__()
        self.path = NAME
        self.readonly = readonly
        self.hostsync = False
        self.size = size
        self.file_id = 0, 0
        self.log: list[Event] = []
        self.seen = np.zeros(size // LINE, np.bool_) if seen is None else seen
        self._replaced = np.zeros(size // LINE, np.bool_)
        self._map = mmap.mmap(-1, size)
        self._copy: RecordingPmem | None = None
        self._attach(self._map)

    def _attach(self, memory: mmap.mmap) -> None:
        super()._attach(memory)
        self.raw = self.view
        self._words, self._bytes = self.words, self.bytes
        self.rows = self._bytes.reshape(-1, LINE)
        self.view = cast(memoryview, _Window(self.raw, 1, self.seen))
        self.words = cast(memoryview, _Window(self._words, 8, self.seen))
        self.bytes = cast(npt.NDArray[np.uint8], _Window(self._bytes, 1, self.seen))

    def put(self, image: bytes | bytearray | memoryview) -> None:
        """Replace all bytes, and forget what was noted."""
        self.raw[:] = image
        self.clear()

    def clear(self) -> None:
        self.log.clear()
        self.seen[:] = False
        self._replaced[:] = False

    @property
    def needed(self) -> Seen:
        found: Seen = self.seen & ~self._replaced
        return found

    def private(self) -> RecordingPmem:
        """A copy, read-only for those who ask; what is read from it counts as read from here. One at a time."""
        if self._copy is None:
            self._copy = RecordingPmem(self.size, readonly=True, seen=self.seen)
        self._copy.raw[:] = self.raw
        self._copy.log.clear()
        return self._copy

    # -- the medium --

    def reserve(self, at: int, n: int) -> None:
        """All of it is there."""

    def gather(self, blocks: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.uint8]:
        self.seen[: self.size // block_size * block_size // LINE].reshape(-1, block_size // LINE)[blocks] = True
        out: npt.NDArray[np.uint8] = self._bytes[: self.size // block_size * block_size].reshape(-1, block_size)[blocks]
        return out

    def reading(self, starts: npt.NDArray[np.int64], count: int, block_size: int) -> memoryview:
        lines = self.seen[: self.size // block_size * block_size // LINE].reshape(-1, block_size // LINE)
        lines[(starts[:, None] + np.arange(count)).reshape(-1)] = True
        return self.raw

    def written(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        yield at, end

    def store(self, at: int, data: bytes | bytearray | memoryview) -> None:
        first, last = -(-at // LINE), (at + len(data)) // LINE
        if first < last:
            self._replaced[first:last] |= ~self.seen[first:last]
        self.raw[at : at + len(data)] = data
        self.log.append(Store(at, bytes(data)))

    def fill_zero(self, at: int, n: int) -> None:
        self.store(at, bytes(n))

    def copy(self, source: int, target: int, n: int) -> None:
        self.store(target, self.load(source, n))

    def store_word(self, at: int, value: int) -> None:
        self._words[at >> 3] = value
        self.log.append(Store(at, value.to_bytes(8, "little")))

    def load_word(self, at: int) -> int:
        return int(self.words[at >> 3])

    def stream(self, at: int, data: bytes) -> None:
        """A non-temporal store."""
        self.raw[at : at + len(data)] = data
        self.log.append(Store(at, bytes(data), True))

    def flush(self, at: int, n: int) -> None:
        self.log.append(Flush(at, n))

    def fence(self) -> None:
        self.log.append(_FENCE)

    def returned(self, call: int) -> None:
        """Note that a call has returned."""
        self.log.append(Return(call))

    def sync(self) -> None:
        pass

    def close(self) -> None:
        """The bytes stay: somebody looks at them next."""
