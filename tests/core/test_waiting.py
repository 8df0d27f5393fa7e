"""One wake-up: whatever ends a wait says so by itself, so that no verb can forget it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from daxfs import abi
from daxfs.core import attributes, breaking, fileops, holding, namespace, poison
from daxfs.core.breaking import NOBODY, Breaker
from daxfs.core.inode import Inode
from daxfs.core.journal import Journal
from daxfs.core.namespace import Caller
from daxfs.core.pins import RUNS_AT_ONCE, Holder, Pin
from daxfs.core.policy import POLICY_XATTR, Operation
from daxfs.core.volume import Volume
from daxfs.core.waiting import DUE, EVERYTHING, SPACE, Awaited, LayoutBusy
from daxfs.errors import FsError, NoDevice, NoSpace, ReadOnly

from .image import NOW, Abort

B = 4096
ME, OTHER = Holder(100, "me", 5), Holder(200, "other", 7)
OWNER = 1
ROOT = Caller(0, 0)
PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
OVERDUE = Breaker(overdue=frozenset(Awaited))


class Scene:
    """A file of eight blocks, open, with a pin (or a registration, or a lease) in the way of a truncate that waits."""

    def __init__(self, vol: Volume) -> None:
        self.vol = vol
        self.moves: list[int] = []
        self.file = self.new(b"f")
        self.ino = self.file.ino
        self.pin: Pin
        self.run = (0, 0)
        vol.settings.policy = "wait"
        vol.on_moved = self.moves.append

    def new(self, name: bytes, blocks: int = 8) -> Inode:
        inode = namespace.create(self.vol, NOW, self.vol.root, name, 0o644, ROOT)
        fileops.write(self.vol, NOW, inode, 0, b"x" * (blocks * B))
        inode.opens += 1
        return inode

    def take(self, flags: int) -> None:
        self.pin = holding.pin(self.vol, NOW, self.file, 0, 8 * B, flags, OWNER, ME, writable=True)

    def wait(self) -> None:
        """The truncate."""
        fileops.truncate(self.vol, NOW, self.file, 0)


# -- what stands in the way: a pin, a registration that was told, a lease, a pin of a daemon that died --


def a_pin(scene: Scene) -> None:
    scene.take(abi.FOLL_PIN)


def a_registration(scene: Scene) -> None:
    scene.take(abi.PIN_ON_DEMAND)


def a_lease(scene: Scene) -> None:
    scene.vol.settings.policy = "lease"
    holding.take_lease(scene.vol, scene.file, 0, 0, OWNER)


def a_survivor(scene: Scene) -> None:
    runs = scene.file.map.runs(0, 8)
    scene.pin = Pin(scene.vol.pins.next_id(), None, None, scene.ino, 0, 8 * B, abi.FOLL_PIN, runs, 8, ME, NOW)
    scene.vol.pins.insert(scene.pin)


# -- what ends that --


def _change(scene: Scene, policy: str) -> None:
    """A punch of one block under another policy."""
    was, scene.vol.settings.policy = scene.vol.settings.policy, policy
    breaking.clear_way(scene.vol, scene.file, Operation.PUNCH, 0, 1, NOBODY).carry_out(scene.vol)
    scene.vol.settings.policy = was


def _change_fences(scene: Scene) -> None:
    breaking.clear_way(scene.vol, scene.file, Operation.PUNCH, 0, 1, OVERDUE)


def _policy(scene: Scene) -> None:
    attributes.setxattr(scene.vol, NOW, scene.file, POLICY_XATTR, b"busy")


def _no_policy(scene: Scene) -> None:
    scene.vol.settings.policy = "busy"  # which the file's own stands above
    attributes.removexattr(scene.vol, NOW, scene.file, POLICY_XATTR)


def a_pin_and_a_policy(scene: Scene) -> None:
    a_pin(scene)
    attributes.setxattr(scene.vol, NOW, scene.file, POLICY_XATTR, b"wait")


def _fail_in_commit(scene: Scene) -> None:
    real = Journal.commit

    def commit(journal: Journal, records: list[tuple[int, bytes]]) -> None:
        real(journal, records)
        raise Abort

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "commit", commit)
        with pytest.raises(Abort):
            namespace.mkdir(scene.vol, NOW, scene.vol.root, b"d", 0o755, ROOT)


def _poison_metadata(scene: Scene) -> None:
    poison.inject(scene.vol, scene.vol.chunks[0], 1)


class Case(NamedTuple):
    """`then`: what the waiting truncate meets when it looks again, None if nothing."""

    verb: Callable[..., Any]  # of the core, as the tables of verbs below have it
    way: Callable[[Scene], None]
    act: Callable[[Scene], object]
    heard: int | None = None  # None: the file's number
    then: type[FsError] | None = None


ENDS = {
    "unpin": Case(holding.unpin, a_pin, lambda s: holding.unpin(s.vol, NOW, OWNER, s.pin.id)),
    "unpin of what a device wrote": Case(
        holding.unpin, a_pin, lambda s: holding.unpin(s.vol, NOW, OWNER, s.pin.id, dirty=True)
    ),
    "unpin of a registration": Case(holding.unpin, a_registration, lambda s: holding.unpin(s.vol, NOW, OWNER, s.pin.id)),
    "acknowledge": Case(holding.acknowledge, a_registration, lambda s: holding.acknowledge(s.vol, OWNER, s.pin.id)),
    "give some back": Case(holding.release_some, a_pin, lambda s: holding.release_some(s.vol, OWNER, 1)),
    "last close": Case(holding.release_owner, a_pin, lambda s: holding.release_owner(s.vol, OWNER)),
    "last close of a registration": Case(
        holding.release_owner, a_registration, lambda s: holding.release_owner(s.vol, OWNER)
    ),
    "last close of a lease": Case(holding.release_owner, a_lease, lambda s: holding.release_owner(s.vol, OWNER)),
    "a lease is given back": Case(holding.release_lease, a_lease, lambda s: holding.release_lease(s.vol, OWNER)),
    "a survivor is released": Case(
        holding.release_survivor, a_survivor, lambda s: holding.release_survivor(s.vol, s.pin)
    ),
    "an admin revokes": Case(holding.revoke_access, a_pin, lambda s: holding.revoke_access(s.vol, s.pin)),
    "an admin revokes a registration": Case(
        holding.revoke_access, a_registration, lambda s: holding.revoke_access(s.vol, s.pin)
    ),
    "a change revokes": Case(breaking.clear_way, a_pin, lambda s: _change(s, "revoke")),
    "a change breaks a lease": Case(breaking.clear_way, a_lease, lambda s: _change(s, "busy")),
    "a change fences": Case(breaking.clear_way, a_registration, _change_fences),
    "revoke": Case(breaking.revoke, a_pin, lambda s: breaking.revoke(s.vol, [s.pin])),
    "the holders are dying": Case(holding.let_die, a_pin, lambda s: holding.let_die(s.vol, OWNER, [s.pin])),
    "the holders of a registration are dying": Case(
        holding.let_die, a_registration, lambda s: holding.let_die(s.vol, OWNER, [s.pin])
    ),
    "the holders of a lease are dying": Case(holding.let_die, a_lease, lambda s: holding.let_die(s.vol, OWNER, [])),
    "another policy": Case(attributes.setxattr, a_pin, _policy),
    "a policy is removed": Case(attributes.removexattr, a_pin_and_a_policy, _no_policy),
    "the volume fails": Case(Volume.fail, a_pin, lambda s: s.vol.fail("a test"), EVERYTHING, ReadOnly),
    "a commit fails": Case(Volume.fail, a_pin, _fail_in_commit, EVERYTHING, ReadOnly),
    "the medium fails below the volume": Case(poison.inject, a_pin, _poison_metadata, EVERYTHING, ReadOnly),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_ends_a_wait_for_holders_wakes_the_waiter(vol: Volume, what: str) -> None:
    scene, case = Scene(vol), ENDS[what]
    case.way(scene)
    with pytest.raises(LayoutBusy) as found:
        scene.wait()
    assert found.value.ino == scene.ino
    rules = vol.rules
    scene.moves.clear()
    case.act(scene)
    heard = scene.ino if case.heard is None else case.heard
    assert heard in scene.moves
    pin_stands = vol.pins.stands(found.value.pin)
    assert not pin_stands or vol.rules != rules, "a waiter looks again when its pin has gone, or the rules have moved"
    if case.then is None:
        scene.wait()
    else:
        with pytest.raises(case.then):
            scene.wait()


def test_a_pin_that_waits_behind_a_change_hears_that_the_device_leaves(vol: Volume) -> None:
    scene = Scene(vol)
    a_pin(scene)
    vol.breaks[scene.ino] = [breaking.Break(0, 8)]
    pin = (vol, NOW, scene.file, 0, B, abi.FOLL_PIN, OWNER + 1, OTHER)
    with pytest.raises(LayoutBusy) as found:
        holding.pin(*pin, writable=True)
    assert (found.value.kind, found.value.ino, found.value.pin) == (Awaited.LAYOUT, scene.ino, 0)
    vol.leave()
    assert EVERYTHING in scene.moves
    with pytest.raises(NoDevice):
        holding.pin(*pin, writable=True)
    vol.breaks.clear()


# -- space --


def _busy(scene: Scene) -> None:
    """Eight busy blocks."""
    a_pin(scene)
    scene.vol.settings.policy = "busy"
    scene.wait()


def _due(scene: Scene) -> None:
    """The same, and their last pin goes."""
    _busy(scene)
    holding.release_owner(scene.vol, OWNER)


def _scattered(scene: Scene) -> None:
    """A pin of many runs, which leaves bit by bit."""
    inode = namespace.create(scene.vol, NOW, scene.vol.root, b"s", 0o644, ROOT)
    for block in reversed(range(2 * RUNS_AT_ONCE)):
        fileops.write(scene.vol, NOW, inode, block * B, b"y" * B)
    inode.opens += 1
    scene.pin = holding.pin(
        scene.vol, NOW, inode, 0, 2 * RUNS_AT_ONCE * B, abi.FOLL_PIN, OWNER, ME, writable=True
    )
    scene.vol.settings.policy = "busy"
    fileops.truncate(scene.vol, NOW, inode, 0)


def _unlinked(scene: Scene) -> None:
    namespace.unlink(scene.vol, NOW, scene.vol.root, b"f")


def _close(scene: Scene) -> None:
    scene.file.opens = 0
    fileops.reap(scene.vol, NOW, scene.file)


def _link(scene: Scene) -> None:
    scene.file = namespace.symlink(scene.vol, NOW, scene.vol.root, b"l", b"to", ROOT)
    namespace.unlink(scene.vol, NOW, scene.vol.root, b"l")


def _xattr(scene: Scene) -> None:
    attributes.setxattr(scene.vol, NOW, scene.file, b"user.large", b"v" * 3 * B)


def _retired(scene: Scene) -> None:
    scene.run = scene.vol.alloc.runs()[-1][0], 1
    poison.inject(scene.vol, *scene.run)


def _ledger(scene: Scene) -> None:
    """A chain of ledger blocks that has become longer than it need be."""
    vol = scene.vol
    for n in range(2 * B // 64):
        vol.ledger.insert(NOW, n, [(vol.data_blocks.start, 1)], 1, abi.FOLL_PIN, 1, scene.ino)
    assert len(vol.ledger.blocks) > 1
    vol.ledger.void([at for block in vol.ledger.blocks for at in range(block * B + 64, (block + 1) * B, 64)
                     if at not in vol.ledger._free])  # fmt: skip


FREES: dict[str, tuple[Callable[..., Any], Callable[[Scene], object], Callable[[Scene], object], int]] = {
    "truncate": (fileops.truncate, lambda s: None, lambda s: fileops.truncate(s.vol, NOW, s.file, B), SPACE),
    "setattr": (
        attributes.setattr, lambda s: None,
        lambda s: attributes.setattr(s.vol, NOW, s.file, attributes.Attributes(size=0)), SPACE,
    ),
    "punch": (fileops.fallocate, lambda s: None, lambda s: fileops.fallocate(s.vol, NOW, s.file, PUNCH, B, B), SPACE),
    "last close without a name": (fileops.reap, _unlinked, _close, SPACE),
    "the same of a file without blocks": (fileops.reap, _link, _close, SPACE),
    "attributes are removed": (
        attributes.removexattr, _xattr, lambda s: attributes.removexattr(s.vol, NOW, s.file, b"user.large"), SPACE,
    ),
    "attributes become small": (
        attributes.setxattr, _xattr, lambda s: attributes.setxattr(s.vol, NOW, s.file, b"user.large", b"v"), SPACE,
    ),
    "delayed free": (Volume.free_unpinned, _due, lambda s: s.vol.free_unpinned(NOW, 64), SPACE),
    "a bad block is sound again": (poison.clear, _retired, lambda s: poison.clear(s.vol, *s.run), SPACE),
    "the ledger is cut": (Volume.give, _ledger, lambda s: s.vol.ledger.trim(NOW), SPACE),
    "unpin of busy blocks": (holding.unpin, _busy, lambda s: holding.unpin(s.vol, NOW, OWNER, s.pin.id), DUE),
    "unpin of very many runs": (holding.unpin, _scattered, lambda s: holding.unpin(s.vol, NOW, OWNER, s.pin.id), DUE),
}  # fmt: skip


@pytest.mark.parametrize("what", FREES)
def test_what_frees_says_so(vol: Volume, what: str) -> None:
    scene = Scene(vol)
    _, prepare, act, heard = FREES[what]
    prepare(scene)
    scene.moves.clear()
    free = vol.free + len(vol.free_inodes)
    act(scene)
    assert heard in scene.moves
    assert heard == DUE or vol.free + len(vol.free_inodes) > free
    while vol.free_unpinned(NOW, 64):
        pass
    vol.check()


def test_an_aborted_call_frees_nothing_new(vol: Volume) -> None:
    """Two calls that wait for space would wake each other for ever."""
    scene = Scene(vol)
    scene.moves.clear()
    with pytest.raises(NoSpace):
        fileops.fallocate(vol, NOW, scene.file, 0, 0, 2 * vol.blocks * B)
    with pytest.raises(Abort), vol.transaction(NOW) as txn:
        txn.take(8)
        vol.new_inode(txn, 0o100644, 0, 0)
        raise Abort
    assert scene.moves == []


# -- no verb is forgotten --

QUIET = {
    "they look, and change nothing": {
        fileops.read, fileops.seek, fileops.note_access, namespace.index, namespace.lookup, namespace.entries,
        namespace.readlink, namespace.index_is_empty, attributes.getxattr, attributes.listxattr, breaking.check_hold,
        breaking.policy_of, breaking.outcome_of, fileops.clear_resize,
    },
    "they take space, or change what is there in place": {
        fileops.write, fileops.overwrite, fileops.materialise, fileops.copy_range, namespace.create, namespace.mkdir,
        namespace.symlink, namespace.tmpfile, namespace.link, attributes.times_of_writes, holding.pin, holding.take_lease,
    },
    "what they give up ends with its last reference, in `reap`; a directory's blocks go by way of `Volume.release`": {
        namespace.unlink, namespace.rmdir, namespace.rename,
    },
    "part of `setattr`": {fileops.resize},
    "of runs alone": {poison.outside},
}  # fmt: skip


def test_every_verb_is_in_a_table() -> None:
    verbs = {
        function
        for module in (fileops, namespace, attributes, holding, breaking, poison)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    }
    quiet = set().union(*QUIET.values())
    loud = {case.verb for case in ENDS.values()} | {case[0] for case in FREES.values()}
    assert verbs - quiet - loud == set(), "does a new verb end what a call may wait for? Put it into ENDS, FREES or QUIET"
    assert quiet <= verbs
    assert not quiet & loud


def test_only_the_table_changes_a_pins_state(vol: Volume) -> None:
    scene = Scene(vol)
    a_pin(scene)
    with pytest.raises(AttributeError):
        scene.pin.state = "revoked"  # type: ignore[misc, assignment]


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a valid Awaited"):
        LayoutBusy("wait", 0, 1)  # type: ignore[arg-type]
