"""What lies where on an image, in words: for reports."""

from __future__ import annotations

from collections.abc import Iterable

from daxfs.core import layout, superblock
from daxfs.core.layout import CHUNK_INODES, INODE_SIZE, JOURNAL_COMMIT_AT
from daxfs.lab.crash.medium import LINE, RecordingPmem


class Places:
    """Of an image that has a superblock."""

    def __init__(self, image: bytes | bytearray) -> None:
        medium = RecordingPmem(len(image))
        medium.put(image)
        self._sb = sb = superblock.load(medium)
        size = sb["block_size"]
        self._chunks = {}
        for index in range(sb["idir_blocks"] * size // 8):
            word = medium.load_word(sb["idir_start"] * size + 8 * index)
            if not word:
                break
            self._chunks[layout.idir_block(index, word)] = index

    def name(self, line: int) -> str:
        sb, at = self._sb, line * LINE
        size = sb["block_size"]
        block, within = divmod(at, size)
        if block < 2:
            return f"superblock {'AB'[block]}, byte {within}"
        if block < sb["idir_start"]:
            offset = at - sb["journal_start"] * size
            if offset == JOURNAL_COMMIT_AT:
                return "the journal's commit word"
            return f"journal, byte {offset - size} of the body" if offset >= size else "journal header"
        if block < sb["data_start"]:
            return f"inode directory, byte {at - sb['idir_start'] * size}"
        for start, index in self._chunks.items():
            offset = at - start * size
            if 0 <= offset < CHUNK_INODES * INODE_SIZE:
                return f"inode {index * CHUNK_INODES + offset // INODE_SIZE}, byte {offset % INODE_SIZE}"
        return f"block {block}, byte {within}" + (" (pin ledger)" if block == sb["ledger"] else "")

    def names(self, lines: Iterable[int], at_most: int = 4) -> str:
        """Some lines, in one sentence."""
        names = [self.name(line) for line in sorted(lines)]
        more = f" and {len(names) - at_most} more lines" if len(names) > at_most else ""
        return "; ".join(names[:at_most]) + more if names else "nothing"
