"""The superblock, whatever is left of it: which copy counts, and what to do if none does."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import cast

from daxfs.core import layout, superblock
from daxfs.core.format import plan
from daxfs.core.fsck.mend import mended
from daxfs.core.fsck.report import Report
from daxfs.core.layout import JOURNAL_HEADER, LEDGER_BLOCK, SUPERBLOCK
from daxfs.core.pmem import Pmem
from daxfs.core.superblock import Superblock
from daxfs.errors import Corrupt, ImageError

# What both copies of the superblock agree on for ever.
_CONSTANT = ("kind", "version", "uuid", "block_size", "blocks", "journal_start", "journal_blocks", "idir_start",
             "idir_blocks", "data_start", "created")  # fmt: skip


def choose_superblock(pmem: Pmem, report: Report) -> Superblock:
    """The newest copy that makes sense; else one in which a flipped bit can be put right; else a new one, if the image shows
    where everything is. ImageError if nothing helps. Nothing is stored."""
    try:
        return superblock.load(pmem)
    except ImageError as e:
        trouble = e
    sound = list(_sound(pmem))
    if any(_of_another_time(values) for values in sound):
        raise trouble
    for repaired in (False, True):
        found: list[Superblock] = []
        for at in (0, *layout.BLOCK_SIZES):
            record = pmem.load(at, SUPERBLOCK.size)
            if len(record) == SUPERBLOCK.size:
                candidate = mended(record) if repaired else record
                with contextlib.suppress(ImageError):
                    found.append(superblock.load(cast(Pmem, _OneCopy(pmem, at, candidate or b""))))
        if found:
            best = max(found, key=lambda values: int(values["sequence"]))
            report.error(f"superblock copy {'AB'[best['copy']]} is the only one that " +
                         ("can be mended: one of its bits is flipped" if repaired else "makes sense"))  # fmt: skip
            return best
    cut_off = any(v["block_size"] in layout.BLOCK_SIZES and v["blocks"] * v["block_size"] > pmem.size for v in sound)
    for size in () if cut_off else layout.BLOCK_SIZES:
        rebuilt = _rebuilt(pmem, size)
        if rebuilt is not None:
            report.error("both superblocks are lost; the journal and the inode directory show what was in them")
            return rebuilt
    advice = "nothing can be read without one; restore the image from a copy"
    raise ImageError(trouble.why.replace(f"see: daxfs fsck {pmem.path}", advice))


def _sound(pmem: Pmem) -> Iterator[Superblock]:
    """The copies whose checksum is right, wherever one may be."""
    for at in (0, *layout.BLOCK_SIZES):
        with contextlib.suppress(Corrupt, struct.error):
            record = pmem.load(at, SUPERBLOCK.size)
            layout.verify(record, layout.SB_MAGIC, "superblock")
            yield SUPERBLOCK.unpack(record)


def _of_another_time(values: Superblock) -> bool:
    """Whether it is that of a daxfs that has learned more than this one."""
    unknown = values["incompat"] & ~layout.FEATURES_INCOMPAT or values["ro_compat"] & ~layout.FEATURES_RO_COMPAT
    return bool(values["version"] > layout.MEDIA_VERSION or unknown)


def _rebuilt(pmem: Pmem, size: int) -> Superblock | None:
    """The superblock of a volume that mkfs makes on such a file, if journal and inode directory are where it puts them.

    What only the superblock knew is lost: label, counters, and the UUID unless a copy still has it. The volume counts as not
    unmounted, since nobody knows.
    """
    try:
        sb = plan(pmem.size // size, size)
    except ImageError:
        return None
    journal = JOURNAL_HEADER.pack(magic=layout.JOURNAL_MAGIC, crc=0, address=2 * size, reserved=0,
                                  body_blocks=sb["journal_blocks"] - 1)  # fmt: skip
    first = layout.idir_word(0, sb["data_start"])
    if pmem.load(2 * size, len(journal)) != layout.seal(journal) or pmem.load_word(sb["idir_start"] * size) != first:
        return None
    for at in (0, size):
        values = SUPERBLOCK.unpack(pmem.load(at, SUPERBLOCK.size))
        if (values["magic"], values["kind"]) == (layout.SB_MAGIC, layout.SB_KIND):
            sb["uuid"] = values["uuid"]
    ledger = LEDGER_BLOCK.unpack(pmem.load(sb["ledger"] * size, LEDGER_BLOCK.size))
    sb.update(uuid=sb["uuid"] or bytes(16), label=b"", boot_id=ledger["boot_id"], state=layout.STATE_MOUNTED)
    return sb


class _OneCopy:
    """An image that has this copy of the superblock and no other."""

    def __init__(self, pmem: Pmem, at: int, record: bytes) -> None:
        self.path, self.size, self.readonly = pmem.path, pmem.size, pmem.readonly
        self.view = memoryview(bytes(at) + record)


def check_superblocks(pmem: Pmem, newest: Superblock, report: Report) -> None:
    for copy, at in ((0, 0), (1, newest["block_size"])):
        what = f"superblock copy {'AB'[copy]}"
        record = pmem.load(at, SUPERBLOCK.size)
        try:
            layout.verify(record, layout.SB_MAGIC, what)
        except Corrupt as e:
            report.error(f"{e.why}; the other copy is used")
            continue
        values = SUPERBLOCK.unpack(record)
        if values["copy"] != copy or any(values[name] != newest[name] for name in _CONSTANT):
            report.error(f"{what}: it does not go with the other copy")
        elif values["sequence"] == newest["sequence"] and newest["copy"] != copy:
            report.error("both copies of the superblock have the same sequence")
    if newest["state"] == layout.STATE_MOUNTED:
        report.note("the volume is mounted, or was not unmounted: the next mount recovers it")
