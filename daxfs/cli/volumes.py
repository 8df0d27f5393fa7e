"""`daxfs mkfs`, `fsck` and `info`: volumes as images. Whoever imports the core does it late: it brings NumPy along."""

from __future__ import annotations

import os
import stat
import time
import uuid as uuids
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daxfs.cli import sizes
from daxfs.cli.output import Failure, human_size, print_facts, print_json, printable, progress_bar, say

if TYPE_CHECKING:
    from daxfs.core.fsck import Report

DEFAULT_SIZE = 1 << 30
_FOR_PROGRAMS = {"image_id", "abi", "requests"}  # facts that only --json shows
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def make_image(path: Path, size: int, *, block_size: int = 4096, label: str = "", uuid: bytes | None = None) -> None:
    """Format an image, sparse and 0600 if it is new; its root directory belongs to the caller."""
    from daxfs.core.format import format_image

    format_image(
        path, size, block_size=block_size, label=label, uuid=uuid, now=time.time_ns(), uid=os.getuid(), gid=os.getgid()
    )


def mkfs(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image file; made if it is missing.")],
    size: Annotated[
        int | None,
        typer.Option(
            parser=sizes.size, metavar="SIZE", help="Like 1G, 512M, 1048576.", show_default="the file's, or 1G if new"
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(parser=sizes.size, metavar="SIZE", help="4K, 8K, 16K, 32K or 64K.")] = 4096,
    label: Annotated[str, typer.Option(help="A name, at most 64 bytes.")] = "",
    uuid: Annotated[str | None, typer.Option(help="Of the volume.", show_default="a random one")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite what the file holds.")] = False,
) -> None:
    """Make an empty file system in an image file.

    A new image is sparse and its owner's alone (0600).
    """
    identity = None
    if uuid is not None:
        try:
            identity = uuids.UUID(uuid).bytes
        except ValueError:
            raise typer.BadParameter(f"{uuid!r} is not a UUID") from None
    present = _size_of(image)
    if present and not force:
        raise Failure(f"{image} exists and is not empty; --force overwrites it, and all its files are gone then")
    size = size or present or DEFAULT_SIZE
    make_image(image, size, block_size=block_size, label=label, uuid=identity)
    say(f"{image}: {human_size(size)} in blocks of {human_size(block_size)}; now: daxfs mount --image {image} DIR")


def _size_of(image: Path) -> int:
    try:
        status = os.stat(image)
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise Failure(f"{image} is not a regular file; name a file for the image")
    return status.st_size


def fsck(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image file, not mounted.")],
    repair: Annotated[bool, typer.Option("--repair", "-r", help="Correct what is wrong.")] = False,
    json: JSON = False,
) -> int:
    """Check an image, without changing it unless --repair is given.

    A repair that was interrupted can be run again. Files that no directory has any more go to /lost+found.

    Exit code, as of fsck(8), the sum of: 0 nothing is wrong, 1 errors were corrected, 4 errors are left, 8 it could not be
    checked, 16 wrong usage, 32 interrupted.
    """
    from daxfs.core import fsck as core
    from daxfs.errors import FsError

    try:
        with progress_bar() as progress:
            if repair:
                report = core.repair(image, now=time.time_ns(), progress=progress)
            else:
                report = core.check(image, progress)
    except FsError as problem:
        raise Failure(problem.why, 8) from None
    except KeyboardInterrupt:
        raise Failure("interrupted" + ("; run the repair again" if repair else ""), 32) from None
    if json:
        print_json(
            {
                "image": report.path,
                "errors": report.errors,
                "notes": report.notes,
                "fixed": report.fixed,
                "left": report.left,
                "findings": [{"severity": f.severity, "text": f.text} for f in report.findings],
                "counts": report.counts,
            }
        )
        return report.exit_code
    for finding in report.findings:
        print(printable(str(finding)))
    if report.omitted:
        print(f"and {report.omitted} more")
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.counts.items())
    print(f"{image}: {_verdict(report)}" + (f" ({counts})" if counts else ""))
    return report.exit_code


def _verdict(report: Report) -> str:
    if not report.errors:
        return "clean"
    errors = f"{report.errors} error" + "s" * (report.errors > 1)
    if not report.repaired:
        return f"{errors}; --repair corrects what can be corrected"
    return f"{errors}, all corrected" if not report.left else f"{errors}, {report.left} left"


def info(
    target: Annotated[Path, typer.Argument(metavar="MOUNT|IMAGE", help="A mount point, or an image file.")],
    json: JSON = False,
) -> None:
    """Show a volume, mounted or not.

    What is free, used, busy and pinned is counted in blocks. Of a mount, it shows the daemon too.
    """
    facts = _image_info(target) if is_image(target) else _mount_info(target)
    if json:
        print_json(facts)
        return
    shown = ((name, value) for name, value in facts.items() if name not in _FOR_PROGRAMS and value != "")
    print_facts((name.replace("_", " "), _fact(name, value, facts)) for name, value in shown)


def _fact(name: str, value: Any, facts: dict[str, Any]) -> str:
    if name in ("blocks", "free", "used", "busy", "pinned"):
        return f"{value} ({human_size(value * int(facts['block_size']))})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "settings":
        shown = ((key, one) for key, one in value.items() if key != "policy")
        return ",".join(f"{key}={one:g}" if isinstance(one, float) else f"{key}={one}" for key, one in shown)
    return str(value)


def is_image(target: Path) -> bool:
    """Whether a superblock of ours is in the file. A file *on* a mount answers for its mount, unless it is an image."""
    try:
        if not stat.S_ISREG(os.stat(target).st_mode):
            return False
        from daxfs.core.layout import BLOCK_SIZES, SB_MAGIC

        with open(target, "rb") as file:
            return any(os.pread(file.fileno(), 4, at) == SB_MAGIC.to_bytes(4, "little") for at in (0, *BLOCK_SIZES))
    except OSError:
        return False


def _mount_info(target: Path) -> dict[str, Any]:
    import errno

    from daxfs import client

    try:
        return client.info(target)
    except client.PinError as problem:
        if problem.errno in (errno.ENOTTY, errno.ENOSYS):
            raise Failure(f"{target} is neither on a daxfs mount nor a daxfs image") from None
        raise


def mount_of(image: Path) -> Path | None:
    """Where an image is mounted, if it is and we may ask."""
    from daxfs import client
    from daxfs.daemon import mountpoint

    for mounted in mountpoint.table():
        if mounted.fstype == mountpoint.FSTYPE and os.path.realpath(mounted.source) == os.path.realpath(image):
            try:
                client.info(mounted.place)
            except client.PinError:
                continue
            return Path(mounted.place)
    return None


def _image_info(image: Path) -> dict[str, Any]:
    """From its mount if it has one that we may ask, else read from the image, which is neither locked nor changed."""
    from daxfs import client
    from daxfs.core.layout import STATE_CLEAN
    from daxfs.core.volume import Volume

    place = mount_of(image)
    if place:
        return client.info(place)
    path, now = os.path.abspath(image), time.time_ns()
    volume = Volume.open(path, readonly=True, now=now, lock=False)
    try:
        return volume.facts() | {"clean": volume.sb["state"] == STATE_CLEAN}
    finally:
        volume.close(now)
