"""A daemon whose memory is limited once it serves: `install` runs in the process that becomes the daemon (warm.py)."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

SETUP = "tests.faults.poor"
VARIABLE = "DAXFS_TEST_ROOM"  # bytes of address space besides what the daemon has by then


def limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ[VARIABLE]), resource.RLIM_INFINITY))


def install() -> None:
    from daxfs.daemon.server import Mounting

    announce = Mounting._announce

    async def announce_then_limit(self: Mounting, *args: Any) -> None:
        await announce(self, *args)
        limit()

    Mounting._announce = announce_then_limit  # type: ignore[method-assign]
