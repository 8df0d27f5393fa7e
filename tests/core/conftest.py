"""A volume for each test that asks for one, and how hypothesis runs.

Hypothesis tries the same examples every time; a failure prints what reproduces it. `--hypothesis-profile=explore` looks
elsewhere: more examples, from another seed each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from daxfs.core.volume import Volume

from .image import fresh_volume

settings.register_profile(
    "daxfs",
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "explore", settings.get_profile("daxfs"), derandomize=False, max_examples=2000, database=None
)
settings.load_profile("daxfs")


@pytest.fixture
def vol(tmp_path: Path) -> Iterator[Volume]:
    """An empty volume; sound at the end, and so is what the next mount finds."""
    with fresh_volume(tmp_path, 4 << 20) as volume:
        yield volume
        volume.check()
