"""One journalled change of a volume: whole or absent.

    with volume.transaction(now) as txn:
        runs = txn.take(3)            # allocate; given back if the transaction fails
        txn.fresh(at, data)           # fill blocks that nothing refers to yet
        txn.write(at, data)           # overwrite what is referred to: a redo record
        txn.dirty(inode)              # its record and extent leaves are stored at commit
        txn.free(runs)                # after commit: to the allocator, or busy where pinned

Leaving the block commits. An exception aborts: nothing is on media, the blocks are free again, and every inode and directory
that took part reads itself from media anew. An exception after the commit point is a bug: the volume turns read-only.
Blocks freed here are not reused before the commit, and an allocation never waits for them.
What is gathered until then, and how, is compiled: gathered.pyx.
"""

from __future__ import annotations

from types import TracebackType

from daxfs.core.alloc import Run
from daxfs.core.gathered import Gathered
from daxfs.errors import Corrupt, FsError, NoSpace


class Transaction(Gathered):
    """See the module. `now` is the time of the call, ns since 1970."""

    __slots__ = ()

    def fresh(self, at: int, data: bytes | bytearray | memoryview) -> None:
        """Store right away into blocks that nothing on media refers to before the commit."""
        pmem = self._volume.pmem
        pmem.store(at, data)
        pmem.flush(at, len(data))

    def take(self, count: int, goal: int = 0, *, meta: bool = False, owner: int = 0) -> list[Run]:
        """Allocate blocks (alloc.Allocator.take)."""
        alloc = self._volume.alloc
        runs = alloc.take(count, goal, meta=meta, owner=owner)
        try:
            self._reserve(runs)
        except NoSpace:  # of the host: what was used before and is free again needs no more of it
            runs = alloc.take_lowest(count, meta=meta)
            self._reserve(runs)
        self.took(runs)
        return runs

    def _reserve(self, runs: list[Run]) -> None:
        """Have the host's disk behind blocks that were taken; else they are given back. NoSpace."""
        volume = self._volume
        try:
            for start, count in runs:
                volume.pmem.reserve(start << volume.block_shift, count << volume.block_shift)
        except BaseException:
            volume.alloc.give(runs)
            raise

    def take_block(self) -> int:
        """One block for metadata; it may come out of the reserve."""
        return self.take(1, meta=True)[0][0]

    def take_chunk(self, count: int) -> int:
        """`count` metadata blocks in a row."""
        start = self._volume.alloc.take_chunk(count)
        self._reserve([(start, count)])
        self.took([(start, count)])
        return start

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        volume = self._volume
        volume.open_transactions -= 1
        if kind is not None:
            self._abort()
            return
        sequence = volume.journal.sequence
        try:
            for inode in list(self._inodes.values()):
                inode.store(self)
            if self._freed or self._freed_unsafe:
                self._check_freed()
            if self._records:
                volume.journal.commit(self._records)  # whose first fence is that of the fresh blocks, too
        except BaseException as e:
            if volume.journal.sequence == sequence:
                self._abort()
            else:  # past the commit point: the next mount completes it
                volume.fail(f"within a commit: {e!r}")
            raise
        self._finish()

    def _check_freed(self) -> None:
        """Corrupt if a block is freed twice: only an image on which two files own it can ask for that."""
        freed = sorted([*(self._freed or ()), *(self._freed_unsafe or ())])
        wrong = self._volume.first_unowned(freed) if freed else None
        if wrong is not None:
            raise Corrupt(f"blocks {wrong[0]}+{wrong[1]} are freed, but belong to somebody else as well, or to nobody")

    def _finish(self) -> None:
        volume = self._volume
        try:
            for inode in self._inodes.values():
                inode.committed()
            for _, count in self._taken or ():
                volume.owned += count
            if self._freed:
                self._give_up(self._freed)
                volume.release(self._freed)
            if self._freed_unsafe:
                volume.unsafe = True
                self._give_up(self._freed_unsafe)
                volume.give(self._freed_unsafe)
            if self._freed_numbers:
                volume.give_numbers(self._freed_numbers)
        except BaseException as e:
            volume.fail(f"after a commit: {e!r}")
            raise

    def _give_up(self, runs: list[Run]) -> None:
        self._volume.owned -= sum(count for _, count in runs)

    def _abort(self) -> None:
        volume = self._volume
        volume.alloc.give(self._taken or [])
        volume.free_inodes.extend(reversed(self._taken_numbers or ()))
        for what in [*self._touched, *self._inodes.values()]:
            try:
                what.revert()
            except FsError as e:  # media are not what they were when the transaction began
                volume.fail(f"an aborted change cannot be undone: {e.why}")
