"""On which CPUs the daemon's threads run: the serving thread where `-o cpu=` says, the others anywhere.

A thread begins where the one that started it may run. All threads of the daemon are started by the serving one, so each
frees itself first: blocking work goes through `in_thread`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

_everywhere: set[int] = set()  # the CPUs of the process, once its serving thread is pinned


def pin(cpu: int) -> None:
    """The calling thread runs on this CPU only."""
    _everywhere.update(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})


def unpin() -> None:
    """The calling thread runs anywhere again."""
    if _everywhere:
        os.sched_setaffinity(0, _everywhere)


async def in_thread(work: Callable[..., T], *args: object, abandon_on_cancel: bool = False) -> T:
    """trio.to_thread.run_sync, on any CPU."""
    return await trio.to_thread.run_sync(functools.partial(_freed, work, *args), abandon_on_cancel=abandon_on_cancel)


def _freed(work: Callable[..., T], *args: object) -> T:
    unpin()
    return work(*args)
