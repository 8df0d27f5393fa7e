"""mkfs on the recording medium: cut short it leaves an image that is refused, or an empty volume; done, the latter.

An mkfs is no call on a volume, so the explorer does not see it; it is explored here as a whole, in the same way: at
every fence and at the end, what a crash can leave is mounted.
"""

from __future__ import annotations

from random import Random

import numpy as np

from daxfs.core import format, fsck, layout
from daxfs.core.volume import Volume
from daxfs.errors import ImageError
from daxfs.lab.crash import calls, state
from daxfs.lab.crash.bugs import changed
from daxfs.lab.crash.images import Limits, digest_with, tracker
from daxfs.lab.crash.medium import LINE, Fence, RecordingPmem, Return


def explore(domain: str = "adr", seed: int = 1, limits: Limits | None = None) -> tuple[int, str]:
    """How many images were mounted or refused, and what is wrong with the last of them, "" if nothing is."""
    medium = RecordingPmem(calls.IMAGE_SIZE)
    with changed([(format, "Pmem", lambda _: medium), (format, "_make_sparse", lambda *_: None)]):
        format.format_image("", calls.IMAGE_SIZE, now=calls.START, uuid=b"crash explorer's")
    medium.returned(0)
    base = tracker(domain, bytes(calls.IMAGE_SIZE))
    rng, tried = Random(seed), set[tuple[int, bool]]()
    everything = np.ones(calls.IMAGE_SIZE // LINE, np.bool_)
    judged = RecordingPmem(calls.IMAGE_SIZE)
    for event in medium.log:
        if isinstance(event, Fence | Return):
            for choice in base.images(everything, rng, limits or Limits()):
                done = isinstance(event, Return)
                digest = digest_with(base, choice), done
                if digest not in tried:
                    tried.add(digest)
                    judged.put(base.durable)
                    for line, content in choice.items():
                        judged.raw[line * LINE : (line + 1) * LINE] = content
                    why = _judge(judged, done=done)
                    if why:
                        return len(tried), why
        base.feed(event)
    return len(tried), ""


def _judge(medium: RecordingPmem, *, done: bool) -> str:
    copies = [medium.load(copy * calls.BLOCK, layout.SUPERBLOCK.size) for copy in (0, 1)]
    if done and not all(layout.SUPERBLOCK.unpack(copy)["magic"] == layout.SB_MAGIC for copy in copies):
        return "mkfs is done, and left only one superblock"
    try:
        volume = Volume.open(medium, now=calls.START, boot_id=calls.BOOT)
    except ImageError as e:
        return f"mkfs is done, and its image does not mount: {e}" if done else ""
    volume.check()
    found = state.state_of(volume)
    report = fsck.check(medium)
    if list(found.nodes) != [b""] or report.errors:
        return f"an mkfs that was cut short leaves {len(found.nodes)} files, and fsck finds {report.errors} errors"
    return state.faults(found) or ""
