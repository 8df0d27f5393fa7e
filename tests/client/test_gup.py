"""get_user_pages and pin_user_pages: the kernel's rules and errnos, and what a page counts."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daxfs import client, gup
from daxfs.client import PinError, calls
from tests.conftest import Maker
from tests.mount.harness import Mounted, eventually

pytestmark = pytest.mark.mount

BLOCK = 4096
BLOCKS = 8
WRITE = gup.FOLL_WRITE
Gup = Callable[[int, int, int, list[gup.Page] | None], int]


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    """A file of 8 blocks, block n full of the letter A + n."""
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(BLOCKS)))
    return file


def test_pages_are_the_blocks_of_the_file(path: Path) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCKS * BLOCK) as vma:
        pages: list[gup.Page] = []
        assert gup.pin_user_pages(vma.vm_start + 2 * BLOCK, 3, WRITE, pages) == 3
        blocks = [e.physical + n for e in file.extents() for n in range(e.count)]
        assert [page.block for page in pages] == blocks[2:5]
        assert [(page.index, page.pincount, page.refcount) for page in pages] == [(n, 1, 2) for n in (2, 3, 4)]
        with gup.vmap(pages) as view:
            assert bytes(view[::BLOCK]) == b"CDE"
            view[:4] = b"DMA!"
        with gup.kmap_local_page(pages[1]) as view:
            assert bytes(view) == b"D" * BLOCK
        assert path.read_bytes()[2 * BLOCK :][:5] == b"DMA!C"
        gup.unpin_user_pages(pages, 3)
    assert client.pins(path) == []


def test_counts_go_up_and_down(path: Path) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCK) as vma:
        pages: list[gup.Page] = []
        gup.pin_user_pages(vma.vm_start, 1, 0, pages)
        gup.pin_user_pages_fast(vma.vm_start, 1, WRITE | gup.FOLL_LONGTERM, pages)
        gup.get_user_pages(vma.vm_start, 1, 0, pages)
        gup.get_user_pages_fast(vma.vm_start, 1, WRITE, pages)
        page = pages[0]
        assert (page.pincount, gup.page_ref_count(page)) == (2, 5)
        assert len({p.block for p in pages}) == 1
        gup.put_page(pages[2])
        gup.unpin_user_page(pages[1])
        assert (page.pincount, page.refcount) == (1, 3)
        assert gup.page_maybe_dma_pinned(pages[3])
        gup.unpin_user_page(page)
        assert not gup.page_maybe_dma_pinned(pages[3])
        assert "referenced" in repr(pages[3])
        assert "released" in repr(page)
        gup.put_page(pages[3])


def test_pages_outlive_mapping_and_file(path: Path, shared_mount: Mounted) -> None:
    with client.open(path, "r+") as file:
        pages: list[gup.Page] = []
        with gup.mmap(file, BLOCKS * BLOCK) as vma:
            gup.pin_user_pages(vma.vm_start, BLOCKS, WRITE, pages)
        os.truncate(path, 0)
        path.write_bytes(b"new" * BLOCKS * BLOCK)
        assert [(page.pincount, page.refcount) for page in pages] == [(1, 1)] * BLOCKS  # the file has let go of them
        with gup.vmap(pages) as view:
            assert bytes(view[::BLOCK]) == b"ABCDEFGH"
        assert sum(b["count"] for b in client.busy(shared_mount.path)) == BLOCKS
        gup.unpin_user_pages(pages, 5)  # any of them may go alone
        eventually("five blocks are free", lambda: sum(b["count"] for b in client.busy(shared_mount.path)) == 3)
        gup.unpin_user_pages(pages[5:], 3)
        eventually("no block is busy", lambda: client.busy(shared_mount.path) == [])


def test_a_get_reference_gives_no_data(path: Path, shared_mount: Mounted) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCK) as vma:
        pages: list[gup.Page] = []
        assert gup.get_user_pages(vma.vm_start, 1, 0, pages) == 1
        with pytest.raises(PinError, match="gives no access") as caught, gup.kmap_local_page(pages[0]):
            pass
        assert caught.value.errno == errno.EACCES
        with file.pin(0, BLOCK, flags=gup.FOLL_GET) as reference, pytest.raises(PinError, match="gives no access"):
            reference.map()
        os.truncate(path, 0)
        assert client.busy(shared_mount.path) == []
        gup.put_page(pages[0])


@pytest.mark.parametrize(
    ("call", "flags", "words"),
    [
        (gup.pin_user_pages, gup.FOLL_PIN, "internal"),
        (gup.pin_user_pages, gup.FOLL_TRIED, "internal"),
        (gup.get_user_pages, gup.FOLL_REMOTE, "internal"),
        (gup.pin_user_pages_fast, gup.FOLL_FAST_ONLY, "internal"),
        (gup.get_user_pages_fast, gup.FOLL_UNLOCKABLE, "internal"),
        (gup.pin_user_pages, gup.FOLL_GET, "exclude each other"),
        (gup.pin_user_pages_fast, gup.FOLL_GET, "exclude each other"),
        (gup.get_user_pages, gup.FOLL_LONGTERM, "needs FOLL_PIN"),
        (gup.get_user_pages_fast, gup.FOLL_LONGTERM, "needs FOLL_PIN"),
        (gup.pin_user_pages, 1 << 30, "unknown"),
        (gup.pin_user_pages_fast, gup.FOLL_NOWAIT, "fast variant"),
        (gup.get_user_pages_fast, gup.FOLL_INTERRUPTIBLE, "fast variant"),
    ],
)
def test_is_valid_gup_args(path: Path, call: Gup, flags: int, words: str) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCK) as vma:
        pages: list[gup.Page] = []
        with pytest.raises(PinError, match=words) as caught:
            call(vma.vm_start, 1, flags, pages)
        assert caught.value.errno == errno.EINVAL
        assert pages == []
        assert client.pins(path) == []


@pytest.mark.parametrize("call", [gup.pin_user_pages, gup.pin_user_pages_fast, gup.get_user_pages_fast])
def test_a_list_is_needed(path: Path, call: Gup) -> None:
    with client.open(path) as file, gup.mmap(file, BLOCK, gup.PROT_READ) as vma, pytest.raises(PinError) as caught:
        call(vma.vm_start, 1, 0, None)
    assert caught.value.errno == errno.EINVAL


def test_no_list_only_faults_in(path: Path) -> None:
    os.truncate(path, 2 * BLOCKS * BLOCK)
    with client.open(path, "r+") as file, gup.mmap(file, 2 * BLOCKS * BLOCK) as vma:
        assert gup.get_user_pages(vma.vm_start, 2 * BLOCKS, WRITE, None) == 2 * BLOCKS
        assert sum(e.count for e in file.extents()) == 2 * BLOCKS
    assert client.pins(path) == []


def test_faults(path: Path) -> None:
    with client.open(path) as file, gup.mmap(file, 10 * BLOCK, gup.PROT_READ) as vma:
        pages: list[gup.Page] = []
        for start, flags, words in (
            (0, 0, "nothing is mapped"),
            (vma.vm_start - 1, 0, "nothing is mapped"),
            (vma.vm_end, 0, "nothing is mapped"),
            (vma.vm_start, WRITE, "does not allow"),
            (vma.vm_start, WRITE | gup.FOLL_FORCE, "does not allow"),
            (vma.vm_start + 8 * BLOCK, 0, "beyond the end"),
            (vma.vm_start, gup.FOLL_ANON, "anonymous"),
        ):
            with pytest.raises(PinError, match=words) as caught:
                gup.pin_user_pages(start, 1, flags, pages)
            assert caught.value.errno == errno.EFAULT, words
        assert gup.pin_user_pages(vma.vm_start, 10, 0, pages) == 8  # as many as there are
        assert gup.pin_user_pages(vma.vm_start, 0, 0, pages) == 0
        stale = vma.vm_start
    with pytest.raises(PinError, match="nothing is mapped"):
        gup.pin_user_pages(stale, 1, 0, pages)
    with pytest.raises(PinError, match="the file is closed"):
        gup.unpin_user_pages(pages, 8)


def test_the_range_of_the_fast_variant(path: Path) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCKS * BLOCK) as vma:
        pages: list[gup.Page] = []
        for start, count, code in (
            ((1 << 64) - BLOCK, 1, errno.EOVERFLOW),
            (gup.TASK_SIZE, 1, errno.EFAULT),
            (vma.vm_start, -1, errno.EINVAL),
        ):
            with pytest.raises(PinError) as caught:
                gup.pin_user_pages_fast(start, count, 0, pages)
            assert caught.value.errno == code
        assert gup.pin_user_pages_fast(vma.vm_start + BLOCK + 17, 2, 0, pages) == 2
        assert [page.index for page in pages] == [1, 2]


def test_a_hole(path: Path) -> None:
    os.truncate(path, (BLOCKS + 2) * BLOCK)
    with client.open(path, "r+") as file, gup.mmap(file, (BLOCKS + 2) * BLOCK) as vma:
        pages: list[gup.Page] = []
        hole = vma.vm_start + BLOCKS * BLOCK
        for flags in (0, WRITE | gup.FOLL_NOFAULT):
            with pytest.raises(PinError) as caught:
                gup.pin_user_pages(hole, 1, flags, pages)
            assert caught.value.errno == errno.EFAULT
        assert gup.pin_user_pages(hole, 1, WRITE, pages) == 1
        assert gup.pin_user_pages(hole, 1, WRITE | gup.FOLL_NOFAULT, pages) == 1
        assert gup.pin_user_pages(hole - BLOCK, 5, 0, pages) == 2  # the last letter, and the new page


def test_wrong_and_double_releases(path: Path) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, BLOCK) as vma:
        pages: list[gup.Page] = []
        gup.pin_user_pages(vma.vm_start, 1, 0, pages)
        gup.get_user_pages(vma.vm_start, 1, 0, pages)
        pinned, referenced = pages
        for release, page, code in (
            (gup.put_page, pinned, errno.EINVAL),
            (gup.unpin_user_page, referenced, errno.EINVAL),
        ):
            with pytest.raises(PinError) as caught:
                release(page)
            assert caught.value.errno == code
        with pytest.raises(PinError, match="npages is 3"):
            gup.unpin_user_pages(pages, 3)
        gup.unpin_user_page(pinned)
        gup.put_page(referenced)
        for release, page in ((gup.unpin_user_page, pinned), (gup.put_page, referenced)):
            with pytest.raises(PinError, match="released before") as caught:
                release(page)
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(PinError, match="released"):
            _ = pinned.pincount


def test_dirty_pages_move_the_times(path: Path) -> None:
    with client.open(path, "r+") as file, gup.mmap(file, 2 * BLOCK) as vma:
        for dirty in (False, True):
            before = path.stat().st_mtime_ns
            pages: list[gup.Page] = []
            gup.pin_user_pages(vma.vm_start, 2, WRITE, pages)
            time.sleep(0.01)
            gup.unpin_user_pages_dirty_lock(pages, 2, dirty)
            assert (path.stat().st_mtime_ns > before) is dirty


def test_mappings(path: Path) -> None:
    with client.open(path) as file:
        for length, prot, offset, code in (
            (0, gup.PROT_READ, 0, errno.EINVAL),
            (BLOCK, gup.PROT_READ, 17, errno.EINVAL),
            (BLOCK, gup.PROT_READ | gup.PROT_WRITE, 0, errno.EACCES),
        ):
            with pytest.raises(PinError) as caught:
                gup.mmap(file, length, prot, offset)
            assert caught.value.errno == code
        with gup.mmap(file, 1, gup.PROT_READ, 3 * BLOCK) as vma:
            pages: list[gup.Page] = []
            assert vma.vm_end - vma.vm_start == BLOCK
            assert gup.pin_user_pages(vma.vm_start, 1, 0, pages) == 1
            with gup.kmap_local_page(pages[0]) as view:
                assert view.readonly
                assert bytes(view) == b"D" * BLOCK
            gup.unpin_user_pages(pages, 1)
    with pytest.raises(PinError, match="vmap wants pages"), gup.vmap([]):
        pass


def test_longterm_where_it_is_denied(make_mount: Maker) -> None:
    mounted = make_mount(size="64M", options="longterm=deny")
    path = mounted.path / "file"
    path.write_bytes(bytes(BLOCK))
    with client.open(path, "r+") as file, gup.mmap(file, BLOCK) as vma:
        pages: list[gup.Page] = []
        with pytest.raises(PinError, match="longterm=deny") as caught:
            gup.pin_user_pages(vma.vm_start, 1, gup.FOLL_LONGTERM, pages)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert gup.pin_user_pages(vma.vm_start, 1, 0, pages) == 1


def test_page_states_of_a_file_and_of_a_pin(path: Path) -> None:
    """The ioctl below: holes are left out, long answers come in pieces, and both ways of asking agree."""
    count = 800
    with client.open(path, "r+") as file:
        for n in range(0, count, 2):  # every second block is a hole
            os.pwrite(file.fileno(), b"x", n * BLOCK)
        os.ftruncate(file.fileno(), count * BLOCK)
        states = []
        while more := calls.page_states(file.fileno(), 0, states[-1][0] + 1 if states else 0):
            states += more
        where = {e.logical + n: e.physical + n for e in file.extents() for n in range(e.count)}
        assert [(index, block) for index, block, *_ in states] == sorted(where.items())
        assert {(pins, references) for *_, pins, references in states} == {(0, 1)}
        with file.pin(0, count * BLOCK, write=True) as pin, file.pin(400 * BLOCK, 2 * BLOCK):
            found = []
            while more := calls.page_states(file.fileno(), pin.id, len(found)):
                found += more
            assert [index for index, *_ in found] == list(range(count))
            assert [block for _, block, *_ in found] == [s + n for s, c in pin.runs for n in range(c)]
            assert [(p, r) for *_, p, r in found] == [(2, 3) if n in (400, 401) else (1, 2) for n in range(count)]
            with client.open(path) as other, pytest.raises(PinError) as caught:
                calls.page_states(other.fileno(), pin.id, 0)
            assert caught.value.errno == errno.ENOENT
