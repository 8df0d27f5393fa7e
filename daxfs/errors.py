"""The one error family: whoever raises names the fact, the edge turns it into an errno once.

`FsError` carries the errno and, for people, one line that says why. A fact that callers tell apart has a child class of
its own; all others use the child that is nearest. Nothing else may leave the core on purpose: any other exception is a bug
(the daemon answers EIO, logs the traceback and turns the volume read-only).
"""

from __future__ import annotations

import errno as _errno
import os


class FsError(Exception):
    """A call that cannot be carried out; `errno` is what the caller gets, `why` one line for people."""

    errno: int = _errno.EIO

    def __init__(self, why: str = "", errno: int | None = None) -> None:
        if errno is not None:
            self.errno = errno
        self.why = why or os.strerror(self.errno)
        super().__init__(self.why)


class NotPermitted(FsError):
    errno = _errno.EPERM


class NoEntry(FsError):
    errno = _errno.ENOENT


class Corrupt(FsError):
    """Bytes on media that are not what daxfs writes."""

    errno = _errno.EIO


class NoSuchAddress(FsError):
    """A range beyond the end of a file or device."""

    errno = _errno.ENXIO


class Poisoned(FsError):
    """Blocks of the medium that have failed."""

    errno = _errno.EIO


class NoDevice(FsError):
    """The device is being removed, or gone."""

    errno = _errno.ENODEV


class BadDescriptor(FsError):
    errno = _errno.EBADF


class TryAgain(FsError):
    errno = _errno.EAGAIN


class NoMemory(FsError):
    errno = _errno.ENOMEM


class AccessDenied(FsError):
    errno = _errno.EACCES


class BadAddress(FsError):
    errno = _errno.EFAULT


class Busy(FsError):
    errno = _errno.EBUSY


class Exists(FsError):
    errno = _errno.EEXIST


class NotDirectory(FsError):
    errno = _errno.ENOTDIR


class IsDirectory(FsError):
    errno = _errno.EISDIR


class BadArgument(FsError):
    errno = _errno.EINVAL


class TextBusy(FsError):
    errno = _errno.ETXTBSY


class TooBig(FsError):
    """Beyond the largest file size."""

    errno = _errno.EFBIG


class NoSpace(FsError):
    errno = _errno.ENOSPC


class ReadOnly(FsError):
    errno = _errno.EROFS


class TooManyLinks(FsError):
    errno = _errno.EMLINK


class OutOfRange(FsError):
    errno = _errno.ERANGE


class NameTooLong(FsError):
    errno = _errno.ENAMETOOLONG


class NotEmpty(FsError):
    errno = _errno.ENOTEMPTY


class NoData(FsError):
    """No such extended attribute."""

    errno = _errno.ENODATA


class NotSupported(FsError):
    errno = _errno.EOPNOTSUPP


class Deadlock(FsError):
    """The caller would wait for itself."""

    errno = _errno.EDEADLK


class BadHandle(FsError):
    """An inode or handle that is gone."""

    errno = _errno.ESTALE


class ImageError(FsError):
    """An image that cannot be used as asked; `why` says what is wrong and what to do."""

    errno = _errno.EINVAL
