"""With `dax=never` the kernel believes its own mtime of a file only, and does not move it for writes that bypass its cache
(fuse_get_cache_mask, fuse_direct_write_iter of Linux 6.18). So it is told, through the only door there is: utimensat(2) on
the mount.

For a file that is open directly this knows the mtime that the kernel has. When the file has got another one, by a write(2)
or because a device wrote, the kernel is told before a stat is answered (it asks, as such a write makes it doubt
st_blocks), and when a descriptor that could write is closed.

Not here: a file without a name, or of somebody whose files the daemon may not touch; then stat shows the new mtime when
the kernel has forgotten the file. All of this is best effort within TELL_S: nobody waits long for a time stamp.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from daxfs.daemon.threads import in_thread

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.daemon.service import Service

TELL_S = 0.1  # the kernel may be in a truncate of the file that waits for pins


class Times:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[int, int] = {}  # inode -> the mtime that the kernel has, of files that are open directly
        self._telling: set[int] = set()

    def opened(self, inode: Inode) -> None:
        """It is open directly."""
        self._known.setdefault(inode.ino, inode.mtime)

    def set_by_kernel(self, inode: Inode) -> None:
        if inode.ino in self._known:
            self._known[inode.ino] = inode.mtime

    def behind(self, inode: Inode) -> bool:
        """Whether the kernel should be told, and is not just being told."""
        if inode.ino not in self._known or inode.ino in self._telling or self._service.gone:
            return False
        mtime: int = inode.mtime
        return self._known[inode.ino] != mtime

    def closed(self, inode: Inode, *, last: bool) -> None:
        """A descriptor that was open directly, and is still counted, is closed."""
        if self.behind(inode) and not self._service.volume.failed:
            self._service.start(self.tell, inode)
        elif last and inode.ino not in self._telling:
            self._known.pop(inode.ino, None)

    async def tell(self, inode: Inode) -> None:
        if not self.behind(inode):
            return
        mtime, path = inode.mtime, self._service.path(inode)
        self._telling.add(inode.ino)
        try:
            if inode.nlink:
                with trio.move_on_after(TELL_S):
                    await in_thread(
                        _tell, path, inode.ino, self._service.device, mtime, abandon_on_cancel=True
                    )
        finally:
            self._telling.discard(inode.ino)
        if inode.opens:
            self._known[inode.ino] = mtime
        else:
            self._known.pop(inode.ino, None)


def _tell(path: str, ino: int, device: str, mtime: int) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            seen = os.fstat(fd)
            same = seen.st_ino == ino and f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}" == device
            if same and seen.st_mtime_ns < mtime:
                os.utime(f"/proc/self/fd/{fd}", ns=(seen.st_atime_ns, mtime))
        finally:
            os.close(fd)
