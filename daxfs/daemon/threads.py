"""Work that may block the loop, in threads of trio's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from daxfs.daemon import session
from daxfs.errors import NoMemory

STACK = 1 << 20  # bytes of a thread's
T = TypeVar("T")


async def in_thread(work: Callable[..., T], *args: object) -> T:
    """trio.to_thread.run_sync; NoMemory if there is none for another thread."""
    while True:
        try:
            return await trio.to_thread.run_sync(work, *args)
        except RuntimeError as e:
            if "start new thread" not in str(e):
                raise
            if not session.give_spare():
                raise NoMemory("no memory for another thread") from None
