"""RDMA between the processes of a daxfs mount, with the names of pyverbs: Context, PD, MR, CQ, QP, SGE, SendWR, RecvWR, WC.

    from daxfs import verbs

    with verbs.Context("/mnt/x") as context:
        pd, cq = verbs.PD(context), verbs.CQ(context, 16)
        mr = verbs.MR(pd, 1 << 20, verbs.IBV_ACCESS_LOCAL_WRITE | verbs.IBV_ACCESS_REMOTE_READ, file="/mnt/x/film")
        qp = verbs.QP(pd, verbs.QPInitAttr(scq=cq, rcq=cq))
        qp.connect(number_of_the_other_side)

The adapter (HCA) is simulated, in the daemon. Where verbs have memory there is a range of a file: an MR pins it (FOLL_PIN|
FOLL_LONGTERM, FOLL_WRITE with local write access; on demand with IBV_ACCESS_ON_DEMAND), and the adapter moves bytes
between the blocks of two MRs, whatever becomes of their files. No permission for the image is needed. Only reliable
connections (RC) exist; QP numbers and rkeys are exchanged as everywhere, by other means.

A context belongs to its descriptor (`fileno`), as everything that is made from it: fork and SCM_RIGHTS share them, and the
last close ends them. An MR also ends when all descriptors of its file are closed that share the one it was made with. What
`close` means in a process that made an object, and in others, is in closing.py.

Addresses and lengths are bytes, times seconds unless the name says otherwise. What a call refuses is a `PinError` (OSError,
`errno`); what a transfer meets is the `status` of its completion. Only the standard library is used.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Any

from daxfs import abi, abi_hca
from daxfs.abi_hca import Access, AttrMask, Op, SendFlag, State, Status, WrOp
from daxfs.client import calls, verbs_enums
from daxfs.client.calls import PinError
from daxfs.client.closing import Held, Opened
from daxfs.client.file import File
from daxfs.client.reports import Path, open_descriptor
from daxfs.client.verbs_enums import *  # noqa: F403

__all__ = [
    "CQ",
    "MR",
    "PD",
    "QP",
    "SGE",
    "WC",
    "Context",
    "DeviceAttr",
    "PinError",
    "PostError",
    "QPAttr",
    "QPCap",
    "QPInitAttr",
    "RecvWR",
    "SendWR",
    "wc_status_to_str",
]
__all__ += verbs_enums.__all__

_WAIT_MS_MAX = 1000  # of one call: a thread that waits looks up between two

_WORDS = {
    errno.ENOENT: "it is gone: destroyed before, or of another context",
    errno.EBUSY: "something still uses it: destroy that first",
    errno.EBADF: "the context is closed, or this descriptor never had one",
    errno.ENOMEM: "a limit of the adapter is reached: see Context.query_device()",
    errno.EOVERFLOW: "the completion queue has overrun: make it larger, or poll it more often",
    errno.EFAULT: "outside the region, without its local write access, or its blocks are not held any more",
}


def wc_status_to_str(status: int) -> str:
    """The name of a completion's status, as in <infiniband/verbs.h>."""
    return f"IBV_WC_{Status(status).name}" if status in list(Status) else f"unknown status {status}"


def _call(fd: int, op: Op, body: bytes, *, words: dict[int, str] = _WORDS) -> memoryview:
    """One call of the adapter; what it answered. PinError."""
    buffer = bytearray(abi.PAGE_BYTES)
    abi_hca.HEAD.pack_into(buffer, 0, op, 0)
    buffer[abi_hca.HEAD.size : abi_hca.HEAD.size + len(body)] = body
    if len(buffer) != abi.PAGE_BYTES:
        raise PinError(errno.EMSGSIZE, "more than one call can carry")
    while True:
        try:
            calls.ioctl_page(fd, abi.IOC_HCA, buffer)
            return memoryview(buffer)[abi_hca.HEAD.size :]
        except InterruptedError:
            continue
        except OSError as problem:
            code = problem.errno or errno.EIO
            raise PinError(code, words.get(code) or calls.words_for(code) or os.strerror(code)) from None


def _packed(struct: Struct, *values: int) -> bytes:
    try:
        return struct.pack(*values)
    except Exception as problem:  # struct.error, or a value that is no number
        raise PinError(errno.EINVAL, f"a number is out of range: {problem}") from None


class _Object(Held):
    """Something of a context, with a handle; `close` destroys it. A context manager."""

    _destroy: Op
    _closed_errno = errno.ENOENT

    def __init__(self, context: Context, handle: int) -> None:
        super().__init__(context)
        self.context = context
        self._handle = handle

    def _called(self) -> tuple[str, str]:
        return f"{type(self).__name__} {self._handle}", self.context.name

    @property
    def handle(self) -> int:
        """The adapter's number for it. PinError: EBADF (the context is closed), ENOENT (it is)."""
        self.context.fileno()
        self._require_held()
        return self._handle

    def close(self) -> None:
        """Destroy it; in another process than the one that made it, drop this process's copy. Again, or when the context is
        closed: no effect. PinError: EBUSY."""
        super().close()

    def _give_back(self) -> None:
        self.context._do(self._destroy, abi_hca.HANDLE.pack(self._handle, 0))


@dataclass(frozen=True, slots=True)
class DeviceAttr:
    """Limits of the adapter: objects of a context, requests of a queue, SGEs of a request, entries of a completion queue."""

    max_pd: int
    max_mr: int
    max_cq: int
    max_qp: int
    max_qp_wr: int
    max_sge: int
    max_cqe: int
    max_msg_sz: int  # bytes


class Context(Opened):
    """An open adapter. `name` is the mount point, or any directory of the mount. A context manager.

    `close` closes the descriptor (`fileno`), and those of its regions: what was made from it ends with the last copy.
    PinError: ENOTTY (not a daxfs mount), ENOTDIR, ENOMEM.
    """

    def __init__(self, name: Path) -> None:
        self.name = os.fsdecode(name)
        fd = open_descriptor(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            answer = _call(fd, Op.OPEN, b"", words={})
        except PinError as problem:
            os.close(fd)
            raise PinError(problem.errno, problem.strerror, self.name) from None
        super().__init__(fd)
        self._secret, self.block_size, *limits = abi_hca.DEVICE.unpack_from(answer)
        self._limits = DeviceAttr(*limits)

    def _called(self) -> tuple[str, str]:
        return "the context", self.name

    @property
    def closed(self) -> bool:
        return not self.held

    def query_device(self) -> DeviceAttr:
        return self._limits

    def _do(self, op: Op, body: bytes) -> memoryview:
        return _call(self.fileno(), op, body)


class PD(_Object):
    """A protection domain: keys of its regions work for its queue pairs only."""

    _destroy = Op.DEALLOC_PD

    def __init__(self, context: Context) -> None:
        handle, _ = abi_hca.HANDLE.unpack_from(context._do(Op.ALLOC_PD, b""))
        super().__init__(context, handle)


class MR(_Object):
    """A memory region: `length` bytes of `file` from `offset` on, pinned for the adapter.

    file: a path, a `daxfs.client.File` or a descriptor; it must be open for writing for IBV_ACCESS_LOCAL_WRITE, which remote
    write and atomic access need. `buf` is the address of its first byte for SGEs and for the other side: the offset in the
    file, unless `address` says otherwise (the same within a block).
    IBV_ACCESS_ON_DEMAND: nothing is pinned. A truncate takes the blocks at once; the next transfer faults the range in again
    from the file as it is then, and fails if it is gone.
    PinError: as `daxfs.client.File.pin`; EINVAL (access flags, address), ENOMEM, EBADF (the context is closed).
    """

    _destroy = Op.DEREG_MR

    def __init__(self, pd: PD, length: int, access: int = 0, *, file: Path | File | int, offset: int = 0,
                 address: int | None = None) -> None:  # fmt: skip
        context = pd.context
        block = context.block_size
        self.length = length
        self.access = Access(access)
        self.buf = offset if address is None else address
        write = bool(access & Access.LOCAL_WRITE)
        self._file = _descriptor(file, writable=write)
        try:
            first = offset // block * block
            pinned = -(-(offset + length) // block) * block - first
            flags = abi.PIN_ON_DEMAND if access & Access.ON_DEMAND else abi.FOLL_PIN | abi.FOLL_LONGTERM
            pin_id, _, _ = calls.pin(self._file, first, pinned, flags | (abi.FOLL_WRITE if write else 0))
            try:
                body = _packed(
                    abi_hca.REG_MR, context._secret, pd.handle, access, pin_id, offset - first, length, self.buf
                )
                answer = _call(self._file, Op.REG_MR, body, words=_REG_MR_WORDS)
            except BaseException:
                calls.unpin(self._file, pin_id, dirty=False)
                raise
        except BaseException as problem:
            os.close(self._file)
            if isinstance(problem, PinError) and isinstance(file, str | bytes | os.PathLike):
                raise PinError(problem.errno, problem.strerror, os.fsdecode(file)) from None
            raise
        handle, self.lkey, self.rkey, _ = abi_hca.MR.unpack_from(answer)
        super().__init__(context, handle)

    def read(self, length: int, offset: int = 0) -> bytes:
        """What the region holds, through the adapter. PinError: EFAULT (out of bounds, or the blocks are not held)."""
        out = b""
        while len(out) < length:
            n = min(length - len(out), abi_hca.ROOM)
            body = _packed(abi_hca.ACCESS, self.handle, n, offset + len(out))
            out += self.context._do(Op.LOAD, body)[:n]
        return out

    def write(self, data: bytes | bytearray | memoryview, length: int | None = None, offset: int = 0) -> None:
        """Put bytes (the first `length`) into the region. PinError: EFAULT, also without local write access."""
        data = memoryview(data).cast("B")[:length]
        room = abi_hca.ROOM - abi_hca.ACCESS.size
        for at in range(0, len(data), room):
            piece = bytes(data[at : at + room])
            self.context._do(Op.STORE, _packed(abi_hca.ACCESS, self.handle, len(piece), offset + at) + piece)

    def _give_back(self) -> None:
        try:
            super()._give_back()
        finally:
            self.drop()

    def _let_go(self) -> None:
        fd, self._file = self._file, -1
        os.close(fd)


_REG_MR_WORDS = {
    errno.EINVAL: "access flags or address do not fit: remote write and atomic need local write, the address must be the "
    "file offset within a block, and the context open",
    errno.ENOENT: "the protection domain is gone",
    errno.ENOMEM: _WORDS[errno.ENOMEM],
}


def _descriptor(file: Path | File | int, *, writable: bool) -> int:
    """A descriptor of our own of the same open file description, or of a new one."""
    if isinstance(file, File):
        return os.dup(file.fileno())
    if isinstance(file, int):
        return os.dup(file)
    return open_descriptor(file, os.O_RDWR if writable else os.O_RDONLY, to_pin=True)


@dataclass(frozen=True, slots=True)
class WC:
    """A work completion. `imm_data` counts if `wc_flags` has IBV_WC_WITH_IMM; `byte_len` of what was received or fetched."""

    wr_id: int
    status: int
    opcode: int
    vendor_err: int
    byte_len: int
    imm_data: int
    qp_num: int
    src_qp: int
    wc_flags: int

    def __str__(self) -> str:
        return f"{wc_status_to_str(self.status)} wr_id={self.wr_id} qp_num={self.qp_num} byte_len={self.byte_len}"


class CQ(_Object):
    """A completion queue of `cqe` entries."""

    _destroy = Op.DESTROY_CQ

    def __init__(self, context: Context, cqe: int) -> None:
        self.cqe = cqe
        handle, _ = abi_hca.HANDLE.unpack_from(context._do(Op.CREATE_CQ, _packed(abi_hca.CQ, cqe, 0)))
        super().__init__(context, handle)

    def poll(self, num_entries: int = 1) -> tuple[int, list[WC]]:
        """At most `num_entries` completions, and how many they are; does not wait. PinError: EOVERFLOW (it has overrun)."""
        found = self._poll(num_entries, 0)
        return len(found), found

    def wait(self, num_entries: int = 1, timeout_s: float | None = None) -> list[WC]:
        """`num_entries` completions; fewer when the time is over. PinError: EOVERFLOW, EBUSY (too many wait), ENOENT."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        found: list[WC] = []
        while len(found) < num_entries:
            left = _WAIT_MS_MAX if end is None else max(0, int((end - time.monotonic()) * 1000 + 0.999))
            found += self._poll(num_entries - len(found), min(left, _WAIT_MS_MAX))
            if not left:
                break
        return found

    def _poll(self, most: int, wait_ms: int) -> list[WC]:
        answer = self.context._do(Op.POLL_CQ, _packed(abi_hca.POLL, self.handle, most, wait_ms, 0))
        count, _ = abi_hca.COUNT.unpack_from(answer)
        records = answer[abi_hca.COUNT.size : abi_hca.COUNT.size + count * abi_hca.WC.size]
        return [WC(*entry) for entry in abi_hca.WC.iter_unpack(records)]


@dataclass(slots=True)
class SGE:
    """`length` bytes at `addr` of the region with this `lkey`."""

    addr: int
    length: int
    lkey: int


@dataclass(slots=True)
class RecvWR:
    """Where a message may be put. `num_sge` is there for pyverbs' sake: all of `sg` counts."""

    wr_id: int = 0
    num_sge: int = 0
    sg: Sequence[SGE] = ()

    def _packed(self) -> bytes:
        return _packed(abi_hca.RECV_WR, self.wr_id, len(self.sg), 0) + _sges(self.sg)


@dataclass(slots=True)
class SendWR:
    """A request to send. RDMA and atomic ones name the other side's region with `set_wr_rdma` or `set_wr_atomic`."""

    wr_id: int = 0
    opcode: int = WrOp.SEND
    num_sge: int = 0
    imm_data: int = 0
    sg: Sequence[SGE] = ()
    send_flags: int = SendFlag.SIGNALED
    rkey: int = field(default=0, init=False)
    remote_addr: int = field(default=0, init=False)
    compare_add: int = field(default=0, init=False)
    swap: int = field(default=0, init=False)

    def set_wr_rdma(self, rkey: int, addr: int) -> None:
        """Read from or write to this address of the other side."""
        self.rkey, self.remote_addr = rkey, addr

    def set_wr_atomic(self, rkey: int, addr: int, compare_add: int, swap: int = 0) -> None:
        """Compare and swap, or fetch and add, the 8 bytes (little-endian) at this address, a multiple of 8. What was there
        comes into the SGE."""
        self.rkey, self.remote_addr, self.compare_add, self.swap = rkey, addr, compare_add, swap

    def _packed(self) -> bytes:
        return _packed(
            abi_hca.SEND_WR, self.wr_id, self.opcode, self.send_flags, self.imm_data, len(self.sg), self.remote_addr,
            self.rkey, 0, self.compare_add, self.swap,
        ) + _sges(self.sg)  # fmt: skip


def _sges(sg: Iterable[SGE]) -> bytes:
    return b"".join(_packed(abi_hca.SGE, sge.addr, sge.length, sge.lkey) for sge in sg)


@dataclass(slots=True)
class QPCap:
    """What a queue pair's queues hold: requests, and SGEs of one."""

    max_send_wr: int = 16
    max_recv_wr: int = 16
    max_send_sge: int = 1
    max_recv_sge: int = 1


@dataclass(slots=True)
class QPInitAttr:
    """What a queue pair is made of. `sq_sig_all`: every send request completes visibly, not only IBV_SEND_SIGNALED ones."""

    scq: CQ
    rcq: CQ
    cap: QPCap = field(default_factory=QPCap)
    qp_type: int = verbs_enums.IBV_QPT_RC
    sq_sig_all: bool = False


@dataclass(slots=True)
class QPAttr:
    """What can be changed. min_rnr_timer, timeout: codes of the InfiniBand standard; rnr_retry 7, timeout 0: for ever."""

    qp_state: int = State.RESET
    qp_access_flags: int = Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
    dest_qp_num: int = 0
    min_rnr_timer: int = 12
    rnr_retry: int = 7
    retry_cnt: int = 7
    timeout: int = 14
    delay_us: int = 0


class QP(_Object):
    """A queue pair (RC). `qp_num` is what the other side connects to. PinError: ENOMEM, EINVAL, EOPNOTSUPP (not RC)."""

    _destroy = Op.DESTROY_QP

    def __init__(self, pd: PD, init_attr: QPInitAttr) -> None:
        if init_attr.qp_type != verbs_enums.IBV_QPT_RC:
            raise PinError(errno.EOPNOTSUPP, "only reliable connections exist: qp_type=IBV_QPT_RC")
        cap = init_attr.cap
        body = _packed(
            abi_hca.CREATE_QP, pd.handle, init_attr.scq.handle, init_attr.rcq.handle, cap.max_send_wr, cap.max_recv_wr,
            cap.max_send_sge, cap.max_recv_sge, init_attr.sq_sig_all,
        )  # fmt: skip
        handle, self.qp_num = abi_hca.QP.unpack_from(pd.context._do(Op.CREATE_QP, body))
        super().__init__(pd.context, handle)

    @property
    def qp_state(self) -> State:
        return State(self.query().qp_state)

    def query(self) -> QPAttr:
        answer = self.context._do(Op.QUERY_QP, abi_hca.HANDLE.pack(self.handle, 0))
        _, _, *values = abi_hca.QUERY_QP.unpack_from(answer)
        return QPAttr(*values)

    def modify(self, attr: QPAttr, mask: int) -> None:
        """Change what `mask` (IBV_QP_*) names. PinError: EINVAL (no such transition, a value out of range)."""
        values = [
            attr.qp_state, attr.qp_access_flags, attr.dest_qp_num, attr.min_rnr_timer, attr.rnr_retry, attr.retry_cnt,
            attr.timeout, attr.delay_us,
        ]  # fmt: skip
        self.context._do(Op.MODIFY_QP, _packed(abi_hca.MODIFY_QP, self.handle, mask, *values))

    def _to(self, state: State, attr: QPAttr, mask: int) -> None:
        attr.qp_state = state
        self.modify(attr, AttrMask.STATE | mask)

    def to_init(self, attr: QPAttr) -> None:
        self._to(State.INIT, attr, AttrMask.ACCESS_FLAGS)

    def to_rtr(self, attr: QPAttr) -> None:
        """Ready to receive from `attr.dest_qp_num`; by way of INIT."""
        if self.qp_state != State.INIT:
            self.to_init(attr)
        self._to(State.RTR, attr, AttrMask.DEST_QPN | AttrMask.MIN_RNR_TIMER)

    def to_rts(self, attr: QPAttr) -> None:
        """Ready to send as well; by way of RTR."""
        if self.qp_state != State.RTR:
            self.to_rtr(attr)
        self._to(State.RTS, attr, AttrMask.TIMEOUT | AttrMask.RETRY_CNT | AttrMask.RNR_RETRY)

    def connect(self, dest_qp_num: int, **attributes: Any) -> None:
        """Not of pyverbs: from RESET (or INIT, where receive requests can be posted already) to RTS, with these fields of
        `QPAttr`."""
        self.to_rts(QPAttr(dest_qp_num=dest_qp_num, **attributes))

    def set_delay(self, delay_us: int) -> None:
        """Not of pyverbs: how long requests posted from now on are under way, in microseconds (at most a minute)."""
        self.modify(QPAttr(delay_us=delay_us), AttrMask.DELAY)

    def post_send(self, *requests: SendWR) -> None:
        """Queue requests, in order. PostError: ENOMEM (the queue is full), EINVAL (state, opcode, flags, SGEs); its `posted`
        says how many were queued before the one that is refused."""
        self._post(Op.POST_SEND, requests, "queue pair not in RTS, unknown opcode or flags, or too many SGEs")

    def post_recv(self, *requests: RecvWR) -> None:
        """The same for what is received."""
        self._post(Op.POST_RECV, requests, "queue pair in RESET, or too many SGEs")

    def _post(self, op: Op, requests: Sequence[SendWR | RecvWR], what: str) -> None:
        left = [request._packed() for request in requests]
        posted = 0
        while left:
            room, count = abi_hca.ROOM - abi_hca.POST.size, 0
            while count < len(left) and len(left[count]) <= room:
                room -= len(left[count])
                count += 1
            if not count:
                raise PostError(errno.EINVAL, "a request has too many SGEs", posted)
            body = _packed(abi_hca.POST, self.handle, count) + b"".join(left[:count])
            words = {**_WORDS, errno.EINVAL: what, errno.ENOMEM: "the queue is full: wait for completions"}
            try:
                taken, code = abi_hca.COUNT.unpack_from(_call(self.context.fileno(), op, body, words=words))
            except PinError as problem:
                raise PostError(problem.errno, problem.strerror, posted) from None
            posted += taken
            if code:
                raise PostError(code, words.get(code, os.strerror(code)), posted)
            del left[:count]


class PostError(PinError):
    """`posted`: how many requests of the call were queued."""

    def __init__(self, code: int | None, text: str | None, posted: int) -> None:
        super().__init__(code, text)
        self.posted = posted
