"""The alphabet of the crash explorer: concrete calls on the core's verbs, and the volume that they start from.

Owns `ALPHABET` (name -> Call), the base image, and the `World` that calls run in: a volume, a clock, open descriptors
and pins, as the daemon has them. A call is one verb with all its arguments, so a crash within it has two outcomes only:
whole or absent. What the core promises less for is said at the call (`in_place`).

Rules
- A call does the same whenever the world is the same. It may fail after any others (its file is gone): an error of the
  call is its outcome. Damage is not: Corrupt, or a volume that refuses changes, goes on to whoever explores.
- The base has one of each thing that verbs treat differently; its free blocks are full of garbage, one inode number is
  free, and one directory block is nearly full.

Not here: which sequences are run (sequences.py), what a crash may leave (state.py).
"""

from __future__ import annotations

import random
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from daxfs import abi
from daxfs.core import acl, attributes, fileops, holding, namespace
from daxfs.core.attributes import Attributes
from daxfs.core.fileops import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, Caller
from daxfs.core.pins import Holder
from daxfs.core.pmem import Pmem
from daxfs.core.volume import Volume
from daxfs.errors import BadDescriptor, Corrupt, FsError, NoEntry, ReadOnly

BLOCK = 4096
IMAGE_SIZE = 1 << 20
START = 1_700_000_000_000_000_000  # ns since 1970: when the base image was made
BOOT = b"explored boot ID"
SECOND = 1_000_000_000
CALLER = Caller(1000, 1000, 0o022)
HOLDER = Holder(7, "holder", 7)
_OWNERS = {"a": 1, "b": 2, "held": 3, "stray": 4, "tmp": 5, "frag": 6, "new": 7}  # descriptors that calls know
_PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE


@cache
def pattern(tag: int, length: int) -> bytes:
    """Bytes that are nobody else's: no word of one tag is in another's, or zero."""
    return random.Random(tag).randbytes(length)


class World:
    """What calls run in. `now` is the time of the current call, ns since 1970; `boot` the host's boot.

    Its methods are the calls of a program, on paths from the root (bytes, no symbolic links) or descriptors by name.
    """

    def __init__(self, volume: Volume, now: int = START) -> None:
        self.volume = volume
        self.now = now
        self.boot = BOOT
        self.files: dict[str, Inode] = {}  # open descriptors
        self.pins: dict[str, tuple[str, int]] = {}  # pin -> descriptor, pin id

    @classmethod
    def begin(cls, volume: Volume) -> World:
        """The world that sequences start in, on a freshly mounted base image: two descriptors of one file, two pinned
        files, a busy block of one of them. It stores to media; what comes after it is explored."""
        world = cls(volume, START + 100 * SECOND)
        for name, path in (("a", b"/file"), ("b", b"/file"), ("held", b"/held"), ("stray", b"/stray")):
            world.open(name, path)
        world.pin("held", "held", 1, 2)
        world.pin("stray", "stray", 0, 1)
        world.truncate(b"/stray", 0)
        return world

    # -- names --

    def find(self, path: bytes) -> Inode:
        inode = self.volume.root
        for name in path.split(b"/")[1:]:
            found = namespace.lookup(self.volume, inode, name) if name else inode
            if found is None:
                raise NoEntry(f"no {path.decode()}")
            inode = found
        return inode

    def place(self, path: bytes) -> tuple[Inode, bytes]:
        parent, _, name = path.rpartition(b"/")
        return self.find(parent), name

    def create(self, path: bytes, mode: int = 0o100644) -> None:
        rdev = 0x103 if stat.S_ISCHR(mode) else 0
        namespace.create(self.volume, self.now, *self.place(path), mode, CALLER, rdev)

    def mkdir(self, path: bytes) -> None:
        namespace.mkdir(self.volume, self.now, *self.place(path), 0o755, CALLER)

    def symlink(self, path: bytes, target: bytes) -> None:
        namespace.symlink(self.volume, self.now, *self.place(path), target, CALLER)

    def link(self, path: bytes, new: bytes) -> None:
        namespace.link(self.volume, self.now, self.find(path), *self.place(new))

    def unlink(self, path: bytes) -> None:
        inode = self.find(path)
        namespace.unlink(self.volume, self.now, *self.place(path))
        fileops.reap(self.volume, self.now, inode)

    def rmdir(self, path: bytes) -> None:
        inode = self.find(path)
        namespace.rmdir(self.volume, self.now, *self.place(path))
        fileops.reap(self.volume, self.now, inode)

    def rename(self, path: bytes, new: bytes, flags: int = 0) -> None:
        parent, name = self.place(new)
        over = namespace.lookup(self.volume, parent, name)
        namespace.rename(self.volume, self.now, *self.place(path), parent, name, flags)
        if over is not None:
            fileops.reap(self.volume, self.now, over)

    # -- descriptors --

    def open(self, name: str, path: bytes) -> None:
        self._open(name, self.find(path))

    def _open(self, name: str, inode: Inode) -> None:
        if name in self.files:
            raise BadDescriptor(f"descriptor {name} is open already")
        inode.opens += 1
        inode.set_hot()
        self.files[name] = inode

    def tmpfile(self, name: str) -> None:
        if name in self.files:
            raise BadDescriptor(f"descriptor {name} is open already")
        self._open(name, namespace.tmpfile(self.volume, self.now, self.find(b"/dir"), 0o600, CALLER))

    def link_open(self, name: str, new: bytes) -> None:
        namespace.link(self.volume, self.now, self.file(name), *self.place(new))

    def close(self, name: str) -> None:
        inode = self.file(name)
        holding.release_owner(self.volume, _OWNERS[name])
        for pin in [pin for pin, (descriptor, _) in self.pins.items() if descriptor == name]:
            del self.pins[pin]
        del self.files[name]
        inode.opens -= 1
        fileops.reap(self.volume, self.now, inode)

    def file(self, name: str) -> Inode:
        if name not in self.files:
            raise BadDescriptor(f"descriptor {name} is not open")
        return self.files[name]

    def _inode(self, file: bytes | str) -> Inode:
        return self.file(file) if isinstance(file, str) else self.find(file)

    def remount(self) -> None:
        """Close everything, unmount cleanly and mount again."""
        for name in list(self.files):
            self.close(name)
        self.volume.close(self.now)
        self._mount()
        if self.volume.last_shutdown != "clean":
            raise Corrupt(f"the volume was unmounted cleanly, and its next mount says: {self.volume.last_shutdown}")

    def reboot(self) -> None:
        """The same, but the host boots in between."""
        self.boot = self.boot[::-1]
        self.remount()

    def die(self) -> None:
        """The daemon is killed, and the volume mounted again: descriptors are gone, pins are those of survivors."""
        self.files.clear()
        self.pins.clear()
        self.volume.pmem.close()
        self._mount()

    def _mount(self) -> None:
        medium = self.volume.pmem.path if type(self.volume.pmem) is Pmem else self.volume.pmem
        self.volume = Volume.open(medium, now=self.now, boot_id=self.boot)

    # -- data --

    def read(self, file: bytes | str) -> bytes:
        inode = self._inode(file)
        fileops.note_access(inode, self.now)
        return fileops.read(self.volume, inode, 0, inode.size)

    def write(self, file: bytes | str, offset: int, length: int, tag: int, *, kill_priv: bool = False) -> int:
        data = pattern(tag, length)
        return fileops.write(self.volume, self.now, self._inode(file), offset, data, kill_priv=kill_priv)

    def truncate(self, file: bytes | str, size: int) -> None:
        fileops.truncate(self.volume, self.now, self._inode(file), size)

    def fallocate(self, file: bytes | str, mode: int, offset: int, length: int) -> None:
        fileops.fallocate(self.volume, self.now, self._inode(file), mode, offset, length)

    def fill(self, file: bytes) -> None:
        """Preallocate all space that is left."""
        self.fallocate(file, FALLOC_KEEP_SIZE, 1 << 30, self.volume.alloc.available * BLOCK)

    def copy(self, source: bytes, offset: int, target: bytes, target_offset: int, length: int) -> int:
        files = self.find(source), offset, self.find(target), target_offset
        return fileops.copy_range(self.volume, self.now, *files, length)

    # -- attributes --

    def setattr(self, path: bytes, new: Attributes) -> None:
        attributes.setattr(self.volume, self.now, self.find(path), new)

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        attributes.setxattr(self.volume, self.now, self.find(path), name, value)

    def removexattr(self, path: bytes, name: bytes) -> None:
        attributes.removexattr(self.volume, self.now, self.find(path), name)

    # -- pins --

    def pin(self, pin: str, descriptor: str, first: int, count: int, *, write: bool = False) -> None:
        """Pin blocks of an open file."""
        if pin in self.pins:
            raise BadDescriptor(f"pin {pin} is taken already")
        flags = abi.FOLL_PIN | (abi.FOLL_WRITE if write else 0)
        taken = holding.pin(self.volume, self.now, self.file(descriptor), first * BLOCK, count * BLOCK, flags,
                            _OWNERS[descriptor], HOLDER, writable=True)  # fmt: skip
        self.pins[pin] = descriptor, taken.id

    def unpin(self, pin: str, *, dirty: bool = False) -> None:
        if pin not in self.pins:
            raise NoEntry(f"no pin {pin}")
        descriptor, number = self.pins[pin]
        holding.unpin(self.volume, self.now, _OWNERS[descriptor], number, dirty=dirty)
        del self.pins[pin]

    def release(self) -> None:
        """The holders that outlived the daemon end."""
        for pin in self.volume.pins.survivors():
            holding.release_survivor(self.volume, pin)

    def free_unpinned(self, limit: int) -> bool:
        return self.volume.free_unpinned(self.now, limit)


# -- the base image --


@cache
def base_image() -> bytes:
    """The image that every sequence starts from, unmounted: the same bytes every time."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "base"
        format_image(path, IMAGE_SIZE, uuid=b"crash explorer's", now=START)
        volume = Volume.open(path, now=START, boot_id=bytes(16))
        for start, count in volume.alloc.free.runs():
            volume.pmem.store(start * BLOCK, b"\xee" * (count * BLOCK))
        _build(World(volume))
        volume.close(START)
        return path.read_bytes()


def _build(world: World) -> None:
    """The tree of the base image; `begin` adds descriptors, pins and a busy block."""
    for directory in (b"/dir", b"/dir/sub", b"/empty", b"/wide"):
        world.mkdir(directory)
    sizes = {b"/file": 3 * BLOCK + 100, b"/short": 100, b"/held": 4 * BLOCK, b"/stray": 2 * BLOCK, b"/dir/inner": 700,
             b"/sparse": 0, b"/prealloc": 0, b"/frag": 0, b"/suid": 50, b"/chain": 0}  # fmt: skip
    for tag, (path, size) in enumerate(sizes.items()):
        world.create(path)
        world.write(path, 0, size, 1000 + tag)
    for index in range(8):
        world.write(b"/frag", 2 * index * BLOCK, BLOCK, 1100 + index)  # more extents than an inode has room for
    world.write(b"/sparse", 8 * BLOCK, BLOCK, 1200)
    world.truncate(b"/sparse", 16 * BLOCK)
    world.fallocate(b"/prealloc", 0, 0, 4 * BLOCK)
    world.link(b"/short", b"/dir/hard")
    world.symlink(b"/sym", b"dir/inner")
    world.setxattr(b"/suid", b"security.capability", pattern(1300, 20))
    world.setattr(b"/suid", Attributes(mode=0o6755))
    world.setxattr(b"/chain", b"user.small", b"value")
    world.setxattr(b"/chain", b"user.large", pattern(1301, 6000))
    for index in range(14):
        world.create(b"/wide/%0250d" % index)


_ACL = acl.pack([acl.Entry(acl.USER_OBJ, 6), acl.Entry(acl.USER, 6, 5), acl.Entry(acl.GROUP_OBJ, 4),
                 acl.Entry(acl.MASK, 6), acl.Entry(acl.OTHER, 0)])  # fmt: skip


# -- the alphabet --


@dataclass(frozen=True)
class Call:
    """One verb with its arguments. `in_place`: where there is data (or a pin, for a zeroed range) it is overwritten in
    place, and times with it; a crash leaves each 8-byte word old or new. `unmounts`: for a while nothing is mounted."""

    name: str
    run: Callable[[World], object]
    in_place: bool = False
    unmounts: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a call gave back, or the errno that it failed with."""

    value: object = None
    errno: int = 0


def perform(world: World, call: Call) -> Outcome:
    """Run a call, one second after the last. Damage that it meets (Corrupt, ReadOnly) is raised, it is no outcome."""
    world.now += SECOND
    try:
        return Outcome(call.run(world))
    except (Corrupt, ReadOnly):
        raise
    except FsError as e:
        return Outcome(errno=e.errno)


_NAMES = (
    Call("create", lambda w: w.create(b"/new")),
    Call("create_inner", lambda w: w.create(b"/dir/new")),
    Call("create_wide", lambda w: w.create(b"/wide/" + b"n" * 255)),
    Call("create_wide_too", lambda w: w.create(b"/wide/" + b"m" * 255)),
    Call("mknod_fifo", lambda w: w.create(b"/fifo", 0o010600)),
    Call("mknod_device", lambda w: w.create(b"/empty/device", 0o020600)),
    Call("mkdir", lambda w: w.mkdir(b"/dir/made")),
    Call("mkdir_deep", lambda w: w.mkdir(b"/dir/sub/deep")),
    Call("symlink_short", lambda w: w.symlink(b"/pointer", b"somewhere")),
    Call("symlink_long", lambda w: w.symlink(b"/dir/pointer", b"far/" * 200)),
    Call("link", lambda w: w.link(b"/file", b"/dir/second")),
    Call("link_held", lambda w: w.link(b"/held", b"/dir/sub/held")),
    Call("unlink_file", lambda w: w.unlink(b"/file")),  # two descriptors are open
    Call("unlink_short", lambda w: w.unlink(b"/short")),  # has a second name
    Call("unlink_hard", lambda w: w.unlink(b"/dir/hard")),
    Call("unlink_frag", lambda w: w.unlink(b"/frag")),
    Call("unlink_chain", lambda w: w.unlink(b"/chain")),
    Call("unlink_held", lambda w: w.unlink(b"/held")),
    Call("unlink_sym", lambda w: w.unlink(b"/sym")),
    Call("unlink_wide", lambda w: w.unlink(b"/wide/%0250d" % 3)),
    Call("unlink_new", lambda w: w.unlink(b"/new")),
    Call("rmdir", lambda w: w.rmdir(b"/empty")),
    Call("rmdir_sub", lambda w: w.rmdir(b"/dir/sub")),
    Call("rename", lambda w: w.rename(b"/short", b"/dir/renamed")),
    Call("rename_back", lambda w: w.rename(b"/dir/renamed", b"/short")),
    Call("rename_same_directory", lambda w: w.rename(b"/frag", b"/pieces")),
    Call("rename_new", lambda w: w.rename(b"/new", b"/short")),  # how programs replace a file
    Call("rename_over", lambda w: w.rename(b"/short", b"/chain")),
    Call("rename_over_open", lambda w: w.rename(b"/dir/inner", b"/file")),
    Call("rename_over_held", lambda w: w.rename(b"/frag", b"/held")),
    Call("rename_noreplace", lambda w: w.rename(b"/file", b"/empty/moved", RENAME_NOREPLACE)),
    Call("rename_exchange", lambda w: w.rename(b"/file", b"/dir/inner", RENAME_EXCHANGE)),
    Call("rename_exchange_kinds", lambda w: w.rename(b"/dir/sub", b"/short", RENAME_EXCHANGE)),
    Call("rename_exchange_directories", lambda w: w.rename(b"/dir/sub", b"/empty", RENAME_EXCHANGE)),
    Call("rename_whiteout", lambda w: w.rename(b"/short", b"/dir/covered", RENAME_WHITEOUT)),
    Call("rename_directory", lambda w: w.rename(b"/dir/sub", b"/moved")),
    Call("rename_directory_over", lambda w: w.rename(b"/empty", b"/dir/sub")),
)  # fmt: skip
_DATA = (
    Call("read", lambda w: w.read(b"/file")),
    Call("write", lambda w: w.write(b"/file", 1000, 2 * BLOCK, 1), in_place=True),
    Call("write_word", lambda w: w.write(b"/file", BLOCK, 8, 2), in_place=True),
    Call("write_open", lambda w: w.write("a", 5, 2000, 3), in_place=True),
    Call("write_second", lambda w: w.write("b", BLOCK - 9, 20, 4), in_place=True),
    Call("write_held", lambda w: w.write(b"/held", BLOCK + 100, 5000, 5), in_place=True),
    Call("write_new", lambda w: w.write(b"/new", 0, 2 * BLOCK + 10, 6), in_place=True),
    Call("write_inner", lambda w: w.write(b"/dir/new", 0, 30, 7), in_place=True),
    Call("append", lambda w: w.write(b"/short", 100, 60, 8), in_place=True),
    Call("append_open", lambda w: w.write("a", 3 * BLOCK + 100, 2 * BLOCK, 9), in_place=True),
    Call("append_second", lambda w: w.write("b", 3 * BLOCK + 50, 300, 10), in_place=True),
    Call("write_far", lambda w: w.write(b"/short", 5 * BLOCK + 5, 100, 11), in_place=True),
    Call("write_hole", lambda w: w.write(b"/sparse", 3 * BLOCK + 7, 2 * BLOCK, 12), in_place=True),
    Call("write_prealloc", lambda w: w.write(b"/prealloc", BLOCK + 70, 3000, 13), in_place=True),
    Call("write_gap", lambda w: w.write(b"/frag", BLOCK - 40, BLOCK + 80, 14), in_place=True),
    Call("write_privileged", lambda w: w.write(b"/suid", 10, 20, 15, kill_priv=True), in_place=True),
    Call("write_stray", lambda w: w.write(b"/stray", 0, 3 * BLOCK, 16), in_place=True),
    Call("write_tmp", lambda w: w.write("tmp", 0, 5000, 17), in_place=True),
    Call("truncate_zero", lambda w: w.truncate(b"/file", 0)),
    Call("truncate_down", lambda w: w.truncate(b"/file", BLOCK + 99)),
    Call("truncate_frag", lambda w: w.truncate(b"/frag", 5 * BLOCK)),
    Call("truncate_frag_tail", lambda w: w.truncate(b"/frag", 12 * BLOCK + 1)),
    Call("truncate_up", lambda w: w.truncate(b"/short", 3000)),
    Call("truncate_open_up", lambda w: w.truncate("b", 5 * BLOCK)),
    Call("truncate_huge", lambda w: w.truncate(b"/sparse", 1 << 40)),
    Call("truncate_held", lambda w: w.truncate("held", BLOCK + 1)),
    Call("truncate_new", lambda w: w.truncate(b"/new", 100)),
    Call("punch", lambda w: w.fallocate(b"/file", _PUNCH, 100, 2 * BLOCK)),
    Call("punch_within", lambda w: w.fallocate(b"/file", _PUNCH, BLOCK + 3, 50)),
    Call("punch_frag", lambda w: w.fallocate(b"/frag", _PUNCH, 2 * BLOCK, 5 * BLOCK)),
    Call("punch_held", lambda w: w.fallocate(b"/held", _PUNCH, 0, 2 * BLOCK)),
    Call("zero", lambda w: w.fallocate(b"/file", FALLOC_ZERO_RANGE, 100, 3 * BLOCK), in_place=True),
    Call("zero_grow", lambda w: w.fallocate(b"/short", FALLOC_ZERO_RANGE, 50, 2 * BLOCK), in_place=True),
    Call("zero_held", lambda w: w.fallocate(b"/held", FALLOC_ZERO_RANGE, 0, 4 * BLOCK), in_place=True),
    Call("fallocate", lambda w: w.fallocate(b"/short", 0, 0, 3 * BLOCK)),
    Call("fallocate_keep_size", lambda w: w.fallocate(b"/file", FALLOC_KEEP_SIZE, 2 * BLOCK, 6 * BLOCK)),
    Call("fallocate_frag", lambda w: w.fallocate(b"/frag", 0, BLOCK, 3 * BLOCK)),
    Call("fill", lambda w: w.fill(b"/short")),
    Call("copy", lambda w: w.copy(b"/frag", 10, b"/dir/inner", 700, 3 * BLOCK), in_place=True),
    Call("copy_over", lambda w: w.copy(b"/frag", 0, b"/file", 17, 2 * BLOCK), in_place=True),
    Call("copy_within", lambda w: w.copy(b"/file", 0, b"/file", 3 * BLOCK + 100, 2000), in_place=True),
)  # fmt: skip
_ATTRIBUTES = (
    Call("chmod", lambda w: w.setattr(b"/file", Attributes(mode=0o600))),
    Call("chmod_directory", lambda w: w.setattr(b"/dir", Attributes(mode=0o2700))),
    Call("chown", lambda w: w.setattr(b"/suid", Attributes(uid=5, gid=6))),
    Call("utimens", lambda w: w.setattr(b"/short", Attributes(atime=SECOND, mtime=2 * SECOND + 3))),
    Call("setattr_size", lambda w: w.setattr(b"/file", Attributes(size=77, mode=0o640, uid=9))),
    Call("setxattr", lambda w: w.setxattr(b"/file", b"user.name", b"value")),
    Call("setxattr_again", lambda w: w.setxattr(b"/file", b"user.name", b"another value")),
    Call("setxattr_large", lambda w: w.setxattr(b"/file", b"user.large", pattern(20, 5000))),
    Call("setxattr_directory", lambda w: w.setxattr(b"/dir", b"user.name", b"of the directory")),
    Call("setxattr_chain", lambda w: w.setxattr(b"/chain", b"user.small", b"changed")),
    Call("setxattr_chain_larger", lambda w: w.setxattr(b"/chain", b"user.large", pattern(21, 9000))),
    Call("removexattr", lambda w: w.removexattr(b"/file", b"user.name")),
    Call("removexattr_chain", lambda w: w.removexattr(b"/chain", b"user.large")),
    Call("set_acl", lambda w: w.setxattr(b"/file", acl.ACCESS, _ACL)),
    Call("set_default_acl", lambda w: w.setxattr(b"/dir", acl.DEFAULT, _ACL)),
)  # fmt: skip
_HOLDERS = (
    Call("open_frag", lambda w: w.open("frag", b"/frag")),
    Call("open_new", lambda w: w.open("new", b"/new")),
    Call("close_a", lambda w: w.close("a")),
    Call("close_b", lambda w: w.close("b")),
    Call("close_held", lambda w: w.close("held")),
    Call("close_stray", lambda w: w.close("stray")),
    Call("close_frag", lambda w: w.close("frag")),
    Call("tmpfile", lambda w: w.tmpfile("tmp")),
    Call("link_tmpfile", lambda w: w.link_open("tmp", b"/kept")),
    Call("close_tmp", lambda w: w.close("tmp")),
    Call("pin", lambda w: w.pin("read", "a", 0, 2)),
    Call("pin_write", lambda w: w.pin("write", "b", 1, 2, write=True)),
    Call("pin_frag", lambda w: w.pin("frag", "frag", 0, 4, write=True)),  # fills holes
    Call("unpin", lambda w: w.unpin("read")),
    Call("unpin_dirty", lambda w: w.unpin("write", dirty=True), in_place=True),
    Call("unpin_held", lambda w: w.unpin("held")),
    Call("unpin_stray", lambda w: w.unpin("stray")),
    Call("free_some", lambda w: w.free_unpinned(1)),
    Call("free_all", lambda w: w.free_unpinned(1 << 20)),
    Call("remount", lambda w: w.remount(), unmounts=True),
    Call("reboot", lambda w: w.reboot(), unmounts=True),
    Call("die", lambda w: w.die()),
    Call("release", lambda w: w.release()),
)  # fmt: skip
ALPHABET = {call.name: call for call in (*_NAMES, *_DATA, *_ATTRIBUTES, *_HOLDERS)}
