"""A holder that was killed hangs in the kernel behind write-back that the truncate itself holds back: it lets go all the
same, and its blocks stay with it until it is really gone. A holder that lives is never taken for a dying one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import client
from tests.conftest import Maker
from tests.mount.harness import Mounted, alive, eventually
from tests.pins.holders import BLOCK, Holder

SOON_S = 20  # it takes about one; much less than any time limit of the policies here
BLOCKS = 8


@contextmanager
def truncating(mounted: Mounted, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A truncate of the file, which waits."""
    with subprocess.Popen(["truncate", "-s", "0", path], stderr=subprocess.PIPE) as process:
        try:
            eventually("it waits", lambda: client.status(mounted.path)["waiting"] == 1, 30)
            yield process
        finally:
            process.kill()


def new_file(mounted: Mounted, name: str = "file") -> Path:
    path = mounted.path / name
    path.write_bytes(b"f" * BLOCKS * BLOCK)
    return path


def settled(mounted: Mounted, path: Path) -> None:
    assert path.stat().st_size == 0
    eventually("nothing is pinned or busy", lambda: not client.pins(path) and not client.busy(path), 30)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


WAITING = ["policy=wait,wait_s=0", "policy=lease,lease_break_s=600", "policy=wait,wait_s=600"]


@pytest.mark.parametrize("options", WAITING)
def test_a_killed_holder_with_a_dirty_page_of_its_own(options: str, make_mount: Maker) -> None:
    mounted = make_mount(size="32M", options=options)
    path = new_file(mounted)
    with Holder(path) as holder:
        holder.pin(0, BLOCKS, write=True)
        holder.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            holder.ask("dirty", 3)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


@pytest.mark.parametrize("options", WAITING)
def test_a_killed_holder_behind_the_dirty_page_of_a_bystander(options: str, make_mount: Maker) -> None:
    mounted = make_mount(size="32M", options=options)
    path = new_file(mounted)
    with Holder(path) as holder, Holder() as bystander:
        holder.pin(0, 1)
        bystander.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            bystander.ask("dirty", 5)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
        eventually("it has ended", lambda: not alive(holder.pid), SOON_S)
    settled(mounted, path)


def test_close_waits_for_no_write_back(make_mount: Maker) -> None:
    """Neither that of the holder, which gives its pin back with it, nor that of another process."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    path = new_file(mounted)
    with Holder(path) as holder, Holder() as bystander, Holder(path) as other:
        holder.pin(0, 1)
        bystander.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            bystander.ask("dirty", 5)
            other.ask("forget")
            assert truncate.poll() is None
            holder.ask("forget")
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


def test_the_blocks_stay_with_a_dying_holder(make_mount: Maker) -> None:
    """It hangs behind a truncate of another file, which it has a dirty page of: what it had pinned is busy until then."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    pinned, other = new_file(mounted, "pinned"), new_file(mounted, "other")
    with Holder(pinned) as holder, Holder(other) as keeper:
        pin_id = holder.pin(0, BLOCKS, write=True)
        keeper.pin(0, 1)
        holder.ask("map", str(other), BLOCKS)
        with truncating(mounted, other) as second:
            holder.ask("dirty", 1)
            with subprocess.Popen(["truncate", "-s", "0", pinned]) as first:
                eventually("both wait", lambda: client.status(pinned)["waiting"] == 2, 30)
                kill(holder.pid)
                assert first.wait(SOON_S) == 0
            (entry,) = [pin for pin in client.pins(pinned) if pin["id"] == pin_id]
            assert (entry["state"], entry["withheld"]) == ("dying", BLOCKS * BLOCK)
            runs = {start + n for start, count in entry["runs"] for n in range(count)}
            filler = mounted.path / "filler"
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(b"z" * (32 << 20))
            with client.open(filler) as opened:
                assert not runs & {e.physical + n for e in opened.extents() for n in range(e.count)}
            assert second.poll() is None
            assert not client.info(pinned)["failed"]
            keeper.end()
            assert second.wait(SOON_S) == 0
    settled(mounted, pinned)


def test_a_holder_with_threads(make_mount: Maker) -> None:
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    for leaves in (False, True):
        path = new_file(mounted, f"file-{leaves}")
        with Holder(path) as holder:
            holder.pin(0, BLOCKS)
            holder.ask("map", str(path), BLOCKS)
            holder.ask("threads", 8)
            if leaves:
                holder.ask("leave_to_thread")
            with truncating(mounted, path) as truncate:
                holder.ask("dirty", 3)
                kill(holder.pid)
                assert truncate.wait(SOON_S) == 0
        settled(mounted, path)


def test_an_on_demand_holder_acknowledges_by_dying(make_mount: Maker) -> None:
    mounted = make_mount(size="32M", options="invalidate_s=600")
    path = new_file(mounted)
    with Holder(path) as holder:
        holder.ask("register", BLOCKS)
        holder.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            holder.ask("dirty", 3)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


def test_a_dying_process_gives_its_leases_back(make_mount: Maker) -> None:
    mounted = make_mount(size="32M", options="policy=lease,lease_break_s=600")
    path = new_file(mounted)
    with Holder(path) as holder:
        holder.ask("lease")
        holder.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            holder.ask("dirty", 3)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


def test_a_holder_that_hangs_in_a_write_is_dying_when_it_is_killed(make_mount: Maker) -> None:
    """Its write waits for the kernel's lock of the file, which the truncate has: the signal comes through only behind it."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    path = new_file(mounted)
    with Holder(path) as holder:
        holder.pin(0, BLOCKS)
        with truncating(mounted, path) as truncate:
            holder.tell("append", "more")
            eventually("it hangs", lambda: state(holder.pid) == "D", 30)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


def test_with_the_page_cache(make_mount: Maker) -> None:
    """With dax=never a pinned file has no dirty pages; the holder has some of another file."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0,dax=never")
    path, other = new_file(mounted), new_file(mounted, "other")
    with Holder(path) as holder:
        holder.pin(0, BLOCKS)
        holder.ask("map", str(other), BLOCKS)
        with truncating(mounted, path) as truncate:
            holder.ask("dirty", 3)
            kill(holder.pid)
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)
    assert other.read_bytes() == b"f" * 3 * BLOCK + bytes([ord("f") ^ 0xFF]) + b"f" * (5 * BLOCK - 1)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def passed_on(holder: Holder, base: Path, path: Path) -> Callable[[], None]:
    """The descriptor goes to another process; its first holder closes it and opens the file anew."""
    name = str(base / f"socket-{time.monotonic_ns()}")
    taker = Holder()
    taker.tell("receive", name)
    eventually("the taker listens", lambda: os.path.exists(name), 30)
    holder.ask("send", name)
    taker.answer()
    os.unlink(name)
    holder.ask("forget")
    holder.ask("reopen", str(path))
    return taker.end


def forked(holder: Holder, base: Path, path: Path) -> Callable[[], None]:
    child = holder.ask("fork")
    return lambda: kill(child)


@pytest.mark.parametrize("how", [forked, passed_on])
def test_a_holder_that_lives_is_waited_for(
    how: Callable[[Holder, Path, Path], Callable[[], None]], make_mount: Maker, base: Path
) -> None:
    """Who took the pin dies, with a dirty page; another process has its description."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    path = new_file(mounted)
    with Holder(path) as holder:
        pin_id = holder.pin(0, BLOCKS)
        holder.ask("map", str(path), BLOCKS)
        end = how(holder, base, path)
        with truncating(mounted, path) as truncate:
            holder.ask("dirty", 3)
            kill(holder.pid)
            with pytest.raises(subprocess.TimeoutExpired):
                truncate.wait(3)
            (entry,) = [pin for pin in client.pins(path) if pin["id"] == pin_id]
            assert entry["state"] == "held"
            end()
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)


def test_an_open_waits_for_no_write_back(make_mount: Maker) -> None:
    """Of a file of which a mapping has a dirty page, while a truncate of it waits."""
    mounted = make_mount(size="32M", options="policy=wait,wait_s=0")
    path = new_file(mounted)
    with Holder(path) as holder, Holder() as bystander:
        holder.pin(0, 1)
        bystander.ask("map", str(path), BLOCKS)
        with truncating(mounted, path) as truncate:
            bystander.ask("dirty", 5)
            for program in (["head", "-c", "1", path], ["sh", "-c", 'exec 3<>"$0"; exec 3>&-', path]):
                assert subprocess.run(program, timeout=SOON_S, stdout=subprocess.DEVNULL).returncode == 0
            assert truncate.poll() is None
            holder.end()
            assert truncate.wait(SOON_S) == 0
    settled(mounted, path)
