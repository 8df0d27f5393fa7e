"""The simulated HCA: RDMA between processes of one mount, on regions that stand on pins of its files.

Owns the contexts and the handles of what was made through them; decodes the calls of `abi_hca.py` and answers them. A
context belongs to an open file description of a directory, a region also to that of its file: the last close of either
ends it.

Rules
- Handles mean something in their own context only; keys are random, and work in their protection domain only.
- Everything is bounded: objects by context, queue entries by context and in all (`ENTRIES_*`), and a call by its page.
- A call that waits for a completion is answered by a task of its own, and ends with its time, its caller or its queue.

Not here: what a transfer does (queues.py), what it may reach (regions.py), and poll(2): POLL_CQ waits itself.
"""

from __future__ import annotations

import errno
import functools
import operator
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from daxfs import abi_hca
from daxfs.abi_hca import Access, AttrMask, Op, SendFlag, State, WrOp
from daxfs.daemon import protocol
from daxfs.daemon.queues import MESSAGE_MAX, QP_NUMBERS, Completions, Pair, Pairs, may_go
from daxfs.daemon.regions import Refused, Region, Table
from daxfs.daemon.requests import OpenFile
from daxfs.daemon.service import Service
from daxfs.daemon.session import Request
from daxfs.errors import BadAddress, BadArgument, BadDescriptor, Busy, Exists, FsError, NoEntry, NoMemory, NotDirectory

CONTEXTS_MAX = 256
DOMAINS_MAX = 64  # of a context; so are the next four
REGIONS_MAX = 4096
QUEUES_MAX = 256
PAIRS_MAX = 256
WAITERS_MAX = 64
ENTRIES_PER_CONTEXT_MAX = 1 << 15  # requests and completions that its queues may hold
ENTRIES_MAX = 1 << 17
QUEUE_MAX = 1 << 12  # requests of one queue
COMPLETIONS_MAX = 1 << 14
SGES_MAX = 16
DELAY_US_MAX = 60_000_000

_ACCESS = int(functools.reduce(operator.or_, Access))  # plain numbers: ~ of a flag knows only flags
_REMOTE_FLAGS = int(Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)
_SEND_FLAGS = int(functools.reduce(operator.or_, SendFlag))
_OPCODES = frozenset(map(int, WrOp))
# Attributes of a pair, in the order of abi_hca.MODIFY_QP: field of Pair, largest value.
_ATTRIBUTES = (
    (AttrMask.STATE, "state", State.ERR),
    (AttrMask.ACCESS_FLAGS, "access", _REMOTE_FLAGS | Access.LOCAL_WRITE),
    (AttrMask.DEST_QPN, "destination", QP_NUMBERS - 1),
    (AttrMask.MIN_RNR_TIMER, "min_rnr_timer", 31),
    (AttrMask.RNR_RETRY, "rnr_retry", 7),
    (AttrMask.RETRY_CNT, "retry_cnt", 7),
    (AttrMask.TIMEOUT, "timeout", 31),
    (AttrMask.DELAY, "delay_us", DELAY_US_MAX),
)
_T = TypeVar("_T")


@dataclass(eq=False)
class Domain:
    """A protection domain. `users`: regions and pairs in it."""

    users: int = 0


@dataclass(eq=False)
class Context:
    """What was made through one descriptor. Handles count up and are not used again."""

    fh: int
    secret: int
    domains: dict[int, Domain] = field(default_factory=dict)
    regions: dict[int, Region] = field(default_factory=dict)
    queues: dict[int, Completions] = field(default_factory=dict)
    pairs: dict[int, Pair] = field(default_factory=dict)
    entries: int = 0
    waiters: int = 0
    last: int = 0

    def add(self, kind: dict[int, _T], thing: _T) -> int:
        self.last += 1
        kind[self.last] = thing
        return self.last


Call = Callable[[Context, memoryview, Request], bytes | None]


class Hca:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._table = Table(service)
        self._pairs = Pairs(service, self._table)
        self._contexts: dict[int, Context] = {}  # by file handle
        self._secrets: dict[int, Context] = {}
        self._entries = 0
        service.on_release = self.release
        self._calls: dict[int, Call] = {
            Op.ALLOC_PD: self._alloc_pd,
            Op.DEALLOC_PD: self._dealloc_pd,
            Op.DEREG_MR: self._dereg_mr,
            Op.LOAD: self._load,
            Op.STORE: self._store,
            Op.CREATE_CQ: self._create_cq,
            Op.DESTROY_CQ: self._destroy_cq,
            Op.POLL_CQ: self._poll_cq,
            Op.CREATE_QP: self._create_qp,
            Op.MODIFY_QP: self._modify_qp,
            Op.QUERY_QP: self._query_qp,
            Op.DESTROY_QP: self._destroy_qp,
            Op.POST_SEND: self._post_send,
            Op.POST_RECV: self._post_recv,
        }

    def call(self, file: OpenFile, argument: bytes, request: Request) -> bytes | None:
        """Carry out one call: the answer, or None if it is given later. FsError; LayoutBusy asks to be called again."""
        op, zero = abi_hca.HEAD.unpack_from(argument)
        body = memoryview(argument)[abi_hca.HEAD.size :]
        if zero:
            raise BadArgument("the reserved field of a call must be 0")
        if op == Op.OPEN:
            return _answer(op, self._open(file))
        if op == Op.REG_MR:
            return _answer(op, self._reg_mr(file, body))
        context = self._contexts.get(file.fh)
        if context is None:
            raise BadDescriptor("no HCA context was opened on this descriptor")
        if op not in self._calls:
            raise BadArgument(f"the HCA has no operation {op}")
        answer = self._calls[op](context, body, request)
        return None if answer is None else _answer(op, answer)

    def release(self, fh: int) -> None:
        """The last close of any descriptor. Before its pins are released, so that they are dirty if the device wrote."""
        self._table.file_closed(fh)
        context = self._contexts.pop(fh, None)
        if context is None:
            return
        del self._secrets[context.secret]
        for pair in context.pairs.values():
            self._pairs.destroy(pair)
        for queue in context.queues.values():
            queue.close()
        for region in context.regions.values():
            self._table.deregister(region)
        self._entries -= context.entries

    def counters(self) -> dict[str, int]:
        """For reports."""
        return {
            "contexts": len(self._contexts),
            "regions": len(self._table),
            "pairs": len(self._pairs),
            "entries": self._entries,
        }

    # -- contexts and domains --

    def _open(self, file: OpenFile) -> bytes:
        if not file.inode.is_dir:
            raise NotDirectory("an HCA context is opened on a directory of the mount")
        if file.fh in self._contexts:
            raise Exists("this descriptor has an HCA context already")
        if len(self._contexts) >= CONTEXTS_MAX:
            raise NoMemory(f"the HCA has {CONTEXTS_MAX} contexts already")
        context = Context(file.fh, secrets.randbits(64))
        self._contexts[file.fh] = context
        self._secrets[context.secret] = context
        block = self._service.volume.block_size
        return abi_hca.DEVICE.pack(
            context.secret, block, DOMAINS_MAX, REGIONS_MAX, QUEUES_MAX, PAIRS_MAX, QUEUE_MAX, SGES_MAX, COMPLETIONS_MAX,
            MESSAGE_MAX,
        )  # fmt: skip

    def _alloc_pd(self, context: Context, body: memoryview, request: Request) -> bytes:
        _room(context.domains, DOMAINS_MAX, "protection domains")
        return abi_hca.HANDLE.pack(context.add(context.domains, Domain()), 0)

    def _dealloc_pd(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle = _handle(body)
        if _find(context.domains, handle, "protection domain").users:
            raise Busy("regions or queue pairs are in the protection domain: take them out first")
        del context.domains[handle]
        return b""

    # -- regions --

    def _reg_mr(self, file: OpenFile, body: memoryview) -> bytes:
        secret, domain_handle, access, pin_id, start, length, iova = abi_hca.REG_MR.unpack_from(body)
        context = self._secrets.get(secret)
        if context is None:
            raise BadArgument("no such HCA context")
        if not file.inode.is_file:
            raise BadArgument("a region is made of a regular file")
        if access & ~_ACCESS:
            raise BadArgument(f"unknown access flags {access & ~_ACCESS:#x}")
        _room(context.regions, REGIONS_MAX, "regions")
        domain = _find(context.domains, domain_handle, "protection domain")
        region = self._table.register(domain, file, access, pin_id, start, length, iova)
        domain.users += 1
        return abi_hca.MR.pack(context.add(context.regions, region), region.key, region.key, 0)

    def _dereg_mr(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle = _handle(body)
        region = _find(context.regions, handle, "region")
        del context.regions[handle]
        assert isinstance(region.domain, Domain)
        region.domain.users -= 1
        self._table.deregister(region)
        return b""

    def _load(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle, length, offset = abi_hca.ACCESS.unpack_from(body)
        if length > abi_hca.ROOM:
            raise BadArgument(f"at most {abi_hca.ROOM} bytes are read at a time")
        region = _find(context.regions, handle, "region")
        try:
            return self._table.load(self._table.inside(region, offset, length, 0))
        except Refused as e:
            raise BadAddress(str(e)) from None

    def _store(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle, length, offset = abi_hca.ACCESS.unpack_from(body)
        if length > abi_hca.ROOM - abi_hca.ACCESS.size:
            raise BadArgument("the bytes do not fit into the call")
        region = _find(context.regions, handle, "region")
        data = bytes(body[abi_hca.ACCESS.size :][:length])
        try:
            self._table.store(self._table.inside(region, offset, length, Access.LOCAL_WRITE), data)
        except Refused as e:
            raise BadAddress(str(e)) from None
        region.written = True
        return b""

    # -- completions --

    def _create_cq(self, context: Context, body: memoryview, request: Request) -> bytes:
        entries, zero = abi_hca.CQ.unpack_from(body)
        if zero or not 0 < entries <= COMPLETIONS_MAX:
            raise BadArgument(f"a completion queue has from 1 to {COMPLETIONS_MAX} entries")
        _room(context.queues, QUEUES_MAX, "completion queues")
        self._charge(context, entries)
        return abi_hca.HANDLE.pack(context.add(context.queues, Completions(entries)), 0)

    def _destroy_cq(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle = _handle(body)
        queue = _find(context.queues, handle, "completion queue")
        if queue.users:
            raise Busy("queue pairs use the completion queue: destroy them first")
        del context.queues[handle]
        queue.close()
        self._charge(context, -queue.capacity)
        return b""

    def _poll_cq(self, context: Context, body: memoryview, request: Request) -> bytes | None:
        handle, most, wait_ms, zero = abi_hca.POLL.unpack_from(body)
        if zero:
            raise BadArgument("the reserved field of a poll must be 0")
        queue = _find(context.queues, handle, "completion queue")
        if queue.entries or queue.overrun or not (wait_ms and most):
            return _completions(queue, most)
        if context.waiters >= WAITERS_MAX:
            raise Busy(f"{WAITERS_MAX} calls wait on this context already")
        context.waiters += 1
        self._service.start(self._wait_cq, context, queue, most, wait_ms, request)
        return None

    async def _wait_cq(self, context: Context, queue: Completions, most: int, wait_ms: int, request: Request) -> None:
        """Answer a poll once there is something, or its time is over."""
        seconds = float("inf") if wait_ms == abi_hca.INFINITE else wait_ms / 1000
        try:
            with trio.move_on_after(seconds) as scope:
                request.on_interrupt = scope.cancel
                if request.interrupted:
                    scope.cancel()
                await queue.arrival()
            if request.answered:  # the device was removed
                return
            if request.interrupted and not queue.entries:
                request.error(errno.EINTR)
            elif queue.closed:
                request.error(errno.ENOENT)
            else:
                answer = _answer(Op.POLL_CQ, _completions(queue, most))
                request.reply_parts([protocol.IOCTL_OUT.pack(0, 0), answer])
        except FsError as e:
            request.error(e.errno)
        finally:
            context.waiters -= 1
            if not request.answered:
                request.error(errno.ENODEV)

    # -- queue pairs --

    def _create_qp(self, context: Context, body: memoryview, request: Request) -> bytes:
        domain, send, recv, sends, recvs, send_sges, recv_sges, signal_all = abi_hca.CREATE_QP.unpack_from(body)
        if not (0 < sends <= QUEUE_MAX and recvs <= QUEUE_MAX):
            raise BadArgument(f"a queue has from 1 to {QUEUE_MAX} requests")
        if not (0 < send_sges <= SGES_MAX and recv_sges <= SGES_MAX) or signal_all > 1:
            raise BadArgument(f"a request has from 1 to {SGES_MAX} SGEs")
        _room(context.pairs, PAIRS_MAX, "queue pairs")
        pd = _find(context.domains, domain, "protection domain")
        send_cq = _find(context.queues, send, "completion queue")
        recv_cq = _find(context.queues, recv, "completion queue")
        self._charge(context, sends + recvs)
        pair = self._pairs.create(pd, send_cq, recv_cq, sends, recvs, send_sges, recv_sges, bool(signal_all))
        pair.handle = context.add(context.pairs, pair)
        pd.users += 1
        return abi_hca.QP.pack(pair.handle, pair.number)

    def _modify_qp(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle, mask, *values = abi_hca.MODIFY_QP.unpack_from(body)
        pair = _find(context.pairs, handle, "queue pair")
        new = {}
        for (attribute, name, most), value in zip(_ATTRIBUTES, values, strict=True):
            if mask & attribute:
                mask &= ~attribute
                new[name] = value
                if value > most:
                    raise BadArgument(f"{name} {value} of a queue pair: at most {most}")
        if mask:
            raise BadArgument(f"unknown attributes {mask:#x} of a queue pair")
        state = new.pop("state", None)
        if state is not None and (state not in list(State) or not may_go(pair.state, State(state))):
            raise BadArgument(f"a queue pair does not go from {pair.state.name} to state {state}")
        if "destination" in new and pair.state not in (State.RESET, State.INIT):
            raise BadArgument("a connected queue pair keeps its destination: reset it first")
        if state == State.RTR and not new.get("destination", pair.destination):
            raise BadArgument("a queue pair needs a destination to receive")
        if "access" in new:
            pair.access = new.pop("access") & _REMOTE_FLAGS
        for name, value in new.items():
            setattr(pair, name, value)
        if state is not None:
            self._pairs.move_to(pair, State(state))
        return b""

    def _query_qp(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle = _handle(body)
        pair = _find(context.pairs, handle, "queue pair")
        return abi_hca.QUERY_QP.pack(handle, 0, *(getattr(pair, name) for _, name, _ in _ATTRIBUTES))

    def _destroy_qp(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle = _handle(body)
        pair = _find(context.pairs, handle, "queue pair")
        del context.pairs[handle]
        self._pairs.destroy(pair)
        assert isinstance(pair.domain, Domain)
        pair.domain.users -= 1
        self._charge(context, -(pair.sends_max + pair.recvs_max))
        return b""

    def _post_send(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle, count = abi_hca.POST.unpack_from(body)
        pair = _find(context.pairs, handle, "queue pair")
        if pair.state not in (State.RTS, State.ERR):
            raise BadArgument(f"a queue pair in {pair.state.name} does not send")

        def post(request: bytes) -> None:
            _, opcode, flags, _, _, _, _, zero, _, _ = abi_hca.SEND_WR.unpack_from(request)
            if opcode not in _OPCODES or flags & ~_SEND_FLAGS or zero:
                raise BadArgument(f"no send request has opcode {opcode} and flags {flags:#x}")
            if len(pair.sends) >= pair.sends_max:
                raise NoMemory("the send queue is full")
            self._pairs.post_send(pair, request)

        return _post(body, count, abi_hca.SEND_WR, 4, pair.send_sges, post)

    def _post_recv(self, context: Context, body: memoryview, request: Request) -> bytes:
        handle, count = abi_hca.POST.unpack_from(body)
        pair = _find(context.pairs, handle, "queue pair")
        if pair.state is State.RESET:
            raise BadArgument("a queue pair in RESET does not receive")

        def post(request: bytes) -> None:
            if len(pair.recvs) >= pair.recvs_max:
                raise NoMemory("the receive queue is full")
            self._pairs.post_recv(pair, request)

        return _post(body, count, abi_hca.RECV_WR, 1, pair.recv_sges, post)

    # -- limits --

    def _charge(self, context: Context, entries: int) -> None:
        """What the queues of a context may hold, before they are made or after they are gone."""
        if context.entries + entries > ENTRIES_PER_CONTEXT_MAX or self._entries + entries > ENTRIES_MAX:
            raise NoMemory(f"queues hold at most {ENTRIES_PER_CONTEXT_MAX} entries in a context, {ENTRIES_MAX} in all")
        context.entries += entries
        self._entries += entries


def _answer(op: int, body: bytes) -> bytes:
    return abi_hca.HEAD.pack(op, 0) + body


def _handle(body: memoryview) -> int:
    handle: int
    handle, zero = abi_hca.HANDLE.unpack_from(body)
    if zero:
        raise BadArgument("the reserved field behind a handle must be 0")
    return handle


def _find(kind: dict[int, _T], handle: int, what: str) -> _T:
    if handle not in kind:
        raise NoEntry(f"no {what} {handle} in this context")
    return kind[handle]


def _room(kind: dict[int, _T], most: int, what: str) -> None:
    if len(kind) >= most:
        raise NoMemory(f"a context has at most {most} {what}")


def _completions(queue: Completions, most: int) -> bytes:
    if queue.overrun and not queue.entries:
        raise FsError("the completion queue has overrun", errno.EOVERFLOW)
    found = queue.take(min(most, (abi_hca.ROOM - abi_hca.COUNT.size) // abi_hca.WC.size))
    return abi_hca.COUNT.pack(len(found), 0) + b"".join(found)


def _post(body: memoryview, count: int, head: struct.Struct, sges_at: int, sges_max: int, post: Callable[[bytes], None]
          ) -> bytes:  # fmt: skip
    """Post requests that follow each other, up to the first that cannot be."""
    at = abi_hca.POST.size
    for done in range(count):
        try:
            if at + head.size > len(body):
                raise BadArgument("fewer requests than were announced")
            sges = head.unpack_from(body, at)[sges_at]
            end = at + head.size + sges * abi_hca.SGE.size
            if sges > sges_max:
                raise BadArgument(f"a request of this queue has at most {sges_max} SGEs")
            if end > len(body):
                raise BadArgument("a request reaches beyond the call")
            post(bytes(body[at:end]))
        except FsError as e:
            return abi_hca.COUNT.pack(done, e.errno)
        at = end
    return abi_hca.COUNT.pack(count, 0)
