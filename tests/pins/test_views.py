"""What an admin sees of pins and busy extents, and what he may do to them."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from daxfs import abi, client
from daxfs.client import EventType, PinError, calls
from tests.conftest import Maker
from tests.mount.harness import REAPED_S, REPOSITORY, Mounted, alive, daxfs, eventually
from tests.pins.holders import BLOCK, Holder

pytestmark = pytest.mark.mount


@pytest.fixture
def file(shared_mount: Mounted) -> Path:
    path = shared_mount.fresh_directory() / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    return path


def pins_of(path: Path) -> list[dict[str, Any]]:
    return client.pins(path.parent)


def pids(entry: dict[str, Any]) -> set[int]:
    return {holder["pid"] for holder in entry["holders"]}


def test_a_pin_shows_who_what_and_how(file: Path) -> None:
    with Holder(file) as holder:
        pin_id = holder.pin(1, 2, write=True, longterm=True, label="rx ring ä")
        (pin,) = pins_of(file)
        assert (pin["id"], pin["pid"], pids(pin)) == (pin_id, holder.pid, {holder.pid})
        assert pin["holders"][0]["comm"] == pin["comm"] == Path(f"/proc/{holder.pid}/comm").read_text().strip()
        assert (pin["ino"], pin["path"]) == (file.stat().st_ino, str(file))
        assert (pin["offset"], pin["length"], pin["blocks"], pin["withheld"]) == (BLOCK, 2 * BLOCK, 2, 0)
        assert (pin["mode"], pin["state"], pin["label"]) == ("write", "held", "rx ring ä")
        assert set(pin["flags"].split("|")) == {"FOLL_PIN", "FOLL_WRITE", "FOLL_LONGTERM"}
        assert 0 <= pin["age_s"] < 60
    eventually("the pin has gone with its holder", lambda: not pins_of(file))


def test_a_deleted_file_and_what_its_pin_withholds(shared_mount: Mounted, file: Path) -> None:
    with Holder(file) as holder:
        pin_id = holder.pin(0, 8)
        file.unlink()
        (pin,) = pins_of(file)
        assert pin["path"] == f"{file} (deleted)"
        assert pin["withheld"] == 8 * BLOCK
        busy = client.busy(shared_mount.path)
        assert sum(entry["bytes"] for entry in busy) == 8 * BLOCK
        for entry in busy:
            assert (entry["pins"], pids(entry), entry["path"]) == ([pin_id], {holder.pid}, f"{file} (deleted)")
            assert entry["age_s"] >= 0
    eventually("nothing is busy", lambda: not client.busy(shared_mount.path))


def test_truncated_blocks_are_withheld_block_by_block(file: Path) -> None:
    with Holder(file) as one, Holder(file) as two:
        first, second = one.pin(0, 4), two.pin(2, 4)
        os.truncate(file, 3 * BLOCK)
        withheld = {pin["id"]: pin["withheld"] for pin in pins_of(file)}
        assert withheld == {first: BLOCK, second: 3 * BLOCK}
        busy = client.busy(file.parent)
        assert [(entry["count"], entry["pins"]) for entry in busy] == [(1, [first, second]), (2, [second])]
        assert pids(busy[0]) == {one.pid, two.pid}


def test_forked_holders_are_both_named_until_the_last_has_gone(file: Path) -> None:
    with Holder(file) as parent:
        parent.pin()
        child = parent.ask("fork")
        assert pids(pins_of(file)[0]) == {parent.pid, child}
        parent.end()
        assert pids(pins_of(file)[0]) == {child}
        assert pins_of(file)[0]["pid"] == child
        os.kill(child, signal.SIGKILL)
        eventually("the pin has gone with the last copy", lambda: not pins_of(file))


def test_a_passed_descriptor_is_named_with_who_got_it(file: Path, base: Path) -> None:
    """S54: the hole of the 2019 series."""
    name = str(base / f"socket-{time.monotonic_ns()}")
    with Holder(file) as giver, Holder() as taker:
        giver.pin()
        waiting = threading.Thread(target=taker.ask, args=("receive", name))
        waiting.start()
        eventually("the taker listens", lambda: os.path.exists(name))
        giver.ask("send", name)
        waiting.join()
        os.unlink(name)
        assert pids(pins_of(file)[0]) == {giver.pid, taker.pid}
        giver.end()
        (pin,) = pins_of(file)
        assert (pin["pid"], pids(pin)) == (taker.pid, {taker.pid})
        taker.end()
        eventually("the pin has gone with its last holder", lambda: not pins_of(file))


def test_others_that_have_the_file_open_hold_nothing(file: Path) -> None:
    with Holder(file) as bystander, Holder(file) as holder:
        bystander.ask("read", 0, 1)
        pin_id = holder.pin()
        own = bystander.pin()
        assert {pin["id"]: pids(pin) for pin in pins_of(file)} == {pin_id: {holder.pid}, own: {bystander.pid}}


def test_a_holder_passed_on_is_told_from_a_bystander(file: Path) -> None:
    """Nobody who took or opened it is left: what is left over belongs to those descriptions that are."""
    with Holder(file) as holder, Holder(file) as bystander:
        bystander.ask("read", 0, 1)
        holder.pin()
        child = holder.ask("fork")
        holder.end()
        assert pids(pins_of(file)[0]) == {child}
        os.kill(child, signal.SIGKILL)


def test_a_stopped_holder_is_listed_and_keeps_its_pin(file: Path) -> None:
    """S53."""
    with Holder(file) as holder:
        holder.pin(0, 8)
        os.kill(holder.pid, signal.SIGSTOP)
        os.truncate(file, 0)
        (pin,) = pins_of(file)
        assert (pids(pin), pin["state"], pin["withheld"]) == ({holder.pid}, "held", 8 * BLOCK)


def test_releasing_a_pin_revokes_it_and_keeps_its_blocks(shared_mount: Mounted, file: Path) -> None:
    """S63: the holder gets an event; what a raw mapping may reach stays busy."""
    with Holder(file) as holder:
        pin_id = holder.pin(0, 8, write=True)
        before = holder.ask("load", pin_id)
        done = daxfs("pins", "--release", str(pin_id), shared_mount.path)
        assert "keeps 8 blocks" in done.stderr
        assert holder.ask("event") == [EventType.REVOKED, pin_id, 0, 8 * BLOCK]
        assert pins_of(file)[0]["state"] == "revoked"
        os.truncate(file, 0)
        filler = file.parent / "filler"
        filler.write_bytes(b"z" * (1 << 20))
        runs = pins_of(file)[0]["runs"]
        with client.open(filler) as opened:
            taken = {e.physical + n for e in opened.extents() for n in range(e.count)}
        assert not taken & {start + n for start, count in runs for n in range(count)}
        assert holder.ask("load", pin_id) == before
        holder.ask("unpin", pin_id)
    eventually("nothing is busy", lambda: not client.busy(shared_mount.path))


def test_a_released_pin_stands_in_nobodys_way(make_mount: Maker) -> None:
    """Policy wait: a truncate waits for a pin, an admin takes the pin away, the truncate goes on."""
    mounted = make_mount(size="16M", options="policy=wait")
    path = mounted.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    with Holder(path) as holder:
        pin_id = holder.pin(0, 8)
        with subprocess.Popen(["truncate", "-s", "0", path]) as waiting:
            eventually("it waits", lambda: client.status(mounted.path)["waiting"] == 1)
            assert client.release_pin(mounted.path, pin_id) == 8
            assert waiting.wait(5) == 0
        assert path.stat().st_size == 0
        assert sum(entry["count"] for entry in client.busy(mounted.path)) == 8


def test_an_on_demand_registration_is_fenced_when_it_is_released(file: Path) -> None:
    with Holder(file) as holder:
        pin_id = holder.pin(0, 8, on_demand=True)
        assert client.release_pin(file, pin_id) == 8
        assert pins_of(file)[0]["state"] == "fenced"
        assert holder.ask("event")[0] == EventType.REVOKED
        os.truncate(file, 0)
        assert sum(entry["count"] for entry in client.busy(file.parent)) == 8


_AS_NOBODY = """
import os, sys
from daxfs import client
place, pin_id = sys.argv[1], int(sys.argv[2])
client.pins(place)  # everything is imported
os.setresuid(1234, 1234, 1234)
acts = [lambda: client.release_pin(place, pin_id), lambda: client.reap_busy(place),
        lambda: client.remove_device(place, 0), lambda: client.poison(place, 0, 1)]
for act in acts:
    try:
        act()
    except OSError as problem:
        print(problem.errno)
print(len(client.pins(place)))
"""


def test_only_root_and_who_mounted_may_act(file: Path) -> None:
    with Holder(file) as holder:
        command = [sys.executable, "-c", _AS_NOBODY, str(file.parent), str(holder.pin())]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(errno.EPERM)] * 4 + ["1"]
        assert pins_of(file)[0]["state"] == "held"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((99, 0, 0, 0), errno.EINVAL),
        ((1, 2, 1, 0), errno.EINVAL),
        ((1, 0, 1 << 63, 0), errno.ENOENT),
        ((4, 0, 1 << 63, 1 << 63), errno.EINVAL),
        ((4, 0, 5, 0), errno.EINVAL),
    ],
)
def test_admin_calls_that_make_no_sense(file: Path, arguments: tuple[int, int, int, int], code: int) -> None:
    with client.open(file.parent) as root:
        with pytest.raises(PinError) as caught:
            calls.admin(root.fileno(), bytearray(abi.ADMIN.pack(*arguments)))
        assert caught.value.errno == code


def test_survivors_are_listed_kept_and_reaped(mount: Mounted) -> None:
    """A holder that outlived a daemon: shown as survivor, released when it has gone, or by force."""
    path, other = mount.path / "file", mount.path / "other"
    path.write_bytes(b"f" * 8 * BLOCK)
    other.write_bytes(b"o" * 4 * BLOCK)
    with Holder(path) as holder, Holder(other) as second:
        kept, forced = holder.pin(0, 8), second.pin(0, 4)
        holder.ask("load", kept)
        second.ask("load", forced)
        mount.kill()
        mount.mount()
        os.truncate(path, 0)
        os.truncate(other, 0)
        listed = {pin["id"]: pin for pin in client.pins(mount.path)}
        assert {pin["state"] for pin in listed.values()} == {"survivor"}
        assert pids(listed[kept]) | pids(listed[forced]) == {holder.pid, second.pid}
        assert client.reap_busy(mount.path) == (0, 0)
        with pytest.raises(PinError) as caught:
            client.release_pin(mount.path, kept)
        assert caught.value.errno == errno.EBUSY
        assert client.release_pin(mount.path, forced, force=True) is None
        assert [pin["id"] for pin in client.pins(mount.path)] == [kept]

    def reaped() -> bool:
        daxfs("busy", "--reap", mount.path)
        return client.pins(mount.path) == []

    eventually("a look finds it gone", reaped, REAPED_S)
    eventually("nothing is busy", lambda: not client.busy(mount.path))


def test_the_list_is_bounded_and_cheap(make_mount: Maker) -> None:
    """Some thousand pins: the list has its limit, says so, and others are served while it is made."""
    mounted = make_mount(size="64M")
    path = mounted.path / "file"
    path.write_bytes(b"f" * BLOCK)
    many = 12_000
    with client.open(path) as file:
        for _ in range(many):
            calls.pin(file.fileno(), 0, BLOCK, client.FOLL_PIN)
        looks, done = 0, threading.Event()

        def look() -> None:
            nonlocal looks
            while not done.is_set():
                os.statvfs(mounted.path)
                looks += 1

        watcher = threading.Thread(target=look)
        watcher.start()
        listed = client.pins(mounted.path)
        done.set()
        watcher.join()
        assert len(listed) == 10_000
        assert client.status(mounted.path)["pins"] == many
        assert "2000 more pins" in daxfs("pins", mounted.path).stderr
        assert looks > 5  # it would be one or two if the list were made in one go
    assert alive(mounted.pid)


def test_the_files_of_daxfs(mount: Mounted) -> None:
    """.daxfs: not listed, readable by cat, fresh at each open, and unchangeable."""
    directory = mount.path / ".daxfs"
    path = mount.path / "file"
    path.write_bytes(b"f" * 8 * BLOCK)
    assert os.listdir(mount.path) == ["file"]
    assert sorted(os.listdir(directory)) == ["busy.json", "pins.json", "status.json"]
    assert all((directory / name).stat().st_mode == 0o100444 for name in os.listdir(directory))

    def cat(name: str) -> Any:
        return json.loads(subprocess.run(["cat", directory / name], check=True, capture_output=True).stdout)

    assert cat("pins.json") == cat("busy.json") == []
    with open(directory / "pins.json") as opened, Holder(path) as holder:
        pin_id = holder.pin(0, 8)
        os.truncate(path, 0)
        (pin,) = cat("pins.json")
        assert {key: value for key, value in pin.items() if key != "age_s"} == {
            key: value for key, value in client.pins(mount.path)[0].items() if key != "age_s"
        }
        assert [entry["pins"] for entry in cat("busy.json")] == [[pin_id]]
        assert cat("status.json")["pins"] == 1
        assert json.load(opened) == []  # as it was when it was opened


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (lambda root: os.mkdir(root / ".daxfs"), errno.EEXIST),
        (lambda root: os.rmdir(root / ".daxfs"), errno.EPERM),
        (lambda root: os.unlink(root / ".daxfs"), errno.EISDIR),
        (lambda root: os.unlink(root / ".daxfs/pins.json"), errno.EPERM),
        (lambda root: os.rename(root / ".daxfs", root / "x"), errno.EPERM),
        (lambda root: os.rename(root / "dir", root / ".daxfs"), errno.EPERM),
        (lambda root: os.rename(root / "dir", root / ".daxfs/dir"), errno.EPERM),
        (lambda root: os.open(root / ".daxfs/new", os.O_CREAT | os.O_RDWR), errno.EPERM),
        (lambda root: os.mkdir(root / ".daxfs/new"), errno.EPERM),
        (lambda root: os.symlink("x", root / ".daxfs/new"), errno.EPERM),
        (lambda root: os.link(root / "file", root / ".daxfs/new"), errno.EPERM),
        (lambda root: os.open(root / ".daxfs/pins.json", os.O_RDWR), errno.EPERM),
        (lambda root: os.truncate(root / ".daxfs/pins.json", 0), errno.EPERM),
        (lambda root: os.chmod(root / ".daxfs/pins.json", 0o666), errno.EPERM),
        (lambda root: os.setxattr(root / ".daxfs/pins.json", "user.x", b""), errno.EPERM),
        (lambda root: os.getxattr(root / ".daxfs/pins.json", "user.x"), errno.EOPNOTSUPP),
        (lambda root: os.stat(root / ".daxfs/other"), errno.ENOENT),
    ],
)
def test_nothing_there_can_be_changed(shared_mount: Mounted, what: Any, code: int) -> None:
    (shared_mount.path / "dir").mkdir(exist_ok=True)
    (shared_mount.path / "file").touch()
    with pytest.raises(OSError) as caught:
        what(shared_mount.path)
    assert caught.value.errno == code
    assert ".daxfs" not in os.listdir(shared_mount.path)


def test_copying_seeking_and_polling_do_no_harm(mount: Mounted) -> None:
    """An answer that would switch a call off for the whole mount must not come from there."""
    status = mount.path / ".daxfs" / "status.json"
    subprocess.run(["cp", status, mount.path / "copy"], check=True)
    assert json.loads((mount.path / "copy").read_text())["mount"] == str(mount.path)
    with open(status, "rb", buffering=0) as opened:
        with pytest.raises(OSError):
            os.lseek(opened.fileno(), 0, os.SEEK_HOLE)
        assert select.select([opened], [], [], 1)[0]
    path = mount.path / "sparse"
    path.write_bytes(b"x" * BLOCK)
    os.truncate(path, 4 * BLOCK)
    with open(path, "rb") as opened:
        assert os.lseek(opened.fileno(), 0, os.SEEK_HOLE) == BLOCK


def test_status_counts_what_the_hca_has(shared_mount: Mounted) -> None:
    from daxfs import verbs

    before = client.status(shared_mount.path)["hca"]
    with verbs.Context(shared_mount.path) as context, verbs.PD(context), verbs.CQ(context, 16):
        counted = client.status(shared_mount.path)["hca"]
        assert counted == {**before, "contexts": before["contexts"] + 1, "entries": before["entries"] + 16}
    eventually("all is given back", lambda: client.status(shared_mount.path)["hca"] == before)
