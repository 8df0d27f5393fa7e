"""What a call may have to wait for, and the one hook by which the core says that something moved.

The core does not wait. A verb that cannot go on raises `LayoutBusy`, which names what has to come first (`Awaited`). What
may end such a wait says so itself: the pin table, the leases, the busy list, and the volume where it gives blocks and inode
numbers back, changes its rules, or fails. Each calls `Volume.moved`, which calls the hook `Volume.on_moved` with one of
    the number of an inode   a pin, lease or registration of this file stands in no way any more, or its policy has changed
    SPACE                    there are free blocks or inode numbers that there were not; busy blocks are fewer
    DUE                      `Volume.free_unpinned` has work
    EVERYTHING               the volume has failed, or its device is being removed
So no verb has to remember it. A transaction that is aborted frees nothing that was not free before, and says nothing: two
calls that wait for space would wake each other for ever.

The hook is called in the middle of a verb: it notes what moved, and calls nothing of the core that changes anything. The
waiters run later, when the verb is through, and look again.

Not here: how long each wait lasts, and the waiters themselves (daemon/waiting.py).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from daxfs.errors import FsError, TryAgain

SPACE = 0  # no inode has this number
DUE = -1
EVERYTHING = -2

Moved = Callable[[int], None]


class Awaited(Enum):
    """What is waited for, in words."""

    ACKNOWLEDGEMENT = "on-demand holders to let go of a range"
    PINS = "the pins of a range to go"
    LEASES = "the holders of a range, who were told, to let go"
    LAYOUT = "a layout change that waits for the range"
    SPACE = "busy blocks to be free"
    FORGET = "the kernel to forget a file without a name"
    RELEASE = "the kernel to release a cached handle"
    PAGES = "the kernel to drop its pages"
    TWINS = "room for twins of the kernel's pages"


class LayoutBusy(FsError):
    """Something has to come first. Never leaves the daemon, which waits and calls again.

    `kind` is what is waited for, `pin` the id of one pin that stands in the way (0: none, or something else does), `ino`
    what the hook will say (an inode's number, or SPACE), `first` and `count` the blocks that the operation would take.

    Raises: ValueError if there is no such kind.
    """

    errno = TryAgain.errno

    def __init__(self, kind: Awaited, pin: int, ino: int, first: int = 0, count: int = 0) -> None:
        self.kind = Awaited(kind)
        super().__init__(f"the call has to wait for {self.kind.value} (pin {pin})")
        self.pin = pin
        self.ino = ino
        self.first = first
        self.count = count


def unheard(what: int) -> None:
    """The hook of a volume that has no waiters."""
