"""The pin ledger on media: which blocks live holders may have mapped, so that a crashed daemon forgets none of them.

Holders map the image themselves and go on after the daemon dies. Each run of each pin has one entry of a cache line,
stored before the pin is granted and voided by one 8-byte store when it goes, so no journal is needed: a torn entry
fails its CRC and belongs to a pin that nobody was granted. Busy runs need no entries of their own: whatever a ledger entry
covers and no file owns is busy. Entries of another boot of the host are void: no process is left that could hold anything.

The ledger is a chain of blocks that grows by transactions; the first one is made by mkfs, and a mount gives back the last
ones if they are empty.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daxfs import abi
from daxfs.core import layout
from daxfs.core.alloc import Run
from daxfs.core.layout import LEDGER_BLOCK, LEDGER_ENTRY
from daxfs.errors import Corrupt

if TYPE_CHECKING:
    from daxfs.core.volume import Volume

_ENTRY = LEDGER_ENTRY.size
_ENTRY_MAGIC = layout.LEDGER_ENTRY_MAGIC.to_bytes(4, "little")


@dataclass(frozen=True)
class Entry:
    """A run that a process pinned before the daemon was restarted."""

    at: int
    pin: int
    start: int
    count: int
    pid: int
    flags: int
    started: int
    ino: int


def block_header(address: int, boot_id: bytes, following: int = 0) -> bytes:
    return layout.seal(LEDGER_BLOCK.pack(magic=layout.LEDGER_MAGIC, crc=0, address=address, next=following,
                                         boot_id=boot_id, reserved=b""))  # fmt: skip


class Ledger:
    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.blocks: list[int] = []
        self._free: list[int] = []  # addresses of void entries
        self._stale: list[tuple[int, int]] = []  # blocks of another boot, and what follows each

    def load(self, boot_id: bytes) -> list[Entry]:
        """Read the chain; entries of this boot come back."""
        volume, pmem = self._volume, self._volume.pmem
        size = volume.block_size
        entries: list[Entry] = []
        block, seen = volume.sb["ledger"], set[int]()
        while block:
            if block in seen or not volume.sb["data_start"] <= block < volume.blocks:
                raise Corrupt("pin ledger: the chain of blocks is broken")
            seen.add(block)
            at = block * size
            record = pmem.load(at, LEDGER_BLOCK.size)
            layout.verify(record, layout.LEDGER_MAGIC, f"ledger block {block}")
            head = LEDGER_BLOCK.unpack(record)
            if head["address"] != block:
                raise Corrupt(f"ledger block {block}: it belongs elsewhere")
            current = head["boot_id"] == boot_id and any(boot_id)
            if current:
                entries += self._entries(block)
            else:
                self._stale.append((block, int(head["next"])))
            used = {e.at for e in entries}
            self._free += [e for e in range(at + _ENTRY, at + size, _ENTRY) if e not in used]
            self.blocks.append(block)
            block = int(head["next"])
        self._free.reverse()
        return entries

    def renew(self, boot_id: bytes) -> None:
        """Void the entries of other boots, once all else of the volume is believed."""
        pmem, size = self._volume.pmem, self._volume.block_size
        for block, following in self._stale:
            pmem.fill_zero(block * size + LEDGER_BLOCK.size, size - LEDGER_BLOCK.size)
            pmem.flush(block * size, size)
            pmem.fence()
            self._volume.journal.commit([(block * size, block_header(block, boot_id, following))])
        self._stale.clear()

    def trim(self, now: int) -> None:
        """Give back the blocks at the end of the chain that have no entry in use: very many pins have made it long."""
        volume, size = self._volume, self._volume.block_size
        void = Counter(at // size for at in self._free)
        keep = len(self.blocks)
        while keep > 1 and void[self.blocks[keep - 1]] == size // _ENTRY - 1:
            keep -= 1
        if keep == len(self.blocks):
            return
        last, ended = self.blocks[keep - 1], set(self.blocks[keep:])
        with volume.transaction(now) as txn:
            txn.write(last * size, block_header(last, volume.sb["boot_id"]))
            txn.free([(block, 1) for block in ended])
        self.blocks = self.blocks[:keep]
        self._free = [at for at in self._free if at // size not in ended]

    def _entries(self, block: int) -> list[Entry]:
        view, size, found = self._volume.pmem.view, self._volume.block_size, []
        for at in range(block * size + _ENTRY, (block + 1) * size, _ENTRY):
            record = view[at : at + _ENTRY]
            if record[:4] != _ENTRY_MAGIC:
                continue  # void: most are
            try:
                layout.verify(record, layout.LEDGER_ENTRY_MAGIC, "ledger entry")
            except Corrupt:
                continue  # torn before its pin was granted
            _, _, address, pin, start, count, pid, flags, started, ino = LEDGER_ENTRY.struct.unpack(record)
            if address != at or start not in self._volume.data_blocks or pin >> 62 or flags & abi.FOLL_GET:
                continue  # forged: none of ours is like that
            if 0 < count <= self._volume.blocks - start:
                found.append(Entry(at, pin, start, count, pid, flags, started, ino))
        return found

    def insert(self, now: int, pin: int, runs: list[Run], pid: int, flags: int, started: int, ino: int) -> list[int]:
        """Durable entries for the runs of a pin; their addresses. NoSpace if the ledger cannot grow."""
        while len(self._free) < len(runs):
            self._grow(now)
        pmem, seal, addresses = self._volume.pmem, LEDGER_ENTRY.sealed, []
        for start, count in runs:
            at = self._free.pop()
            pmem.store(at, seal(layout.LEDGER_ENTRY_MAGIC, at, pin, start, count, pid, flags, started, ino))
            pmem.flush(at, _ENTRY)
            addresses.append(at)
        pmem.fence()
        return addresses

    def void(self, addresses: list[int]) -> None:
        pmem = self._volume.pmem
        for at in addresses:
            pmem.store_word(at, 0)
            pmem.flush(at, 8)
        pmem.fence()
        self._free += addresses

    def _grow(self, now: int) -> None:
        volume = self._volume
        size = volume.block_size
        with volume.transaction(now) as txn:
            block = txn.take(1)[0][0]  # not out of the reserve: pins must not keep others from giving space back
            boot_id = volume.sb["boot_id"]
            txn.fresh(block * size, block_header(block, boot_id) + bytes(size - LEDGER_BLOCK.size))
            last = self.blocks[-1]
            txn.write(last * size, block_header(last, boot_id, block))
        self.blocks.append(block)
        self._free += range((block + 1) * size - _ENTRY, block * size, -_ENTRY)


def process_started(stat_text: str) -> int:
    """Start time in clock ticks since boot, out of the text of /proc/PID/stat; 0 if it cannot be read."""
    try:
        return int(stat_text.rpartition(")")[2].split()[19])
    except (IndexError, ValueError):
        return 0
