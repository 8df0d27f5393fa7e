"""Transfers, truncates, punches and a greedy neighbour in random order: no byte of anybody else's file moves, or is moved.

Devices work on three files whose bytes are all below 128; the neighbour's are all above. He takes free space as soon as
there is any. Under `unsafe` the same run must find that somebody met his bytes: so the oracle can see.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from trio.testing import MockClock

from daxfs import abi_hca
from daxfs.abi_hca import Access, AttrMask, Op, State, Status, WrOp
from daxfs.core import fileops
from daxfs.core.fileops import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from daxfs.core.waiting import LayoutBusy
from daxfs.errors import FsError, NoSpace
from tests.core.image import NOW
from tests.verbs.adapter import ALL, BLOCK, Adapter, Side

BLOCKS = 16
SIZE = BLOCKS * BLOCK
STEPS = 600


class Corruption(Exception):
    pass


class Run:
    def __init__(self, adapter: Adapter, seed: int) -> None:
        self.adapter = adapter
        self.volume = adapter.volume
        self.chance = random.Random(seed)
        self.sides = [
            Side(adapter, adapter.file(BLOCKS, 16 * n), access=access, entries=256)
            for n, access in enumerate((ALL, ALL | Access.ON_DEMAND, ALL))
        ]
        self.neighbour = adapter.file(0)
        self.expected = b""
        self.outcomes: dict[Status, int] = dict.fromkeys(Status, 0)
        for side in self.sides:
            self.join(side)

    def join(self, side: Side) -> None:
        """Each side talks to itself and, by keys of its own domain, between two regions of its file."""
        side.modify(AttrMask.STATE, state=State.RESET)
        side.connect(side, delay_us=self.chance.choice([0, 0, 1000]))

    # -- steps --

    def transfer(self, side: Side) -> None:
        n = self.chance.randrange(1, 3 * BLOCK)
        ours, theirs = self.chance.randrange(SIZE - n), self.chance.randrange(SIZE - n)
        op = self.chance.choice([WrOp.RDMA_READ, WrOp.RDMA_WRITE])
        side.send(op, [(ours, n)], key=side.key, at=theirs)

    def cut(self, side: Side) -> None:
        with contextlib.suppress(FsError):
            fileops.truncate(self.volume, NOW, side.inode, self.chance.randrange(SIZE))

    def punch(self, side: Side) -> None:
        first = self.chance.randrange(SIZE - BLOCK)
        with contextlib.suppress(FsError):
            mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
            fileops.fallocate(self.volume, NOW, side.inode, mode, first, self.chance.randrange(BLOCK, SIZE - first + 1))

    def fill(self, side: Side) -> None:
        data = bytes([self.chance.randrange(128)]) * self.chance.randrange(1, SIZE)
        with contextlib.suppress(NoSpace):
            fileops.write(self.volume, NOW, side.inode, 0, data)

    def renew(self, side: Side) -> None:
        """Register again, on what the file is now."""
        self.adapter.call(side.context, Op.DEREG_MR, abi_hca.HANDLE.pack(side.mr, 0))
        with contextlib.suppress(NoSpace):
            fileops.write(self.volume, NOW, side.inode, 0, bytes(SIZE))
        fileops.truncate(self.volume, NOW, side.inode, SIZE)
        access = ALL | (Access.ON_DEMAND if side is self.sides[1] else 0)
        try:
            side.mr, side.key = side.register(side.file, access)
        except NoSpace:
            self.shrink(side)
            side.mr, side.key = side.register(side.file, access)

    def grow(self, side: Side) -> None:
        """The neighbour takes what is free."""
        byte = bytes([self.chance.randrange(128, 256)])
        self.adapter.free_unpinned()
        with contextlib.suppress(NoSpace):
            while len(self.expected) < 64 << 20:
                n = fileops.write(self.volume, NOW, self.neighbour, len(self.expected), byte * (BLOCK * 64))
                self.expected += byte * n

    def shrink(self, side: Side) -> None:
        fileops.truncate(self.volume, NOW, self.neighbour, len(self.expected) // 2)
        self.expected = self.expected[: len(self.expected) // 2]

    async def look(self) -> None:
        await trio.sleep(0.01)
        for side in self.sides:
            for done in side.poll():
                self.outcomes[done.status] += 1
            if max(side.bytes(), default=0) >= 128:
                raise Corruption("a file has bytes of its neighbour")
            if side.state is State.ERR:
                if self.chance.random() < 0.5:
                    self.renew(side)
                self.join(side)
        if self.adapter.read(self.neighbour) != self.expected:
            raise Corruption("the neighbour's file has changed")
        self.volume.check()

    async def go(self, steps: int) -> None:
        changes = [self.cut, self.punch, self.fill, self.fill, self.renew, self.grow, self.grow, self.shrink]
        verbs = [self.transfer] * 12 + changes
        for step in range(steps):
            with contextlib.suppress(LayoutBusy):
                self.chance.choice(verbs)(self.chance.choice(self.sides))
            if step % 12 == 11:
                await self.look()


@pytest.mark.parametrize("policy", ["busy", "wait", "fail", "lease", "revoke"])
async def test_nobody_meets_his_neighbour(adapter: Adapter, autojump_clock: MockClock, policy: str) -> None:
    adapter.volume.settings.policy = policy
    run = Run(adapter, seed=1)
    await run.go(STEPS)
    assert run.outcomes[Status.SUCCESS] > 100
    if policy == "revoke":
        assert run.outcomes[Status.LOC_PROT_ERR] > 3


async def test_unsafe_corrupts(adapter: Adapter, autojump_clock: MockClock) -> None:
    adapter.volume.settings.policy = "unsafe"
    with pytest.raises(Corruption):
        await Run(adapter, seed=1).go(STEPS)
    adapter.volume.settings.policy = "busy"
    adapter.close = lambda file: None  # type: ignore[method-assign] - what is broken cannot be checked
    adapter.finish = lambda: None  # type: ignore[method-assign]
