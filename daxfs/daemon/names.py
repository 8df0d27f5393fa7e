"""Requests about names: what makes, removes and moves them, what directories list, and what the kernel forgets.

Decode, call the core, reply, as in raw.py, which registers these handlers together with its own. Permissions are the
kernel's business (default_permissions). An inode that a reply tells the kernel of is `known` to the service first.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import trio

from daxfs.core import namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import RENAME_EXCHANGE, Caller
from daxfs.daemon import protocol, requests
from daxfs.daemon.requests import Listing
from daxfs.daemon.service import WORK_S, Service, now
from daxfs.daemon.virtual import keep_out
from daxfs.errors import FsError

if TYPE_CHECKING:
    from daxfs.daemon.session import Request

log = logging.getLogger("daxfs")

# The kernel drops what it has cached of a directory when something in it changes, so it may keep a listing.
DIRECTORY_FLAGS = protocol.FOPEN_KEEP_CACHE | protocol.FOPEN_CACHE_DIR
FORGETS_BETWEEN_LOOKS = 32  # at the clock
_DOT, _DOTDOT = 1, 2  # positions behind `.` and `..`; those of real entries are larger
_DT_DIR = stat.S_IFDIR >> 12


class NameRequests:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._volume = service.volume
        self._inode = service.volume.inode

    def handlers(self) -> dict[int, Callable[[Request], None]]:
        return {
            protocol.LOOKUP: self.lookup,
            protocol.FORGET: self.forget,
            protocol.BATCH_FORGET: self.batch_forget,
            protocol.READLINK: self.readlink,
            protocol.SYMLINK: self.symlink,
            protocol.MKNOD: self.mknod,
            protocol.MKDIR: self.mkdir,
            protocol.LINK: self.link,
            protocol.UNLINK: self.unlink,
            protocol.RMDIR: self.rmdir,
            protocol.RENAME: self.rename,
            protocol.RENAME2: self.rename2,
            protocol.OPENDIR: self.opendir,
            protocol.READDIR: self.readdir,
            protocol.READDIRPLUS: self.readdirplus,
        }

    def reply_entry(self, request: Request, inode: Inode, name: bytes, more: bytes = b"") -> None:
        """The kernel hears of an inode by this name."""
        entry = requests.entry_out(inode)
        self.service.know(inode, request.nodeid, name)
        request.reply(entry + more if more else entry)

    # -- finding and forgetting --

    def lookup(self, request: Request) -> None:
        name = bytes(request.body[:-1])
        inode = namespace.lookup(self._volume, self._inode(request.nodeid), name)
        if inode is None:
            request.reply(protocol.NEGATIVE_ENTRY)
            return
        self.reply_entry(request, inode, name)

    def forget(self, request: Request) -> None:
        (count,) = protocol.FORGET_IN.unpack_from(request.body)
        self._forget(iter([(request.nodeid, count)]))

    def batch_forget(self, request: Request) -> None:
        """Tens of thousands come at once when the kernel wants memory; so others have their turn between them."""
        (count,) = protocol.BATCH_FORGET_IN.unpack_from(request.body)
        first = protocol.BATCH_FORGET_IN.size
        records = bytes(request.body[first : first + count * protocol.FORGET_ONE.size])
        forgotten = protocol.FORGET_ONE.iter_unpack(records)
        if not self._forget(forgotten):
            self.service.start(self._forget_slowly, forgotten)

    async def _forget_slowly(self, forgotten: Iterator[tuple[int, int]]) -> None:
        while not self._forget(forgotten):
            await trio.lowlevel.checkpoint()

    def _forget(self, forgotten: Iterator[tuple[int, int]]) -> bool:
        """As many as there is time for; False if there are more."""
        service, end = self.service, time.monotonic() + WORK_S
        for n, (ino, count) in enumerate(forgotten, 1):
            if service.gone:
                return True
            if ino >= requests.FIRST_VIRTUAL:
                continue
            try:
                service.forget(ino, count)
            except FsError as e:
                log.error("forget of inode %d: %s", ino, e.why)
            if n % FORGETS_BETWEEN_LOOKS == 0 and time.monotonic() > end:
                return False
        return True

    # -- making and removing --

    def mknod(self, request: Request) -> None:
        mode, rdev, umask = protocol.MKNOD_IN.unpack_from(request.body)
        name = protocol.name_at(request.body, protocol.MKNOD_IN.size)
        parent = self._inode(request.nodeid)
        inode = namespace.create(self._volume, now(), parent, name, mode, caller(request, umask), rdev)
        self.reply_entry(request, inode, name)

    def mkdir(self, request: Request) -> None:
        mode, umask = protocol.MKDIR_IN.unpack_from(request.body)
        name = protocol.name_at(request.body, protocol.MKDIR_IN.size)
        parent = self._inode(request.nodeid)
        inode = namespace.mkdir(self._volume, now(), parent, name, mode, caller(request, umask))
        self.reply_entry(request, inode, name)

    def symlink(self, request: Request) -> None:
        name, target = protocol.names_at(request.body, 0)
        parent = self._inode(request.nodeid)
        inode = namespace.symlink(self._volume, now(), parent, name, target, caller(request, 0))
        self.reply_entry(request, inode, name)

    def link(self, request: Request) -> None:
        (ino,) = protocol.LINK_IN.unpack_from(request.body)
        keep_out(ino)
        name = protocol.name_at(request.body, protocol.LINK_IN.size)
        inode = self._inode(ino)
        namespace.link(self._volume, now(), inode, self._inode(request.nodeid), name)
        self.reply_entry(request, inode, name)

    def unlink(self, request: Request) -> None:
        self.service.remove(namespace.unlink, request.nodeid, bytes(request.body[:-1]))
        request.reply()

    def rmdir(self, request: Request) -> None:
        self.service.remove(namespace.rmdir, request.nodeid, bytes(request.body[:-1]))
        request.reply()

    def rename(self, request: Request) -> None:
        (new_parent,) = protocol.RENAME_IN.unpack_from(request.body)
        self._rename(request, new_parent, 0, *protocol.names_at(request.body, protocol.RENAME_IN.size))

    def rename2(self, request: Request) -> None:
        new_parent, flags = protocol.RENAME2_IN.unpack_from(request.body)
        self._rename(request, new_parent, flags, *protocol.names_at(request.body, protocol.RENAME2_IN.size))

    def _rename(self, request: Request, new_parent: int, flags: int, name: bytes, new_name: bytes) -> None:
        keep_out(new_parent, new_name)
        service, parent = self.service, request.nodeid
        source = self._inode(parent)
        target = source if new_parent == parent else self._inode(new_parent)
        inode, other = namespace.rename(self._volume, now(), source, name, target, new_name, flags)
        if inode is not other:
            service.renamed(inode, new_parent, new_name)
            if other is not None and flags & RENAME_EXCHANGE:
                service.renamed(other, parent, name)
            elif other is not None:
                service.unnamed(other, new_parent, new_name)
        request.reply()

    # -- symbolic links, directories --

    def readlink(self, request: Request) -> None:
        inode = self._inode(request.nodeid)
        target = namespace.readlink(self._volume, inode)
        self.service.accessed(inode)
        request.reply(target)

    def opendir(self, request: Request) -> None:
        fh = self.service.open(self._inode(request.nodeid), os.O_RDONLY | os.O_DIRECTORY)
        request.reply(protocol.OPEN_OUT.pack(fh, DIRECTORY_FLAGS))

    def readdir(self, request: Request) -> None:
        self._list(request, plus=False)

    def readdirplus(self, request: Request) -> None:
        self._list(request, plus=True)

    def _list(self, request: Request, *, plus: bool) -> None:
        _, position, size = protocol.READ_IN.unpack_from(request.body)
        directory = self._inode(request.nodeid)
        listing = Listing(size, plus=plus)
        for name, ino, dtype, following in self._entries(directory, position):
            if not listing.has_room(name):
                break
            if plus and name not in (b".", b".."):
                self._add_known(listing, directory, name, ino, dtype, following)
            else:
                listing.add(name, ino, dtype, following)
        self.service.accessed(directory)
        request.reply(listing.data())

    def _entries(self, directory: Inode, position: int) -> Iterator[tuple[bytes, int, int, int]]:
        if position < _DOT:
            yield b".", directory.ino, _DT_DIR, _DOT
        if position < _DOTDOT:
            yield b"..", directory.parent, _DT_DIR, _DOTDOT
        yield from namespace.entries(self._volume, directory, 0 if position <= _DOTDOT else position)

    def _add_known(
        self, listing: Listing, directory: Inode, name: bytes, ino: int, dtype: int, following: int
    ) -> None:
        """An entry of READDIRPLUS, which counts as a lookup; a bare name if the inode is damaged."""
        try:
            inode = self._inode(ino)
        except FsError as e:
            log.error("inode %d (%r in directory %d): %s", ino, name, directory.ino, e.why)
            listing.add(name, ino, dtype, following)
            return
        listing.add(name, ino, dtype, following, inode)
        self.service.know(inode, directory.ino, name)


def caller(request: Request, umask: int) -> Caller:
    return Caller(request.uid, request.gid, umask)
