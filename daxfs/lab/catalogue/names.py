"""Unlink, rename and links: no policy waits or fails there; blocks of a file that ends stay with their holders."""

from __future__ import annotations

import os
import signal

from daxfs.lab import acts
from daxfs.lab.course import show_corruption
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, SAFE, Lab, everywhere, pattern, story

OLD = b"".join(pattern("A", n) for n in range(8))


@story(
    "unlink",
    "unlink a pinned file: the name goes at once, the blocks stay until the unpin (kernels before 6.15 reuse them)",
    source="S28",
    pins="P: A[0,2)",
    call="unlink(A)",
    sees=everywhere(
        "returns 0; the name is gone; P keeps its bytes; nobody gets its blocks; the unpin and close free them", SAFE
    ),
)
def unlink(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 2)
    lab.returns(lab.process().start(os.unlink, path))
    lab.see(not lab.exists(path), "the name is still there")
    lab.file("A")
    lab.equal(lab.blocks(path) & p.blocks, set(), "P's blocks in the new A")
    lab.bytes_equal(p.view(), OLD[: 2 * BLOCK], "P's blocks")
    lab.not_reused(p)
    p.dma(b"<DMA>")
    lab.bytes_equal(lab.read(path), OLD, "the new A")
    p.unpin()
    p.holder.do(acts.close_file, p.holder.file)


@story(
    "unlink-unsafe",
    "policy `unsafe` frees the blocks of an unlinked file whose pins are only mapped",
    source="S28; oracle: unlink + close before 6.15",
    pins="P: A[0,8), its file is the last reference",
    call="unlink(A), truncate(A, 0) by P; write(B) over all free space; P writes",
    sees={"unsafe": "P writes into B: the bytes are shown"},
)
def unlink_unsafe(lab: Lab) -> None:
    lab.needs(lab.can_fill(), "it fills the volume, which is too large for that: run it without --mount")
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    lab.returns(lab.process().start(os.unlink, path))
    p.holder.do(acts.ftruncate, p.holder.file, 0)
    taken = lab.take_all(p, write=True)
    p.dma(b"<the device was here>" * 1000)
    show_corruption(lab, taken)


@story(
    "unlink-then-let-go",
    "open, unlinked and pinned: freed once, when both the pin and the description are gone",
    source="S29",
    pins="P: A[0,2) on one descriptor; Q has A open",
    call="unlink(A); unpin and close in both orders",
    sees=everywhere("I/O on the descriptor works; the blocks are freed once", SAFE),
)
def unlink_then_let_go(lab: Lab) -> None:
    for order in ("unpin first", "close first"):
        free = lab.info()["free"]
        path = lab.file()
        q = lab.holder(path)
        p = lab.holder(path).pin(0, 2)
        lab.returns(lab.process().start(os.unlink, path))
        q.do(acts.write_at, q.file, 0, b"still here")
        lab.bytes_equal(p.view()[:10], b"still here", "P's block")
        if order == "unpin first":
            p.unpin()
            lab.bytes_equal(q.do(acts.read_at, q.file, 0, 10), b"still here", "A")
            q.do(acts.close_file, q.file)
            p.holder.do(acts.close_file, p.holder.file)
        else:
            q.do(acts.close_file, q.file)
            lab.not_reused(p)
            p.unpin()
            p.holder.do(acts.close_file, p.holder.file)
        eventually(f"{order}: the blocks are free", lambda: lab.info()["free"] >= free)  # noqa: B023


@story(
    "rename-over",
    "rename over a pinned file is its unlink",
    source="S30; oracle: Linux frees under the holder",
    pins="P: A[0,8)",
    call="rename(B, A)",
    sees=everywhere("returns 0; A has B's bytes; P keeps the old ones", SAFE),
)
def rename_over(lab: Lab) -> None:
    path, other = lab.file(), lab.file("B")
    content = lab.read(other)
    p = lab.holder(path).pin(0, 8)
    lab.returns(lab.process().start(os.rename, other, path))
    lab.bytes_equal(lab.read(path), content, "A")
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    lab.not_reused(p)
    p.dma(b"<DMA>")
    lab.bytes_equal(lab.read(path), content, "A after P has written")
    p.unpin()


@story(
    "hard-link",
    "one of two links goes: nothing happens to the blocks; the last one: they stay with the holder",
    source="S31",
    pins="P: A[0,4)",
    call="link(A, L), unlink(A), unlink(L)",
    sees=everywhere("nothing is busy while L is there; P keeps its bytes", SAFE),
)
def hard_link(lab: Lab) -> None:
    path, link = lab.file(), lab.path("L")
    p = lab.holder(path).pin(0, 4)
    caller = lab.process()
    caller.do(os.link, path, link)
    lab.returns(caller.start(os.unlink, path))
    lab.bytes_equal(lab.read(link), OLD, "L")
    lab.equal(lab.busy(), 0, "busy blocks")
    lab.returns(caller.start(os.unlink, link))
    lab.bytes_equal(p.view(), OLD[: 4 * BLOCK], "P's blocks")
    lab.not_reused(p)
    p.unpin()


@story(
    "rename-pinned",
    "pins follow the inode through rename and exchange, of the file or of its directory",
    source="S32",
    pins="P: A[0,2)",
    call="rename(A, D/A), rename(D, E), exchange(E/A, C)",
    sees="P's bytes are the file's, under its new name; nothing busy",
)
def rename_pinned(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p = lab.holder(path).pin(0, 2)
    caller = lab.process()
    caller.do(os.mkdir, lab.path("D"))
    caller.do(os.rename, path, lab.path("D/A"))
    caller.do(os.rename, lab.path("D"), lab.path("E"))
    caller.do(acts.exchange, lab.path("E/A"), other)
    p.dma(b"<DMA>")
    lab.bytes_equal(lab.read(other), b"<DMA>" + OLD[5:], "the file, now called C")
    lab.equal(lab.busy(), 0, "busy blocks")
    lab.equal([pin["path"].rpartition("/")[2] for pin in lab.pins()], ["C"], "the path that daxfs pins shows")
    p.unpin()


@story(
    "tmpfile",
    "a file without a name, pinned, and its holder dies",
    source="S33",
    pins="P: an O_TMPFILE file, all of it",
    call="SIGKILL to P",
    sees=everywhere("the blocks are free within 1 s", SAFE),
)
def tmpfile(lab: Lab) -> None:
    free = lab.info()["free"]
    holder = lab.process()
    file = holder.do(open_tmpfile, lab.directory)
    holder.do(acts.write_at, file, 0, OLD)
    held = holder.do(acts.pin, file, 0, 8 * BLOCK, 1 << 19)
    lab.bytes_equal(holder.do(acts.view, held.id), OLD, "P's blocks")
    holder.send_signal(signal.SIGKILL)
    eventually("the blocks are free", lambda: lab.info()["free"] >= free and lab.busy() == 0, 1.0)


def open_tmpfile(directory: str) -> int:
    """open(2) with O_TMPFILE."""
    from daxfs import client

    file = client.File(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    acts._files[file.fileno()] = file
    return file.fileno()
