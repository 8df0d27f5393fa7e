"""`daxfs pin`, `pins`, `busy`, `extents`: what a mount's files and holders are made of. All through `daxfs.client`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from daxfs.cli import sizes
from daxfs.cli.output import Failure, human_age, human_size, print_json, print_table, runs_text, say

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_PAUSE_S = 0.001  # between two passes of the fill engine: the machine has other things to do


def extents(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file on a daxfs mount.")],
    json: JSON = False,
) -> None:
    """Show where the blocks of FILE are on the image.

    All numbers are blocks. Holes are left out.
    """
    from daxfs import client

    with client.open(file) as opened:
        found = opened.extents()
    if json:
        print_json(
            [{"logical": e.logical, "physical": e.physical, "count": e.count, "unwritten": e.unwritten} for e in found]
        )
        return
    rows = ((e.logical, e.physical, e.count, "unwritten" if e.unwritten else "") for e in found)
    print_table(("logical", "physical", "count", "state"), rows, left=("state",))


def pins(
    mount: Annotated[Path, typer.Argument(metavar="MOUNT", help="A mount point, or anything on it.")],
    json: JSON = False,
    release: Annotated[
        int | None, typer.Option(metavar="ID", help="Take the access of this pin away, and tell its holder.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="With --release: let a pin of an earlier daemon go for good, though somebody may still have it."
        ),
    ] = False,
) -> None:
    """List the pins of a mount, or release one.

    Who holds which blocks of which file, in which state, for how long, and how much free space that costs. Runs are shown
    as start+count, in blocks.

    A released pin keeps its blocks until its holder unpins, closes or ends: what is mapped cannot be taken back.
    """
    from daxfs import client

    if release is not None:
        _release(mount, release, force=force, json=json)
        return
    if force:
        raise typer.BadParameter("--force goes with --release")
    found = client.pins(mount)
    if json:
        print_json(found)
        return
    rows = (
        (
            p["id"], _people(p["holders"]) or f"{p['comm']} ({p['pid']}), ended", p["state"], p["flags"], p["offset"],
            human_size(p["length"]), human_age(p["age_s"]), human_size(p["withheld"]), runs_text(p["runs"]), p["label"],
            p["path"],
        )
        for p in found
    )  # fmt: skip
    columns = ("id", "holders", "state", "flags", "offset", "length", "age", "withheld", "runs", "label", "path")
    print_table(columns, rows, left=("holders", "state", "flags", "runs", "label", "path"))
    _say_more(client.status(mount)["pins"] - len(found), "pins")


def _release(mount: Path, pin_id: int, *, force: bool, json: bool) -> None:
    from daxfs import client

    kept = client.release_pin(mount, pin_id, force=force)
    if json:
        print_json({"pin": pin_id, "gone": kept is None, "blocks_kept": kept or 0})
    elif kept is None:
        say(f"pin {pin_id} is gone, its blocks are given back")
    else:
        say(f"pin {pin_id} is revoked; its holder keeps {kept} blocks until it unpins, closes or ends")


def _people(holders: list[dict[str, Any]], at_most: int = 4) -> str:
    """Processes as `comm (pid)`, the first few of them."""
    names = [f"{holder['comm']} ({holder['pid']})" for holder in holders]
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def _say_more(count: int, what: str) -> None:
    if count > 0:
        say(f"and {count} more {what} that are not listed")


def busy(
    mount: Annotated[Path, typer.Argument(metavar="MOUNT", help="A mount point, or anything on it.")],
    json: JSON = False,
    reap: Annotated[
        bool, typer.Option("--reap", help="Free what no living holder of an earlier daemon keeps any more, now.")
    ] = False,
) -> None:
    """List the busy extents of a mount.

    Blocks that no file owns any more but that a pin still covers, the pins and processes that keep them, and where they came
    from. They are freed when their last pin goes.
    """
    from daxfs import client

    if reap:
        freed, released = client.reap_busy(mount)
        if json:
            print_json({"blocks_freed": freed, "pins_released": released})
        else:
            say(f"{freed} blocks freed, {released} pins of holders that have ended released")
        return
    found = client.busy(mount)
    if json:
        print_json(found)
        return
    rows = (
        (b["start"], b["count"], human_size(b["bytes"]), " ".join(map(str, b["pins"])), _people(b["holders"]),
         human_age(b["age_s"]), b["path"])
        for b in found
    )  # fmt: skip
    columns = ("start", "count", "size", "pins", "holders", "age", "path")
    print_table(columns, rows, left=("pins", "holders", "path"))


def pin(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A regular file on a daxfs mount.")],
    offset: Annotated[
        int, typer.Option(parser=sizes.size, metavar="SIZE", help="First byte; a multiple of the block size.")
    ] = 0,
    length: Annotated[
        int | None,
        typer.Option(parser=sizes.size, metavar="SIZE", help="In whole blocks.", show_default="to the end of the file"),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="The device writes the blocks; holes get blocks.")] = False,
    longterm: Annotated[bool, typer.Option("--longterm", help="FOLL_LONGTERM, as RDMA memory regions have.")] = False,
    label: Annotated[str, typer.Option(help="A name for the list of pins.")] = "",
    hold: Annotated[
        float | None,
        typer.Option(parser=sizes.seconds, metavar="SECONDS", help="Let go after this time.", show_default="never"),
    ] = None,
    fill: Annotated[
        int | None,
        typer.Option(
            parser=sizes.byte,
            metavar="BYTE",
            help="Keep writing BYTE (0xa5, 165) into the pinned blocks through the image, as a DMA engine would, and "
            "watch for others; means --write.",
        ),
    ] = None,
) -> int:
    """Pin a range of FILE and hold it.

    Prints one line of JSON once the pin is held, and keeps it until SIGTERM, Ctrl-C or the time is over. With --fill it
    prints one more at the end, and the exit code is 1 if a byte other than BYTE was ever seen in the pinned blocks.
    """
    from daxfs import client

    write = write or fill is not None
    with (
        client.open(file, "r+" if write else "r") as opened,
        opened.pin(offset, length, write=write, longterm=longterm) as held,
    ):
        if label:
            held.label(label)
        view = held.map() if fill is not None else None
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # from here on sigtimedwait takes them: none is lost
        print_json({"pin": held.id, "runs": [list(run) for run in held.runs]}, line=True)
        end = None if hold is None else time.monotonic() + hold
        if view is not None and fill is not None:
            return _fill(view, fill, held.id, lambda: _stopped(end, _PAUSE_S))
        while not _stopped(end, 3600.0):
            pass
        return 0


def _stopped(end: float | None, wait_s: float) -> bool:
    """Wait for a signal, at most `wait_s` and not beyond `end`; True if it is time to let go."""
    if end is not None:
        wait_s = min(wait_s, max(0.0, end - time.monotonic()))
    taken = signal.sigtimedwait(_STOP, wait_s)
    return taken is not None or (end is not None and time.monotonic() >= end)


def _fill(view: memoryview, byte: int, pin_id: int, stopped: Callable[[], bool]) -> int:
    from daxfs.cli.engine import FillEngine

    seen = FillEngine(view, byte).run(stopped)
    report = {"pin": pin_id, "fill": byte, "passes": seen.passes, "foreign_bytes": seen.foreign, "first_foreign": None}
    if seen.first is None:
        print_json(report, line=True)
        say(f"no byte but {byte:#04x} was ever seen in the pinned blocks ({len(view)} bytes, {seen.passes} passes)")
        return 0
    at, value = seen.first
    print_json(report | {"first_foreign": {"offset": at, "byte": value}}, line=True)
    raise Failure(f"{seen.foreign} bytes were not {byte:#04x}, the first one {value:#04x} at byte {at} of the range")
