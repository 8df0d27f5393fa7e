"""What the processes of a scenario do: hold, look, write by DMA, and the system calls that change a layout.

These functions run in an actor (`process.do(acts.truncate, path, 0)`). System calls that may be interrupted go to libc
directly: Python would call again after a signal. Files and pins that an actor holds are known by numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import time
from typing import NamedTuple

from daxfs import abi, client
from daxfs.client import calls

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 0x1, 0x2, 0x8, 0x10
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_files: dict[int, client.File] = {}
_pins: dict[int, client.Pin] = {}
_windows: list[client.Window] = []
_mappings: list[mmap.mmap] = []


class Held(NamedTuple):
    """A pin as its holder knows it: `id` is the daemon's; `runs` are (start block, count) on the image."""

    id: int
    runs: tuple[tuple[int, int], ...]


class Event(NamedTuple):
    """An event of the mount: `type` is abi.EVENT_*, offset and length are bytes."""

    type: int
    pin: int
    offset: int
    length: int


class Status(NamedTuple):
    size: int
    blocks: int  # as the file system counts them, not stat(2)
    nlink: int


# -- holding --


def open_file(path: str, mode: str = "r+") -> int:
    """A number for the open file description."""
    file = client.open(path, mode)
    _files[file.fileno()] = file
    return file.fileno()


def close_file(file: int) -> None:
    """Close a descriptor; its pins go with the last one of the description."""
    _files.pop(file).close()


def duplicate(file: int) -> int:
    """dup(2)."""
    return os.dup(file)


def close_descriptor(fd: int) -> None:
    os.close(fd)


def pin(file: int, offset: int, length: int, flags: int) -> Held:
    """Pin bytes of an open file; FOLL_* flags."""
    taken = _files[file].pin(offset, length, flags=flags)
    _pins[taken.id] = taken
    return Held(taken.id, taken.runs)


def unpin(pin: int, dirty: bool | None = None) -> None:
    _pins.pop(pin).close(dirty=dirty)


def unpin_any(file: int, pin: int) -> None:
    """Unpin by id, whoever it belongs to."""
    calls.unpin(file, pin, dirty=False)


def view(pin: int) -> bytes:
    """The pinned blocks as they are on the image."""
    return bytes(_pins[pin].map())


def dma(pin: int, offset: int, data: bytes) -> None:
    """Write into the pinned blocks through the image, as a device would: nobody is asked."""
    _pins[pin].map()[offset : offset + len(data)] = data


def map_and_forget(image: str, runs: tuple[tuple[int, int], ...], block_size: int) -> None:
    """Keep the image mapped at these runs until this process ends: a holder that does not unmap."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        _windows.append(client.Window(fd, runs, block_size, writable=True))
    finally:
        os.close(fd)


def ioctl(file: int, number: int, argument: bytes) -> bytes:
    """An ioctl of the pin ABI as it is."""
    buffer = bytearray(argument)
    fcntl.ioctl(file, number, buffer, True)
    return bytes(buffer)


def ioctl_path(path: str, number: int, argument: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return ioctl(fd, number, argument)
    finally:
        os.close(fd)


def next_event(file: int) -> Event | None:
    """The oldest event of a description, if there is one."""
    try:
        answer = ioctl(file, abi.IOC_NEXT_EVENT, bytes(abi.EVENT.size))
    except BlockingIOError:
        return None
    kind, _, pin, offset, length = abi.EVENT.unpack(answer)
    return Event(kind, pin, offset, length)


def await_event(file: int, within_s: float) -> Event | None:
    """Wait by poll(2) for an event; None if none comes."""
    import select

    poller = select.poll()
    poller.register(file, select.POLLPRI)
    poller.poll(within_s * 1000)
    return next_event(file)


def acknowledge(file: int, pin: int) -> None:
    ioctl(file, abi.IOC_ACK, abi.ACK.pack(pin, 0))


def lease(file: int, offset: int, length: int) -> None:
    ioctl(file, abi.IOC_LEASE, abi.LEASE.pack(offset, length, abi.LEASE_TAKE, 0))


def release_lease(file: int) -> None:
    ioctl(file, abi.IOC_LEASE, abi.LEASE.pack(0, 0, abi.LEASE_RELEASE, 0))


def change(file: int, op: int, offset: int, length: int, flags: int) -> None:
    """A layout change by ioctl (abi.CHANGE_*)."""
    ioctl(file, abi.IOC_CHANGE, abi.CHANGE.pack(offset, length, op, flags))


# -- passing on --


def send_file(file: int, address: bytes) -> None:
    """Pass the description to who waits in `receive_file`."""
    with socket.socket(socket.AF_UNIX) as channel:
        for _ in range(400):
            try:
                channel.connect(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.005)
        socket.send_fds(channel, [b"."], [file])
        channel.recv(1)


def receive_file(address: bytes) -> int:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(1)
        channel, _ = listening.accept()
        with channel:
            _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            channel.sendall(b".")
    _files[descriptors[0]] = client.File(descriptors[0])
    return descriptors[0]


def fork_sleeper(channel: int = -1) -> int:
    """Fork a child that has copies of all descriptors and sleeps; its pid."""
    pid = os.fork()
    if pid == 0:
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in _files and int(name) > 2:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        while True:
            time.sleep(3600)
    return pid


def become_sleeper(file: int, keep: bool) -> None:
    """exec(2) something else; does the descriptor stay open?"""
    os.set_inheritable(file, keep)
    os.execv("/bin/sleep", ["sleep", "600"])


def leave(code: int = 0) -> None:
    """exit(2) without a word."""
    os._exit(code)


def crash() -> None:
    """SIGSEGV."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


# -- system calls that may wait --


def _checked(result: int, path: str = "") -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path or None)
    return result


def truncate(path: str, size: int) -> None:
    _checked(_libc.truncate(os.fsencode(path), ctypes.c_int64(size)), path)


def ftruncate(file: int, size: int) -> None:
    _checked(_libc.ftruncate(file, ctypes.c_int64(size)))


def open_truncating(path: str, flags: int = 0) -> None:
    """open(2) with O_TRUNC, and close."""
    os.close(_checked(_libc.open(os.fsencode(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | flags, 0o644), path))


def fallocate(path: str, mode: int, offset: int, length: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fallocate_open(fd, mode, offset, length)
    finally:
        os.close(fd)


def fallocate_open(file: int, mode: int, offset: int, length: int) -> None:
    _checked(_libc.fallocate(file, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def punch(path: str, offset: int, length: int) -> None:
    fallocate(path, PUNCH_HOLE | KEEP_SIZE, offset, length)


def handle_signal(number: int) -> None:
    """A handler that does nothing, without SA_RESTART: system calls end with EINTR."""
    signal.signal(number, lambda *_: None)


def exchange(one: str, other: str) -> None:
    at = ctypes.c_int(-100)  # AT_FDCWD
    _checked(_libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), RENAME_EXCHANGE), one)


# -- files --


def create(path: str, data: bytes, policy: str = "") -> None:
    """A new file, durable; with its own break policy if one is named."""
    with open(path, "xb", buffering=0) as file:
        _write_all(file.fileno(), 0, data)
        os.fsync(file.fileno())
    if policy:
        os.setxattr(path, "user.daxfs.policy", policy.encode())


def _write_all(fd: int, offset: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        offset, left = offset + done, left[done:]


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write(path: str, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _write_all(fd, offset, data)
    finally:
        os.close(fd)


def read_at(file: int, offset: int, length: int) -> bytes:
    return os.pread(file, length, offset)


def write_at(file: int, offset: int, data: bytes) -> None:
    _write_all(file, offset, data)


def status(path: str) -> Status:
    """Size, blocks and links of a file."""
    found = os.stat(path)
    return Status(found.st_size, found.st_blocks * 512 // found.st_blksize, found.st_nlink)


def blocks_of(path: str) -> list[tuple[int, int]]:
    """The runs of a file on the image."""
    with client.open(path) as file:
        return [(e.physical, e.count) for e in file.extents()]


def copy_range(source: str, target: str, offset: int, target_offset: int, length: int) -> int:
    """copy_file_range(2), until all is copied."""
    done = 0
    with open(source, "rb", buffering=0) as from_file, open(target, "r+b", buffering=0) as to_file:
        while done < length:
            n = os.copy_file_range(from_file.fileno(), to_file.fileno(), length - done, offset + done, target_offset + done)
            if not n:
                break
            done += n
    return done


def take_space(path: str, length_max: int) -> int:
    """Preallocate a new file over all free space, at most `length_max` bytes; how many there are. In one call if possible:
    the allocator goes round once, in order."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstatvfs(fd)
        length = min(length_max, found.f_bavail * found.f_frsize)
        while length > 0:
            try:
                fallocate_open(fd, 0, 0, length)
                break
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                length -= found.f_frsize  # it needs blocks for its own extents
        return length
    finally:
        os.close(fd)


def take_rest(path: str, other: str, blocks: int) -> None:
    """The last free blocks are kept for metadata. Cut some off a full file and take as many for another one, block by block
    from its end, as blocks that are not behind others come from the shortest free runs."""
    size = os.statvfs(path).f_frsize
    truncate(path, max(0, os.stat(path).st_size - blocks * size))
    fd = os.open(other, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for n in reversed(range(blocks)):
            fallocate_open(fd, 0, n * size, size)
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)


def overwrite(path: str, pattern: bytes) -> None:
    """Write a pattern (a block) over all of a file."""
    size = os.stat(path).st_size
    write(path, 0, (pattern * (size // len(pattern) + 1))[:size])


def fill(path: str, pattern: bytes, length_max: int) -> int:
    """Write a file over all free space, at most `length_max` bytes; how many bytes there are."""
    with open(path, "xb", buffering=0) as file:
        data = pattern * (65536 // len(pattern))
        have = 0
        while have < length_max:
            try:
                have += os.pwrite(file.fileno(), data[: length_max - have], have)
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                if len(data) == len(pattern):
                    break
                data = pattern
        return have


def foreign(path: str, pattern: bytes) -> tuple[int, bytes] | None:
    """The first block of a file full of a pattern that has something else: its offset, and its first bytes."""
    with open(path, "rb") as file:
        at = 0
        while data := file.read(len(pattern)):
            if data != pattern[: len(data)]:
                return at, data[:32]
            at += len(data)
    return None


def remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path)


def statfs(path: str) -> tuple[int, int]:
    """Blocks and free blocks, as df shows them."""
    found = os.statvfs(path)
    return found.f_blocks, found.f_bfree


def close_without_unpin(file: int) -> None:
    """Unmap and close the descriptor as a program would that has never heard of unpin."""
    _files.pop(file).close()


# -- mappings of the mount --


def map_file(file: int, length: int) -> int:
    """Map a file from its start, MAP_SHARED, as an ordinary program does; a number for the mapping."""
    _mappings.append(mmap.mmap(file, length))
    return len(_mappings) - 1


def load(mapping: int, offset: int, length: int) -> bytes:
    return _mappings[mapping][offset : offset + length]


def store(mapping: int, offset: int, data: bytes) -> None:
    _mappings[mapping][offset : offset + len(data)] = data


def msync(mapping: int) -> None:
    _mappings[mapping].flush()


def unmap(mapping: int) -> None:
    _mappings[mapping].close()


def fork_and_end(how: str) -> int:
    """Fork a child that has copies of all files and pins, and ends: by `_exit`, by `kill`, or by `exit` or `exception`,
    which unwind what holds them. The status of wait(2)."""
    pid = os.fork()
    if pid == 0:
        try:
            with contextlib.ExitStack() as stack:
                for closing in (*_files.values(), *_pins.values()):
                    stack.enter_context(closing)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "_exit":
                    os._exit(0)
                raise SystemExit if how == "exit" else RuntimeError(how)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def direct_reads(sources: list[str], mapping: int, pin: int, length: int, times: int) -> int:
    """Read files in turn with O_DIRECT into a mapping, or (if that is -1) into the mapped blocks of a pin. How often the
    bytes of the file were not there afterwards."""
    expected = [read(source)[:length] for source in sources]
    target = _pins[pin].map() if mapping < 0 else memoryview(_mappings[mapping])
    lost = 0
    files = [os.open(source, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC) for source in sources]
    try:
        for n in range(times):
            which = n % len(sources)
            if os.preadv(files[which], [target[:length]], 0) != length or target[:length] != expected[which]:
                lost += 1
    finally:
        for fd in files:
            os.close(fd)
        if mapping >= 0:
            target.release()
    return lost


def pin_and_unpin(file: int, offset: int, length: int, times: int) -> None:
    """Pin for writing and unpin dirty, again and again: what the kernel has of the range is dropped each time."""
    for _ in range(times):
        pin_id = calls.pin(file, offset, length, abi.FOLL_PIN | abi.FOLL_WRITE)[0]
        calls.unpin(file, pin_id, dirty=True)
