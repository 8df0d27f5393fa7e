"""The lab's processes and mounts, shared by all its tests; at the end nothing of them may be left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daxfs.lab.processes import Zygote
from daxfs.lab.runner import Rooms

OWN = Path(__file__).parent


@pytest.fixture(scope="session")
def zygote(base: Path) -> Iterator[Zygote]:
    sys.path.insert(0, str(OWN))
    with Zygote([str(OWN)]) as made:
        yield made


@pytest.fixture(scope="session")
def rooms(zygote: Zygote) -> Iterator[Rooms]:
    with ExitStack() as stack:
        made = Rooms(stack)
        yield made
        made.close()  # unlike at the end of a run, a mount that ends badly is an error here
