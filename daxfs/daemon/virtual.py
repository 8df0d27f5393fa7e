"""`.daxfs`: the daemon's reports as files in a hidden directory of the mount's root, for `cat`.

The directory answers a lookup of its name, but no listing of the root has it. Its files are made anew at each open and do
not change while they are open; as in /proc their size is 0. Nothing here is on media: inode numbers start above all that the
inode table can have. Nothing here can be changed (EPERM), and no other file can take the name in the root.

`takes` is asked for every request, before its handler; `keep_out` by those whose request names a second directory.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from daxfs import abi
from daxfs.core.layout import ROOT_INO
from daxfs.daemon import protocol, requests, session
from daxfs.daemon.service import now
from daxfs.errors import FsError, NotPermitted

if TYPE_CHECKING:
    from daxfs.core.inode import Inode
    from daxfs.daemon.admin import Admin
    from daxfs.daemon.session import Request

NAME = b".daxfs"
_WITH_NUL = NAME + b"\0"
FILES = {b"pins.json": abi.REPORT_PINS, b"busy.json": abi.REPORT_BUSY, b"status.json": abi.REPORT_STATUS}

_FIRST = requests.FIRST_VIRTUAL  # inode number of the directory; the files follow
_NUMBERS = {name: _FIRST + 1 + n for n, name in enumerate(FILES)}
_REPORTS = dict(zip(_NUMBERS.values(), FILES.values(), strict=True))
_NAMING = {  # where the name is in what would change the root
    protocol.CREATE: protocol.CREATE_IN.size,
    protocol.MKNOD: protocol.MKNOD_IN.size,
    protocol.MKDIR: protocol.MKDIR_IN.size,
    protocol.SYMLINK: 0,
    protocol.LINK: protocol.LINK_IN.size,
    protocol.UNLINK: 0,
    protocol.RMDIR: 0,
    protocol.RENAME: protocol.RENAME_IN.size,
    protocol.RENAME2: protocol.RENAME2_IN.size,
}
# About the mount, or the same for all files.
_EVERYBODYS = frozenset((
    protocol.FORGET, protocol.BATCH_FORGET, protocol.STATFS, protocol.FLUSH, protocol.FSYNC, protocol.FSYNCDIR,
    protocol.ACCESS,
))  # fmt: skip
_DT_DIR, _DT_REG = stat.S_IFDIR >> 12, stat.S_IFREG >> 12
# ENOSYS would switch a call off for the whole mount, EXDEV lets the kernel copy by itself.
_ERRORS = {
    protocol.LSEEK: errno.EINVAL,
    protocol.IOCTL: errno.ENOTTY,
    protocol.GETXATTR: errno.EOPNOTSUPP,
    protocol.LISTXATTR: errno.EOPNOTSUPP,
    protocol.COPY_FILE_RANGE: errno.EXDEV,
    protocol.COPY_FILE_RANGE_64: errno.EXDEV,
}


@dataclass(frozen=True, slots=True)
class _Node:
    """What replies need to know of an inode."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    atime: int
    generation: int = 1
    size: int = 0
    blocks: int = 0
    rdev: int = 0

    @property
    def mtime(self) -> int:
        return self.atime

    ctime = btime = mtime


class _Opened:
    """What an open file or directory here is to the session; its text is among the service's reports."""


def keep_out(ino: int, name: bytes = b"") -> None:
    """NotPermitted if an inode is one of ours, or if a name in it is."""
    if ino >= _FIRST or (ino == ROOT_INO and name == NAME):
        raise NotPermitted


class Virtual:
    def __init__(self, admin: Admin, block_size: int) -> None:
        self._admin = admin
        self._texts = admin.service.reports
        self._block_size = block_size
        self._since = now()

    def takes(self, request: Request) -> bool:
        """Answer the request if it is about something here."""
        if request.nodeid < _FIRST:
            if request.nodeid != ROOT_INO:
                return False
            if request.opcode == protocol.LOOKUP and request.body[:-1] == NAME:
                self._reply_entry(request, _FIRST)
                return True
            at = _NAMING.get(request.opcode)
            if at is None or request.body[at : at + len(_WITH_NUL)] != _WITH_NUL:
                return False
            request.error(errno.EPERM)
            return True
        if request.opcode in _EVERYBODYS:
            return False
        try:
            self._answer(request)
        except FsError as e:
            request.error(e.errno)
        return True

    def _answer(self, request: Request) -> None:
        code, ino = request.opcode, request.nodeid
        if code == protocol.LOOKUP:
            self._lookup(request)
        elif code == protocol.GETATTR:
            request.reply(requests.attr_out(self._node(ino)))
        elif code == protocol.STATX:
            request.reply(protocol.statx_out(self._node(ino), self._block_size))
        elif code == protocol.OPENDIR:
            request.reply(protocol.OPEN_OUT.pack(session.attach(keep=_Opened()), 0))
        elif code == protocol.OPEN and ino in _REPORTS:
            self._open(request)
        elif code == protocol.READ:
            self._read(request)
        elif code in (protocol.READDIR, protocol.READDIRPLUS):
            self._list(request, plus=code == protocol.READDIRPLUS)
        elif code in (protocol.RELEASE, protocol.RELEASEDIR):
            (fh,) = protocol.RELEASE_IN.unpack_from(request.body)
            session.detach(fh)
            self._texts.drop(fh)
            request.reply()
        elif code == protocol.POLL:
            *_, events = protocol.POLL_IN.unpack_from(request.body)
            request.reply(protocol.POLL_OUT.pack(events))
        else:
            request.error(_ERRORS.get(code, errno.EPERM))

    def _node(self, ino: int) -> Inode:
        directory = ino == _FIRST
        mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
        return cast("Inode", _Node(ino, mode, 2 if directory else 1, os.getuid(), os.getgid(), self._since))

    def _reply_entry(self, request: Request, ino: int) -> None:
        request.reply(requests.entry_out(self._node(ino)))

    def _lookup(self, request: Request) -> None:
        name = bytes(request.body[:-1])
        if name == b".":
            self._reply_entry(request, request.nodeid)
        elif name in _NUMBERS and request.nodeid == _FIRST:
            self._reply_entry(request, _NUMBERS[name])
        else:
            request.error(errno.ENOENT)

    def _open(self, request: Request) -> None:
        flags, _ = protocol.OPEN_IN.unpack_from(request.body)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            request.error(errno.EPERM)
            return
        report = _REPORTS[request.nodeid]

        async def opened() -> bytes:
            text = await self._admin.text(report)
            fh = session.attach(keep=_Opened())
            self._texts.keep(fh, text)
            return protocol.OPEN_OUT.pack(fh, protocol.FOPEN_DIRECT_IO)

        self._admin.later(request, opened)

    def _read(self, request: Request) -> None:
        fh, offset, size = protocol.READ_IN.unpack_from(request.body)
        request.reply(self._texts.text(fh)[offset : offset + size])

    def _list(self, request: Request, *, plus: bool) -> None:
        _, position, size = protocol.READ_IN.unpack_from(request.body)
        listing = requests.Listing(size, plus=plus)
        names = [(b".", _FIRST, _DT_DIR), (b"..", ROOT_INO, _DT_DIR)]
        names += [(name, ino, _DT_REG) for name, ino in _NUMBERS.items()]
        for following, (name, ino, dtype) in enumerate(names, 1):
            if following <= position:
                continue
            node = self._node(ino) if ino in _REPORTS else None
            if not listing.add(name, ino, dtype, following, node):
                break
        request.reply(listing.data())
