"""fsck: silent on what daxfs writes, outspoken on everything else, never at a loss."""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from daxfs.core import acl, fileops, fsck, layout, namespace, superblock, xattr
from daxfs.core.directory import pack_block
from daxfs.core.format import format_image
from daxfs.core.fsck import Report
from daxfs.core.fsck.report import FINDINGS_MAX
from daxfs.core.journal import Journal
from daxfs.core.layout import DIRBLOCK, EXTENT, INODE, INODE_CRC_END, LEAF, LEDGER_ENTRY, SNAPSHOT, XATTR_BLOCK
from daxfs.core.namespace import Caller
from daxfs.core.pmem import Pmem
from daxfs.core.records import pack_entry
from daxfs.core.volume import Volume
from daxfs.errors import ImageError

from .image import NOW

BS = 4096
WHO = Caller(0, 0, 0o022)


def populate(volume: Volume) -> None:
    """A bit of everything: /file (many extents, leaves), /small, /dir with entries, /dir/sub, links, xattrs, ACLs."""
    root = volume.root
    directory = namespace.mkdir(volume, NOW, root, b"dir", 0o755, WHO)
    file = namespace.create(volume, NOW, root, b"file", 0o644, WHO)
    small = namespace.create(volume, NOW, root, b"small", 0o644, WHO)
    fileops.write(volume, NOW, small, 0, b"hello")
    for i in range(400):
        fileops.write(volume, NOW, file, i * 2 * BS, b"x")
    for i in range(200):
        namespace.create(volume, NOW, directory, b"f%03d" % i, 0o644, WHO)
    sub = namespace.mkdir(volume, NOW, directory, b"sub", 0o755, WHO)
    namespace.mkdir(volume, NOW, sub, b"deep", 0o755, WHO)
    namespace.link(volume, NOW, small, directory, b"link")
    namespace.symlink(volume, NOW, root, b"short", b"t" * 100, WHO)
    namespace.symlink(volume, NOW, root, b"long", b"t" * 1000, WHO)
    namespace.create(volume, NOW, root, b"fifo", stat.S_IFIFO | 0o644, WHO)
    with volume.transaction(NOW) as txn:
        xattr.set(volume, txn, small, b"user.small", b"v" * 20)
        xattr.set(volume, txn, file, b"user.big", b"v" * 9000)
        xattr.set(volume, txn, sub, acl.DEFAULT, acl.from_mode(0o750))
    fileops.fallocate(volume, NOW, small, fileops.FALLOC_KEEP_SIZE, 3 * BS, BS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A populated image, cleanly unmounted."""
    path = tmp_path_factory.mktemp("fsck") / "sound"
    format_image(path, 16 << 20, now=NOW)
    volume = Volume.open(path, now=NOW)
    populate(volume)
    volume.check()
    volume.close(NOW)
    return path


@pytest.fixture
def image(sound: Path, tmp_path: Path) -> Iterator[Medium]:
    copy = tmp_path / "image"
    shutil.copyfile(sound, copy)
    medium = Medium(copy)
    yield medium
    medium.pmem.close()


class Medium:
    """An image that a test damages: records are changed field by field, with their checksums made right again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pmem = Pmem(path)
        self.sb = superblock.load(self.pmem)
        self.inos = self._inos()

    def check(self) -> Report:
        return fsck.check(self.pmem)

    def _inos(self) -> dict[str, int]:
        volume = Volume.open(self.path, readonly=True, now=NOW, lock=False)
        found = {"root": 1}
        todo = [("", volume.root)]
        while todo:
            prefix, directory = todo.pop()
            for name, ino, _, _ in namespace.entries(volume, directory, 0):
                found[prefix + name.decode()] = ino
                if volume.inode(ino).is_dir:
                    todo.append((prefix + name.decode() + "/", volume.inode(ino)))
        volume.close(NOW)
        return found

    def inode_at(self, name: str) -> int:
        chunk, within = divmod(self.inos[name], layout.CHUNK_INODES)
        word = self.pmem.load_word(self.sb["idir_start"] * BS + 8 * chunk)
        return layout.idir_block(chunk, word) * BS + within * layout.INODE_SIZE

    def inode(self, name: str) -> dict[str, int | bytes]:
        return INODE.unpack(self.pmem.view, self.inode_at(name))

    def number(self, name: str, field: str) -> int:
        value = self.inode(name)[field]
        assert isinstance(value, int)
        return value

    def set_inode(self, name: str, **changes: int | bytes) -> None:
        record = INODE.pack(**{**self.inode(name), **changes})
        self.pmem.store(self.inode_at(name), layout.seal(record, end=INODE_CRC_END))

    def extents(self, name: str) -> list[tuple[int, int, int, int]]:
        """Inline extents."""
        body = self.inode(name)["body"]
        assert isinstance(body, bytes)
        return [EXTENT.struct.unpack_from(body, 24 * i) for i in range(self.number(name, "extents"))]

    def set_extents(self, name: str, *extents: tuple[int, int, int, int]) -> None:
        self.set_inode(name, extents=len(extents), body=b"".join(EXTENT.struct.pack(*e) for e in extents))

    def dir_block(self, name: str) -> int:
        return self.extents(name)[0][1]

    def set_entries(self, name: str, *entries: tuple[bytes, int, int]) -> None:
        """The first block of a directory has these entries only: (name, ino, type)."""
        block = self.dir_block(name)
        data = pack_block(block, self.inos[name], 0, BS)[: DIRBLOCK.size]
        for entry, ino, dtype in entries:
            length = (16 + len(entry) + 15) // 16
            data += pack_entry(ino, length, dtype, entry).ljust(16 * length, b"\0")
        self.pmem.store(block * BS, (data + pack_entry(0, (BS - len(data)) // 16, 0, b"")).ljust(BS, b"\0"))

    def entries(self, name: str) -> list[tuple[bytes, int, int]]:
        from daxfs.core.directory import parse_block

        block = self.dir_block(name)
        records = parse_block(self.pmem.load(block * BS, BS), block, self.inos[name], 0, 1 << 32)
        return [(entry, ino, dtype) for _, _, ino, dtype, entry in records if ino]

    def set_record(self, at: int, table: layout.Table, length: int, **changes: int) -> None:
        """Change a header that is sealed together with `length` bytes in all."""
        data = self.pmem.load(at, length)
        header = table.pack(**{**table.unpack(data), **changes})
        self.pmem.store(at, layout.seal(header + data[table.size :]))

    def set_leaf(self, block: int, **changes: int) -> None:
        count = changes.get("count", int(LEAF.unpack(self.pmem.view, block * BS)["count"]))
        self.set_record(block * BS, LEAF, LEAF.size + 24 * count, **changes)

    def set_superblock(self, **changes: int | bytes) -> None:
        superblock.store(self.pmem, {**self.sb, **changes})

    def unclean(self) -> None:
        self.set_superblock(state=layout.STATE_MOUNTED, snapshot_start=0, snapshot_blocks=0)


def texts(report: Report, severity: str = fsck.ERROR) -> list[str]:
    return [finding.text for finding in report.findings if finding.severity == severity]


def test_a_sound_image_is_sound(sound: Path) -> None:
    report = fsck.check(sound)
    assert (report.findings, report.exit_code) == ([], 0)
    assert report.counts["files"] == 202
    assert report.counts["directories"] == 4
    assert report.counts["symlinks"] == 2
    assert report.counts["entries"] == report.counts["inodes"] == 209
    assert report.counts["blocks"] == (16 << 20) // BS == report.counts["free"] + report.counts["used"]


@pytest.mark.parametrize("block_size", layout.BLOCK_SIZES)
def test_every_block_size(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "image"
    format_image(path, 64 << 20, block_size=block_size, now=NOW)
    volume = Volume.open(path, now=NOW)
    populate(volume)
    assert texts(fsck.check(volume.pmem)) == []
    volume.close(NOW)
    report = fsck.check(path)
    assert report.findings == []
    volume = Volume.open(path, readonly=True, now=NOW)
    assert report.counts["free"] == volume.free
    volume.close(NOW)


def test_nothing_is_written(sound: Path) -> None:
    before = sound.read_bytes()
    fsck.check(sound)
    assert sound.read_bytes() == before


def test_an_image_in_use_cannot_be_checked(image: Medium) -> None:
    with pytest.raises(ImageError, match="in use"):
        fsck.check(image.path)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(1 << 20), b"\x55" * (1 << 20)])
def test_no_image(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        fsck.check(path)
    with pytest.raises(ImageError):
        fsck.check(tmp_path / "missing")


def test_without_superblocks_nothing_can_be_checked(image: Medium) -> None:
    for at in (100, BS + 100, image.sb["idir_start"] * BS):
        image.pmem.store(at, b"\xff")
    with pytest.raises(ImageError, match="restore"):
        image.check()


def test_progress(sound: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    fsck.check(sound, lambda *step: steps.append(step))
    assert {what for what, _, _ in steps} == {"inodes", "directories", "space"}
    assert all(done <= total for _, done, total in steps)


# -- damage that has right checksums: one line per rule ------------------------------------------------------------------


def first_leaf(m: Medium) -> int:
    return m.number("file", "leaf")


def second_leaf(m: Medium) -> int:
    return int(LEAF.unpack(m.pmem.view, first_leaf(m) * BS)["next"])


def set_leaf_extent(m: Medium, index: int, **changes: int) -> None:
    block = first_leaf(m)
    at = block * BS + LEAF.size + 24 * index
    m.pmem.store(at, EXTENT.pack(**{**EXTENT.unpack(m.pmem.view, at), **changes}))
    m.set_leaf(block)


def raise_entries(m: Medium, name: str, **changes: tuple[bytes, int, int]) -> None:
    m.set_entries(name, *(changes.get(e[0].decode(), e) for e in m.entries(name)))


def set_xattrs(m: Medium, name: str, **xattrs: bytes) -> None:
    data = xattr.encode({key.replace("__", ".").encode(): value for key, value in xattrs.items()})
    m.set_inode(name, xattrs=data.ljust(240, b"\0"), xattr_length=len(data))


def ledger_entry(m: Medium, start: int, count: int, address: int = 0) -> None:
    boot = b"B" * 16
    m.set_superblock(boot_id=boot, state=layout.STATE_MOUNTED)
    at = m.sb["ledger"] * BS
    header = layout.LEDGER_BLOCK.pack(magic=layout.LEDGER_MAGIC, crc=0, address=m.sb["ledger"], next=0, boot_id=boot,
                                      reserved=b"")  # fmt: skip
    m.pmem.store(at, layout.seal(header))
    entry = LEDGER_ENTRY.pack(magic=layout.LEDGER_ENTRY_MAGIC, crc=0, address=at + 64 + address, pin=3, start=start,
                              count=count, pid=1, flags=0, started=5, ino=9)  # fmt: skip
    m.pmem.store(at + 64, layout.seal(entry))


def cycle(m: Medium) -> None:
    """/dir is in /dir/sub and no longer in the root."""
    m.set_entries("dir/sub", (b"deep", m.inos["dir/sub/deep"], 4), (b"up", m.inos["dir"], 4))
    m.set_entries("root", *(e for e in m.entries("root") if e[0] != b"dir"))


def orphan(m: Medium) -> None:
    m.set_inode("fifo", nlink=0)
    m.set_entries("root", *(e for e in m.entries("root") if e[0] != b"fifo"))


def chunk_word(m: Medium, index: int, word: int) -> None:
    m.pmem.store_word(m.sb["idir_start"] * BS + 8 * index, word)


def chunk_block(m: Medium, index: int) -> int:
    return layout.idir_block(index, m.pmem.load_word(m.sb["idir_start"] * BS + 8 * index))


def set_snapshot(m: Medium, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    from crc32c import crc32c

    at = m.sb["snapshot_start"] * BS
    head = SNAPSHOT.unpack(m.pmem.view, at)
    count, inodes = int(head["runs"]), int(head["free_inodes"])
    runs = np.frombuffer(m.pmem.load(at + 64, 16 * count), "<u8").reshape(-1, 2).copy()
    numbers = np.frombuffer(m.pmem.load(at + 64 + 16 * count, 8 * inodes), "<u8").copy()
    runs, numbers = change(runs, numbers)
    payload = runs.tobytes() + numbers.tobytes()
    head.update(runs=len(runs), free_inodes=len(numbers), payload_crc=crc32c(payload))
    m.pmem.store(at, layout.seal(SNAPSHOT.pack(**head)) + payload)


DAMAGE: list[tuple[str, Callable[[Medium], object], str]] = [
    # superblock, journal, inode directory
    ("older superblock", lambda m: m.pmem.store((1 - m.sb["copy"]) * BS + 300, b"\xff"),
     "superblock copy .: bad checksum"),
    ("other uuid", lambda m: m.set_superblock(uuid=b"u" * 16), "does not go with"),
    ("journal magic", lambda m: m.pmem.store(2 * BS, b"?"), "journal header: magic"),
    ("journal size", lambda m: m.set_record(2 * BS, layout.JOURNAL_HEADER, 32, body_blocks=5),
     "journal header: its size"),
    ("commit word", lambda m: m.pmem.store_word(2 * BS + 64, 12345), "commit word"),
    ("chunk word", lambda m: chunk_word(m, 1, 77), "entry 1 is damaged; its 32 inodes"),
    ("chunk outside", lambda m: chunk_word(m, 1, layout.idir_word(1, 1)), "chunk 1 lies outside"),
    ("chunk beyond", lambda m: chunk_word(m, 1, layout.idir_word(1, m.sb["blocks"] - 1)), "chunk 1 lies outside"),
    ("chunk twice", lambda m: chunk_word(m, 2, layout.idir_word(2, chunk_block(m, 1) + 1)), "chunk 2 lies on another"),
    ("chunk missing", lambda m: chunk_word(m, 1, 0), "entry in the middle is missing"),
    # inode records
    ("ino", lambda m: m.set_inode("small", ino=99), "not this inode's"),
    ("inode magic", lambda m: m.set_inode("small", magic=99), "not this inode's"),
    ("inode bit", lambda m: m.pmem.store(m.inode_at("small") + 30, b"\xfe"), "bad checksum"),
    ("mode", lambda m: m.set_inode("small", mode=0o030644), "no known type"),
    ("mode high", lambda m: m.set_inode("small", mode=1 << 20 | 0o100644), "no known type"),
    ("size", lambda m: m.set_inode("small", size=(1 << 63) - 1), "size .* impossible"),
    ("huge size", lambda m: m.set_inode("small", size=(1 << 64) - 1), "size .* impossible"),
    ("nlink", lambda m: m.set_inode("small", nlink=(1 << 32) - 1), "links are too many"),
    ("flags", lambda m: m.set_inode("small", flags=1), "flags"),
    ("time", lambda m: m.pmem.store_word(m.inode_at("small") + layout.INODE_TIMES_AT, 0x3FFF_FFFF),
     "time is not valid"),
    ("xattr length", lambda m: m.set_inode("small", xattr_length=241), "more inline xattrs"),
    ("inline extents", lambda m: m.set_inode("small", extents=7), "7 extents cannot"),
    ("target of a file", lambda m: m.set_inode("small", target_length=3, extents=0), "it is none"),
    ("symlink and extents", lambda m: m.set_inode("short", extents=1), "target and extents"),
    ("symlink size", lambda m: m.set_inode("short", size=99), "holds another number"),
    ("symlink of no bytes", lambda m: m.set_inode("long", size=0), "symlink of 0 bytes"),
    ("symlink too long", lambda m: m.set_inode("long", size=5000), "symlink of 5000 bytes"),
    ("symlink with a zero", lambda m: m.set_inode("short", body=b"t" * 50), "zero byte"),
    ("fifo with blocks", lambda m: m.set_inode("fifo", extents=1), "its type never has"),
    ("directory size", lambda m: m.set_inode("dir", size=4000), "directory of 4000 bytes"),
    ("inode 0", lambda m: m.pmem.store(chunk_block(m, 0) * BS, layout.seal(INODE.pack(
        **{**m.inode("fifo"), "ino": 0}), end=INODE_CRC_END)), "inode 0"),
    # extents
    ("extent outside", lambda m: m.set_extents("small", (0, m.sb["blocks"], 1, 0)), "outside the data region"),
    ("extent in metadata", lambda m: m.set_extents("small", (0, 3, 1, 0)), "outside the data region"),
    ("extent wraps", lambda m: m.set_extents("small", (0, (1 << 64) - 1, 2, 0)), "outside the data region"),
    ("extent too long", lambda m: m.set_extents("small", (0, m.sb["blocks"] - 1, 2, 0)), "outside the data region"),
    ("more than there is", lambda m: m.set_extents("small", *((i * 3000, m.sb["data_start"], 3000, 0) for i in range(2))),
     "it maps 6000 blocks, more than there are"),
    ("extent empty", lambda m: m.set_extents("small", (0, 1000, 0, 0)), "empty or not valid"),
    ("extent flags", lambda m: m.set_extents("small", (0, 3000, 1, 2)), "empty or not valid"),
    ("extent logical", lambda m: m.set_extents("small", ((1 << 64) - 1, 3000, 2, 0)), "empty or not valid"),
    ("extents overlap", lambda m: m.set_extents("small", (0, 3000, 2, 0), (1, 3100, 1, 0)),
     "overlap or are out of order"),
    ("extents out of order", lambda m: m.set_extents("small", (3, 3000, 1, 1), (0, 3100, 1, 0)), "out of order"),
    ("two owners", lambda m: m.set_extents("small", (0, m.dir_block("dir"), 1, 0)), "two owners: inode .* and inode"),
    ("itself twice", lambda m: m.set_extents("small", (0, 3000, 1, 0), (3, 3000, 1, 1)), "two owners"),
    ("on a chunk", lambda m: m.set_extents("small", (0, chunk_block(m, 1), 1, 0)), "two owners: .*chunk 1"),
    ("on the ledger", lambda m: m.set_extents("small", (0, m.sb["ledger"], 1, 0)), "two owners: .*ledger"),
    ("on a leaf", lambda m: m.set_extents("small", (0, first_leaf(m), 1, 0)), "two owners: .*extent leaves"),
    ("on xattrs", lambda m: m.set_extents("small", (0, m.number("file", "xattr_block"), 1, 0)),
     "two owners: .*xattr blocks"),
    ("on free space", lambda m: m.set_extents("small", (0, 3500, 1, 0)), "two owners: .*free space of the snapshot"),
    ("beyond the end", lambda m: m.set_inode("small", size=0), "written blocks beyond its end"),
    ("directory hole", lambda m: m.set_inode("dir", size=BS * 9), "36864 bytes, but"),
    ("symlink hole", lambda m: m.set_extents("long"), "1000 bytes, but 0 blocks"),
    # leaves
    ("leaf bit", lambda m: m.pmem.store(first_leaf(m) * BS + 70, b"\xff"), "extent leaf at block .*: bad checksum"),
    ("leaf count", lambda m: m.pmem.store(first_leaf(m) * BS + LEAF.offset["count"], b"\xff\xff"), "do not fit"),
    ("leaf of another", lambda m: m.set_leaf(first_leaf(m), ino=5), "belongs to inode 5"),
    ("leaf of another life", lambda m: m.set_leaf(first_leaf(m), generation=500), "belongs to inode"),
    ("leaf empty", lambda m: m.set_leaf(first_leaf(m), count=0), "is empty"),
    ("leaf outside", lambda m: m.set_leaf(first_leaf(m), next=1 << 60), "chain of extent leaves is broken"),
    ("leaf cycle", lambda m: m.set_leaf(second_leaf(m), next=first_leaf(m)), "chain of extent leaves is broken"),
    ("leaf chain short", lambda m: m.set_leaf(first_leaf(m), next=0), "extents found, .* expected"),
    ("leaf order", lambda m: set_leaf_extent(m, 3, logical=0), "overlap or are out of order"),
    ("leaf extent outside", lambda m: set_leaf_extent(m, 3, physical=1 << 50), "outside the data region"),
    # directories and links
    ("dir block bit", lambda m: m.pmem.store(m.dir_block("dir") * BS + 50, b"\xff"),
     "block 0: bad checksum of the entry"),
    ("dir block of another", lambda m: m.set_record(m.dir_block("dir") * BS, DIRBLOCK, 32, ino=1), "belongs elsewhere"),
    ("entry to nowhere", lambda m: raise_entries(m, "root", small=(b"small", 999, 8)),
     "'small' leads to inode 999, which does not"),
    ("entry to a huge number", lambda m: raise_entries(m, "root", small=(b"small", (1 << 63) - 1, 8)),
     "which does not exist"),
    ("entry to a number beyond", lambda m: raise_entries(m, "root", small=(b"small", 1 << 63, 8)), "not valid"),
    ("entry to a damaged inode", lambda m: m.pmem.store(m.inode_at("small") + 30, b"\xfe"), "which is damaged"),
    ("entry type", lambda m: raise_entries(m, "root", small=(b"small", m.inos["small"], 1)), "is of another type"),
    ("name twice", lambda m: m.set_entries("root", *m.entries("root"), (b"small", m.inos["small"], 8)),
     "is in it twice"),
    ("one name more", lambda m: m.set_entries("root", *m.entries("root"), (b"more", m.inos["small"], 8)),
     "link count 2 should be 3"),
    ("one name less", lambda m: m.set_entries("root", *m.entries("root")[1:]), "no directory has|link count"),
    ("nlink of a file", lambda m: m.set_inode("small", nlink=3), "link count 3 should be 2"),
    ("nlink of a directory", lambda m: m.set_inode("dir", nlink=2), "link count 2 should be 3"),
    ("parent", lambda m: m.set_inode("dir/sub", parent=1), "its parent is said to be 1, but is"),
    ("parent of the root", lambda m: m.set_inode("root", parent=m.inos["dir"]), "directory 1: its parent"),
    ("two parents", lambda m: m.set_entries("root", *m.entries("root"), (b"again", m.inos["dir/sub"], 4)),
     "in 2 places"),
    ("cycle", cycle, "does not hang under the root"),
    ("no root", lambda m: m.set_inode("root", mode=0o100644), "root inode is not a directory"),
    ("orphan on a clean volume", orphan, "unlinked, but still there"),
    ("unlinked but named", lambda m: m.set_inode("fifo", nlink=0), "link count 0 should be 1"),
    # xattrs
    ("xattr outside", lambda m: m.set_inode("small", xattr_length=0, xattr_block=1), "outside the data region"),
    ("xattrs in two places", lambda m: m.set_inode("small", xattr_block=m.number("file", "xattr_block")),
     "in two places"),
    ("xattr block of another", lambda m: m.set_inode("fifo", xattr_block=m.number("file", "xattr_block")),
     "belongs to inode"),
    ("xattr cycle", lambda m: m.set_record(m.number("file", "xattr_block") * BS, XATTR_BLOCK, BS,
                                           next=m.number("file", "xattr_block")), "cycle"),
    ("xattr cut off", lambda m: m.set_inode("small", xattr_length=20), "longer than its place|cut off"),
    ("ACL nonsense", lambda m: set_xattrs(m, "fifo", system__posix_acl_access=b"nonsense"), "ACL"),
    ("ACL and mode", lambda m: set_xattrs(m, "fifo", system__posix_acl_access=acl.from_mode(0o777)), "0o644 differ"),
    ("default ACL", lambda m: set_xattrs(m, "fifo", system__posix_acl_default=acl.from_mode(0o777)), "no directory"),
    # ledger and snapshot
    ("ledger magic", lambda m: m.pmem.store(m.sb["ledger"] * BS, b"?"), "ledger block .*: magic"),
    ("ledger cycle", lambda m: m.set_record(m.sb["ledger"] * BS, layout.LEDGER_BLOCK, 64, next=m.sb["ledger"]),
     "chain is broken"),
    ("ledger of another", lambda m: m.set_record(m.sb["ledger"] * BS, layout.LEDGER_BLOCK, 64, address=7),
     "belongs elsewhere"),
    ("pin outside", lambda m: ledger_entry(m, m.sb["blocks"], 1), "pin 3 covers blocks outside"),
    ("pin too long", lambda m: ledger_entry(m, 3000, (1 << 64) - 1), "pin 3 covers blocks outside"),
    ("pin elsewhere", lambda m: ledger_entry(m, 3000, 1, address=64), "belongs elsewhere"),
    ("snapshot bit", lambda m: m.pmem.store(m.sb["snapshot_start"] * BS + 70, b"\xfe"),
     "snapshot of free space: bad checksum"),
    ("snapshot sequence", lambda m: m.set_record(m.sb["snapshot_start"] * BS, SNAPSHOT, 64, sequence=1),
     "not the superblock's"),
    ("snapshot outside", lambda m: set_snapshot(m, lambda r, n: (r + np.uint64(1 << 40), n)), "out of range"),
    ("snapshot short", lambda m: set_snapshot(m, lambda r, n: (r[:-1], n)), "neither used nor in the snapshot"),
    ("snapshot of a used inode", lambda m: set_snapshot(m, lambda r, n: (r, np.append(n, np.uint64(1)))),
     "inode 1 is free, which"),
    ("snapshot without an inode", lambda m: set_snapshot(m, lambda r, n: (r, n[1:])), "1 free inodes are missing"),
    ("snapshot inode twice", lambda m: set_snapshot(m, lambda r, n: (r, np.append(n, n[0]))), "inode twice"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "text"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_named(image: Medium, damage: Callable[[Medium], object], text: str) -> None:
    import re

    damage(image)
    report = image.check()
    assert report.exit_code == 4
    assert any(re.search(text, found) for found in texts(report)), texts(report)
    assert all("\n" not in found and len(found) < 400 for found in texts(report))


# -- a volume that was not unmounted -------------------------------------------------------------------------------------


def test_a_live_volume_has_notes_only(image: Medium) -> None:
    image.pmem.close()
    volume = Volume.open(image.path, now=NOW)
    small = namespace.lookup(volume, volume.root, b"small")
    fifo = namespace.lookup(volume, volume.root, b"fifo")
    assert small is not None
    assert fifo is not None
    namespace.unlink(volume, NOW, volume.root, b"fifo")
    report = fsck.check(volume.pmem)
    assert texts(report) == []
    assert len(texts(report, fsck.NOTE)) == 2
    assert report.counts["unlinked"] == 1
    assert report.exit_code == 0
    assert report.counts["free"] == volume.free
    volume.close(NOW)
    assert fsck.check(image.path).findings == []
    image.pmem = Pmem(image.path)


def test_a_committed_transaction_is_checked_as_applied(image: Medium) -> None:
    """The journal repairs what would be an error, in the private copy only."""
    image.unclean()
    at = image.inode_at("small")
    right = image.pmem.load(at, 512)
    image.set_inode("small", nlink=7)
    before = image.pmem.load(at, 512)
    assert texts(image.check())
    commit(image, [(at, right)])
    report = image.check()
    assert texts(report) == []
    assert any("committed transaction" in note for note in texts(report, fsck.NOTE))
    assert image.pmem.load(at, 512) == before


def commit(image: Medium, records: list[tuple[int, bytes]]) -> None:
    """Crash right behind the commit."""

    class Crash(Exception):
        pass

    class Dying(Journal):
        def _apply(self, records: object) -> None:
            raise Crash

    journal = Dying(image.pmem, image.sb["journal_start"], image.sb["journal_blocks"], BS)
    with pytest.raises(Crash):
        journal.commit(records)


def test_pins_are_noted(image: Medium) -> None:
    ledger_entry(image, image.extents("small")[0][1], 1)
    report = image.check()
    assert texts(report) == []
    assert report.counts["pins"] == 1
    assert any("pinned" in note for note in texts(report, fsck.NOTE))


# -- bounds --------------------------------------------------------------------------------------------------------------


def test_findings_are_bounded(image: Medium) -> None:
    image.set_entries("dir", *((b"%d" % i, 5000 + i, 8) for i in range(80)))
    report = image.check()
    assert report.errors > 2 * 80  # those entries lead nowhere, and the files that were there have no name now
    assert report.omitted == 0
    for _ in range(FINDINGS_MAX):
        report.error("once more")
    report.each("{}", np.arange(FINDINGS_MAX))
    assert len(texts(report)) == FINDINGS_MAX
    assert report.omitted > FINDINGS_MAX


def test_a_directory_over_the_whole_image_ends(image: Medium) -> None:
    """Six extents that all cover everything, far more blocks than there are: reading stops early."""
    start, count = image.sb["data_start"], image.sb["blocks"] - image.sb["data_start"]
    image.set_extents("dir", *((i * count, start, count, 0) for i in range(6)))
    image.set_inode("dir", size=6 * count * BS)
    assert any("too many damaged blocks" in text for text in texts(image.check()))


def metadata_ranges(image: Medium) -> list[tuple[int, int]]:
    """Where a flipped bit matters: (address, length) of records in use."""
    ranges = [(copy * BS, 512) for copy in (0, 1)]
    ranges += [(image.sb["journal_start"] * BS, 32), (image.sb["ledger"] * BS, 64), (image.sb["snapshot_start"] * BS, 64)]
    ranges += [(image.inode_at(name), INODE_CRC_END) for name in image.inos]
    ranges += [(image.sb["idir_start"] * BS, 8 * 7)]
    ranges += [(first_leaf(image) * BS, LEAF.size + 24 * 20), (image.number("file", "xattr_block") * BS, BS)]
    ranges += [(image.dir_block(name) * BS, 200) for name in ("root", "dir", "dir/sub")]
    return ranges


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_of_metadata_is_found(image: Medium, seed: int) -> None:
    dice = random.Random(seed)
    ranges = metadata_ranges(image)
    padding = 0
    for _ in range(100):
        at, length = dice.choice(ranges)
        at += dice.randrange(length)
        was = image.pmem.load(at, 1)
        image.pmem.store(at, bytes([was[0] ^ 1 << dice.randrange(8)]))
        if not image.check().errors:
            assert in_padding(image, at), f"a flip at {at} ({at // BS}, {at % BS}) of seed {seed} was not found"
            padding += 1
        image.pmem.store(at, was)
    assert padding < 20
    assert image.check().errors == 0


def in_padding(image: Medium, at: int) -> bool:
    """Bytes behind the name of a directory entry belong to nothing."""
    return any(image.dir_block(name) == at // BS for name in ("root", "dir", "dir/sub"))


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_give_a_report(image: Medium, seed: int) -> None:
    """Fields of records set to hostile values, checksums right: fsck ends, with findings or without."""
    dice = random.Random(seed)
    values = (0, 1, 2, 3, 0xFF, 0xFFFF, 0xFFFF_FFFF, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)
    names = sorted(image.inos)
    for _ in range(60):
        name = dice.choice([*names[-9:], "root"])
        saved = image.pmem.load(image.inode_at(name), 512)
        for _ in range(dice.randint(1, 4)):
            field = dice.choice([f for f in INODE.fields if f.code in "QIH" and f.name not in ("magic", "crc", "ino")])
            bits = {"Q": 64, "I": 32, "H": 16}[field.code]
            value = dice.choice((dice.choice(values), dice.getrandbits(64), dice.randrange(image.sb["blocks"])))
            image.set_inode(name, **{field.name: value % (1 << bits)})
        if dice.random() < 0.3:
            image.set_inode(name, body=dice.randbytes(144))
        assert isinstance(image.check(), Report)
        image.pmem.store(image.inode_at(name), saved)
    assert image.check().errors == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_garbage_gives_a_report(image: Medium, seed: int) -> None:
    """Whole blocks overwritten, superblock spared."""
    dice = random.Random(seed)
    for _ in range(25):
        at = dice.randrange(2 * BS, 600 * BS)
        image.pmem.store(at, dice.randbytes(dice.choice((1, 8, 64, 512, 4096))))
        assert isinstance(image.check(), Report)
