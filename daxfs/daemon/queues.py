"""Queue pairs and completion queues of the simulated HCA: reliable connections, in order, with a time of flight.

A send queue is worked off by one task of the daemon while there is something in it. A request flies for the pair's delay,
then its bytes move, in pieces of PIECE_BYTES with other work between them; keys and pins are looked at again for each
piece (regions.py). So a truncate, a revoke or a close can come while requests fly, and even within one.

States of a pair: RESET -> INIT -> RTR (receives) -> RTS (sends, too); ERR from anywhere, RESET from anywhere. In ERR every
request completes with WR_FLUSH_ERR. A connection is mutual: both pairs name each other, or requests of the one end with
RETRY_EXC_ERR. As InfiniBand has it, a request that fails turns the requester's pair to ERR, and one that the responder
refuses (a bad key, an operation that its pair does not allow) the responder's as well.

However many pairs are at work, one moves bytes at a time and for TURN_S at most, then the mount has its turn (`_turn`).
All queues are bounded by what they were made with. A completion queue that overruns turns the pairs that need it to ERR.
Not here: handles and calls (hca.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from daxfs.abi_hca import RECV_WR, SEND_WR, SGE, WC, Access, SendFlag, State, Status, WcFlag, WcOp, WrOp
from daxfs.core.waiting import LayoutBusy
from daxfs.daemon.regions import Piece, Refused, Table
from daxfs.daemon.service import Service

PIECE_BYTES = 1 << 20  # moved at a time
TURN_S = 0.002  # how long one pair works before it is another's turn
MESSAGE_MAX = 1 << 30  # bytes
QP_NUMBERS = 1 << 24
# Plain numbers, as flags of an enum are slow to combine.
LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC = (
    int(flag) for flag in (Access.LOCAL_WRITE, Access.REMOTE_WRITE, Access.REMOTE_READ, Access.REMOTE_ATOMIC)
)
_FAULT_AGAIN_S = (0.001, 0.05)  # how soon a fault that met a layout change is tried again: at first, at last
_RNR_MS = (
    655.36, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.96, 1.28, 1.92,
    2.56, 3.84, 5.12, 7.68, 10.24, 15.36, 20.48, 30.72, 40.96, 61.44, 81.92, 122.88, 163.84, 245.76, 327.68, 491.52,
)  # fmt: skip
_RNR_FOR_EVER = 7
_NEXT = {State.RESET: (State.INIT,), State.INIT: (State.INIT, State.RTR), State.RTR: (State.RTS,), State.RTS: (State.RTS,)}
_WC_OP = {
    WrOp.RDMA_WRITE: WcOp.RDMA_WRITE,
    WrOp.RDMA_WRITE_WITH_IMM: WcOp.RDMA_WRITE,
    WrOp.SEND: WcOp.SEND,
    WrOp.SEND_WITH_IMM: WcOp.SEND,
    WrOp.RDMA_READ: WcOp.RDMA_READ,
    WrOp.ATOMIC_CMP_AND_SWP: WcOp.COMP_SWAP,
    WrOp.ATOMIC_FETCH_AND_ADD: WcOp.FETCH_ADD,
}
_REMOTE = {
    WrOp.RDMA_WRITE: REMOTE_WRITE,
    WrOp.RDMA_WRITE_WITH_IMM: REMOTE_WRITE,
    WrOp.RDMA_READ: REMOTE_READ,
    WrOp.ATOMIC_CMP_AND_SWP: REMOTE_ATOMIC,
    WrOp.ATOMIC_FETCH_AND_ADD: REMOTE_ATOMIC,
}
_ATOMIC = (WrOp.ATOMIC_CMP_AND_SWP, WrOp.ATOMIC_FETCH_AND_ADD)
_WITH_IMM = (WrOp.SEND_WITH_IMM, WrOp.RDMA_WRITE_WITH_IMM)
_RECEIVED = (WrOp.SEND, WrOp.SEND_WITH_IMM, WrOp.RDMA_WRITE_WITH_IMM)  # take a receive request of the other side
_ATOMIC_BYTES = 8


def may_go(old: State, new: State) -> bool:
    """Whether there is such a transition."""
    return new in (State.RESET, State.ERR, *_NEXT.get(old, ()))


class Failed(Exception):
    """How a request ends: for who asked; for the receive request that it met; whether the responder's pair ends with it."""

    def __init__(self, status: Status, *, received: Status | None = None, breaks_peer: bool = False) -> None:
        super().__init__(status.name)
        self.status = status
        self.received = received
        self.breaks_peer = breaks_peer or received is not None


_LOCAL = partial(Failed, Status.LOC_PROT_ERR)
_REMOTE_ACCESS = partial(Failed, Status.REM_ACCESS_ERR, breaks_peer=True)
_REMOTE_INVALID = partial(Failed, Status.REM_INV_REQ_ERR, breaks_peer=True)
_REMOTE_BUFFER = partial(Failed, Status.REM_OP_ERR, received=Status.LOC_PROT_ERR)
_REMOTE_LENGTH = partial(Failed, Status.REM_INV_REQ_ERR, received=Status.LOC_LEN_ERR)
_GONE = partial(Failed, Status.RETRY_EXC_ERR)


class Completions:
    """A completion queue: packed WC entries, oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.users = 0  # queue pairs, counted once for each of their two queues
        self.overrun = False
        self.closed = False
        self.entries: deque[bytes] = deque()
        self._arrival = trio.Event()

    def push(self, entry: bytes) -> bool:
        """False if it overruns; the entry is lost, and so are all later ones."""
        self.overrun = self.overrun or len(self.entries) >= self.capacity
        if not self.overrun:
            self.entries.append(entry)
        self.wake()
        return not self.overrun

    def take(self, most: int) -> list[bytes]:
        return [self.entries.popleft() for _ in range(min(most, len(self.entries)))]

    def close(self) -> None:
        self.closed = True
        self.wake()

    def wake(self) -> None:
        self._arrival.set()
        self._arrival = trio.Event()

    async def arrival(self) -> None:
        """Until there is an entry, or there will be none any more."""
        while not (self.entries or self.overrun or self.closed):
            await self._arrival.wait()


@dataclass(eq=False, slots=True)
class Pair:
    """A queue pair. Requests are kept as they came (SEND_WR or RECV_WR, their SGEs), those to send with when they land."""

    number: int
    domain: object
    send_cq: Completions
    recv_cq: Completions
    sends_max: int
    recvs_max: int
    send_sges: int
    recv_sges: int
    signal_all: bool
    handle: int = 0
    state: State = State.RESET
    access: int = 0
    destination: int = 0
    min_rnr_timer: int = 0
    rnr_retry: int = _RNR_FOR_EVER
    retry_cnt: int = 7
    timeout: int = 14
    delay_us: int = 0
    life: int = 0  # moves with every reset
    sends: deque[tuple[float, bytes]] = field(default_factory=deque)
    recvs: deque[bytes] = field(default_factory=deque)
    worker: trio.CancelScope | None = None
    turn_ends: float = 0.0
    kicked: trio.Event = field(default_factory=trio.Event)

    @property
    def receives(self) -> bool:
        return self.state in (State.RTR, State.RTS)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a transfer: address ranges (key, address, bytes) that follow each other, what they must allow, and how the
    request ends if they do not."""

    table: Table
    domain: object
    ranges: list[tuple[int, int, int]]
    need: int
    refusal: Callable[[], Failed]

    @property
    def length(self) -> int:
        return sum(n for _, _, n in self.ranges)

    def check(self) -> None:
        """All of it, before anything moves."""
        try:
            for key, address, n in self.ranges:
                if n:
                    self.table.check(self.domain, key, address, n, self.need)
        except Refused as e:
            raise self.refusal() from e

    def pieces(self, at: int, length: int) -> list[Piece]:
        """Where bytes [at, at + length) of it are."""
        found: list[Piece] = []
        try:
            for key, address, n in self.ranges:
                skip = min(at, n)
                take = min(n - skip, length)
                if take:
                    found += self.table.reach(self.domain, key, address + skip, take, self.need)
                at, length = at - skip, length - take
        except Refused as e:
            raise self.refusal() from e
        return found

    def wrote(self) -> None:
        for key, _, _ in self.ranges:
            self.table.wrote(self.domain, key)


@dataclass(frozen=True, slots=True)
class Link:
    """The connection that a request found, and the life of the peer then."""

    pair: Pair
    peer: Pair
    life: int


class Pairs:
    """All queue pairs of the HCA, by number."""

    def __init__(self, service: Service, table: Table) -> None:
        self._service = service
        self._table = table
        self._pairs: dict[int, Pair] = {}
        self._last = 0
        self._gate = trio.Lock()

    def __len__(self) -> int:
        return len(self._pairs)

    # -- life --

    def create(self, domain: object, send_cq: Completions, recv_cq: Completions, sends_max: int, recvs_max: int,
               send_sges: int, recv_sges: int, signal_all: bool) -> Pair:  # fmt: skip
        self._last = self._last % (QP_NUMBERS - 1) + 1
        while self._last in self._pairs:
            self._last = self._last % (QP_NUMBERS - 1) + 1
        pair = Pair(self._last, domain, send_cq, recv_cq, sends_max, recvs_max, send_sges, recv_sges, signal_all)
        self._pairs[pair.number] = pair
        send_cq.users += 1
        recv_cq.users += 1
        return pair

    def destroy(self, pair: Pair) -> None:
        self.reset(pair)
        del self._pairs[pair.number]
        pair.send_cq.users -= 1
        pair.recv_cq.users -= 1

    def move_to(self, pair: Pair, state: State) -> None:
        """A transition that there is (`may_go`)."""
        if state is State.RESET:
            self.reset(pair)
        elif state is State.ERR:
            self.end(pair)
        else:
            pair.state = state
            self._kick_peer(pair)
            self._start(pair)

    def reset(self, pair: Pair) -> None:
        """Forget all requests, without completions, and the connection."""
        self._stop(pair)
        pair.sends.clear()
        pair.recvs.clear()
        pair.state = State.RESET
        pair.life += 1
        self._kick_peer(pair)
        pair.destination = 0

    def end(self, pair: Pair) -> None:
        """To ERR: everything that is queued is flushed."""
        if pair.state is State.ERR:
            return
        pair.state = State.ERR
        self._stop(pair)
        self._flush(pair)
        self._kick_peer(pair)

    def _stop(self, pair: Pair) -> None:
        if pair.worker is not None:
            pair.worker.cancel()
            pair.worker = None

    def _flush(self, pair: Pair) -> None:
        while pair.sends:
            wr_id, opcode, *_ = SEND_WR.unpack_from(pair.sends.popleft()[1])
            self._complete(pair, pair.send_cq, wr_id, Status.WR_FLUSH_ERR, _WC_OP[WrOp(opcode)])
        while pair.recvs:
            wr_id, *_ = RECV_WR.unpack_from(pair.recvs.popleft())
            self._complete(pair, pair.recv_cq, wr_id, Status.WR_FLUSH_ERR, WcOp.RECV)

    def _kick_peer(self, pair: Pair) -> None:
        """What the other side may wait for has moved."""
        pair.kicked.set()
        peer = self._pairs.get(pair.destination)
        if peer is not None:
            peer.kicked.set()

    # -- posting --

    def post_send(self, pair: Pair, request: bytes) -> None:
        """One request, checked for form. The caller has checked state and room."""
        if pair.state is State.ERR:
            pair.sends.append((0.0, request))
            self._flush(pair)
            return
        pair.sends.append((trio.current_time() + pair.delay_us / 1e6, request))
        self._start(pair)

    def post_recv(self, pair: Pair, request: bytes) -> None:
        pair.recvs.append(request)
        if pair.state is State.ERR:
            self._flush(pair)
        elif len(pair.recvs) == 1:
            self._kick_peer(pair)

    # -- sending --

    def _start(self, pair: Pair) -> None:
        if pair.sends and pair.state is State.RTS and pair.worker is None:
            pair.worker = trio.CancelScope()
            self._service.start(self._work, pair, pair.worker)

    async def _work(self, pair: Pair, scope: trio.CancelScope) -> None:
        """Work off a send queue. Whoever stops the pair cancels the scope, and looks after the queue."""
        with scope:
            while pair.sends:
                lands, request = pair.sends[0]
                if lands > trio.current_time():
                    await trio.sleep_until(lands)
                await self._turn(pair)
                try:
                    await self._carry_out(pair, request)
                except Failed as failure:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    self._fail(pair, request, failure)
                    return
            pair.worker = None

    async def _turn(self, pair: Pair) -> None:
        """Let others go on if it is time: the rest of the daemon, and one other pair."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if time.monotonic() >= pair.turn_ends:
            async with self._gate:
                await trio.lowlevel.checkpoint()
            pair.turn_ends = time.monotonic() + TURN_S

    async def _carry_out(self, pair: Pair, request: bytes) -> None:
        wr_id, opcode, flags, imm, _, address, key, _, compare, swap = SEND_WR.unpack_from(request)
        op = WrOp(opcode)
        fetches = op is WrOp.RDMA_READ or op in _ATOMIC
        need = LOCAL_WRITE if fetches else 0
        local = End(self._table, pair.domain, _ranges(request, SEND_WR.size), need, _LOCAL)
        length = local.length
        if length > MESSAGE_MAX or (op in _ATOMIC and length != _ATOMIC_BYTES):
            raise Failed(Status.LOC_LEN_ERR)
        await self._settled(local.check)
        peer = await (self._receiver(pair) if op in _RECEIVED else self._peer(pair))
        link = Link(pair, peer, peer.life)
        remote = self._remote(link, op, key, address, length)
        await self._settled(partial(self._check, link, remote))
        if op in _ATOMIC:
            await self._settled(partial(self._atomic, link, op, local, remote, compare, swap))
        else:
            await self._move(link, *((remote, local) if fetches else (local, remote)))
        self._hold(link)
        self._done(link, op, length, wr_id, flags, imm)

    def _remote(self, link: Link, op: WrOp, key: int, address: int, length: int) -> End:
        """The responder's end: what its receive request names, or what the requester asks for and its pair allows."""
        peer = link.peer
        if op in (WrOp.SEND, WrOp.SEND_WITH_IMM):
            ranges = _ranges(peer.recvs[0], RECV_WR.size)
            if sum(n for _, _, n in ranges) < length:
                raise _REMOTE_LENGTH()
            return End(self._table, peer.domain, _cut(ranges, length), LOCAL_WRITE, _REMOTE_BUFFER)
        need = _REMOTE[op]
        if need & ~peer.access or (op in _ATOMIC and address % _ATOMIC_BYTES):
            raise _REMOTE_INVALID()
        return End(self._table, peer.domain, [(key, address, length)], need, _REMOTE_ACCESS)

    async def _move(self, link: Link, source: End, target: End) -> None:
        length = source.length
        for at in range(0, length, PIECE_BYTES):
            if at:
                await self._turn(link.pair)
            await self._settled(partial(self._piece, link, source, target, at, min(PIECE_BYTES, length - at)))

    def _piece(self, link: Link, source: End, target: End, at: int, length: int) -> None:
        self._hold(link)
        self._table.copy(source.pieces(at, length), target.pieces(at, length))
        target.wrote()

    def _check(self, link: Link, end: End) -> None:
        self._hold(link)
        end.check()

    def _atomic(self, link: Link, op: WrOp, local: End, remote: End, compare: int, swap: int) -> None:
        self._hold(link)
        [(at, _)] = remote.pieces(0, _ATOMIC_BYTES)
        back = local.pieces(0, _ATOMIC_BYTES)
        pmem = self._service.volume.pmem
        old = pmem.load_word(at)
        if op is WrOp.ATOMIC_FETCH_AND_ADD:
            pmem.store_word(at, (old + compare) & (1 << 64) - 1)
        elif old == compare:
            pmem.store_word(at, swap)
        pmem.flush(at, _ATOMIC_BYTES)
        self._table.store(back, old.to_bytes(_ATOMIC_BYTES, "little"))
        remote.wrote()
        local.wrote()

    async def _settled(self, work: Callable[[], None]) -> None:
        """Run it, again and again while a layout change keeps an on-demand region from faulting in its range."""
        pause, longest = _FAULT_AGAIN_S
        while True:
            try:
                return work()
            except LayoutBusy:
                await trio.sleep(pause)
                await trio.lowlevel.checkpoint_if_cancelled()
                pause = min(2 * pause, longest)

    # -- the other side --

    def _peer_of(self, pair: Pair) -> Pair | None:
        """The pair at the other end, if it is connected to this one and receives."""
        peer = self._pairs.get(pair.destination)
        return peer if peer is not None and peer.receives and peer.destination == pair.number else None

    def _hold(self, link: Link) -> None:
        """After anything that may have let others run: is the connection the same?"""
        if self._peer_of(link.pair) is not link.peer or link.peer.life != link.life:
            raise _GONE()

    async def _peer(self, pair: Pair) -> Pair:
        """Wait for it as long as the transport would go on trying (timeout 0: for ever)."""
        if (peer := self._peer_of(pair)) is not None:
            return peer
        seconds = (pair.retry_cnt + 1) * 4.096e-6 * (1 << pair.timeout) if pair.timeout else float("inf")
        with trio.move_on_after(seconds):
            while (peer := self._peer_of(pair)) is None:
                await _kick(pair)
            return peer
        raise _GONE()

    async def _receiver(self, pair: Pair) -> Pair:
        """The peer, with a receive request. Without one it is Receiver Not Ready, for as long as `rnr_retry` tries last."""
        peer = await self._peer(pair)
        if peer.recvs:
            return peer
        tries = float("inf") if pair.rnr_retry == _RNR_FOR_EVER else pair.rnr_retry
        with trio.move_on_after(tries * _RNR_MS[peer.min_rnr_timer] / 1000):
            while not peer.recvs:
                await _kick(pair)
                peer = await self._peer(pair)
        if not peer.recvs:
            raise Failed(Status.RNR_RETRY_EXC_ERR)
        return peer

    # -- completions --

    def _done(self, link: Link, op: WrOp, length: int, wr_id: int, flags: int, imm: int) -> None:
        pair, peer = link.pair, link.peer
        pair.sends.popleft()
        if op in _RECEIVED:
            received, *_ = RECV_WR.unpack_from(peer.recvs.popleft())
            what = WcOp.RECV_RDMA_WITH_IMM if op is WrOp.RDMA_WRITE_WITH_IMM else WcOp.RECV
            self._complete(
                peer, peer.recv_cq, received, Status.SUCCESS, what, length, imm if op in _WITH_IMM else None, pair.number
            )
        if pair.signal_all or flags & SendFlag.SIGNALED:
            self._complete(pair, pair.send_cq, wr_id, Status.SUCCESS, _WC_OP[op], length)

    def _fail(self, pair: Pair, request: bytes, failure: Failed) -> None:
        wr_id, opcode, *_ = SEND_WR.unpack_from(request)
        pair.sends.popleft()
        peer = self._peer_of(pair)
        if peer is not None and failure.received is not None:
            received, *_ = RECV_WR.unpack_from(peer.recvs.popleft())
            self._complete(peer, peer.recv_cq, received, failure.received, WcOp.RECV)
        self._complete(pair, pair.send_cq, wr_id, failure.status, _WC_OP[WrOp(opcode)])
        self.end(pair)
        if peer is not None and failure.breaks_peer:
            self.end(peer)

    def _complete(self, pair: Pair, queue: Completions, wr_id: int, status: Status, op: WcOp, length: int = 0,
                  imm: int | None = None, source: int = 0) -> None:  # fmt: skip
        flags = 0 if imm is None else WcFlag.WITH_IMM
        if not queue.push(WC.pack(wr_id, status, op, 0, length, imm or 0, pair.number, source, flags)):
            self.end(pair)


def _ranges(request: bytes, head: int) -> list[tuple[int, int, int]]:
    """(key, address, bytes) of a request's SGEs."""
    return [(key, address, n) for address, n, key in SGE.iter_unpack(request[head:])]


def _cut(ranges: list[tuple[int, int, int]], length: int) -> list[tuple[int, int, int]]:
    """The first `length` bytes."""
    out = []
    for key, address, n in ranges:
        out.append((key, address, min(n, length)))
        length -= min(n, length)
    return out


async def _kick(pair: Pair) -> None:
    pair.kicked = trio.Event()
    await pair.kicked.wait()
    await trio.lowlevel.checkpoint_if_cancelled()
