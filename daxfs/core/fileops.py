"""The data verbs of one file: read, write, truncate, fallocate, seek, copy.

Rules
- A call is one transaction, or no transaction at all when it only overwrites written blocks in place.
- What a call may have to wait for, and what it takes from holders, is seen to around its transaction: see breaking.py.
- Data goes into new blocks before the commit that makes them the file's; an overwrite is in place, so a pinned block stays.
- Bytes behind the end of file read zero: a truncate zeroes the tail of its last block, and whatever makes the file longer
  zeroes the old tail again (a holder may have written there).
- Unwritten blocks and holes read zero. Whole blocks that a call takes away go to `txn.free`: idle ones are free after the
  commit, pinned ones busy. Partial blocks are zeroed in place, and a holder sees that.

Not here: names (namespace.py), attributes (attributes.py), pins (holding.py). `now` is ns since 1970, offsets are bytes.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from daxfs.core import layout, privileges
from daxfs.core.breaking import ALL, CLEAR, NOBODY, Breaker, Cleared, clear_way
from daxfs.core.inode import Inode
from daxfs.core.policy import Operation, Outcome
from daxfs.core.volume import Transaction, Volume
from daxfs.errors import BadArgument, IsDirectory, NoSpace, NoSuchAddress, NotSupported, TooBig

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10
_COPY_BYTES = 1 << 20
_DAY = 86400 * 1_000_000_000


def read(vol: Volume, inode: Inode, offset: int, length: int) -> bytes:
    """At most `length` bytes, fewer at the end of file."""
    _must_be_file(inode)
    length = min(length, inode.size - offset)
    if length <= 0:
        return b""
    size, view = vol.block_size, vol.pmem.view
    first = offset // size
    count = -(-(offset + length) // size) - first
    out = bytearray(length)
    for logical, physical, n, unwritten in inode.map.overlaps(first, count):
        if unwritten:
            continue
        start = max(logical * size, offset)
        end = min((logical + n) * size, offset + length)
        at = physical * size + start - logical * size
        vol.poison.refuse(at, end - start)
        out[start - offset : end - offset] = view[at : at + end - start]
    return bytes(out)


def write(vol: Volume, now: int, inode: Inode, offset: int, data: bytes | memoryview, *, kill_priv: bool = False,
          keep_times: bool = False) -> int:  # fmt: skip
    """Write at `offset`; the bytes written, fewer only when the volume is full. `keep_times`: the caller sees to them.
    TooBig, NoSpace."""
    if not inode.is_file:
        _must_be_file(inode)
    if vol.readonly or vol.failed:
        vol.check_writable()
    if offset >= layout.FILE_SIZE_MAX and len(data):
        raise TooBig(f"a file has at most {layout.FILE_SIZE_MAX} bytes")
    data = memoryview(data)[: layout.FILE_SIZE_MAX - offset]
    if not data:
        return 0
    size, mapped = vol.block_size, inode.map
    first, end = offset // size, offset + len(data)
    count = -(-end // size) - first
    privileged = privileges.any_to_drop(vol, inode, kill_priv)
    if end <= inode.size and not privileged and mapped.written(first, count):
        _clear_poison(vol, inode, offset, end)
        _store(vol, inode, offset, data)
        moved = None if keep_times else now
        inode.touch_in_place(mtime=moved, ctime=moved)  # with a fence, for the data as well
        return len(data)
    with vol.transaction(now) as txn:
        gaps = mapped.gaps(first, count)
        data, gaps = _fit(vol, offset, data, gaps)
        end = offset + len(data)
        count = -(-end // size) - first
        _clear_poison(vol, inode, offset, end)
        _zero_old_tail(vol, inode, end)
        is_partial = offset % size or end % size
        if is_partial:
            _fill_edges(vol, inode, offset, end)
        _allocate(vol, txn, inode, gaps, unwritten=False)
        if is_partial:
            _zero_new_edges(vol, inode, gaps, offset, end)
        _store(vol, inode, offset, data)
        if gaps != [(first, count)]:
            mapped.convert(first, count, False)
        if end > inode.size:
            inode.size = end
        if not keep_times:
            inode.mtime = inode.ctime = now
        if privileged:
            privileges.drop(vol, txn, inode, kill_priv)
        txn.dirty(inode)
    return len(data)


def overwrite(vol: Volume, now: int, inode: Inode, offset: int, data: bytes) -> None:
    """Store bytes over written blocks within the file, and nothing else: no transaction, no privileges lost. Poisoned."""
    vol.check_writable()
    _clear_poison(vol, inode, offset, offset + len(data))
    _store(vol, inode, offset, memoryview(data))
    inode.touch_in_place(mtime=now, ctime=now)  # with a fence, for the data as well


def _clear_poison(vol: Volume, inode: Inode, offset: int, end: int) -> None:
    """A write is about to store a range: poisoned blocks of which nothing old will be left are sound. Poisoned if not all
    are."""
    if not vol.poison:
        return
    size = vol.block_size
    first, last = offset // size, -(-end // size)
    whole, renewed = range(-(-offset // size), end // size), []
    for logical, physical, n, unwritten in inode.map.overlaps(first, last - first):
        if not unwritten:
            kept = [block for block in {logical, logical + n - 1} if block not in whole]
            vol.poison.refuse_runs((physical + block - logical, 1) for block in kept)
        renewed.append((physical, n))
    if vol.poison.overwritten(renewed):
        inode.set_hot()


def _fit(vol: Volume, offset: int, data: memoryview, gaps: list[tuple[int, int]]
         ) -> tuple[memoryview, list[tuple[int, int]]]:  # fmt: skip
    """As much of a write as there is space for. NoSpace if that is nothing."""
    available = vol.alloc.available
    wanted = 0
    for _, count in gaps:
        wanted += count
    if wanted <= available:
        return data, gaps
    fitting = []
    for logical, count in gaps:
        if count > available:
            stop = (logical + available) * vol.block_size
            if stop <= offset:
                raise NoSpace("no space left on the volume")
            if available:
                fitting.append((logical, available))
            return data[: stop - offset], fitting
        fitting.append((logical, count))
        available -= count
    return data, fitting


def _allocate(vol: Volume, txn: Transaction, inode: Inode, gaps: list[tuple[int, int]], *, unwritten: bool) -> None:
    """Blocks for the holes of a file, close to what comes before each."""
    mapped = inode.map
    taken: list[tuple[int, int, int]] = []
    for logical, count in gaps:
        before = mapped.find(logical - 1) if logical else None
        goal = before[1] + (logical - before[0]) if before else (taken[-1][1] + taken[-1][2] if taken else 0)
        for start, length in txn.take(count, goal, owner=inode.ino):
            taken.append((logical, start, length))
            logical += length
    txn.dirty(inode)  # from here on an abort must forget what the map was told
    for logical, start, length in taken:
        mapped.insert(logical, start, length, unwritten)


def _store(vol: Volume, inode: Inode, offset: int, data: memoryview) -> None:
    """Put bytes into the mapped blocks behind a range."""
    size, pmem = vol.block_size, vol.pmem
    first = offset // size
    end = offset + len(data)
    for logical, physical, n, _ in inode.map.overlaps(first, -(-end // size) - first):
        start, stop = logical * size, (logical + n) * size
        at = physical * size
        if start < offset:
            at += offset - start
            start = offset
        if stop > end:
            stop = end
        pmem.store(at, data[start - offset : stop - offset])
        pmem.flush(at, stop - start)


def _zero(vol: Volume, inode: Inode, start: int, end: int, *, unwritten: bool = False) -> None:
    """Zero a range of bytes in place, where it is mapped and written (or, if asked, unwritten)."""
    if start >= end:
        return
    size, pmem = vol.block_size, vol.pmem
    first = start // size
    for logical, physical, n, fresh in inode.map.overlaps(first, -(-end // size) - first):
        if fresh and not unwritten:
            continue
        lo, hi = max(logical * size, start), min((logical + n) * size, end)
        at = physical * size + lo - logical * size
        vol.poison.refuse(at, hi - lo)
        pmem.fill_zero(at, hi - lo)
        pmem.flush(at, hi - lo)


def _zero_old_tail(vol: Volume, inode: Inode, end: int) -> None:
    """Before a file grows to `end`: nothing that lies behind its old end in its last block may show."""
    old = inode.size
    if end > old and old % vol.block_size:
        _zero(vol, inode, old, min(end, old + -old % vol.block_size))


def _fill_edges(vol: Volume, inode: Inode, offset: int, end: int) -> None:
    """Partial blocks of a write that are unwritten so far: zero what the data does not cover."""
    size = vol.block_size
    for edge_start, edge_end in ((offset - offset % size, offset), (end, end + -end % size)):
        if edge_start < edge_end:
            found = inode.map.find(edge_start // size)
            if found and found[3]:
                _zero(vol, inode, edge_start, edge_end, unwritten=True)


def _zero_new_edges(vol: Volume, inode: Inode, gaps: list[tuple[int, int]], offset: int, end: int) -> None:
    """The same for blocks that are new."""
    size = vol.block_size
    for edge_start, edge_end in ((offset - offset % size, offset), (end, end + -end % size)):
        block = edge_start // size
        if edge_start < edge_end and any(logical <= block < logical + count for logical, count in gaps):
            _zero(vol, inode, edge_start, edge_end, unwritten=True)


def truncate(vol: Volume, now: int, inode: Inode, size: int) -> None:
    """Set the size (attributes.setattr with nothing else)."""
    from daxfs.core import attributes

    attributes.setattr(vol, now, inode, attributes.Attributes(size=size))


class Resize(NamedTuple):
    """A change of size that nothing stands in the way of: see `clear_resize`. `cleared` is carried out when it is made."""

    size: int
    grows: bool
    cleared: Cleared


def clear_resize(vol: Volume, inode: Inode, size: int, breaker: Breaker = NOBODY, known_size: int = 0) -> Resize:
    """What a change of size has to see to before its transaction: that it is one, and that the pins on the blocks behind the
    new end let it (`breaking.clear_way`). `known_size`: bytes that the file has for its user, whose last writes are still
    on their way.

    Raises: ReadOnly, IsDirectory, BadArgument (not a file), TooBig, Poisoned; LayoutBusy and the others of `clear_way`.
    """
    vol.check_writable()
    if inode.is_dir:
        raise IsDirectory
    _must_be_file(inode)
    if not 0 <= size <= layout.FILE_SIZE_MAX:
        raise TooBig(f"a file has at most {layout.FILE_SIZE_MAX} bytes")
    old = inode.size
    if size > old and size > known_size:
        return Resize(size, True, CLEAR)
    if vol.poison:
        low, high = sorted((size, old))
        _check_sound(vol, inode, low, min(high, low + -low % vol.block_size))
    return Resize(size, False, clear_way(vol, inode, Operation.TRUNCATE, -(-size // vol.block_size), ALL, breaker))


def resize(vol: Volume, txn: Transaction, inode: Inode, change: Resize) -> None:
    """Within the transaction of a truncate: its blocks behind the new end are given up. Poisoned (a file that grows)."""
    size, block = change.size, vol.block_size
    txn.dirty(inode)
    _zero_old_tail(vol, inode, size)
    if not change.grows:
        txn.free(inode.map.carve(-(-size // block), ALL), unsafe=change.cleared.outcome is Outcome.IGNORE)
        if size % block and size < inode.size:
            _zero_by_record(vol, txn, inode, size, size + -size % block)
    inode.size = size


def _zero_by_record(vol: Volume, txn: Transaction, inode: Inode, start: int, end: int) -> None:
    """Zero part of one block together with the transaction: a crash shows both or neither."""
    at = _written_at(vol, inode, start, end)
    if at is not None:
        vol.poison.refuse(at, end - start)
        txn.write(at, bytes(end - start))


def _check_sound(vol: Volume, inode: Inode, start: int, end: int) -> None:
    """Poisoned if `_zero_by_record` would say so of the block of `start`."""
    at = _written_at(vol, inode, start, end)
    if at is not None:
        vol.poison.refuse(at, end - start)


def _written_at(vol: Volume, inode: Inode, start: int, end: int) -> int | None:
    """Where part of one block is on the image, if it has any bytes but zeros."""
    if start >= end:
        return None
    size = vol.block_size
    found = inode.map.find(start // size)
    return (found[1] - found[0]) * size + start if found and not found[3] else None


def fallocate(vol: Volume, now: int, inode: Inode, mode: int, offset: int, length: int, *,
              kill_priv: bool = False, breaker: Breaker = NOBODY) -> None:  # fmt: skip
    """fallocate(2): preallocate, PUNCH_HOLE, ZERO_RANGE, each with KEEP_SIZE. All or nothing.

    Raises: BadArgument, NotSupported, TooBig, ReadOnly, NoSpace, Poisoned; a punch also LayoutBusy and the others of
    `breaking.clear_way`.
    """
    _must_be_file(inode)
    keep_size = bool(mode & FALLOC_KEEP_SIZE)
    if offset < 0 or length <= 0:
        raise BadArgument("offset and length of fallocate make no range")
    kind = mode & ~FALLOC_KEEP_SIZE
    if kind not in (0, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE) or (kind == FALLOC_PUNCH_HOLE and not keep_size):
        raise NotSupported(f"fallocate mode {mode:#x} is not supported")
    if offset + length > layout.FILE_SIZE_MAX:
        raise TooBig(f"a file has at most {layout.FILE_SIZE_MAX} bytes")
    vol.check_writable()
    cleared = _clear_punch(vol, inode, offset, offset + length, breaker) if kind == FALLOC_PUNCH_HOLE else CLEAR
    with vol.transaction(now) as txn:
        if kind == FALLOC_PUNCH_HOLE:
            _punch(vol, txn, inode, offset, offset + length, cleared.outcome)
        else:
            _preallocate(vol, txn, inode, offset, offset + length, zero=kind == FALLOC_ZERO_RANGE)
        old = inode.size
        if not keep_size and offset + length > old:
            _zero_old_tail(vol, inode, offset + length)
            inode.size = offset + length
        inode.ctime = now
        if kind or inode.size != old:
            inode.mtime = now
        privileges.drop(vol, txn, inode, kill_priv)
        txn.dirty(inode)
    cleared.carry_out(vol)


def _parts(vol: Volume, start: int, end: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Of a range of bytes: (first, count) of its whole blocks, and what it has of partial ones, each as (start, end)."""
    size = vol.block_size
    first, last = -(-start // size), end // size
    if first > last:  # all within one block
        return first, 0, [(start, end)]
    return first, last - first, [(start, first * size), (last * size, end)]


def _clear_punch(vol: Volume, inode: Inode, start: int, end: int, breaker: Breaker) -> Cleared:
    """Before the transaction. Poisoned, and what `breaking.clear_way` raises."""
    first, count, edges = _parts(vol, start, end)
    for edge in edges if vol.poison else ():
        _check_sound(vol, inode, *edge)
    return clear_way(vol, inode, Operation.PUNCH, first, count, breaker)


def _punch(vol: Volume, txn: Transaction, inode: Inode, start: int, end: int, outcome: Outcome) -> None:
    first, count, edges = _parts(vol, start, end)
    for edge in edges:
        _zero_by_record(vol, txn, inode, *edge)
    txn.dirty(inode)
    if count:
        txn.free(inode.map.carve(first, count), unsafe=outcome is Outcome.IGNORE)


def _preallocate(vol: Volume, txn: Transaction, inode: Inode, start: int, end: int, *, zero: bool) -> None:
    """Fill the holes of a range with unwritten blocks. `zero`: what is there reads zero afterwards, and stays where it is:
    idle blocks become unwritten, those of a holder are zeroed under its eyes."""
    size = vol.block_size
    first = start // size
    gaps = inode.map.gaps(first, -(-end // size) - first)
    if sum(count for _, count in gaps) > vol.alloc.available:
        raise NoSpace("no space left on the volume")
    if zero:
        whole, count, edges = _parts(vol, start, end)
        for edge in edges:
            _zero_by_record(vol, txn, inode, *edge)
        txn.dirty(inode)
        for logical, physical, n, unwritten in inode.map.overlaps(whole, count) if count else []:
            if not unwritten:
                _zero_run(vol, inode, logical, physical, n)
    _allocate(vol, txn, inode, gaps, unwritten=True)


def _zero_run(vol: Volume, inode: Inode, logical: int, physical: int, count: int) -> None:
    vol.poison.overwritten([(physical, count)])
    idle, pinned = vol.pins.counts.split([(physical, count)])
    if vol.pins.on_demand(inode.ino):  # who is registered on demand has no count, but looks into the blocks as well
        idle, pinned = [], [(physical, count)]
    for start, n in idle:
        inode.map.convert(logical + start - physical, n, True)
    for start, n in pinned:
        vol.pmem.fill_zero(start * vol.block_size, n * vol.block_size)
        vol.pmem.flush(start * vol.block_size, n * vol.block_size)


def materialise(vol: Volume, now: int, inode: Inode, first: int, count: int) -> None:
    """Written blocks behind all of a range of blocks, zeros where there were none: what a write fault does to a hole."""
    if inode.map.written(first, count):
        return
    with vol.transaction(now) as txn:
        gaps = inode.map.gaps(first, count)
        _allocate(vol, txn, inode, gaps, unwritten=True)
        for _, physical, n, unwritten in inode.map.overlaps(first, count):
            if unwritten:
                vol.poison.overwritten([(physical, n)])
                vol.pmem.fill_zero(physical * vol.block_size, n * vol.block_size)
                vol.pmem.flush(physical * vol.block_size, n * vol.block_size)
        inode.map.convert(first, count, False)
        inode.mtime = inode.ctime = now
        txn.dirty(inode)


def seek(vol: Volume, inode: Inode, offset: int, whence: int) -> int:
    """SEEK_DATA and SEEK_HOLE at block grain; unwritten blocks are holes. NoSuchAddress (ENXIO) as lseek(2) has it."""
    _must_be_file(inode)
    size, block = inode.size, vol.block_size
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise BadArgument(f"lseek: whence {whence} is not SEEK_DATA or SEEK_HOLE")
    if offset < 0 or offset >= size:
        raise NoSuchAddress("the offset is behind the end of file")
    if whence == os.SEEK_HOLE:
        return min(max(offset, inode.map.next_hole(offset // block) * block), size)
    found = inode.map.next_data(offset // block)
    if found is None or found * block >= size:
        raise NoSuchAddress("no data behind the offset")
    return max(offset, found * block)


def copy_range(vol: Volume, now: int, source: Inode, offset: int, target: Inode, target_offset: int, length: int, *,
               kill_priv: bool = False) -> int:  # fmt: skip
    """copy_file_range(2): the bytes copied, fewer at the end of the source or when the volume is full."""
    _must_be_file(source)
    _must_be_file(target)
    length = min(length, source.size - offset)
    if source is target and offset < target_offset + length and target_offset < offset + length and length > 0:
        raise BadArgument("the ranges of copy_file_range overlap")
    done = 0
    while done < length:
        piece = read(vol, source, offset + done, min(_COPY_BYTES, length - done))
        try:
            written = write(vol, now, target, target_offset + done, piece, kill_priv=kill_priv)
        except NoSpace:
            if done:
                break
            raise
        done += written
        if written < len(piece):
            break
    return done


def note_access(inode: Inode, now: int) -> None:
    """A read of a file or directory: the access time, by the rule of relatime."""
    atime = inode.atime
    if atime <= inode.mtime or atime <= inode.ctime or now - atime >= _DAY:
        inode.touch_in_place(atime=now)


def reap(vol: Volume, now: int, inode: Inode) -> None:
    """If the last reference of an unlinked inode is gone, end it; else if nobody needs it in memory, forget it."""
    if not inode.opens:
        vol.alloc.let_go(inode.ino)
    if inode.nlookup or inode.opens or inode.dead:
        return
    if inode.nlink == 0 and not (vol.readonly or vol.failed):
        vol.end_inode(inode, now)
    else:
        vol.forget(inode)


def _must_be_file(inode: Inode) -> None:
    if inode.is_dir:
        raise IsDirectory
    if not inode.is_file:
        raise BadArgument("not a regular file")
