"""The window: runs of an image as contiguous memory, and what becomes of views when it closes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxfs.client import PinError, Window

BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an image of 16 blocks; block n is full of the byte n."""
    path = tmp_path / "image"
    path.write_bytes(b"".join(bytes([n]) * BLOCK for n in range(16)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def mappings() -> str:
    return Path("/proc/self/maps").read_text()


def test_pieces_are_contiguous_and_in_order(image: int) -> None:
    with Window(image, [(9, 2), (3, 1), (12, 2)], BLOCK, writable=False) as view:
        assert view.readonly
        assert len(view) == 5 * BLOCK
        assert bytes(view) == b"".join(bytes([n]) * BLOCK for n in (9, 10, 3, 12, 13))


def test_stores_reach_the_image(image: int) -> None:
    with Window(image, [(5, 1), (2, 1)], BLOCK, writable=True) as view:
        view[BLOCK - 2 : BLOCK + 2] = b"abcd"
    assert os.pread(image, 2, 6 * BLOCK - 2) == b"ab"
    assert os.pread(image, 2, 2 * BLOCK) == b"cd"


def test_a_slice_that_outlives_the_window_is_dead(image: int) -> None:
    window = Window(image, [(7, 1)], BLOCK, writable=True)
    piece = window.view[:10]
    assert bytes(piece) == b"\7" * 10
    window.close()
    window.close()
    assert window.closed
    assert bytes(piece) == bytes(10)
    piece[:] = b"x" * 10
    assert os.pread(image, 10, 7 * BLOCK) == b"\7" * 10
    with pytest.raises(ValueError, match="released"):
        len(window.view)


def test_nothing_stays_mapped(image: int, tmp_path: Path) -> None:
    with Window(image, [(1, 1), (4, 1)], BLOCK, writable=True):
        assert str(tmp_path / "image") in mappings()
    assert str(tmp_path / "image") not in mappings()


@pytest.mark.parametrize(("runs", "code"), [([], errno.EINVAL), ([(15, 2)], errno.ENXIO), ([(1 << 40, 1)], errno.ENXIO)])
def test_runs_that_cannot_be_mapped(image: int, runs: list[tuple[int, int]], code: int) -> None:
    before = mappings().count("\n")
    with pytest.raises(PinError) as caught:
        Window(image, runs, BLOCK, writable=True)
    assert caught.value.errno == code
    assert mappings().count("\n") <= before + 1


def test_a_read_only_image_gives_no_writable_window(image: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    try:
        with pytest.raises(PinError) as caught:
            Window(fd, [(1, 1)], BLOCK, writable=True)
        assert caught.value.errno == errno.EACCES
        assert str(tmp_path / "image") not in mappings()
    finally:
        os.close(fd)
