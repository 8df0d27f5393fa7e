"""The daemon's threads: one that serves, where `-o cpu=` says, and others for work that waits for the kernel, anywhere.

A thread begins where the one that started it may run. All are started by the serving one, so each frees itself first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

import trio

from daxfs.daemon import session
from daxfs.errors import NoMemory

STACK = 1 << 20  # bytes of a thread's
T = TypeVar("T")

_everywhere: set[int] = set()  # the CPUs of the process, once its serving thread is pinned


def pin(cpu: int) -> None:
    """The calling thread, which is to serve, runs on this CPU only."""
    _everywhere.update(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})


async def in_thread(
    work: Callable[..., T], *args: object, abandon_on_cancel: bool = False, limiter: trio.CapacityLimiter | None = None
) -> T:
    """trio.to_thread.run_sync, on any CPU; NoMemory if there is none for another thread."""
    job = functools.partial(_freed, work, *args)
    while True:
        try:
            return await trio.to_thread.run_sync(job, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
        except RuntimeError as e:
            if "start new thread" not in str(e):
                raise
            if not session.give_spare():
                raise NoMemory("no memory for another thread") from None


def _freed(work: Callable[..., T], *args: object) -> T:
    if _everywhere:
        os.sched_setaffinity(0, _everywhere)
    return work(*args)
