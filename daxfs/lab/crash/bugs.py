"""Seeded bugs: what has gone wrong in file systems for persistent memory, put into daxfs while it runs.

Each is a change of a few functions of the core (or of the medium), in the shape of what CrashMonkey (OSDI 2018),
Chipmunk (EuroSys 2023) and Vinter (ATC 2022) found in NOVA, PMFS, WineFS, SplitFS and others: mostly logic, some
flushes. They exist to show that the explorer finds such bugs, and how short a workload does.

`BUGS` has them by name; mutants.py applies them. No production code knows about this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from daxfs.core import fileops, layout, namespace, scan, snapshot, superblock, xattr
from daxfs.core.alloc import Run
from daxfs.core.directory import Directory
from daxfs.core.inode import Inode
from daxfs.core.journal import Journal
from daxfs.core.layout import TXN_HEADER, TXN_RECORD
from daxfs.core.ledger import Entry, Ledger
from daxfs.core.transaction import Transaction
from daxfs.core.volume import Volume
from daxfs.lab.crash.medium import RecordingPmem

Change = tuple[object, str, object]  # an object, the name of its attribute, what to put there


@dataclass(frozen=True)
class Bug:
    """`shape`: what goes wrong, in a sentence; `workload`: the shortest sequence of calls that is known to show it."""

    name: str
    shape: str
    workload: tuple[str, ...]
    changes: Callable[[], list[Change]]


BUGS: dict[str, Bug] = {}


def bug(shape: str, *workload: str) -> Callable[[Callable[[], list[Change]]], Callable[[], list[Change]]]:
    def add(changes: Callable[[], list[Change]]) -> Callable[[], list[Change]]:
        name = changes.__name__.replace("_", "-")
        BUGS[name] = Bug(name, shape, workload, changes)
        return changes

    return add


@contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    """With these attributes in place of the real ones, which may be inherited."""
    for target, name, _ in changes:
        if not hasattr(target, name):
            raise KeyError(name)
    was = [(target, name, vars(target).get(name)) for target, name, _ in changes]
    try:
        for target, name, value in changes:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in was:
            if value is None:
                delattr(target, name)
            else:
                setattr(target, name, value)


def _nothing(*_: object, **__: object) -> None:
    return None


# -- flushes --


@bug("the flush of a range that does not begin at a line leaves out its last line", "write_second")
def missing_tail_flush() -> list[Change]:
    real = RecordingPmem.flush

    def flush(self: RecordingPmem, at: int, n: int) -> None:
        real(self, at & -64, (n + 63) & -64)

    return [(RecordingPmem, "flush", flush)]


@bug("data written through one of two descriptors is left for the other one to flush", "write_second")
def second_descriptor_not_flushed() -> list[Change]:
    real = fileops._store

    def store(vol: Volume, inode: Inode, offset: int, data: memoryview) -> None:
        with changed([(RecordingPmem, "flush", _nothing)] if inode.opens > 1 else []):
            real(vol, inode, offset, data)

    return [(fileops, "_store", store)]


# -- names --


@bug("a rename first removes the old name, then enters the new one: a crash loses both", "rename")
def rename_loses_both_names() -> list[Change]:
    real = namespace._move

    def move(vol: Volume, txn: Transaction, parent: Inode, name: bytes, *rest: Any) -> None:
        with vol.transaction(txn.now) as first:
            namespace.index(vol, parent).remove(first, name)
        with changed([(Directory, "remove", _nothing)]):
            real(vol, txn, parent, name, *rest)

    return [(namespace, "_move", move)]


@bug("a rename first enters the new name, then removes the old one: a crash shows both", "rename_directory")
def rename_shows_both_names() -> list[Change]:
    real = namespace._move

    def move(vol: Volume, txn: Transaction, parent: Inode, name: bytes, *rest: Any) -> None:
        with changed([(Directory, "remove", _nothing)]), vol.transaction(txn.now) as first:
            real(vol, first, parent, name, *rest)
        namespace.index(vol, parent).remove(txn, name)

    return [(namespace, "_move", move)]


@bug("an exchange of two names is done one after the other", "rename_exchange")
def exchange_in_two_steps() -> list[Change]:
    real = namespace._replace

    def replace(txn: Transaction, directory: Directory, *rest: Any) -> None:
        with directory._vol.transaction(txn.now) as half:
            real(half, directory, *rest)

    return [(namespace, "_replace", replace)]


@bug("an unlink removes the entry first and lowers the link count behind it", "unlink_short")
def nlink_not_with_unlink() -> list[Change]:
    def unlink(vol: Volume, now: int, parent: Inode, name: bytes) -> None:
        directory, inode = namespace._found(vol, parent, name)
        with vol.transaction(now) as txn:
            directory.remove(txn, name)
            namespace._changed(txn, parent)
        with vol.transaction(now) as txn:
            namespace._unlinked(vol, txn, inode)

    return [(namespace, "unlink", unlink)]


@bug("a link raises the link count before its entry is there", "link")
def nlink_before_link() -> list[Change]:
    real = namespace._enter

    def enter(txn: Transaction, directory: Directory, parent: Inode, name: bytes, inode: Inode) -> None:
        with directory._vol.transaction(txn.now) as first:
            inode.store(first)
        real(txn, directory, parent, name, inode)

    return [(namespace, "_enter", enter)]


@bug("a directory entry is there before the inode that it names", "create")
def entry_before_inode() -> list[Change]:
    real = namespace._enter

    def enter(txn: Transaction, directory: Directory, *rest: Any) -> None:
        with directory._vol.transaction(txn.now) as first:
            real(first, directory, *rest)

    return [(namespace, "_enter", enter)]


@bug("a chunk of inodes is linked before it is cleared", "create", "mkdir")
def chunk_before_it_is_cleared() -> list[Change]:
    real, fresh = Volume._add_chunk, Transaction.fresh

    def add_chunk(volume: Volume, now: int) -> None:
        late: list[tuple[Any, ...]] = []
        with changed([(Transaction, "fresh", lambda *call: late.append(call))]):
            real(volume, now)
        for call in late:
            fresh(*call)

    return [(Volume, "_add_chunk", add_chunk)]


# -- data and space --


@bug("the new size and blocks are committed, then the data is stored: a crash shows what was there before", "write_far")
def data_after_commit() -> list[Change]:
    write, store = fileops.write, fileops._store

    def late(vol: Volume, *args: Any, **kwargs: Any) -> int:
        calls: list[tuple[Any, ...]] = []
        with changed([(fileops, "_store", lambda *call: calls.append(call))]):
            n = write(vol, *args, **kwargs)
        for call in calls:
            store(*call)
        vol.pmem.fence()
        return n

    return [(fileops, "write", late)]


@bug("a file grows without clearing what lies behind its old end: what a lost append left there shows", "append")
def stale_tail_exposed() -> list[Change]:
    return [(fileops, "_zero_old_tail", _nothing)]


@bug("a truncate clears the tail of its last block before the new size is committed", "truncate_down")
def truncate_before_commit() -> list[Change]:
    def zero(vol: Volume, txn: Transaction, inode: Inode, start: int, end: int) -> None:
        fileops._zero(vol, inode, start, end)
        vol.pmem.fence()

    return [(fileops, "_zero_by_record", zero)]


@bug("recovery resolves what a truncate gave up before it replays the metadata", "truncate_zero")
def truncate_list_before_metadata() -> list[Change]:
    replay, survey = Journal.replay, scan.survey
    late: list[Journal] = []

    def first(volume: Volume) -> scan.Survey:
        found = survey(volume)
        while late:
            replay(late.pop())
        return found

    return [(Journal, "replay", lambda self: late.append(self)), (scan, "survey", first)]


@bug("an extent leaf is overwritten in place instead of by way of the journal", "truncate_frag_tail")
def leaf_in_place() -> list[Change]:
    write = Transaction.write

    def in_place(txn: Transaction, at: int, data: bytes) -> None:
        if int.from_bytes(data[:4], "little") == layout.LEAF_MAGIC:
            txn.fresh(at, data)
        else:
            write(txn, at, data)

    return [(Transaction, "write", in_place)]


@bug("blocks that a call gives up are free, and used again, before its commit", "setxattr_chain")
def freed_before_commit() -> list[Change]:
    store = xattr._store

    def give(txn: Transaction, runs: list[Run], *, unsafe: bool = False) -> None:
        txn._volume.release(runs)

    def store_freed(vol: Volume, txn: Transaction, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        chain = [block for block, _ in xattr._chain(vol, inode)]
        xattr._free(txn, chain)
        with changed([(xattr, "_free", _nothing)]):
            store(vol, txn, inode, xattrs)

    return [(Transaction, "free", give), (xattr, "_store", store_freed)]


@bug("an inode refers to new xattr blocks before these are durable", "setxattr_large")
def xattr_chain_before_it_is_durable() -> list[Change]:
    real, committed = xattr._write_chain, Inode.committed
    late: list[tuple[Volume, int]] = []

    def write_chain(vol: Volume, txn: Transaction, inode: Inode, chain: list[int], pieces: list[bytes]) -> None:
        with changed([(RecordingPmem, "flush", _nothing)]):
            real(vol, txn, inode, chain, pieces)
        late.extend((vol, block) for block in chain)

    def flush(inode: Inode) -> None:
        committed(inode)
        while late:
            vol, block = late.pop()
            vol.pmem.flush(block * vol.block_size, vol.block_size)
            vol.pmem.fence()

    return [(xattr, "_write_chain", write_chain), (Inode, "committed", flush)]


# -- journal and recovery --


@bug("the commit word is stored ahead of the body of the transaction, without a fence between them", "chmod")
def commit_before_body() -> list[Change]:
    def commit(self: Journal, records: list[tuple[int, bytes]]) -> None:
        pmem, sequence = self._pmem, self.sequence
        body = b"".join(TXN_RECORD.struct.pack(at, len(data)) + data + bytes(-len(data) & 7) for at, data in records)
        head = TXN_HEADER.struct.pack(layout.TXN_MAGIC, 0, sequence, len(body), len(records))
        crc = crc32c(body, crc32c(head[8:], crc32c(head[:4])))
        self.sequence += 1
        pmem.store_word(self._word_at, sequence)
        pmem.flush(self._word_at, 8)
        pmem.store(self._body_at, head[:4] + crc.to_bytes(4, "little") + head[8:] + body)
        pmem.flush(self._body_at, TXN_HEADER.size + len(body))
        pmem.fence()
        self._apply(records)

    return [(Journal, "commit", commit)]


@bug("replay marks the journal as done, then applies it: a second crash loses the rest", "chmod")
def replay_not_idempotent() -> list[Change]:
    def replay(self: Journal) -> bool:
        records = [(at, bytes(data)) for at, data in self.pending()]
        self._apply([])
        for at, data in records:
            self._pmem.store(at, data)
            self._pmem.flush(at, len(data))
        self._pmem.fence()
        return bool(records)

    return [(Journal, "replay", replay)]


@bug("a mount takes the free-space snapshot of an older clean unmount for true after a dirty shutdown", "append_open")
def snapshot_after_dirty_shutdown() -> list[Change]:
    load = snapshot.load

    def trusting(volume: Volume) -> bool:
        newest = dict(volume.sb)
        other = volume.pmem.load((1 - newest["copy"]) * volume.block_size, layout.SUPERBLOCK.size)
        volume.sb.update(layout.SUPERBLOCK.unpack(other))
        found = load(volume)
        volume.sb.update(newest)
        return found or load(volume)

    return [(snapshot, "load", trusting)]


@bug("recovery leaves unlinked files that were open, and their blocks, behind", "unlink_file")
def orphan_leaked() -> list[Change]:
    return [(Volume, "_reap_orphan", _nothing)]


@bug("recovery rebuilds free space without the blocks of xattrs", "chmod")
def free_space_without_xattr_blocks() -> list[Change]:
    real = scan._chained_runs

    def chained(volume: Volume, batch: Any) -> Any:
        batch = batch.copy()
        batch["xattr_block"] = 0
        return real(volume, batch[batch["leaf"] != 0])

    return [(scan, "_chained_runs", chained)]


@bug("pins of before a power cut keep their blocks from everybody after it", "truncate_held")
def pins_survive_a_power_cut() -> list[Change]:
    real = Ledger.load

    def load(self: Ledger, boot_id: bytes) -> list[Entry]:
        at = self._volume.sb["ledger"] * self._volume.block_size
        head = layout.LEDGER_BLOCK.unpack(self._volume.pmem.load(at, layout.LEDGER_BLOCK.size))
        return real(self, head["boot_id"])

    return [(Ledger, "load", load)]


@bug("both superblocks are written together: a crash tears both", "remount")
def superblocks_together() -> list[Change]:
    real = superblock.store

    def store(pmem: RecordingPmem, sb: superblock.Superblock) -> None:
        with changed([(RecordingPmem, "fence", _nothing), (RecordingPmem, "flush", _nothing)]):
            real(pmem, sb)
            real(pmem, sb)
        for copy in (0, 1):
            pmem.flush(copy * sb["block_size"], layout.SUPERBLOCK.size)
        pmem.fence()

    return [(superblock, "store", store)]
