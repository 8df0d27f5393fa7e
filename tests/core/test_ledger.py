"""The pin ledger: holders outlive the daemon, and their blocks stay away from everybody until they are gone.

`crash` ends a daemon without a word: the image stays as it was, the next one starts on the same boot of the host or another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxfs import abi
from daxfs.core import fileops, fsck, holding, layout, ledger, namespace
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.layout import LEDGER_BLOCK, LEDGER_ENTRY
from daxfs.core.namespace import Caller
from daxfs.core.pins import Holder, Pin
from daxfs.core.volume import Volume
from daxfs.errors import ImageError, NoSpace

from .image import NOW

B = 4096
PER_BLOCK = B // LEDGER_ENTRY.size - 1
BOOT, NEXT_BOOT = b"1" * 16, b"2" * 16


class Daemon:
    """One image, mounted again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        format_image(path, 4 << 20, now=NOW)
        self.start()

    def start(self, boot_id: bytes = BOOT) -> None:
        self.vol = Volume.open(self.path, now=NOW, boot_id=boot_id)
        self.vol.check()

    def crash(self, boot_id: bytes = BOOT) -> None:
        self.vol.pmem.close()
        self.start(boot_id)

    def file(self, name: bytes, blocks: int) -> Inode:
        inode = namespace.create(self.vol, NOW, self.vol.root, name, 0o644, Caller(0, 0))
        fileops.write(self.vol, NOW, inode, 0, b"".join(bytes([1 + i % 250]) * B for i in range(blocks)))
        return inode

    def pin(self, inode: Inode, first: int, count: int, pid: int = 100, owner: int = 1) -> list[int]:
        """Pinned blocks of the image."""
        inode.opens += 1
        return held(holding.pin(self.vol, NOW, inode, first * B, count * B, abi.FOLL_PIN, owner, Holder(pid, "x", 9),
                                writable=False))  # fmt: skip


def held(pin: Pin) -> list[int]:
    return [b for start, count in pin.runs for b in range(start, start + count)]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path / "image")
    yield one
    one.vol.check()
    report = fsck.check(one.vol.pmem)
    assert report.errors == 0, [str(f) for f in report.findings]
    one.vol.pmem.close()


def test_survivors_keep_their_blocks(daemon: Daemon) -> None:
    """S39: busy blocks and live holders, the daemon dies: nobody gets the blocks until the holder is gone."""
    inode = daemon.file(b"f", 8)
    blocks = daemon.pin(inode, 2, 3)
    fileops.truncate(daemon.vol, NOW, inode, 3 * B)  # one pinned block is the file's still
    content = [daemon.vol.pmem.load(b * B, B) for b in blocks]
    for _ in range(3):
        daemon.crash()
        vol = daemon.vol
        (survivor,) = vol.pins.survivors()
        assert (held(survivor), survivor.holder.pid, survivor.holder.started) == (blocks, 100, 9)
        assert (survivor.ino, survivor.flags, survivor.length) == (inode.ino, abi.FOLL_PIN, 3 * B)
        assert (vol.busy, vol.pinned) == (2, 3)
    hog = daemon.file(b"hog", vol.alloc.available)
    assert vol.alloc.available == 0
    assert {b for _, start, n, _ in hog.map for b in range(start, start + n)}.isdisjoint(blocks)
    assert [vol.pmem.load(b * B, B) for b in blocks] == content
    holding.release_survivor(vol, survivor)
    assert not vol.free_unpinned(NOW, 10)
    assert (vol.busy, vol.pinned, vol.alloc.available) == (0, 0, 2)
    daemon.crash()
    assert list(daemon.vol.pins) == []


def test_another_boot_voids_all(daemon: Daemon) -> None:
    """No process outlives the host: nothing is held, and nothing comes back with a third boot's number."""
    inode = daemon.file(b"f", 8)
    daemon.pin(inode, 2, 3)
    fileops.truncate(daemon.vol, NOW, inode, 0)
    free = daemon.vol.free
    for boot_id in (NEXT_BOOT, BOOT):
        daemon.crash(boot_id)
        assert list(daemon.vol.pins) == []
        assert (daemon.vol.busy, daemon.vol.free) == (0, free + 3)


def test_without_a_boot_id_nothing_survives(daemon: Daemon) -> None:
    """A host that cannot tell its boots: zeros never equal zeros."""
    daemon.crash(b"")
    daemon.pin(daemon.file(b"f", 8), 2, 3)
    daemon.crash(b"")
    assert list(daemon.vol.pins) == []


def test_unpinned_is_unpinned(daemon: Daemon) -> None:
    inode = daemon.file(b"f", 8)
    for first in range(8):
        daemon.pin(inode, first, 1, owner=first % 2)
    holding.release_owner(daemon.vol, 1)
    daemon.crash()
    assert sorted(b for p in daemon.vol.pins for b in held(p)) == [inode.block(i) for i in range(0, 8, 2)]


def test_survivors_of_a_clean_unmount(daemon: Daemon) -> None:
    """A holder that still maps the image keeps its blocks, however the daemon ended."""
    inode = daemon.file(b"f", 8)
    blocks = daemon.pin(inode, 0, 8)
    fileops.truncate(daemon.vol, NOW, inode, 4 * B)
    daemon.vol.close(NOW)
    daemon.start()
    assert [held(p) for p in daemon.vol.pins.survivors()] == [blocks]
    assert daemon.vol.busy == 4


def test_an_unlinked_file_of_a_survivor(daemon: Daemon) -> None:
    """S42: the orphan ends at mount; its pinned blocks are busy."""
    inode = daemon.file(b"f", 8)
    blocks = daemon.pin(inode, 2, 3)
    namespace.unlink(daemon.vol, NOW, daemon.vol.root, b"f")
    daemon.crash()
    assert [b for start, n in daemon.vol.busy_runs() for b in range(start, start + n)] == blocks
    assert daemon.vol.inode_at(inode.ino)
    assert inode.ino in daemon.vol.free_inodes


def test_a_read_only_mount_knows_survivors_and_writes_nothing(daemon: Daemon) -> None:
    daemon.pin(daemon.file(b"f", 8), 2, 3)
    daemon.vol.pmem.close()
    image = daemon.path.read_bytes()
    for boot_id, survivors in ((BOOT, 1), (NEXT_BOOT, 0)):
        vol = Volume.open(daemon.path, readonly=True, now=NOW, boot_id=boot_id)
        assert len(vol.pins.survivors()) == survivors
        vol.close(NOW)
    assert daemon.path.read_bytes() == image
    daemon.start()


def test_the_chain_grows(daemon: Daemon) -> None:
    inode = daemon.file(b"f", 8)
    for pid in range(3 * PER_BLOCK):
        daemon.pin(inode, pid % 8, 1, pid=pid)
    assert len(daemon.vol.ledger.blocks) == 3
    daemon.vol.check()
    daemon.crash()
    assert sorted(p.holder.pid for p in daemon.vol.pins.survivors()) == list(range(3 * PER_BLOCK))
    for pin in daemon.vol.pins.survivors():
        holding.release_survivor(daemon.vol, pin)
    for pid in range(3 * PER_BLOCK):  # void entries are used again
        daemon.pin(daemon.vol.inode(inode.ino), pid % 8, 1, pid=pid)
    assert len(daemon.vol.ledger.blocks) == 3
    daemon.crash(NEXT_BOOT)
    assert len(daemon.vol.ledger.blocks) == 1  # all of it is void
    assert list(daemon.vol.pins) == []


def test_a_pin_of_many_runs(daemon: Daemon) -> None:
    """Each run has an entry; together they are one pin again."""
    inode = daemon.file(b"f", 1)
    other = daemon.file(b"g", 1)
    for i in reversed(range(1, 100)):  # backwards: no two blocks of one of them are neighbours
        fileops.write(daemon.vol, NOW, inode, i * B, b"x" * B)
        fileops.write(daemon.vol, NOW, other, i * B, b"y" * B)
    blocks = daemon.pin(inode, 0, 100)
    assert len(inode.map) > PER_BLOCK
    daemon.crash()
    (survivor,) = daemon.vol.pins.survivors()
    assert sorted(held(survivor)) == sorted(blocks)


def test_growth_on_a_full_volume(daemon: Daemon) -> None:
    """Pins do not eat the reserve that unlink and punch may need (I10)."""
    inode = daemon.file(b"f", 8)
    daemon.file(b"hog", daemon.vol.alloc.available)
    reserve = daemon.vol.free
    for pid in range(PER_BLOCK):
        daemon.pin(inode, pid % 8, 1, pid=pid)
    with pytest.raises(NoSpace):
        daemon.pin(inode, 0, 1)
    assert daemon.vol.free == reserve
    assert len(daemon.vol.pins) == PER_BLOCK
    holding.release_owner(daemon.vol, 1)
    daemon.pin(inode, 0, 1)


# -- hostile ledgers --


def entry(at: int, start: int, count: int, *, address: int | None = None, magic: int = layout.LEDGER_ENTRY_MAGIC) -> bytes:
    return layout.seal(LEDGER_ENTRY.struct.pack(magic, 0, at if address is None else address, 1, start, count, 7, 1, 9, 2))


@pytest.fixture
def place(daemon: Daemon) -> int:
    """Where the first entry is."""
    return int(daemon.vol.sb["ledger"]) * B + LEDGER_ENTRY.size


HOSTILE = {
    "torn": lambda at, vol: entry(at, vol.blocks - 9, 3)[:40] + bytes(24),
    "another's": lambda at, vol: entry(at, vol.blocks - 9, 3, address=at + 64),
    "of the superblock": lambda at, vol: entry(at, 0, 3),
    "of the journal": lambda at, vol: entry(at, vol.sb["data_start"] - 1, 3),
    "outside": lambda at, vol: entry(at, vol.blocks, 1),
    "beyond the end": lambda at, vol: entry(at, vol.blocks - 9, 10),
    "huge": lambda at, vol: entry(at, vol.blocks - 9, (1 << 64) - 1),
    "empty": lambda at, vol: entry(at, vol.blocks - 9, 0),
    "of another magic": lambda at, vol: entry(at, vol.blocks - 9, 3, magic=layout.LEAF_MAGIC),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_entry_that_is_none(daemon: Daemon, place: int, what: str) -> None:
    daemon.vol.pmem.store(place, HOSTILE[what](place, daemon.vol))
    daemon.crash()
    assert list(daemon.vol.pins) == []
    daemon.pin(daemon.file(b"f", 2), 0, 1)  # its room is used again


def test_an_entry_over_metadata_harms_nobody(daemon: Daemon, place: int) -> None:
    """A hostile but sound entry may cover anything in the data region: all of it just stays where it is."""
    vol = daemon.vol
    start = vol.sb["data_start"]
    vol.pmem.store(place, entry(place, start, vol.blocks - start))
    daemon.file(b"f", 4)
    daemon.crash()
    assert daemon.vol.free == 0
    with pytest.raises(NoSpace):
        fileops.write(daemon.vol, NOW, daemon.vol.inode(vol.root.ino + 1), 4 * B, b"x")
    namespace.unlink(daemon.vol, NOW, daemon.vol.root, b"f")
    (survivor,) = daemon.vol.pins.survivors()
    holding.release_survivor(daemon.vol, survivor)
    daemon.vol.free_unpinned(NOW, 1000)
    assert daemon.vol.busy == 0
    daemon.file(b"g", 20)


CHAINS = {
    "a cycle": lambda vol: {"next": vol.sb["ledger"]},
    "outside": lambda vol: {"next": vol.blocks},
    "into the journal": lambda vol: {"next": 3},
    "to a block that is none": lambda vol: {"next": vol.blocks - 1},
    "another's address": lambda vol: {"address": 99},
    "another magic": lambda vol: {"magic": layout.LEAF_MAGIC},
}


@pytest.mark.parametrize("what", CHAINS)
@pytest.mark.parametrize("boot_id", [BOOT, NEXT_BOOT], ids=["same boot", "another boot"])
def test_a_chain_that_is_none(tmp_path: Path, what: str, boot_id: bytes) -> None:
    daemon = Daemon(tmp_path / "image")
    vol = daemon.vol
    values = LEDGER_BLOCK.unpack(vol.pmem.view, vol.sb["ledger"] * B) | CHAINS[what](vol)
    vol.pmem.store(vol.sb["ledger"] * B, layout.seal(LEDGER_BLOCK.pack(**values)))
    vol.pmem.close()
    with pytest.raises(ImageError, match=r"is damaged: .*ledger") as refused:
        Volume.open(daemon.path, now=NOW, boot_id=boot_id)
    assert "\n" not in refused.value.why


@given(st.binary(min_size=64, max_size=640), st.integers(0, 8))
def test_any_bytes_among_the_entries(daemon: Daemon, junk: bytes, index: int) -> None:
    at = int(daemon.vol.sb["ledger"]) * B + LEDGER_ENTRY.size * (1 + index)
    daemon.vol.pmem.store(at, junk)
    daemon.crash()
    assert list(daemon.vol.pins) == []


@pytest.mark.parametrize(("text", "started"), [
    ("12 (cat) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20", 777),
    ("12 (a b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20", 777),
    ("12 (cat) S 1 2", 0),
    ("", 0),
    ("12 (cat) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x 20", 0),
])  # fmt: skip
def test_process_started(text: str, started: int) -> None:
    assert ledger.process_started(text) == started


def test_a_long_ledger_is_given_back(daemon: Daemon) -> None:
    """... by the next mount, but for what survivors have in it; whatever mount it is, and crash after crash."""
    inode = daemon.file(b"f", 4)
    free = daemon.vol.free
    kept = daemon.pin(inode, 0, 1)
    for _ in range(3 * PER_BLOCK):
        daemon.pin(inode, 1, 2, owner=2)
    late = daemon.pin(inode, 3, 1, owner=3)
    assert len(daemon.vol.ledger.blocks) == 4
    holding.release_owner(daemon.vol, 2)
    daemon.crash()
    assert (len(daemon.vol.ledger.blocks), daemon.vol.free) == (4, free - 3)
    assert {block for pin in daemon.vol.pins for block in held(pin)} == {*kept, *late}
    holding.release_survivor(daemon.vol, next(pin for pin in daemon.vol.pins if held(pin) == late))
    for _ in range(2):
        daemon.crash()
        assert (len(daemon.vol.ledger.blocks), daemon.vol.free) == (1, free)
        assert [held(pin) for pin in daemon.vol.pins] == [kept]
    daemon.vol.close(NOW)
    daemon.start(NEXT_BOOT)
    assert (len(daemon.vol.ledger.blocks), list(daemon.vol.pins)) == (1, [])
