"""What the client says where there is no daxfs: errors that are OSErrors, with the path and one line that helps."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from daxfs import client


@pytest.mark.parametrize("ask", [client.info, client.pins, client.busy, client.open])
def test_another_file_system(ask: object, tmp_path: Path) -> None:
    assert callable(ask)
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(client.PinError, match="not on a daxfs mount") as caught:
            ask(path)
        assert caught.value.errno == errno.ENOTTY
        assert caught.value.filename == str(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        client.open(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(client.PinError, match="neither a regular file nor a directory"):
        client.info(tmp_path / "fifo")


def test_modes() -> None:
    with pytest.raises(ValueError, match="mode 'w'"):
        client.open("/", "w")


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(client.PinError):
            client.open(tmp_path)
        with pytest.raises(client.PinError):
            client.busy(tmp_path)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    file = client.File(fd, "name")
    file.close()
    file.close()
    with pytest.raises(client.PinError, match="the file is closed"):
        file.pin(0, 4096)
