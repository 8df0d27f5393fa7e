"""Events for holders: what the file system has to tell an open file description, oldest first.

A queue is bounded: a holder that never reads loses the oldest events and is told how many. `on_event` is the daemon's way to
wake a poller; the core calls it and forgets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

EVENTS_PER_OWNER_MAX = 256


class Event(NamedTuple):
    """`type` is abi.EVENT_*; offset and length in bytes of the file; `pin` 0: a lease."""

    type: int
    pin: int
    offset: int
    length: int


class EventQueues:
    def __init__(self) -> None:
        self.on_event: Callable[[int], None] = lambda owner: None
        self._queues: dict[int, deque[Event]] = {}
        self._lost: dict[int, int] = {}

    def push(self, owner: int, event: Event) -> None:
        queue = self._queues.setdefault(owner, deque())
        if len(queue) == EVENTS_PER_OWNER_MAX:
            queue.popleft()
            self._lost[owner] = self._lost.get(owner, 0) + 1
        queue.append(event)
        self.on_event(owner)

    def pop(self, owner: int) -> tuple[Event, int] | None:
        """The oldest event, and how many were lost before it; None if there is none."""
        queue = self._queues.get(owner)
        if not queue:
            return None
        event = queue.popleft()
        if not queue:
            del self._queues[owner]
        return event, self._lost.pop(owner, 0)

    def waiting(self, owner: int) -> bool:
        return owner in self._queues

    def drop(self, owner: int) -> None:
        """The owner has ended."""
        self._queues.pop(owner, None)
        self._lost.pop(owner, None)
