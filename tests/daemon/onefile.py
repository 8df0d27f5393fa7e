"""A small file system for test_session.py: `python -m tests.daemon.onefile MOUNTPOINT` serves a few files.

`file` has written extents, a hole and unwritten extents over an anonymous mapping; `pieces` has more extents than one
answer can carry (blocks of 512 bytes), and the kernel may cache its name and attributes; `short` lies on an image that
ends before its extents do. What the session takes is in `Fs.__init__`, the rest is pyfuse3's. Prints `ready` when it is
mounted, and what the session counted when it ends.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import mmap
import os
import select
import stat
import struct
import sys
import tempfile
import threading
import time

from daxfs.core.extents import HOT_READ, HOT_WRITE, ExtentMap
from daxfs.core.layout import time_ns, time_word
from daxfs.daemon import serving, session

import pyfuse3  # isort: skip
import trio  # isort: skip

BLOCK = 4096
IMAGE_BLOCKS = 4096
SETATTR, OPEN, READ, WRITE, IOCTL, POLL, FALLOCATE, LSEEK, COPY_FILE_RANGE = 4, 14, 15, 16, 39, 40, 43, 46, 47
PUNCH_HOLE = 2
PIECES = 3

# What the ioctls of this file system do; all carry 4096 bytes both ways.
COUNTERS, CRASH, DROP, PARK, TWICE, UNPARK, GROW, TELL, HIDE, WAKE, WORK, LET_GO = range(1, 13)
KEPT_FROM = 1 << 40  # the bytes of writes from here on are kept in memory, until LET_GO


class File:
    def __init__(self, ino: int, base: int, view: memoryview, times_at: int, block_shift: int = 12) -> None:
        self.ino = ino
        self.map = ExtentMap(168, block_shift)
        self.view = view
        self.times_at = times_at
        self.block = 1 << block_shift
        self.map.attach(base, base + times_at)
        self.map.hot = HOT_READ | HOT_WRITE
        word = time_word(time.time_ns() - 10**9)
        struct.pack_into("<QQQ", view, times_at, word, word, word)

    def times(self) -> list[int]:
        return [time_ns(word) for word in struct.unpack_from("<QQQ", self.view, self.times_at)]

    def touch(self) -> None:
        word = time_word(time.time_ns())
        struct.pack_into("<QQ", self.view, self.times_at, word, word)


class Fs(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.image = mmap.mmap(-1, IMAGE_BLOCKS * BLOCK)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.image))
        view = memoryview(self.image)
        self.next_block = 2048
        self.parked: list[session.Request] = []
        self.crashes = 0
        self.poll_handles: list[int] = []
        self.events = 0
        self.kept: list[memoryview] = []
        self.nursery: trio.Nursery

        file = File(2, base, view, 0)
        file.map.insert(0, 10, 4)  # 4, 5: a hole
        file.map.insert(6, 20, 2, True)
        for n in range(8, 600):  # a fragment each
            file.map.insert(n, 700 + (n ^ 1), 1)
        file.map.size = 600 * BLOCK - 100
        pieces = File(PIECES, base, view, 64, 9)
        for n in range(2048):
            pieces.map.insert(n, 2048 * 8 - 2 * n, 1)
        pieces.map.size = 1 << 20
        self.short_file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.short_file.truncate(4 * BLOCK)
        self.short_image = mmap.mmap(self.short_file.fileno(), 4 * BLOCK)
        short = File(4, ctypes.addressof(ctypes.c_char.from_buffer(self.short_image)), memoryview(self.short_image), 0)
        short.map.insert(0, 1, 3)
        short.map.size = 3 * BLOCK
        self.short_file.truncate(2 * BLOCK)
        self.files = {b"file": file, b"pieces": pieces, b"short": short}
        self.by_ino = {file.ino: file for file in self.files.values()}

        for opcode, callback in {
            SETATTR: self.setattr_raw, OPEN: self.open_raw, READ: self.read_raw, WRITE: self.write_raw,
            IOCTL: self.ioctl_raw, POLL: self.poll_raw, FALLOCATE: self.fallocate_raw, LSEEK: self.lseek_raw,
            COPY_FILE_RANGE: self.copy_raw,
        }.items():  # fmt: skip
            session.register(opcode, callback)

    def on_crash(self, exc: BaseException) -> None:
        self.crashes += 1

    # -- by pyfuse3

    def attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_nlink = 1
        entry.attr_timeout = entry.entry_timeout = 3600 if ino == PIECES else 0
        entry.st_mode = stat.S_IFDIR | 0o755
        if ino != pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFREG | 0o644
            entry.st_size = self.by_ino[ino].map.size
            entry.st_mtime_ns, entry.st_ctime_ns, entry.st_atime_ns = self.by_ino[ino].times()
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if name not in self.files:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(self.files[name].ino)

    async def getattr(self, ino: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self.attributes(ino)

    async def release(self, fh: int) -> None:
        session.detach(fh)

    # -- by the session

    def open_raw(self, request: session.Request) -> None:
        file = self.by_ino[request.nodeid]
        fh = session.attach(file.map.pointer, writable=True, keep=file)
        request.reply(struct.pack("<QII", fh, 1 | 1 << 6, 0))  # direct I/O, parallel direct writes

    def setattr_raw(self, request: session.Request) -> None:
        file = self.by_ino[request.nodeid]
        valid, _, _, size = struct.unpack_from("<IIQQ", request.body)
        if valid & 1 << 3:
            first = -(-size // BLOCK)
            file.map.carve(first, (1 << 40) - first)
            file.map.size = size
            file.touch()
        times = file.times()
        seconds = (times[2] // 10**9, times[0] // 10**9, times[1] // 10**9)
        attr = struct.pack("<QQQQQQ10I", file.ino, file.map.size, 0, *seconds, 0, 0, 0, stat.S_IFREG | 0o644, 1, *[0] * 5)
        request.reply(struct.pack("<QII", 0, 0, 0) + attr)

    def read_raw(self, request: session.Request) -> None:
        fh, offset, size = struct.unpack_from("<QQI", request.body)
        file = session.keeper(fh)
        assert isinstance(file, File)
        end = min(offset + size, file.map.size)
        parts: list[bytes | memoryview] = []
        while offset < end:
            block, at = divmod(offset, file.block)
            count = min(file.block - at, end - offset)
            extent = file.map.find(block)
            if extent is None or extent[3]:
                parts.append(bytes(count))
            else:
                start = (extent[1] + block - extent[0]) * file.block + at
                parts.append(file.view[start : start + count])
            offset += count
        request.reply_parts(parts)

    def write_raw(self, request: session.Request) -> None:
        fh, offset, size, _, _, flags = struct.unpack_from("<QQIIQI", request.body)
        file = session.keeper(fh)
        assert isinstance(file, File)
        data = request.body[40:]
        assert len(data) == size
        if offset >= KEPT_FROM:
            self.kept.append(data)
            request.reply(struct.pack("<II", size, 0))
            return
        if flags & os.O_APPEND:
            offset = file.map.size
        for n in range(offset // BLOCK, -(-(offset + size) // BLOCK)):
            extent = file.map.find(n)
            if extent is None or extent[3]:
                file.map.carve(n, 1)
                file.map.insert(n, self.next_block, 1)
                file.view[self.next_block * BLOCK : (self.next_block + 1) * BLOCK] = bytes(BLOCK)
                self.next_block += 1
            logical, physical, _, _ = file.map.find(n) or (0, 0, 0, False)
            low, high = max(offset, n * BLOCK), min(offset + size, (n + 1) * BLOCK)
            start = (physical + n - logical) * BLOCK + low - n * BLOCK
            file.view[start : start + high - low] = data[low - offset : high - offset]
        file.map.size = max(file.map.size, offset + size)
        file.touch()
        request.reply(struct.pack("<II", size, 0))

    def fallocate_raw(self, request: session.Request) -> None:
        fh, offset, length, mode = struct.unpack_from("<QQQI", request.body)
        file = session.keeper(fh)
        assert isinstance(file, File)
        if not mode & PUNCH_HOLE:
            request.error(errno.EOPNOTSUPP)
            return
        file.map.carve(offset // BLOCK, length // BLOCK)
        file.touch()
        request.reply()

    def lseek_raw(self, request: session.Request) -> None:
        fh, offset, whence = struct.unpack_from("<QQI", request.body)
        file = session.keeper(fh)
        assert isinstance(file, File)
        for n in range(offset // BLOCK, -(-file.map.size // BLOCK)):
            if offset < file.map.size and (file.map.find(n) is not None) == (whence == os.SEEK_DATA):
                request.reply(struct.pack("<Q", max(offset, n * BLOCK)))
                return
        if whence == os.SEEK_HOLE and offset < file.map.size:
            request.reply(struct.pack("<Q", file.map.size))
        else:
            request.error(errno.ENXIO)

    def copy_raw(self, request: session.Request) -> None:
        """Whole blocks that are written, within one file."""
        fh, source, _, _, target, length, _ = struct.unpack_from("<7Q", request.body)
        file = session.keeper(fh)
        assert isinstance(file, File)
        for n in range(length // BLOCK):
            one, other = file.map.find(source // BLOCK + n), file.map.find(target // BLOCK + n)
            assert one is not None
            assert other is not None
            start = (one[1] + source // BLOCK + n - one[0]) * BLOCK
            to = (other[1] + target // BLOCK + n - other[0]) * BLOCK
            file.view[to : to + BLOCK] = bytes(file.view[start : start + BLOCK])
        request.reply(struct.pack("<II", length, 0))

    def ioctl_raw(self, request: session.Request) -> None:
        command = struct.unpack_from("<I", request.body, 12)[0] & 0xFF
        answer = b""
        if command == COUNTERS:
            waiting = len(session.waiting())
            answer = json.dumps(session.counters() | {"crashes": self.crashes, "waiting": waiting}).encode()
        elif command == CRASH:
            raise ZeroDivisionError("asked for")
        elif command == DROP:
            return
        elif command == PARK:
            request.on_interrupt = lambda: request.error(errno.EINTR)
            self.parked.append(request)
            return
        elif command == UNPARK:
            for one in self.parked:
                if not one.answered:
                    one.reply(struct.pack("<iI8x", 7, 0))
            self.parked.clear()
        elif command == GROW:
            self.by_ino[PIECES].map.size += 1
        elif command == TELL:
            session.inval_inode(PIECES, -1)
        elif command == HIDE:
            del self.files[b"pieces"]
            threading.Thread(target=self.hide, args=(request,)).start()
            return
        elif command == WAKE:
            self.events = select.POLLIN
            for kh in self.poll_handles:
                session.notify_poll(kh)
        elif command == WORK:
            self.nursery.start_soon(self.work, request)
            return
        elif command == LET_GO:
            answer = hashlib.sha256(b"".join(self.kept)).hexdigest().encode()
            self.kept.clear()
        elif command == TWICE:
            request.reply(struct.pack("<iI8x", 0, 0))
            request.reply(b"")
        else:
            request.error(errno.ENOTTY)
            return
        request.reply(struct.pack("<iI8x", 0, 0) + answer.ljust(4096, b"\0"))

    async def work(self, request: session.Request) -> None:
        """What a daemon does besides requests: timers, tasks that give way, threads."""
        for _ in range(20):
            await trio.sleep(0.001)
            await trio.lowlevel.checkpoint()
            await trio.to_thread.run_sync(time.time)
        request.reply(struct.pack("<iI8x", 0, 0) + bytes(BLOCK))

    def hide(self, request: session.Request) -> None:
        session.inval_inode(PIECES)
        session.inval_entry(pyfuse3.ROOT_INODE, b"pieces")
        session.inval_entry(pyfuse3.ROOT_INODE, b"never heard of")
        request.reply(struct.pack("<iI8x", 0, 0) + bytes(BLOCK))

    def poll_raw(self, request: session.Request) -> None:
        _, kh, flags = struct.unpack_from("<QQI", request.body)
        if flags & 1:  # tell me later
            self.poll_handles.append(kh)
        request.reply(struct.pack("<II", self.events, 0))


async def main(mountpoint: str) -> None:
    fs = Fs()
    session.configure(on_crash=fs.on_crash)
    options = set(pyfuse3.default_options) | {"fsname=onefile", "subtype=daxfs-test"}
    pyfuse3.init(fs, mountpoint, options)
    assert session.mounted()
    try:
        async with trio.open_nursery() as fs.nursery:
            fs.nursery.start_soon(pyfuse3.main)
            fs.nursery.start_soon(serving.serve)
            print("ready", flush=True)
    finally:
        pyfuse3.close()
    assert not session.mounted()
    for request in fs.parked:  # the mount is gone: nobody hears it
        if not request.answered:
            request.error(errno.EIO)
    print(json.dumps(session.counters()), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, sys.argv[1])
