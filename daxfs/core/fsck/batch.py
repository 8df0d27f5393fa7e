"""Repairs on their way to the image: redo records, gathered and committed through the journal.

What belongs together is added together and commits together; one commit holds as many of such groups as the journal takes.
A repair that is killed leaves all or none of each group, so the next one finds an image that is no worse than it was.
"""

from __future__ import annotations

from daxfs.core.journal import Journal
from daxfs.core.layout import TXN_RECORD
from daxfs.errors import NoSpace

Records = list[tuple[int, bytes]]  # address in bytes, data

_BYTES_MAX = 1 << 20  # what is gathered at most before a commit


class Batch:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._records: Records = []
        self._bytes = 0
        self.commits = 0

    def fits(self, records: Records) -> bool:
        return _size(records) <= self._journal.capacity

    def add(self, records: Records) -> None:
        """These all at once. NoSpace if the journal cannot hold them."""
        size = _size(records)
        if size > self._journal.capacity:
            raise NoSpace(f"a repair of {size} bytes does not fit the journal")
        if self._bytes + size > min(self._journal.capacity, _BYTES_MAX):
            self.commit()
        self._records += records
        self._bytes += size

    def commit(self) -> None:
        if self._records:
            self._journal.commit(self._records)
            self.commits += 1
        self._records = []
        self._bytes = 0


def _size(records: Records) -> int:
    return sum(TXN_RECORD.size + (len(data) + 7 & -8) for _, data in records)
