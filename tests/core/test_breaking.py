"""Break first, then begin: what a layout change does to its holders while it waits, when it fails, and when it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxfs import abi
from daxfs.core import attributes, breaking, fileops, holding, namespace, poison
from daxfs.core.attributes import Attributes
from daxfs.core.breaking import NOBODY, Breaker
from daxfs.core.inode import Inode
from daxfs.core.journal import Journal
from daxfs.core.layout import FILE_SIZE_MAX
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder, Pin, State
from daxfs.core.policy import Operation
from daxfs.core.transaction import Transaction
from daxfs.core.volume import Volume
from daxfs.core.waiting import Awaited, LayoutBusy
from daxfs.errors import (
    BadArgument,
    FsError,
    IsDirectory,
    NoSpace,
    NotSupported,
    Poisoned,
    ReadOnly,
    TooBig,
)

from .image import NOW, fresh_volume

B = 4096
ME, OWNER = Holder(100, "test", 5), 1
PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
EXTENTS = 2000  # of a file in many pieces: some leaves full

Change = Callable[[Volume, Inode, Breaker], None]


def _setattr(vol: Volume, inode: Inode, new: Attributes) -> None:
    attributes.setattr(vol, NOW, inode, new)


CHANGES: dict[str, Change] = {
    "truncate": lambda vol, inode, breaker: _setattr(vol, inode, Attributes(size=B // 2, breaker=breaker)),
    "truncate to nothing": lambda vol, inode, breaker: _setattr(vol, inode, Attributes(size=0, breaker=breaker)),
    "truncate and chmod": lambda vol, inode, breaker: _setattr(
        vol, inode, Attributes(size=0, mode=0o600, uid=5, breaker=breaker, kill_priv=True)
    ),
    "punch": lambda vol, inode, breaker: fileops.fallocate(vol, NOW, inode, PUNCH, B // 2, 6 * B, breaker=breaker),
}


@pytest.fixture
def file(vol: Volume) -> Inode:
    """Eight blocks of different bytes, open once."""
    inode = namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))
    fileops.write(vol, NOW, inode, 0, b"".join(bytes([65 + i]) * B for i in range(8)))
    inode.opens += 1
    return inode


def pin(vol: Volume, inode: Inode, flags: int = abi.FOLL_PIN) -> Pin:
    return holding.pin(vol, NOW, inode, 0, inode.size, flags, OWNER, ME, writable=True)


def events(vol: Volume) -> list[int]:
    found = []
    while event := vol.events.pop(OWNER):
        found.append(event[0].type)
    return found


class Counts:
    """How often an inode was read from media, its map was, and a transaction was begun or aborted."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        self.calls = dict.fromkeys(("load", "_load_map", "revert", "_abort", "transaction"), 0)
        with pytest.MonkeyPatch.context() as patch:
            for where, names in ((Inode, ("load", "_load_map", "revert")), (Transaction, ("_abort",)),
                                 (Volume, ("transaction",))):  # fmt: skip
                for name in names:
                    patch.setattr(where, name, self._counted(name, getattr(where, name)))
            yield self.calls

    def _counted(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.calls[name] += 1
            return real(*args)

        return call


def test_a_change_that_waits_reads_nothing_anew(tmp_path: Path) -> None:
    """A file in very many extents is not read again, however often a waiting truncate looks: no more than for a punch."""
    with fresh_volume(tmp_path, 32 << 20) as vol:
        inode = namespace.create(vol, NOW, vol.root, b"f", 0o644, Caller(0, 0))
        fileops.write(vol, NOW, inode, 0, bytes(2 * EXTENTS * B))
        for n in range(EXTENTS):
            fileops.fallocate(vol, NOW, inode, PUNCH, 2 * n * B, B)
        assert len(inode.map) == EXTENTS
        assert len(inode.map.leaf_blocks()) > 1
        holding.pin(vol, NOW, inode, B, B, abi.FOLL_PIN, OWNER, ME, writable=True)
        vol.settings.policy = "wait"
        mapped = list(inode.map)
        for what, change in CHANGES.items():
            with Counts().counting() as calls:
                for _ in range(10):
                    with pytest.raises(LayoutBusy):
                        change(vol, inode, NOBODY)
            assert (what, set(calls.values())) == (what, {0})
        assert list(inode.map) == mapped
        holding.release_owner(vol, OWNER)
        with Counts().counting() as calls:
            fileops.truncate(vol, NOW, inode, 0)
        assert calls["transaction"] == 1  # what is counted is counted


def test_a_layout_is_not_broken_within_a_transaction(vol: Volume, file: Inode) -> None:
    pin(vol, file)
    with pytest.raises(RuntimeError, match="before the transaction"), vol.transaction(NOW):
        breaking.clear_way(vol, file, Operation.TRUNCATE, 0, 8, NOBODY)
    assert vol.open_transactions == 0
    breaking.clear_way(vol, file, Operation.TRUNCATE, 0, 8, NOBODY)


OVERDUE = Breaker(overdue=frozenset(Awaited))
TAKES = {  # policy, when leases are over -> events of a pin and a lease
    "busy": [abi.EVENT_LEASE_BREAK],
    "revoke": [abi.EVENT_REVOKED, abi.EVENT_LEASE_BREAK],
    "lease": [abi.EVENT_REVOKED, abi.EVENT_LEASE_BREAK],
}


@pytest.mark.parametrize("policy", TAKES)
@pytest.mark.parametrize("what", CHANGES)
def test_holders_lose_what_they_have_when_the_change_is_made(vol: Volume, file: Inode, what: str, policy: str) -> None:
    one = pin(vol, file)
    holding.take_lease(vol, file, 0, 0, OWNER)
    vol.settings.policy, vol.settings.lease_then = policy, "revoke"
    CHANGES[what](vol, file, OVERDUE)
    assert events(vol) == TAKES[policy]
    assert len(vol.leases) == 0
    assert one.state == (State.HELD if policy == "busy" else State.REVOKED)
    assert vol.busy > 0


@pytest.mark.parametrize("policy", TAKES)
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_cannot_be_committed_takes_nothing(
    vol: Volume, file: Inode, what: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pin(vol, file)
    holding.take_lease(vol, file, 0, 0, OWNER)
    vol.settings.policy, vol.settings.lease_then = policy, "revoke"
    before = (list(file.map), file.size, file.mode, file.uid, fileops.read(vol, file, 0, 8 * B), vol.free, vol.busy)

    def full(*_: object) -> None:
        raise NoSpace("as if a leaf had no room")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", full)
        with pytest.raises(NoSpace):
            CHANGES[what](vol, file, OVERDUE)
    assert (events(vol), one.state, len(vol.leases)) == ([], State.HELD, 1)
    assert before == (list(file.map), file.size, file.mode, file.uid, fileops.read(vol, file, 0, 8 * B), vol.free, vol.busy)
    vol.check()


def _failed(vol: Volume, _: Inode) -> None:
    vol.fail("a test")


def _poisoned(vol: Volume, inode: Inode) -> None:
    poison.inject(vol, inode.map.runs(0, 1)[0][0], 1)


REFUSED: dict[str, tuple[Callable[[Volume, Inode], None] | None, Change, type[FsError]]] = {
    "a volume that refuses changes": (_failed, CHANGES["truncate"], ReadOnly),
    "a punch of such a volume": (_failed, CHANGES["punch"], ReadOnly),
    "a size beyond the largest": (
        None, lambda v, i, b: _setattr(v, i, Attributes(size=FILE_SIZE_MAX + 1, breaker=b)), TooBig,
    ),
    "a size below none": (None, lambda v, i, b: _setattr(v, i, Attributes(size=-1, breaker=b)), TooBig),
    "a punch beyond the largest": (
        None, lambda v, i, b: fileops.fallocate(v, NOW, i, PUNCH, 0, FILE_SIZE_MAX + 1, breaker=b), TooBig,
    ),
    "a punch of nothing": (None, lambda v, i, b: fileops.fallocate(v, NOW, i, PUNCH, 0, 0, breaker=b), BadArgument),
    "a punch that makes longer": (
        None, lambda v, i, b: fileops.fallocate(v, NOW, i, fileops.FALLOC_PUNCH_HOLE, 0, B, breaker=b), NotSupported,
    ),
    "a poisoned block at the new end": (_poisoned, CHANGES["truncate"], Poisoned),
    "a poisoned block at the edge of a hole": (_poisoned, CHANGES["punch"], Poisoned),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["busy", "wait", "lease", "revoke"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_before_any_holder_hears_of_it(vol: Volume, file: Inode, what: str, policy: str) -> None:
    """Neither told to let go, nor waited for, nor fenced when the time is over."""
    prepare, change, error = REFUSED[what]
    one, registered = pin(vol, file), pin(vol, file, abi.PIN_ON_DEMAND)
    holding.take_lease(vol, file, 0, 0, OWNER)
    vol.settings.policy = policy
    if prepare is not None:
        prepare(vol, file)
        events(vol)
    for breaker in (NOBODY, OVERDUE):
        with pytest.raises(error):
            change(vol, file, breaker)
        assert events(vol) == []
        assert [(p.state, p.told) for p in (one, registered)] == [(State.HELD, False)] * 2
        assert len(vol.leases) == 1


def test_a_directory_has_no_size_to_change(vol: Volume) -> None:
    with pytest.raises(IsDirectory):
        _setattr(vol, vol.root, Attributes(size=0))
