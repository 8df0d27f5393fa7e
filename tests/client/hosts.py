"""What the host's kernel must have for some tests."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_SWITCH = Path("/proc/sys/kernel/io_uring_disabled")


def why_no_ring() -> str | None:
    """Why daxfs.kernel.FixedBuffer cannot work on this host; None if it must."""
    if platform.machine() != "x86_64":
        return "liburing has wheels for x86_64 only"
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 15):
        return "io_uring has fixed vectors from Linux 6.15 on"
    if _SWITCH.exists() and _SWITCH.read_text().strip() != "0":
        return "io_uring is switched off (kernel.io_uring_disabled)"
    return None
