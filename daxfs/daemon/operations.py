"""The pyfuse3 handlers: decode, call the core, reply. What pyfuse3 does not know, or is too slow for, is in raw.py.

Every handler runs under `_guarded`, the only place where an FsError becomes an errno for pyfuse3. No handler waits, so
each is atomic; `forget` alone yields, between inodes. Permissions are the kernel's business (default_permissions).
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FUSEError, InodeT, ModeT, RequestContext, StatvfsData

from daxfs.core import attributes, layout, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.daemon import virtual
from daxfs.daemon.protocol import VALID_S, sectors
from daxfs.daemon.service import WORK_S, Service, now
from daxfs.errors import Corrupt, FsError

log = logging.getLogger("daxfs")

Handler = Callable[..., Awaitable[Any]]


def _guarded(handler: Handler) -> Handler:
    """pyfuse3 survives no exception but FUSEError: any other one would end the loop with the request unanswered."""

    @functools.wraps(handler)
    async def guard(self: Operations, *args: Any) -> Any:
        if self.service.gone and handler.__name__ != "forget":
            raise FUSEError(self.service.gone_errno)
        if virtual.refuses(args):
            raise FUSEError(errno.EOPNOTSUPP if handler.__name__ in ("getxattr", "listxattr") else errno.EPERM)
        try:
            return await handler(self, *args)
        except FUSEError:
            raise
        except Corrupt as e:
            log.error("%s: %s", handler.__name__, e.why)
            raise FUSEError(e.errno) from None
        except FsError as e:
            raise FUSEError(e.errno) from None
        except Exception as e:
            self.service.crashed(e)
            if handler.__name__ == "forget":  # it has no answer: pyfuse3 takes an errno for a failure of its loop
                return None
            raise FUSEError(errno.EIO) from None

    return guard


class _Guarded(type):
    """A class of which every public coroutine is guarded."""

    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> _Guarded:
        for key, member in members.items():
            if not key.startswith("_") and inspect.iscoroutinefunction(member):
                members[key] = _guarded(member)
        return super().__new__(cls, name, bases, members)


class Operations(pyfuse3.Operations, metaclass=_Guarded):
    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self._volume = service.volume
        self._inode = service.volume.inode

    def _entry(self, inode: Inode, parent: int, name: bytes) -> EntryAttributes:
        """An inode that the kernel learns of by this name."""
        self.service.know(inode, parent, name)
        entry = EntryAttributes()
        entry.st_ino = inode.ino
        entry.generation = inode.generation
        entry.entry_timeout = entry.attr_timeout = VALID_S
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = self._volume.block_size
        entry.st_blocks = sectors(inode, self._volume.block_size)
        entry.st_atime_ns = inode.atime
        entry.st_mtime_ns = inode.mtime
        entry.st_ctime_ns = inode.ctime
        return entry

    async def access(self, ino: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        raise FUSEError(errno.ENOSYS)  # default_permissions: the kernel knows

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        volume, data = self._volume, StatvfsData()
        data.f_bsize = data.f_frsize = volume.block_size
        data.f_blocks = volume.blocks
        data.f_bfree = volume.free
        data.f_bavail = volume.alloc.available
        chunks_possible = volume.free // layout.chunk_blocks(volume.block_size)
        data.f_ffree = data.f_favail = len(volume.free_inodes) + chunks_possible * layout.CHUNK_INODES
        data.f_files = (len(volume.chunks) + chunks_possible) * layout.CHUNK_INODES
        data.f_namemax = layout.NAME_MAX
        return data

    # -- names --

    async def forget(self, forgotten: Sequence[tuple[InodeT, int]]) -> None:
        turn = time.monotonic()
        for ino, count in forgotten:
            if virtual.owns(ino) or self.service.gone:
                continue
            try:
                self.service.forget(ino, count)
            except FsError as e:
                log.error("forget of inode %d: %s", ino, e.why)
            if time.monotonic() - turn > WORK_S:
                await trio.lowlevel.checkpoint()
                turn = time.monotonic()

    async def readlink(self, ino: InodeT, ctx: RequestContext) -> bytes:
        inode = self._inode(ino)
        target = namespace.readlink(self._volume, inode)
        self.service.accessed(inode)
        return target

    async def mknod(self, parent: InodeT, name: bytes, mode: ModeT, rdev: int, ctx: RequestContext) -> EntryAttributes:
        inode = namespace.create(self._volume, now(), self._inode(parent), name, mode, _caller(ctx), rdev)
        return self._entry(inode, parent, name)

    async def mkdir(self, parent: InodeT, name: bytes, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        inode = namespace.mkdir(self._volume, now(), self._inode(parent), name, mode, _caller(ctx))
        return self._entry(inode, parent, name)

    async def symlink(self, parent: InodeT, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = namespace.symlink(self._volume, now(), self._inode(parent), name, target, _caller(ctx))
        return self._entry(inode, parent, name)

    async def link(self, ino: InodeT, parent: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = self._inode(ino)
        namespace.link(self._volume, now(), inode, self._inode(parent), name)
        return self._entry(inode, parent, name)

    async def rmdir(self, parent: InodeT, name: bytes, ctx: RequestContext) -> None:
        self.service.remove(namespace.rmdir, parent, name)

    async def rename(
        self, parent: InodeT, name: bytes, new_parent: InodeT, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        volume, source, target = self._volume, self._inode(parent), self._inode(new_parent)
        inode = namespace.lookup(volume, source, name)
        other = namespace.lookup(volume, target, new_name)
        namespace.rename(volume, now(), source, name, target, new_name, flags)
        if inode is None or inode is other:
            return
        self.service.renamed(inode, new_parent, new_name)
        if other is None:
            return
        if flags & pyfuse3.RENAME_EXCHANGE:
            self.service.renamed(other, parent, name)
        else:
            self.service.unnamed(other, new_parent, new_name)

    # -- nothing is held back: what a call changed is durable when it returns, and the kernel need not ask again --

    async def flush(self, fh: FileHandleT) -> None:
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        raise FUSEError(errno.ENOSYS)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        raise FUSEError(errno.ENOSYS)

    # -- extended attributes; setting them is raw.py's, for the flags that pyfuse3 drops --

    async def getxattr(self, ino: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        return attributes.getxattr(self._volume, self._inode(ino), name)

    async def listxattr(self, ino: InodeT, ctx: RequestContext) -> list[bytes]:
        return attributes.listxattr(self._volume, self._inode(ino), trusted=ctx.uid == 0)

    async def removexattr(self, ino: InodeT, name: bytes, ctx: RequestContext) -> None:
        inode = self._inode(ino)
        attributes.removexattr(self._volume, now(), inode, name)
        self.service.attribute_changed(inode, name)


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.umask)
