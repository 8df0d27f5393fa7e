"""What the native session may do by itself, by medium: it stores and flushes, so a fence that does more needs Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from daxfs.core import fileops, namespace
from daxfs.core.extents import HOT_READ, HOT_WRITE
from daxfs.core.format import format_image
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume

SIZE = 4 << 20


@pytest.mark.parametrize(
    ("how", "hot"),
    [({}, HOT_READ | HOT_WRITE), ({"hostsync": True}, HOT_READ), ({"readonly": True}, HOT_READ)],
    ids=["plain", "hostsync", "readonly"],
)
def test_an_open_file(how: dict[str, bool], hot: int, tmp_path: Path) -> None:
    image = tmp_path / "image"
    format_image(image, SIZE, now=0)
    volume = Volume.open(image, now=0)
    inode = namespace.create(volume, 0, volume.root, b"f", 0o100644, Caller(0, 0, 0))
    fileops.write(volume, 0, inode, 0, b"x" * 4096)
    volume.close(0)
    volume = Volume.open(image, now=0, **how)
    found = namespace.lookup(volume, volume.root, b"f")
    assert found is not None
    found.opens = 1
    found.set_hot()
    assert found.map.hot == hot
    found.opens = 0
    found.set_hot()
    assert not found.map.hot
    volume.close(0)
