"""One mounted image: its parts, its life, and what holds for all of it.

Life: open (superblock, journal replay, inode directory, scan or snapshot, ledger) -> armed (a crash from here on counts
as a dirty shutdown) -> changed by transactions, one at a time -> closed cleanly (snapshot of free space, disarmed).

Invariant (I1): a block is in exactly one of {metadata, owned by one file, busy, free, retired (poisoned)}. `check()` proves
it against media. A volume that met an unexpected error (`fail`) refuses all further changes; what is on media stays
readable.

Not here: the verbs (namespace.py, fileops.py, attributes.py), pins' verbs (holding.py), waiting and callers (the daemon).
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, MutableSequence
from typing import TYPE_CHECKING

import numpy as np

from daxfs import abi
from daxfs.core import layout, scan, snapshot, superblock
from daxfs.core.alloc import Allocator, Run
from daxfs.core.breaking import Break, outcome_of
from daxfs.core.busy import BusyList
from daxfs.core.events import Event, EventQueues
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.journal import Journal
from daxfs.core.layout import CHUNK_INODES, INODE_SIZE, ROOT_INO
from daxfs.core.leases import Lease, Leases
from daxfs.core.ledger import Entry, Ledger
from daxfs.core.pins import Holder, Pin, PinTable
from daxfs.core.pmem import Pmem
from daxfs.core.poison import Poison
from daxfs.core.policy import Operation, Outcome, Settings
from daxfs.core.runs import RunSet, first_astray
from daxfs.core.transaction import Transaction
from daxfs.core.waiting import EVERYTHING, SPACE, Moved, unheard
from daxfs.errors import BadHandle, Corrupt, FsError, ImageError, NoSpace, ReadOnly

if TYPE_CHECKING:
    from daxfs.core.superblock import Superblock

__all__ = ["Transaction", "Volume", "format_image"]

_GENERATION_AT = layout.INODE.offset["generation"]  # the mode comes next
_IDIR_LOOK = 1 << 16  # bytes of the inode directory behind its end that each mount looks at
_LEDGER_BLOCKS_MAX = 1 << 32  # each block counted once for each pin: what mounting may have to count


class Volume:
    """See the module. Made by `open`."""

    def __init__(self, pmem: Pmem, sb: Superblock) -> None:
        self.pmem = pmem
        self.sb = sb
        self.readonly = pmem.readonly
        self.failed = ""  # why the volume refuses changes
        self.unsafe = False  # policy `unsafe` has freed pinned blocks
        self.open_transactions = 0  # more than one: one within another
        self.block_size: int = sb["block_size"]
        self.block_shift = self.block_size.bit_length() - 1
        self.leaf_capacity = layout.leaf_capacity(self.block_size)
        self.blocks: int = sb["blocks"]
        self.data_blocks = range(sb["data_start"], self.blocks)
        self._idir = range(sb["idir_start"] * self.block_size, (sb["idir_start"] + sb["idir_blocks"]) * self.block_size)
        self.uuid: bytes = sb["uuid"]
        self.journal = Journal(pmem, sb["journal_start"], sb["journal_blocks"], self.block_size,
                               self.blocks * self.block_size)  # fmt: skip
        self.alloc = Allocator(sb["data_start"], self.blocks)
        self.ledger = Ledger(self)
        self.owned = 0  # blocks of files and of the volume itself: counted by transactions, not made from the others
        self.on_moved: Moved = unheard  # see waiting.py
        self.rules = 0  # moves when calls that wait shall look again, whatever stands in their way
        self.pins = PinTable(self.blocks, self.moved)
        self.busy_list = BusyList(self.moved)
        self.poison = Poison(self.block_size)
        self.leaving = False  # the device is being removed: no new pins
        self.closed = False
        self.last_shutdown = ""  # how the mount before this one ended
        self.settings = Settings()
        self.events = EventQueues()
        self.leases = Leases(self._tell_lease, self.moved)
        self.breaks: dict[int, list[Break]] = {}  # by inode: layout changes that wait, so that new pins wait behind them
        self.unlinked: dict[int, Inode] = {}  # those in memory that have no link any more
        self.chunks: MutableSequence[int] = array("Q")  # first block of each chunk of inodes
        self.free_inodes: MutableSequence[int] = array("Q")  # the last is taken first
        self._inodes: dict[int, Inode] = {}
        self.root: Inode

    # -- life --

    @classmethod
    def open(cls, image: str | os.PathLike[str] | Pmem, *, readonly: bool = False, hostsync: bool = False, now: int,
             boot_id: bytes = b"", lock: bool = True) -> Volume:  # fmt: skip
        """Mount an image, given its path or a medium that has it. `boot_id` (16 bytes) tells which boot of the host this
        is. ImageError says what is wrong."""
        pmem = image if isinstance(image, Pmem) else Pmem(image, readonly=readonly, hostsync=hostsync, lock=lock)
        try:
            try:
                volume = cls(pmem, superblock.load(pmem))
                volume._recover(now, boot_id or bytes(16))
            except (Corrupt, BadHandle) as e:
                raise ImageError(f"{pmem.path} is damaged: {e.why}; see: daxfs fsck {pmem.path}") from e
            except NoSpace as e:
                raise ImageError(f"{e.why}; make room there, or mount it read-only: -o ro") from None
            except MemoryError:
                raise ImageError(f"{pmem.path}: there is not enough memory to mount {pmem.size} bytes") from None
        except BaseException:
            pmem.close()
            raise
        return volume

    def _recover(self, now: int, boot_id: bytes) -> None:
        armed = self.sb["state"] == layout.STATE_MOUNTED
        self.last_shutdown = _last_shutdown(armed, self.sb["boot_id"] == boot_id)
        replayed = self.journal.replay()
        self._load_chunks()
        entries = self.ledger.load(boot_id)
        if not replayed and snapshot.load(self):
            orphans: list[int] = []
        else:
            self._check_end_of_chunks()
            found = scan.survey(self)
            self.alloc.free.load(*(np.ascontiguousarray(a, dtype=np.uint64) for a in found.gaps(self.blocks)))
            self.free_inodes = found.free_inodes
            orphans = found.orphans
        self._adopt(entries, now)
        self.owned = self.blocks - self.free - self.busy_list.blocks
        self.root = self.inode(ROOT_INO)
        if not self.root.is_dir or self.root.nlink == 0:
            raise Corrupt("the root inode is not a directory")
        if self.readonly:
            return
        self.pmem.reserve(0, self.journal.end)
        self.sb["mounts"] += 1
        self.sb["dirty_shutdowns"] += armed
        self.sb["state"] = layout.STATE_MOUNTED
        self.sb["boot_id"] = boot_id
        self.sb["snapshot_start"] = self.sb["snapshot_blocks"] = 0
        superblock.store(self.pmem, self.sb)
        self.ledger.renew(boot_id)  # by transactions: only an armed volume has one in its journal
        self.ledger.trim(now)
        for ino in orphans:
            self._reap_orphan(ino, now)

    def _adopt(self, entries: list[Entry], now: int) -> None:
        """Pins of holders that outlived a daemon: their blocks stay away from everybody, owned or busy."""
        by_pin: dict[int, Pin] = {}
        if sum(e.count for e in entries) > _LEDGER_BLOCKS_MAX:
            raise Corrupt("pin ledger: its pins cover more blocks than anybody could pin")
        for e in entries:
            holder = Holder(e.pid, "", e.started)
            pin = by_pin.setdefault(e.pin, Pin(e.pin, None, None, e.ino, 0, 0, e.flags, [], 0, holder, now))
            pin.runs.append((e.start, e.count))
            pin.entries.append(e.at)
            pin.blocks += e.count
            pin.length += e.count * self.block_size
        for pin in by_pin.values():
            self.pins.insert(pin)
            for run in pin.runs:
                self.busy_list.insert(self.alloc.free.remove(*run))

    def _reap_orphan(self, ino: int, now: int) -> None:
        with contextlib.suppress(FsError):  # its blocks stay taken; fsck tells
            self.end_inode(self.inode(ino), now)

    def _load_chunks(self) -> None:
        """Read the inode directory up to its first empty entry, which is found by halving: a large one is mostly empty."""
        at, low, high = self._idir.start, 0, len(self._idir) // 8
        while low < high:
            middle = (low + high) // 2
            if self.pmem.load_word(at + 8 * middle):
                low = middle + 1
            else:
                high = middle
        if not low:
            raise Corrupt("inode directory: it is empty")
        starts = scan.chunk_starts(np.array(self.pmem.words[at >> 3 : (at >> 3) + low], np.uint64))
        per_chunk = layout.chunk_blocks(self.block_size)
        outside = np.flatnonzero((starts < self.data_blocks.start) | (starts > self.blocks - per_chunk))
        if len(outside):
            raise Corrupt(f"inode directory: chunk {int(outside[0])} lies outside the image")
        if bool((np.diff(np.sort(starts)) < per_chunk).any()):
            raise Corrupt("inode directory: two chunks overlap")
        self.chunks = array("Q", starts.tobytes())
        self._check_end_of_chunks(_IDIR_LOOK)

    def _check_end_of_chunks(self, look: int | None = None) -> None:
        """That no entry comes after the last one; only the next `look` bytes, unless what is missing would be free space."""
        rest = self._idir[8 * len(self.chunks) :][:look]
        ranges = [(rest.start, rest.stop)] if look else self.pmem.written(rest.start, rest.stop)
        for first, end in ranges:  # a large one is a hole of the image's file
            for at in range(first >> 3, end >> 3, _IDIR_LOOK):
                if bool(np.array(self.pmem.words[at : min(at + _IDIR_LOOK, end >> 3)]).any()):
                    raise Corrupt("inode directory: an entry is missing")

    def close(self, now: int) -> None:
        """Unmount cleanly. After a failure the volume stays armed, so that the next mount scans it. Again: no effect."""
        if self.closed:
            return
        if not (self.readonly or self.failed):
            for inode in list(self._inodes.values()):
                if inode.nlink == 0 and not inode.dead:
                    self._reap_orphan(inode.ino, now)
            while self.free_unpinned(now, 1 << 20):
                pass
            self.alloc.give(self.poison.retired.runs())  # poison ends with the mount
            snapshot.store(self)
            self.sb["state"] = layout.STATE_CLEAN
            superblock.store(self.pmem, self.sb)
        self.closed = True
        self.set_hot()
        self.pmem.close()

    def fail(self, why: str) -> None:
        """Refuse all changes from now on, those that wait as well."""
        self.failed = self.failed or why
        self.set_hot()
        self.rules_changed(EVERYTHING)

    def leave(self) -> None:
        """The device is being removed: no new pins from now on."""
        self.leaving = True
        self.rules_changed(EVERYTHING)

    def set_hot(self, numbers: Iterable[int] | None = None) -> None:
        """Say anew what the native session may do with files in memory: all, or those of these numbers."""
        for ino in list(self._inodes if numbers is None else numbers):
            if ino in self._inodes:
                self._inodes[ino].set_hot()

    def transaction(self, now: int) -> Transaction:
        """ReadOnly if changes are refused."""
        if self.failed:
            raise ReadOnly(f"the volume is read-only: {self.failed}")
        if self.readonly:
            raise ReadOnly("the volume is mounted read-only")
        return Transaction(self, now)

    def check_writable(self) -> None:
        """ReadOnly if changes are refused."""
        if self.readonly or self.failed:
            raise ReadOnly(self.failed or "the volume is mounted read-only")

    # -- waiters --

    def moved(self, what: int) -> None:
        """Something that a call may wait for has come; what, see waiting.py. Called by the parts of the volume."""
        self.on_moved(what)

    def rules_changed(self, what: int) -> None:
        """Calls on an inode, or all (EVERYTHING), are decided by other rules from now on."""
        self.rules += 1
        self.moved(what)

    # -- holders --

    @property
    def policy(self) -> str:
        """The break policy of files that have none of their own."""
        return self.settings.policy

    def tell(self, pin: Pin, event: int) -> None:
        """Queue an event for the owner of a pin; a survivor has none."""
        if pin.owner is not None:
            self.events.push(pin.owner, Event(event, pin.id, pin.offset, pin.length))

    def _tell_lease(self, lease: Lease) -> None:
        offset, length = lease.first * self.block_size, lease.count * self.block_size
        self.events.push(lease.owner, Event(abi.EVENT_LEASE_BREAK, 0, offset, min(length, layout.FILE_SIZE_MAX)))

    # -- inodes --

    def inode_at(self, ino: int) -> int:
        """Address of an inode's record. BadHandle if there is no such number."""
        index, within = divmod(ino, CHUNK_INODES)
        if not ino > 0 or index >= len(self.chunks):
            raise BadHandle(f"no inode {ino}")
        return self.chunks[index] * self.block_size + within * INODE_SIZE

    def inode(self, ino: int) -> Inode:
        """The inode, from memory or media. BadHandle if it is free, Corrupt if it cannot be believed."""
        inode = self._inodes.get(ino)
        if inode is None:
            inode = Inode(self, ino, self.inode_at(ino))
            inode.load()
            self._inodes[ino] = inode
        return inode

    def new_inode(self, txn: Transaction, mode: int, uid: int, gid: int, *, rdev: int = 0, parent: int = 0) -> Inode:
        """A fresh inode of nlink 1 (2 for a directory), times `txn.now`. NoSpace."""
        if not self.free_inodes:
            self._add_chunk(txn.now)
        ino = self.free_inodes.pop()
        inode = Inode(self, ino, self.inode_at(ino))
        was = self.pmem.load_word(inode.at + _GENERATION_AT)  # and its mode
        if ino in self._inodes or was >> 32:
            raise Corrupt(f"inode {ino} is in use, but was said to be free")
        inode.generation = was % (1 << 32) % 0xFFFF_FFFF + 1
        inode.mode, inode.uid, inode.gid, inode.rdev, inode.parent = mode, uid, gid, rdev, parent
        inode.nlink = 2 if inode.is_dir else 1
        inode._born(txn.now)
        inode._attach()
        txn.dirty(inode)
        txn.took_number(ino)
        self._inodes[ino] = inode
        return inode

    def _add_chunk(self, now: int) -> None:
        per_chunk = layout.chunk_blocks(self.block_size)
        index = len(self.chunks)
        if 8 * index >= len(self._idir):
            raise NoSpace("the volume has no room for more inodes")
        at = self._idir[8 * index]
        if self.pmem.load_word(at):
            raise Corrupt("inode directory: an entry is missing")
        self.pmem.reserve(at, 8)
        with self.transaction(now) as txn:
            block = txn.take_chunk(per_chunk)
            txn.fresh(block * self.block_size, bytes(per_chunk * self.block_size))
            txn.write(at, layout.idir_word(index, block).to_bytes(8, "little"))
        self.chunks.append(block)
        first = index * CHUNK_INODES
        self.free_inodes.extend(range(first + CHUNK_INODES - 1, max(first, ROOT_INO + 1) - 1, -1))

    def in_memory(self) -> list[Inode]:
        """The inodes that somebody refers to, or did a moment ago."""
        return list(self._inodes.values())

    def drop(self, inode: Inode) -> None:
        """Out of the cache; what still has the object sees it dead or loads it anew."""
        inode.directory = None  # a cycle, which only the garbage collector would find
        self.alloc.let_go(inode.ino)
        if self._inodes.get(inode.ino) is inode:
            del self._inodes[inode.ino]
        self.unlinked.pop(inode.ino, None)

    def about_to_free(self) -> bool:
        """Whether an inode without a link or an open description is kept by no more than the kernel's lookups."""
        return any(not (inode.nlink or inode.opens or inode.dead) for inode in self.unlinked.values())

    def forget(self, inode: Inode) -> None:
        """Out of memory, if neither the kernel nor an open description refers to it."""
        if inode.nlookup == 0 and inode.opens == 0 and inode.ino != ROOT_INO:
            self.drop(inode)

    def end_inode(self, inode: Inode, now: int) -> None:
        """The last reference of an unlinked inode is gone: its blocks and its number are free, pinned blocks busy."""
        from daxfs.core import xattr

        unsafe = outcome_of(self, inode, Operation.END) is Outcome.IGNORE
        with self.transaction(now) as txn:
            txn.dirty(inode)
            mapped = inode.map
            if len(mapped):
                txn.free([(block, 1) for block in mapped.leaf_blocks()])
                txn.free(mapped.carve(0, 1 << 52), unsafe=unsafe)
                mapped.dropped()
            if inode.xattr_block:
                xattr.free_all(self, txn, inode)
            inode.dead = True
            txn.free_number(inode.ino)

    @property
    def ino_end(self) -> int:
        """One more than the largest inode number there can be now."""
        return len(self.chunks) * CHUNK_INODES

    @property
    def inodes_free(self) -> int:
        """How many more inodes there is room for."""
        chunks: int = self.sb["idir_blocks"] * self.block_size // 8 - len(self.chunks)
        chunks = min(chunks, self.alloc.available // layout.chunk_blocks(self.block_size))
        return len(self.free_inodes) + chunks * CHUNK_INODES

    @property
    def inodes(self) -> int:
        """Inodes in use, and those there is room for."""
        return self.ino_end - 1 - len(self.free_inodes) + self.inodes_free

    # -- space --

    @property
    def free(self) -> int:
        return self.alloc.blocks

    @property
    def busy(self) -> int:
        """Blocks that only pins keep: the busy list, and pinned blocks of files whose last name is gone."""
        return self.busy_list.blocks + sum(count for _, count in self._unlinked_runs())

    @property
    def pinned(self) -> int:
        return self.pins.blocks

    @property
    def used(self) -> int:
        """Blocks of files, metadata, and retired ones. With `free` and `busy` all there are, unless some were lost."""
        return self.owned + self.poison.retired.blocks - (self.busy - self.busy_list.blocks)

    def busy_runs(self) -> list[Run]:
        """All busy runs, sorted."""
        runs: list[Run] = sorted([*self.busy_list.extents.runs(), *self._unlinked_runs()])
        return runs

    def _unlinked_runs(self) -> list[Run]:
        """Pinned runs that an unlinked file still owns because a descriptor (its holder's, say) is open."""
        files = (inode for inode in self.unlinked.values() if self.pins.has_file(inode.ino))
        unlinked = [inode for inode in files if not (inode.nlink or inode.dead)]
        _, pinned = self.pins.counts.split([(start, count) for inode in unlinked for _, start, count, _ in inode.map])
        return pinned

    def release(self, runs: list[Run]) -> None:
        """Blocks that no file owns any more: idle ones are free, pinned ones busy."""
        idle, pinned = self.pins.counts.split(runs)
        self.give(idle)
        self.busy_list.insert(pinned)

    def first_unowned(self, runs: list[Run]) -> Run | None:
        """The first of these runs, which are in order, that overlaps the one before it, leaves the data region, or has a
        block that is free, busy or retired. None if there is none: so somebody has each."""
        astray = first_astray(runs, self.data_blocks.start, self.blocks)
        nobodys = (self.alloc, self.busy_list.extents, self.poison.retired)
        return astray or next(filter(None, [nobody.first_held(runs) for nobody in nobodys]), None)

    def give(self, runs: list[Run]) -> None:
        """Blocks that are nobody's: free, but for poisoned ones, which are retired."""
        self.alloc.give(self.poison.retire(runs))
        if runs:
            self.moved(SPACE)

    def give_numbers(self, numbers: list[int]) -> None:
        """Inode numbers that are nobody's."""
        self.free_inodes.extend(numbers)
        self.moved(SPACE)

    def free_unpinned(self, now: int, limit: int) -> bool:
        """Delayed free: go on with pins that leave, and give back busy runs whose last pin went, at most `limit` runs of
        each. Whether there are more."""
        idle, entries = self.pins.drop_some(limit)
        if entries and not (self.readonly or self.closed):
            self.ledger.void(entries)
        self.busy_list.unpinned(idle)
        self.give(self.busy_list.clear(limit))
        return self.pins.leaving or len(self.busy_list.due) > 0

    def facts(self) -> dict[str, str | int]:
        """What `daxfs info` says of any volume; counts are of blocks."""
        digits = self.uuid.hex()
        return {
            "uuid": "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])),
            "image": self.pmem.path,
            "label": self.sb["label"].rstrip(b"\0").decode(errors="replace"),
            "block_size": self.block_size,
            "blocks": self.blocks,
            "free": self.free,
            "used": self.used,
            "busy": self.busy,
            "pinned": self.pinned,
            "policy": self.policy,
            "mounts": self.sb["mounts"],
            "dirty_shutdowns": self.sb["dirty_shutdowns"],
        }

    # -- proof --

    def check(self) -> None:
        """Prove the invariants of all structures, and (I1) against media. ValueError or Corrupt says what is wrong."""
        self.alloc.check(self.blocks)
        self.busy_list.check()
        self.pins.check()
        self.poison.check()
        for inode in self._inodes.values():
            inode.map.check()
            if inode.directory is not None:
                inode.directory.check()
        found = scan.survey(self)
        starts, counts = found.gaps(self.blocks)
        unowned = RunSet()
        unowned.load(np.ascontiguousarray(starts, np.uint64), np.ascontiguousarray(counts, np.uint64))
        nobodys = {
            "free": self.alloc.runs(), "busy": self.busy_list.extents.runs(), "retired": self.poison.retired.runs(),
        }  # fmt: skip
        for what, runs in nobodys.items():
            for start, count in runs:
                if unowned.remove(start, count) != [(start, count)]:
                    raise ValueError(f"{what} run {start}+{count} has another owner")
                if what != "busy" and not self.unsafe and self.pins.counts.any(start, count):
                    raise ValueError(f"{what} run {start}+{count} is pinned")
        if unowned.blocks:
            raise ValueError(f"{unowned.blocks} blocks have no owner: {unowned.runs(0, 4)}")
        if self.free + self.used + self.busy != self.blocks:
            raise ValueError(f"free {self.free} + used {self.used} + busy {self.busy} are not {self.blocks} blocks")
        if sorted(found.free_inodes) != sorted(self.free_inodes):
            raise ValueError("the list of free inodes is not what media say")


def _last_shutdown(armed: bool, same_boot: bool) -> str:
    if not armed:
        return "clean"
    if same_boot:
        return "dirty: the daemon ended without closing the image (killed, crashed, or after a failure of the volume)"
    return "dirty: the host went down, or the image was copied, while it was mounted"
