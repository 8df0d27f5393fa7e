"""A daemon that now and then does not hear a request: the watch of the descriptor is set, and is off again before
anything could come. `install` runs in the process that becomes the daemon (warm.py); DAXFS_TEST_DEAF says whether it
looks for itself."""

from __future__ import annotations

import os
import select

SETUP = "tests.daemon.deaf"
VARIABLE = "DAXFS_TEST_DEAF"
_EVERY = 20


def install() -> None:
    from trio._core._io_epoll import EpollIOManager

    from daxfs.daemon import serving, session

    update, count = EpollIOManager._update_registrations, 0
    if os.environ[VARIABLE] == "for-ever":
        serving.LOOK_S = 1e6

    def forget(self: EpollIOManager, fd: int) -> None:
        nonlocal count
        update(self, fd)
        if session.mounted() and fd == session.fileno() and fd in self._registered:
            count += 1
            if count > _EVERY and count % _EVERY == 0:
                self._epoll.modify(fd, select.EPOLLONESHOT)

    EpollIOManager._update_registrations = forget  # type: ignore[method-assign]
