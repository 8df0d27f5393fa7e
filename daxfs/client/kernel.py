"""The kernel itself as the holder: O_DIRECT, vmsplice and io_uring fixed buffers on the mapped blocks of a pin.

A pin's mapping is one of the image, so what these calls take with get_user_pages are the pages that hold the blocks. The
disk's DMA, a pipe or a ring then reads and writes them, whatever happens to the file meanwhile.

| here | what the kernel takes | until |
| --- | --- | --- |
| `read_direct`, `write_direct` | FOLL_PIN | the call returns |
| `splice` | FOLL_GET | the pipe is empty or closed |
| `FixedBuffer` | FOLL_PIN, FOLL_LONGTERM | it is closed; a pin closes those on it first |

`splice` and `FixedBuffer` are closed before the pin they are on, so that the kernel never outlives it. In the process that
made them the kernel lets go of the pages then, whichever forked children still have the pipe or the ring.

io_uring takes no long-term pin on a file of ext4, XFS and others (EFAULT; older kernels EOPNOTSUPP): the image has to be on
tmpfs. `FixedBuffer` needs the package liburing (pip install liburing), which is imported only there, and Linux 6.15.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import os
import select
import time
from contextlib import suppress
from typing import Any

from daxfs.client import calls
from daxfs.client.calls import PinError
from daxfs.client.closing import Closing
from daxfs.client.file import Pin

__all__ = ["FIXED_BUFFER_MAX", "FixedBuffer", "PinError", "Spliced", "read_direct", "splice", "write_direct"]

FIXED_BUFFER_MAX = 1 << 30  # the kernel's limit for one registered buffer
_ENTRIES = 32

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.vmsplice.restype = ctypes.c_ssize_t
_libc.vmsplice.argtypes = [ctypes.c_int, ctypes.POINTER(_Iovec), ctypes.c_ulong, ctypes.c_uint]
_SPLICE_F_NONBLOCK = 2


def _part(pin: Pin, at: int, length: int | None, *, write: bool) -> memoryview:
    """Bytes [at, at + length) of a pin's blocks. PinError: EINVAL (outside), EACCES (a read pin is written)."""
    if write and not pin.writable:
        raise PinError(errno.EACCES, "the kernel would write the blocks: take a write pin", pin.file.path)
    return pin.map()[at : at + _size(pin, at, length)]


def _size(pin: Pin, at: int, length: int | None) -> int:
    length = pin.length - at if length is None else length
    if at < 0 or length <= 0 or at + length > pin.length:
        why = f"bytes {at} to {at + length} are not all in the pin, which has {pin.length}"
        raise PinError(errno.EINVAL, why, pin.file.path)
    return length


# -- O_DIRECT ---------------------------------------------------------------------------------------------------------


def read_direct(fd: int, offset: int, pin: Pin, at: int = 0, length: int | None = None) -> int:
    """Read from `offset` of a file that is open with O_DIRECT into the blocks of a pin, from byte `at` of it on.

    How many bytes came: fewer at the end of the file. PinError: EINVAL (not O_DIRECT, or not aligned as the file's device
    wants), EACCES (a read pin), EFAULT (the kernel does not take these pages).
    """
    return _direct(fd, offset, pin, at, length, write=True)


def write_direct(fd: int, offset: int, pin: Pin, at: int = 0, length: int | None = None) -> int:
    """Write the blocks of a pin, from byte `at` of it on, to `offset` of a file that is open with O_DIRECT.

    How many bytes went. PinError: as `read_direct`, and what a write gives (ENOSPC, ...).
    """
    return _direct(fd, offset, pin, at, length, write=False)


def _direct(fd: int, offset: int, pin: Pin, at: int, length: int | None, *, write: bool) -> int:
    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise PinError(errno.EINVAL, "the file is not open with O_DIRECT: the page cache would be read, not the blocks")
    view = _part(pin, at, length, write=write)
    try:
        return os.preadv(fd, [view], offset) if write else os.pwritev(fd, [view], offset)
    except OSError as problem:
        why = problem.strerror
        if problem.errno == errno.EINVAL:
            why = "offset, length and place in the pin must be multiples of the logical block size of the file's device"
        raise _refused(problem.errno, pin, why) from None


# -- vmsplice ---------------------------------------------------------------------------------------------------------


class Spliced(Closing):
    """Pages of a pin in a pipe: no copy, so what is stored in the blocks before they are read is seen. A context manager."""

    def __init__(self, pin: Pin, read_end: int, length: int) -> None:
        super().__init__(pin)
        self._pin = pin
        self._read_end = read_end
        self.length = length

    def _called(self) -> tuple[str, str]:
        return "the pipe", self._pin.file.path

    def fileno(self) -> int:
        """The pipe's end to read from: for read(2), splice(2), poll(2)."""
        self._require_held()
        return self._read_end

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes of what is in the pipe (default: all). The kernel lets go of the pages that were read."""
        data = bytearray()
        while size < 0 or len(data) < size:
            piece = os.read(self.fileno(), (1 << 20) if size < 0 else size - len(data))
            if not piece:
                break
            data += piece
        return bytes(data)

    def close(self) -> None:
        """The kernel lets go of all pages: the pipe is emptied and closed. In another process than the one that made it:
        closed there, no more. Again: no effect."""
        super().close()

    def _give_back(self) -> None:
        """A child that has the pipe as well would keep the pages in it."""
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):
                while os.splice(self._read_end, nowhere, self.length, flags=os.SPLICE_F_NONBLOCK):
                    pass
        finally:
            os.close(nowhere)

    def _let_go(self) -> None:
        fd, self._read_end = self._read_end, -1
        os.close(fd)


def splice(pin: Pin, at: int = 0, length: int | None = None) -> Spliced:
    """vmsplice: put the pages of bytes [at, at + length) into a pipe of their own.

    PinError: EINVAL (outside the pin), ENOSPC (more than a pipe may have, see /proc/sys/fs/pipe-max-size), EFAULT.
    """
    view = _part(pin, at, length, write=False)
    read_end, write_end = os.pipe()
    try:
        size = len(view)
        pages = (pin.address + at) % 4096 + size + 4095 >> 12
        try:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, max(pages, 16) * 4096)
        except OSError as problem:
            raise PinError(errno.ENOSPC, f"no pipe takes {size} bytes: splice fewer at a time", pin.file.path) from problem
        done = 0
        while done < size:
            piece = _Iovec(pin.address + at + done, size - done)
            moved = _libc.vmsplice(write_end, ctypes.byref(piece), 1, _SPLICE_F_NONBLOCK)
            if moved < 0:
                code = ctypes.get_errno()
                if code == errno.EAGAIN:
                    raise PinError(errno.ENOSPC, f"the pipe is full after {done} bytes: splice fewer", pin.file.path)
                raise _refused(code, pin, os.strerror(code))
            done += moved
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Spliced(pin, read_end, size)


# -- io_uring ---------------------------------------------------------------------------------------------------------


def _liburing() -> Any:
    try:
        return importlib.import_module("liburing")
    except ImportError as problem:
        why = f"io_uring needs the package liburing: pip install liburing ({problem})"
        raise PinError(errno.ENOPKG, why) from None


class FixedBuffer(Closing):
    """A write pin's blocks as a registered buffer of an io_uring of its own. A context manager.

    `submit_read` and `submit_write` start an operation and return its number; `wait` gives those that are done. `read` and
    `write` do both. One thread at a time, and only in the process that made it (EPERM), as the ring's queues are shared
    memory. What is still under way when that process closes it is cancelled and waited for.
    """

    def __init__(self, pin: Pin) -> None:
        """Register. PinError: ENOPKG (no liburing), EACCES (a read pin), EFAULT or EOPNOTSUPP (the image is on a file system
        that the kernel takes no long-term pins on), ENOMEM (RLIMIT_MEMLOCK), EPERM or ENOSYS (io_uring is off), EFBIG."""
        self._uring = _liburing()
        self._pin = pin
        if pin.length > FIXED_BUFFER_MAX:
            why = f"an io_uring buffer has at most {FIXED_BUFFER_MAX} bytes: pin a shorter range"
            raise PinError(errno.EFBIG, why, pin.file.path)
        _part(pin, 0, None, write=True)
        self._address = pin.address
        self._vectors: dict[tuple[int, int], Any] = {}
        self._under_way: set[int] = set()
        self._last = 0
        self._ring = self._uring.Ring()
        opened = False
        try:
            self._uring.io_uring_queue_init(_ENTRIES, self._ring)
            opened = True
            self._uring.io_uring_register_buffers(self._ring, self._vector(0, pin.length))
        except OSError as problem:
            if opened:
                self._let_go()
            raise _refused(problem.errno, pin, problem.strerror) from None
        super().__init__(pin)

    def _called(self) -> tuple[str, str]:
        return "the buffer", self._pin.file.path

    def _require_ours(self) -> None:
        self._require_held()
        self._require_maker("the queues of its ring are that one's, make a FixedBuffer on the pin here")

    def fileno(self) -> int:
        """The ring: poll(2) says POLLIN when an operation is done."""
        self._require_held()
        fd: int = self._ring.ring_fd
        return fd

    def _vector(self, at: int, size: int) -> Any:
        """An iovec of a part of the blocks. liburing never lets go of the memoryview that it is made of: so it gets one that
        owns nothing, and once for each part."""
        if (at, size) not in self._vectors:
            bare = (ctypes.c_char * size).from_address(self._address + at)
            self._vectors[at, size] = self._uring.Iovec([memoryview(bare).cast("B")])
        return self._vectors[at, size]

    def submit_read(self, fd: int, offset: int, at: int = 0, length: int | None = None) -> int:
        """Start reading from `offset` of a file (0 for a pipe or socket) into the blocks, from byte `at` on. Its number."""
        return self._submit(self._uring.io_uring_prep_readv_fixed, fd, offset, at, length)

    def submit_write(self, fd: int, offset: int, at: int = 0, length: int | None = None) -> int:
        """Start writing the blocks, from byte `at` on, to `offset` of a file. The operation's number."""
        return self._submit(self._uring.io_uring_prep_writev_fixed, fd, offset, at, length)

    def _submit(self, prepare: Any, fd: int, offset: int, at: int, length: int | None) -> int:
        self._require_ours()
        size = _size(self._pin, at, length)
        entry = self._uring.io_uring_get_sqe(self._ring)
        if len(self._under_way) >= _ENTRIES or not entry:
            raise PinError(errno.EAGAIN, f"{_ENTRIES} operations are under way: wait for one first", self._pin.file.path)
        prepare(entry, fd, self._vector(at, size), 0, offset)
        self._last += 1
        entry.user_data = self._last
        self._under_way.add(self._last)
        self._uring.io_uring_submit(self._ring)
        return self._last

    def wait(self, timeout_s: float | None = None) -> dict[int, int]:
        """The operations that are done, at least one: number -> bytes, or -errno. Empty if none ends within `timeout_s`, or
        if none is under way."""
        self._require_ours()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not (done := self._reap()) and self._under_way:
            rest = None if end is None else end - time.monotonic()
            if rest is not None and rest <= 0:
                break
            poller = select.poll()  # liburing itself would wait with the interpreter locked
            poller.register(self.fileno(), select.POLLIN)
            poller.poll(None if rest is None else rest * 1000)
        return done

    def _reap(self) -> dict[int, int]:
        done: dict[int, int] = {}
        while self._uring.io_uring_cq_ready(self._ring):
            queue = self._uring.Cqe()
            self._uring.io_uring_peek_cqe(self._ring, queue)
            entry = queue[0]
            number = entry.user_data
            try:
                result = entry.res
            except OSError as problem:
                result = -(problem.errno or errno.EIO)
            self._uring.io_uring_cqe_seen(self._ring, entry)
            if number in self._under_way:
                self._under_way.remove(number)
                done[number] = result
        return done

    def read(self, fd: int, offset: int, at: int = 0, length: int | None = None) -> int:
        """`submit_read`, and wait for it. How many bytes came. Only while nothing else is under way."""
        self._alone()
        return self._result(self.submit_read(fd, offset, at, length))

    def write(self, fd: int, offset: int, at: int = 0, length: int | None = None) -> int:
        """`submit_write`, and wait for it. How many bytes went. Only while nothing else is under way."""
        self._alone()
        return self._result(self.submit_write(fd, offset, at, length))

    def _alone(self) -> None:
        if self._under_way:
            why = "operations are under way: use submit_read, submit_write and wait"
            raise PinError(errno.EBUSY, why, self._pin.file.path)

    def _result(self, number: int) -> int:
        result = self.wait()[number]
        if result < 0:
            why = os.strerror(-result)
            if result == -errno.EINVAL:
                why = "not aligned as the file's device wants it, or a kernel before 6.15"
            raise PinError(-result, why, self._pin.file.path)
        return result

    def close(self) -> None:
        """Cancel and await what is under way, give the pages back. In another process than the one that made it: take the
        ring away there. Again: no effect."""
        super().close()

    def _give_back(self) -> None:
        try:
            if self._under_way:
                entry = self._uring.io_uring_get_sqe(self._ring)
                everything = self._uring.IORING_ASYNC_CANCEL_ANY | self._uring.IORING_ASYNC_CANCEL_ALL
                self._uring.io_uring_prep_cancel64(entry, 0, everything)
                entry.user_data = 0
                self._uring.io_uring_submit(self._ring)
                while self._under_way:
                    self.wait()
            self._uring.io_uring_unregister_buffers(self._ring)
        finally:
            self.drop()

    def _let_go(self) -> None:
        self._uring.io_uring_queue_exit(self._ring)


# -- what a refusal means ---------------------------------------------------------------------------------------------


def _refused(code: int | None, pin: Pin, why: str | None) -> PinError:
    """An error of the kernel in words, with the remedy where there is one."""
    if code in (errno.EFAULT, errno.EOPNOTSUPP):
        image = str(pin.file.info()["image"])
        why = (
            f"the kernel does not pin pages of a file on {_file_system_of(image)} for long: "
            "put the image on tmpfs (daxfs mkfs /dev/shm/NAME)"
        )
        return PinError(code, why, image)
    if code == errno.ENOMEM:
        why = "not enough lockable memory: raise the limit (ulimit -l), or pin a shorter range"
    elif code in (errno.EPERM, errno.ENOSYS):
        why = "io_uring is not allowed here: see /proc/sys/kernel/io_uring_disabled, and the container's seccomp rules"
    return PinError(code or errno.EIO, why or calls.words_for(code or errno.EIO) or "it failed", pin.file.path)


def _file_system_of(path: str) -> str:
    """The type of the file system that a file is on, as in /proc/self/mountinfo."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                if left.split()[2] == wanted:
                    return right.split()[0]
    except OSError:
        pass
    return "this file system"
