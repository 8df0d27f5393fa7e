"""The HCA on a volume without a mount: what the kernel and the client library would do, in one process."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from struct import Struct
from types import SimpleNamespace
from typing import Any

import trio

from daxfs import abi, abi_hca
from daxfs.abi_hca import Access, AttrMask, Op, SendFlag, State, Status, WrOp
from daxfs.core import fileops, holding
from daxfs.core.inode import Inode
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.daemon import protocol
from daxfs.daemon.coherence import Coherence
from daxfs.daemon.hca import Hca
from daxfs.daemon.service import OpenFile
from tests.core.image import NOW, new_inode

BLOCK = 4096
ALL = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC
REMOTE = ALL & ~Access.LOCAL_WRITE
ME = Holder(os.getpid(), "test")


class Service:
    """As much of the daemon's as the HCA needs."""

    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self.volume = volume
        self.dirty: list[Inode] = []
        self._nursery = nursery
        self.coherence = Coherence(self, on=False, coherence_ms=0, start=self.start)  # type: ignore[arg-type]

    def start(self, work: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(work, *args)

    def stale(self, inode: Inode) -> None:
        pass

    def stale_data(self, inode: Inode) -> None:
        self.dirty.append(inode)


class Request:
    """A caller that waits: `answer` or `code` once it was answered."""

    def __init__(self) -> None:
        self.interrupted = False
        self.on_interrupt: Callable[[], object] | None = None
        self.answer: bytes | None = None
        self.code = 0

    @property
    def answered(self) -> bool:
        return self.answer is not None or self.code != 0

    def reply_parts(self, parts: list[bytes]) -> None:
        assert not self.answered
        assert protocol.IOCTL_OUT.unpack(parts[0])[0] == 0
        self.answer = b"".join(parts[1:])

    def error(self, number: int) -> None:
        assert not self.answered
        self.code = number

    def interrupt(self) -> None:
        self.interrupted = True
        if self.on_interrupt:
            self.on_interrupt()


class Adapter:
    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self.volume = volume
        self.service = Service(volume, nursery)
        self.hca = Hca(self.service)  # type: ignore[arg-type]
        self._files: dict[int, OpenFile] = {}
        self._fh = 0

    # -- files --

    def file(self, blocks: int, fill: int = 0) -> Inode:
        """A file whose block n is full of the byte fill + n."""
        inode = new_inode(self.volume, stat.S_IFREG | 0o644)
        inode.nlookup = 1
        for n in range(blocks):
            fileops.write(self.volume, NOW, inode, n * BLOCK, bytes([(fill + n) % 256]) * BLOCK)
        return inode

    def open(self, inode: Inode, flags: int = os.O_RDWR) -> OpenFile:
        self._fh += 1
        file = self._files[self._fh] = OpenFile(inode, flags)
        file.fh = self._fh
        inode.opens += 1
        return file

    def close(self, file: OpenFile) -> None:
        del self._files[file.fh]
        self.hca.release(file.fh)
        holding.release_owner(self.volume, file.fh)
        self.free_unpinned()
        file.inode.opens -= 1

    def free_unpinned(self) -> None:
        """What the daemon's own task does after an unpin."""
        while self.volume.free_unpinned(NOW, 64):
            pass

    def finish(self) -> None:
        for file in list(self._files.values()):
            self.close(file)
        assert self.hca.counters() == {"contexts": 0, "regions": 0, "pairs": 0, "entries": 0}
        assert self.volume.pinned == 0
        self.volume.check()

    def read(self, inode: Inode) -> bytes:
        return fileops.read(self.volume, inode, 0, inode.size)

    # -- calls --

    def call(self, file: OpenFile, op: int, body: bytes = b"", request: Request | None = None) -> bytes | None:
        argument = (abi_hca.HEAD.pack(op, 0) + body).ljust(abi.PAGE_BYTES, b"\0")
        answer = self.hca.call(file, argument, request or Request())  # type: ignore[arg-type]
        if answer is not None:
            assert len(answer) <= abi.PAGE_BYTES
            assert abi_hca.HEAD.unpack_from(answer) == (op, 0)
        return None if answer is None else answer[abi_hca.HEAD.size :]

    def ask(self, file: OpenFile, op: int, answer: Struct, body: bytes = b"") -> tuple[int, ...]:
        given = self.call(file, op, body)
        assert given is not None
        return answer.unpack_from(given)

    def side(self, inode: Inode | None = None, **more: Any) -> Side:
        return Side(self, inode or self.file(8), **more)

    def connected(self, **more: Any) -> tuple[Side, Side]:
        """Two sides, each with a file of 8 blocks (letters A and a), a region on all of it, and a pair to the other."""
        one, two = self.side(self.file(8, 65), **more), self.side(self.file(8, 97), **more)
        one.connect(two)
        two.connect(one)
        return one, two


class Side:
    """One end: a context, a domain, a completion queue, a file, a region on all of it, and a pair."""

    def __init__(self, adapter: Adapter, inode: Inode, *, access: int = ALL, entries: int = 64, sges: int = 4) -> None:
        self.adapter = adapter
        self.inode = inode
        self.context = adapter.open(adapter.volume.root, os.O_RDONLY | os.O_DIRECTORY)
        self.secret = adapter.ask(self.context, Op.OPEN, abi_hca.DEVICE)[0]
        self.pd = self.make(Op.ALLOC_PD)
        self.cq = self.make(Op.CREATE_CQ, abi_hca.CQ.pack(entries, 0))
        self.file = adapter.open(inode, os.O_RDWR if access & Access.LOCAL_WRITE else os.O_RDONLY)
        self.mr, self.key = self.register(self.file, access)
        body = abi_hca.CREATE_QP.pack(self.pd, self.cq, self.cq, 16, 16, sges, sges, 0)
        self.qp, self.number = adapter.ask(self.context, Op.CREATE_QP, abi_hca.QP, body)

    def make(self, op: int, body: bytes = b"") -> int:
        return self.adapter.ask(self.context, op, abi_hca.HANDLE, body)[0]

    def pin(
        self, file: OpenFile, access: int, offset: int = 0, length: int | None = None, *, longterm: bool = True
    ) -> int:
        flags = abi.PIN_ON_DEMAND if access & Access.ON_DEMAND else abi.FOLL_PIN | abi.FOLL_LONGTERM * longterm
        flags |= abi.FOLL_WRITE if access & Access.LOCAL_WRITE else 0
        length = -(-file.inode.size // BLOCK) * BLOCK if length is None else length
        return holding.pin(
            self.adapter.volume, NOW, file.inode, offset, length, flags, file.fh, ME, writable=file.writable
        ).id

    def register(self, file: OpenFile, access: int, *, pin: int | None = None, start: int = 0, length: int | None = None,
                 iova: int = 0) -> tuple[int, int]:  # fmt: skip
        pin = self.pin(file, access) if pin is None else pin
        length = file.inode.size if length is None else length
        body = abi_hca.REG_MR.pack(self.secret, self.pd, access, pin, start, length, iova)
        handle, key, again, _ = self.adapter.ask(file, Op.REG_MR, abi_hca.MR, body)
        assert key == again
        return handle, key

    def modify(self, mask: int, *, state: int = 0, access: int = int(REMOTE), to: int = 0, rnr_timer: int = 12,
               rnr_retry: int = 7, retry_cnt: int = 7, timeout: int = 14, delay_us: int = 0) -> None:  # fmt: skip
        body = abi_hca.MODIFY_QP.pack(
            self.qp, mask, state, access, to, rnr_timer, rnr_retry, retry_cnt, timeout, delay_us
        )
        assert self.adapter.call(self.context, Op.MODIFY_QP, body) == b""

    def connect(self, other: Side, **more: Any) -> None:
        rest = AttrMask.TIMEOUT | AttrMask.RETRY_CNT | AttrMask.RNR_RETRY | AttrMask.MIN_RNR_TIMER | AttrMask.DELAY
        self.modify(AttrMask.STATE | AttrMask.ACCESS_FLAGS, state=State.INIT, **more)
        self.modify(AttrMask.STATE | AttrMask.DEST_QPN, state=State.RTR, to=other.number)
        self.modify(AttrMask.STATE | rest, state=State.RTS, **more)

    def delay(self, us: int) -> None:
        self.modify(AttrMask.DELAY, delay_us=us)

    @property
    def state(self) -> State:
        return State(self.adapter.ask(self.context, Op.QUERY_QP, abi_hca.QUERY_QP, abi_hca.HANDLE.pack(self.qp, 0))[2])

    # -- requests --

    def send(self, op: WrOp, sges: list[tuple[int, int]] | bytes = b"", *, key: int = 0, at: int = 0, wr_id: int = 1,
             flags: int = SendFlag.SIGNALED, imm: int = 0, compare: int = 0, swap: int = 0, lkey: int | None = None
             ) -> tuple[int, int]:  # fmt: skip
        """`sges`: (address, bytes) of our own region."""
        packed = sges if isinstance(sges, bytes) else self.sges(sges, lkey)
        wr = abi_hca.SEND_WR.pack(wr_id, op, flags, imm, len(packed) // 16, at, key, 0, compare, swap) + packed
        return self.adapter.ask(self.context, Op.POST_SEND, abi_hca.COUNT, abi_hca.POST.pack(self.qp, 1) + wr)

    def receive(self, *sges: tuple[int, int], wr_id: int = 2, lkey: int | None = None) -> tuple[int, int]:
        packed = self.sges(list(sges), lkey)
        wr = abi_hca.RECV_WR.pack(wr_id, len(sges), 0) + packed
        return self.adapter.ask(self.context, Op.POST_RECV, abi_hca.COUNT, abi_hca.POST.pack(self.qp, 1) + wr)

    def sges(self, ranges: list[tuple[int, int]], lkey: int | None = None) -> bytes:
        return b"".join(abi_hca.SGE.pack(at, n, self.key if lkey is None else lkey) for at, n in ranges)

    def poll(self, most: int = 100) -> list[SimpleNamespace]:
        answer = self.adapter.call(self.context, Op.POLL_CQ, abi_hca.POLL.pack(self.cq, most, 0, 0))
        assert answer is not None
        return completions(answer)

    async def done(self, count: int = 1) -> list[SimpleNamespace]:
        """So many completions, however long they take."""
        found = self.poll(count)
        while len(found) < count:
            request = Request()
            body = abi_hca.POLL.pack(self.cq, count - len(found), 10_000, 0)
            answer = self.adapter.call(self.context, Op.POLL_CQ, body, request)
            while answer is None:
                await trio.sleep(0.001)
                answer = request.answer[abi_hca.HEAD.size :] if request.answer else None
                assert not request.code
            new = completions(answer)
            assert new, f"{count} completions were expected, there are {found}"
            found += new
        return found

    async def status(self) -> Status:
        [one] = await self.done()
        return one.status

    def bytes(self) -> bytes:
        return self.adapter.read(self.inode)


def completions(answer: bytes) -> list[SimpleNamespace]:
    count, _ = abi_hca.COUNT.unpack_from(answer)
    names = ("wr_id", "status", "opcode", "vendor", "length", "imm", "number", "source", "flags")
    entries = abi_hca.WC.iter_unpack(answer[abi_hca.COUNT.size :][: count * abi_hca.WC.size])
    found = [SimpleNamespace(**dict(zip(names, entry, strict=True))) for entry in entries]
    for one in found:
        one.status = Status(one.status)
    assert len(found) == count
    return found
