"""Each call is whole or absent, wherever the daemon dies.

Every verb runs again and again, and dies at its first store, its second, and so on until it completes, once with that store
left out and once with half of it done. The image is then opened anew: it proves its invariants, fsck finds nothing, and what
can be seen is all of before or all of after. Verbs that overwrite data in place are not atomic (`write` on DAX is not):
there each byte is the old or the new one, and nothing else changes.

A verb is a generator: what comes before its `yield` prepares, what comes after it is the call that dies.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daxfs import abi
from daxfs.core import acl, attributes, fileops, fsck, holding, namespace
from daxfs.core.attributes import Attributes
from daxfs.core.format import format_image
from daxfs.core.inode import Inode
from daxfs.core.namespace import RENAME_EXCHANGE, RENAME_WHITEOUT, Caller
from daxfs.core.pins import Holder
from daxfs.core.volume import Volume
from daxfs.errors import ImageError, ReadOnly

from .image import NOW
from .power import PowerLoss, State, medium, mortal, state

B = 4096
LATER = NOW + 10**9
CALLER = Caller(1000, 1000, 0o022)
BOOT = b"b" * 16
PUNCH = fileops.FALLOC_PUNCH_HOLE | fileops.FALLOC_KEEP_SIZE
ZERO = fileops.FALLOC_ZERO_RANGE
DATA = bytes(range(1, 252)) * 200

Verb = Callable[[Volume], Iterator[None]]
ATOMIC: list[Verb] = []
IN_PLACE: list[Verb] = []


def atomic(verb: Verb) -> Verb:
    ATOMIC.append(verb)
    return verb


def in_place(verb: Verb) -> Verb:
    IN_PLACE.append(verb)
    return verb


def make(vol: Volume, name: bytes, data: bytes = b"", parent: Inode | None = None) -> Inode:
    inode = namespace.create(vol, NOW, parent or vol.root, name, 0o644, CALLER)
    fileops.write(vol, NOW, inode, 0, data)
    return inode


def scattered(vol: Volume, name: bytes, extents: int) -> Inode:
    """A file of many one-block extents."""
    inode = make(vol, name)
    for i in range(extents):
        fileops.write(vol, NOW, inode, 2 * i * B, DATA[i : i + B])
    return inode


def hold(vol: Volume, inode: Inode, first: int, count: int, flags: int = abi.FOLL_PIN) -> None:
    inode.opens += 1
    holding.pin(vol, NOW, inode, first * B, count * B, flags, 1, Holder(7, "test", 7), writable=True)


# -- names --


@atomic
def create(vol: Volume) -> Iterator[None]:
    make(vol, b"other")
    yield
    namespace.create(vol, LATER, vol.root, b"f", stat.S_IFREG | 0o644, CALLER)


@atomic
def create_in_a_new_directory_block(vol: Volume) -> Iterator[None]:
    for i in range(14):
        make(vol, b"%250d" % i)
    yield
    namespace.create(vol, LATER, vol.root, b"x" * 255, stat.S_IFIFO | 0o644, CALLER)


@atomic
def create_in_a_new_chunk_of_inodes(vol: Volume) -> Iterator[None]:
    while vol.free_inodes:
        make(vol, b"%d" % len(vol.free_inodes))
    yield
    namespace.create(vol, LATER, vol.root, b"f", 0o644, CALLER)


@atomic
def create_with_inherited_acls(vol: Volume) -> Iterator[None]:
    directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, CALLER)
    rights = [acl.Entry(acl.USER_OBJ, 7), acl.Entry(acl.USER, 6, 5), acl.Entry(acl.GROUP_OBJ, 5), acl.Entry(acl.MASK, 7),
              acl.Entry(acl.OTHER, 0)]  # fmt: skip
    attributes.setxattr(vol, NOW, directory, acl.DEFAULT, acl.pack(rights))
    yield
    namespace.mkdir(vol, LATER, directory, b"sub", 0o777, CALLER)


@atomic
def mkdir(vol: Volume) -> Iterator[None]:
    yield
    namespace.mkdir(vol, LATER, vol.root, b"d", 0o755, CALLER)


@atomic
def long_symlink(vol: Volume) -> Iterator[None]:
    yield
    namespace.symlink(vol, LATER, vol.root, b"l", DATA[:3000], CALLER)


@atomic
def tmpfile(vol: Volume) -> Iterator[None]:
    yield
    namespace.tmpfile(vol, LATER, vol.root, 0o600, CALLER)


@atomic
def link(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:100])
    yield
    namespace.link(vol, LATER, inode, vol.root, b"g")


@atomic
def unlink(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 200)
    attributes.setxattr(vol, NOW, inode, b"user.big", DATA[:9000])
    yield
    namespace.unlink(vol, LATER, vol.root, b"f")
    fileops.reap(vol, LATER, inode)


@atomic
def rmdir(vol: Volume) -> Iterator[None]:
    directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, CALLER)
    make(vol, b"f", parent=directory)
    namespace.unlink(vol, NOW, directory, b"f")
    yield
    namespace.rmdir(vol, LATER, vol.root, b"d")
    fileops.reap(vol, LATER, directory)


@atomic
def rename_over(vol: Volume) -> Iterator[None]:
    directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, CALLER)
    make(vol, b"f", DATA[:5000])
    victim = make(vol, b"g", DATA[100:9000], directory)
    yield
    namespace.rename(vol, LATER, vol.root, b"f", directory, b"g")
    fileops.reap(vol, LATER, victim)


@atomic
def rename_directory(vol: Volume) -> Iterator[None]:
    for name in (b"a", b"b"):
        namespace.mkdir(vol, NOW, vol.root, name, 0o755, CALLER)
    a, b = (vol.inode(ino) for _, ino, _, _ in namespace.entries(vol, vol.root, 0))
    moved = namespace.mkdir(vol, NOW, a, b"sub", 0o755, CALLER)
    make(vol, b"f", DATA[:10], moved)
    yield
    namespace.rename(vol, LATER, a, b"sub", b, b"other")


@atomic
def exchange(vol: Volume) -> Iterator[None]:
    directory = namespace.mkdir(vol, NOW, vol.root, b"d", 0o755, CALLER)
    make(vol, b"f", DATA[:5000], directory)
    namespace.mkdir(vol, NOW, vol.root, b"e", 0o755, CALLER)
    yield
    namespace.rename(vol, LATER, vol.root, b"e", directory, b"f", RENAME_EXCHANGE)


@atomic
def whiteout(vol: Volume) -> Iterator[None]:
    make(vol, b"f", DATA[:5000])
    yield
    namespace.rename(vol, LATER, vol.root, b"f", vol.root, b"g", RENAME_WHITEOUT)


# -- data --


@atomic
def append(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    yield
    fileops.write(vol, LATER, inode, 5000, DATA[:9000])


@atomic
def write_far_behind_the_end(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    yield
    fileops.write(vol, LATER, inode, 10 * B + 5, DATA[:100])


@atomic
def write_into_a_hole(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    fileops.truncate(vol, NOW, inode, 9 * B)
    yield
    fileops.write(vol, LATER, inode, 3 * B + 7, DATA[: 2 * B])


@atomic
def write_into_unwritten_blocks(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    fileops.fallocate(vol, NOW, inode, 0, 0, 8 * B)
    yield
    fileops.write(vol, LATER, inode, 3 * B + 7, DATA[: 2 * B])


@atomic
def write_that_splits_leaves(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 168)
    fileops.write(vol, NOW, inode, 400 * B, DATA[:1])
    yield
    fileops.write(vol, LATER, inode, 21 * B, DATA[:B])


@atomic
def write_that_drops_privileges(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    attributes.setattr(vol, NOW, inode, Attributes(mode=0o6755))
    attributes.setxattr(vol, NOW, inode, b"security.capability", DATA[:20])
    yield
    fileops.write(vol, LATER, inode, 0, DATA[:10], kill_priv=True)


@atomic
def truncate_to_nothing(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 180)
    yield
    fileops.truncate(vol, LATER, inode, 0)


@atomic
def truncate_within_a_block(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 5 * B])
    yield
    fileops.truncate(vol, LATER, inode, 2 * B + 100)


@atomic
def truncate_up(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    yield
    fileops.truncate(vol, LATER, inode, 1 << 20)


@atomic
def truncate_pinned(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    hold(vol, inode, 0, 3)
    yield
    fileops.truncate(vol, LATER, inode, 1 * B)


@atomic
def preallocate(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    yield
    fileops.fallocate(vol, LATER, inode, 0, 0, 8 * B)


@atomic
def punch(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    yield
    fileops.fallocate(vol, LATER, inode, PUNCH, B + 100, 4 * B)


@atomic
def punch_pinned(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    hold(vol, inode, 3, 2)
    yield
    fileops.fallocate(vol, LATER, inode, PUNCH, 2 * B, 2 * B)


@atomic
def punch_that_splits_a_leaf(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 168)
    fileops.write(vol, NOW, inode, 1 * B, DATA[: 3 * B])
    for i in range(168, 171):
        fileops.write(vol, NOW, inode, 2 * i * B, DATA[:B])
    yield
    fileops.fallocate(vol, LATER, inode, PUNCH, 2 * B, B)


@atomic
def zero_range(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    yield
    fileops.fallocate(vol, LATER, inode, ZERO, B + 100, 8 * B)


@atomic
def copy_range(vol: Volume) -> Iterator[None]:
    source, target = make(vol, b"f", DATA[: 5 * B]), make(vol, b"g")
    yield
    fileops.copy_range(vol, LATER, source, 100, target, B, 3 * B)


# -- attributes and pins --


@atomic
def setattr(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 3 * B])
    yield
    attributes.setattr(vol, LATER, inode, Attributes(mode=0o600, uid=1, gid=2, size=5, atime=1, mtime=2))


@atomic
def xattr_inline(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    yield
    attributes.setxattr(vol, LATER, inode, b"user.a", b"value")


@atomic
def xattr_from_inline_to_blocks(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    attributes.setxattr(vol, NOW, inode, b"user.a", b"value")
    yield
    attributes.setxattr(vol, LATER, inode, b"user.b", DATA[:9000])


@atomic
def xattr_from_blocks_to_inline(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    attributes.setxattr(vol, NOW, inode, b"user.a", b"value")
    attributes.setxattr(vol, NOW, inode, b"user.b", DATA[:9000])
    yield
    attributes.removexattr(vol, LATER, inode, b"user.b")


@atomic
def chmod_with_an_acl(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f")
    rights = [acl.Entry(acl.USER_OBJ, 7), acl.Entry(acl.USER, 6, 5), acl.Entry(acl.GROUP_OBJ, 5), acl.Entry(acl.MASK, 7),
              acl.Entry(acl.OTHER, 0)]  # fmt: skip
    attributes.setxattr(vol, NOW, inode, acl.ACCESS, acl.pack(rights))
    yield
    attributes.setattr(vol, LATER, inode, Attributes(mode=0o640))


@atomic
def pin_for_reading(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 3)
    fileops.write(vol, NOW, inode, B, DATA[:B])
    yield
    hold(vol, inode, 0, 3)


@atomic
def pin_that_fills_holes(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    fileops.truncate(vol, NOW, inode, 9 * B)
    yield
    hold(vol, inode, 1, 4, abi.FOLL_PIN | abi.FOLL_WRITE)


@atomic
def pins_that_fill_the_ledger(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:B])
    for _ in range(62):
        hold(vol, inode, 0, 1)
    yield
    hold(vol, inode, 0, 1)
    hold(vol, inode, 0, 1)


@atomic
def unpin_and_delayed_free(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    hold(vol, inode, 0, 3)
    fileops.truncate(vol, NOW, inode, 1 * B)
    yield
    holding.release_owner(vol, 1)
    vol.free_unpinned(LATER, 100)


@atomic
def clean_unmount(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    gone = make(vol, b"g", DATA[: 3 * B])
    gone.opens += 1
    namespace.unlink(vol, NOW, vol.root, b"g")
    hold(vol, inode, 0, 3)
    yield
    vol.close(LATER)


# -- in place: not atomic --


@in_place
def overwrite(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 4 * B])
    yield
    fileops.write(vol, LATER, inode, 100, DATA[77 : 77 + 3 * B])


@in_place
def overwrite_and_append(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[:5000])
    yield
    fileops.write(vol, LATER, inode, 100, DATA[77 : 77 + 3 * B])


@in_place
def overwrite_extents_and_the_hole_between(vol: Volume) -> Iterator[None]:
    inode = scattered(vol, b"f", 3)
    yield
    fileops.write(vol, LATER, inode, 100, DATA[77 : 77 + 4 * B])


@in_place
def zero_range_of_pinned_blocks(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    hold(vol, inode, 3, 2)
    yield
    fileops.fallocate(vol, LATER, inode, ZERO, B, 6 * B)


@in_place
def copy_within_a_file(vol: Volume) -> Iterator[None]:
    inode = make(vol, b"f", DATA[: 8 * B])
    yield
    fileops.copy_range(vol, LATER, inode, 0, inode, 5 * B + 1, 2 * B)


# -- how they run --


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crash") / "empty"
    format_image(path, 2 << 20, now=NOW)
    return path


class Runs:
    """One verb, dying at each of its stores."""

    def __init__(self, verb: Verb, empty: Path, directory: Path) -> None:
        self.verb, self.empty, self.path = verb, empty, directory / "image"

    def run(self, left: int | None, *, torn: bool) -> bool:
        """Prepare, arm, call; the image is left as the call left it. Whether the call came to its end."""
        shutil.copyfile(self.empty, self.path)
        with mortal():
            vol = Volume.open(self.path, now=NOW, boot_id=BOOT)
        call = self.verb(vol)
        next(call)
        self.before = state(vol)
        self.held = {b: vol.pmem.load(b * B, B) for pin in vol.pins for s, n in pin.runs for b in range(s, s + n)}
        medium(vol).left, medium(vol).torn = left, torn
        try:
            next(call, None)
        except PowerLoss:
            ended = False
        else:
            ended = True
        finally:
            vol.pmem.close()
        return ended

    def reopened(self) -> State:
        """What the next mount shows; it must be sound."""
        vol = Volume.open(self.path, now=LATER, boot_id=BOOT)
        try:
            vol.check()
            report = fsck.check(vol.pmem)
            assert report.errors == 0, [str(f) for f in report.findings]
            self.survivors = {b for pin in vol.pins for s, n in pin.runs for b in range(s, s + n)}
            self.bytes = {b: vol.pmem.load(b * B, B) for b in self.held}
            return state(vol)
        finally:
            vol.pmem.close()

    def all(self, *, torn: bool) -> Iterator[tuple[int, State]]:
        """(stores done, what is seen) for every point of death, and last for none."""
        for left in range(1000):
            ended = self.run(left, torn=torn)
            yield left, self.reopened()
            if ended:
                return
        raise AssertionError("a thousand stores and no end")


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("verb", ATOMIC, ids=lambda verb: verb.__name__)
def test_whole_or_absent(verb: Verb, torn: bool, empty: Path, tmp_path: Path) -> None:
    runs = Runs(verb, empty, tmp_path)
    assert runs.run(None, torn=False)
    after = runs.reopened()
    done = False
    for left, seen in runs.all(torn=torn):
        if done or seen != runs.before:
            assert seen == after, f"after {left} stores there is neither before nor after"
            done = True
        if "pin" not in verb.__name__.split("_")[0]:  # a holder outlives the daemon, and its bytes are its own
            assert runs.survivors == runs.held.keys()
            assert runs.bytes == runs.held
    assert seen == after


@pytest.mark.parametrize("verb", IN_PLACE, ids=lambda verb: verb.__name__)
def test_in_place_each_byte_is_old_or_new(verb: Verb, empty: Path, tmp_path: Path) -> None:
    runs = Runs(verb, empty, tmp_path)
    assert runs.run(None, torn=False)
    after = runs.reopened()
    mixed = False
    for left, seen in runs.all(torn=True):
        before = runs.before
        assert seen.keys() == before.keys() == after.keys()
        for path in seen:
            *_, old, _ = before[path]
            *_, new, _ = after[path]
            *_, got, _ = seen[path]
            if old is None:
                continue
            assert len(got) in (len(old), len(new))
            assert all(g in pair for g, *pair in zip(got, old, new, strict=False)), f"after {left} stores"
            if len(got) > len(old):  # the file grew, so the call is whole
                assert got == new
            mixed |= got not in (old, new)
    assert seen == after
    assert mixed, "this verb is atomic: it belongs to the others"


@pytest.mark.parametrize("verb", [rename_over, unlink, punch_pinned, create_in_a_new_chunk_of_inodes],
                         ids=lambda verb: verb.__name__)  # fmt: skip
def test_a_crash_within_recovery(verb: Verb, empty: Path, tmp_path: Path) -> None:
    """Recovery dies at each of its stores, and the next one has the same to show; a replay done twice changes nothing."""
    runs = Runs(verb, empty, tmp_path)
    assert runs.run(None, torn=False)
    after = runs.reopened()
    crashed = tmp_path / "crashed"
    deaths = 0
    for left in range(1000):
        if runs.run(left, torn=True):
            break
        shutil.copyfile(runs.path, crashed)
        whole = runs.reopened()
        assert whole in (runs.before, after)
        for again in range(1000):
            shutil.copyfile(crashed, runs.path)
            try:
                with mortal(again, torn=True):
                    Volume.open(runs.path, now=LATER, boot_id=BOOT).pmem.close()
            except PowerLoss:
                deaths += 1
                assert runs.reopened() == whole
                assert runs.survivors == runs.held.keys()
            else:
                break
    assert deaths > 5


def test_a_crash_of_a_mount_on_another_boot(empty: Path, tmp_path: Path) -> None:
    """Pins of another boot are voided; a crash meanwhile leaves some or none, never a broken ledger."""
    runs = Runs(truncate_pinned, empty, tmp_path)
    assert runs.run(None, torn=False)
    after = runs.reopened()
    crashed = tmp_path / "crashed"
    shutil.copyfile(runs.path, crashed)
    for left in range(1000):
        shutil.copyfile(crashed, runs.path)
        with mortal(left, torn=True), contextlib.suppress(PowerLoss):
            Volume.open(runs.path, now=LATER, boot_id=b"c" * 16).pmem.close()
            break
        assert runs.reopened() == after
        assert runs.survivors <= runs.held.keys()
    assert left > 2
    assert runs.reopened() == after
    assert runs.survivors == set()


def test_an_interrupted_mkfs_mounts_as_empty_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "image"
    refused = 0
    for left in range(1000):
        path.write_bytes(b"x" * (1 << 20))
        try:
            with mortal(left, torn=True):
                format_image(path, 1 << 20, now=NOW)
        except PowerLoss:
            pass
        else:
            break
        try:
            vol = Volume.open(path, now=NOW)
        except ImageError:
            refused += 1
        else:
            vol.check()
            assert list(state(vol)) == [b"/"]
            vol.close(NOW)
    assert refused > 3


@pytest.mark.parametrize("verb", [create, mkdir, exchange, whiteout, truncate_within_a_block, punch_that_splits_a_leaf,
                                  xattr_from_inline_to_blocks], ids=lambda verb: verb.__name__)  # fmt: skip
def test_an_exception_within_a_call(verb: Verb, empty: Path, tmp_path: Path) -> None:
    """The same deaths, but the daemon lives on: before the commit point an abort puts memory and media back, and the call
    can be made again; behind it the volume is read-only, and the next mount completes the call."""
    runs = Runs(verb, empty, tmp_path)
    assert runs.run(None, torn=False)
    after = runs.reopened()
    aborted = failed = completed = 0
    for left in range(1000):
        shutil.copyfile(empty, runs.path)
        with mortal():
            vol = Volume.open(runs.path, now=NOW, boot_id=BOOT)
        call = verb(vol)
        next(call)
        before = state(vol)
        medium(vol).left = left
        try:
            next(call, None)
        except PowerLoss:
            medium(vol).left = None
        else:
            vol.pmem.close()
            break
        if vol.failed:
            failed += 1
            with pytest.raises(ReadOnly):
                namespace.mkdir(vol, LATER, vol.root, b"refused", 0o755, CALLER)
        else:
            aborted += 1
            vol.check()
            assert state(vol) == before
            namespace.mkdir(vol, LATER, vol.root, b"works", 0o755, CALLER)
            vol.check()
            namespace.rmdir(vol, LATER, vol.root, b"works")
        vol.close(LATER)
        seen = runs.reopened()
        completed += seen == after
        assert seen in (before, after) if vol.failed else seen.keys() == before.keys()
    assert aborted
    assert 0 < completed >= failed - 1  # the store that would have committed may be the one that failed
