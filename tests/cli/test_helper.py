"""mount.daxfs: how mount(8) calls are understood, and that they mount."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daxfs.cli import helper


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["a.img", "/mnt"], ["mount", "--image", "a.img", "/mnt"]),
        (["a.img", "/mnt", "-o", "rw,noauto,x-systemd.automount"], ["mount", "--image", "a.img", "/mnt", "-o", "rw"]),
        (["-s", "a.img", "/mnt", "-o", "ro,allow_other"],
         ["mount", "--image", "a.img", "/mnt", "-o", "ro", "-o", "allow_other"]),
        (["a.img", "/mnt", "-o", "image_size=64M,policy=busy"],
         ["mount", "--image", "a.img", "/mnt", "--size", "64M", "--policy", "busy"]),
        (["a.img", "/mnt", "-t", "fuse.daxfs"], ["mount", "--image", "a.img", "/mnt"]),
        (["pins", "/mnt", "--json"], None),
        (["a.img"], None),
    ],
)  # fmt: skip
def test_calls_of_mount_are_translated(given: list[str], meant: list[str] | None) -> None:
    assert helper.translate(given) == meant


@pytest.mark.mount
def test_mounts_as_mount_fuse_calls_it(tmp_path: Path) -> None:
    image, place = tmp_path / "x.img", tmp_path / "mnt"
    place.mkdir()
    command = [sys.executable, "-m", "daxfs.cli"]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    options = "rw,noauto,image_size=16M"
    subprocess.run([*command, str(image), str(place), "-o", options], check=True, env=environment)
    try:
        assert os.path.ismount(place)
        assert image.stat().st_size == 16 << 20
    finally:
        subprocess.run([*command, "umount", str(place)], check=True, env=environment)
