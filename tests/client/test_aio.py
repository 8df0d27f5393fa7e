"""The client library under trio: what waits does not hold up the loop."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from daxfs import client
from daxfs.client import EventType, PinError, aio
from tests.client.test_events import a_file, another_holder, punching, truncating
from tests.conftest import FORKS, Maker
from tests.mount.harness import Mounted, eventually

pytestmark = pytest.mark.mount

BLOCK = 4096


@pytest.fixture
def waiting_mount(make_mount: Maker) -> Mounted:
    return make_mount(size="64M", options="policy=wait")


async def test_events_come_as_they_happen(shared_mount: Mounted) -> None:
    path = a_file(shared_mount)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.sleep(0.005)
            ticks += 1

    with trio.fail_after(10):
        async with aio.open(path, "r+") as file, trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            regions = [await file.register(n * BLOCK, BLOCK) for n in range(3)]
            await trio.sleep(0.05)
            change = truncating(path)
            told = []
            async for event in file.events():
                assert event.type is EventType.INVALIDATE
                told.append(event.pin_id)
                regions[[region.id for region in regions].index(event.pin_id)].acknowledge()
                if len(told) == 3:
                    break
            assert await trio.to_thread.run_sync(change.wait, 5) == 0
            nursery.cancel_scope.cancel()
    assert sorted(told) == [region.id for region in regions]
    assert ticks >= 5


async def test_a_description_without_pins_does_not_spin(shared_mount: Mounted) -> None:
    """poll(2) says that such a file is always readable; waiting for its events must sleep all the same."""
    async with aio.open(a_file(shared_mount)) as file:
        before = os.times()
        with trio.move_on_after(0.3) as scope:
            await file.next_event()
        after = os.times()
    assert scope.cancelled_caught
    assert after.user + after.system - before.user - before.system < 0.15


async def test_a_pin_waits_behind_a_truncate(waiting_mount: Mounted) -> None:
    path = a_file(waiting_mount)
    with trio.fail_after(20), another_holder(path, 2 * BLOCK, BLOCK) as let_go:
        async with aio.open(path, "r+") as file:
            change = truncating(path, BLOCK)
            await trio.sleep(0.3)
            assert (await file.pin(0, BLOCK)).runs  # not in the way
            with trio.move_on_after(0.1) as scope:
                await file.pin(BLOCK, BLOCK)
            assert scope.cancelled_caught
            assert change.poll() is None
            async with trio.open_nursery() as nursery:

                async def beyond_the_end() -> None:
                    with pytest.raises(PinError, match="beyond the end") as caught:
                        await file.pin(BLOCK, BLOCK)
                    assert caught.value.errno == errno.ENXIO

                nursery.start_soon(beyond_the_end)
                await trio.sleep(0.1)
                let_go()
            assert await trio.to_thread.run_sync(change.wait, 5) == 0
            assert [pin["offset"] for pin in client.pins(path)] == [0]


async def test_a_late_pin_is_given_back(waiting_mount: Mounted) -> None:
    """The wait for a pin is given up, then the pin comes."""
    path = a_file(waiting_mount)
    with trio.fail_after(20), another_holder(path, 2 * BLOCK, BLOCK) as let_go:
        async with aio.open(path, "r+") as file:
            change = punching(path, 2 * BLOCK, BLOCK)
            await trio.sleep(0.3)
            with trio.move_on_after(0.1) as scope:
                await file.pin(0, 4 * BLOCK, write=True)
            assert scope.cancelled_caught
            let_go()
            assert await trio.to_thread.run_sync(change.wait, 5) == 0
            await trio.to_thread.run_sync(eventually, "no pin is left", lambda: client.pins(path) == [])
            assert [e.count for e in file.file.extents()] == [8]  # the write pin was there for a moment


async def test_truncate_waits_and_the_loop_goes_on(waiting_mount: Mounted) -> None:
    path = a_file(waiting_mount)
    with trio.fail_after(10):
        async with aio.open(path, "r+") as file:
            with client.open(path) as holder:
                holder.pin(0, BLOCK)
                with trio.move_on_after(0.1) as scope:
                    await file.truncate(0)
                assert scope.cancelled_caught
                assert path.stat().st_size == 8 * BLOCK
            await trio.to_thread.run_sync(eventually, "the late truncate", lambda: path.stat().st_size == 0)
            await file.punch(0, BLOCK)


async def test_errors_carry_the_path(shared_mount: Mounted) -> None:
    path = a_file(shared_mount)
    async with aio.open(path) as file:
        with pytest.raises(PinError) as caught:
            await file.pin(0, BLOCK, write=True)
        assert caught.value.filename == str(path)
        with file.lease():
            pass
    await file.aclose()
    with pytest.raises(PinError, match="the file is closed"):
        await file.pin()


def descriptors_of(path: Path) -> int:
    """How many of this process's lead to the file."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return found


@FORKS
async def test_a_child_that_is_forked_while_a_thread_waits(waiting_mount: Mounted) -> None:
    """It closes its copies, that of the waiting thread too; the parent gets its pin, and hears its events."""
    path = a_file(waiting_mount)
    registered, late = [], []
    with trio.fail_after(20), another_holder(path, 2 * BLOCK, BLOCK) as let_go:
        async with aio.open(path, "r+") as file, trio.open_nursery() as nursery:
            change = truncating(path, BLOCK)
            await trio.to_thread.run_sync(eventually, "the truncate waits", lambda: client.status(path)["waiting"])

            async def take() -> None:
                with pytest.raises(PinError, match="beyond the end"):
                    await file.pin(BLOCK, BLOCK)
                late.append(True)

            nursery.start_soon(take)
            await trio.to_thread.run_sync(eventually, "both wait", lambda: client.status(path)["waiting"] == 2)
            registered.append(await file.register(0, BLOCK))
            pid = os.fork()
            if not pid:
                try:
                    file.aclose().send(None)
                    os._exit(10 + descriptors_of(path))
                finally:
                    os._exit(1)
            _, status = await trio.to_thread.run_sync(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status) == 10
            let_go()
            assert await trio.to_thread.run_sync(change.wait, 5) == 0
            nursery.start_soon(trio.to_thread.run_sync, os.truncate, path, 0)
            event = await file.next_event()
            assert (event.type, event.pin_id) == (EventType.INVALIDATE, registered[0].id)
            registered[0].acknowledge()
        assert late == [True]
