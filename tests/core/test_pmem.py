"""The image as a medium: what the host is asked for, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daxfs.core import pmem
from daxfs.core.pmem import Pmem
from daxfs.errors import NoSpace

PART = 1 << 20


def sparse(path: Path, parts: int, data: bytes, at: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(parts * PART)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def test_a_hole_is_made_whole_at_once_and_data_is_left_alone(tmp_path: Path) -> None:
    medium = Pmem(sparse(tmp_path / "image", 5, b"data" * 1024, PART + 8192))
    try:
        before = os.stat(medium.path).st_blocks
        medium.reserve(100, 4096)
        assert (os.stat(medium.path).st_blocks - before) * 512 >= PART, "all of part 0 is on the host's disk"
        medium.reserve(PART, 4096)
        medium.reserve(2 * PART - 8, 16)
        medium.reserve(3 * PART + 8, 2 * PART - 8)
        assert list(medium._parts) == [pmem._POPULATED, pmem._RESERVED, *[pmem._POPULATED] * 3]
        medium.reserve(0, 2 * PART)
        assert set(medium._parts) == {pmem._POPULATED}
        want = bytearray(5 * PART)
        want[PART + 8192 : PART + 12288] = b"data" * 1024
        assert medium.load(0, 5 * PART) == bytes(want), "nothing has changed"
    finally:
        medium.close()


def test_a_full_disk_has_no_more_than_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    medium = Pmem(sparse(tmp_path / "image", 2, b"x" * 4096, 0))
    try:
        monkeypatch.setattr(Pmem, "_reserve", lambda _, at, n: at + n <= 4096)
        medium.reserve(0, 4096)
        with pytest.raises(NoSpace):
            medium.reserve(4096, 4096)
        with pytest.raises(NoSpace):
            medium.reserve(PART - 4096, 8192)
        assert set(medium._parts) == {pmem._UNKNOWN}
    finally:
        medium.close()


def test_a_closed_image_refuses(tmp_path: Path) -> None:
    medium = Pmem(sparse(tmp_path / "image", 1, b"", 0))
    medium.close()
    with pytest.raises(ValueError, match="image"):
        medium.store(0, b"late")
    with pytest.raises(ValueError, match="image"):
        medium.load_word(0)
