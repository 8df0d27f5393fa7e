"""What the file system tells a holder, and the lease that lets it hear.

Events belong to an open file description, as pins do. An on-demand registration is told to let go (`INVALIDATE`) and must
acknowledge; the holder of a lease or of a pin in the way is asked to (`LEASE_BREAK`); the others are facts.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from daxfs import abi
from daxfs.client import calls
from daxfs.client.calls import PinError
from daxfs.client.closing import Held

if TYPE_CHECKING:
    from daxfs.client.file import File


class EventType(IntEnum):
    INVALIDATE = abi.EVENT_INVALIDATE  # on demand: stop using the range, then `Pin.acknowledge`
    LEASE_BREAK = abi.EVENT_LEASE_BREAK  # somebody waits for the range: close the pin, or the lease
    REVOKED = abi.EVENT_REVOKED  # the pin's access is gone: close it
    DEVICE_REMOVE = abi.EVENT_DEVICE_REMOVE  # the device goes away: close everything
    POISON = abi.EVENT_POISON  # the medium failed under the range


@dataclass(frozen=True, slots=True)
class Event:
    """`pin_id` 0: a lease. `offset`, `length`: bytes of the file. `lost`: events that were dropped before this one."""

    type: EventType
    pin_id: int
    offset: int
    length: int
    lost: int = 0


class Lease(Held):
    """A layout lease: its holder hears (LEASE_BREAK) before the layout of the range changes. A context manager.

    It gives no right to the blocks; pin them. All leases of a description are given back together: by the process that
    opened the file (a child that wants one of its own opens the file itself), or by the last close.
    """

    def __init__(self, file: File, offset: int, length: int) -> None:
        super().__init__(file)
        self._maker = file._maker  # one taken in a child goes together with those of its parent
        self.file = file
        self.offset = offset
        self.length = length

    def close(self) -> bool:
        """Give it back. Whether it was still there: False if it was broken, or closed before.

        In another process than the one that opened the file: forget it, and False."""
        return bool(super().close())

    def _give_back(self) -> bool:
        self.drop()
        try:
            calls.lease(self.file.fileno(), self.offset, self.length, abi.LEASE_RELEASE)
        except PinError as problem:
            if problem.errno != errno.ENOENT:
                raise
            return False
        return True

    def _called(self) -> tuple[str, str]:
        return "the lease", self.file.path
