"""The compiled code follows an extent map without looking: no map that leaves the image, or wraps, may come to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import layout
from daxfs.core.extents import ExtentMap
from daxfs.core.layout import EXTENT

FIRST, LIMIT = 20, 256
MAX = (1 << 64) - 1
edges = st.sampled_from([0, 1, 19, 20, 100, 255, 256, (1 << 32) - 1, 1 << 47, 1 << 48, 1 << 51, 1 << 52, 1 << 63, MAX])
numbers = edges | st.integers(0, 300) | st.integers(0, MAX)
counts = st.sampled_from([0, 1, 2, 236, 237, (1 << 32) - 1]) | st.integers(0, 300)
extents = st.tuples(numbers, numbers, counts, st.integers(0, 3))


def load(block_size: int, *pieces: tuple[int, int, int, int]) -> ExtentMap:
    found = ExtentMap(layout.leaf_capacity(block_size), block_size.bit_length() - 1)
    data = b"".join(EXTENT.struct.pack(*piece) for piece in pieces)
    found.append_leaf(data, len(pieces), 0, 0, FIRST, LIMIT)
    return found


@given(st.lists(extents, min_size=1, max_size=4), st.sampled_from(layout.BLOCK_SIZES))
def test_what_is_believed_is_within_bounds(pieces: list[tuple[int, int, int, int]], block_size: int) -> None:
    try:
        found = load(block_size, *pieces)
    except ValueError:
        return
    end = 0
    for logical, physical, count, flags in found:
        assert FIRST <= physical < physical + count <= LIMIT
        assert end <= logical < logical + count <= (1 << 63) // block_size
        assert flags in (0, layout.EXTENT_UNWRITTEN)
        end = logical + count


@pytest.mark.parametrize("block_size", layout.BLOCK_SIZES)
def test_bytes_of_a_file_do_not_wrap(block_size: int) -> None:
    """At 64 KiB the block 2**48 starts at byte 2**64: the hot path would take it for the start of the file."""
    last = (1 << 63) // block_size - 1
    assert list(load(block_size, (last, FIRST, 1, 0)))
    for logical, count in ((last, 2), (last + 1, 1), ((1 << 64) // block_size, 1), ((1 << 64) - 1, 1)):
        with pytest.raises(ValueError, match="behind the largest file"):
            load(block_size, (logical, FIRST, count, 0))


@pytest.mark.parametrize(("physical", "count"), [
    (0, 1), (FIRST - 1, 1), (FIRST - 1, 2), (LIMIT, 1), (LIMIT - 1, 2), (FIRST, LIMIT), (MAX, 1), (MAX - 8, 40),
    (1 << 63, 1),
])  # fmt: skip
def test_blocks_outside_the_data_are_refused(physical: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside the image"):
        load(4096, (0, physical, count, 0))
