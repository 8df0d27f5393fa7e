"""docs/format.md is what layout.py says."""

from __future__ import annotations

import pytest

from tools import format_tables


def test_the_page_is_up_to_date() -> None:
    page = format_tables.PAGE.read_text(encoding="utf-8")
    assert format_tables.render(page) == page, "run: python tools/format_tables.py"


def test_a_table_without_a_slot_is_an_error() -> None:
    page = format_tables.PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="extent leaf"):
        format_tables.render(page.replace("<!-- table: extent leaf -->", ""))
