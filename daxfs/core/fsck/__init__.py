"""fsck: reads an image trusting nobody, and says what is wrong with it. It changes nothing.

Order: superblocks, journal (a committed transaction is replayed into a private copy), inode directory, every inode
with its extents, xattrs and ACLs, the tree of directories with link counts, the pin ledger, the snapshot, and last the
owners of all blocks. Each step goes on past what it cannot believe; findings are sentences.

Rules: no bytes of an image make it fail, loop, or use memory beyond what the inodes and extents that fit it need.
Not here: repair, and a word on what file data should be.
"""

from __future__ import annotations

import os

from daxfs.core.fsck.image import open_image
from daxfs.core.fsck.report import ERROR, NOTE, Finding, Progress, Report
from daxfs.core.fsck.space import Owners, check_space
from daxfs.core.fsck.table import DAMAGED, FREE, TableCheck
from daxfs.core.fsck.tree import TreeCheck
from daxfs.core.pmem import Pmem

__all__ = ["ERROR", "NOTE", "Finding", "Progress", "Report", "check"]


def check(target: str | os.PathLike[str] | Pmem, progress: Progress | None = None) -> Report:
    """Check the image at a path, or the one that a volume of this process has open.

    ImageError: it could not be checked (no image, in use, both superblocks damaged): fsck(8)'s exit code 8.
    """
    path = target.path if isinstance(target, Pmem) else os.fspath(target)
    report = Report(path)
    step = progress or (lambda what, done, total: None)
    with open_image(target, report) as image:
        owners = Owners()
        table = TableCheck(image, owners, report, step)
        TreeCheck(image, table.inodes, table.extents, report, step)
        step("space", 0, 1)
        check_space(image, owners, table.inodes.in_state(FREE), table.inodes.in_state(DAMAGED), report)
        step("space", 1, 1)
    return report
