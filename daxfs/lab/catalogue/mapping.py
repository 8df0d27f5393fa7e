"""A page of the kernel between a mapping and its block: whose bytes survive when the device and a program write both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from daxfs.lab import acts
from daxfs.lab.course import BREAKS, kept, meet, truncate
from daxfs.lab.processes import Pending, Process, eventually
from daxfs.lab.scenario import BLOCK, EVERY, SAFE, Held, Holder, Lab, everywhere, pattern, story

GLISSE = "Glisse and Kara, December 2018: on DAX page and block are one"
KARA = "Kara, October 2017"
PIGGIN = "Piggin and KOSAKI, April 2009: what fork does to pinned pages"
WAITING = ("wait", "lease")
SEEN_S = 20.0  # for what nobody asks for
AT, DEVICE, PROGRAM = 100, b"DMA!", b"\x02"


class Mapper:
    """A process with a mapping of A."""

    def __init__(self, lab: Lab, path: str, who: Holder | None = None) -> None:
        self.holder = who or lab.holder(path)
        self.do = self.holder.do
        self.mapping = self.do(acts.map_file, self.holder.file, 8 * BLOCK)

    def load(self, offset: int, length: int) -> bytes:
        return self.do(acts.load, self.mapping, offset, length)

    def store(self, offset: int, data: bytes) -> None:
        self.do(acts.store, self.mapping, offset, data)

    def msync(self) -> None:
        self.do(acts.msync, self.mapping)


def _msync(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    mapper.msync()


def _read(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    lab.process().do(acts.read, path)


def _write(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    lab.process().do(acts.write, path, 3000, b"w")


def _munmap(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    mapper.do(acts.unmap, mapper.mapping)
    mapper.do(acts.close_file, mapper.holder.file)


def _exit(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    mapper.holder.process.kill()
    eventually("the process with the mapping is gone", lambda: mapper.holder.process.gone)


def _background(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    lab.process().do(os.sync)
    eventually("the page is written back", lambda: pin.view()[:1] == PROGRAM, SEEN_S)


def _unpin_dirty(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    pin.unpin(dirty=True)


def _unpin(lab: Lab, path: str, mapper: Mapper, pin: Held) -> None:
    pin.unpin(dirty=False)
    mapper.msync()


TRIGGERS: dict[str, Callable[[Lab, str, Mapper, Held], None]] = {
    "msync": _msync, "read(2) by another process": _read, "write(2) by another process": _write,
    "munmap and close": _munmap, "exit": _exit, "write-back in the background": _background,
    "unpin, dirty": _unpin_dirty, "unpin, then msync": _unpin,
}  # fmt: skip


@story(
    "mapping-and-device",
    "the device and a program write bytes of the same page, the program through mmap(MAP_SHARED)",
    source=GLISSE,
    pins="P: A[0,1), for writing",
    call="Q looks at the page, P's device writes, Q stores; then msync, a read, a write, munmap, exit, write-back, unpin",
    sees=everywhere("both writes are in the block and in the file, whatever makes the kernel write the page back", EVERY),
)
def mapping_and_device(lab: Lab) -> None:
    for n, (words, trigger) in enumerate(TRIGGERS.items()):
        path = lab.file(f"A{n}")
        pin, mapper = lab.holder(path).pin(0, 1, write=True), Mapper(lab, path)
        lab.bytes_equal(mapper.load(0, BLOCK), pattern(f"A{n}", 0), "the page")
        pin.dma(DEVICE, AT)
        mapper.store(0, PROGRAM)
        trigger(lab, path, mapper, pin)
        lab.bytes_equal(lab.read(path)[AT : AT + 4], DEVICE, f"what the device wrote, after {words}")
        lab.bytes_equal(lab.read(path)[:1], PROGRAM, f"what the program stored, after {words}")
        if not pin.released:
            lab.bytes_equal(pin.view()[AT : AT + 4], DEVICE, f"what the device wrote, in its block, after {words}")
            lab.bytes_equal(pin.view()[:1], PROGRAM, f"what the program stored, in the block, after {words}")
            pin.unpin()
        mapper.holder.process.kill()


@story(
    "mapping-before-pin",
    "a page that is dirty when the pin is taken",
    source=GLISSE,
    pins="P: A[0,1), for writing, when Q has stored to it",
    call="Q stores through its mapping, P pins, P's device and Q write; msync",
    sees=everywhere("P sees Q's first bytes at once; all three writes are in the block and in the file", EVERY),
)
def mapping_before_pin(lab: Lab) -> None:
    path = lab.file()
    holder, mapper = lab.holder(path), Mapper(lab, path)
    mapper.store(0, b"MMAP")
    pin = holder.pin(0, 1, write=True)
    lab.bytes_equal(pin.view()[:4], b"MMAP", "what P sees when it has its pin")
    lab.bytes_equal(mapper.load(0, 4), b"MMAP", "what Q sees then")
    pin.dma(DEVICE, AT)
    mapper.store(200, PROGRAM)
    mapper.msync()
    for where, found in (("P's block", pin.view()), ("A", lab.read(path)[:BLOCK])):
        lab.bytes_equal(found[:4], b"MMAP", f"what was stored before the pin, in {where}")
        lab.bytes_equal(found[AT : AT + 4], DEVICE, f"what the device wrote, in {where}")
        lab.bytes_equal(found[200:201], PROGRAM, f"what was stored after the pin, in {where}")
    pin.unpin()


@story(
    "fork-and-exit",
    "a forked child that ends, however it does, takes nothing of its parent's along",
    source=PIGGIN,
    pins="P: A[0,1); P forks children",
    call="_exit, kill -9, exit and an exception in the children, which unwind P's objects; then truncate(A, 0)",
    sees={policy: f"the pin stays; truncate {BREAKS[policy]}" for policy in SAFE},
)
def fork_and_exit(lab: Lab) -> None:
    path = lab.file()
    old = lab.read(path)
    pin = lab.holder(path).pin(0, 1)
    pin.view()
    for how in ("_exit", "kill", "exit", "exception"):
        status = pin.holder.do(acts.fork_and_end, how)
        lab.equal(os.WIFSIGNALED(status), how == "kill", f"killed, the child that ends by {how}")
        lab.equal([one["id"] for one in lab.pins()], [pin.id], f"pins when a child has ended by {how}")
        pin.dma(pattern("A", 0))
        lab.bytes_equal(lab.read(path), old, "A, with what the device has written")
    call, sees = truncate(0), BREAKS[lab.policy]
    changed = meet(lab, path, call, sees, [pin])
    if not pin.released:
        kept(lab, path, old, call.after(old) if changed else old, [pin])
        lab.not_reused(pin)
        pin.unpin()


@story(
    "dead-holder-behind-writeback",
    "the holder is killed while a truncate waits for it, and a page of the file got dirty meanwhile",
    source=f"{KARA}: who waits for a reference must be able to end; Linux holds write-back back meanwhile",
    pins="P: A[0,1); Q, or P itself, has a mapping",
    call="truncate(A, 0); a store through the mapping; kill -9 P",
    sees=everywhere("the truncate returns soon after P has died", WAITING),
)
def dead_holder_behind_writeback(lab: Lab) -> None:
    for n, own in enumerate((False, True)):
        path = lab.file(f"A{n}")
        pin = lab.holder(path).pin(0, 1)
        mapper = Mapper(lab, path, pin.holder if own else None)
        pending = lab.process().start(acts.truncate, path, 0)
        lab.waits(pending)
        mapper.store(3 * BLOCK, b"dirty")
        pin.holder.process.send_signal(signal.SIGKILL)
        lab.returns(pending, 3.0)
        lab.equal(lab.status(path).size, 0, "size")
        eventually("P is gone", lambda: pin.holder.process.gone)  # noqa: B023
        mapper.holder.process.kill()


@story(
    "pin-again-with-dirty-pages",
    "the holder pins again while a truncate waits for it, and has stored to those pages: no deadlock",
    source=f"{KARA}: GUP faults on a page while the truncate waits for another one",
    pins="P: A[6,7); then, with a mapping of its own that is dirty, A[1,2)",
    call="truncate(A, 4 blocks); P stores, pins again, writes by DMA, and lets go of A[6,7)",
    sees=everywhere("the second pin is granted, the truncate returns, what P and its device wrote is there", WAITING),
)
def pin_again_with_dirty_pages(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    mapper = Mapper(lab, path, holder)
    mapper.store(2 * BLOCK, b"before the truncate")
    first = holder.pin(6, 1)
    pending = lab.process().start(acts.truncate, path, 4 * BLOCK)
    lab.waits(pending)
    for block in (1, 2, 6):
        mapper.store(block * BLOCK, b"while it waits")
    second = holder.pin(1, 1)
    second.dma(DEVICE, AT)
    mapper.store(BLOCK + 50, b"again")
    lab.waits(pending)
    first.unpin()
    lab.returns(pending)
    mapper.msync()
    content = lab.read(path)
    lab.equal(len(content), 4 * BLOCK, "size")
    for block in (1, 2):
        lab.bytes_equal(content[block * BLOCK :][:14], b"while it waits", f"what P stored to block {block}")
    lab.bytes_equal(content[BLOCK + 50 :][:5], b"again", "what P stored after it had pinned the block")
    lab.bytes_equal(content[BLOCK + AT :][:4], DEVICE, "what the device wrote")
    eventually("P sees what it stored", lambda: second.view()[:14] == b"while it waits", SEEN_S)
    second.unpin()


@story(
    "direct-read-into-mapping",
    "the kernel holds a page of a mapping for an O_DIRECT read: when the page is dropped meanwhile, the bytes go nowhere",
    source=f"{GLISSE}, and GUP holds a page that is not the block",
    pins="P: A[0,8), for writing, and again and again by another process, which drops the kernel's pages",
    call="read(2) with O_DIRECT of two other files in turn, into Q's mapping of A, and into P's mapping of its pin",
    sees=everywhere("says how many reads lost bytes in the ordinary mapping; none did in the mapping of the pin", EVERY),
)
def direct_read_into_mapping(lab: Lab) -> None:
    path, times = lab.file(), 5000 if lab.full else 1000
    sources = [lab.file(name) for name in ("S0", "S1")]
    holder = lab.holder(path)
    pin, mapper = holder.pin(0, 8, write=True), Mapper(lab, path)
    for into in ("an ordinary mapping of the file", "the mapping of its pin"):
        dropper = lab.holder(path)
        dropping = dropper.start(acts.pin_and_unpin, dropper.file, 0, 8 * BLOCK, times)
        who, mapping = (mapper.holder, mapper.mapping) if into.startswith("an") else (holder, -1)
        lost = lab.returns(who.start(acts.direct_reads, sources, mapping, pin.id, 8 * BLOCK, times), 120)
        _end(dropping, dropper.process)
        lab.say(f"{lost} of {times} direct reads into {into} lost bytes")
    lab.equal(lost, 0, "reads that lost bytes in the mapping of the pin")
    pin.unpin()


def _end(pending: Pending[None], process: Process) -> None:
    """End a process that may still be at it."""
    if not pending.done():
        process.kill()
        eventually("the process is gone", lambda: process.gone)
