"""Calls that wait: what wakes them, what does not, and how long each wait lasts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from daxfs import abi
from daxfs.core import attributes, fileops, holding, namespace
from daxfs.core.inode import Inode
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder, Pin
from daxfs.core.policy import POLICY_XATTR, Settings
from daxfs.core.volume import Volume
from daxfs.core.waiting import EVERYTHING, SPACE, Awaited, LayoutBusy
from daxfs.daemon.waiting import LIMITS, Waiting
from daxfs.errors import NoSpace
from tests.core.image import NOW, fresh_volume

B = 4096
_numbers = itertools.count(1)


class Request:
    """A call of somebody: `code` once it was answered, 0 for success."""

    def __init__(self) -> None:
        self.unique = next(_numbers)
        self.code: int | None = None
        self.interrupted = False
        self.on_interrupt: Callable[[], object] | None = None

    @property
    def answered(self) -> bool:
        return self.code is not None

    def error(self, number: int) -> None:
        assert not self.answered
        self.code = number


class Bench:
    """Waiters of a volume that nobody has mounted, on a file with a pin."""

    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self.volume = volume
        self.waiting = Waiting(volume, nursery.start_soon)
        volume.on_moved = self.waiting.moved
        volume.settings.policy = "wait"
        self.file, self.other = self.new(b"f"), self.new(b"g")
        self.looks = 0

    def new(self, name: bytes) -> Inode:
        inode = namespace.create(self.volume, NOW, self.volume.root, name, 0o644, Caller(0, 0))
        fileops.write(self.volume, NOW, inode, 0, bytes(B))
        inode.opens += 1
        return inode

    def pin(self, inode: Inode, owner: int = 1) -> Pin:
        return holding.pin(self.volume, NOW, inode, 0, B, abi.FOLL_PIN, owner, Holder(1, "me", 1), writable=True)

    async def waits(self, handler: Callable[[Any], None]) -> Request:
        request = Request()

        def looking(_: Any) -> None:
            self.looks += 1
            handler(request)
            request.error(0)

        self.waiting.wait(request, looking)  # type: ignore[arg-type]
        await wait_all_tasks_blocked()
        return request

    async def truncate(self) -> Request:
        return await self.waits(lambda _: fileops.truncate(self.volume, NOW, self.file, 0))

    async def looked(self) -> int:
        """How often handlers have run since this was asked last."""
        await wait_all_tasks_blocked()
        looks, self.looks = self.looks, 0
        return looks


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery) -> Any:
    with fresh_volume(tmp_path) as volume:
        yield Bench(volume, nursery)


def test_each_kind_of_wait_has_its_limit() -> None:
    assert set(LIMITS) == set(Awaited)
    settings = Settings(wait_s=1.0, lease_break_s=2.0, invalidate_s=3.0, enospc_wait_s=4.0)
    chosen = {kind: limit(settings) for kind, limit in LIMITS.items()}
    assert (chosen[Awaited.PINS], chosen[Awaited.LEASES]) == (1.0, 2.0)
    assert (chosen[Awaited.ACKNOWLEDGEMENT], chosen[Awaited.SPACE]) == (3.0, 4.0)


async def test_a_waiter_looks_when_the_pin_in_its_way_has_gone(bench: Bench) -> None:
    one, other = bench.pin(bench.file), bench.pin(bench.other, owner=2)
    request = await bench.truncate()
    assert await bench.looked() == 1
    holding.unpin(bench.volume, NOW, 2, other.id)
    bench.volume.moved(SPACE)
    bench.volume.moved(bench.file.ino)  # something did, but not that pin
    assert (await bench.looked(), request.answered) == (0, False)
    holding.unpin(bench.volume, NOW, 1, one.id)
    assert (await bench.looked(), request.code, len(bench.waiting)) == (1, 0, 0)


@pytest.mark.parametrize("what", ["a policy", "a failure"])
async def test_a_waiter_looks_when_the_rules_have_changed(bench: Bench, what: str) -> None:
    """Though the pin is still there."""
    bench.pin(bench.file)
    request = await bench.truncate()
    if what == "a policy":
        attributes.setxattr(bench.volume, NOW, bench.file, POLICY_XATTR, b"fail")
    else:
        bench.volume.fail("a test")
    await wait_all_tasks_blocked()
    assert request.answered
    assert request.code != 0
    holding.release_owner(bench.volume, 1)


async def test_a_failure_wakes_all_that_wait(bench: Bench) -> None:
    bench.pin(bench.file)
    requests = [await bench.truncate(), await bench.waits(_full)]
    await bench.looked()
    bench.volume.moved(EVERYTHING)
    bench.volume.rules_changed(EVERYTHING)
    assert await bench.looked() == 2
    assert not any(request.answered for request in requests)
    holding.release_owner(bench.volume, 1)
    bench.waiting.moved(SPACE)
    for request in requests:
        if request.on_interrupt and not request.answered:
            request.on_interrupt()


def _full(_: Any) -> None:
    raise LayoutBusy(Awaited.TWINS, 0, SPACE)


async def test_waiters_for_space_do_not_wake_each_other(bench: Bench) -> None:
    """Each look takes what there is, finds that it is not enough, and gives it back."""
    volume = bench.volume
    volume.settings.enospc_wait_s = 1000.0
    volume.settings.policy = "busy"
    bench.pin(bench.file)
    fileops.truncate(volume, NOW, bench.file, 0)  # so there is busy space
    wanted = (volume.alloc.available + 1) * B

    def handler(_: Any) -> None:
        with volume.transaction(NOW) as txn:
            txn.take(volume.alloc.available)
            txn.take(wanted // B)

    requests = [await bench.waits(handler) for _ in range(3)]
    assert await bench.looked() == 3
    fileops.truncate(volume, NOW, bench.other, 0)  # one block more
    assert await bench.looked() == 3
    holding.release_owner(volume, 1)
    while volume.free_unpinned(NOW, 64):
        pass
    await wait_all_tasks_blocked()  # nothing is busy any more, so nothing will come
    assert [request.code for request in requests] == [NoSpace.errno] * 3


async def test_a_wait_that_is_over_is_told_to_the_handler(bench: Bench, autojump_clock: MockClock) -> None:
    bench.volume.settings.wait_s = 0.01
    seen: list[frozenset[Awaited]] = []

    def handler(request: Any) -> None:
        seen.append(bench.waiting.overdue(request))
        if Awaited.PINS not in seen[-1]:
            raise LayoutBusy(Awaited.PINS, 0, bench.file.ino, 0, 1)

    request = await bench.waits(handler)
    await trio.sleep(60)
    assert request.code == 0
    assert seen == [frozenset(), frozenset({Awaited.PINS})]


async def test_a_request_that_was_answered_is_left_alone(bench: Bench) -> None:
    """The device is removed just when its waiter was woken."""
    one = bench.pin(bench.file)
    request = await bench.truncate()
    await bench.looked()
    holding.unpin(bench.volume, NOW, 1, one.id)
    request.error(5)
    assert (await bench.looked(), request.code, len(bench.waiting)) == (0, 5, 0)
