"""The redo journal: a transaction is whole on media or absent, whatever happens between two stores.

States of the commit word: 0 (idle: nothing to replay), or the sequence of the transaction in the body.
    body stored, flushed, fenced -> COMMIT (one 8-byte store) -> records applied in place, fenced -> word back to 0
A crash before COMMIT leaves a body that nobody looks at; after it, replay applies the records, as often as need be.

One transaction at a time: the medium is memory, so applying is immediate and there is nothing to batch. A transaction holds
only what is overwritten in place; new blocks are written directly before COMMIT, because nothing refers to them yet.
The body is hostile input at mount: lengths, targets and CRC are checked before a byte is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crc32c import crc32c

from daxfs.core import layout
from daxfs.core.layout import JOURNAL_COMMIT_AT, JOURNAL_HEADER, TXN_HEADER, TXN_RECORD
from daxfs.core.pmem import Pmem
from daxfs.core.records import pack_transaction
from daxfs.errors import Corrupt


class Journal:
    def __init__(self, pmem: Pmem, start: int, blocks: int, block_size: int, volume_end: int | None = None) -> None:
        self._pmem = pmem
        self._volume_end = pmem.size if volume_end is None else volume_end  # bytes
        self._header_at = start * block_size
        self._word_at = self._header_at + JOURNAL_COMMIT_AT
        self._body_at = self._header_at + block_size
        self.end = (start + blocks) * block_size
        self.capacity = self.end - self._body_at - TXN_HEADER.size
        self.sequence = 1  # of the next transaction; it moves on at the commit point
        self.check_medium: Callable[[], None] = lambda: None
        """Raises if stores have gone nowhere: then nothing may be committed, and what was committed is not applied."""

    def format(self) -> None:
        header = JOURNAL_HEADER.pack(
            magic=layout.JOURNAL_MAGIC, crc=0, address=self._header_at, reserved=0,
            body_blocks=(self.end - self._body_at) // (self._body_at - self._header_at),
        )  # fmt: skip
        self._pmem.store(self._header_at, layout.seal(header))
        self._pmem.store_word(self._word_at, 0)
        self._pmem.flush(self._header_at, JOURNAL_COMMIT_AT + 8)
        self._pmem.fence()

    def commit(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Make all records durable as one. NoSpace (and nothing done) if they are more than the journal holds."""
        pmem, sequence = self._pmem, self.sequence
        body = pack_transaction(sequence, records, self.capacity)
        pmem.store(self._body_at, body)
        pmem.flush(self._body_at, len(body))
        pmem.fence()
        self.check_medium()
        self.sequence += 1
        pmem.store_word(self._word_at, sequence)  # COMMIT
        pmem.flush(self._word_at, 8)
        pmem.fence()
        self._apply(records)

    def _apply(self, records: Sequence[tuple[int, bytes | memoryview]]) -> None:
        pmem = self._pmem
        for at, data in records:
            pmem.store(at, data)
            pmem.flush(at, len(data))
        pmem.fence()
        self.check_medium()
        pmem.store_word(self._word_at, 0)
        pmem.flush(self._word_at, 8)
        pmem.fence()

    def pending(self) -> list[tuple[int, memoryview]]:
        """Records of a committed transaction that was not fully applied. Corrupt if the journal cannot be believed."""
        view = self._pmem.view
        header = view[self._header_at : self._header_at + JOURNAL_HEADER.size]
        layout.verify(header, layout.JOURNAL_MAGIC, "journal header")
        if JOURNAL_HEADER.unpack(header)["address"] != self._header_at:
            raise Corrupt("journal header: it belongs elsewhere")
        word = self._pmem.load_word(self._word_at)
        head = bytes(view[self._body_at : self._body_at + TXN_HEADER.size])
        magic, crc, sequence, length, count = TXN_HEADER.struct.unpack(head)
        self.sequence = max(1, (sequence if magic == layout.TXN_MAGIC else 0) % (1 << 63) + 1)
        if word == 0:
            return []
        if magic != layout.TXN_MAGIC or sequence != word or length > self.capacity or length % 8:
            raise Corrupt("journal: the commit word does not match the transaction")
        body = view[self._body_at + TXN_HEADER.size : self._body_at + TXN_HEADER.size + length]
        if crc32c(body, crc32c(head[8:], crc32c(head[:4]))) != crc:
            raise Corrupt("journal: bad checksum of a committed transaction")
        return self._parse(body, count)

    def _parse(self, body: memoryview, count: int) -> list[tuple[int, memoryview]]:
        records = []
        at = 0
        while at < len(body):
            if len(body) - at < TXN_RECORD.size:
                raise Corrupt("journal: a record is cut off")
            target, length = TXN_RECORD.struct.unpack_from(body, at)
            at += TXN_RECORD.size
            if length > len(body) - at:
                raise Corrupt("journal: a record is longer than its transaction")
            if target > self._volume_end or length > self._volume_end - target:
                raise Corrupt("journal: a record points outside the volume")
            if not length or target < self.end:
                raise Corrupt("journal: a record is empty, or points at a superblock or the journal")
            records.append((target, body[at : at + length]))
            at += length + (-length & 7)
        if len(records) != count:
            raise Corrupt("journal: wrong number of records")
        return records

    def replay(self) -> bool:
        """Apply what was committed before a crash; safe to repeat. Returns whether there was anything."""
        records = self.pending()
        if records:
            self._apply(records)
        elif self._pmem.load_word(self._word_at):
            self._apply([])
        return bool(records)
