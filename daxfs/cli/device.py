"""`daxfs device`: the device under a mount: its state, taking it away, errors of its medium."""

from __future__ import annotations

import os
import time
import uuid as uuids
from pathlib import Path
from typing import Annotated, Any

import typer

from daxfs.cli import sizes
from daxfs.cli.output import Failure, counted, print_facts, print_json, say

MOUNT = Annotated[Path, typer.Argument(metavar="MOUNT", help="A mount point, or anything on it.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOOK_S = 0.05  # between two looks at a removal


def status(
    target: Annotated[Path, typer.Argument(metavar="MOUNT|IMAGE", help="A mount point, or an image file.")],
    json: JSON = False,
) -> None:
    """Show the state of a device.

    Live, being removed or removed; how often and why it was not shut down cleanly; how many hold it; which of its blocks are
    poisoned.
    """
    from daxfs import client
    from daxfs.cli.volumes import is_image, mount_of

    place: Path | None = target
    if is_image(target):
        place = mount_of(target)
    facts = client.device(place) if place else _unmounted(target)
    if json:
        print_json(facts)
        return
    bad = facts.pop("poison")
    print_facts((name.replace("_", " "), _fact(value)) for name, value in facts.items() if value not in ("", None))
    for run in bad:
        print(f"poison: block {run['start']}, {run['count']} in a row ({run['owner']})")


def _fact(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _unmounted(image: Path) -> dict[str, Any]:
    """An image that nobody serves: poison is known to mounts only."""
    from daxfs.core.volume import Volume

    now, boot_id = time.time_ns(), uuids.UUID(_BOOT_ID.read_text().strip()).bytes
    volume = Volume.open(os.path.abspath(image), readonly=True, now=now, boot_id=boot_id, lock=False)
    try:
        return {
            "state": "not mounted",
            "image": volume.pmem.path,
            "uuid": str(uuids.UUID(bytes=volume.uuid)),
            "mounts": volume.sb["mounts"],
            "dirty_shutdowns": volume.sb["dirty_shutdowns"] + (volume.last_shutdown != "clean"),
            "last_shutdown": volume.last_shutdown,
            "poison": [],
        }
    finally:
        volume.close(now)


def remove(
    mount: MOUNT,
    deadline: Annotated[
        float, typer.Option(parser=sizes.seconds, metavar="SECONDS", help="What holders get to let go.", show_default="30")
    ] = 30.0,
    force: Annotated[bool, typer.Option("--force", "-f", help="They get no time.")] = False,
    json: JSON = False,
) -> None:
    """Take the device away from under a mount.

    No new pins; every holder is told and has time to let go; who does not is revoked. Then the image is closed cleanly, and
    every call on the mount fails with ENODEV until it is unmounted.
    """
    from daxfs import client

    client.remove_device(mount, deadline, force=force)
    told = -1
    while (facts := client.device(mount))["state"] == "removing":
        if facts["pins"] != told:
            told = facts["pins"]
            left = "" if facts["left_s"] is None else f", revoked in {facts['left_s']:.0f} s"
            are = "is" if told == 1 else "are"
            say(f"{counted(told, 'pin')} of {counted(facts['holders'], 'open file')} {are} left{left}")
        time.sleep(_LOOK_S)
    if json:
        print_json(facts)
    else:
        say(f"{facts['image']} is closed; now: daxfs umount {facts['mount']}")


def inject_error(
    mount: MOUNT,
    block: Annotated[int, typer.Option(min=0, help="The first block of the image, as daxfs extents shows them.")],
    count: Annotated[int, typer.Option(min=1, help="How many blocks.")] = 1,
    clear: Annotated[bool, typer.Option("--clear", help="Make them sound again.")] = False,
    json: JSON = False,
) -> None:
    """Poison blocks of the medium, or clear them.

    Reads of a poisoned block fail with EIO, its holders are told. A write of the whole block or a hole punch clears it from
    the file. Poisoned metadata makes the volume read-only. Poison ends with the mount.
    """
    from daxfs import client

    metadata = False
    if clear:
        files = client.clear_poison(mount, block, count)
    else:
        files, metadata = client.poison(mount, block, count)
    if json:
        print_json({"block": block, "count": count, "poisoned": not clear, "files": files, "metadata": metadata})
    else:
        what = "sound again" if clear else "poisoned"
        blocks = f"block {block} is" if count == 1 else f"blocks {block} to {block + count - 1} are"
        owners = f"{counted(files, 'file')} {'has' if files == 1 else 'have'} {'it' if count == 1 else 'some of them'}"
        say(f"{blocks} {what}: {owners}")
    if metadata:
        raise Failure("the volume's own blocks are among them: it is read-only now")
