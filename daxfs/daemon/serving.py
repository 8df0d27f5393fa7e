"""The session's place in trio: one task that waits for requests, drains them, and leaves the others their turn.

pyfuse3's own loop runs beside it and serves what the session leaves to it; both end with the mount.

No request waits while this sleeps. The task is in one of three states, and all of it happens on the trio thread:

    waiting    trio's epoll watches the descriptor, once (EPOLLONESHOT). Arming looks at the queue after the watch is set,
               and the kernel queues a request before it wakes what it finds watching: a request that came before the
               arming makes the epoll ready, one that comes later wakes it.
    woken      The watch is off, the task is runnable: trio runs it before it sleeps again.
    draining   The watch is off, `drain` reads. It comes back with the queue found empty, at the end of its turn with
               requests left, or with a failure that was logged. The task arms the watch with no checkpoint in between, and
               the look at the queue that comes with arming finds what is left, or came behind the last read.

- Only `drain` reads the descriptor. libfuse's own read is replaced, pyfuse3 waits for an eventfd (fuseio.c), which is
  readable exactly as long as requests are left to it. A nap (linger.c) polls: that takes no wake-up from an epoll.
- A drain ends: a turn has 2 ms and the last request, a nap 20 ms, all of it the patience that it was given, 1 s at most.
  How many tasks could run (`Runnable`) only makes it end earlier.
- A request that was read is answered, or its `Request` is kept by a task or thread, and answers EIO when it is dropped. A
  task that waits for a layout to move (waiting.py) goes from its look to its place in the parking lot with no checkpoint,
  so nothing moves unseen in between. A thread that is done wakes trio through a socket, which is read before the queue of
  what is done.

What this takes for granted is the kernel's part. So it is looked at: once a second, whether requests wait although nobody
has drained for that long. That is a bug; it is counted (`late`), logged, and the watch is set anew.

A caller can hang for long while the daemon rightly sleeps: in the kernel, behind write-back that is held back while a
truncate of the file waits for pins (docs/pins.md). Its request has not been sent then.
"""

from __future__ import annotations

import logging
import os
import re
import select
from contextlib import suppress
from pathlib import Path

import trio

from daxfs.daemon import session

log = logging.getLogger("daxfs")

LOOK_S = 1.0  # between two looks at whether a request was overlooked
_FDINFO = Path("/proc/self/fdinfo")

late = 0
"""How often a request was found that nothing had announced: 0 unless there is a bug, here or below."""


async def serve() -> None:
    """Serve the mount until it is gone, or until cancelled."""
    tasks = session.Runnable()
    trio.lowlevel.add_instrument(tasks)
    try:
        async with trio.open_nursery() as nursery:
            fd = session.fileno()
            nursery.start_soon(_look_now_and_then, fd)
            await _request(fd)
            others = _epoll_of(fd)
            while session.drain(others, trio.lowlevel.current_statistics().seconds_to_next_deadline):
                await _request(fd)
            nursery.cancel_scope.cancel()
    finally:
        trio.lowlevel.remove_instrument(tasks)


async def _request(fd: int) -> None:
    """Wait for one; or until the watch is to be set anew."""
    with suppress(trio.ClosedResourceError):
        await trio.lowlevel.wait_readable(fd)


async def _look_now_and_then(fd: int) -> None:
    global late
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    seen = -1
    while True:
        await trio.sleep(LOOK_S)
        before, seen = seen, _drains()
        if before != seen or not poller.poll(0):
            continue
        await trio.lowlevel.checkpoint()  # it may have been woken just now, as this was
        if _drains() == seen and poller.poll(0):
            late += 1
            log.error("a request waited although nothing announced it (%d times so far): please report this", late)
            trio.lowlevel.notify_closing(fd)


def _drains() -> int:
    return session.counters()["drains"]


def _epoll_of(fd: int) -> int:
    """The epoll descriptor that watches this one, which is trio's; -1: not found. It is readable when trio has an event, but
    not for `fd` itself while nobody waits for that."""
    watched = re.compile(rf"^tfd: +{fd} ", re.MULTILINE)
    for name in os.listdir(_FDINFO):
        with suppress(OSError):  # the one that listed them
            if watched.search((_FDINFO / name).read_text()):
                return int(name)
    return -1
