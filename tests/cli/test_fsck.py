"""`daxfs fsck` as people run it: exit codes of fsck(8), sentences, JSON, an interrupted repair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daxfs.cli.app import run
from daxfs.core.format import format_image
from tests.core.image import NOW
from tests.core.test_fsck import populate
from tests.core.test_repair import hurt


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from daxfs.core.volume import Volume

    path = tmp_path / "image"
    format_image(path, 4 << 20, now=NOW)
    volume = Volume.open(path, now=NOW)
    populate(volume)
    volume.close(NOW)
    return path


def spoken(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str]]:
    code = run(["fsck", *map(str, words)])
    return code, capsys.readouterr().out.splitlines()


def test_clean_damaged_repaired_clean(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = spoken(capsys, image)
    assert (code, len(lines)) == (0, 1)
    assert f"{image}: clean (" in lines[0]
    hurt(image, lambda m: m.set_inode("small", nlink=7))
    before = image.read_bytes()
    code, lines = spoken(capsys, image)
    assert code == 4
    assert lines[0] == "error: inode 4: link count 7 should be 2"
    assert "1 error; --repair corrects" in lines[-1]
    assert image.read_bytes() == before
    code, lines = spoken(capsys, image, "--repair")
    assert code == 1
    assert "fixed: inode 4: its link count is 2, not 7" in lines
    assert "1 error, all corrected" in lines[-1]
    for option in ((), ("-r",)):
        code, lines = spoken(capsys, image, *option)
        assert (code, len(lines)) == (0, 1)


def test_json(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hurt(image, lambda m: m.set_inode("small", nlink=7))
    for option, code, fixed in (((), 4, 0), (("--repair",), 1, 2), (("--repair",), 0, 0)):
        found, lines = spoken(capsys, "--json", image, *option)
        assert found == code
        said = json.loads("\n".join(lines))
        assert list(said) == ["image", "errors", "notes", "fixed", "left", "findings", "counts"]
        assert (said["image"], said["errors"], said["fixed"], said["left"]) == (str(image), int(code != 0), fixed, 0)
        assert len(said["findings"]) == said["errors"] + fixed


def test_what_is_left_is_said(image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that corrects nothing ends, and does not claim anything."""
    hurt(image, lambda m: m.set_inode("small", nlink=7))
    monkeypatch.setattr("daxfs.core.fsck.layers.Repair._repair", lambda self: None)
    code, lines = spoken(capsys, "--repair", image)
    assert code == 4
    assert "left: inode 4: link count 7 should be 2" in lines
    assert "1 error, 1 left" in lines[-1]


def test_what_cannot_be_checked(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ((), ("--repair",)):
        assert spoken(capsys, tmp_path / "missing", *option)[0] == 8
        assert spoken(capsys, tmp_path, *option)[0] == 8
        assert spoken(capsys, *option)[0] == 16
        assert spoken(capsys, image, "--frobnicate", *option)[0] == 16


@pytest.mark.parametrize("option", [(), ("--repair",)])
def test_interrupted(image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                     option: tuple[str, ...]) -> None:  # fmt: skip
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("daxfs.core.fsck.layers.TreeCheck", interrupt)
    code = run(["fsck", str(image), *option])
    said = capsys.readouterr().err
    assert code == 32
    assert said.startswith("daxfs: interrupted")
    assert ("run the repair again" in said) == bool(option)
