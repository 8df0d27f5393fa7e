"""Calls of the adapter: objects and their lives, queues and waiting, and whatever a hostile caller may send."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
from trio.testing import MockClock

from daxfs import abi_hca
from daxfs.abi_hca import Access, AttrMask, Op, State, Status, WrOp
from daxfs.core import fileops
from daxfs.core.waiting import LayoutBusy
from daxfs.daemon import hca as limits
from daxfs.errors import FsError
from tests.core.image import NOW
from tests.verbs.adapter import ALL, BLOCK, Adapter, Request, Side

READ, WRITE, SEND = WrOp.RDMA_READ, WrOp.RDMA_WRITE, WrOp.SEND


def refused(code: int, call: object, *arguments: object) -> None:
    assert callable(call)
    with pytest.raises(FsError) as caught:
        call(*arguments)
    assert caught.value.errno == code, caught.value.why


def handle(number: int) -> bytes:
    return abi_hca.HANDLE.pack(number, 0)


# -- connections --


async def test_states_and_transitions(adapter: Adapter) -> None:
    one, two = adapter.side(), adapter.side()
    for state in (State.RTR, State.RTS, 4, 5, 99):
        refused(errno.EINVAL, lambda state=state: one.modify(AttrMask.STATE, state=state, to=two.number))
    refused(errno.EINVAL, one.receive, (0, 4))
    refused(errno.EINVAL, one.send, SEND, [(0, 4)])
    one.modify(AttrMask.STATE, state=State.INIT)
    one.receive((0, 4))
    refused(errno.EINVAL, lambda: one.modify(AttrMask.STATE, state=State.RTR))  # to whom?
    refused(errno.EINVAL, lambda: one.modify(AttrMask.STATE, state=State.RTS))
    one.modify(AttrMask.STATE | AttrMask.DEST_QPN, state=State.RTR, to=two.number)
    refused(errno.EINVAL, lambda: one.modify(AttrMask.DEST_QPN, to=two.number))
    refused(errno.EINVAL, one.send, SEND, [(0, 4)])
    one.modify(AttrMask.STATE, state=State.RTS)
    one.modify(AttrMask.STATE, state=State.ERR)
    assert await one.status() is Status.WR_FLUSH_ERR
    one.modify(AttrMask.STATE, state=State.RESET)
    assert one.state is State.RESET


@pytest.mark.parametrize(
    "values",
    [{"access": 16}, {"rnr_timer": 32}, {"rnr_retry": 8}, {"retry_cnt": 8}, {"timeout": 32}, {"delay_us": 60_000_001}],
)
async def test_attributes_out_of_range(adapter: Adapter, values: dict[str, int]) -> None:
    one = adapter.side()
    every = (AttrMask.ACCESS_FLAGS | AttrMask.MIN_RNR_TIMER | AttrMask.RNR_RETRY | AttrMask.RETRY_CNT | AttrMask.TIMEOUT
             | AttrMask.DELAY)  # fmt: skip
    one.modify(every)
    refused(errno.EINVAL, lambda: one.modify(every, **values))
    refused(errno.EINVAL, lambda: one.modify(1 << 5))


async def test_a_connection_is_mutual(adapter: Adapter, autojump_clock: MockClock) -> None:
    """Nobody reaches a pair that has not named him."""
    one, two, three = adapter.side(), adapter.side(adapter.file(8, 97)), adapter.side()
    one.connect(two)
    two.connect(three)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    started = trio.current_time()
    assert await one.status() is Status.RETRY_EXC_ERR
    assert trio.current_time() - started == pytest.approx(8 * 4.096e-6 * 2**14, rel=0.1)
    assert two.state is State.RTS
    assert two.bytes()[:4] == b"aaaa"


async def test_the_other_side_may_come_a_little_later(adapter: Adapter, autojump_clock: MockClock) -> None:
    one, two = adapter.side(adapter.file(8, 65)), adapter.side(adapter.file(8, 97))
    one.connect(two)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    await trio.sleep(0.3)
    assert one.poll() == []
    two.connect(one)
    assert await one.status() is Status.SUCCESS


async def test_the_other_side_dies(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.delay(1000)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    adapter.close(two.context)
    assert await one.status() is Status.RETRY_EXC_ERR
    assert two.bytes()[:4] == b"aaaa"


async def test_receiver_not_ready(adapter: Adapter, autojump_clock: MockClock) -> None:
    one, two = adapter.side(), adapter.side()
    one.connect(two, rnr_retry=3)
    two.connect(one, rnr_timer=31)
    started = trio.current_time()
    one.send(SEND, [(0, 4)])
    assert await one.status() is Status.RNR_RETRY_EXC_ERR
    assert trio.current_time() - started == pytest.approx(3 * 0.49152, rel=0.1)
    assert two.state is State.RTS
    one, two = adapter.connected()
    one.send(SEND, [(0, 4)])
    await trio.sleep(10)
    two.receive((0, 4))
    assert await one.status() is Status.SUCCESS


async def test_requests_fly_together(adapter: Adapter, autojump_clock: MockClock) -> None:
    """The delay is a time of flight: it does not add up."""
    one, two = adapter.connected()
    one.delay(1_000_000)
    started = trio.current_time()
    for n in range(10):
        one.send(WRITE, [(0, 4)], key=two.key, at=0, wr_id=n)
    await trio.sleep(0.9)
    assert one.poll() == []
    assert [done.wr_id for done in await one.done(10)] == list(range(10))
    assert trio.current_time() - started == pytest.approx(1, abs=0.1)


async def test_a_reset_forgets_what_flies(adapter: Adapter, autojump_clock: MockClock) -> None:
    one, two = adapter.connected()
    one.delay(1000)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    await trio.lowlevel.checkpoint()
    one.modify(AttrMask.STATE, state=State.RESET)
    one.connect(two)
    await trio.sleep(1)
    assert one.poll() == []
    assert two.bytes()[:4] == b"aaaa"
    one.send(READ, [(0, 4)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS


# -- completion queues --


async def test_waiting_for_a_completion(adapter: Adapter, autojump_clock: MockClock) -> None:
    one, two = adapter.connected()
    one.delay(500_000)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    request = Request()
    assert adapter.call(one.context, Op.POLL_CQ, abi_hca.POLL.pack(one.cq, 1, abi_hca.INFINITE, 0), request) is None
    await trio.sleep(0.4)
    assert not request.answered
    await trio.sleep(0.2)
    assert request.answer is not None
    assert abi_hca.COUNT.unpack_from(request.answer, abi_hca.HEAD.size) == (1, 0)


async def test_a_wait_ends_with_its_time_its_caller_or_its_queue(adapter: Adapter, autojump_clock: MockClock) -> None:
    one = adapter.side()
    timed, interrupted, orphaned, early = Request(), Request(), Request(), Request()
    early.interrupted = True
    cq = one.make(Op.CREATE_CQ, abi_hca.CQ.pack(1, 0))
    for request, queue, wait_ms in (
        (timed, one.cq, 100),
        (interrupted, one.cq, 10_000),
        (orphaned, cq, abi_hca.INFINITE),
        (early, one.cq, abi_hca.INFINITE),
    ):
        assert adapter.call(one.context, Op.POLL_CQ, abi_hca.POLL.pack(queue, 1, wait_ms, 0), request) is None
    await trio.sleep(0.2)
    assert timed.answer is not None
    assert abi_hca.COUNT.unpack_from(timed.answer, abi_hca.HEAD.size) == (0, 0)
    assert early.code == errno.EINTR
    assert not interrupted.answered
    interrupted.interrupt()
    adapter.call(one.context, Op.DESTROY_CQ, handle(cq))
    await trio.sleep(0.001)
    assert interrupted.code == errno.EINTR
    assert orphaned.code == errno.ENOENT


async def test_waiters_are_limited(adapter: Adapter, autojump_clock: MockClock) -> None:
    one = adapter.side()
    body = abi_hca.POLL.pack(one.cq, 1, 10, 0)
    requests = [Request() for _ in range(limits.WAITERS_MAX)]
    for request in requests:
        assert adapter.call(one.context, Op.POLL_CQ, body, request) is None
    refused(errno.EBUSY, adapter.call, one.context, Op.POLL_CQ, body)
    await trio.sleep(1)
    assert all(request.answered for request in requests)
    assert adapter.call(one.context, Op.POLL_CQ, body, Request()) is None
    await trio.sleep(1)


async def test_an_overrun_ends_the_pair(adapter: Adapter, autojump_clock: MockClock) -> None:
    one, two = adapter.connected(entries=2)
    for _ in range(4):
        one.send(WRITE, [(0, 4)], key=two.key, at=0)
    await trio.sleep(1)
    assert one.state is State.ERR
    assert [done.status for done in one.poll()] == [Status.SUCCESS, Status.SUCCESS]
    refused(errno.EOVERFLOW, one.poll)


# -- objects --


async def test_what_is_in_use_stays(adapter: Adapter) -> None:
    one = adapter.side()
    refused(errno.EBUSY, adapter.call, one.context, Op.DEALLOC_PD, handle(one.pd))
    refused(errno.EBUSY, adapter.call, one.context, Op.DESTROY_CQ, handle(one.cq))
    adapter.call(one.context, Op.DESTROY_QP, handle(one.qp))
    adapter.call(one.context, Op.DESTROY_CQ, handle(one.cq))
    refused(errno.EBUSY, adapter.call, one.context, Op.DEALLOC_PD, handle(one.pd))
    adapter.call(one.context, Op.DEREG_MR, handle(one.mr))
    adapter.call(one.context, Op.DEALLOC_PD, handle(one.pd))
    assert adapter.volume.pinned == 0
    for op in (Op.DEALLOC_PD, Op.DEREG_MR, Op.DESTROY_CQ, Op.DESTROY_QP, Op.QUERY_QP):
        refused(errno.ENOENT, adapter.call, one.context, op, handle(one.qp))


async def test_handles_of_others_mean_nothing(adapter: Adapter) -> None:
    one, two = adapter.side(), adapter.side()
    for _ in range(5):
        two.make(Op.ALLOC_PD)
    top = two.make(Op.ALLOC_PD)
    refused(errno.ENOENT, adapter.call, one.context, Op.DEALLOC_PD, handle(top))
    refused(errno.EBADF, adapter.call, one.file, Op.ALLOC_PD)


async def test_the_last_close_of_the_context_ends_all(adapter: Adapter) -> None:
    one = adapter.side()
    assert adapter.volume.pinned == 8
    adapter.close(one.context)
    assert adapter.volume.pinned == 0
    refused(errno.EINVAL, one.register, one.file, ALL)  # the secret is worth nothing now


async def test_a_context_is_opened_once_on_a_directory(adapter: Adapter) -> None:
    one = adapter.side()
    refused(errno.EEXIST, adapter.call, one.context, Op.OPEN)
    refused(errno.ENOTDIR, adapter.call, one.file, Op.OPEN)


@pytest.mark.parametrize(
    ("access", "more", "code"),
    [
        (Access.REMOTE_WRITE, {}, errno.EINVAL),
        (Access.REMOTE_ATOMIC, {}, errno.EINVAL),
        (1 << 4, {}, errno.EINVAL),
        (1 << 31, {}, errno.EINVAL),
        (ALL | Access.ON_DEMAND, {}, errno.EINVAL),
        (ALL, {"length": 0}, errno.EINVAL),
        (ALL, {"length": 8 * BLOCK + 1}, errno.EINVAL),
        (ALL, {"start": 1}, errno.EINVAL),
        (ALL, {"start": 2**64 - 1}, errno.EINVAL),
        (ALL, {"iova": 2**64 - BLOCK}, errno.EINVAL),
        (ALL, {"iova": 1}, errno.EINVAL),
        (ALL, {"pin": 12345}, errno.ENOENT),
        (ALL, {"pin": 2**64 - 1}, errno.ENOENT),
    ],
)
async def test_registrations_that_make_no_sense(adapter: Adapter, access: int, more: dict[str, int], code: int) -> None:
    one = adapter.side()
    more.setdefault("pin", one.pin(one.file, ALL))
    refused(code, lambda: one.register(one.file, access, **more))


async def test_a_region_needs_its_own_pin_of_its_own_descriptor(adapter: Adapter) -> None:
    one, two = adapter.side(), adapter.side()
    pin = one.pin(one.file, ALL)
    refused(errno.ENOENT, lambda: two.register(two.file, ALL, pin=pin))
    one.register(one.file, ALL, pin=pin)
    refused(errno.EBUSY, lambda: one.register(one.file, ALL, pin=pin))
    short = one.pin(one.file, Access(0))
    refused(errno.EINVAL, lambda: one.register(one.file, ALL, pin=short))  # a read pin
    brief = one.pin(one.file, ALL, longterm=False)
    refused(errno.EINVAL, lambda: one.register(one.file, 0, pin=brief))


async def test_a_region_may_be_odd(adapter: Adapter) -> None:
    """Any bytes of the pin, at any address that fits."""
    one = adapter.side(adapter.file(8, 65))
    pin = one.pin(one.file, ALL, 2 * BLOCK, 3 * BLOCK)
    _, key = one.register(one.file, ALL, pin=pin, start=100, length=BLOCK, iova=(1 << 40) + 100)
    one.connect(one)
    one.send(READ, [(0, 10)], key=key, at=(1 << 40) + 100 + BLOCK - 10)
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[:11] == b"D" * 10 + b"A"
    for outside in (BLOCK - 9, -1, -(1 << 40) - 100):
        one.send(READ, [(0, 10)], key=key, at=(1 << 40) + 100 + outside)
        assert await one.status() is Status.REM_ACCESS_ERR
        one.modify(AttrMask.STATE, state=State.RESET)
        one.connect(one)


async def test_load_and_store(adapter: Adapter) -> None:
    one = adapter.side(adapter.file(8, 65))

    def load(offset: int, n: int) -> bytes | None:
        return adapter.call(one.context, Op.LOAD, abi_hca.ACCESS.pack(one.mr, n, offset))

    def store(offset: int, data: bytes, mr: int = one.mr) -> None:
        assert adapter.call(one.context, Op.STORE, abi_hca.ACCESS.pack(mr, len(data), offset) + data) == b""

    assert load(BLOCK - 2, 4) == b"AABB"
    store(BLOCK - 1, b"xy")
    assert one.bytes()[BLOCK - 2 : BLOCK + 2] == b"AxyB"
    refused(errno.EFAULT, load, 8 * BLOCK - 1, 2)
    refused(errno.EFAULT, load, 2**64 - 1, 2)
    refused(errno.EFAULT, store, 8 * BLOCK, b"x")
    refused(errno.EINVAL, load, 0, abi_hca.ROOM + 1)
    fileops.truncate(adapter.volume, NOW, one.inode, 0)
    assert load(BLOCK - 2, 4) == b"AxyB"
    reader, _ = one.register(one.file, Access(0), pin=_pin_again(one))
    refused(errno.EFAULT, store, 0, b"x", reader)


def _pin_again(side: Side) -> int:
    fileops.write(side.adapter.volume, NOW, side.inode, 0, bytes(BLOCK * 8))
    return side.pin(side.file, Access(0))


# -- limits --


@pytest.mark.parametrize(("op", "body", "most"), [
    (Op.ALLOC_PD, b"", limits.DOMAINS_MAX),
    (Op.CREATE_CQ, abi_hca.CQ.pack(1, 0), limits.QUEUES_MAX),
])  # fmt: skip
async def test_objects_are_limited(adapter: Adapter, op: Op, body: bytes, most: int) -> None:
    one = adapter.side()
    for _ in range(most - 1):
        one.make(op, body)
    refused(errno.ENOMEM, one.make, op, body)


async def test_entries_are_limited(adapter: Adapter) -> None:
    """By context, and in all."""
    sides: list[Side] = []
    with pytest.raises(FsError) as caught:
        while True:
            sides.append(adapter.side(entries=limits.COMPLETIONS_MAX))
            with pytest.raises(FsError) as own:
                while True:
                    sides[-1].make(Op.CREATE_CQ, abi_hca.CQ.pack(limits.COMPLETIONS_MAX // 2, 0))
            assert own.value.errno == errno.ENOMEM
    assert caught.value.errno == errno.ENOMEM
    assert len(sides) <= limits.ENTRIES_MAX // limits.COMPLETIONS_MAX
    adapter.close(sides[0].context)
    adapter.side(entries=limits.COMPLETIONS_MAX)


async def test_contexts_are_limited(adapter: Adapter) -> None:
    def one_more() -> None:
        file = adapter.open(adapter.volume.root, os.O_RDONLY)
        adapter.call(file, Op.OPEN)

    for _ in range(limits.CONTEXTS_MAX):
        one_more()
    refused(errno.ENOMEM, one_more)


async def test_queues_are_limited(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.delay(1000)
    for _ in range(16):
        assert one.send(WRITE, [(0, 4)], key=two.key, at=0) == (1, 0)
        assert one.receive((0, 4)) == (1, 0)
    assert one.send(WRITE, [(0, 4)], key=two.key, at=0) == (0, errno.ENOMEM)
    assert one.receive((0, 4)) == (0, errno.ENOMEM)
    await one.done(16)
    assert one.send(WRITE, [(0, 4)], key=two.key, at=0) == (1, 0)


async def test_the_first_request_that_is_refused_ends_the_list(adapter: Adapter) -> None:
    one, two = adapter.connected()
    good = abi_hca.SEND_WR.pack(1, WRITE, 2, 0, 1, 0, two.key, 0, 0, 0) + one.sges([(0, 4)])
    for bad in (
        abi_hca.SEND_WR.pack(1, 99, 2, 0, 0, 0, 0, 0, 0, 0),
        abi_hca.SEND_WR.pack(1, WRITE, 1 << 9, 0, 0, 0, 0, 0, 0, 0),
        abi_hca.SEND_WR.pack(1, WRITE, 2, 0, 5, 0, 0, 0, 0, 0) + bytes(80),
        abi_hca.SEND_WR.pack(1, WRITE, 2, 0, 2**32 - 1, 0, 0, 0, 0, 0),
        abi_hca.SEND_WR.pack(1, WRITE, 2, 0, 0, 0, 0, 7, 0, 0),
    ):
        body = abi_hca.POST.pack(one.qp, 3) + good + bad + good
        assert adapter.ask(one.context, Op.POST_SEND, abi_hca.COUNT, body) == (1, errno.EINVAL)
        assert await one.status() is Status.SUCCESS
    endless = abi_hca.POST.pack(one.qp, 2**32 - 1)
    taken, code = adapter.ask(one.context, Op.POST_RECV, abi_hca.COUNT, endless)
    assert (taken, code) == (16, errno.ENOMEM)


# -- anything at all --


async def test_any_bytes_are_answered_or_refused(adapter: Adapter) -> None:
    """Random calls, many of them close to right ones, on every kind of descriptor: an answer or an FsError, and all of it
    can be closed afterwards."""
    chance = random.Random(4)
    one, two = adapter.connected()
    small = [0, 1, 2, 3, 4, 5, 8, 64, 4096, one.key, two.key, one.number, two.number, 2**31, 2**32 - 1]
    outcomes: dict[int, int] = {}
    for _ in range(20_000):
        words = b"".join(chance.choice(small).to_bytes(4, "little") for _ in range(chance.randrange(24)))
        op = chance.choice([*Op, 0, 17, 2**32 - 1])
        if op == Op.POLL_CQ:
            words = words[:8] + bytes(4) + words[12:]  # not to wait
        file = chance.choice([one.context, two.context, one.context, one.file])
        try:
            adapter.call(file, op, words)
            outcomes[0] = outcomes.get(0, 0) + 1
        except LayoutBusy:
            raise
        except FsError as e:
            outcomes[e.errno] = outcomes.get(e.errno, 0) + 1
        if chance.random() < 0.01:
            await trio.sleep(0.01)
    assert outcomes[0] > 200
    assert outcomes[errno.EINVAL] > 1000
    assert not adapter.volume.failed
    adapter.volume.check()
