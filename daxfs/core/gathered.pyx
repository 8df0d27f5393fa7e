# cython: language_level=3
"""What a transaction has gathered until it commits, compiled, as every verb makes one: see transaction.py."""

from cpython.list cimport PyList_Append


cdef class Gathered:
    """Redo records, inodes to store by number, what to revert on an abort, and blocks and inode numbers taken and freed:
    lists, or None while there is nothing."""

    cdef readonly object now
    cdef readonly object _volume
    cdef readonly list _records, _touched, _taken, _freed, _freed_unsafe, _taken_numbers, _freed_numbers
    cdef readonly dict _inodes

    def __init__(self, volume, now):
        self._volume = volume
        self.now = now
        self._records = []
        self._touched = []
        self._inodes = {}

    def __enter__(self):
        self._volume.open_transactions += 1
        return self

    def write(self, at, bytes data not None):
        """A redo record: `data` goes to byte address `at` at the commit."""
        PyList_Append(self._records, (at, data))

    def free(self, list runs, *, bint unsafe=False):
        """Give up blocks; they stay out of reach until the commit. `unsafe`: pinned ones are free, too (the 2017 bug)."""
        if unsafe:
            self._freed_unsafe = _extended(self._freed_unsafe, runs)
        else:
            self._freed = _extended(self._freed, runs)

    def took(self, list runs):
        """Blocks that are free again if the transaction is aborted."""
        self._taken = _extended(self._taken, runs)

    def dirty(self, inode):
        """Store the inode at the commit."""
        self._inodes[inode.ino] = inode

    def touch(self, what):
        """Call `what.revert()` if the transaction is aborted."""
        PyList_Append(self._touched, what)

    def took_number(self, ino):
        """An inode number that is free again if the transaction is aborted."""
        self._taken_numbers = _extended(self._taken_numbers, [ino])

    def free_number(self, ino):
        """An inode number that may be used again after the commit."""
        self._freed_numbers = _extended(self._freed_numbers, [ino])


cdef list _extended(list before, list more):
    if not more:
        return before
    if before is None:
        return list(more)
    before.extend(more)
    return before
