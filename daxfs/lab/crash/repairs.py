"""A repair on the recording medium: cut short, it is run again, and ends as it would have without the cut.

`fsck --repair` is no call on a volume, so the explorer does not see it; here it is explored as a whole, in the same
way: an image is damaged (`DAMAGES`), its repair recorded, and at every fence and at the end what a crash can leave is
repaired again. Then nothing may be wrong any more, and the files are those that an uninterrupted repair leaves; at the
end there must be nothing to repair.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from daxfs.core import fsck, layout
from daxfs.core.inode import Inode
from daxfs.core.volume import Volume
from daxfs.errors import FsError
from daxfs.lab.crash import calls, state
from daxfs.lab.crash.calls import World
from daxfs.lab.crash.images import Limits, digest_with, tracker
from daxfs.lab.crash.medium import LINE, Fence, RecordingPmem, Return
from daxfs.lab.crash.state import State

LIMITS = Limits(all=8, lines=3, pairs=2, random=2)
_NOW = calls.START + (1 << 20) * calls.SECOND
_BOOT = b"boot of a repair"

Damage = Callable[[World, bytearray], None]
DAMAGES: dict[str, Damage] = {}


def damage(make: Damage) -> Damage:
    DAMAGES[make.__name__.replace("_", "-")] = make
    return make


def damaged(name: str) -> bytes:
    """The base image with some life and then one damage in it, as after a crash."""
    medium = RecordingPmem(calls.IMAGE_SIZE)
    medium.put(calls.base_image())
    world = World.begin(Volume.open(medium, now=calls.START, boot_id=calls.BOOT))
    if name == "lost-chunk":
        for number in range(2 * layout.CHUNK_INODES):
            world.create(b"/empty/%d" % number)
    world.unlink(b"/dir/hard")
    image = bytearray(medium.raw)
    DAMAGES[name](world, image)
    return bytes(image)


def record(name: str) -> tuple[bytes, RecordingPmem, fsck.Report]:
    """A damaged image, and its repair to the end."""
    image = damaged(name)
    medium = RecordingPmem(len(image))
    medium.put(image)
    report = fsck.repair(medium, now=_NOW)
    medium.returned(0)
    return image, medium, report


def explore(name: str, domain: str = "adr", seed: int = 1, limits: Limits = LIMITS) -> tuple[int, str]:
    """How many images were repaired again, and what is wrong with the last of them, "" if nothing is."""
    try:
        image, medium, report = record(name)
    except FsError as e:
        return 0, f"the repair fails: {e.why}"
    log = tuple(medium.log)
    again = RecordingPmem(len(image))
    again.put(bytes(medium.raw))
    wanted, why = _look(again, done=True)
    if report.left or not report.fixed or why:
        return 0, why or f"the repair did {report.fixed} things and left {report.left} errors"
    rng, tried = Random(f"{seed} {name}"), set[tuple[int, bool]]()
    everything = np.ones(len(image) // LINE, np.bool_)
    for kind in (Return, Fence):  # what shows at the end shows soonest
        base = tracker(domain, image)
        for event in log:
            if isinstance(event, kind):
                for choice in base.images(everything, rng, limits):
                    digest = digest_with(base, choice), kind is Return
                    if digest in tried:
                        continue
                    tried.add(digest)
                    again.put(base.durable)
                    for line, content in choice.items():
                        again.raw[line * LINE : (line + 1) * LINE] = content
                    found, why = _look(again, done=kind is Return)
                    if why or found != wanted:
                        return len(tried), why or "the repair of an interrupted repair leaves other files"
            base.feed(event)
    return len(tried), ""


def _look(medium: RecordingPmem, *, done: bool) -> tuple[State | None, str]:
    """Repair, check and mount what is on a medium; `done`: there should be nothing to repair."""
    try:
        report = fsck.repair(medium, now=_NOW)
        if done and report.fixed:
            fixed = next(finding.text for finding in report.findings if finding.severity == fsck.FIXED)
            return None, f"a repair that had returned has to do it again: {fixed}"
        if report.left or fsck.check(medium).errors:
            return None, f"{report.left} errors are left by a repair, and a check finds {fsck.check(medium).errors}"
        volume = Volume.open(medium, now=_NOW, boot_id=_BOOT)
        volume.check()
        found = state.state_of(volume)
    except FsError as e:
        return None, f"it does not mount after a repair: {e.why}"
    return found, state.faults(found) or ""


# -- what goes wrong --


def _scribble(image: bytearray, at: int, n: int = 24) -> None:
    image[at : at + n] = calls.pattern(n, n)


def _reseal(world: World, image: bytearray, inode: Inode, **fields: int | bytes) -> None:
    """Change fields of an inode's record, and its checksum with them."""
    record = {**layout.INODE.unpack(memoryview(image), inode.at), **fields}
    image[inode.at : inode.at + layout.INODE_SIZE] = layout.seal(layout.INODE.pack(**record), end=layout.INODE_CRC_END)


@damage
def superblock(world: World, image: bytearray) -> None:
    _scribble(image, world.volume.sb["copy"] * calls.BLOCK + 100)


@damage
def journal_header(world: World, image: bytearray) -> None:
    _scribble(image, world.volume.sb["journal_start"] * calls.BLOCK)


def _commit(world: World, image: bytearray) -> int:
    """Set the commit word as if the last transaction were not applied; the address of its body."""
    start = world.volume.sb["journal_start"] * calls.BLOCK
    at = start + layout.JOURNAL_COMMIT_AT
    image[at : at + 8] = (world.volume.journal.sequence - 1).to_bytes(8, "little")
    return int(start) + calls.BLOCK


@damage
def journal_bit(world: World, image: bytearray) -> None:
    image[_commit(world, image) + 70] ^= 4


@damage
def journal_body(world: World, image: bytearray) -> None:
    _scribble(image, _commit(world, image) + 70)


@damage
def inode_directory(world: World, image: bytearray) -> None:
    _scribble(image, world.volume.sb["idir_start"] * calls.BLOCK, 8)


@damage
def lost_chunk(world: World, image: bytearray) -> None:
    """The second of three chunks of inodes, with all that was in it."""
    assert len(world.volume.chunks) == 3
    at = world.volume.sb["idir_start"] * calls.BLOCK + 8
    image[at : at + 8] = bytes(8)
    start = world.volume.chunks[1] * calls.BLOCK
    image[start : start + 4 * calls.BLOCK] = b"\xee" * (4 * calls.BLOCK)


@damage
def root(world: World, image: bytearray) -> None:
    _scribble(image, world.volume.root.at)


@damage
def inode(world: World, image: bytearray) -> None:
    _scribble(image, world.find(b"/frag").at + 40)


@damage
def link_count(world: World, image: bytearray) -> None:
    _reseal(world, image, world.find(b"/file"), nlink=7)


@damage
def two_owners(world: World, image: bytearray) -> None:
    theirs = layout.INODE.unpack(memoryview(image), world.find(b"/file").at)
    ours = world.find(b"/held")
    _reseal(world, image, ours, body=theirs["body"], extents=theirs["extents"], blocks=theirs["blocks"])


@damage
def extent_leaf(world: World, image: bytearray) -> None:
    _scribble(image, world.find(b"/frag").map.leaf_blocks()[0] * calls.BLOCK)


@damage
def xattr_block(world: World, image: bytearray) -> None:
    _scribble(image, world.find(b"/chain").xattr_block * calls.BLOCK)


@damage
def directory_block(world: World, image: bytearray) -> None:
    """What was in it goes to lost+found."""
    _scribble(image, world.find(b"/dir").block(0) * calls.BLOCK)


@damage
def ledger(world: World, image: bytearray) -> None:
    _scribble(image, world.volume.sb["ledger"] * calls.BLOCK)


@damage
def ledger_in_a_file(world: World, image: bytearray) -> None:
    """Both superblocks say that the ledger is where a file is."""
    sb = {**world.volume.sb, "ledger": world.find(b"/held").block(0)}
    for copy in (0, 1):
        record = layout.seal(layout.SUPERBLOCK.pack(**{**sb, "magic": layout.SB_MAGIC, "crc": 0, "copy": copy}))
        image[copy * calls.BLOCK : copy * calls.BLOCK + len(record)] = record
