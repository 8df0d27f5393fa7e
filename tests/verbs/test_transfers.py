"""What moves between two regions, and what does not: operations, keys, access, bounds, and the pins below."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from daxfs.abi_hca import Access, AttrMask, State, Status, WcFlag, WcOp, WrOp
from daxfs.core import breaking, fileops, holding, poison
from daxfs.core.fileops import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from daxfs.daemon import queues
from tests.core.image import NOW
from tests.verbs.adapter import ALL, BLOCK, REMOTE, Adapter, Side

READ, WRITE, SEND = WrOp.RDMA_READ, WrOp.RDMA_WRITE, WrOp.SEND
SWAP, ADD = WrOp.ATOMIC_CMP_AND_SWP, WrOp.ATOMIC_FETCH_AND_ADD


def truncate(side: Side, size: int = 0) -> None:
    fileops.truncate(side.adapter.volume, NOW, side.inode, size)


def reuse(adapter: Adapter) -> bytes:
    """Fill every free block of the volume with a secret."""
    with_secret = adapter.file(0)
    secret = b"secret! " * (BLOCK // 8)
    at = 0
    while adapter.volume.alloc.available:
        fileops.write(adapter.volume, NOW, with_secret, at, secret)
        at += BLOCK
    return secret


# -- operations --


async def test_write_and_read(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.send(WRITE, [(100, 5000)], key=two.key, at=3 * BLOCK + 7)
    [done] = await one.done()
    assert (done.status, done.opcode, done.wr_id, done.number) == (Status.SUCCESS, WcOp.RDMA_WRITE, 1, one.number)
    expected = bytearray(b"".join(bytes([97 + n]) * BLOCK for n in range(8)))
    expected[3 * BLOCK + 7 : 3 * BLOCK + 5007] = one.bytes()[100:5100]
    assert two.bytes() == bytes(expected)
    one.send(READ, [(0, 3), (BLOCK, 2)], key=two.key, at=7 * BLOCK)
    [done] = await one.done()
    assert (done.opcode, done.length) == (WcOp.RDMA_READ, 5)
    assert one.bytes()[:4] == b"hhhA"
    assert one.bytes()[BLOCK : BLOCK + 3] == b"hhB"
    assert two.poll() == []


async def test_send_scatters_and_carries_immediate_data(adapter: Adapter) -> None:
    one, two = adapter.connected()
    two.receive((0, 10), (BLOCK, 20), wr_id=77)
    one.send(WrOp.SEND_WITH_IMM, [(BLOCK, 8), (2 * BLOCK, 8)], imm=0xCAFE)
    [got] = await two.done()
    assert (got.wr_id, got.opcode, got.length, got.imm, got.source) == (77, WcOp.RECV, 16, 0xCAFE, one.number)
    assert got.flags & WcFlag.WITH_IMM
    assert (await one.status()) is Status.SUCCESS
    assert two.bytes()[:11] == b"BBBBBBBBCCa"
    assert two.bytes()[BLOCK:][:7] == b"CCCCCCb"


async def test_write_with_immediate_data_takes_a_receive(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.send(WrOp.RDMA_WRITE_WITH_IMM, [(0, 4)], key=two.key, at=8, imm=9)
    two.receive(wr_id=5)
    [got] = await two.done()
    assert (got.wr_id, got.opcode, got.length, got.imm) == (5, WcOp.RECV_RDMA_WITH_IMM, 4, 9)
    assert two.bytes()[:13] == b"aaaaaaaaAAAAa"


async def test_atomics(adapter: Adapter) -> None:
    one, two = adapter.connected()
    word = int.from_bytes(b"a" * 8, "little")
    one.send(ADD, [(0, 8)], key=two.key, at=16, compare=2**64 - 1)
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[:9] == b"aaaaaaaaA"
    assert int.from_bytes(two.bytes()[16:24], "little") == word - 1
    one.send(SWAP, [(0, 8)], key=two.key, at=16, compare=word, swap=1)
    [done] = await one.done()
    assert (done.opcode, done.length) == (WcOp.COMP_SWAP, 8)
    assert int.from_bytes(two.bytes()[16:24], "little") == word - 1
    one.send(SWAP, [(0, 8)], key=two.key, at=16, compare=word - 1, swap=1)
    assert await one.status() is Status.SUCCESS
    assert int.from_bytes(two.bytes()[16:24], "little") == 1
    assert int.from_bytes(one.bytes()[:8], "little") == word - 1


@pytest.mark.parametrize(("at", "n", "status"), [(4, 8, Status.REM_INV_REQ_ERR), (8, 4, Status.LOC_LEN_ERR)])
async def test_atomics_of_a_wrong_shape(adapter: Adapter, at: int, n: int, status: Status) -> None:
    one, two = adapter.connected()
    one.send(ADD, [(0, n)], key=two.key, at=at, compare=1)
    assert await one.status() is status
    assert two.bytes()[:16] == b"a" * 16


async def test_a_pair_can_talk_to_itself(adapter: Adapter) -> None:
    one = adapter.side(adapter.file(8, 65))
    one.connect(one)
    one.receive((0, 100))
    one.send(SEND, [(BLOCK, 3)])
    assert {done.opcode for done in await one.done(2)} == {WcOp.SEND, WcOp.RECV}
    assert one.bytes()[:4] == b"BBBA"


async def test_fragmented_files_and_odd_ranges(adapter: Adapter) -> None:
    """Blocks of two files alternate on the image, written backwards; every transfer crosses many runs."""
    first, second = adapter.file(0), adapter.file(0)
    for n in reversed(range(100)):
        fileops.write(adapter.volume, NOW, first, n * BLOCK, bytes([n]) * BLOCK)
        fileops.write(adapter.volume, NOW, second, n * BLOCK, bytes([200]) * BLOCK)
    one, two = adapter.side(first), adapter.side(second)
    one.connect(two)
    two.connect(one)
    assert len(adapter.volume.pins.of_owner(one.file.fh)[0].runs) == 100
    one.send(WRITE, [(123, 200_000), (300_001, 50_000)], key=two.key, at=77)
    assert await one.status() is Status.SUCCESS
    expected = bytearray(bytes([200]) * 100 * BLOCK)
    expected[77 : 77 + 250_000] = one.bytes()[123:200_123] + one.bytes()[300_001:350_001]
    assert two.bytes() == expected


async def test_many_long_messages_give_the_mount_its_turn(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs are at work, others wait for one piece or two."""
    monkeypatch.setattr(queues, "TURN_S", 0.0)
    copy, moved = adapter.volume.pmem.copy, 0

    def count(source: int, target: int, n: int) -> None:
        nonlocal moved
        moved += n
        copy(source, target, n)

    monkeypatch.setattr(adapter.volume.pmem, "copy", count)
    sides = [adapter.side(adapter.file(512)) for _ in range(3)]
    for side in sides:
        side.connect(side)
        for _ in range(8):
            side.send(WRITE, [(0, 512 * BLOCK)], key=side.key, at=0)
    longest = done = 0
    while done < 24:
        before = moved
        await trio.lowlevel.checkpoint()
        longest = max(longest, moved - before)
        done += sum(len(side.poll()) for side in sides)
    assert moved == 24 * 512 * BLOCK
    assert longest <= 2 << 20


async def test_requests_are_done_in_order(adapter: Adapter) -> None:
    one, two = adapter.connected()
    for n in range(16):
        one.send(WRITE, [(n % 8 * BLOCK, 4)], key=two.key, at=0, wr_id=n)
    assert [done.wr_id for done in await one.done(16)] == list(range(16))
    assert two.bytes()[:5] == b"HHHHa"


async def test_only_signaled_requests_complete_visibly(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.send(WRITE, [(0, 4)], key=two.key, wr_id=1, flags=0)
    one.send(WRITE, [(0, 4)], key=two.key, wr_id=2)
    one.send(WRITE, [(0, 4)], key=0, wr_id=3, flags=0)  # fails, and that shows
    assert [(done.wr_id, done.status) for done in await one.done(2)] == [(2, Status.SUCCESS), (3, Status.REM_ACCESS_ERR)]


# -- keys, access, bounds --


@pytest.mark.parametrize(
    ("op", "need"),
    [(WRITE, Access.REMOTE_WRITE), (READ, Access.REMOTE_READ), (ADD, Access.REMOTE_ATOMIC), (SWAP, Access.REMOTE_ATOMIC)],
)
async def test_remote_access_is_what_was_granted(adapter: Adapter, op: WrOp, need: Access) -> None:
    one, two = adapter.side(adapter.file(8, 65)), adapter.side(adapter.file(8, 97), access=ALL & ~need)
    one.connect(two)
    two.connect(one)
    one.send(op, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert (one.state, two.state) == (State.ERR, State.ERR)
    assert (one.bytes()[:8], two.bytes()[:8]) == (b"A" * 8, b"a" * 8)


@pytest.mark.parametrize("op", [WRITE, READ, ADD])
async def test_the_pair_has_a_say_too(adapter: Adapter, op: WrOp) -> None:
    one, two = adapter.side(adapter.file(8, 65)), adapter.side(adapter.file(8, 97))
    one.connect(two)
    two.connect(one, access=0)
    one.send(op, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_INV_REQ_ERR
    assert two.bytes()[:8] == b"a" * 8


@pytest.mark.parametrize(
    ("at", "n"),
    [(8 * BLOCK, 1), (8 * BLOCK - 1, 2), (2**64 - 1, 1), (2**64 - 1, 100), (2**63, 1), (0, 8 * BLOCK + 1)],
)
async def test_remote_bounds(adapter: Adapter, at: int, n: int) -> None:
    one, two = adapter.connected()
    one.send(WRITE, [(0, min(n, 8 * BLOCK)), (0, max(0, n - 8 * BLOCK))], key=two.key, at=at)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert two.bytes()[-1:] == b"h"


async def test_local_keys_and_bounds(adapter: Adapter) -> None:
    for sges, lkey in (([(8 * BLOCK, 1)], None), ([(0, 2**32 - 1)], None), ([(0, 1)], 0), ([(0, 1)], 12345)):
        one, two = adapter.connected()
        one.send(WRITE, sges, key=two.key, at=0, lkey=lkey)
        assert await one.status() in (Status.LOC_PROT_ERR, Status.LOC_LEN_ERR)
        assert (one.state, two.state) == (State.ERR, State.RTS)


async def test_a_region_for_reading_takes_nothing_in(adapter: Adapter) -> None:
    one, two = adapter.side(adapter.file(8, 65), access=0), adapter.side(adapter.file(8, 97))
    one.connect(two)
    two.connect(one)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    one.send(READ, [(0, 4)], key=two.key, at=0)
    assert await one.status() is Status.LOC_PROT_ERR
    assert one.bytes()[:4] == b"AAAA"


async def test_keys_work_in_their_domain_only(adapter: Adapter) -> None:
    one, two = adapter.connected()
    third = adapter.side(adapter.file(8, 33))
    one.send(READ, [(0, 8)], key=third.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR
    one, two = adapter.connected()
    one.send(WRITE, [(0, 8)], key=two.key, at=0, lkey=third.key)
    assert await one.status() is Status.LOC_PROT_ERR
    assert one.bytes()[:8] + two.bytes()[:8] == b"A" * 8 + b"a" * 8


async def test_a_key_ends_with_its_region(adapter: Adapter) -> None:
    one, two = adapter.connected()
    adapter.call(two.context, 5, two.mr.to_bytes(8, "little"))
    one.send(WRITE, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR


async def test_receives_that_do_not_fit(adapter: Adapter) -> None:
    one, two = adapter.connected()
    two.receive((0, 3), wr_id=6)
    one.send(SEND, [(0, 4)])
    assert await one.status() is Status.REM_INV_REQ_ERR
    [got] = await two.done()
    assert (got.wr_id, got.status) == (6, Status.LOC_LEN_ERR)
    one, two = adapter.connected()
    two.receive((0, 4), lkey=99)
    one.send(SEND, [(0, 4)])
    assert await one.status() is Status.REM_OP_ERR
    assert await two.status() is Status.LOC_PROT_ERR
    assert (one.state, two.state) == (State.ERR, State.ERR)


async def test_an_error_flushes_what_is_behind_it(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.receive((0, 4), wr_id=50)
    one.send(WRITE, [(0, 4)], key=1, at=0, wr_id=1)
    one.send(WRITE, [(0, 4)], key=two.key, at=0, wr_id=2, flags=0)
    found = [(done.wr_id, done.status) for done in await one.done(3)]
    assert found == [(1, Status.REM_ACCESS_ERR), (2, Status.WR_FLUSH_ERR), (50, Status.WR_FLUSH_ERR)]
    one.send(SEND, [(0, 4)], wr_id=3)
    assert [(done.wr_id, done.status) for done in one.poll()] == [(3, Status.WR_FLUSH_ERR)]
    assert two.bytes()[:4] == b"aaaa"
    one.modify(AttrMask.STATE, state=State.RESET)
    two.modify(AttrMask.STATE, state=State.RESET)
    one.connect(two)
    two.connect(one)
    one.send(WRITE, [(0, 4)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS


# -- pins --


async def test_a_truncated_file_keeps_its_region(adapter: Adapter) -> None:
    """Policy `busy`: the device goes on in the blocks that it has, which nobody else gets."""
    one, two = adapter.connected()
    two_pinned = adapter.volume.pins.of_owner(two.file.fh)[0].runs
    one.delay(1000)
    one.send(WRITE, [(0, BLOCK)], key=two.key, at=0)
    truncate(two)
    assert adapter.volume.busy == 8
    secret = reuse(adapter)
    assert await one.status() is Status.SUCCESS
    assert adapter.volume.pmem.load(two_pinned[0][0] * BLOCK, 4) == b"AAAA"
    one.send(READ, [(0, 8 * BLOCK)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    assert secret[:8] not in one.bytes()
    adapter.volume.check()


async def test_a_region_of_a_hole_punched_file(adapter: Adapter) -> None:
    one, two = adapter.connected()
    mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
    fileops.fallocate(adapter.volume, NOW, two.inode, mode, BLOCK, 2 * BLOCK)
    fileops.write(adapter.volume, NOW, two.inode, BLOCK, b"new" * 100)
    one.send(READ, [(0, 4 * BLOCK)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[: 4 * BLOCK : BLOCK] == b"abcd"
    assert two.bytes()[BLOCK:][:3] == b"new"


@pytest.mark.parametrize("op", [READ, WRITE])
async def test_a_revoked_pin_lets_nothing_through(adapter: Adapter, op: WrOp) -> None:
    """Neither the other side nor its own."""
    adapter.volume.settings.policy = "revoke"
    for revoked, status in ((1, Status.REM_ACCESS_ERR), (0, Status.LOC_PROT_ERR)):
        one, two = adapter.connected()
        one.delay(1000)
        one.send(op, [(0, BLOCK)], key=two.key, at=0)
        truncate((one, two)[revoked])
        assert await one.status() is status
        assert (one, two)[1 - revoked].bytes()[:BLOCK] == (b"a" if revoked == 0 else b"A") * BLOCK


async def test_a_revoke_in_the_middle_of_a_message(adapter: Adapter) -> None:
    """What has moved has moved; the rest does not."""
    volume = adapter.volume
    one, two = adapter.side(adapter.file(512, 0)), adapter.side(adapter.file(512, 0))
    one.connect(two)
    two.connect(one)
    moved: list[int] = []
    copy = volume.pmem.copy

    def watch(source: int, target: int, n: int) -> None:
        copy(source, target, n)
        moved.append(n)
        if sum(moved) == 1 << 20:
            breaking.revoke(volume, volume.pins.of_owner(two.file.fh))

    volume.pmem.copy = watch  # type: ignore[method-assign]
    one.send(WRITE, [(0, 2 << 20)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert sum(moved) == 1 << 20


async def test_a_reset_in_the_middle_of_a_message(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is gone, even if there is another one at once."""
    one, two = adapter.side(adapter.file(512, 0)), adapter.side(adapter.file(512, 0))
    one.connect(two)
    two.connect(one)
    copy, moved = adapter.volume.pmem.copy, 0

    def watch(source: int, target: int, n: int) -> None:
        nonlocal moved
        copy(source, target, n)
        moved += n
        if moved == 1 << 20:
            two.modify(AttrMask.STATE, state=State.RESET)
            two.connect(one)

    monkeypatch.setattr(adapter.volume.pmem, "copy", watch)
    one.send(WRITE, [(0, 2 << 20)], key=two.key, at=0)
    assert await one.status() is Status.RETRY_EXC_ERR
    assert moved == 1 << 20


async def test_a_pin_that_is_given_back_ends_the_region(adapter: Adapter) -> None:
    one, two = adapter.connected()
    [pin] = adapter.volume.pins.of_owner(two.file.fh)
    holding.unpin(adapter.volume, NOW, two.file.fh, pin.id)
    truncate(two)
    adapter.free_unpinned()
    secret = reuse(adapter)
    one.send(READ, [(0, BLOCK)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert secret[:8] not in one.bytes()


async def test_closing_the_file_ends_the_region(adapter: Adapter) -> None:
    one, two = adapter.connected()
    adapter.close(two.file)
    assert adapter.volume.pinned == 8
    other = adapter.open(adapter.file(8, 1))  # may get the same handle one day; the region is dead
    other.fh, one.send(READ, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR


async def test_the_device_dirties_the_file(adapter: Adapter) -> None:
    one, two = adapter.connected()
    one.send(WRITE, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    two.send(WRITE, [(0, 8)], key=one.key, at=0)
    assert await two.status() is Status.SUCCESS
    assert one.inode.mtime == two.inode.mtime == NOW
    adapter.call(two.context, 5, two.mr.to_bytes(8, "little"))
    adapter.close(one.file)
    assert one.inode.mtime > NOW
    assert two.inode.mtime > NOW
    assert adapter.service.dirty == [two.inode, one.inode]
    one, two = adapter.connected()
    one.send(WRITE, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    adapter.close(one.context)
    adapter.close(two.context)
    assert one.inode.mtime == NOW
    assert two.inode.mtime > NOW


async def test_poison_is_an_error_and_only_there(adapter: Adapter) -> None:
    one, two = adapter.connected()
    block = adapter.volume.pins.of_owner(two.file.fh)[0].runs[0][0] + 3
    poison.inject(adapter.volume, block, 1)
    one.send(READ, [(0, 3 * BLOCK)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    one.send(READ, [(0, 2)], key=two.key, at=3 * BLOCK - 1)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert one.bytes()[:2] == b"aa"


# -- on demand --


def on_demand(adapter: Adapter, access: int = ALL) -> tuple[Side, Side]:
    """The second side's region is on demand."""
    one, two = adapter.side(adapter.file(8, 65)), adapter.side(adapter.file(8, 97), access=access | Access.ON_DEMAND)
    one.connect(two)
    two.connect(one)
    return one, two


async def test_on_demand_nothing_is_pinned(adapter: Adapter) -> None:
    one, two = on_demand(adapter)
    assert adapter.volume.pinned == 8  # the other side's
    one.send(READ, [(0, 8 * BLOCK)], key=two.key, at=0)
    assert await one.status() is Status.SUCCESS
    assert one.bytes() == two.bytes()


@pytest.mark.parametrize("policy", ["busy", "wait", "fail", "lease", "revoke"])
async def test_on_demand_lets_go_at_once_and_fails_behind_the_end(adapter: Adapter, policy: str) -> None:
    adapter.volume.settings.policy = policy
    one, two = on_demand(adapter)
    free = adapter.volume.free
    one.delay(1000)
    one.send(READ, [(0, BLOCK)], key=two.key, at=0)
    truncate(two)  # would raise if it had to wait
    assert adapter.volume.free == free + 8
    secret = reuse(adapter)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert secret[:8] not in one.bytes()


async def test_on_demand_faults_in_what_the_file_has_then(adapter: Adapter) -> None:
    one, two = on_demand(adapter)
    truncate(two)
    fileops.write(adapter.volume, NOW, two.inode, 0, b"fresh" * 1000)
    one.send(READ, [(0, 5000)], key=two.key, at=0)  # half of the region is there again
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[:5000] == b"fresh" * 1000
    one.send(WRITE, [(BLOCK * 7, 4)], key=two.key, at=4096)
    assert await one.status() is Status.SUCCESS
    assert two.bytes()[4096:4101] == b"HHHHf"
    fileops.truncate(adapter.volume, NOW, two.inode, 8 * BLOCK)
    one.send(READ, [(0, BLOCK)], key=two.key, at=7 * BLOCK)  # all is, a hole at first
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[:BLOCK] == bytes(BLOCK)
    assert [pin.on_demand for pin in adapter.volume.pins.of_owner(two.file.fh)] == [True]


async def test_on_demand_for_reading_does_not_fill_holes(adapter: Adapter) -> None:
    one, two = on_demand(adapter, access=Access.REMOTE_READ)
    truncate(two)
    fileops.truncate(adapter.volume, NOW, two.inode, 8 * BLOCK)
    one.send(READ, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR
    assert two.inode.blocks == 0


async def test_on_demand_waits_behind_a_layout_change(adapter: Adapter, autojump_clock: MockClock) -> None:
    """Somebody waits for the range: the transfer does, too, and then sees what there is."""
    one, two = on_demand(adapter)
    volume = adapter.volume
    fileops.fallocate(volume, NOW, two.inode, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 8 * BLOCK)
    volume.breaks[two.inode.ino] = [breaking.Break(0, 8)]
    one.send(READ, [(0, 8)], key=two.key, at=BLOCK)
    await trio.sleep(0.2)
    assert one.poll() == []
    del volume.breaks[two.inode.ino]
    assert await one.status() is Status.SUCCESS
    assert one.bytes()[:8] == bytes(8)


async def test_a_holder_that_is_fenced_is_refused(adapter: Adapter) -> None:
    one, two = on_demand(adapter)
    [pin] = adapter.volume.pins.of_owner(two.file.fh)
    adapter.volume.pins.fence(pin)
    one.send(READ, [(0, 8)], key=two.key, at=0)
    assert await one.status() is Status.REM_ACCESS_ERR


def test_all_access_bits_are_known() -> None:
    assert REMOTE | Access.LOCAL_WRITE == ALL
