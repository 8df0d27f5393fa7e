"""statfs(2): what `df` and `df -i` say is what the volume says of itself."""

from __future__ import annotations

import os
import time

from daxfs.core.volume import Volume
from tests.conftest import Maker
from tests.mount.harness import Mounted, eventually

FILES = 700  # more than twenty chunks of inodes


def _agrees(mounted: Mounted, used: int) -> os.statvfs_result:
    """What the mount says, if the volume says the same when nobody has it mounted. `used`: inodes, once the kernel has
    forgotten what has no name."""
    eventually(f"{used} inodes are used", lambda: _used(os.statvfs(mounted.path)) == used, within_s=20)
    said = os.statvfs(mounted.path)
    mounted.umount()
    volume = Volume.open(mounted.image, readonly=True, now=time.time_ns())
    try:
        assert (said.f_files, said.f_ffree, said.f_favail) == (volume.inodes, volume.inodes_free, volume.inodes_free)
        assert (said.f_blocks, said.f_bfree, said.f_bavail) == (volume.blocks, volume.free, volume.alloc.available)
    finally:
        volume.close(time.time_ns())
    mounted.mount()
    return said


def _used(said: os.statvfs_result) -> int:
    return said.f_files - said.f_ffree


def test_inodes_and_blocks_are_those_of_the_volume(make_mount: Maker) -> None:
    mounted = make_mount(size="16M")
    empty = _agrees(mounted, 1)  # the root
    for n in range(FILES):
        (mounted.path / str(n)).write_bytes(b"x" * (n % 3 * 4096))
    full = _agrees(mounted, FILES + 1)
    assert full.f_ffree < empty.f_ffree - FILES
    for n in range(FILES):
        (mounted.path / str(n)).unlink()
    after = _agrees(mounted, 1)
    assert after.f_ffree > full.f_ffree + FILES
