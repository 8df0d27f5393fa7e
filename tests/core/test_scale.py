"""Costs and memory that must not grow with what a call does not touch: the image, the file, other files, pins.

Growth is asserted, never a time: the CPU time of the same calls at a size and at ten times that size, side by side in turns,
and the best of several rounds. python -m tools.scale measures the same in full.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from daxfs.core import layout
from daxfs.core.format import format_image
from daxfs.core.fsck import check
from daxfs.core.journal import Journal
from daxfs.core.volume import Volume

NOW = 1_700_000_000_000_000_000
TIB = 1 << 40

_PEAK = """
import sys
from daxfs.core.fsck import check
from daxfs.core.volume import Volume

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = peak()
volume = Volume.open(sys.argv[1], now=1)
volume.close(1)
assert check(sys.argv[1]).exit_code == 0
print(peak() - before)
"""


def test_memory_of_a_sparse_image_is_that_of_what_is_in_it(tmp_path: Path) -> None:
    """Mount, unmount and fsck of an empty TiB: neither memory nor the host's disk pays for what is not there."""
    image = tmp_path / "image"
    format_image(image, TIB, now=NOW)
    done = subprocess.run([sys.executable, "-c", _PEAK, image], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10, "KiB"
    assert os.stat(image).st_blocks * 512 < 16 << 20


def test_fsck_sees_what_a_replay_wrote_into_a_hole(tmp_path: Path) -> None:
    """The inode directory is read where its file has data, and where a committed transaction is about to put some."""
    image = tmp_path / "image"
    format_image(image, TIB, now=NOW)
    volume = Volume.open(image, now=NOW)
    sb, index = volume.sb, 1 << 22
    at = sb["idir_start"] * volume.block_size + 8 * index
    journal = Journal(volume.pmem, sb["journal_start"], sb["journal_blocks"], volume.block_size, TIB)
    journal.pending()
    journal._apply = lambda records: None  # type: ignore[method-assign]
    journal.commit([(at, layout.idir_word(index, volume.data_blocks.stop - 64).to_bytes(8, "little"))])
    volume.fail("the machine stops here")
    volume.close(NOW)
    assert not any(first <= at < end for first, end in written(image))
    report = check(image)
    assert [finding.text for finding in report.findings if "middle" in finding.text] == [
        "inode directory: an entry in the middle is missing"
    ]


def written(image: Path) -> list[tuple[int, int]]:
    from daxfs.core.pmem import Pmem

    pmem = Pmem(image, readonly=True)
    try:
        return list(pmem.written(0, TIB))
    finally:
        pmem.close()
