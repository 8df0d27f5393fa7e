# cython: language_level=3
"""Who holds which blocks: pin objects, their owners, and a count of pins for every block. Compiled: every PIN and UNPIN goes
through here, and a layout change asks it about all the runs that it takes.

A pin belongs to an owner, which is an open file description (the daemon's file handle); the owner's last close releases
all its pins. A FOLL_GET reference is known and listed but keeps no block: it
gives no access to data. A pin keeps the runs that the range had when it was taken: blocks stay where they are while they are
pinned, whatever becomes of the file. Counts decide what a freed block becomes (PinCounts.split): idle or busy.

States: held -> revoked (by policy or an admin), fenced (an on-demand holder that did not acknowledge) or dying (all processes
that have the owner are ending, which can take long) -> released (by unpin, or by the owner's end). A revoked, fenced or dying
holder has no access through the simulated HCA, but may still have its
blocks mapped, so they count until it is released. An on-demand registration is not counted before it is fenced; while it is
held it must let go when it is told, and `invalid` says that it did. A survivor is a pin of a daemon that died, known from
the ledger only: it has no owner here and is released when its holder is gone or by an admin.

A released pin of many runs leaves bit by bit: it is in no list any more, its blocks are counted till `drop_some` comes to
them, so that no call has to go through all of them at once.

Only the table changes a pin's state. Whenever one stands in no way any more it says so: see waiting.py.

Types are in pins.pyi. Not here: which blocks a range has and whether it may be pinned (`pin`, in holding.py), and waiting.
"""

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice

from libc.stdint cimport uint32_t, uint64_t

from daxfs.core.runs cimport RunMap, dx_extent, dx_find, dx_next

from daxfs import abi
from daxfs.core.pincounts import PinCounts
from daxfs.core.waiting import DUE, unheard
from daxfs.errors import NoEntry

PINS_PER_OWNER_MAX = 1 << 18
# What pins cost the daemon, in pieces of about 150 bytes: a pin is some of them, and each of its runs is one.
PIECES_PER_PIN = 3
PIECES_PER_PROCESS_MAX = 1 << 20
PIECES_MAX = 1 << 22
RUNS_AT_ONCE = 32  # of a pin that is released; one of more leaves bit by bit
FEW = 16  # pins of a file that are looked at one by one

cdef uint32_t _GET = abi.FOLL_GET


class State(StrEnum):
    HELD = "held"
    INVALID = "invalid"  # an on-demand registration that let go
    REVOKED = "revoked"
    FENCED = "fenced"
    DYING = "dying"


cdef object _HELD = State.HELD, _FENCED = State.FENCED


@dataclass(frozen=True)
class Holder:
    """The process that took a pin: `started` is its start time in clock ticks since boot."""

    pid: int
    comm: str = ""
    started: int = 0

    @cached_property
    def process(self):
        """Which process it is, among all that this boot of the host has had."""
        return self.pid, self.started

    def is_same(self, other):
        """Whether this is the same process."""
        return self.process == other.process


cdef class Pin:
    """`offset` and `length` in bytes, `runs` in blocks of the image (`blocks` in all), `flags` FOLL_*, `taken` in ns since
    1970."""

    cdef object __weakref__
    cdef readonly object id, owner, inode, ino, offset, holder, taken
    cdef readonly uint32_t flags
    cdef readonly bint on_demand  # revocable: no pin, told before its blocks go
    cdef readonly list runs  # none any more once it was released and leaves bit by bit
    cdef public uint64_t blocks, length
    cdef readonly object state
    cdef public str label  # the holder's own name for it
    cdef public bint told  # of the break that is under way
    cdef public list entries  # of the ledger
    cdef public object notifier  # of a holder within the daemon: called in place of an event, acknowledges at once

    def __init__(self, id, owner, inode, ino, offset, length, flags, list runs, blocks, holder, taken, on_demand=False):
        self.id = id
        self.owner = owner
        self.inode = inode
        self.ino = ino
        self.offset = offset
        self.length = length
        self.flags = flags
        self.runs = runs
        self.blocks = blocks
        self.holder = holder
        self.taken = taken
        self.on_demand = on_demand
        self.state = _HELD
        self.label = ""
        self.entries = []

    def __repr__(self):
        return f"<Pin {self.id} of {self.owner}: inode {self.ino}, {self.offset}+{self.length}, {self.state}>"

    cdef bint keeps(self) noexcept:
        if self.on_demand:
            return self.state is _FENCED
        return not self.flags & _GET

    @property
    def counted(self):
        """Whether its blocks are kept from everybody."""
        return self.keeps()


cdef class _Account:
    """What a process has: blocks and pieces of its pins, each pin for itself, and how many pins of each file."""

    cdef uint64_t blocks, pieces
    cdef dict files


cdef class _Places:
    """Which pins have runs where: maps of keys made of a run's start and a number that tells those of one start apart, in
    order, to the pin's id. One map for each power of two of a run's length: so whoever reaches into a range from before it
    begins not further before it than that."""

    cdef list maps  # RunMap or None, by bits of the length

    def __cinit__(self):
        self.maps = [None] * 65

    cdef int enter(self, uint64_t pin_id, list runs) except -1:
        cdef uint64_t start, count, key
        cdef RunMap map
        cdef const dx_extent *e
        for start, count in runs:
            map = self.maps[_bits(count)]
            if map is None:
                map = self.maps[_bits(count)] = RunMap()
            key = start << _NUMBER_BITS | pin_id & _NUMBERS
            e = dx_find(&map.m, key, NULL, NULL)
            while e != NULL and e.logical == key:  # of 2**24 ids that have been given out since
                key = start << _NUMBER_BITS | key + 1 & _NUMBERS
                e = dx_find(&map.m, key, NULL, NULL)
            map._insert(key, pin_id, 1, pin_id & 1)  # of two that could be taken for one extent, the flags differ
        return 0

    cdef int leave(self, uint64_t pin_id, list runs) except -1:
        cdef uint64_t start, count, key
        cdef RunMap map
        cdef const dx_extent *e
        for start, count in runs:
            map = self.maps[_bits(count)]
            key = start << _NUMBER_BITS | pin_id & _NUMBERS
            e = dx_find(&map.m, key, NULL, NULL)
            while e == NULL or e.logical != key or e.physical != pin_id:
                key = start << _NUMBER_BITS | key + 1 & _NUMBERS
                e = dx_find(&map.m, key, NULL, NULL)
            map._carve(key, 1, None)
        return 0

    def within(self, uint64_t start, uint64_t count):
        """The ids of the pins that have a block of a run; an id may come twice."""
        cdef uint32_t li = 0, i = 0, bits
        cdef uint64_t first, reach
        cdef RunMap map
        cdef const dx_extent *e
        for bits in range(65):
            if self.maps[bits] is None:
                continue
            map = self.maps[bits]
            reach = (<uint64_t>1 << bits) - 1
            first = start - reach if start > reach else 0
            e = dx_find(&map.m, first << _NUMBER_BITS, &li, &i)
            while e != NULL and e.logical >> _NUMBER_BITS < start + count:
                yield e.physical
                e = dx_next(&map.m, &li, &i)


cdef enum:
    _NUMBER_BITS = 24

cdef uint64_t _NUMBERS = (1 << _NUMBER_BITS) - 1


cdef inline uint32_t _bits(uint64_t count) noexcept:
    """How many bits it takes to count from 0 to count - 1."""
    cdef uint32_t bits = 0
    while bits < 63 and (<uint64_t>1 << bits) < count:
        bits += 1
    return bits


cdef class PinTable:
    """All pins of a volume. `counts` says how many pins cover a block. `moved` is called with the number of a file whose pins
    are fewer, or have changed their state, and with DUE when pins leave bit by bit."""

    cdef readonly object counts
    cdef readonly object references  # FOLL_GET: they keep nothing
    cdef readonly uint64_t pieces
    cdef object _moved
    cdef uint64_t _last_id
    cdef dict _pins, _owners, _files  # by id; by owner and by inode, of dicts by id
    cdef dict _accounts  # by process
    cdef list _leaving  # of (process, id, runs, entries of the ledger)
    cdef dict _survivors  # by id
    cdef _Places _places
    cdef dict _on_demand  # how many registrations on demand a file has

    def __init__(self, blocks, moved=unheard):
        self._moved = moved
        self.counts = PinCounts(blocks)
        self.references = PinCounts(blocks)
        self._pins = {}
        self._owners = {}
        self._files = {}
        self._accounts = {}
        self._on_demand = {}
        self._leaving = []
        self._survivors = {}
        self._places = _Places()

    def __len__(self):
        return len(self._pins)

    def __iter__(self):
        return iter(list(self._pins.values()))

    @property
    def owners(self):
        """How many open file descriptions have pins."""
        return len(self._owners)

    def owner_list(self):
        return list(self._owners)

    def all(self):
        """All pins, oldest first, not to be kept: the table must not change meanwhile."""
        return self._pins.values()

    @property
    def blocks(self):
        """Blocks with at least one pin."""
        return self.counts.pinned

    def next_id(self):
        self._last_id += 1
        return self._last_id

    def insert(self, Pin pin):
        if pin.keeps():
            self.counts.add(pin.runs)
        elif pin.flags & _GET:
            self.references.add(pin.runs)
        self._last_id = max(self._last_id, <uint64_t>pin.id)
        self._pins[pin.id] = pin
        self._places.enter(pin.id, pin.runs)
        _enter(self._files, pin.ino, pin)
        if pin.owner is not None:
            _enter(self._owners, pin.owner, pin)
        else:
            self._survivors[pin.id] = pin
        if pin.on_demand:
            _count(self._on_demand, pin.ino, 1)
        self._enter_account(pin)

    def remove(self, pins):
        """Forget pins; returns the runs that no pin covers any more. Those that leave bit by bit have no runs and entries
        from now on."""
        cdef list idle = []
        cdef set files = set()
        cdef Pin pin
        cdef bint leaves = False
        for pin in pins:
            files.add(pin.ino)
            del self._pins[pin.id]
            _leave(self._files, pin.ino, pin)
            if pin.owner is not None:
                _leave(self._owners, pin.owner, pin)
            else:
                del self._survivors[pin.id]
            if pin.on_demand:
                _count(self._on_demand, pin.ino, -1)
            self._leave_account(pin)
            if pin.keeps() and len(pin.runs) > RUNS_AT_ONCE:
                self._leaving.append((pin.holder.process, pin.id, pin.runs, pin.entries))
                pin.runs, pin.entries = [], []
                leaves = True
                continue
            self._places.leave(pin.id, pin.runs)
            self._free_pieces(pin.holder.process, len(pin.runs))
            if pin.keeps():
                idle += self.counts.drop(pin.runs)
            elif pin.flags & _GET:
                self.references.drop(pin.runs)
        for ino in files:
            self._moved(ino)
        if leaves:
            self._moved(DUE)
        return idle

    cdef int _enter_account(self, Pin pin) except -1:
        cdef uint64_t pieces = PIECES_PER_PIN + len(pin.runs)
        cdef _Account account = self._accounts.get(pin.holder.process)
        if account is None:
            self._accounts[pin.holder.process] = account = _Account()
            account.files = {}
        account.blocks += pin.blocks
        account.pieces += pieces
        self.pieces += pieces
        return _count(account.files, pin.ino, 1)

    cdef int _leave_account(self, Pin pin) except -1:
        """All but the pieces of its runs."""
        cdef _Account account = self._accounts[pin.holder.process]
        account.blocks -= pin.blocks
        _count(account.files, pin.ino, -1)
        return self._free_pieces(pin.holder.process, PIECES_PER_PIN)

    cdef int _free_pieces(self, process, uint64_t pieces) except -1:
        cdef _Account account
        if pieces == 0:
            return 0
        account = self._accounts[process]
        account.pieces -= pieces
        self.pieces -= pieces
        if account.pieces == 0:
            del self._accounts[process]
        return 0

    @property
    def leaving(self):
        """Whether `drop_some` has anything to do."""
        return len(self._leaving) > 0

    def drop_some(self, Py_ssize_t most):
        """Go on with at most so many runs of pins that leave: (the runs that no pin covers any more, entries of the ledger
        that are to be voided)."""
        if not self._leaving:
            return [], []
        process, pin_id, runs, entries = self._leaving[-1]
        cdef Py_ssize_t left = max(0, len(runs) - most)
        some, voided = runs[left:], entries[left:]
        del runs[left:], entries[left:]
        if left == 0:
            self._leaving.pop()
        self._free_pieces(process, len(some))
        self._places.leave(pin_id, some)
        return self.counts.drop(some), voided

    def charged(self, holder):
        """What pins of one process cover, each pin for itself: (blocks, pieces)."""
        cdef _Account account = self._accounts.get(holder.process)
        if account is None:
            return 0, 0
        return account.blocks, account.pieces

    def has(self, Pin pin):
        """Whether it has not been released."""
        return pin.id in self._pins

    def stands(self, pin_id):
        """Whether a pin still keeps a layout change from going on."""
        cdef Pin pin = self._pins.get(pin_id)
        return pin is not None and pin.state is _HELD

    def owned(self, owner):
        """How many pins an owner has."""
        mine = self._owners.get(owner)
        return 0 if mine is None else len(mine)

    def of_owner(self, owner, most=None):
        """The pins of an owner; at most so many of them, the newest."""
        return list(islice(reversed(self._owners.get(owner, {}).values()), most))

    def get(self, owner, pin_id):
        """A pin of this owner; NoEntry for any other id."""
        mine = self._owners.get(owner)
        pin = None if mine is None else mine.get(pin_id)
        if pin is None:
            raise NoEntry(f"no pin {pin_id} on this open file")
        return pin

    def files(self):
        """The numbers of the files that have pins."""
        return list(self._files)

    def of_file(self, ino):
        return list(self._files.get(ino, {}).values())

    def has_file(self, ino):
        """Whether a file has any pin or registration."""
        return ino in self._files

    def on_demand(self, ino):
        """How many registrations on demand a file has."""
        return self._on_demand.get(ino, 0)

    def held(self, ino, uint64_t start, uint64_t count):
        """The parts of a run of a file's blocks that holders may reach: pinned, or perhaps registered on demand."""
        if ino in self._on_demand:
            return [(start, count)]
        return self.counts.split([(start, count)])[1]

    def holds(self, owner, holder, ino, start, end):
        """Whether an owner, or a process, has a pin of a range of bytes of a file."""
        cdef _Account account = self._accounts.get(holder.process)
        cdef Pin pin
        if owner not in self._owners and (account is None or ino not in account.files):
            return False
        for pin in self._files.get(ino, {}).values():
            if pin.state is _HELD and pin.offset < end and start < pin.offset + pin.length:
                if pin.owner == owner or pin.holder.is_same(holder):
                    return True
        return False

    def standing(self, ino, list runs, owner=None):
        """The pins and registrations of a file, or those of one owner, that cover any block of its runs. Not to be kept."""
        pins = self._files.get(ino) if owner is None else self._owners.get(owner)
        cdef list ordered, starts
        cdef set seen
        cdef Pin pin
        if not runs or not pins:
            return
        if len(pins) <= FEW:
            ordered = sorted(runs)
            starts = [start for start, _ in ordered]
            for pin in pins.values():
                if _touches(pin.runs, ordered, starts):
                    yield pin
            return
        seen = set()
        for start, count in runs:
            for pin_id in self._places.within(start, count):
                pin = pins.get(pin_id)
                if pin is None or pin_id in seen or not _touches(pin.runs, [(start, count)], [start]):
                    continue
                if len(pin.runs) > 1 or len(runs) > 1:
                    seen.add(pin_id)
                yield pin

    def let_go(self, Pin pin):
        """An on-demand holder has acknowledged: it refers to nothing any more."""
        pin.state = State.INVALID
        pin.told = False
        self._moved(pin.ino)

    def fence(self, Pin pin):
        """An on-demand holder did not let go in time: from now on its blocks are kept as if it had pinned them."""
        self.counts.add(pin.runs)
        pin.state = State.FENCED
        self._moved(pin.ino)

    def revoke(self, Pin pin):
        """A holder has no access any more. Its blocks are kept on."""
        pin.state = State.REVOKED
        self._moved(pin.ino)

    def let_die(self, Pin pin):
        """All processes that have the owner of a pin are ending. Its blocks are kept on."""
        pin.state = State.DYING
        self._moved(pin.ino)

    def any_id(self, pin_id):
        """A pin of whoever. NoEntry."""
        if pin_id not in self._pins:
            raise NoEntry(f"no pin {pin_id}")
        return self._pins[pin_id]

    def survivors(self):
        return list(self._survivors.values())

    def check(self):
        self.counts.check()
        again = PinCounts(self.counts.size)
        pieces = 0
        for pin in self._pins.values():
            pieces += PIECES_PER_PIN + len(pin.runs)
            if pin.blocks != sum([count for _, count in pin.runs]):
                raise ValueError(f"pin {pin.id} has {pin.blocks} blocks, its runs have others")
            if pin.counted:
                again.add(pin.runs)
            for start, count in pin.runs if pin.counted else []:
                for block in (start, start + count - 1):
                    if self.counts.count(block) < 1:
                        raise ValueError(f"pin {pin.id} covers block {block}, whose count is 0")
        for _, _, runs, _ in self._leaving:
            again.add(runs)
            pieces += len(runs)
        places = sum([len(map) for map in self._places.maps if map is not None])
        if places != sum([len(pin.runs) for pin in self._pins.values()]) + sum([len(runs) for _, _, runs, _ in self._leaving]):
            raise ValueError("the places of runs are not those of the pins")
        for pin in self._pins.values():
            if any([pin.id not in self._places.within(start + count - 1, 1) for start, count in pin.runs]):
                raise ValueError(f"pin {pin.id} is not found by its blocks")
        if again.pinned != self.counts.pinned:
            raise ValueError(f"{self.counts.pinned} blocks are counted as pinned, {again.pinned} are")
        if sum([len(mine) for mine in self._owners.values()]) + len(self.survivors()) != len(self._pins):
            raise ValueError("a pin is missing from its owner")
        accounts = list(self._accounts.values())
        charged = sum([(<_Account>account).pieces for account in accounts])
        if not pieces == self.pieces == charged:
            raise ValueError(f"{self.pieces} pieces are counted, {charged} are charged, {pieces} there are")
        if sum([sum((<_Account>account).files.values()) for account in accounts]) != len(self._pins):
            raise ValueError("a pin is missing from its process")
        if sum(self._on_demand.values()) != sum([pin.on_demand for pin in self._pins.values()]):
            raise ValueError("registrations on demand are counted wrong")


cdef int _enter(dict groups, key, Pin pin) except -1:
    cdef dict group = groups.get(key)
    if group is None:
        groups[key] = group = {}
    group[pin.id] = pin
    return 0


cdef int _leave(dict groups, key, Pin pin) except -1:
    cdef dict group = groups[key]
    if next(reversed(group)) == pin.id:
        group.popitem()  # who leaves from the end leaves no gap there, which the next one would have to look through
    else:
        del group[pin.id]
    if not group:
        del groups[key]
    return 0


cdef int _count(dict counts, key, int change) except -1:
    """One more or fewer; what is none is not kept."""
    cdef int count = counts.get(key, 0) + change
    if count:
        counts[key] = count
    else:
        del counts[key]
    return 0


cdef bint _touches(list some, list ordered, list starts) except -1:
    """Whether any of some runs overlaps any of the ordered ones; `starts` are where those begin."""
    cdef uint64_t start, count, first, n
    cdef Py_ssize_t at
    for start, count in some:
        at = bisect_right(starts, start + count - 1) - 1
        if at >= 0:
            first, n = ordered[at]
            if first + n > start:
                return True
    return False
