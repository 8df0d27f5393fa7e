"""Random operations on a few files, held against a model in memory, in the manner of fsx.

    python -m tests.mount.exerciser DIRECTORY --seed 7 --operations 10000

One seed is one sequence of operations: a failure prints the seed and the operations that led to it. Every read of any kind
(pread, readv, mapped, direct, spliced) is compared with the model, the size after every operation, all bytes now and then.

Each subject is a window of `WINDOW` bytes of a file, at its start or far out in a sparse file. It has several descriptors at
once, of different flags, and a shared mapping; it may be unlinked and live on through them. Not here: names (namespace.py).
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import sys
from collections import deque
from collections.abc import Callable

from tests.mount import syscalls

BLOCK = 4096
WINDOW = 256 * 1024
BASES = (0, 0, (1 << 41) + 7 * BLOCK)
HANDLES_MAX = 5
HISTORY = 60
FLAGS = (0, 0, 0, os.O_APPEND, os.O_DIRECT, os.O_DIRECT | os.O_APPEND, os.O_SYNC, os.O_DSYNC, os.O_TRUNC)


class Mismatch(AssertionError):
    """The file system and the model disagree."""


class Handle:
    def __init__(self, fd: int, flags: int) -> None:
        self.fd = fd
        self.direct = bool(flags & os.O_DIRECT)
        self.append = bool(flags & os.O_APPEND)


class Subject:
    """One file: its model and what is open of it. Offsets of the model count from `base`."""

    def __init__(self, path: str, base: int) -> None:
        self.path = path
        self.base = base
        self.data = bytearray()
        self.handles: list[Handle] = []
        self.mapping: mmap.mmap | None = None
        self.named = True
        self.create()

    @property
    def size(self) -> int:
        return len(self.data)

    def create(self) -> None:
        self.handles = [Handle(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), 0)]
        self.data = bytearray()
        self.named = True
        if self.base:
            os.ftruncate(self.handles[0].fd, self.base)

    def place(self) -> str:
        """A path that opens this file, also when it has no name left."""
        return self.path if self.named else f"/proc/self/fd/{self.handles[0].fd}"

    def unmap(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None

    def close(self) -> None:
        self.unmap()
        for handle in self.handles:
            os.close(handle.fd)
        self.handles = []

    def put(self, at: int, data: bytes) -> None:
        self.grow(at + len(data))
        self.data[at : at + len(data)] = data

    def clear(self, at: int, length: int) -> None:
        end = min(at + length, self.size)
        if end > at:
            self.data[at:end] = bytes(end - at)

    def punch(self, at: int, length: int) -> None:
        self.clear(at, length)

    def grow(self, size: int) -> None:
        if size > self.size:
            self.data.extend(bytes(size - self.size))

    def resize(self, size: int) -> None:
        del self.data[size:]
        self.grow(size)


class Exerciser:
    subject = Subject

    def __init__(self, directory: str | os.PathLike[str], seed: int, *, pause: Callable[[], None] | None = None) -> None:
        self.directory = os.fspath(directory)
        self.seed = seed
        self.random = random.Random(seed)
        self.pause = pause
        self.count = 0
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.buffer = mmap.mmap(-1, WINDOW)  # page-aligned memory for direct I/O
        self.subjects = [self.subject(os.path.join(self.directory, f"subject-{n}"), base) for n, base in enumerate(BASES)]
        self.has_zero_range = self._supports_zero_range()
        self.operations: dict[Callable[[Subject], str], int] = {
            self.write: 12, self.writev: 3, self.append: 3, self.write_mapped: 8, self.write_direct: 6,
            self.read: 10, self.readv: 2, self.read_mapped: 8, self.read_private: 2, self.read_direct: 6, self.splice: 2,
            self.truncate: 6, self.truncate_path: 2, self.punch: 6, self.zero: 5, self.allocate: 4,
            self.copy: 5, self.copy_within: 2, self.seek: 6, self.sync: 2, self.reopen: 5, self.duplicate: 1,
            self.remap: 2, self.forget_name: 1, self.check: 1,
        }  # fmt: skip

    def _supports_zero_range(self) -> bool:
        try:
            syscalls.fallocate(self.subjects[0].handles[0].fd, syscalls.ZERO_RANGE | syscalls.KEEP_SIZE, 0, BLOCK)
        except OSError as problem:
            if problem.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, operations: int, *, pause_every: int = 0) -> None:
        kinds, weights = list(self.operations), list(self.operations.values())
        try:
            for self.count in range(1, operations + 1):
                subject = self.random.choice(self.subjects)
                operation = self.random.choices(kinds, weights)[0]
                self.history.append(f"{self.count} {os.path.basename(subject.path)} {operation.__name__} (unfinished)")
                self.history[-1] = f"{self.count} {os.path.basename(subject.path)} {operation(subject)}"
                self.check_size(subject)
                if self.pause and pause_every and self.count % pause_every == 0:
                    self.rest()
            for subject in self.subjects:
                self.check(subject)
        except (Mismatch, OSError) as problem:
            steps = "\n  ".join(self.history)
            raise Mismatch(
                f"{problem}\n  seed {self.seed}, operation {self.count} in {self.directory}; what led to it:\n  {steps}"
            ) from problem

    def rest(self) -> None:
        """Close everything, let the caller do something (remount), open again and compare."""
        for subject in self.subjects:
            subject.close()
        assert self.pause
        self.pause()
        for subject in self.subjects:
            if subject.named:
                subject.handles = [Handle(os.open(subject.path, os.O_RDWR), 0)]
                self.check(subject)
            else:
                subject.create()
        self.history.append("-- closed all, paused, opened again")

    def close(self) -> None:
        for subject in self.subjects:
            subject.close()
            if subject.named:
                os.unlink(subject.path)

    # -- choices ----------------------------------------------------------------------------------------------------

    def offset(self, limit: int) -> int:
        """0..limit, often at or beside a block's edge."""
        at = self.random.randint(0, limit)
        match self.random.randrange(4):
            case 0:
                at -= at % BLOCK
            case 1:
                at = max(0, at - at % BLOCK + self.random.randint(-2, 2))
        return min(at, limit)

    def length(self, limit: int) -> int:
        """1..limit, mostly short, often whole blocks."""
        match self.random.randrange(5):
            case 0:
                n = self.random.randint(1, 64)
            case 1:
                n = BLOCK * self.random.randint(1, 8)
            case 2:
                n = self.random.randint(1, 128 * 1024)
            case _:
                n = self.random.randint(1, 3 * BLOCK)
        return max(1, min(n, limit))

    def span(self, limit: int = WINDOW) -> tuple[int, int]:
        at = self.offset(limit - 1)
        return at, self.length(limit - at)

    def aligned(self) -> tuple[int, int]:
        at = self.random.randrange(WINDOW // BLOCK) * BLOCK
        return at, min(self.random.randint(1, 16) * BLOCK, WINDOW - at)

    def handle(self, subject: Subject, *, direct: bool = False, append: bool = False) -> Handle:
        """An open descriptor of that kind; opened if there is none."""
        fit = [h for h in subject.handles if h.direct == direct and h.append == append]
        return self.random.choice(fit) if fit else self._open(subject, direct * os.O_DIRECT | append * os.O_APPEND)

    def _open(self, subject: Subject, flags: int) -> Handle:
        handle = Handle(os.open(subject.place(), os.O_RDWR | flags), flags)
        subject.handles.append(handle)
        if len(subject.handles) > HANDLES_MAX:
            os.close(subject.handles.pop(0).fd)
        return handle

    def mapped(self, subject: Subject, end: int) -> mmap.mmap:
        """A shared mapping of the window that reaches to `end`."""
        if subject.mapping is None or len(subject.mapping) < end:
            subject.unmap()
            fd = self.handle(subject).fd
            subject.mapping = mmap.mmap(fd, subject.size, mmap.MAP_SHARED, offset=subject.base)
        return subject.mapping

    # -- comparing --------------------------------------------------------------------------------------------------

    def compare(self, subject: Subject, at: int, got: bytes | bytearray, length: int, how: str) -> None:
        want = subject.data[at : at + length]
        if got == want:
            return
        if len(got) != len(want):
            raise Mismatch(f"{subject.path} {how} at {at}: {len(got)} bytes, model has {len(want)}")
        first = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        wrong = sum(a != b for a, b in zip(got, want, strict=True))
        raise Mismatch(
            f"{subject.path} {how} [{at:#x}, {at + length:#x}): {wrong} bytes differ, first at {at + first:#x}: "
            f"{got[first : first + 8].hex()}, model {want[first : first + 8].hex()}"
        )

    def check_size(self, subject: Subject) -> None:
        size = os.fstat(self.random.choice(subject.handles).fd).st_size
        if size != subject.base + subject.size:
            raise Mismatch(f"{subject.path}: size {size - subject.base}, model {subject.size} (from {subject.base})")

    def check(self, subject: Subject) -> str:
        self.compare(subject, 0, os.pread(self.handle(subject).fd, WINDOW + 1, subject.base), WINDOW + 1, "check")
        if subject.base:
            low = os.pread(self.handle(subject).fd, BLOCK, subject.base - BLOCK)
            if low.strip(b"\0") or len(low) != BLOCK:
                raise Mismatch(f"{subject.path}: bytes before the window are not zero")
        self.check_size(subject)
        return "check"

    # -- operations: each does it to the file and to the model, and returns its own description ----------------------

    def write(self, subject: Subject) -> str:
        at, length = self.span()
        data = self.random.randbytes(length)
        done = os.pwrite(self.handle(subject).fd, data, subject.base + at)
        if done != length:
            raise Mismatch(f"wrote {done} of {length}")
        subject.put(at, data)
        return f"write [{at:#x}, {at + length:#x})"

    def writev(self, subject: Subject) -> str:
        at, length = self.span()
        data = self.random.randbytes(length)
        cut = self.random.randint(0, length)
        os.pwritev(self.handle(subject).fd, [data[:cut], data[cut:]], subject.base + at)
        subject.put(at, data)
        return f"writev [{at:#x}, {at + length:#x}) in two at {cut}"

    def append(self, subject: Subject) -> str:
        if subject.size >= WINDOW:
            return self.truncate(subject)
        at, length = subject.size, self.length(WINDOW - subject.size)
        data = self.random.randbytes(length)
        os.write(self.handle(subject, append=True).fd, data)
        subject.put(at, data)
        return f"append [{at:#x}, {at + length:#x})"

    def write_direct(self, subject: Subject) -> str:
        at, length = self.aligned()
        append = self.random.random() < 0.1 and subject.size % BLOCK == 0 and subject.size + length <= WINDOW
        if append:
            at = subject.size
        data = self.random.randbytes(length)
        self.buffer[:length] = data
        handle = self.handle(subject, direct=True, append=append)
        with memoryview(self.buffer) as view, view[:length] as part:
            done = os.writev(handle.fd, [part]) if append else os.pwritev(handle.fd, [part], subject.base + at)
        if done != length:
            raise Mismatch(f"direct write of {length}: {done}")
        subject.put(at, data)
        return f"write_direct [{at:#x}, {at + length:#x}){' append' if append else ''}"

    def write_mapped(self, subject: Subject) -> str:
        if not subject.size:
            return self.write(subject)
        at, length = self.span(subject.size)
        data = self.random.randbytes(length)
        self.mapped(subject, at + length)[at : at + length] = data
        subject.put(at, data)
        return f"write_mapped [{at:#x}, {at + length:#x})"

    def read(self, subject: Subject) -> str:
        at, length = self.span()
        handle = self.random.choice([h for h in subject.handles if not h.direct] or [self.handle(subject)])
        self.compare(subject, at, os.pread(handle.fd, length, subject.base + at), length, "read")
        return f"read [{at:#x}, {at + length:#x})"

    def readv(self, subject: Subject) -> str:
        at, length = self.span()
        cut = self.random.randint(1, length)
        parts = [bytearray(cut), bytearray(length - cut)]
        done = os.preadv(self.handle(subject).fd, parts, subject.base + at)
        self.compare(subject, at, (parts[0] + parts[1])[:done], length, "readv")
        return f"readv [{at:#x}, {at + length:#x})"

    def read_direct(self, subject: Subject) -> str:
        at, length = self.aligned()
        with memoryview(self.buffer) as view, view[:length] as part:
            done = os.preadv(self.handle(subject, direct=True).fd, [part], subject.base + at)
        self.compare(subject, at, self.buffer[:done], length, "read_direct")
        return f"read_direct [{at:#x}, {at + length:#x})"

    def read_mapped(self, subject: Subject) -> str:
        if not subject.size:
            return self.read(subject)
        at, length = self.span(subject.size)
        self.compare(subject, at, self.mapped(subject, at + length)[at : at + length], length, "read_mapped")
        return f"read_mapped [{at:#x}, {at + length:#x})"

    def read_private(self, subject: Subject) -> str:
        """A private mapping: reads see the file, writes stay private."""
        if not subject.size:
            return self.read(subject)
        at, length = self.span(subject.size)
        with mmap.mmap(self.handle(subject).fd, subject.size, mmap.MAP_PRIVATE, offset=subject.base) as private:
            self.compare(subject, at, private[at : at + length], length, "read_private")
            private[at : at + length] = bytes(length)
        return f"read_private [{at:#x}, {at + length:#x})"

    def splice(self, subject: Subject) -> str:
        at, length = self.span()
        length = min(length, 64 * 1024)  # of a pipe
        out, into = os.pipe()
        try:
            got = b""
            while len(got) < length:
                moved = os.splice(self.handle(subject).fd, into, length - len(got), offset_src=subject.base + at + len(got))
                if not moved:
                    break
                got += os.read(out, moved)
        finally:
            os.close(out)
            os.close(into)
        self.compare(subject, at, got, length, "splice")
        return f"splice [{at:#x}, {at + length:#x})"

    def truncate(self, subject: Subject) -> str:
        size = self.offset(WINDOW)
        os.ftruncate(self.random.choice(subject.handles).fd, subject.base + size)
        subject.resize(size)
        return f"truncate {size:#x}"

    def truncate_path(self, subject: Subject) -> str:
        size = self.offset(WINDOW)
        os.truncate(subject.place(), subject.base + size)
        subject.resize(size)
        return f"truncate_path {size:#x}"

    def punch(self, subject: Subject) -> str:
        at, length = self.span()
        mode = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE
        syscalls.fallocate(self.handle(subject).fd, mode, subject.base + at, length)
        subject.punch(at, length)
        return f"punch [{at:#x}, {at + length:#x})"

    def zero(self, subject: Subject) -> str:
        if not self.has_zero_range:
            return self.punch(subject)
        at, length = self.span()
        keep = self.random.choice((0, syscalls.KEEP_SIZE))
        syscalls.fallocate(self.handle(subject).fd, syscalls.ZERO_RANGE | keep, subject.base + at, length)
        subject.clear(at, length)
        if not keep:
            subject.grow(at + length)
        return f"zero [{at:#x}, {at + length:#x}){' keep size' if keep else ''}"

    def allocate(self, subject: Subject) -> str:
        at, length = self.span()
        keep = self.random.choice((0, syscalls.KEEP_SIZE))
        syscalls.fallocate(self.handle(subject).fd, keep, subject.base + at, length)
        if not keep:
            subject.grow(at + length)
        return f"allocate [{at:#x}, {at + length:#x}){' keep size' if keep else ''}"

    def copy(self, subject: Subject) -> str:
        return self._copy(self.random.choice([s for s in self.subjects if s is not subject]), subject)

    def copy_within(self, subject: Subject) -> str:
        return self._copy(subject, subject)

    def _copy(self, source: Subject, target: Subject) -> str:
        if not source.size:
            return self.write(source)
        from_at, length = self.span(source.size)
        to_at = self.offset(WINDOW - length)
        if source is target and abs(from_at - to_at) < length:  # overlap is EINVAL
            return self.write(source)
        done, wanted = 0, length
        while done < wanted:
            n = os.copy_file_range(
                self.handle(source).fd, self.handle(target).fd, wanted - done,
                source.base + from_at + done, target.base + to_at + done,
            )  # fmt: skip
            if not n:
                raise Mismatch(f"copy_file_range from {source.path} stopped at {done} of {wanted}")
            done += n
        target.put(to_at, bytes(source.data[from_at : from_at + length]))
        name = os.path.basename(source.path)
        return f"copy {name} [{from_at:#x}, {from_at + length:#x}) to [{to_at:#x}, {to_at + length:#x})"

    def seek(self, subject: Subject) -> str:
        """What SEEK_DATA and SEEK_HOLE pass over as a hole must be zero in the model."""
        fd, at = self.handle(subject).fd, self.offset(WINDOW)
        if at >= subject.size:
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                try:
                    found = os.lseek(fd, subject.base + at, whence)
                    raise Mismatch(f"lseek({at}, {whence}) beyond the end of {subject.path}: {found}")
                except OSError as problem:
                    if problem.errno != errno.ENXIO:
                        raise
            return f"seek {at:#x} beyond the end"
        try:
            data = os.lseek(fd, subject.base + at, os.SEEK_DATA) - subject.base
        except OSError as problem:
            if problem.errno != errno.ENXIO:
                raise
            data = subject.size
        hole = os.lseek(fd, subject.base + at, os.SEEK_HOLE) - subject.base
        if data < at or data > subject.size or hole < at or hole > subject.size or (data > at) == (hole > at):
            raise Mismatch(f"{subject.path}: from {at:#x} data at {data:#x}, hole at {hole:#x}, size {subject.size:#x}")
        if subject.data[at:data].strip(b"\0"):
            raise Mismatch(f"{subject.path}: [{at:#x}, {data:#x}) is said to be a hole, but the model has data there")
        if data == at and hole < subject.size and subject.data[hole : hole - hole % BLOCK + BLOCK].strip(b"\0"):
            raise Mismatch(f"{subject.path}: a hole is said to start at {hole:#x}, but the model has data there")
        return f"seek {at:#x}: data {data:#x}, hole {hole:#x}"

    def sync(self, subject: Subject) -> str:
        fd = self.random.choice(subject.handles).fd
        how = self.random.choice((os.fsync, os.fdatasync))
        how(fd)
        if subject.mapping is not None and self.random.random() < 0.5:
            subject.mapping.flush()
        return how.__name__

    def reopen(self, subject: Subject) -> str:
        """Close one descriptor (when others keep the file, or it has its name) and open another."""
        if len(subject.handles) > 1:
            os.close(subject.handles.pop(self.random.randrange(len(subject.handles))).fd)
        elif subject.named:
            subject.unmap()
            os.close(subject.handles.pop().fd)
        flags = self.random.choice(FLAGS)
        self._open(subject, flags)
        if flags & os.O_TRUNC:
            subject.resize(0)
            if subject.base:
                os.ftruncate(subject.handles[-1].fd, subject.base)
        return f"reopen flags {flags:#o}"

    def duplicate(self, subject: Subject) -> str:
        old = self.random.choice(subject.handles)
        new = Handle(os.dup(old.fd), 0)
        new.direct, new.append = old.direct, old.append
        os.close(old.fd)
        subject.handles[subject.handles.index(old)] = new
        return "duplicate and close"

    def remap(self, subject: Subject) -> str:
        subject.unmap()
        return "unmap"

    def forget_name(self, subject: Subject) -> str:
        """Unlink the open file and go on; or, if it has no name, drop it and create a new one."""
        if subject.named:
            os.unlink(subject.path)
            subject.named = False
            return "unlink, still open"
        subject.close()
        subject.create()
        return "last close of the unlinked file, new file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--operations", type=int, default=10_000)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.operations} operations in {options.directory}", flush=True)
    exerciser = Exerciser(options.directory, options.seed)
    try:
        exerciser.run(options.operations)
    except Mismatch as problem:
        sys.exit(f"FAILED: {problem}")
    exerciser.close()
    print("ok")


if __name__ == "__main__":
    main()
