"""The superblock: two copies, of which the newest valid one counts; written in turns, so that one is always whole.

Values are a plain dict with the names of layout.SUPERBLOCK. `load` believes nothing: sizes, regions and features are
checked, and what is wrong is said in one line that a person can act on (ImageError).
"""

from __future__ import annotations

from typing import Any

from daxfs.core import layout
from daxfs.core.layout import SB_KIND, SUPERBLOCK
from daxfs.core.pmem import Pmem
from daxfs.errors import Corrupt, ImageError

Superblock = dict[str, Any]

_JOURNAL_BYTES_MAX = 64 << 20  # sixteen times what mkfs makes: replay reads it as a whole
_COUNTER_MAX = 1 << 62  # of what rises by one: beyond it is a forgery


def load(pmem: Pmem) -> Superblock:
    """The newest valid copy. The second one is looked for at every block size there is."""
    found = []
    trouble: Corrupt | None = None
    for copy, at in [(0, 0), *((1, size) for size in layout.BLOCK_SIZES)]:
        record = pmem.view[at : at + SUPERBLOCK.size]
        if len(record) < SUPERBLOCK.size or int.from_bytes(record[:4], "little") != layout.SB_MAGIC:
            continue
        try:
            layout.verify(record, layout.SB_MAGIC, f"superblock copy {'AB'[copy]}")
        except Corrupt as e:
            trouble = e
            continue
        values = SUPERBLOCK.unpack(record)
        if values["copy"] == copy and (copy == 0 or values["block_size"] == at):
            found.append(values)
    if not found and trouble:
        raise ImageError(f"{pmem.path}: both superblocks are damaged ({trouble.why}); see: daxfs fsck {pmem.path}")
    if not found:
        if not any(pmem.view[:4096]):
            raise ImageError(f"{pmem.path} is empty (zeros), not a daxfs image; make one with: daxfs mkfs {pmem.path}")
        raise ImageError(f"{pmem.path} is not a daxfs image; name another file, or make one with daxfs mkfs")
    newest = max(found, key=lambda values: values["sequence"])
    _check(pmem, newest)
    return newest


def _check(pmem: Pmem, sb: Superblock) -> None:
    path = pmem.path
    if sb["version"] > layout.MEDIA_VERSION:
        raise ImageError(f"{path} has media version {sb['version']}, newer than {layout.MEDIA_VERSION}; update daxfs")
    if sb["incompat"] & ~layout.FEATURES_INCOMPAT:
        raise ImageError(f"{path} has features that this daxfs does not know ({sb['incompat']:#x}); update daxfs")
    if sb["ro_compat"] & ~layout.FEATURES_RO_COMPAT and not pmem.readonly:
        raise ImageError(f"{path} has features that this daxfs can only read ({sb['ro_compat']:#x}); mount it with -o ro")
    size, blocks = sb["block_size"], sb["blocks"]
    if sb["version"] == 0 or sb["kind"] != SB_KIND or size not in layout.BLOCK_SIZES:
        raise ImageError(f"{path}: the superblock makes no sense (block size {size}); see: daxfs fsck {path}")
    if blocks > pmem.size // size:
        raise ImageError(f"{path} is truncated: it has {pmem.size} bytes of {blocks * size}; restore it from a copy")
    if max(sb["sequence"], sb["mounts"], sb["dirty_shutdowns"]) > _COUNTER_MAX:
        raise ImageError(f"{path}: the superblock's counters make no sense; see: daxfs fsck {path}")
    at = 2
    chunks = blocks // layout.chunk_blocks(size)
    for name, least, most in (("journal", 2, _JOURNAL_BYTES_MAX // size), ("idir", 1, -(-chunks * 8 // size))):
        start, count = sb[f"{name}_start"], sb[f"{name}_blocks"]
        if start != at or not least <= count <= most:
            raise ImageError(f"{path}: the superblock's {name} region makes no sense; see: daxfs fsck {path}")
        at = start + count
    if sb["data_start"] != at or at >= blocks or sb["state"] not in (layout.STATE_CLEAN, layout.STATE_MOUNTED):
        raise ImageError(f"{path}: the superblock's data region makes no sense; see: daxfs fsck {path}")
    if not at <= sb["ledger"] < blocks:
        raise ImageError(f"{path}: the superblock's pin ledger lies outside the image; see: daxfs fsck {path}")


def store(pmem: Pmem, sb: Superblock) -> None:
    """Write the values over the older copy, with the next sequence."""
    sb["sequence"] += 1
    sb["copy"] = sb["sequence"] % 2
    at = sb["copy"] * sb["block_size"]
    pmem.store(at, layout.seal(SUPERBLOCK.pack(**{**sb, "magic": layout.SB_MAGIC, "crc": 0})))
    pmem.flush(at, SUPERBLOCK.size)
    pmem.fence()
