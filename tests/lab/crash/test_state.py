"""The oracle of the crash explorer: it sees every difference that must not be, and allows what is not promised."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from unittest import mock

import pytest

from daxfs.core import fileops
from daxfs.core.volume import Volume
from daxfs.lab.crash import calls, sequences
from daxfs.lab.crash.calls import ALPHABET, World
from daxfs.lab.crash.medium import RecordingPmem
from daxfs.lab.crash.state import MULTIPLE, Node, State, explains, faults, state_of, tails

from .test_calls import ENABLED_BY, begin, play

B = calls.BLOCK
# Calls that change nothing that outlives a power cut.
UNSEEN = {
    "open_frag", "open_new", "close_a", "close_b", "close_held", "close_stray", "close_frag", "close_tmp", "tmpfile",
    "write_tmp", "pin", "pin_write", "unpin", "unpin_held", "unpin_stray", "free_some", "free_all", "remount", "reboot",
    "die", "release",
}  # fmt: skip


def after_power_cut(world: World) -> Volume:
    """The image as if every store had been durable, mounted on the next boot."""
    medium = RecordingPmem(calls.IMAGE_SIZE)
    medium.put(world.volume.pmem.load(0, calls.IMAGE_SIZE))
    return Volume.open(medium, now=world.now, boot_id=b"another boot's ID")


def around(name: str) -> tuple[State, State]:
    """The states before and after a call that works."""
    world = begin()
    play(world, *ENABLED_BY.get(name, ()))
    before = state_of(world.volume)
    assert play(world, name)[0].errno == 0
    return recovered(before), recovered(state_of(world.volume))


def recovered(state: State) -> State:
    """What a live volume would be after a crash that loses nothing."""
    return replace(state, unowned=0, clean=False)


def changed(state: State, path: bytes, **fields: object) -> State:
    node = state.nodes[path]._replace(**fields)  # type: ignore[arg-type]
    return replace(state, nodes={**state.nodes, path: node})


def with_data(node: Node, offset: int, data: bytes) -> Node:
    """Other bytes in the first written range."""
    (first, count, old), *rest = node.data
    return node._replace(data=((first, count, old[:offset] + data + old[offset + len(data) :]), *rest))


@pytest.mark.parametrize("name", ALPHABET)
def test_what_a_call_does_is_seen(name: str) -> None:
    before, after = around(name)
    assert (before.nodes == after.nodes) == (name in UNSEEN)
    assert explains(after, before, after, ALPHABET[name], returned=True) is None
    assert explains(before, before, after, ALPHABET[name]) is None
    if name not in UNSEEN:
        why = explains(before, before, after, ALPHABET[name], returned=True)
        assert why is not None
        assert "returned" in why


@pytest.mark.parametrize("seed", range(3))
def test_memory_and_media_have_the_same_state(seed: int) -> None:
    for sequence in islice(sequences.generated(seed), 8):
        world = begin()
        for name in sequence:
            play(world, name)
            found = state_of(after_power_cut(world))
            assert found.nodes == state_of(world.volume).nodes, (sequence, name)
            assert (found.unowned, found.busy, found.clean) == (0, 0, False), (sequence, name)
            assert faults(found) is None


def test_reading_the_state_changes_nothing() -> None:
    world = begin()
    image = world.volume.pmem.load(0, calls.IMAGE_SIZE)
    assert state_of(world.volume) == state_of(world.volume)
    assert world.volume.pmem.load(0, calls.IMAGE_SIZE) == image


def test_blocks_of_unlinked_open_files_are_nobodys_of_the_tree() -> None:
    world = begin()
    play(world, "unlink_file")
    assert state_of(world.volume).unowned == 4
    found = state_of(after_power_cut(world))
    assert found.unowned == 0
    assert faults(replace(found, unowned=4)) == "4 blocks are nobody's, and not free"


@pytest.mark.parametrize("field", Node._fields)
def test_every_field_counts(field: str) -> None:
    before, after = around("chmod")
    path = b"/file"
    other = {"times": (1, 2, 3), "target": b"x", "xattrs": ((b"user.x", b""),), "data": (), "unwritten": ((9, 1),)}
    found = changed(after, path, **{field: other.get(field, 12345)})
    assert explains(found, before, after, ALPHABET["chmod"]) is not None
    assert explains(found, before, after, ALPHABET["write"]) is not None, "no call in place may leave it either"


def test_a_call_is_not_half_there() -> None:
    before, after = around("rename_exchange")
    half = replace(before, nodes={**before.nodes, b"/file": after.nodes[b"/file"]})
    assert "names" not in (explains(half, before, after) or "")
    assert explains(half, before, after) is not None
    both = replace(before, nodes={**before.nodes, b"/dir/renamed": before.nodes[b"/short"]})
    assert "link count is 2, and it has 3" in (explains(both, *around("rename")) or "")
    neither = replace(before, nodes={path: node for path, node in before.nodes.items() if path != b"/short"})
    assert "link count is 2, and it has 1" in (explains(neither, *around("rename")) or "")
    missing = replace(before, nodes={path: node for path, node in before.nodes.items() if path != b"/file"})
    assert explains(missing, *around("write"), ALPHABET["write"]) == (
        "neither before nor after: of what was before /file is missing; of what comes after /file is missing"
    )


@pytest.mark.parametrize(("path", "fields", "why"), [
    (b"/dir", {"nlink": 2}, "/dir: its link count is 2, and it has 3"),
    (b"/dir/sub", {"parent": 1}, "/dir/sub: its .. is inode 1"),
    (b"/short", {"nlink": 1}, "its link count is 1, and it has 2"),
    (b"/empty", {"ino": 2}, "a directory with 2 names"),
])  # fmt: skip
def test_a_tree_that_contradicts_itself(path: bytes, fields: dict[str, int], why: str) -> None:
    """Even if it is what was expected."""
    world = begin()
    assert world.find(b"/dir").ino == 2
    state = changed(recovered(state_of(world.volume)), path, **fields)
    assert why in (explains(state, state, state) or "")


def test_an_overwrite_may_be_mixed_word_by_word() -> None:
    before, after = around("write")  # 8192 bytes at 1000 of /file
    call, path = ALPHABET["write"], b"/file"
    old, new = before.nodes[path], after.nodes[path]
    word = new.data[0][2][4000:4008]
    assert word != old.data[0][2][4000:4008]
    mixed = with_data(old, 4000, word)
    for times in (old.times, new.times, (new.times[0], old.times[1], old.times[2])):
        seen = replace(before, nodes={**before.nodes, path: mixed._replace(times=times)})
        assert explains(seen, before, after, call) is None
    seen = replace(before, nodes={**before.nodes, path: mixed})
    assert explains(seen, before, after, call, returned=True) is not None
    assert explains(seen, before, after, ALPHABET["truncate_down"]) is not None, "no other call may"


@pytest.mark.parametrize(("offset", "data", "why"), [
    (4000, bytes(8), "the 8 bytes at block 0 + 4000 are neither old nor new"),
    (4001, b"\0", "the 8 bytes at block 0 + 4000 are neither old nor new"),
    (9300, b"foreign!", "the 8 bytes at block 0 + 9296 are neither old nor new"),
    (12380, b"past", "the 8 bytes at block 0 + 12376 are neither old nor new"),
])  # fmt: skip
def test_an_overwrite_leaves_no_foreign_bytes(offset: int, data: bytes, why: str) -> None:
    before, after = around("write")
    nodes = {**before.nodes, b"/file": with_data(before.nodes[b"/file"], offset, data)}
    assert explains(replace(before, nodes=nodes), before, after, ALPHABET["write"]) == f"/file: {why}"


def test_half_a_word_is_not_new() -> None:
    before, after = around("write_word")
    new = after.nodes[b"/file"].data[0][2][B : B + 8]
    nodes = {**before.nodes, b"/file": with_data(before.nodes[b"/file"], B, new[:4])}
    why = explains(replace(before, nodes=nodes), before, after, ALPHABET["write_word"])
    assert why == "/file: the 8 bytes at block 0 + 4096 are neither old nor new"


def test_an_overwrite_that_allocates_is_whole_once_it_shows() -> None:
    """write_gap overwrites 40 bytes on each side of a hole and fills it: the hole's part comes with the transaction."""
    before, after = around("write_gap")
    call, path = ALPHABET["write_gap"], b"/frag"
    old, new = before.nodes[path], after.nodes[path]
    assert len(new.data) == len(old.data) - 1
    mixed = with_data(old, B - 40, new.data[0][2][B - 40 : B])
    assert explains(replace(before, nodes={**before.nodes, path: mixed}), before, after, call) is None
    late = mixed._replace(times=new.times)
    assert explains(replace(before, nodes={**before.nodes, path: late}), before, after, call) is not None
    torn = with_data(new, B - 40, old.data[0][2][B - 40 : B])
    why = explains(replace(after, nodes={**after.nodes, path: torn}), before, after, call)
    assert why is not None
    assert why.startswith("/frag: ")


def test_a_zeroed_range_under_a_pin() -> None:
    """Pinned blocks are zeroed in place, idle ones become unwritten with the transaction: these are old or all new."""
    before, after = around("zero_held")
    call, path = ALPHABET["zero_held"], b"/held"
    old = before.nodes[path]
    assert after.nodes[path].unwritten == ((0, 1), (3, 1))
    pinned = with_data(old, B + 8, bytes(8))
    assert explains(replace(before, nodes={**before.nodes, path: pinned}), before, after, call) is None
    idle = with_data(old, 8, bytes(8))
    assert explains(replace(before, nodes={**before.nodes, path: idle}), before, after, call) is not None


def test_only_times_of_an_access_are_apart() -> None:
    before, after = around("unpin_dirty")
    old, new = before.nodes[b"/file"].times, after.nodes[b"/file"].times
    assert [a == b for a, b in zip(old, new, strict=True)] == [False, False, True]
    half = changed(before, b"/file", times=(new[0], old[1], old[2]))
    assert explains(half, before, after, ALPHABET["unpin_dirty"]) is None
    assert explains(half, before, after, ALPHABET["chmod"]) is not None


def test_calls_in_place_are_those_that_must_be() -> None:
    """Those that store data in a file, or its times; each changes one file."""
    verbs = ("write", "append", "copy", "zero", "unpin_dirty")
    for name, call in ALPHABET.items():
        assert call.in_place == name.startswith(verbs), name
        if call.in_place:
            before, after = around(name)
            assert before.nodes.keys() == after.nodes.keys()
            different = {node.ino for path, node in before.nodes.items() if node != after.nodes[path]}
            assert len(different) == (name != "write_tmp"), name


def test_an_append_is_whole_where_it_is_new() -> None:
    """Marked as in place, since there may be data where it goes; if there is none, there is nothing to mix."""
    before, after = around("append")
    call, path = ALPHABET["append"], b"/short"
    grown = after.nodes[path]
    assert call.in_place
    old = before.nodes[path]
    for lost in (with_data(grown, 104, bytes(8)), old._replace(size=grown.size), old._replace(data=grown.data),
                 with_data(old, 0, b"changed!")):  # fmt: skip
        nodes = {**before.nodes, path: lost, b"/dir/hard": lost}
        assert explains(replace(before, nodes=nodes), before, after, call) is not None


def test_the_table_of_verbs_with_several_transactions() -> None:
    """Its reasons are about calls that there are."""
    verbs = {verb for verbs in MULTIPLE for verb in verbs.split(", ")}
    assert all(any(name.startswith(verb) for name in ALPHABET) for verb in verbs)
    assert verbs == {"create", "mkdir", "mknod", "symlink", "tmpfile", "unlink", "rename", "rmdir", "close", "pin",
                     "unpin", "copy", "remount", "reboot", "die", "release"}  # fmt: skip


def test_tails() -> None:
    """What lies behind the end of file stays hidden when it grows; if it did not, it would be seen."""
    world = begin()
    inode = world.find(b"/short")
    world.volume.pmem.store(inode.block(0) * B + 200, b"garbage")
    assert tails(world.volume, world.now) is None
    assert inode.size == B
    world = begin()
    inode = world.find(b"/short")
    world.volume.pmem.store(inode.block(0) * B + 200, b"garbage")
    with mock.patch.object(fileops, "_zero_old_tail", return_value=None):
        assert tails(world.volume, world.now) == "/short: what lies behind its old end of 100 bytes shows when it grows"


def test_a_crash_does_not_pass_for_an_unmount() -> None:
    before, after = around("chmod")
    call, unmount = ALPHABET["chmod"], ALPHABET["remount"]
    why = "the crash of a mounted volume passes for a clean unmount"
    assert explains(replace(before, clean=True), before, after, call) == why
    assert explains(replace(before, clean=True), before, after, unmount) is None
    assert explains(replace(after, clean=True), before, after, unmount, returned=True) == why
