"""What a holder imports: open a file of a daxfs mount, pin ranges of it, map the pinned blocks, unpin.

    import daxfs.client as daxfs

    with daxfs.open("/mnt/x/film", "r+") as file, file.pin(0, 1 << 20, write=True) as pin:
        with pin.map() as view:          # one contiguous, writable memoryview of the blocks on the image
            view[:4] = b"DMA!"

Only the standard library is used: this package runs inside other people's processes. Every failure is a `PinError`, an
`OSError` whose `errno` is the daemon's and whose text says what to do.
"""

from daxfs.abi import FOLL_GET, FOLL_LONGTERM, FOLL_PIN, FOLL_WRITE
from daxfs.client.admin import clear_poison, device, poison, reap_busy, release_pin, remove_device, status
from daxfs.client.calls import PinError
from daxfs.client.events import Event, EventType, Lease
from daxfs.client.file import Extent, File, Pin, open
from daxfs.client.memory import Window
from daxfs.client.reports import busy, info, pins

__all__ = [
    "FOLL_GET",
    "FOLL_LONGTERM",
    "FOLL_PIN",
    "FOLL_WRITE",
    "Event",
    "EventType",
    "Extent",
    "File",
    "Lease",
    "Pin",
    "PinError",
    "Window",
    "busy",
    "clear_poison",
    "device",
    "info",
    "open",
    "pins",
    "poison",
    "reap_busy",
    "release_pin",
    "remove_device",
    "status",
]
