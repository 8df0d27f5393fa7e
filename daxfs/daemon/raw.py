"""The requests that the native session hands over as they come: data, sizes, and what pyfuse3 does not know or loses.

Decode, call the core, reply. `install` registers them all; every handler runs under `_translated`, where an FsError
becomes an errno. Any other exception is caught by the session, which answers EIO and calls `Service.crashed`.
Long work is answered in pieces (short copies), so that no request keeps the loop for more than about 10 ms.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from daxfs.core import attributes, fileops, namespace
from daxfs.core.breaking import Breaker
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.policy import POLICY_XATTR
from daxfs.daemon import protocol, session
from daxfs.daemon.control import Control
from daxfs.daemon.service import Service, now
from daxfs.daemon.session import Request
from daxfs.daemon.virtual import Virtual
from daxfs.errors import BadArgument, Corrupt, Exists, FsError, LayoutBusy, NoSpace, NotPermitted

log = logging.getLogger("daxfs")

COPY_MAX = 4 << 20  # bytes that one COPY_FILE_RANGE copies; callers go on from there
_DOT, _DOTDOT = 1, 2  # positions behind `.` and `..`; those of real entries are larger
_DT_DIR = stat.S_IFDIR >> 12
_NS = 1_000_000_000


class RawRequests:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._volume = service.volume
        self._inode = service.volume.inode
        self._control = Control(service)
        self.removal = self._control.admin.removal
        self._virtual = Virtual(self._control.admin, service.volume.block_size)

    def install(self) -> None:
        handlers: dict[int, Callable[[Request], None]] = {
            protocol.LOOKUP: self.lookup,
            protocol.GETATTR: self.getattr,
            protocol.UNLINK: self.unlink,
            protocol.OPENDIR: self.opendir,
            protocol.RELEASE: self.release,
            protocol.RELEASEDIR: self.release,
            protocol.SETATTR: self.setattr,
            protocol.STATX: self.statx,
            protocol.SETXATTR: self.setxattr,
            protocol.OPEN: self.open,
            protocol.CREATE: self.create,
            protocol.TMPFILE: self.tmpfile,
            protocol.READ: self.read,
            protocol.WRITE: self.write,
            protocol.FALLOCATE: self.fallocate,
            protocol.LSEEK: self.lseek,
            protocol.COPY_FILE_RANGE: self.copy_file_range,
            protocol.COPY_FILE_RANGE_64: self.copy_file_range,
            protocol.READDIR: self.readdir,
            protocol.READDIRPLUS: self.readdirplus,
            protocol.IOCTL: self._control.ioctl,
            protocol.POLL: self._control.poll,
        }
        for opcode, handler in handlers.items():
            session.register(opcode, self._translated(handler))

    def _translated(self, handler: Callable[[Request], None]) -> Callable[[Request], None]:
        """An FsError becomes an errno; a call that has to wait is kept and answered later."""
        service, waiting, takes = self.service, self.service.waiting, self._virtual.takes
        removal = self.removal

        def take(request: Request) -> None:
            if takes(request):
                return
            if service.gone and request.opcode not in (protocol.IOCTL, protocol.POLL):
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
        return Breaker(owner, False, self.service.waiting.overdue(request))

    # -- attributes --

    def getattr(self, request: Request) -> None:
        request.reply(protocol.attr_out(self._inode(request.nodeid), self._volume.block_size))

    def statx(self, request: Request) -> None:
        request.reply(protocol.statx_out(self._inode(request.nodeid), self._volume.block_size))

    def setattr(self, request: Request) -> None:
        valid, fh, size, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns, mode, uid, gid = (
            protocol.SETATTR_IN.unpack_from(request.body)
        )
        inode, at = self._inode(request.nodeid), now()

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
        )
        if not new.is_empty or request.uid in (0, inode.uid):  # of nothing: the kernel did not check who asks
            attributes.setattr(self._volume, at, inode, new)
        request.reply(protocol.attr_out(inode, self._volume.block_size))

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
        self.service.attribute_changed(inode, name)
        request.reply()

    def _allow_unsafe(self, request: Request, inode: Inode) -> None:
        """Blocks that are freed under a pin become anybody's: a user must not get at other people's bytes like that."""
        if request.uid not in (0, os.getuid()):
            raise NotPermitted("policy unsafe gives pinned blocks away: only for root and the user who mounted")
        log.warning("policy unsafe for %s: files WILL be corrupted by its holders", self.service.path(inode))

    # -- names and opening --

    def lookup(self, request: Request) -> None:
        name = bytes(request.body[:-1])
        inode = namespace.lookup(self._volume, self._inode(request.nodeid), name)
        if inode is None:
            request.reply(protocol.NEGATIVE_ENTRY)
            return
        self.service.know(inode, request.nodeid, name)
        request.reply(protocol.entry_out(inode, self._volume.block_size))

    def unlink(self, request: Request) -> None:
        self.service.remove(namespace.unlink, request.nodeid, bytes(request.body[:-1]))
        request.reply()

    def opendir(self, request: Request) -> None:
        fh = self.service.open(self._inode(request.nodeid), os.O_RDONLY | os.O_DIRECTORY)
        request.reply(protocol.OPEN_OUT.pack(fh, 0))

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
        caller = _caller(request, umask)
        try:
            inode = namespace.create(self._volume, now(), parent, name, stat.S_IFREG | mode & 0o7777, caller)
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
        inode = namespace.tmpfile(self._volume, now(), parent, stat.S_IFREG | mode & 0o7777, _caller(request, umask))
        self._reply_created(request, inode, flags, b"#%d" % inode.ino)

    def _reply_created(self, request: Request, inode: Inode, flags: int, name: bytes) -> None:
        opened = self._opened(request, inode, flags)
        self.service.know(inode, request.nodeid, name)
        request.reply(protocol.entry_out(inode, self._volume.block_size) + opened)

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
        if protocol.fills_pages(request.body):
            self.service.caching.fill(inode)
        data = fileops.read(self._volume, inode, offset, size)
        self.service.accessed(inode)
        request.reply(data)

    def write(self, request: Request) -> None:
        _, offset, size, flags = protocol.WRITE_IN.unpack_from(request.body)
        inode = self._inode(request.nodeid)
        data = request.body[protocol.WRITE_IN.size : protocol.WRITE_IN.size + size]
        kill_priv = bool(flags & protocol.WRITE_KILL_SUIDGID)
        keep_times, blocks = self.service.caching.keeps_times(flags), inode.map.blocks
        with self._watched(inode):
            written = fileops.write(
                self._volume, now(), inode, offset, data, kill_priv=kill_priv, keep_times=keep_times
            )
        if keep_times and inode.map.blocks != blocks:
            self.service.caching.grown(inode)
        if written < size and flags & protocol.WRITE_CACHE:
            raise NoSpace("the volume is full")  # writing back, the kernel looks at errors, but not at how much was written
        request.reply(protocol.WRITE_OUT.pack(written))

    def fallocate(self, request: Request) -> None:
        fh, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request.body)
        inode, breaker = self._inode(request.nodeid), self._breaker(request, fh)
        kill_priv = _loses_privileges(request)
        with self._watched(inode):
            fileops.fallocate(self._volume, now(), inode, mode, offset, length, kill_priv=kill_priv, breaker=breaker)
        request.reply()

    def lseek(self, request: Request) -> None:
        inode = self._inode(request.nodeid)
        if self.service.caching.may_be_dirty(inode):  # the kernel does not write it back first
            self.service.start(self._seek_when_written, request, inode.ino)
        else:
            self._seek(request)

    async def _seek_when_written(self, request: Request, ino: int) -> None:
        await self.service.caching.drop(ino)
        if not request.answered:
            self._translated(self._seek)(request)

    def _seek(self, request: Request) -> None:
        _, offset, whence = protocol.LSEEK_IN.unpack_from(request.body)
        found = fileops.seek(self._volume, self._inode(request.nodeid), offset, whence)
        request.reply(protocol.LSEEK_OUT.pack(found))

    def copy_file_range(self, request: Request) -> None:
        _, offset, other, _, other_offset, length, flags = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        if flags:
            raise BadArgument("copy_file_range knows no flags")
        source, target = self._inode(request.nodeid), self._inode(other)
        length = min(length, COPY_MAX)
        kill_priv = _loses_privileges(request)
        with self._watched(target):
            copied = fileops.copy_range(
                self._volume, now(), source, offset, target, other_offset, length, kill_priv=kill_priv
            )
        answer = protocol.COPY_64_OUT if request.opcode == protocol.COPY_FILE_RANGE_64 else protocol.WRITE_OUT
        request.reply(answer.pack(copied))

    # -- directories --

    def readdir(self, request: Request) -> None:
        self._list(request, plus=False)

    def readdirplus(self, request: Request) -> None:
        self._list(request, plus=True)

    def _list(self, request: Request, *, plus: bool) -> None:
        _, position, size = protocol.READ_IN.unpack_from(request.body)
        directory = self._inode(request.nodeid)
        listing = protocol.Listing(size, plus=plus)
        for name, ino, dtype, following in self._entries(directory, position):
            if not listing.has_room(name):
                break
            known = plus and name not in (b".", b"..")
            listing.add(name, ino, dtype, following, self._known(directory, name, ino) if known else b"")
        self.service.accessed(directory)
        request.reply(listing.data())

    def _entries(self, directory: Inode, position: int) -> Iterator[tuple[bytes, int, int, int]]:
        if position < _DOT:
            yield b".", directory.ino, _DT_DIR, _DOT
        if position < _DOTDOT:
            yield b"..", directory.parent, _DT_DIR, _DOTDOT
        yield from namespace.entries(self._volume, directory, 0 if position <= _DOTDOT else position)

    def _known(self, directory: Inode, name: bytes, ino: int) -> bytes:
        """An entry for READDIRPLUS, which counts as a lookup; nothing if the inode is damaged."""
        try:
            inode = self._inode(ino)
            entry = protocol.entry_out(inode, self._volume.block_size)
        except FsError as e:
            log.error("inode %d (%r in directory %d): %s", ino, name, directory.ino, e.why)
            return b""
        self.service.know(inode, directory.ino, name)
        return entry


def _caller(request: Request, umask: int) -> Caller:
    return Caller(request.uid, request.gid, umask)


def _loses_privileges(request: Request) -> bool:
    """FALLOCATE and COPY_FILE_RANGE do not say whether the caller has CAP_FSETID, and leave the bits to us."""
    return request.uid != 0
