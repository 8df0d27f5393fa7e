"""Mutations of a small image, each made by a seed: what bit rot, a bug or an attacker would do to it.

`mutate` changes one to eight things and says what. Most are fields of records, set to a number that means something on
this image or to one at the edge of a type, and sealed again; some are records copied over others, names forged, blocks
exchanged or filled; few are raw flips, which the checksums catch.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

from tools.fuzz_image import Seed, Target

_EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 255, 256, 4095, 4096, 65535, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47, 1 << 48, 1 << 51,
          1 << 52, (1 << 63) - 65536, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)  # fmt: skip
_NAMES = (b"", b".", b"..", b"/", b"a/b", b"\0", b"x\0y", b"sub", b"small", b"\xff\xfe", b"n" * 200)
_CHECKSUMS = ("crc", "payload_crc", "magic")  # fields that a sealed record seldom gets wrong
_SEALED = 0.9

# What decides most, by kind of record: these fields are changed most often, to these values or to numbers of the image.
_SMALL = (0, 1, 2, 3, 4, 5, 6, 7, 8)
_HUGE = ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 51, 1 << 62, (1 << 63) - 65536, (1 << 63) - 65535, 1 << 63,
         (1 << 64) - 1)  # fmt: skip
_SIZES = (0, 1, 100, 4095, 4096, 4097, 8192, 12288, 65536, 1 << 20, 1 << 40)
_MODES = (0, 0o40755, 0o100644, 0o104755, 0o120777, 0o20600, 0o60600, 0o10600, 0o140600, 0o150000, 0o1040755)
_SUPERBLOCK = ("version", "copy", "sequence", "compat", "ro_compat", "incompat", "block_size", "state", "blocks",
               "journal_start", "journal_blocks", "idir_start", "idir_blocks", "data_start", "ledger", "snapshot_start",
               "snapshot_blocks", "mounts", "dirty_shutdowns")  # fmt: skip
_POINTED: dict[str, dict[str, tuple[int, ...]]] = {
    "superblock": dict.fromkeys(_SUPERBLOCK, _SMALL + _SIZES + _HUGE),
    "inode": {"nlink": _SMALL + _HUGE, "size": _SIZES + _HUGE, "mode": _MODES, "extents": (*_SMALL, (1 << 32) - 1),
              "leaf": (0,), "xattr_block": (0,), "parent": (*_SMALL, 31, 32, 1 << 40), "blocks": _SMALL + _HUGE,
              "rdev": _HUGE, "target_length": (0, 1, 7, 144, 145, 65535), "xattr_length": (0, 1, 16, 240, 241),
              "generation": (0, 1, 2), "physical": (), "logical": _SMALL + _HUGE, "count": (*_SMALL, 256, (1 << 32) - 1),
              "flags": (0, 1, 2), "length": _SIZES, "name_length": (0, 1, 9, 255, 256)},
    "leaf": {"next": (0,), "count": (*_SMALL, 168, 169), "ino": _SMALL, "physical": (), "logical": _SMALL + _HUGE,
             "address": ()},
    "entry": {"ino": (*_SMALL, 31, 32, 33), "length": (0, 1, 2, 3, 250, 254, 255), "name_length": (0, 1, 2, 3, 255),
              "type": (0, 1, 2, 4, 8, 10, 15), "name": (0, 0x2F, 0x2E)},
    "snapshot": {"runs": _SMALL, "free_inodes": _SMALL, "sequence": _SMALL, "word 0": _HUGE, "word 1": _HUGE,
                 "word 2": _SMALL, "word 3": _SMALL, "word 4": _SMALL + _HUGE, "word 5": _SMALL},
    "ledger entry": {"start": _SMALL, "count": (*_SMALL, 100, 256), "pin": _HUGE, "pid": (0, 1, (1 << 32) - 1),
                     "flags": tuple(1 << i for i in range(32)), "ino": _SMALL},
    "ledger block": {"next": (0,), "boot_id": _SMALL},
    "transaction": {"address": (*_SIZES, *_HUGE), "length": (*_SMALL, 16, 24, *_HUGE), "records": _SMALL, "data": _SMALL},
    "xattr block": {"next": (0,), "length": (0, 1, 4048, 4049), "name_length": (0, 1, 255, 256)},
    "idir word": {"block": (0, 1, 1 << 40)},
    "directory block": {"ino": _SMALL, "index": _SMALL},
}  # fmt: skip


def mutate(seed: Seed, rng: random.Random) -> tuple[bytes, str]:
    """A broken copy of the image, and what was done to it, on one line."""
    image = bytearray(seed.data)
    done = [_KINDS[kind](seed, image, rng)
            for kind in rng.choices(list(_KINDS), _WEIGHTS, k=min(1 + int(rng.expovariate(0.7)), 8))]  # fmt: skip
    if rng.random() < 0.02:
        size = rng.choice([0, 1, 511, 4095, 4096, 8192, len(image) - 1, len(image) - 4096, 2 * len(image)])
        done.append(f"{size} bytes long")
        image = image[:size] + bytes(max(0, size - len(image)))
    return bytes(image), "; ".join(done)


def flips(seed: Seed) -> Iterator[tuple[int, int]]:
    """Every bit of the metadata: (byte, mask)."""
    for start, length in seed.metadata:
        for at in range(start, start + length):
            for bit in range(8):
                yield at, 1 << bit


def _pick(seed: Seed, rng: random.Random, kinds: tuple[str, ...] = ()) -> Target:
    """A record; every kind as likely as the others, however many there are."""
    present = sorted({t.kind for t in seed.targets if not kinds or t.kind in kinds})
    kind = rng.choice(present)
    return rng.choice([t for t in seed.targets if t.kind == kind])


def _value(seed: Seed, rng: random.Random, old: int) -> int:
    match rng.randrange(6):
        case 0:
            return rng.choice(_EDGES)
        case 1:
            return old + rng.choice((-1, 1, -8, 8, 16))
        case 2:
            return old ^ 1 << rng.randrange(64)
        case 3:
            return rng.getrandbits(rng.choice((8, 16, 32, 64)))
        case _:
            return rng.choice(seed.numbers)


def _field(seed: Seed, image: bytearray, rng: random.Random) -> str:
    target = rng.choice(seed.targets) if rng.random() < 0.5 else _pick(seed, rng)
    pointed = _POINTED.get(target.kind)
    if pointed and rng.random() < 0.6:
        chosen = rng.choice(list(pointed))
        places = [f for f in target.fields if f[0] == chosen]
        if places:
            name, at, code = rng.choice(places)
            return _set(image, rng, target, name, at, code, rng.choice(pointed[chosen] + tuple(rng.sample(seed.numbers, 4))))
    fields = [f for f in target.fields if f[0] not in _CHECKSUMS] or list(target.fields)
    if rng.random() < 0.03:
        fields = list(target.fields)
    name, at, code = rng.choice(fields)
    (old,) = struct.unpack_from("<" + code, image, at)
    return _set(image, rng, target, name, at, code, _value(seed, rng, old))


def _set(image: bytearray, rng: random.Random, target: Target, name: str, at: int, code: str, value: int) -> str:
    (old,) = struct.unpack_from("<" + code, image, at)
    new = value & (1 << 8 * struct.calcsize(code)) - 1
    struct.pack_into("<" + code, image, at, new)
    sealed = rng.random() < _SEALED
    if sealed:
        target.seal(image)
    return f"{target.kind} at {target.at}: {name} {old} -> {new}" + ("" if sealed else ", not sealed")


def _copy(seed: Seed, image: bytearray, rng: random.Random) -> str:
    """A record over another of its kind, with its own number and place put right or left wrong."""
    source = _pick(seed, rng, ("inode", "superblock", "leaf", "directory block", "entry", "ledger entry", "xattr block"))
    target = rng.choice([t for t in seed.targets if t.kind == source.kind])
    keep = {f: image[at : at + 8] for f, at, _ in target.fields if f in ("ino", "address")} if rng.random() < 0.7 else {}
    image[target.at : target.at + source.length] = seed.data[source.at : source.at + source.length]
    for name, at, _ in target.fields:
        if name in keep and source.kind != "entry":
            image[at : at + 8] = keep[name]
    target.seal(image)
    return f"{source.kind} at {source.at} copied to {target.at}" + ("" if keep else ", as it is")


def _share(seed: Seed, image: bytearray, rng: random.Random) -> str:
    """One extent is made another's, or one that overlaps it."""
    target = _pick(seed, rng, ("inode", "leaf"))
    places = [(name, at, code) for name, at, code in target.fields if name in ("physical", "logical", "count")]
    if not places:
        return _field(seed, image, rng)
    index = rng.randrange(len(places) // 3)
    for name, at, code in places[3 * index : 3 * index + 3]:
        new = {"physical": rng.choice(seed.numbers), "count": rng.choice((1, 2, 3, 16, 200)),
               "logical": rng.choice((0, 1, 2, 3, 1 << 40, 1 << 48))}[name]  # fmt: skip
        if name != "logical" or rng.random() < 0.3:
            struct.pack_into("<" + code, image, at, new)
    if rng.random() < 0.5:
        for name, at, code in target.fields:
            if name == "extents":
                struct.pack_into("<" + code, image, at, max(index + 1, struct.unpack_from("<" + code, image, at)[0]))
    target.seal(image)
    return f"{target.kind} at {target.at}: extent {index} forged"


def _name(seed: Seed, image: bytearray, rng: random.Random) -> str:
    """An entry gets another name, as far as its padding has room, and perhaps another inode."""
    target = _pick(seed, rng, ("entry",))
    (length,) = struct.unpack_from("<H", image, target.at + 12)
    name = rng.choice(_NAMES)[: max(0, length * 16 - 16)]
    image[target.at + 14] = len(name)
    image[target.at + 16 : target.at + 16 + len(name)] = name
    if rng.random() < 0.4:
        struct.pack_into("<Q", image, target.at, rng.randrange(1, 40))
    target.seal(image)
    return f"entry at {target.at} is called {name!r}"


def _redirect(seed: Seed, image: bytearray, rng: random.Random) -> str:
    """An entry leads to another inode: a loop of directories, a second link, a free inode."""
    target = _pick(seed, rng, ("entry",))
    ino = rng.randrange(0, 36)
    struct.pack_into("<Q", image, target.at, ino)
    target.seal(image)
    return f"entry at {target.at} leads to inode {ino}"


def _block(seed: Seed, image: bytearray, rng: random.Random) -> str:
    """A block is zeroed, filled, filled at random, or exchanged for another one."""
    blocks = sorted({t.at // seed.block_size for t in seed.targets})
    block, other = rng.choice(blocks), rng.choice(blocks)
    start, size = block * seed.block_size, seed.block_size
    what = rng.choice(("zeroed", "all ones", "random", f"copied from block {other}"))
    fill = {"zeroed": bytes(size), "all ones": b"\xff" * size, "random": rng.randbytes(size)}
    image[start : start + size] = fill.get(what) or seed.data[other * size : (other + 1) * size]
    return f"block {block} {what}"


def _flip(seed: Seed, image: bytearray, rng: random.Random) -> str:
    start, length = rng.choice(seed.metadata)
    at, bit = start + rng.randrange(length), rng.randrange(8)
    image[at] ^= 1 << bit
    return f"bit {bit} of byte {at}"


_KINDS = {"field": _field, "copy": _copy, "share": _share, "name": _name, "redirect": _redirect, "block": _block,
          "flip": _flip}  # fmt: skip
_WEIGHTS = (60, 8, 12, 5, 7, 4, 4)
