"""The inode table as a mount reads it, compiled; see inodescan.pyx."""

from array import array

class TableScan:
    starts: array[int]
    counts: array[int]
    free: array[int]
    orphans: array[int]
    chained: array[int]
    def look(self, image: memoryview, chunks: array[int] | memoryview, first: int, block_size: int) -> None: ...
