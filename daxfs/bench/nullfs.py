"""A null file system on pyfuse3: the floor that daxfs is measured against.

Directories, and files without contents. A read answers zeros from one shared buffer, a write is counted and thrown
away; only names, modes, times and sizes are kept. What is left is the price of the kernel's round trip, libfuse,
pyfuse3, trio and one small Python handler: what any plain pyfuse3 file system pays before it does its first bit of work.

Not here: links, xattrs, permissions, anything that survives the process.
Run: `python -m daxfs.bench.nullfs MOUNTPOINT` (in the foreground; ends on SIGTERM and on unmount).
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import time

import pyfuse3
import trio

ZEROS = bytes(1 << 20)
TIMEOUT_S = 3600.0  # one process owns all names: the kernel may keep what it learnt


class NullFS(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[int, pyfuse3.EntryAttributes] = {}
        self.names: dict[int, dict[bytes, int]] = {}  # of a directory
        self.listings: dict[int, list[tuple[bytes, int]]] = {}  # of the directories that are open
        self.lookups: dict[int, int] = {}
        self.last = pyfuse3.ROOT_INODE
        self.new_node(self.last, stat.S_IFDIR | 0o755, os.getuid(), os.getgid())

    def new_node(self, ino: int, mode: int, uid: int, gid: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(mode)
        entry.st_nlink = 2 if stat.S_ISDIR(mode) else 1
        entry.st_uid, entry.st_gid = uid, gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time.time_ns()
        entry.st_blksize = 4096
        entry.attr_timeout = entry.entry_timeout = TIMEOUT_S
        self.nodes[ino] = entry
        if stat.S_ISDIR(mode):
            self.names[ino] = {}
        return entry

    def node(self, ino: int) -> pyfuse3.EntryAttributes:
        try:
            return self.nodes[ino]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def drop(self, ino: int) -> None:
        """Forgets a node that has neither a name nor a user."""
        if self.nodes[ino].st_nlink == 0 and not self.lookups.get(ino):
            del self.nodes[ino]
            self.names.pop(ino, None)

    # Names

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        ino = self.names[parent_inode].get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.lookups[ino] = self.lookups.get(ino, 0) + 1
        return self.nodes[ino]

    async def forget(self, inode_list: list[tuple[pyfuse3.InodeT, int]]) -> None:  # type: ignore[override]
        for ino, count in inode_list:
            left = self.lookups.get(ino, 0) - count
            if left > 0:
                self.lookups[ino] = left
            else:
                self.lookups.pop(ino, None)
                if ino in self.nodes:
                    self.drop(ino)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        entry = self.enter(parent_inode, name, stat.S_IFREG | mode, ctx)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(entry.st_ino)), entry

    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.enter(parent_inode, name, stat.S_IFDIR | mode, ctx)

    def enter(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name in self.names[parent]:
            raise pyfuse3.FUSEError(errno.EEXIST)
        self.last = pyfuse3.InodeT(self.last + 1)
        entry = self.new_node(self.last, mode & ~ctx.umask, ctx.uid, ctx.gid)
        self.names[parent][name] = self.last
        self.lookups[self.last] = 1
        return entry

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        ino = self.names[parent_inode].get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if self.names.get(ino):
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        del self.names[parent_inode][name]
        self.nodes[ino].st_nlink = 0
        self.drop(ino)

    rmdir = unlink

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if name_old not in self.names[parent_inode_old]:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if name_new in self.names[parent_inode_new]:
            await self.unlink(parent_inode_new, name_new, ctx)
        self.names[parent_inode_new][name_new] = self.names[parent_inode_old].pop(name_old)

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        self.listings[inode] = list(self.names[inode].items())
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self.listings[fh]
        for place in range(start_id, len(listing)):
            name, ino = listing[place]
            if ino in self.nodes:
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self.nodes[ino], place + 1):
                    return
                self.lookups[ino] = self.lookups.get(ino, 0) + 1

    # Attributes

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self.node(inode)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        entry = self.node(inode)
        if fields.update_size:
            entry.st_size = attr.st_size
        if fields.update_mode:
            entry.st_mode = attr.st_mode
        return entry

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 20
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data

    # Data

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        self.node(inode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return ZEROS[: min(size, self.nodes[fh].st_size - off)] if off < self.nodes[fh].st_size else b""

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        entry = self.nodes[fh]
        entry.st_size = max(entry.st_size, off + len(buf))
        return len(buf)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        return None


async def end_on_sigterm() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()
            return


async def serve() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_sigterm)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m daxfs.bench.nullfs MOUNTPOINT", file=sys.stderr)
        return 2
    options = set(pyfuse3.default_options) | {"fsname=nullfs", "subtype=nullfs"}
    pyfuse3.init(NullFS(), sys.argv[1], options)
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
