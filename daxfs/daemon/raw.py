"""The requests that the native session hands over as they come: all of them. Those about names are in names.py; here are
attributes, opening, data, and the volume as a whole.

Decode, call the core, reply. `install` registers them all; every handler runs under `_translated`, the only place where an
FsError becomes an errno. Any other exception is caught by the session, which answers EIO and calls `Service.crashed`.
What requests.pyx answers quickly comes here when it cannot: each request has its handler in Python.
Long work is answered in pieces (short copies), so that no request keeps the loop for more than about 10 ms.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from daxfs.core import attributes, fileops, layout, namespace
from daxfs.core.breaking import NOBODY, Breaker
from daxfs.core.inode import Inode
from daxfs.core.policy import POLICY_XATTR
from daxfs.core.waiting import LayoutBusy
from daxfs.daemon import protocol, requests, session
from daxfs.daemon.caching import DIRECT_FLAGS
from daxfs.daemon.coherence import ALL
from daxfs.daemon.control import Control
from daxfs.daemon.names import DIRECTORY_FLAGS, NameRequests, caller
from daxfs.daemon.service import Service, now
from daxfs.daemon.session import Request
from daxfs.daemon.twins import PAGE
from daxfs.daemon.virtual import Virtual
from daxfs.errors import BadArgument, Corrupt, Exists, FsError, NoSpace, NotPermitted, OutOfRange

log = logging.getLogger("daxfs")

COPY_MAX = 4 << 20  # bytes that one COPY_FILE_RANGE copies; callers go on from there
_WITHOUT_DEVICE = frozenset((protocol.IOCTL, protocol.POLL, protocol.FLUSH, protocol.FORGET, protocol.BATCH_FORGET))
_NS = 1_000_000_000


class RawRequests:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._volume = service.volume
        self._inode = service.volume.inode
        self._control = Control(service)
        self.removal = self._control.admin.removal
        self._virtual = Virtual(self._control.admin, service.volume.block_size)
        self._names = NameRequests(service)

    def install(self, *, quick: bool = True) -> None:
        """`quick`: what needs nothing but memory is answered by requests.pyx."""
        for opcode, handler in self._handlers().items():
            session.register(opcode, self._translated(handler))
        service, control = self.service, self._control
        requests.install(
            self._inode, service.names, service.opened, control.pin, control.unpin,
            breaks=self._volume.breaks, block_size=self._volume.block_size, file_flags=DIRECT_FLAGS,
            directory_flags=DIRECTORY_FLAGS, quick=quick, direct=not service.caching.on,
        )  # fmt: skip
        service.coherence.install(quick=quick)

    def _handlers(self) -> dict[int, Callable[[Request], None]]:
        return self._names.handlers() | {
            protocol.GETATTR: self.getattr,
            protocol.SETATTR: self.setattr,
            protocol.STATX: self.statx,
            protocol.GETXATTR: self.getxattr,
            protocol.SETXATTR: self.setxattr,
            protocol.LISTXATTR: self.listxattr,
            protocol.REMOVEXATTR: self.removexattr,
            protocol.OPEN: self.open,
            protocol.CREATE: self.create,
            protocol.TMPFILE: self.tmpfile,
            protocol.RELEASE: self.release,
            protocol.RELEASEDIR: self.release,
            protocol.READ: self.read,
            protocol.WRITE: self.write,
            protocol.FALLOCATE: self.fallocate,
            protocol.LSEEK: self.lseek,
            protocol.COPY_FILE_RANGE: self.copy_file_range,
            protocol.COPY_FILE_RANGE_64: self.copy_file_range,
            protocol.STATFS: self.statfs,
            protocol.FLUSH: self.not_needed,
            protocol.FSYNC: self.fsync,
            protocol.FSYNCDIR: self.not_needed,
            protocol.ACCESS: self.not_needed,
            protocol.IOCTL: self._control.ioctl,
            protocol.POLL: self._control.poll,
            protocol.NOTIFY_REPLY: self.service.coherence.retrieved,
        }

    def _translated(self, handler: Callable[[Request], None]) -> Callable[[Request], None]:
        """An FsError becomes an errno; a call that has to wait is kept and answered later."""
        service, waiting, takes = self.service, self.service.waiting, self._virtual.takes
        removal = self.removal

        def take(request: Request) -> None:
            if takes(request):
                return
            if service.gone and request.opcode not in _WITHOUT_DEVICE:
                removal.answer(request)
                return
            try:
                handler(request)
            except LayoutBusy:
                waiting.wait(request, handler)
            except NoSpace as full:
                if waiting.space_to_come(request):
                    waiting.wait(request, handler)
                else:
                    request.error(full.errno)
            except Corrupt as e:
                log.error("request %d for inode %d: %s", request.opcode, request.nodeid, e.why)
                request.error(e.errno)
            except FsError as e:
                request.error(e.errno)

        return take

    def _breaker(self, request: Request, owner: int | None = None) -> Breaker:
        overdue = self.service.waiting.overdue(request)
        return NOBODY if owner is None and not overdue else Breaker(owner, False, overdue)

    # -- attributes --

    def getattr(self, request: Request) -> None:
        if protocol.GETATTR_IN.unpack_from(request.body)[0] & protocol.GETATTR_FH:
            self.service.caching.before_write(request.nodeid)
        inode = self._inode(request.nodeid)
        if not self._told_first(request, inode, self.getattr):
            request.reply(requests.attr_out(inode))

    def statx(self, request: Request) -> None:
        inode = self._inode(request.nodeid)
        if not self._told_first(request, inode, self.statx):
            request.reply(protocol.statx_out(inode, self._volume.block_size))

    def _told_first(self, request: Request, inode: Inode, handler: Callable[[Request], None]) -> bool:
        """Whether the answer comes later, when the kernel has heard of the times that it will show."""
        times = self.service.caching.times
        if not times.behind(inode):
            return False

        async def told() -> None:
            await times.tell(inode)
            self._again(request, handler)

        self.service.start(told)
        return True

    def _again(self, request: Request, handler: Callable[[Request], None]) -> None:
        """Answer a request that was kept, if nobody has (the device was removed meanwhile)."""
        if not request.answered:
            self._translated(handler)(request)

    def setattr(self, request: Request) -> None:
        valid, _, size, *_ = protocol.SETATTR_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        if valid & protocol.FATTR_SIZE and self.service.caching.may_be_dirty(inode):
            self.service.start(self._resize_as_the_kernel_has_it, request, inode, size)
        else:
            self._setattr(request)

    async def _resize_as_the_kernel_has_it(self, request: Request, inode: Inode, size: int) -> None:
        """The kernel holds write-back back now, so the volume does not know yet how long the file was."""
        caching, volume = self.service.caching, self._volume
        known = await caching.size_in_kernel(inode)
        if known < size <= layout.FILE_SIZE_MAX and not (volume.readonly or volume.failed):
            await caching.zero_behind(inode, known, size)
        self._again(request, partial(self._setattr, known_size=known))

    def _setattr(self, request: Request, known_size: int = 0) -> None:
        valid, fh, size, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns, mode, uid, gid = (
            protocol.SETATTR_IN.unpack_from(request.body)
        )
        inode, at = self._inode(request.nodeid), now()
        old_size = inode.size

        def time(bit: int, now_bit: int, seconds: int, nanos: int) -> int | None:
            return at if valid & now_bit else seconds * _NS + nanos if valid & bit else None

        new = attributes.Attributes(
            mode=mode & 0o7777 if valid & protocol.FATTR_MODE else None,
            uid=uid if valid & protocol.FATTR_UID else None,
            gid=gid if valid & protocol.FATTR_GID else None,
            size=size if valid & protocol.FATTR_SIZE else None,
            atime=time(protocol.FATTR_ATIME, protocol.FATTR_ATIME_NOW, atime_s, atime_ns),
            mtime=time(protocol.FATTR_MTIME, protocol.FATTR_MTIME_NOW, mtime_s, mtime_ns),
            ctime=time(protocol.FATTR_CTIME, 0, ctime_s, ctime_ns),
            kill_priv=bool(valid & protocol.FATTR_KILL_SUIDGID),
            breaker=self._breaker(request, fh if valid & protocol.FATTR_FH else None),
            known_size=known_size,
        )
        if valid == protocol.FATTR_FLUSH and self.service.caching.on:
            attributes.times_of_writes(self._volume, inode, mtime_s * _NS + mtime_ns, ctime_s * _NS + ctime_ns)
        elif not new.is_empty or request.uid in (0, inode.uid):  # of nothing: the kernel did not check who asks
            try:
                attributes.setattr(self._volume, at, inode, new)
            except LayoutBusy:
                self.service.coherence.change_kept(inode.ino, request)
                raise
            self.service.coherence.masked(inode, old_size)
        if new.mtime is not None:
            self.service.caching.times.set_by_kernel(inode)
        request.reply(requests.attr_out(inode))

    def setxattr(self, request: Request) -> None:
        size, flags, extra = protocol.SETXATTR_IN.unpack_from(request.body)
        name = protocol.name_at(request.body, protocol.SETXATTR_IN.size)
        value_at = protocol.SETXATTR_IN.size + len(name) + 1
        value = bytes(request.body[value_at : value_at + size])
        inode = self._inode(request.nodeid)
        kill_sgid = bool(extra & protocol.SETXATTR_ACL_KILL_SGID)
        if name == POLICY_XATTR and value == b"unsafe":
            self._allow_unsafe(request, inode)
        attributes.setxattr(self._volume, now(), inode, name, value, flags, kill_sgid=kill_sgid)
        request.reply()

    def _allow_unsafe(self, request: Request, inode: Inode) -> None:
        """Blocks that are freed under a pin become anybody's: a user must not get at other people's bytes like that."""
        if request.uid not in (0, os.getuid()):
            raise NotPermitted("policy unsafe gives pinned blocks away: only for root and the user who mounted")
        log.warning("policy unsafe for %s: files WILL be corrupted by its holders", self.service.path(inode))

    def getxattr(self, request: Request) -> None:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        name = protocol.name_at(request.body, protocol.GETXATTR_IN.size)
        _reply_sized(request, size, attributes.getxattr(self._volume, self._inode(request.nodeid), name))

    def listxattr(self, request: Request) -> None:
        (size,) = protocol.GETXATTR_IN.unpack_from(request.body)
        names = attributes.listxattr(self._volume, self._inode(request.nodeid), trusted=request.uid == 0)
        _reply_sized(request, size, b"".join(name + b"\0" for name in names))

    def removexattr(self, request: Request) -> None:
        inode, name = self._inode(request.nodeid), bytes(request.body[:-1])
        attributes.removexattr(self._volume, now(), inode, name)
        request.reply()

    # -- opening --

    def release(self, request: Request) -> None:
        self.service.release(*protocol.RELEASE_IN.unpack_from(request.body))
        request.reply()

    def open(self, request: Request) -> None:
        flags, more = protocol.OPEN_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        self.service.caching.await_release(request, inode, flags)
        if flags & os.O_TRUNC:
            self._truncate_at_open(request, inode, kill_priv=bool(more & protocol.OPEN_KILL_SUIDGID))
        request.reply(self._opened(request, inode, flags))

    def _opened(self, request: Request, inode: Inode, flags: int) -> bytes:
        fh = self.service.open(inode, flags, request.pid)
        return protocol.OPEN_OUT.pack(fh, self.service.caching.flags(self.service.file(fh)))

    def _truncate_at_open(self, request: Request, inode: Inode, *, kill_priv: bool) -> None:
        new = attributes.Attributes(size=0, kill_priv=kill_priv, breaker=self._breaker(request))
        with self._watched(inode):
            attributes.setattr(self._volume, now(), inode, new)

    def create(self, request: Request) -> None:
        flags, mode, umask, more = protocol.CREATE_IN.unpack_from(request.body)
        name = protocol.name_at(request.body, protocol.CREATE_IN.size)
        parent = self._inode(request.nodeid)
        mode = stat.S_IFREG | mode & 0o7777
        try:
            inode = namespace.create(self._volume, now(), parent, name, mode, caller(request, umask))
        except Exists:
            found = None if flags & os.O_EXCL else namespace.lookup(self._volume, parent, name)
            if found is None or not found.is_file:
                raise
            inode = found
            if flags & os.O_TRUNC:
                self._truncate_at_open(request, inode, kill_priv=bool(more & protocol.OPEN_KILL_SUIDGID))
        self._reply_created(request, inode, flags, name)

    def tmpfile(self, request: Request) -> None:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.body)
        parent = self._inode(request.nodeid)
        inode = namespace.tmpfile(self._volume, now(), parent, stat.S_IFREG | mode & 0o7777, caller(request, umask))
        self._reply_created(request, inode, flags, b"#%d" % inode.ino)

    def _reply_created(self, request: Request, inode: Inode, flags: int, name: bytes) -> None:
        self._names.reply_entry(request, inode, name, self._opened(request, inode, flags))

    # -- data --

    @contextmanager
    def _watched(self, inode: Inode) -> Iterator[None]:
        """The kernel does not expect a change of data to change the mode: tell it when suid or sgid has gone."""
        mode = inode.mode
        yield
        if inode.mode != mode:
            self.service.stale(inode)

    def read(self, request: Request) -> None:
        _, offset, size = protocol.READ_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        if not protocol.fills_pages(request.body):
            data = fileops.read(self._volume, inode, offset, size)
        elif self.service.coherence.on and inode.is_file:
            data = self.service.coherence.fill(request, inode, offset, size)
        else:
            self.service.caching.fill(inode)
            data = fileops.read(self._volume, inode, offset, size)
        self.service.accessed(inode)
        request.reply(data)

    def write(self, request: Request) -> None:
        _, offset, size, flags = protocol.WRITE_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        data = request.body[protocol.WRITE_IN.size : protocol.WRITE_IN.size + size]
        if flags & protocol.WRITE_CACHE:
            self._write_back(inode, offset, data)
            written = size
        else:
            kill_priv, mode, old_size = bool(flags & protocol.WRITE_KILL_SUIDGID), inode.mode, inode.size
            self.service.coherence.before_write(request, inode, offset, len(data))
            written = fileops.write(self._volume, now(), inode, offset, data, kill_priv=kill_priv)
            if inode.mode != mode:
                self.service.stale(inode)
            if inode.size > old_size and self._answered_later(request, inode, old_size, protocol.WRITE_OUT.pack(written)):
                return
        request.reply(protocol.WRITE_OUT.pack(written))

    def _answered_later(self, request: Request, inode: Inode, old_size: int, answer: bytes = b"") -> bool:
        """Whether a request that may have made a file longer is answered when the page of the old end is dropped."""
        dropped = self.service.coherence.grew(inode, old_size)
        if dropped is None:
            return False

        def reply() -> None:
            if not request.answered:
                request.reply(answer)

        async def wait() -> None:
            await dropped.wait()
            reply()

        request.on_interrupt = reply  # the change is made
        self.service.start(wait)
        return True

    def _write_back(self, inode: Inode, offset: int, data: memoryview) -> None:
        """Dirty pages of the kernel: it looks at errors, but not at how much was written. NoSpace if not all was."""
        caching, blocks = self.service.caching, inode.map.blocks
        try:
            if not caching.on:
                self.service.coherence.write_back(inode, offset, data, now())
            elif fileops.write(self._volume, now(), inode, offset, data, keep_times=True) < len(data):
                raise NoSpace("the volume is full")
        except NoSpace:
            caching.full(inode)
            raise
        finally:
            if inode.map.blocks != blocks:
                caching.grown(inode)

    async def _when_settled(self, request: Request, inode: Inode, handler: Callable[[Request], None]) -> None:
        """Answer what asks for the end of a file when the kernel and the volume agree about it."""
        await self.service.caching.settle(inode)
        self._again(request, handler)

    def fallocate(self, request: Request) -> None:
        _, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        grows = not mode & fileops.FALLOC_KEEP_SIZE and offset + length > inode.size
        if grows and self.service.caching.may_be_dirty(inode):
            self.service.start(self._when_settled, request, inode, self._fallocate)
        else:
            self._fallocate(request)

    def _fallocate(self, request: Request) -> None:
        fh, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request.body)
        inode, breaker = self._inode(request.nodeid), self._breaker(request, fh)
        kill_priv, old_size = _loses_privileges(request), inode.size
        if mode & ~fileops.FALLOC_KEEP_SIZE:
            self.service.coherence.clear(request, inode, offset, offset + length)
        with self._watched(inode):
            fileops.fallocate(self._volume, now(), inode, mode, offset, length, kill_priv=kill_priv, breaker=breaker)
        if not self._answered_later(request, inode, old_size):
            request.reply()

    def lseek(self, request: Request) -> None:
        """The kernel does not write dirty pages back first."""
        inode, size = self._inode(request.nodeid), self._volume.block_size
        _, offset, _ = protocol.LSEEK_IN.unpack_from(request.body)
        if self.service.caching.may_be_dirty(inode):
            self.service.start(self._seek_when_written, request, inode.ino)
            return
        first, behind = offset // size, -(-inode.size // size)
        if first < behind and not inode.map.written(first, behind - first):
            self.service.coherence.clear(request, inode, 0, ALL * PAGE)
        self._seek(request)

    async def _seek_when_written(self, request: Request, ino: int) -> None:
        await self.service.caching.drop(ino)
        self._again(request, self._seek)

    def _seek(self, request: Request) -> None:
        _, offset, whence = protocol.LSEEK_IN.unpack_from(request.body)
        found = fileops.seek(self._volume, self._inode(request.nodeid), offset, whence)
        request.reply(protocol.LSEEK_OUT.pack(found))

    def copy_file_range(self, request: Request) -> None:
        _, _, other, _, other_offset, length, _ = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        target = self._inode(other)
        if other_offset + length > target.size and self.service.caching.may_be_dirty(target):
            self.service.start(self._when_settled, request, target, self._copy_file_range)
        else:
            self._copy_file_range(request)

    def _copy_file_range(self, request: Request) -> None:
        _, offset, other, _, other_offset, length, flags = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        if flags:
            raise BadArgument("copy_file_range knows no flags")
        source, target = self._inode(request.nodeid), self._inode(other)
        length = min(length, COPY_MAX)
        kill_priv, old_size = _loses_privileges(request), target.size
        self.service.coherence.clear(request, source, offset, offset + length)  # the kernel does not write it back
        self.service.coherence.clear(request, target, other_offset, other_offset + length)
        with self._watched(target):
            copied = fileops.copy_range(
                self._volume, now(), source, offset, target, other_offset, length, kill_priv=kill_priv
            )
        answer = protocol.COPY_64_OUT if request.opcode == protocol.COPY_FILE_RANGE_64 else protocol.WRITE_OUT
        if not self._answered_later(request, target, old_size, answer.pack(copied)):
            request.reply(answer.pack(copied))

    # -- the volume --

    def statfs(self, request: Request) -> None:
        volume, size = self._volume, self._volume.block_size
        request.reply(protocol.STATFS_OUT.pack(
            volume.blocks, volume.free, volume.alloc.available, volume.inodes, volume.inodes_free,
            size, layout.NAME_MAX, size,
        ))  # fmt: skip

    def fsync(self, request: Request) -> None:
        """Nothing is held back, but the kernel shall ask: writing pages back to a dead daemon is no error to it, this call
        then is."""
        request.reply()

    def not_needed(self, request: Request) -> None:
        """Nothing is held back: what a call changed is durable when it returns. And permissions the kernel checks itself. It
        need not ask again."""
        request.error(errno.ENOSYS)


def _reply_sized(request: Request, size: int, value: bytes) -> None:
    """As getxattr(2) has it: with no room given, how much is needed."""
    if not size:
        request.reply(protocol.GETXATTR_OUT.pack(len(value)))
    elif len(value) > size:
        raise OutOfRange
    else:
        request.reply(value)


def _loses_privileges(request: Request) -> bool:
    """FALLOCATE and COPY_FILE_RANGE do not say whether the caller has CAP_FSETID, and leave the bits to us."""
    return request.uid != 0
