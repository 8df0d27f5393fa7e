"""Sizes, bytes and times as people type them, parsed strictly: the number as a whole, or a usage error."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.ASCII)


def size(text: str | int) -> int:
    """4096, 512K, 64M, 1G, 2T: bytes; units are powers of 1024."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size: give a whole number, or one with K, M, G or T, like 512M")
    value = int(match[1]) << _UNITS[match[2]]
    if value >= 1 << 63:
        raise typer.BadParameter(f"{text!r} is too large")
    return value


def byte(text: str | int) -> int:
    """0 to 255, as 165 or 0xa5."""
    if isinstance(text, int):
        return text
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise typer.BadParameter(f"{text!r} is not a byte: give 0 to 255, or 0x00 to 0xff")
    return value


def seconds(text: str | float) -> float:
    """A time of 0 s or more; fractions are fine."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise typer.BadParameter(f"{text!r} is not a number of seconds")
    return value


def short(value: int) -> str:
    """A size the way `size` reads it: 1073741824 is 1G."""
    for unit in "TGMK":
        if value and value % (1 << _UNITS[unit]) == 0:
            return f"{value >> _UNITS[unit]}{unit}"
    return str(value)
