"""The session's place in trio: one task that waits for requests, drains them, and leaves the others their turn.

pyfuse3's own loop runs beside it and serves what the session leaves to it; both end with the mount.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import trio

from daxfs.daemon import session

_FDINFO = Path("/proc/self/fdinfo")


async def serve() -> None:
    """Serve the mount until it is gone, or until cancelled."""
    tasks = session.Runnable()
    trio.lowlevel.add_instrument(tasks)
    try:
        await trio.lowlevel.wait_readable(session.fileno())
        others = _epoll_of(session.fileno())
        while session.drain(others, trio.lowlevel.current_statistics().seconds_to_next_deadline):
            await trio.lowlevel.wait_readable(session.fileno())
    finally:
        trio.lowlevel.remove_instrument(tasks)


def _epoll_of(fd: int) -> int:
    """The epoll descriptor that watches this one, which is trio's; -1: not found. It is readable when trio has an event, but
    not for `fd` itself while nobody waits for that."""
    watched = re.compile(rf"^tfd: +{fd} ", re.MULTILINE)
    for name in os.listdir(_FDINFO):
        with suppress(OSError):  # the one that listed them
            if watched.search((_FDINFO / name).read_text()):
                return int(name)
    return -1
