"""The alphabet: every call can succeed, does the same every time, and leaves a volume that proves its invariants."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from daxfs.core import fsck
from daxfs.core.layout import CHUNK_INODES
from daxfs.core.volume import Volume
from daxfs.errors import Corrupt, ReadOnly
from daxfs.lab.crash import calls, sequences, state
from daxfs.lab.crash.calls import ALPHABET, Outcome, World, perform
from daxfs.lab.crash.medium import RecordingPmem

# What has to come before, so that a call does what it is there for; all others can be the first one.
ENABLED_BY: dict[str, tuple[str, ...]] = {
    "unlink_new": ("create",), "rename_back": ("rename",), "rename_new": ("create",), "write_new": ("create",),
    "write_inner": ("create_inner",), "write_tmp": ("tmpfile",), "truncate_new": ("create",),
    "removexattr": ("setxattr",), "open_new": ("create",), "close_frag": ("open_frag",), "link_tmpfile": ("tmpfile",),
    "close_tmp": ("tmpfile",), "pin_frag": ("open_frag",), "unpin": ("pin",), "unpin_dirty": ("pin_write",),
}  # fmt: skip


def begin() -> World:
    medium = RecordingPmem(calls.IMAGE_SIZE)
    medium.put(calls.base_image())
    return World.begin(Volume.open(medium, now=calls.START, boot_id=calls.BOOT))


def play(world: World, *names: str) -> list[Outcome]:
    return [perform(world, ALPHABET[name]) for name in names]


def prove(volume: Volume) -> None:
    volume.check()
    report = fsck.check(volume.pmem)
    assert report.errors == 0, [str(found) for found in report.findings]


def test_there_are_enough_calls_and_each_has_one_name() -> None:
    assert len(ALPHABET) >= 50
    assert all(call.name == name for name, call in ALPHABET.items())
    assert set(ENABLED_BY) < set(ALPHABET)


@pytest.mark.parametrize("name", ALPHABET)
def test_a_call_does_its_work(name: str) -> None:
    world = begin()
    sequence = (*ENABLED_BY.get(name, ()), name)
    *_, last = play(world, *sequence)
    assert last.errno == 0
    prove(world.volume)
    assert bool(ENABLED_BY.get(name)) == bool(play(begin(), name)[0].errno), "the table above is not what it says"


def test_the_base_has_one_of_each() -> None:
    """What verbs treat differently is there; free blocks are dirty, so that what shows unwritten is seen."""
    world = begin()
    volume = world.volume
    prove(volume)
    assert len(volume.free_inodes) == 1
    assert volume.ino_end == CHUNK_INODES
    assert world.find(b"/frag").map.leaf_blocks()
    assert world.find(b"/suid").xattr_inline
    assert world.find(b"/chain").xattr_block
    assert world.find(b"/short").nlink == 2
    assert world.files["a"] is world.files["b"]
    assert (volume.pinned, volume.busy) == (3, 1)
    wide = world.find(b"/wide")
    play(world, "create_wide")
    assert wide.size == 2 * calls.BLOCK
    start, count = max(volume.alloc.free.runs(), key=lambda run: run[1])
    last = volume.pmem.load((start + count // 2) * calls.BLOCK, calls.BLOCK)
    assert set(last) == {0xEE}


def test_the_base_image_is_the_same_every_time() -> None:
    first = calls.base_image()
    calls.base_image.cache_clear()
    assert calls.base_image() == first


def test_a_sequence_does_the_same_every_time() -> None:
    for sequence in islice(sequences.generated(3), 10):
        first, second = begin(), begin()
        assert play(first, *sequence) == play(second, *sequence)
        assert first.volume.pmem.load(0, calls.IMAGE_SIZE) == second.volume.pmem.load(0, calls.IMAGE_SIZE)


@pytest.mark.parametrize("seed", range(4))
def test_the_volume_is_sound_after_every_call(seed: int) -> None:
    for sequence in islice(sequences.generated(seed, 6, 16), 8):
        world = begin()
        for name in sequence:
            play(world, name)
            prove(world.volume)
            live = state.state_of(world.volume)
            assert state.faults(replace(live, unowned=0)) is None, (sequence, name)
            unlinked = sum(inode.blocks for inode in set(world.files.values()) if not inode.nlink)
            assert live.unowned >= unlinked, (sequence, name)


def test_a_failed_call_changes_nothing() -> None:
    failed = 0
    for sequence in islice(sequences.generated(5), 12):
        world = begin()
        for name in sequence:
            before = state.state_of(world.volume)
            if play(world, name)[0].errno:
                failed += 1
                assert state.state_of(world.volume) == before, (sequence, name)
    assert failed > 20


def test_damage_is_no_outcome() -> None:
    world = begin()
    frag = world.find(b"/frag")
    world.volume.pmem.store(frag.map.leaf_blocks()[0] * calls.BLOCK + 100, b"\1" * 8)
    world.volume.drop(frag)
    with pytest.raises(Corrupt):
        play(world, "truncate_frag")
    world.volume.fail("of this test")
    with pytest.raises(ReadOnly):
        play(world, "create")


# -- sequences --


def test_short_sequences_are_exhausted() -> None:
    assert [name for (name,) in sequences.exhaustive(1)] == list(ALPHABET)
    assert len(set(sequences.exhaustive(2))) == len(ALPHABET) ** 2


def test_a_sample_is_even_different_and_repeatable() -> None:
    sample = list(sequences.sampled(3, 5000, 7))
    assert len(set(sample)) == 5000
    assert sample == list(sequences.sampled(3, 5000, 7))
    assert sample != list(sequences.sampled(3, 5000, 8))
    for position in range(3):
        assert {sequence[position] for sequence in sample} == set(ALPHABET)
    assert sorted(sequences.sampled(1, 1 << 20, 1)) == sorted(sequences.exhaustive(1))


def test_generated_sequences_are_long_and_repeatable() -> None:
    some = list(islice(sequences.generated(11, 5, 9), 300))
    assert some == list(islice(sequences.generated(11, 5, 9), 300))
    assert {len(sequence) for sequence in some} == {5, 6, 7, 8, 9}
    assert {name for sequence in some for name in sequence} == set(ALPHABET)


def test_shrinking_finds_the_calls_that_matter() -> None:
    sequence = ("chmod", "create", "punch", "rename", "chmod", "unlink_new", "zero")

    def fails(shorter: sequences.Sequence) -> bool:
        return "create" in shorter and "unlink_new" in shorter[shorter.index("create") :]

    assert sequences.shrink(sequence, fails) == ("create", "unlink_new")
    assert sequences.shrink(("chmod",), lambda _: True) == ("chmod",)


def test_a_campaign_begins_with_what_is_exhausted() -> None:
    first = list(islice(sequences.campaign(1), len(ALPHABET) + 1))
    assert first == [*sequences.exhaustive(1), next(sequences.exhaustive(2))]
    count = len(ALPHABET) + len(ALPHABET) ** 2 + sequences.SAMPLED + 3
    assert sum(1 for _ in sequences.campaign(1, longer=3)) == count
