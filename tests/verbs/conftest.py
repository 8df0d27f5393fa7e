"""An adapter of the simulated HCA without a mount."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.core.image import fresh_volume
from tests.verbs.adapter import Adapter


@pytest.fixture
async def adapter(tmp_path: Path) -> AsyncIterator[Adapter]:
    """A simulated HCA on a volume, which is checked at the end. Tests that wait ask for `autojump_clock` as well."""
    with fresh_volume(tmp_path) as volume:
        async with trio.open_nursery() as nursery:
            made = Adapter(volume, nursery)
            yield made
            made.finish()
            nursery.cancel_scope.cancel()
