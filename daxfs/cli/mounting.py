"""`daxfs mount` and `daxfs umount`."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Annotated

import typer

from daxfs.cli import sizes
from daxfs.cli.output import Failure, say

_REMOVED_S = 1  # the same when the device was removed: the image is closed, a dead descriptor may keep the daemon
_CLOSE_S = 120  # what the daemon may take to close the image after the unmount


def umount(
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="Where it is mounted.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", "-l", help="Detach now; who is still in is served till the last one leaves.")
    ] = False,
) -> None:
    """Unmount a volume.

    Waits until the daemon has closed the image, so that it can be mounted or copied at once.
    """
    from daxfs.daemon import mountpoint as places
    from daxfs.errors import Busy

    place = os.path.realpath(mountpoint)
    mounted = places.top(place)
    if mounted is None:
        raise Failure(f"{place} is not a mount point")
    if mounted.fstype != places.FSTYPE:
        raise Failure(f"{place} is not a daxfs mount but one of {mounted.fstype}; umount(8) is for those")
    daemon = -1 if lazy else _daemon_of(place)
    removed = _device_removed(place)
    try:
        places.unmount(place, lazy=lazy or removed)
        if daemon >= 0 and not _ended(daemon, _REMOVED_S if removed else _CLOSE_S) and not removed:
            raise Failure(f"{place} is unmounted, but its daemon has not closed {mounted.source} after {_CLOSE_S} s")
    except Busy:
        users = ", ".join(_users_of(place)) or "a process that cannot be seen from here"
        raise Failure(f"{place} is in use by {users}; end them, or detach it: daxfs umount --lazy {place}") from None
    finally:
        if daemon >= 0:
            os.close(daemon)


def _device_removed(place: str) -> bool:
    """Whether nothing but dead descriptors can keep the mount in use."""
    from daxfs import client

    try:
        return client.info(place).get("device") in ("removed", "lost")
    except OSError:
        return False


def _daemon_of(place: str) -> int:
    """A descriptor of the mount's daemon, -1 if it is gone or cannot be seen from here."""
    from daxfs import client

    try:
        return os.pidfd_open(int(client.info(place)["pid"]))
    except OSError:
        return -1


def _ended(daemon: int, wait_s: float) -> bool:
    waiter = select.poll()
    waiter.register(daemon, select.POLLIN)
    return bool(waiter.poll(wait_s * 1000))


def _users_of(place: str, at_most: int = 8) -> list[str]:
    """Processes that have something at or below the place open, as `comm (pid)`."""
    inside = place.rstrip("/") + "/"
    users = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if any(target == place or target.startswith(inside) for target in _targets(f"/proc/{pid}")):
            try:
                users.append(f"{Path('/proc', pid, 'comm').read_text().strip()} ({pid})")
            except OSError:
                continue  # it ended meanwhile
    return users[:at_most] + [f"{len(users) - at_most} more"] * (len(users) > at_most)


def _targets(process: str) -> list[str]:
    """What a process has open: working directory, root, program, descriptors, mapped files."""
    links = [f"{process}/{name}" for name in ("cwd", "root", "exe")]
    for table in ("fd", "map_files"):
        try:
            links += [f"{process}/{table}/{name}" for name in os.listdir(f"{process}/{table}")]
        except OSError:
            continue  # not ours, or gone
    found = []
    for link in links:
        try:
            found.append(os.readlink(link))
        except OSError:
            continue
    return found


def mount(
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="An empty directory.")],
    image: Annotated[
        Path | None,
        typer.Option(help="The image file.", show_default="one in your data directory, made if it is missing"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(parser=sizes.size, metavar="SIZE", help="Of an image that is made now, like 4G.", show_default="1G"),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="What truncate and hole punch do about pinned blocks: busy, wait, fail, lease, revoke or unsafe.",
            show_default="busy",
        ),
    ] = "",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--options",
            metavar="OPTIONS",
            help="As of mount(8): ro, allow_other, nonempty, hostsync, ...; dax=never: with the kernel's page cache; how "
            "pins are treated: longterm=, wait_s=, lease_break_s=, lease_then=, invalidate_s=, enospc_wait_s=, pins_max=; "
            "how the daemon runs: hotpath=, cpu=, spin_us=, coherence_ms=.",
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay in the terminal and log there; Ctrl-C unmounts.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="The daemon's log file.", show_default="one in your state directory")
    ] = None,
) -> int:
    """Mount a volume on a directory.

    Returns once the mount is served; the daemon then runs in the background. A dead daxfs mount on the directory is
    cleared first.
    """
    from daxfs.daemon import server
    from daxfs.daemon.options import MountOptions
    from daxfs.errors import BadArgument

    request = server.MountRequest(
        mountpoint=mountpoint,
        image=image,
        size=size,
        policy=policy,
        options=options or (),
        foreground=foreground,
        log=log,
    )
    try:
        code = server.mount(request)
    except BadArgument as problem:
        raise typer.BadParameter(problem.why) from None
    if code == 0 and not foreground:
        say(f"{mountpoint} is mounted; see: daxfs info {mountpoint}")
        if MountOptions.parse([*request.options, *([f"policy={policy}"] if policy else [])]).settings.unsafe:
            say("WARNING: policy unsafe frees pinned blocks: holders WILL corrupt other files. It is for demonstration.")
    return code
