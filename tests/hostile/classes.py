"""Every class of hostile image: what is done to it, and what a mount says to it.

`CLASSES`: name -> (states, harm, says). `says` is a part of the one line with which a mount refuses, "" if it mounts; a dict
tells states apart: a clean image is believed for as long as nobody looks, an armed one is scanned.
"""

from __future__ import annotations

import stat
from typing import Any

from daxfs.core import layout
from tests.hostile.forge import B, Forge, Harm

Says = str | dict[str, str]
CLEAN, ARMED, BOTH = ("clean",), ("armed",), ("clean", "armed")
MAX = (1 << 64) - 1
ROOT, DIR, LEAFY = "", "dir", "dir/leafy"


def scanned(why: str) -> Says:
    """It is seen when the inode table is scanned, else not before somebody uses the file."""
    return {"clean": "", "armed": why}


def both(f: Forge, **fields: int | bytes) -> None:
    f.superblocks(**fields)


def resized(size: int) -> Harm:
    def harm(f: Forge) -> None:
        f.data = f.data[:size] + bytearray(max(0, size - len(f.data)))

    return harm


def flip_checksum(*copies: int) -> Harm:
    def harm(f: Forge) -> None:
        for copy in copies:
            f.data[copy * B + 4] ^= 1

    return harm


def sb(**fields: Any) -> Harm:
    return lambda f: f.superblocks(**fields)


def root(**fields: Any) -> Harm:
    return lambda f: f.inode(ROOT, **fields)


def small(**fields: Any) -> Harm:
    return lambda f: f.inode("small", **fields)


def extent(logical: int = 0, physical: int | str = 200, count: int = 1, flags: int = 0) -> Harm:
    """The one extent of /small; `physical` may name whose block."""
    def harm(f: Forge) -> None:
        start = f.block(physical) if isinstance(physical, str) else physical
        f.extents("small", (logical, start, count, flags))

    return harm


def txn(*records: tuple[int, int, bytes], **more: int) -> Harm:
    return lambda f: f.transaction(*records, **more)


def leaf(**fields: Any) -> Harm:
    return lambda f: f.record("leaf", **fields)


def leaf_at(f: Forge) -> int:
    return f.target("leaf").at // B


def renamed(new: bytes) -> Harm:
    return lambda f: f.entry(ROOT, b"small", new_name=new)


OWNERS = scanned("has two owners")

CLASSES: dict[str, tuple[tuple[str, ...], Harm, Says]] = {
    # files that are no image, or not all of it
    "empty": (CLEAN, resized(0), "is empty, too small for an image"),
    "one byte": (CLEAN, resized(1), "too small for an image"),
    "shorter than a page": (CLEAN, resized(4095), "too small for an image"),
    "two superblocks only": (CLEAN, resized(2 * B), "is truncated: it has 8192 bytes"),
    "a block short": (BOTH, resized((1 << 20) - B), "is truncated"),
    "a byte short": (BOTH, resized((1 << 20) - 1), "is truncated"),
    "twice as long": (BOTH, resized(2 << 20), ""),
    "zeros": (CLEAN, lambda f: f.raw(0, bytes(1 << 20)), "is empty (zeros), not a daxfs image"),
    "random": (CLEAN, lambda f: f.raw(0, bytes((i * i * 31 >> 5) & 255 for i in range(1 << 20))), "is not a daxfs image"),
    "text": (CLEAN, lambda f: f.raw(0, b"#!/bin/sh\n" * (1 << 17)), "is not a daxfs image"),
    # superblocks
    "wrong magic": (BOTH, lambda f: both(f, magic=0x46534B42), "is not a daxfs image"),
    "wrong magic in A": (BOTH, lambda f: f.record("superblock", 0, magic=1), ""),
    "wrong magic in B": (BOTH, lambda f: f.record("superblock", 1, magic=1), ""),
    "wrong kind": (BOTH, sb(kind=b"another program"), "makes no sense"),
    "version 0": (BOTH, sb(version=0), "makes no sense"),
    "future version": (BOTH, sb(version=99), "media version 99, newer than"),
    "unknown features": (BOTH, sb(incompat=1 << 40), "features that this daxfs does not know"),
    "unknown features, read-only": (BOTH, sb(ro_compat=2), "mount it with -o ro"),
    "unknown features that do no harm": (BOTH, sb(compat=MAX), ""),
    "bad checksum in A": (BOTH, flip_checksum(0), ""),
    "bad checksum in B": (BOTH, flip_checksum(1), ""),
    "bad checksums in both": (BOTH, flip_checksum(0, 1), "both superblocks are damaged"),
    "copies exchanged": (CLEAN, lambda f: f.raw(0, bytes(f.data[B : 2 * B] + f.data[:B])), "not a daxfs image"),
    "blocks of no size": (BOTH, sb(block_size=0), "makes no sense (block size 0)"),
    "blocks of 512 bytes": (BOTH, sb(block_size=512), "block size 512"),
    "blocks of another size": (BOTH, sb(block_size=65536), "is truncated"),
    "blocks of 2 GiB": (BOTH, sb(block_size=1 << 31), "makes no sense"),
    "no blocks": (BOTH, sb(blocks=0), "makes no sense"),
    "few blocks": (BOTH, sb(blocks=20), "makes no sense"),
    "more blocks than bytes": (BOTH, sb(blocks=257), "is truncated"),
    "blocks that overflow": (BOTH, sb(blocks=1 << 52), "is truncated"),
    "as many blocks as can be": (BOTH, sb(blocks=MAX), "is truncated"),
    "a journal on the superblock": (BOTH, sb(journal_start=0), "journal region makes no sense"),
    "a journal outside": (BOTH, sb(journal_start=1 << 63), "journal region makes no sense"),
    "no journal": (BOTH, sb(journal_blocks=0), "journal region makes no sense"),
    "a journal over all": (BOTH, sb(journal_blocks=254), "idir region makes no sense"),
    "an endless journal": (BOTH, sb(journal_blocks=MAX - 1), "journal region makes no sense"),
    "an inode directory on the journal": (BOTH, sb(idir_start=3), "idir region makes no sense"),
    "an endless inode directory": (BOTH, sb(idir_blocks=MAX), "idir region makes no sense"),
    "an inode directory over all": (BOTH, sb(idir_blocks=200), "idir region makes no sense"),
    "data on the journal": (BOTH, sb(data_start=2), "data region makes no sense"),
    "data outside": (BOTH, sb(data_start=MAX), "data region makes no sense"),
    "no ledger": (BOTH, sb(ledger=0), "pin ledger lies outside"),
    "a ledger outside": (BOTH, sb(ledger=256), "pin ledger lies outside"),
    "an unknown state": (BOTH, sb(state=7), "makes no sense"),
    "a sequence at its end": (BOTH, sb(sequence=MAX), "counters make no sense"),
    "a mount count at its end": (BOTH, sb(mounts=MAX), "counters make no sense"),
    "a dirty-shutdown count at its end": (BOTH, sb(dirty_shutdowns=MAX), "counters make no sense"),
    "dirty, and nothing in the journal": (CLEAN, sb(state=layout.STATE_MOUNTED), ""),
    "clean, with a snapshot nowhere": (CLEAN, sb(snapshot_start=MAX, snapshot_blocks=MAX), ""),
    "clean, with a snapshot of no blocks": (CLEAN, sb(snapshot_blocks=0), ""),
    "a label of garbage": (BOTH, sb(label=b"\xff\n\x1b[31m" * 12), ""),
    # the inode directory
    "no inode directory": (BOTH, lambda f: f.word(0, 0), "it is empty"),
    "a damaged inode directory": (BOTH, lambda f: f.raw(f.sb["idir_start"] * B, b"\x55" * 8), "entry 0 is damaged"),
    "a chunk outside": (BOTH, lambda f: f.word(0, 254), "lies outside the image"),
    "a chunk far outside": (BOTH, lambda f: f.word(0, (1 << 48) - 1), "lies outside the image"),
    "a chunk in the journal": (BOTH, lambda f: f.word(0, 3), "lies outside the image"),
    "a chunk twice": (BOTH, lambda f: f.word(1, f.sb["data_start"]), "two chunks overlap"),
    "a thousand chunks in one place": (BOTH, lambda f: [f.word(i, f.sb["data_start"]) for i in range(512)], "overlap"),
    "chunks that overlap": (BOTH, lambda f: f.word(1, f.sb["data_start"] + 2), "two chunks overlap"),
    "a chunk of zeros": (BOTH, lambda f: f.word(0, 200), "inode 1 is free"),
    "a gap in the inode directory": (BOTH, lambda f: f.word(5, 200), "an entry is missing"),
    # the root
    "no root": (BOTH, root(mode=0), "inode 1 is free"),
    "a root of zeros": (BOTH, lambda f: f.raw(f.inodes[ROOT], bytes(512)), "inode 1 is free"),
    "a damaged root": (BOTH, lambda f: f.raw(f.inodes[ROOT] + 24, b"!"), "inode 1: bad checksum"),
    "a root that is a file": (BOTH, root(mode=stat.S_IFREG | 0o644), "the root inode is not a directory"),
    "a root of no type": (BOTH, root(mode=0o1777), {"clean": "of no known type", "armed": "of no known type"}),
    "a root without a link": (BOTH, root(nlink=0), "the root inode is not a directory"),
    "a root of another number": (BOTH, root(ino=2), {"clean": "belongs to inode 2", "armed": "not an inode, or another's"}),
    "a root with all the links": (BOTH, root(nlink=(1 << 32) - 1), ""),
    "a root of all sizes": (BOTH, root(size=layout.FILE_SIZE_MAX), ""),
    "a root too large": (BOTH, root(size=MAX), "size 18446744073709551615 is impossible"),
    "a root without blocks": (BOTH, root(extents=0), ""),
    "a root that is its own child": (BOTH, lambda f: f.entry(ROOT, b"small", ino=1, type=4), ""),
    # extents
    "an extent in the superblock": (BOTH, extent(physical=0), OWNERS),
    "an extent in the journal": (BOTH, extent(physical=3), OWNERS),
    "an extent in the inode table": (BOTH, lambda f: extent(physical=f.sb["data_start"])(f), OWNERS),
    "an extent over a directory": (BOTH, extent(physical=DIR), OWNERS),
    "an extent over its own leaf": (BOTH, lambda f: f.leaf_extent(2, physical=leaf_at(f)), OWNERS),
    "an extent over the ledger": (BOTH, lambda f: extent(physical=f.sb["ledger"])(f), OWNERS),
    "an extent over another file": (BOTH, lambda f: f.leaf_extent(0, physical=f.block("small")), OWNERS),
    "an extent at the end of the image": (BOTH, extent(physical=255, count=2), scanned("outside the image")),
    "an extent outside": (BOTH, extent(physical=256), scanned("outside the image")),
    "an extent that wraps": (BOTH, extent(physical=MAX), scanned("o")),
    "an extent that wraps to a good place": (BOTH, extent(physical=MAX - 9, count=60), scanned("o")),
    "an extent of 2**32 - 1 blocks": (BOTH, extent(physical=60, count=(1 << 32) - 1), scanned("o")),
    "an extent of no blocks": (BOTH, extent(count=0), ""),
    "an extent of strange flags": (BOTH, extent(flags=0xFE), ""),
    "an extent far behind the end": (BOTH, extent(logical=1 << 50), ""),
    "an extent behind all files": (BOTH, extent(logical=1 << 51), ""),
    "an extent that wraps in the file": (BOTH, extent(logical=MAX), ""),
    "extents that overlap in the file": (BOTH, lambda f: f.extents("small", (0, 200, 2, 0), (1, 210, 2, 0)), ""),
    "extents out of order": (BOTH, lambda f: f.extents("small", (5, 200, 1, 0), (1, 210, 1, 0)), ""),
    "one block twice in a file": (BOTH, lambda f: f.extents("small", (0, 200, 1, 0), (1, 200, 1, 0)), OWNERS),
    "seven inline extents": (BOTH, small(extents=7), scanned("more inline extents than fit")),
    "2**32 - 1 inline extents": (BOTH, small(extents=(1 << 32) - 1), scanned("more inline extents than fit")),
    "more blocks than the image has": (BOTH, small(blocks=MAX), ""),
    "2**32 - 1 extents in leaves": (BOTH, lambda f: f.inode(LEAFY, extents=(1 << 32) - 1), ""),
    "a leaf that follows itself": (BOTH, lambda f: leaf(next=leaf_at(f))(f), scanned("chain of extent leaves is broken")),
    "endless leaves": (BOTH, lambda f: [leaf(next=leaf_at(f))(f), f.inode(LEAFY, extents=(1 << 32) - 1)],
                       scanned("chain of extent leaves is broken")),
    "a leaf outside": (BOTH, lambda f: f.inode(LEAFY, leaf=MAX), scanned("chain of extent leaves is broken")),
    "a leaf in the journal": (BOTH, lambda f: f.inode(LEAFY, leaf=4), scanned("chain of extent leaves is broken")),
    "a leaf that is a directory": (BOTH, lambda f: f.inode(LEAFY, leaf=f.block(DIR)), scanned("extent leaf at block")),
    "an empty leaf": (BOTH, leaf(count=0), scanned("is empty")),
    "an overfull leaf": (BOTH, leaf(count=169), scanned("169 extents do not fit")),
    "another's leaf": (BOTH, leaf(ino=1), scanned("belongs to inode 1")),
    "a leaf of the past": (BOTH, leaf(generation=77), scanned("belongs to inode")),
    "a leaf that wraps in the file": (BOTH, lambda f: f.leaf_extent(8, logical=MAX - 1), ""),
    # directories
    "a directory that holds its parent": (BOTH, lambda f: f.add_entry("dir/sub", b"up", f.number(DIR), 4), ""),
    "a directory that holds itself": (BOTH, lambda f: f.add_entry("dir/sub", b"me", f.number("dir/sub"), 4), ""),
    "a directory that holds the root": (BOTH, lambda f: f.add_entry("dir/sub", b"root", 1, 4), ""),
    "a directory with two names": (BOTH, lambda f: f.add_entry(ROOT, b"again", f.number(DIR), 4), ""),
    "a parent that is none": (BOTH, lambda f: f.inode("dir/sub", parent=MAX), ""),
    "parents in a circle": (BOTH, lambda f: [f.inode(DIR, parent=f.number("dir/sub"))], ""),
    "an entry to a free inode": (BOTH, lambda f: f.entry(ROOT, b"small", ino=30), ""),
    "an entry to inode 0": (BOTH, lambda f: f.entry(ROOT, b"small", ino=0), ""),
    "an entry to no inode": (BOTH, lambda f: f.entry(ROOT, b"small", ino=1 << 60), ""),
    "an entry of another type": (BOTH, lambda f: f.entry(ROOT, b"small", type=4), ""),
    "an entry of no type": (BOTH, lambda f: f.entry(ROOT, b"small", type=3), ""),
    "a file that is listed as a directory": (BOTH, small(mode=stat.S_IFDIR | 0o755), ""),
    "a name twice": (BOTH, lambda f: f.add_entry(ROOT, b"small", f.number("pipe"), 1), ""),
    "an empty name": (BOTH, renamed(b""), ""),
    "the name .": (BOTH, renamed(b"."), ""),
    "the name ..": (BOTH, renamed(b".."), ""),
    "a name with a slash": (BOTH, renamed(b"../../x"), ""),
    "a name with a zero": (BOTH, renamed(b"a\0b"), ""),
    "a name that is not UTF-8": (BOTH, renamed(b"\xff\xfe\n\x1b"), ""),
    "a name longer than its entry": (BOTH, lambda f: f.entry(ROOT, b"small", name_length=255), ""),
    "an entry of no length": (BOTH, lambda f: f.entry(ROOT, b"small", length=0), ""),
    "an entry longer than its block": (BOTH, lambda f: f.entry(ROOT, b"small", length=4000), ""),
    "a directory block of another": (BOTH, lambda f: f.record("directory block", 0, ino=9), ""),
    "a directory block of another place": (BOTH, lambda f: f.record("directory block", 0, index=1), ""),
    "a directory longer than its blocks": (BOTH, lambda f: f.inode(DIR, size=1 << 40), ""),
    "a directory shorter than its blocks": (BOTH, lambda f: f.inode(DIR, size=0), ""),
    "a directory of odd size": (BOTH, lambda f: f.inode(DIR, size=5000), ""),
    # link counts
    "no links": (BOTH, small(nlink=0), ""),
    "fewer links than names": (BOTH, small(nlink=1), ""),
    "more links than names": (BOTH, small(nlink=3), ""),
    "all the links": (BOTH, small(nlink=(1 << 32) - 1), ""),
    "a directory without links": (BOTH, lambda f: f.inode(DIR, nlink=0), ""),
    "a directory with one link": (BOTH, lambda f: f.inode(DIR, nlink=1), ""),
    "a directory with all the links": (BOTH, lambda f: f.inode(DIR, nlink=(1 << 32) - 1), ""),
    # what else an inode says
    "a size beyond all": (BOTH, small(size=1 << 63), ""),
    "the largest size": (BOTH, small(size=layout.FILE_SIZE_MAX), ""),
    "a device number beyond all": (BOTH, lambda f: f.inode("pipe", mode=stat.S_IFCHR | 0o600, rdev=MAX), ""),
    "times beyond all": (BOTH, small(mtime=MAX, ctime=MAX, atime=MAX, btime=MAX), ""),
    "unknown flags": (BOTH, small(flags=MAX & 0xFFFFFFFF), ""),
    "a symlink of no length": (BOTH, lambda f: f.inode("short", size=0), ""),
    "a symlink without a target": (BOTH, lambda f: f.inode("short", target_length=0), ""),
    "a symlink to zeros": (BOTH, lambda f: f.inode("short", body=b""), ""),
    "a symlink of another length": (BOTH, lambda f: f.inode("short", target_length=100), ""),
    "a symlink longer than the inode": (BOTH, lambda f: f.inode("short", target_length=145), ""),
    "a long symlink without blocks": (BOTH, lambda f: f.inode("dir/long", extents=0), ""),
    "a long symlink of another length": (BOTH, lambda f: f.inode("dir/long", size=4096), ""),
    "inline xattrs that are cut off": (BOTH, small(xattr_length=3), ""),
    "more inline xattrs than fit": (BOTH, small(xattr_length=241), ""),
    "inline xattrs of garbage": (BOTH, small(xattrs=b"\xff" * 240, xattr_length=240), ""),
    "xattrs outside": (BOTH, small(xattr_block=MAX), scanned("outside the data region")),
    "xattrs in a circle": (BOTH, lambda f: f.record("xattr block", 0, next=f.target("xattr block").at // B),
                           scanned("the chain is a cycle")),
    "xattrs of no length": (BOTH, lambda f: f.record("xattr block", 0, length=0), scanned("bytes of payload")),
    "xattrs of another": (BOTH, lambda f: f.record("xattr block", 0, ino=1), scanned("belongs to inode 1")),
    # the journal
    "a commit word without a transaction": (BOTH, lambda f: f.raw(2 * B + 64, b"\x63"), "the commit word does not match"),
    "no journal header": (BOTH, lambda f: f.raw(2 * B, bytes(32)), "journal header: magic"),
    "another journal's header": (BOTH, lambda f: f.record("journal header", address=0), "it belongs elsewhere"),
    "a transaction with a bad checksum": (BOTH, lambda f: [txn((80 * B, 8, bytes(8)))(f), f.raw(3 * B + 40, b"x")],
                                          "bad checksum"),
    "a transaction over a superblock": (BOTH, txn((0, 512, bytes(512))), "points at a superblock"),
    "a transaction over the journal": (BOTH, txn((2 * B + 64, 8, bytes(8))), "points at a superblock or the journal"),
    "a transaction into the journal's end": (BOTH, txn((19 * B - 8, 16, bytes(16))), "points at a superblock"),
    "a transaction outside": (BOTH, txn(((1 << 20) - 3, 8, bytes(8))), "points outside the volume"),
    "a transaction that wraps": (BOTH, txn((MAX - 7, 8, bytes(8))), "points outside the volume"),
    "a transaction behind the volume": (BOTH, lambda f: [txn(((1 << 20) + B, 8, b"overrun!"))(f), resized(2 << 20)(f)],
                                        "points outside the volume"),
    "a record of no length": (BOTH, txn((80 * B, 0, b"")), "is empty"),
    "a record longer than all": (BOTH, txn((80 * B, MAX - 7, bytes(8))), "is longer than its transaction"),
    "a record that is cut off": (BOTH, txn((80 * B, 8, bytes(8)), length=8), "bad checksum"),
    "a transaction longer than the journal": (BOTH, txn((80 * B, 8, bytes(8)), length=1 << 40), "does not match"),
    "more records than there are": (BOTH, txn((80 * B, 8, bytes(8)), count=MAX), "wrong number of records"),
    "a transaction that takes the root away": (BOTH, lambda f: txn((f.inodes[ROOT], 512, bytes(512)))(f), "inode 1 is free"),
    "a transaction that empties the inode directory": (BOTH, txn((19 * B, 8, bytes(8))), "it is empty"),
    # the pin ledger
    "a ledger of garbage": (BOTH, lambda f: f.raw(f.sb["ledger"] * B, b"\xa5" * B), "ledger block"),
    "a ledger in a circle": (BOTH, lambda f: f.record("ledger block", next=f.sb["ledger"]), "the chain of blocks is broken"),
    "a ledger that leads outside": (BOTH, lambda f: f.record("ledger block", next=MAX), "the chain of blocks is broken"),
    "a ledger that leads into a file": (BOTH, lambda f: f.record("ledger block", next=f.block("small")), "ledger block"),
    "another's ledger": (BOTH, lambda f: f.record("ledger block", address=5), "it belongs elsewhere"),
    "a pin of everything": (ARMED, lambda f: f.record("ledger entry", 0, start=f.sb["data_start"], count=200), ""),
    "a pin outside": (ARMED, lambda f: f.record("ledger entry", 0, start=MAX), ""),
    "a pin that wraps": (ARMED, lambda f: f.record("ledger entry", 0, count=MAX), ""),
    "a pin of the last number": (ARMED, lambda f: f.record("ledger entry", 0, pin=MAX), ""),
    "a pin of unknown flags": (ARMED, lambda f: f.record("ledger entry", 0, flags=(1 << 32) - 1), ""),
    "a pin of another place": (ARMED, lambda f: f.record("ledger entry", 0, address=64), ""),
    # the snapshot of free space
    "a snapshot of garbage": (CLEAN, lambda f: f.raw(f.target("snapshot").at, b"\x99" * 200), ""),
    "free space outside": (CLEAN, lambda f: f.snapshot_word(0, MAX), ""),
    "free space that wraps": (CLEAN, lambda f: f.snapshot_word(1, MAX - 60), ""),
    "free space in the journal": (CLEAN, lambda f: f.snapshot_word(0, 3), ""),
    "free space in the inode table": (CLEAN, lambda f: f.snapshot_word(0, f.sb["data_start"]), ""),
    "free space that files own": (CLEAN, lambda f: f.snapshot_word(0, f.block(ROOT)), ""),
    "more free runs than bytes": (CLEAN, lambda f: f.record("snapshot", runs=MAX), ""),
    "a free inode that is in use": (CLEAN, lambda f: f.snapshot_word(-1, 1), ""),
}  # fmt: skip
