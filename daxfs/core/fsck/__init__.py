"""fsck: reads an image trusting nobody, says what is wrong with it, and repairs it if asked to. `check` changes nothing.

Order: superblocks, journal (a committed transaction is replayed into a private copy), inode directory, every inode
with its extents, xattrs and ACLs, the tree of directories with link counts, the pin ledger, the snapshot, and last the
owners of all blocks. Each step goes on past what it cannot believe; findings are sentences.

Rules: no bytes of an image make it fail, loop, or use memory beyond what the inodes and extents that fit it need.
Not here: a word on what file data should be. What a repair does is in layers.py.
"""

from __future__ import annotations

import os

from daxfs.core.fsck.image import open_image
from daxfs.core.fsck.layers import check_image, repair
from daxfs.core.fsck.report import ERROR, FIXED, LEFT, NOTE, Finding, Progress, Report
from daxfs.core.pmem import Pmem

__all__ = ["ERROR", "FIXED", "LEFT", "NOTE", "Finding", "Progress", "Report", "check", "repair"]


def check(target: str | os.PathLike[str] | Pmem, progress: Progress | None = None) -> Report:
    """Check the image at a path, or the one that a volume of this process has open.

    ImageError: it could not be checked (no image, in use, both superblocks damaged): fsck(8)'s exit code 8.
    """
    report = Report(target.path if isinstance(target, Pmem) else os.fspath(target))
    with open_image(target, report) as image:
        check_image(image, report, progress or (lambda what, done, total: None))
    return report
