"""A daemon of which some allocations fail: `install` runs in the process that becomes the daemon (warm.py), `arm` in the
test. What is to fail is the text of a file, read at SIGUSR2: the number of allocations until then, and how many fail.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.mount.harness import Mounted, eventually

SETUP = "tests.faults.forgetful"
VARIABLE = "DAXFS_TEST_NOMEMORY"


def place(mounted: Mounted) -> Path:
    return mounted.home / "nomemory"


def start(mounted: Mounted) -> None:
    os.environ[VARIABLE] = str(place(mounted))
    try:
        mounted.mount("allow_other,hotpath=off", setup=SETUP)
    finally:
        del os.environ[VARIABLE]


def arm(mounted: Mounted, after: int, count: int) -> None:
    """`count` 0: nothing fails any more."""
    temporary = mounted.home / "nomemory.new"
    temporary.write_text(f"{after} {count}")
    temporary.rename(place(mounted))
    os.kill(mounted.pid, signal.SIGUSR2)
    eventually("the daemon has heard of it", lambda: not place(mounted).exists())


def install() -> None:
    import _testcapi  # CPython's own tests have it

    from daxfs.daemon.server import Mounting

    where = os.environ[VARIABLE]

    def obey(*_: object) -> None:
        with open(where) as file:
            after, count = map(int, file.read().split())
        os.unlink(where)
        if count:
            _testcapi.set_nomemory(after, after + count)
        else:
            _testcapi.remove_mem_hooks()

    announce = Mounting._announce

    async def announce_then_listen(self: Mounting, *args: Any) -> None:
        await announce(self, *args)
        signal.signal(signal.SIGUSR2, obey)

    Mounting._announce = announce_then_listen  # type: ignore[method-assign]
