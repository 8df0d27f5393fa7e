"""`fsck --repair`: layer by layer, each on what the one below has put right, until a check finds nothing.

Layers: superblock and journal; inode directory; inode records with their extents, leaves and xattrs; blocks with two owners;
pin ledger; missing chunks and the root; directory blocks; names and link counts; lost+found; the snapshot of free space.

Rules
- An image without errors is not written to, but for a committed transaction, which is applied as a mount would do it.
- Every change is a redo record of the journal, or goes to blocks that nothing refers to (a copy, a new directory block).
  Only the superblock's copies and a journal's header are stored directly: the first in turns, the other follows from it.
- No decision depends on what an earlier, interrupted repair remembered: it can be killed at any store and run again.
- Blocks are allocated only after everything that may be a file's is known.
- A volume that was not unmounted stays one: the next mount counts that, and frees what was unlinked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from daxfs.core import layout, scan, snapshot, superblock
from daxfs.core.fsck import blocks, names, pins, regions
from daxfs.core.fsck.batch import Batch
from daxfs.core.fsck.image import Image
from daxfs.core.fsck.records import InodeRepair
from daxfs.core.fsck.report import Array, Progress, Report
from daxfs.core.fsck.space import Owners, add_fixed, check_ledger, check_space, merged
from daxfs.core.fsck.superblocks import choose_superblock
from daxfs.core.fsck.table import DAMAGED, FREE, TableCheck
from daxfs.core.fsck.tree import TreeCheck
from daxfs.core.layout import ROOT_INO
from daxfs.core.ledger import block_header
from daxfs.core.pmem import Pmem
from daxfs.core.superblock import Superblock
from daxfs.core.volume import Volume
from daxfs.errors import Corrupt, NoSpace

_ROUNDS_MAX = 8
_LAYER_ROUNDS_MAX = 4
_SEARCHES_MAX = 16


def check_image(image: Image, report: Report, step: Progress) -> int:
    """All checks of an image whose superblock and journal were looked at. See TreeCheck.chunks_end."""
    owners = Owners()
    table = TableCheck(image, owners, report, step)
    tree = TreeCheck(image, table.inodes, table.extents, report, step)
    step("space", 0, 1)
    check_space(image, owners, table.inodes.in_state(FREE), table.inodes.in_state(DAMAGED), report)
    step("space", 1, 1)
    return tree.chunks_end


class Repair:
    """One repair of the volume on a medium that can be written. `report` gets what was found, done and left."""

    def __init__(self, pmem: Pmem, now: int, report: Report, step: Progress) -> None:
        self._pmem, self._now, self._report, self._step = pmem, now, report, step
        self._sb: Superblock = choose_superblock(pmem, report)
        self._seen: tuple[int, Batch] | None = None
        report.repaired = True

    def run(self) -> None:
        """Check; while there are errors, repair and check again. What is left then is reported so."""
        found = self._check()
        if not found.errors:
            if found.notes and self._pmem.load_word(self._commit_word()):
                regions.repair_journal(self._pmem, self._sb, self._report)
                found = self._check()
            self._adopt(found)
            return
        self._adopt(found)
        for _ in range(_ROUNDS_MAX):
            before = self._report.fixed
            self._repair()
            found = self._check()
            if not found.errors or self._report.fixed == before:
                break
        self._report.finish(found)

    def _commit_word(self) -> int:
        return int(self._sb["journal_start"]) * int(self._sb["block_size"]) + layout.JOURNAL_COMMIT_AT

    def _check(self) -> Report:
        """What a check of the image as it is now finds; a transaction that waits is replayed in a private copy."""
        report = Report(self._report.path)
        pmem = self._pmem.private()
        try:
            image = Image(pmem, choose_superblock(pmem, report), report)
            self._chunks_end = check_image(image, report, self._step)
        finally:
            pmem.close()
        return report

    def _adopt(self, found: Report) -> None:
        self._report.errors, self._report.notes = found.errors, found.notes
        self._report.findings[:0] = found.findings
        self._report.counts = found.counts

    # -- the layers --

    def _repair(self) -> None:
        report = self._report
        if not regions.copies_agree(self._pmem, self._sb):
            report.fix(f"superblock: copy {'AB'[self._sb['copy']]} was written over the other one")
        regions.disarm(self._pmem, self._sb)
        self._journal = regions.repair_journal(self._pmem, self._sb, report)
        self._batch = Batch(self._journal)
        self._look()
        self._chunks()
        self._inodes()
        self._shared_blocks()
        self._ledger()
        self._holes()
        self._root()
        self._directories()
        self._names()
        self._snapshot()
        self._pmem.sync()

    def _look(self) -> None:
        """Read the inode table anew, if anything was changed since the last time."""
        if self._seen == (self._report.fixed, self._batch):
            return
        self._seen = (self._report.fixed, self._batch)
        unheard = Report(self._report.path)
        self._batch.commit()
        self._image = Image(self._pmem, self._sb, unheard)
        self._owners = Owners()
        self._table = TableCheck(self._image, self._owners, unheard, self._step)
        add_fixed(self._image, self._owners)
        self._pins = check_ledger(self._image, self._owners, unheard)
        self._records = InodeRepair(self._image, self._owners.covered(), self._batch, self._report)

    def _chunks(self) -> None:
        """What was lost is looked for, and what the directories found by that lead to, and so on."""
        looked_for = -1
        for _ in range(_SEARCHES_MAX):
            missing = regions.missing_chunks(self._image, self._table.foreign, self._chunks_end)
            if len(missing) == looked_for or not len(missing):
                return
            owned = self._beyond_doubt()
            found = regions.find_chunks(self._image, missing, owned, self._batch, self._report, self._step)
            looked_for = len(missing) - found
            self._look()
            unheard = Report(self._report.path)
            tree = TreeCheck(self._image, self._table.inodes, self._table.extents, unheard, self._step)
            self._chunks_end = max(self._chunks_end, tree.chunks_end)

    def _beyond_doubt(self) -> Array:
        """Runs (start, end) that inodes have with which nothing is wrong, and whose blocks nobody else claims."""
        extents = self._table.extents
        which, _ = blocks.contested(self._owners, extents)
        flagged = self._table.inodes.rows(np.array(sorted(self._table.flagged), np.int64))
        sound = ~np.isin(extents.row, np.concatenate((extents.row[which], flagged)))
        starts, ends = extents.physical[sound], (extents.physical + extents.count)[sound]
        order = np.argsort(starts)
        return merged(starts[order], ends[order])

    def _inodes(self) -> None:
        """Each flagged inode by itself; twice if one takes what another was believed to have."""
        for _ in range(_LAYER_ROUNDS_MAX):
            flagged = sorted(self._table.flagged)
            for done, ino in enumerate(flagged):
                self._step("repairing inodes", done, len(flagged))
                said = self._report.fixed
                self._records.repair(ino)
                if self._report.fixed == said:
                    self._report.fix(f"inode {ino}: its record was written anew")
            if not flagged:
                return
            self._look()

    def _shared_blocks(self) -> None:
        for _ in range(_LAYER_ROUNDS_MAX):
            which, metadata = blocks.contested(self._owners, self._table.extents)
            if not len(which):
                return
            volume = self._volume()
            for ino, cuts in blocks.losses(self._image, self._table.inodes, self._table.extents, which, metadata):
                self._step("blocks with two owners", 0, len(which))
                blocks.settle(volume, self._now, ino, cuts, self._report)
            self._look()
            self._inodes()

    def _ledger(self) -> None:
        volume = self._volume()
        start = pins.repair_ledger(self._image, volume.alloc.free, self._batch, self._report)
        if not start:
            try:
                start = volume.alloc.take_chunk(1)
            except NoSpace as e:
                self._report.leave(f"pin ledger: there is no room for a new one ({e.why})")
                return
            size = self._image.block_size
            self._pmem.fill_zero(start * size, size)
            self._pmem.store(start * size, block_header(start, self._sb["boot_id"]))
            self._pmem.flush(start * size, size)
            self._pmem.fence()
            self._sb["ledger"] = start
            superblock.store(self._pmem, self._sb)
            superblock.store(self._pmem, self._sb)
            self._report.fix(f"pin ledger: its first block was lost; a new one is at block {start}")
        self._look()

    def _holes(self) -> None:
        """Chunks that were not found: a new one where others follow, else no word."""
        image, report = self._image, self._report
        missing = regions.missing_chunks(image)
        holes, tail = regions.holes_and_tail(image.chunk_numbers, missing)
        if not len(missing) and not len(tail):
            return
        volume, length = self._volume(), image.per_chunk * image.block_size
        for index in tail[image.idir()[tail] != 0].tolist():
            self._batch.add([(image.idir_at(index), bytes(8))])
            report.fix(f"inode directory: chunk {index} is lost; its word is cleared")
        for index in holes.tolist():
            try:
                block = volume.alloc.take_chunk(image.per_chunk)
            except NoSpace as e:
                report.leave(f"inode directory: there is no room for a new chunk {index} ({e.why})")
                break
            self._pmem.fill_zero(block * image.block_size, length)
            self._pmem.flush(block * image.block_size, length)
            self._pmem.fence()
            self._batch.add([(image.idir_at(index), layout.idir_word(index, block).to_bytes(8, "little"))])
            report.fix(f"inode directory: chunk {index} is lost; an empty one is there now")
        self._look()

    def _root(self) -> None:
        rows = self._table.inodes.rows(np.array([ROOT_INO]))
        if rows[0] >= 0 and not (self._table.inodes.is_type(0o040000)[rows[0]]):
            self._records.make_root(self._now)
            self._look()
            self._inodes()

    def _directories(self) -> None:
        unheard = Report(self._report.path)
        self._tree = TreeCheck(self._image, self._table.inodes, self._table.extents, unheard, self._step, thorough=True)
        if self._tree.damaged:
            names.repair_blocks(self._image, self._table.inodes, self._tree, self._batch, self._report)
            self._batch.commit()
            self._tree = TreeCheck(self._image, self._table.inodes, self._table.extents, unheard, self._step, thorough=True)

    def _names(self) -> None:
        if self._table.inodes.rows(np.array([ROOT_INO]))[0] < 0:
            return  # there was no room for its chunk
        found = names.NameRepair(self._image, self._table.inodes, self._tree, self._records, self._batch, self._report)
        lost = found.repair()
        if lost:
            volume = self._volume()
            volume.root = volume.inode(ROOT_INO)
            names.connect(volume, self._now, lost, self._report)

    def _snapshot(self) -> None:
        """A clean volume gets its snapshot of free space again."""
        if self._sb["state"] != layout.STATE_CLEAN:
            return
        self._batch.commit()
        volume = Volume(self._pmem, self._sb)
        volume.chunks = Image(self._pmem, self._sb, Report(self._report.path)).chunk_blocks.tolist()
        try:
            pins = volume.ledger.load(self._sb["boot_id"])
            found = scan.survey(volume)
        except Corrupt:
            return  # the check that follows says it
        volume.free_inodes = found.free_inodes
        volume.alloc.free.load(*(np.ascontiguousarray(a, np.uint64) for a in found.gaps(volume.blocks)))
        if not [pin for pin in pins if volume.alloc.free.remove(pin.start, pin.count)]:  # none is busy
            snapshot.store(volume)
        superblock.store(self._pmem, self._sb)
        if self._sb["snapshot_start"]:
            self._report.fix("the snapshot of free space was made anew")

    def _volume(self) -> Volume:
        """The volume for the verbs of the core: what nobody has is free, but for what is pinned."""
        self._batch.commit()
        volume = Volume(self._pmem, self._sb)
        volume.journal = self._journal
        chunks = self._image.chunk_numbers
        volume.chunks = [0] * (int(chunks[-1]) + 1 if len(chunks) else 0)
        for number, block in zip(chunks.tolist(), self._image.chunk_blocks.tolist(), strict=True):
            volume.chunks[number] = block
        covered = self._owners.covered()
        starts = covered[:, 1]
        ends = np.append(covered[1:, 0], self._image.blocks)
        keep = ends > starts
        volume.alloc.free.load(np.ascontiguousarray(starts[keep], np.uint64),
                               np.ascontiguousarray((ends - starts)[keep], np.uint64))  # fmt: skip
        for run in self._pins:
            volume.alloc.free.remove(*run)
        volume.free_inodes = names.free_numbers(self._table.inodes)
        return volume


@contextmanager
def _opened(target: str | os.PathLike[str] | Pmem) -> Iterator[Pmem]:
    if isinstance(target, Pmem):
        yield target
        return
    pmem = Pmem(target)
    try:
        yield pmem
    finally:
        pmem.close()


def repair(target: str | os.PathLike[str] | Pmem, *, now: int, progress: Progress | None = None) -> Report:
    """Repair the image at a path, or on a medium that is open and not mounted. `now`: ns since 1970, for lost+found.

    Report.fixed counts what was done, Report.left the errors that are still there. ImageError: it cannot be repaired.
    """
    report = Report(target.path if isinstance(target, Pmem) else os.fspath(target))
    with _opened(target) as pmem:
        Repair(pmem, now, report, progress or (lambda what, done, total: None)).run()
    return report
