# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The free slots of a directory, compiled: every name that comes or goes asks here."""

from daxfs.core.layout import DIRENT, DIRENT_ALIGN, NAME_MAX

cdef Py_ssize_t _MAX = (DIRENT.size + NAME_MAX + DIRENT_ALIGN - 1) // DIRENT_ALIGN  # granules of the longest entry


cdef class Slots:
    """Runs of granules, from the start of the directory on, and by length for best fit. `starts` has start -> length."""

    cdef readonly dict starts
    cdef dict _ends  # end -> start
    cdef list _bins  # one per length; the last also holds all that are longer. Dicts keep the order: runs repeat exactly

    def __init__(self):
        self.starts = {}
        self._ends = {}
        self._bins = [{} for _ in range(_MAX + 1)]

    def add(self, start, length):
        """Free a slot; it is merged with its free neighbours. The slot that it became part of."""
        end = start + length
        following = self.starts.get(end)
        if following is not None:
            self._drop(end)
            end = end + following
        before = self._ends.get(start)
        if before is not None:
            self._drop(before)
            start = before
        length = end - start
        self.put(start, length)
        return start, length

    cpdef put(self, start, length):
        """Note a slot that touches no other."""
        self.starts[start] = length
        self._ends[start + length] = start
        cdef Py_ssize_t n = length
        (<dict>self._bins[n if n < _MAX else _MAX])[start] = None

    def take(self, Py_ssize_t need):
        """Remove the slot that fits best: (start, length). None if there is none."""
        cdef Py_ssize_t i
        cdef dict found
        for i in range(need, _MAX + 1):
            found = <dict>self._bins[i]
            if found:
                start = next(reversed(found))
                return start, self._drop(start)
        return None

    cdef object _drop(self, start):
        length = self.starts.pop(start)
        del self._ends[start + length]
        cdef Py_ssize_t n = length
        del (<dict>self._bins[n if n < _MAX else _MAX])[start]
        return length
