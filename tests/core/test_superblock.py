"""The superblock: two copies in turns, and every value of it is doubted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import layout, superblock
from daxfs.core.format import format_image
from daxfs.core.layout import BLOCK_SIZES, SUPERBLOCK
from daxfs.core.pmem import Pmem
from daxfs.core.superblock import Superblock
from daxfs.errors import ImageError

from .image import NOW
from .power import DyingPmem

SIZE = 8 << 20


@pytest.fixture
def pmem(tmp_path: Path) -> Iterator[DyingPmem]:
    path = tmp_path / "image"
    format_image(path, SIZE, now=NOW)
    medium = DyingPmem(path)
    yield medium
    medium.close()


def put(pmem: Pmem, place: int, values: Superblock, **changes: int | bytes) -> None:
    """A sealed copy with some values changed."""
    changed = {**values, "copy": place, **changes}
    pmem.store(place * values["block_size"], layout.seal(SUPERBLOCK.pack(**{**changed, "magic": layout.SB_MAGIC, "crc": 0})))


def refusal(pmem: Pmem) -> str:
    with pytest.raises(ImageError) as refused:
        superblock.load(pmem)
    why = refused.value.why
    assert "\n" not in why
    assert pmem.path in why
    return why


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_either_copy_is_enough(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "image"
    format_image(path, max(1 << 20, 64 * block_size), block_size=block_size, now=NOW)
    for copy in (0, 1):
        pmem = Pmem(path)
        both = superblock.load(pmem)
        saved = pmem.load(copy * block_size, 512)
        pmem.fill_zero(copy * block_size, 512)
        one = superblock.load(pmem)
        assert {k: v for k, v in one.items() if k not in ("copy", "sequence", "crc")} == {
            k: v for k, v in both.items() if k not in ("copy", "sequence", "crc")
        }
        pmem.store(copy * block_size, saved)
        pmem.close()


def test_copies_are_written_in_turns(pmem: DyingPmem) -> None:
    sb = superblock.load(pmem)
    for mounts in range(1, 6):
        sb["mounts"] = mounts
        superblock.store(pmem, sb)
        loaded = superblock.load(pmem)
        assert loaded["mounts"] == mounts
        assert loaded["copy"] == loaded["sequence"] % 2
        other = SUPERBLOCK.unpack(pmem.view, (1 - loaded["copy"]) * 4096)
        assert other["sequence"] == loaded["sequence"] - 1


def test_a_torn_store_leaves_the_other_copy(pmem: DyingPmem) -> None:
    sb = superblock.load(pmem)
    before = pmem.load(0, 8192)
    superblock.store(pmem, sb | {"mounts": 99})
    after = pmem.load(0, 8192)
    changed = [at for at in range(8192) if before[at] != after[at]]
    seen = []
    for cut in changed:
        pmem.store(0, before)
        pmem.store(changed[0], after[changed[0] : cut])
        seen.append(superblock.load(pmem)["mounts"])
    assert set(seen) == {0}
    pmem.store(0, after)
    assert superblock.load(pmem)["mounts"] == 99


def both_copies(pmem: Pmem, change: Callable[[Superblock], dict[str, int | bytes]]) -> None:
    sb = superblock.load(pmem)
    for copy in (0, 1):
        put(pmem, copy, sb, **change(sb))


NONSENSE: dict[str, tuple[Callable[[Superblock], dict[str, int | bytes]], str]] = {
    "newer": (lambda sb: {"version": 99}, "newer than 1; update daxfs"),
    "unknown feature": (lambda sb: {"incompat": 4}, "features that this daxfs does not know"),
    "read-only feature": (lambda sb: {"ro_compat": 4}, "mount it with -o ro"),
    "version 0": (lambda sb: {"version": 0}, "makes no sense"),
    "another kind": (lambda sb: {"kind": b"something else"}, "makes no sense"),
    "truncated": (lambda sb: {"blocks": sb["blocks"] + 1}, "is truncated"),
    "no blocks": (lambda sb: {"blocks": 0}, "makes no sense"),
    "journal elsewhere": (lambda sb: {"journal_start": 3}, "journal region makes no sense"),
    "journal of one block": (lambda sb: {"journal_blocks": 1}, "journal region makes no sense"),
    "huge journal": (lambda sb: {"journal_blocks": 1 << 63}, "journal region makes no sense"),
    "idir elsewhere": (lambda sb: {"idir_start": sb["idir_start"] + 1}, "idir region makes no sense"),
    "no idir": (lambda sb: {"idir_blocks": 0}, "idir region makes no sense"),
    "data elsewhere": (lambda sb: {"data_start": sb["data_start"] + 1}, "data region makes no sense"),
    "unknown state": (lambda sb: {"state": 2}, "data region makes no sense"),
    "ledger in the journal": (lambda sb: {"ledger": 3}, "pin ledger lies outside"),
    "no ledger": (lambda sb: {"ledger": 0}, "pin ledger lies outside"),
    "ledger outside": (lambda sb: {"ledger": sb["blocks"]}, "pin ledger lies outside"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_in_one_line(pmem: DyingPmem, what: str) -> None:
    change, says = NONSENSE[what]
    both_copies(pmem, change)
    assert says in refusal(pmem)


def test_a_read_only_feature_can_be_read(pmem: DyingPmem) -> None:
    both_copies(pmem, lambda sb: {"ro_compat": 4, "compat": 1 << 60})
    pmem.readonly = True
    assert superblock.load(pmem)["ro_compat"] == 4


def test_a_block_size_that_is_none(pmem: DyingPmem) -> None:
    sb = superblock.load(pmem)
    pmem.fill_zero(4096, 512)
    put(pmem, 0, sb, block_size=1234)
    assert "block size 1234" in refusal(pmem)


def test_a_copy_in_the_wrong_place_does_not_count(pmem: DyingPmem) -> None:
    sb = superblock.load(pmem)
    put(pmem, 0, sb, copy=1)
    put(pmem, 1, sb, block_size=8192)
    assert "not a daxfs image" in refusal(pmem)


def test_damage_zeros_and_other_things_are_told_apart(pmem: DyingPmem) -> None:
    pmem.store(40, b"x")
    pmem.store(4096 + 40, b"x")
    assert "both superblocks are damaged" in refusal(pmem)
    pmem.fill_zero(0, 1 << 16)
    assert "is empty (zeros)" in refusal(pmem)
    pmem.store(0, b"\x7fELF")
    assert "is not a daxfs image" in refusal(pmem)


@given(at=st.integers(0, 511), byte=st.integers(1, 255))
def test_no_single_flip_is_believed(pmem: DyingPmem, at: int, byte: int) -> None:
    """A changed byte in the newer copy: the older one is used."""
    newest = superblock.load(pmem)
    place = newest["copy"] * 4096 + at
    pmem.view[place] ^= byte
    assert superblock.load(pmem)["sequence"] == newest["sequence"] - 1
    pmem.view[place] ^= byte


@given(values=st.dictionaries(st.sampled_from([f.name for f in SUPERBLOCK.fields if f.code in "IQ" and f.name != "crc"]),
                              st.one_of(st.integers(0, 40), st.integers(0, (1 << 32) - 1)), max_size=4))  # fmt: skip
def test_any_values_are_taken_or_refused(pmem: DyingPmem, values: dict[str, int | bytes]) -> None:
    saved = pmem.load(0, 8192)
    sb = superblock.load(pmem)
    for copy in (0, 1):
        put(pmem, copy, sb, **{k: v for k, v in values.items() if k != "copy"})
    try:
        got = superblock.load(pmem)
    except ImageError as refused:
        got, why = {}, refused.why
    else:
        why = ""
    assert "\n" not in why
    if got:
        assert got["block_size"] in BLOCK_SIZES
        assert got["blocks"] * got["block_size"] <= pmem.size
        assert 2 < got["data_start"] <= got["ledger"] < got["blocks"]
    pmem.store(0, saved)
