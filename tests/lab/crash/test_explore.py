"""The explorer on sound and on broken daxfs: what it accepts, what it finds, and how small it makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from daxfs.core import fsck
from daxfs.core.inode import Inode
from daxfs.core.journal import Journal
from daxfs.core.ledger import Ledger
from daxfs.core.volume import Volume
from daxfs.lab.crash import calls, explore
from daxfs.lab.crash.calls import Call, World
from daxfs.lab.crash.explore import Explorer, Options, Tally, Workload
from daxfs.lab.crash.images import Limits
from daxfs.lab.crash.medium import RecordingPmem
from daxfs.lab.crash.reproduce import Violation, reproduce


def explored(*workload: str, **options: Any) -> Tally:
    tally = Tally()
    Explorer(Options(**options)).explore(workload, tally)
    return tally


def violation(*workload: str, **options: Any) -> Violation:
    """The only one that a workload shows, made small."""
    tally = Tally()
    explorer = Explorer(Options(**options))
    explorer.explore(workload, tally)
    assert tally.found
    return reproduce(tally.found[0], explorer)


@contextmanager
def without(owner: type, name: str, nth: int) -> Iterator[None]:
    """The nth flush or fence within each call of a method does nothing."""
    real, count, inside = vars(owner)[name], 0, False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count, inside
        count, inside = 0, True
        try:
            return real(*args, **kwargs)
        finally:
            inside = False

    def counting(method: Callable[..., None]) -> Callable[..., None]:
        def one(self: RecordingPmem, *args: int) -> None:
            nonlocal count
            count += inside
            if not (inside and count == nth):
                method(self, *args)

        return one

    calls.base_image()  # of the sound daxfs
    with (
        mock.patch.object(owner, name, call),
        mock.patch.object(RecordingPmem, "flush", counting(RecordingPmem.flush)),
        mock.patch.object(RecordingPmem, "fence", counting(RecordingPmem.fence)),
    ):
        yield


# -- sound --


@pytest.mark.parametrize("domain", ["adr", "eadr"])
@pytest.mark.parametrize(
    "workload",
    [
        ("create", "write_new", "rename_new"), ("write",), ("punch_held", "unpin_held"), ("tmpfile", "reboot"),
        ("die", "release"),
    ],
    ids="+".join,
)  # fmt: skip
def test_daxfs_is_sound(workload: Workload, domain: str) -> None:
    tally = explored(*workload, domain=domain, limits=Limits(all=64, lines=8, pairs=8, random=8))
    assert not tally.found
    assert tally.workloads == 1
    assert tally.points > len(workload)
    assert tally.recoveries > 0
    assert tally.images >= len(tally.digests) > 50


def test_a_mount_after_a_boot_has_armed_the_volume_before_its_first_transaction() -> None:
    """Else fsck finds a transaction in the journal of a volume that says it is clean."""
    assert not explored("reboot", limits=Limits(all=64, lines=8, pairs=8, random=8)).found


def test_the_same_seed_makes_the_same_images() -> None:
    few = Limits(all=16, lines=4, pairs=4, random=4)
    one, same, other = (explored("append_open", limits=few, seed=seed).digests for seed in (3, 3, 4))
    assert one == same != other


def test_only_the_crashes_that_were_asked_for() -> None:
    both, last = Tally(), Tally()
    Explorer().explore(("create", "mkdir"), both)
    Explorer().explore(("create", "mkdir"), last, 1)
    assert 0 < last.points < both.points
    assert len(last.digests) < len(both.digests)


def test_time_ends_it() -> None:
    tally = Tally()
    Explorer().explore(("create",), tally, until=0)
    assert (tally.workloads, tally.images) == (0, 0)


def test_every_image_is_recovered_by_the_production_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict without it: the calls are counted."""
    count = 0
    real = Volume._recover

    def recover(self: Volume, now: int, boot_id: bytes) -> None:
        nonlocal count
        count += boot_id in explore._BOOTS
        real(self, now, boot_id)

    monkeypatch.setattr(Volume, "_recover", recover)
    tally = explored("link")
    assert count >= tally.images > 50


def test_files_larger_than_a_line_are_varied_where_they_are_read() -> None:
    """Data that is overwritten is not read by the mount, only by whoever compares it: its lines count, too."""
    tally = explored("write_word")
    assert len(tally.digests) >= 4  # before, after, only the data, only the time


# -- broken --


def test_a_missing_flush_is_found_with_its_line() -> None:
    with without(Journal, "_apply", 1):  # the first record's
        found = violation("create", "mkdir")
    assert found.workload == "create"
    assert found.where.startswith("within create, before its fence ")


def test_a_missing_fence_is_found_with_the_line_that_came_too_early() -> None:
    with without(Journal, "commit", 2):
        found = violation("mkdir_deep")
    assert found.where == "within mkdir_deep, before its fence 1"
    assert found.why


@pytest.mark.parametrize(
    ("workload", "least"),
    [
        (("mkdir", "chmod", "link", "read"), "read"),
        (("mkdir", "pin_write", "chmod", "unpin_dirty"), "pin_write+unpin_dirty"),
    ],
)
def test_a_workload_is_made_as_short_as_it_can_be(workload: Workload, least: str) -> None:
    """Without the flush of times."""
    with without(Inode, "touch_in_place", 1):
        tally = Tally()
        explorer = Explorer()
        explorer.explore(workload, tally, 3)
        found = reproduce(tally.found[0], explorer)
    assert found.workload == least
    assert found.where == f"at the return of {workload[-1]}"
    assert found.lines == ("lost: inode 6, byte 448", "all other pending stores were left behind")
    assert found.command == f"daxfs lab crash --workloads {least} --domain adr --seed 1"


def test_what_reproduces_it_does() -> None:
    with without(Journal, "commit", 1):
        one = violation("rename_exchange")
        again = violation(*one.workload.split("+"), seed=1)
    assert str(one) == str(again)


def test_bytes_that_a_second_mount_changes_are_found() -> None:
    real = Volume._recover

    def recover(self: Volume, now: int, boot_id: bytes) -> None:
        real(self, now, boot_id)
        self.pmem.store_word(self.pmem.size - 8, self.sb["mounts"])

    calls.base_image()
    with mock.patch.object(Volume, "_recover", recover):
        assert "mounting it once more changes bytes" in violation("mkdir").why


def test_a_crash_within_recovery_is_found() -> None:
    """A replay that is right if nothing disturbs it: it forgets the transaction before it has applied it."""
    real = Journal.replay

    def replay(self: Journal) -> bool:
        records = [(at, bytes(data)) for at, data in self.pending()]
        if records:
            self._pmem.store_word(self._word_at, 0)
            self._pmem.flush(self._word_at, 8)
            self._pmem.fence()
            self._apply(records)
            return True
        return real(self)

    with mock.patch.object(Journal, "replay", replay):
        found = violation("link")
    assert found.why.startswith("recovery crashes before its fence ")


def test_pins_that_the_death_of_the_daemon_loses_are_found() -> None:
    real = Ledger.insert

    def insert(self: Ledger, *args: Any) -> list[int]:
        addresses = real(self, *args)
        for at in addresses:
            self._volume.pmem.store_word(at, 0)
        return addresses

    calls.base_image()
    with mock.patch.object(Ledger, "insert", insert):
        found = violation("pin")
    assert found.why.startswith("the daemon dies: ")


def test_pins_that_outlive_a_power_cut_are_found() -> None:
    real = Ledger.load

    def load(self: Ledger, boot_id: bytes) -> Any:
        return real(self, calls.BOOT if boot_id in explore._BOOTS else boot_id)

    calls.base_image()
    with mock.patch.object(Ledger, "load", load):
        assert "pinned" in violation("pin").why


def test_a_mount_that_fails_is_told_as_it_is() -> None:
    real = Volume._recover

    def recover(self: Volume, now: int, boot_id: bytes) -> None:
        real(self, now, boot_id)
        if boot_id in explore._BOOTS:
            raise ZeroDivisionError("in the mount")

    calls.base_image()
    with mock.patch.object(Volume, "_recover", recover):
        assert "ZeroDivisionError: in the mount (recover in test_explore.py:" in violation("mkdir").why


def test_what_fsck_finds_is_a_violation() -> None:
    def check(target: object) -> fsck.Report:
        report = fsck.Report("")
        report.error("something is wrong")
        return report

    with mock.patch.object(fsck, "check", check):
        assert violation("mkdir").why == "fsck: something is wrong"


# -- redundant --


def test_flushes_and_fences_that_do_nothing_are_counted() -> None:
    def twice(world: World) -> None:
        world.mkdir(b"/made")
        world.volume.pmem.flush(0, 64)
        world.volume.pmem.fence()
        world.volume.pmem.fence()

    tally = Tally()
    Explorer(alphabet={"twice": Call("twice", twice), **calls.ALPHABET}).explore(("mkdir", "twice"), tally)
    assert tally.redundant == {("twice", "flush"): 1, ("twice", "fence"): 2}
