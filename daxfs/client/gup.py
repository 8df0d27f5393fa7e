"""get_user_pages and pin_user_pages for files of a daxfs mount: the kernel's names, flags, rules and errnos (mm/gup.c).

This module has one address space, as a process has. `mmap` puts a file range into it and returns a `Vma`; its addresses are
names for pages, not memory: the data is reached through pinned pages (`kmap_local_page`, `vmap`), which maps the blocks.

    with daxfs.open("/mnt/x/film", "r+") as file, gup.mmap(file, 1 << 20) as vma:
        pages: list[gup.Page] = []
        n = gup.pin_user_pages(vma.vm_start, 4, gup.FOLL_WRITE, pages)
        with gup.vmap(pages) as view:
            view[:4] = b"DMA!"
        gup.unpin_user_pages_dirty_lock(pages, n, True)

As in the kernel
- Page by page: a call that fails half-way returns how many pages it got; only a call that gets none fails. What the kernel
  returns as -errno is raised as PinError with that errno.
- FOLL_PIN and the other internal flags are not the caller's to give; FOLL_GET excludes pinning; FOLL_LONGTERM needs it.
- No mapping at the address, a write to one that is not writable, and a page beyond the end of the file are EFAULT.
- Pages outlive the mapping, the name of the file and its blocks' place in it; they end with the file's description.

Not as in the kernel
- A read pin of a hole is EFAULT: the kernel gives the shared zero page, which is no page of the file.
- FOLL_GET gives a reference and no access to data (Documentation/core-api/pin_user_pages.rst, case 5): mapping is EACCES.
- Long-term pins work (the kernel: EOPNOTSUPP on DAX), unless the mount says longterm=deny.
- Releasing too often raises instead of warning in the kernel log.
- In a forked child, releasing a page that the parent took forgets it there, and no more; see closing.py.

Each page is a pin of its own, so any of them can be released alone. For large ranges `File.pin` is one call.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
import threading
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from daxfs import abi
from daxfs.abi import FOLL_GET, FOLL_LONGTERM, FOLL_PIN, FOLL_WRITE
from daxfs.client import calls
from daxfs.client.calls import PinError
from daxfs.client.closing import Closing, Held
from daxfs.client.file import File
from daxfs.client.memory import Window

__all__ = [
    "FOLL_ANON",
    "FOLL_DUMP",
    "FOLL_FAST_ONLY",
    "FOLL_FORCE",
    "FOLL_GET",
    "FOLL_HONOR_NUMA_FAULT",
    "FOLL_HWPOISON",
    "FOLL_INTERRUPTIBLE",
    "FOLL_LONGTERM",
    "FOLL_MADV_POPULATE",
    "FOLL_NOFAULT",
    "FOLL_NOWAIT",
    "FOLL_PCI_P2PDMA",
    "FOLL_PIN",
    "FOLL_REMOTE",
    "FOLL_SPLIT_PMD",
    "FOLL_TOUCH",
    "FOLL_TRIED",
    "FOLL_UNLOCKABLE",
    "FOLL_WRITE",
    "PROT_READ",
    "PROT_WRITE",
    "TASK_SIZE",
    "Page",
    "PinError",
    "Vma",
    "get_user_pages",
    "get_user_pages_fast",
    "kmap_local_page",
    "mmap",
    "munmap",
    "page_maybe_dma_pinned",
    "page_ref_count",
    "pin_user_pages",
    "pin_user_pages_fast",
    "put_page",
    "unpin_user_page",
    "unpin_user_pages",
    "unpin_user_pages_dirty_lock",
    "vmap",
]

PROT_READ, PROT_WRITE = _mmap.PROT_READ, _mmap.PROT_WRITE

# include/linux/mm_types.h
FOLL_DUMP: Final = 1 << 2
FOLL_FORCE: Final = 1 << 3
FOLL_NOWAIT: Final = 1 << 4
FOLL_NOFAULT: Final = 1 << 5
FOLL_HWPOISON: Final = 1 << 6
FOLL_ANON: Final = 1 << 7
FOLL_SPLIT_PMD: Final = 1 << 9
FOLL_PCI_P2PDMA: Final = 1 << 10
FOLL_INTERRUPTIBLE: Final = 1 << 11
FOLL_HONOR_NUMA_FAULT: Final = 1 << 12
# mm/internal.h
FOLL_TOUCH: Final = 1 << 16
FOLL_TRIED: Final = 1 << 17
FOLL_REMOTE: Final = 1 << 18
FOLL_FAST_ONLY: Final = 1 << 20
FOLL_UNLOCKABLE: Final = 1 << 21
FOLL_MADV_POPULATE: Final = 1 << 22

INTERNAL_GUP_FLAGS: Final = (
    FOLL_TOUCH | FOLL_TRIED | FOLL_REMOTE | FOLL_PIN | FOLL_FAST_ONLY | FOLL_UNLOCKABLE | FOLL_MADV_POPULATE
)
_FAST_FLAGS: Final = (
    FOLL_WRITE | FOLL_LONGTERM | FOLL_FORCE | FOLL_PIN | FOLL_GET | FOLL_FAST_ONLY | FOLL_NOFAULT | FOLL_PCI_P2PDMA
    | FOLL_HONOR_NUMA_FAULT
)  # fmt: skip
_KNOWN_FLAGS: Final = (1 << 13) - 1 | INTERNAL_GUP_FLAGS

_EHWPOISON: Final = 133  # Python has no name for it
TASK_SIZE: Final = 0x7FFF_FFFF_F000
_FIRST: Final = 0x1000_0000_0000  # where the address space begins to be used
_UNSIGNED_LONG: Final = 1 << 64


class Vma:
    """A file range in the address space: [vm_start, vm_end) is `vm_file` from page `vm_pgoff` on. A context manager."""

    def __init__(self, start: int, length: int, file: File, offset: int, prot: int) -> None:
        self.vm_start = start
        self.vm_end = start + length
        self.vm_file = file
        self.vm_pgoff = offset // file.block_size
        self.prot = prot

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        munmap(self)


class _AddressSpace:
    """The mappings of this process, by address. Addresses are used once, so that a stale one is EFAULT."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: list[Vma] = []
        self._next = _FIRST

    def insert(self, file: File, length: int, offset: int, prot: int) -> Vma:
        with self._lock:
            vma = Vma(self._next, length, file, offset, prot)
            self._next = vma.vm_end + file.block_size  # a page that is never mapped
            self._maps = [*self._maps, vma]
            return vma

    def remove(self, vma: Vma) -> None:
        with self._lock:
            self._maps = [other for other in self._maps if other is not vma]

    def find(self, address: int) -> Vma | None:
        return next((vma for vma in self._maps if vma.vm_start <= address < vma.vm_end), None)


    def forked(self) -> None:
        """In a child: the thread that may have had the lock is not here."""
        self._lock = threading.Lock()


_mm = _AddressSpace()
os.register_at_fork(after_in_child=_mm.forked)


def mmap(file: File, length: int, prot: int = PROT_READ | PROT_WRITE, offset: int = 0) -> Vma:
    """Map `length` bytes (rounded up to pages) of a file at `offset`, shared. It may reach beyond the end of the file.

    PinError: EINVAL (length 0, offset not whole pages), EACCES (PROT_WRITE, and the file is open for reading).
    """
    size = file.block_size
    if length <= 0 or offset < 0 or offset % size:
        raise PinError(errno.EINVAL, f"a mapping has a length and begins at a multiple of {size}", file.path)
    access = calls.access_mode(file.fileno())
    if access == os.O_WRONLY or (prot & PROT_WRITE and access != os.O_RDWR):
        raise PinError(errno.EACCES, "a shared mapping needs a file open for reading, or both", file.path)
    return _mm.insert(file, length + -length % size, offset, prot)


def munmap(vma: Vma) -> None:
    """Take a mapping away. Its pages stay pinned. Again: no effect."""
    _mm.remove(vma)


class Page(Held):
    """A page that this process holds: one pin or one reference. `index`: its number in the file when it was taken."""

    __slots__ = ("_block", "_dirty", "_pin_id", "file", "flags", "index")

    _closed_errno = errno.ENOENT
    _closed_word = "was released before"

    def __init__(self, file: File, pin_id: int, index: int, flags: int) -> None:
        super().__init__()
        self.file = file
        self.index = index
        self.flags = flags
        self._pin_id = pin_id
        self._block = -1
        self._dirty = False

    def _called(self) -> tuple[str, str]:
        return f"page {self.index}", self.file.path

    def _give_back(self) -> None:
        self.drop()
        with self.file._named():
            calls.unpin(self.file.fileno(), self._pin_id, dirty=self._dirty)

    def _state(self) -> tuple[int, int, int]:
        self._require_held()
        with self.file._named():
            (_, block, pins, references), *_ = calls.page_states(self.file.fileno(), self._pin_id, 0)
        self._block = block
        return block, pins, references

    @property
    def block(self) -> int:
        """Its block on the image (the kernel: page_to_pfn). It stays the same while the page is held."""
        return self._block if self._block >= 0 else self._state()[0]

    @property
    def pincount(self) -> int:
        """How many FOLL_PIN holders the block has now, in all processes."""
        return self._state()[1]

    @property
    def refcount(self) -> int:
        """Its pins, its FOLL_GET references, and 1 for the file while the block is the file's."""
        return self._state()[2]

    def __repr__(self) -> str:
        kind = "pinned" if self.flags & FOLL_PIN else "referenced"
        if not self.held:
            return f"<Page {self.index} of {self.file.path}: released>"
        block, pins, references = self._state()
        return f"<Page {self.index} of {self.file.path}: {kind}, block {block}, refcount {references}, pincount {pins}>"


Pages = MutableSequence[Page]


def _is_valid_gup_args(gup_flags: int, pages: Pages | None, to_set: int) -> int:
    """The flags with those set that the caller's name implies. PinError EINVAL by the rules of is_valid_gup_args."""
    if gup_flags & INTERNAL_GUP_FLAGS:
        raise PinError(errno.EINVAL, "FOLL_PIN and the other internal flags are set by pin_user_pages, not by its caller")
    if gup_flags & ~_KNOWN_FLAGS:
        raise PinError(errno.EINVAL, f"unknown flags {gup_flags & ~_KNOWN_FLAGS:#x}")
    gup_flags |= to_set
    if gup_flags & FOLL_PIN and gup_flags & FOLL_GET:
        raise PinError(errno.EINVAL, "FOLL_GET and FOLL_PIN exclude each other")
    if gup_flags & FOLL_LONGTERM and not gup_flags & FOLL_PIN:
        raise PinError(errno.EINVAL, "FOLL_LONGTERM needs FOLL_PIN: call pin_user_pages")
    if gup_flags & (FOLL_GET | FOLL_PIN) and pages is None:
        raise PinError(errno.EINVAL, "a list for the pages is needed")
    return gup_flags


def get_user_pages(start: int, nr_pages: int, gup_flags: int, pages: Pages | None) -> int:
    """Take a FOLL_GET reference on each page from address `start` on; they are appended to `pages`. How many there are.
    Release them with `put_page`. Without a list the pages are only faulted in, which gives holes blocks (FOLL_WRITE).

    PinError: EINVAL (flags), EFAULT (see the module), ENOMEM (limit), EHWPOISON (with FOLL_HWPOISON).
    """
    flags = _is_valid_gup_args(gup_flags, pages, FOLL_TOUCH)
    return _get_pages(start, nr_pages, flags | (FOLL_GET if pages is not None else 0), pages)


def pin_user_pages(start: int, nr_pages: int, gup_flags: int, pages: Pages | None) -> int:
    """Pin each page from address `start` on, for access to its data; they are appended to `pages`. How many there are.
    Release them with `unpin_user_pages`. PinError: as `get_user_pages`, and EOPNOTSUPP (FOLL_LONGTERM, longterm=deny)."""
    return _get_pages(start, nr_pages, _is_valid_gup_args(gup_flags, pages, FOLL_PIN), pages)


def get_user_pages_fast(start: int, nr_pages: int, gup_flags: int, pages: Pages | None) -> int:
    """As `get_user_pages`, with the rules of the fast variant: see `pin_user_pages_fast`."""
    return _get_pages_fast(start, nr_pages, _is_valid_gup_args(gup_flags, pages, FOLL_GET), pages)


def pin_user_pages_fast(start: int, nr_pages: int, gup_flags: int, pages: Pages | None) -> int:
    """As `pin_user_pages`; `start` is rounded down to a page. PinError besides: EINVAL (a flag that the fast variant does
    not take), EOVERFLOW (the range does not fit in an unsigned long), EFAULT (it is not below TASK_SIZE)."""
    return _get_pages_fast(start, nr_pages, _is_valid_gup_args(gup_flags, pages, FOLL_PIN), pages)


def _get_pages_fast(start: int, nr_pages: int, flags: int, pages: Pages | None) -> int:
    if flags & ~_FAST_FLAGS:
        raise PinError(errno.EINVAL, f"flags {flags & ~_FAST_FLAGS:#x} do not go with the fast variant")
    vma = _mm.find(start)
    size = vma.vm_file.block_size if vma else _mmap.PAGESIZE
    start -= start % size
    end = start + nr_pages * size
    if end >= _UNSIGNED_LONG:
        raise PinError(errno.EOVERFLOW, "the range does not fit in an unsigned long")
    if end > TASK_SIZE:
        raise PinError(errno.EFAULT, "the range is not in the address space")
    return _get_pages(start, nr_pages, flags, pages)


def _get_pages(start: int, nr_pages: int, flags: int, pages: Pages | None) -> int:
    if nr_pages < 0:
        raise PinError(errno.EINVAL, "nr_pages is negative")
    taken = 0
    while taken < nr_pages:
        try:
            vma, index = _look_up(start, flags)
            page = _fault_in(vma.vm_file, index, flags)
        except PinError as problem:
            if taken or problem.errno == errno.EAGAIN:  # the kernel: FOLL_NOWAIT is 0 pages and no error
                break
            raise
        if pages is not None:
            pages.append(page)
        else:
            _release(page, dirty=False)
        taken += 1
        start += vma.vm_file.block_size
    return taken


def _look_up(address: int, flags: int) -> tuple[Vma, int]:
    """The mapping and the page of the file at an address, which must allow the access."""
    vma = _mm.find(address)
    if vma is None:
        raise PinError(errno.EFAULT, f"nothing is mapped at {address:#x}")
    if not vma.prot & (PROT_WRITE if flags & FOLL_WRITE else PROT_READ):
        raise PinError(errno.EFAULT, "the mapping does not allow this access", vma.vm_file.path)
    if flags & FOLL_ANON:
        raise PinError(errno.EFAULT, "FOLL_ANON wants anonymous memory, this is a file", vma.vm_file.path)
    return vma, vma.vm_pgoff + (address - vma.vm_start) // vma.vm_file.block_size


def _fault_in(file: File, index: int, flags: int) -> Page:
    """One page, held as the flags say. PinErrors with the errnos that a page fault gives to GUP."""
    kind = flags & (FOLL_GET | FOLL_PIN) or FOLL_PIN
    wanted = kind | flags & (FOLL_WRITE | FOLL_LONGTERM) | (abi.PIN_NOWAIT if flags & FOLL_NOWAIT else 0)
    try:
        with file._named():
            if flags & FOLL_NOFAULT and not _has_block(file, index):
                raise PinError(errno.EFAULT, "the page is not there, and FOLL_NOFAULT says not to make it")
            pin_id, _, _ = calls.pin(file.fileno(), index * file.block_size, file.block_size, wanted)
    except PinError as problem:
        code = problem.errno
        if code == errno.EIO:
            code = _EHWPOISON if flags & FOLL_HWPOISON else errno.EFAULT
        elif code in (errno.ENXIO, errno.ENOSPC, errno.EROFS):  # VM_FAULT_SIGBUS
            code = errno.EFAULT
        raise PinError(code, problem.strerror, problem.filename) from problem
    return Page(file, pin_id, index, wanted & ~abi.PIN_NOWAIT)


def _has_block(file: File, index: int) -> bool:
    found = calls.page_states(file.fileno(), 0, index)
    return bool(found) and found[0][0] == index


def put_page(page: Page) -> None:
    """Give back one reference of `get_user_pages`. PinError: EINVAL (it was pinned), ENOENT (released before)."""
    if not page.flags & FOLL_GET:
        raise PinError(errno.EINVAL, "a pinned page is released by unpin_user_page", page.file.path)
    _release(page, dirty=False)


def unpin_user_page(page: Page) -> None:
    """Give back one page of `pin_user_pages`. PinError: EINVAL (it was not pinned), ENOENT (released before)."""
    _unpin(page, dirty=False)


def unpin_user_pages(pages: Sequence[Page], npages: int) -> None:
    """Give back the first `npages` pages of a sequence. PinError as `unpin_user_page`; the pages before stay released."""
    unpin_user_pages_dirty_lock(pages, npages, False)


def unpin_user_pages_dirty_lock(pages: Sequence[Page], npages: int, make_dirty: bool) -> None:
    """Give them back, and mark them dirty first if the device wrote: the file was modified, its times move."""
    if not 0 <= npages <= len(pages):
        raise PinError(errno.EINVAL, f"npages is {npages}, there are {len(pages)} pages")
    for page in pages[:npages]:
        _unpin(page, dirty=make_dirty)


def _unpin(page: Page, *, dirty: bool) -> None:
    if not page.flags & FOLL_PIN:
        raise PinError(errno.EINVAL, "a page of get_user_pages is released by put_page", page.file.path)
    _release(page, dirty=dirty)


def _release(page: Page, *, dirty: bool) -> None:
    page._require_held()
    page._dirty = dirty
    page.close()


def page_ref_count(page: Page) -> int:
    return page.refcount


def page_maybe_dma_pinned(page: Page) -> bool:
    """Whether somebody may do DMA to the block. Here it is exact."""
    return page.pincount > 0


class _Mapped(Closing):
    """Pages as memory, until the file is closed at the latest."""

    def __init__(self, file: File, window: Window) -> None:
        super().__init__(file)
        self._window = window

    def _let_go(self) -> None:
        self._window.close()


@contextmanager
def vmap(pages: Sequence[Page]) -> Iterator[memoryview]:
    """Pinned pages of one file as contiguous memory: the blocks themselves. Writable if all were pinned with FOLL_WRITE.

    PinError: EINVAL (no pages, or of several files), EACCES (a FOLL_GET page, no permission for the image), ENOENT.
    """
    if not pages or any(page.file is not pages[0].file for page in pages):
        raise PinError(errno.EINVAL, "vmap wants pages, all of the same file")
    file = pages[0].file
    if not all(page.flags & FOLL_PIN for page in pages):
        raise PinError(errno.EACCES, "a FOLL_GET reference gives no access to the data: use pin_user_pages", file.path)
    for page in pages:
        page._require_held()
    writable = all(page.flags & FOLL_WRITE for page in pages)
    image = file.open_image(writable=writable)
    try:
        window = Window(image, [(page.block, 1) for page in pages], file.block_size, writable=writable)
    finally:
        os.close(image)
    with _Mapped(file, window):
        yield window.view


@contextmanager
def kmap_local_page(page: Page) -> Iterator[memoryview]:
    """One pinned page as memory; see `vmap`."""
    with vmap([page]) as view:
        yield view
