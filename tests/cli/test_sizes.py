"""Sizes, bytes and seconds: the whole text is a number, or it is refused."""

from __future__ import annotations

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from daxfs.cli import sizes


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("4K", 4096), ("512M", 512 << 20), ("1G", 1 << 30), ("3T", 3 << 40), ("007", 7)],
)
def test_sizes(text: str, value: int) -> None:
    assert sizes.size(text) == value


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "+1", "1.5G", "1 G", "1g", "1GB", "0x10", "1e9", "\u0661", "9999999T", "1G\n"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        sizes.size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_short_is_the_inverse(value: int) -> None:
    assert sizes.size(sizes.short(value)) == value


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    for parse in (sizes.size, sizes.byte, sizes.seconds):
        try:
            assert parse(text) >= 0
        except typer.BadParameter:
            continue


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("165", 165), ("0xa5", 165), ("0XFF", 255)])
def test_bytes(text: str, value: int) -> None:
    assert sizes.byte(text) == value


@pytest.mark.parametrize("text", ["256", "-1", "a5", "", "1.0"])
def test_what_is_no_byte(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        sizes.byte(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", "1e300"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        sizes.seconds(text)
