"""What a call of the core costs, without a mount: python -m tools.core_bench [--calls N] [--only WORD] [--profile ROW]

Makes an image in /dev/shm, calls the verbs that the daemon calls, as it calls them, and prints CPU time per call (user and
system, of this process): the best of some rounds, since anything else that runs only adds. `--profile` prints where one
row's time goes (cProfile, which weighs small functions too much).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from daxfs import abi
from daxfs.core import attributes, fileops, holding, namespace
from daxfs.core.attributes import Attributes
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume

NOW = 1_700_000_000_000_000_000
IMAGE_BYTES = 4 << 30
ROUNDS = 5
CALLER = Caller(0, 0, 0o022)
BLOCK = bytes(range(256)) * 16
MEGABYTE = BLOCK * 256

Step = Callable[[int], object]  # the i-th call of a row


@dataclass(frozen=True)
class Row:
    """`prepare` and `after` are not measured; `share`: of the calls that others get, as this one is long."""

    name: str
    step: Step
    prepare: Step | None = None
    after: Step | None = None
    share: float = 1.0


class Bench:
    """The rows on one volume. Files are numbered; `files` are those that the row's calls are about."""

    def __init__(self, vol: Volume) -> None:
        self.vol = vol
        self.files: list[Inode] = []
        self.directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, CALLER)
        self.file = self._make(b"kept")
        fileops.write(vol, NOW, self.file, 0, MEGABYTE)

    def _make(self, name: bytes) -> Inode:
        return namespace.create(self.vol, NOW, self.directory, name, 0o100644, CALLER)

    def _end(self, name: bytes) -> None:
        inode = namespace.lookup(self.vol, self.directory, name)
        assert inode is not None
        namespace.unlink(self.vol, NOW, self.directory, name)
        fileops.reap(self.vol, NOW, inode)

    def _made(self, i: int) -> None:
        self.files.append(self._make(b"file%07d" % i))

    def _made_full(self, i: int) -> None:
        self._made(i)
        fileops.write(self.vol, NOW, self.files[-1], 0, BLOCK)

    def _gone(self, i: int) -> None:
        self._end(b"file%07d" % i)

    def _renamed_gone(self, i: int) -> None:
        self._end(b"other%07d" % i)

    def _truncate(self, inode: Inode, size: int) -> None:
        attributes.setattr(self.vol, NOW, inode, Attributes(size=size))

    def _pinned(self, _: int) -> None:
        taken = holding.pin(self.vol, NOW, self.file, 0, 65536, abi.FOLL_PIN | abi.FOLL_WRITE, 1, Holder(1), writable=True)
        holding.unpin(self.vol, NOW, 1, taken.id)

    def _directory_and_back(self, i: int) -> None:
        namespace.mkdir(self.vol, NOW, self.directory, b"sub", 0o755, CALLER)
        inode = namespace.lookup(self.vol, self.directory, b"sub")
        assert inode is not None
        namespace.rmdir(self.vol, NOW, self.directory, b"sub")
        fileops.reap(self.vol, NOW, inode)

    def rows(self) -> Iterator[Row]:
        vol, write, parent = self.vol, fileops.write, self.directory
        yield Row("create", self._made, after=self._gone)
        yield Row("lookup", lambda i: namespace.lookup(vol, parent, b"file%07d" % i), self._made, self._gone)
        yield Row("lookup, no such name", lambda i: namespace.lookup(vol, parent, b"none%07d" % i))
        yield Row("write 4k, new file", lambda i: write(vol, NOW, self.files[i], 0, BLOCK), self._made, self._gone)
        yield Row("append 4k", lambda i: write(vol, NOW, self.file, self.file.size, BLOCK),
                  after=lambda i: self._truncate(self.file, 1 << 20))  # fmt: skip
        yield Row("overwrite 4k", lambda i: write(vol, NOW, self.file, i % 256 * 4096, BLOCK))
        yield Row("read 4k", lambda i: fileops.read(vol, self.file, i % 256 * 4096, 4096))
        yield Row("truncate to 0", lambda i: self._truncate(self.files[i], 0), self._made_full, self._gone)
        yield Row("truncate to 100", lambda i: self._truncate(self.files[i], 100), self._made_full, self._gone)
        yield Row("truncate up", lambda i: self._truncate(self.file, (1 << 20) + i),
                  after=lambda i: self._truncate(self.file, 1 << 20))  # fmt: skip
        yield Row("punch 4k", lambda i: fileops.fallocate(vol, NOW, self.files[i], 3, 0, 4096), self._made_full, self._gone)
        yield Row("rename", lambda i: namespace.rename(vol, NOW, parent, b"file%07d" % i, parent, b"other%07d" % i),
                  self._made, self._renamed_gone)  # fmt: skip
        yield Row("rename over a file", self._rename_over, self._made_twice, self._renamed_gone)
        yield Row("link", lambda i: namespace.link(vol, NOW, self.file, parent, b"link%07d" % i),
                  after=lambda i: namespace.unlink(vol, NOW, parent, b"link%07d" % i))  # fmt: skip
        yield Row("unlink and end", self._gone, self._made)
        yield Row("unlink and end, 4k", self._gone, self._made_full)
        yield Row("mkdir, rmdir and end", self._directory_and_back)
        yield Row("setxattr", lambda i: attributes.setxattr(vol, NOW, self.file, b"user.n", b"%d" % i))
        yield Row("chmod", lambda i: attributes.setattr(vol, NOW, self.file, Attributes(mode=0o600 + (i & 1))))
        yield Row("pin and unpin 64k", self._pinned)
        yield Row("create, write 4k", self._made_full, after=self._gone)
        yield Row("write 1M, new file", lambda i: write(vol, NOW, self.files[i], 0, MEGABYTE), self._made, self._gone,
                  share=0.05)  # fmt: skip
        yield Row("append 1M, new space", lambda i: write(vol, NOW, self.file, self.file.size, MEGABYTE), share=0.02)

    def _made_twice(self, i: int) -> None:
        self._made(i)
        self._make(b"other%07d" % i)

    def _rename_over(self, i: int) -> None:
        namespace.rename(self.vol, NOW, self.directory, b"file%07d" % i, self.directory, b"other%07d" % i)

    def measure(self, row: Row, calls: int) -> float:
        """CPU seconds per call."""
        calls = max(1, int(calls * row.share))
        self.files = []
        for i in range(calls if row.prepare else 0):
            assert row.prepare is not None
            row.prepare(i)
        began = time.process_time()
        for i in range(calls):
            row.step(i)
        took = time.process_time() - began
        for i in range(calls if row.after else 0):
            assert row.after is not None
            row.after(i)
        for inode in self.vol.in_memory():
            if inode.nlink == 0:
                fileops.reap(self.vol, NOW, inode)
        return took / calls


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="per row and round")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--dir", default="/dev/shm", help="where the image is made")
    options = parser.parse_args(None if arguments is None else list(arguments))
    with tempfile.TemporaryDirectory(prefix="daxfs-core-bench-", dir=options.dir) as scratch:
        image = Path(scratch) / "image"
        format_image(image, IMAGE_BYTES, now=NOW)
        volume = Volume.open(image, now=NOW)
        bench = Bench(volume)
        for row in bench.rows():
            if options.only in row.name:
                _show(bench, row, options.calls, profile=options.profile)
        volume.check()
        volume.close(NOW)


def _show(bench: Bench, row: Row, calls: int, *, profile: bool) -> None:
    best = min(bench.measure(row, calls) for _ in range(ROUNDS))
    print(f"{row.name:24} {best * 1e6:9.2f} us", flush=True)
    if profile:
        profiler = cProfile.Profile()
        step = row.step
        bench.measure(Row(row.name, lambda i: profiler.runcall(step, i), row.prepare, row.after, row.share), calls)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(24)


if __name__ == "__main__":
    main()
