"""Who holds: how a pin ends with its description, what PIN refuses, what the lists show, and holders that misbehave."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from daxfs import abi, client
from daxfs.lab import acts
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, Held, Holder, Lab, pattern, story

WEINY = "Hubbard and Weiny, August 2019"
LAST = "the pin is released within 1 s"


def gone(lab: Lab) -> None:
    eventually("the pin is released", lambda: not lab.pins(), 1.0)


@story(
    "holder-dies",
    "however a holder ends, its pins end with it",
    source="S53",
    pins="P: A[0,8)",
    call="exit(0), SIGKILL or SIGSEGV of P",
    sees=LAST,
)
def holder_dies(lab: Lab) -> None:
    path = lab.file()
    for function in (acts.leave, acts.crash, None):
        p = lab.holder(path).pin(0, 8)
        if function:
            p.holder.start(function)
        else:
            p.holder.process.kill()
        gone(lab)


@story(
    "holder-stopped",
    "a stopped holder keeps its pin, is listed, and slows nobody down",
    source="S53; issue 9",
    pins="P: A[0,1), then SIGSTOP",
    call="pins, create and write of others; SIGCONT",
    sees="listed under P; others go on; the pin is intact afterwards",
)
def holder_stopped(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    p.holder.process.send_signal(signal.SIGSTOP)
    lab.equal([pin["pid"] for pin in lab.pins()], [p.holder.process.pid], "processes that hold pins")
    started = time.monotonic()
    other = lab.file("C")
    lab.process().do(acts.write, other, 0, b"x" * BLOCK)
    lab.see(time.monotonic() - started < 2, "others are slow")
    p.holder.process.send_signal(signal.SIGCONT)
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    p.unpin()


@story(
    "pin-passed-on",
    "a descriptor with a pin is passed to another process, and the first one dies",
    source=f"S54; {WEINY}: what sank the series of 2019",
    pins="P: A[0,1), by descriptor to Q",
    call="SIGKILL to P, then to Q",
    sees="the pin lives on, listed under Q; then it is released",
)
def pin_passed_on(lab: Lab) -> None:
    path = lab.file()
    p, q = lab.holder(path), lab.process()
    held = p.pin()
    address = f"\0daxfs-lab-{os.getpid()}-{time.monotonic_ns()}".encode()
    taking = q.start(acts.receive_file, address)
    p.do(acts.send_file, p.file, address)
    fd = lab.returns(taking)
    p.process.kill()
    eventually("P is gone", lambda: p.process.gone)
    eventually("the pin is listed under Q", lambda: [pin["pid"] for pin in lab.pins()] == [q.pid])
    lab.equal([pin["id"] for pin in lab.pins()], [held.id], "pins")
    lab.bytes_equal(q.do(acts.read_at, fd, 0, BLOCK), pattern("A", 0), "A through Q's descriptor")
    q.kill()
    gone(lab)


@story(
    "pin-and-fork",
    "fork shares the pin: it goes with the last copy of the description",
    source="S55",
    pins="P: A[0,1); P forks C",
    call="SIGKILL to P, then to C",
    sees="P's death does not release it, C's does",
)
def pin_and_fork(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    child = lab.adopt(p.holder.do(acts.fork_sleeper))
    p.holder.process.kill()
    eventually("P is gone", lambda: p.holder.process.gone)
    eventually("the pin is listed under the child", lambda: [pin["pid"] for pin in lab.pins()] == [child.pid])
    child.kill()
    gone(lab)


@story(
    "pin-and-fork-child",
    "a child that ends does not take its parent's pin along",
    source="S55",
    pins="P: A[0,1); P forks C",
    call="SIGKILL to C",
    sees="the pin stays",
)
def pin_and_fork_child(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    child = lab.adopt(p.holder.do(acts.fork_sleeper))
    child.kill()
    eventually("the child is gone", lambda: child.gone)
    lab.equal([pin["id"] for pin in lab.pins()], [p.id], "pins")
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    p.unpin()


@story(
    "pin-and-exec",
    "exec closes a descriptor with CLOEXEC and its pin, and keeps one without",
    source="S56",
    pins="P, Q: A[0,1)",
    call="exec of P with CLOEXEC, of Q without",
    sees="P's pin is released, Q's stays",
)
def pin_and_exec(lab: Lab) -> None:
    path = lab.file()
    for keep in (False, True):
        p = lab.holder(path).pin()
        p.holder.start(acts.become_sleeper, p.holder.file, keep)
        if keep:
            comm = Path(f"/proc/{p.holder.process.pid}/comm")
            eventually("exec has happened", lambda: comm.read_text() == "sleep\n")  # noqa: B023
            lab.equal([pin["id"] for pin in lab.pins()], [p.id], "pins after the exec")
            p.holder.process.kill()
        gone(lab)


@story(
    "pin-and-dup",
    "munmap or the close of one of two descriptors leaves the pin; the last close releases it",
    source="S57",
    pins="P: A[0,1), mapped; dup",
    call="close(first), close(second)",
    sees="released by the second close",
)
def pin_and_dup(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    copy = p.holder.do(acts.duplicate, p.holder.file)
    p.holder.do(acts.close_without_unpin, p.holder.file)
    lab.equal([pin["id"] for pin in lab.pins()], [p.id], "pins after the first close")
    p.holder.do(acts.close_descriptor, copy)
    gone(lab)


@story(
    "pin-refused",
    "what PIN refuses, and with which errno",
    source="S58",
    pins="P, with wrong wishes",
    call="PIN",
    sees="EACCES, ENXIO, EFAULT, EINVAL, EISDIR; nothing is pinned",
)
def pin_refused(lab: Lab) -> None:
    path, hole = lab.file(), lab.file("hole", blocks=0)
    lab.clerk.do(acts.truncate, hole, 4 * BLOCK)
    reader, holder, holes = lab.holder(path, "r"), lab.holder(path), lab.holder(hole)
    wishes: list[tuple[int, Holder, int, int, int]] = [
        (errno.EACCES, reader, 0, BLOCK, abi.FOLL_PIN | abi.FOLL_WRITE),
        (errno.ENXIO, holder, 8 * BLOCK, BLOCK, abi.FOLL_PIN),
        (errno.ENXIO, holder, 7 * BLOCK, 2 * BLOCK, abi.FOLL_PIN),
        (errno.ENXIO, holder, (1 << 63) - BLOCK, BLOCK, abi.FOLL_PIN),
        (errno.EFAULT, holes, 0, BLOCK, abi.FOLL_PIN),
        (errno.EINVAL, holder, 1, BLOCK, abi.FOLL_PIN),
        (errno.EINVAL, holder, 0, BLOCK - 1, abi.FOLL_PIN),
        (errno.EINVAL, holder, 0, 0, abi.FOLL_PIN),
        (errno.EINVAL, holder, 0, BLOCK, 0),
        (errno.EINVAL, holder, 0, BLOCK, abi.FOLL_PIN | abi.FOLL_GET),
        (errno.EINVAL, holder, 0, BLOCK, abi.FOLL_GET | abi.FOLL_LONGTERM),
        (errno.EINVAL, holder, 0, BLOCK, abi.FOLL_PIN | abi.PIN_ON_DEMAND),
        (errno.EINVAL, holder, 0, BLOCK, abi.FOLL_PIN | 1 << 25),
    ]
    for code, who, offset, length, flags in wishes:
        lab.refuses(code, who, acts.pin, who.file, offset, length, flags)
    lab.equal(lab.pins(), [], "pins")
    directory = lab.process()
    fd = directory.do(acts.open_file, lab.directory, "r")
    lab.refuses(errno.EISDIR, directory, acts.pin, fd, 0, BLOCK, abi.FOLL_PIN)


@story(
    "pin-of-a-hole",
    "a write pin of a hole allocates, as a write fault would",
    source="S58",
    pins="P: hole[0,4), to write",
    call="PIN, then DMA",
    sees="zeroed blocks; the file has what the device writes",
)
def pin_of_a_hole(lab: Lab) -> None:
    path = lab.file("A", blocks=0)
    lab.clerk.do(acts.truncate, path, 4 * BLOCK)
    p = lab.holder(path).pin(0, 4)
    lab.bytes_equal(p.view(), bytes(4 * BLOCK), "P's blocks")
    p.dma(b"<DMA>", 2 * BLOCK)
    lab.bytes_equal(lab.read(path)[2 * BLOCK :][:5], b"<DMA>", "A")
    p.unpin()


@story(
    "foll-get",
    "FOLL_GET is a reference, no access to the data: nobody waits for it",
    source=f"D6.2; {WEINY}",
    pins="P: A[0,1), FOLL_GET",
    call="truncate(A, 0)",
    sees="returns at once; nothing busy",
)
def foll_get(lab: Lab) -> None:
    path = lab.file()
    lab.holder(path).pin(flags=abi.FOLL_GET)
    lab.equal([pin["flags"] for pin in lab.pins()], ["FOLL_GET"], "flags of the pins")
    lab.returns(lab.process().start(acts.truncate, path, 0))
    eventually("nothing is busy", lambda: lab.busy() == 0)


@story(
    "dirty-on-unpin",
    "unpin says whether the device wrote, and the file's times move then (O2)",
    source="Glisse and Kara, December 2018",
    pins="P: A[0,1), twice",
    call="UNPIN clean, UNPIN dirty, UNPIN dirty after unlink",
    sees="mtime moves at the second only; the third is no error",
)
def dirty_on_unpin(lab: Lab) -> None:
    path = lab.file()
    times = [lab.clerk.do(os.stat, path).st_mtime_ns]
    holder = lab.holder(path)
    for dirty in (False, True):
        holder.pin().unpin(dirty=dirty)
        times.append(lab.clerk.do(os.stat, path).st_mtime_ns)
    lab.equal([times[0] == times[1], times[1] < times[2]], [True, True], "mtime stays, then moves")
    last = holder.pin()
    lab.clerk.do(os.unlink, path)
    last.unpin(dirty=True)


@story(
    "pins-are-listed",
    "the lists name process, file, range, age and what is withheld",
    source="S62; Weiny, August 2019",
    pins="P: A[1,3), A is unlinked; Q: C[0,1)",
    call="daxfs pins, daxfs busy",
    sees="pid, comm, inode, path or (deleted), range, runs, age",
)
def pins_are_listed(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p, q = lab.holder(path).pin(1, 2), lab.holder(other, "r").pin()
    ino = lab.clerk.do(os.stat, path).st_ino
    found = {pin["id"]: pin for pin in lab.pins()}
    _listed(lab, found[p.id], p, ino, path)
    _listed(lab, found[q.id], q, lab.clerk.do(os.stat, other).st_ino, other)
    lab.clerk.do(os.unlink, path)
    mine = next(pin for pin in lab.clerk.do(client.pins, lab.place.path) if pin["id"] == p.id)
    lab.see("deleted" in mine["path"], f"the path of an unlinked file is shown as {mine['path']}")
    p.unpin()
    p.holder.do(acts.close_file, p.holder.file)


def _listed(lab: Lab, shown: dict[str, Any], pin: Held, ino: int, path: str) -> None:
    lab.equal(
        [shown["pid"], shown["ino"], shown["offset"], shown["length"], [tuple(run) for run in shown["runs"]]],
        [pin.holder.process.pid, ino, pin.first * BLOCK, pin.count * BLOCK, list(pin.runs)],
        "pid, inode, offset, length and runs",
    )
    lab.see(path.endswith(shown["path"].rpartition("/")[2]), f"path {shown['path']} instead of {path}")
    lab.see(shown["comm"] and 0 <= shown["age_s"] < 60, f"comm {shown['comm']!r}, age {shown['age_s']}")


@story(
    "wrong-calls",
    "a holder that asks for nonsense gets an errno each, and the mount goes on",
    source="issue 9",
    pins="P: A[0,1)",
    call="ioctls of wrong size and number, foreign and old ids, reserved fields, pins at 2^64-1",
    sees="ENOTTY, EINVAL, ENOENT",
)
def wrong_calls(lab: Lab) -> None:
    path = lab.file()
    p, q = lab.holder(path).pin(), lab.holder(path)
    most = (1 << 64) - 1
    calls: list[tuple[int, int, bytes]] = [
        (errno.ENOTTY, abi._iowr(99, 16), bytes(16)),
        (errno.ENOTTY, abi._iowr(1, abi.PIN.size - 8), bytes(abi.PIN.size - 8)),
        (errno.ENOTTY, abi._iowr(2, abi.UNPIN.size + 8), bytes(abi.UNPIN.size + 8)),
        (errno.EINVAL, abi.IOC_PIN, abi.PIN.pack(most, BLOCK, abi.FOLL_PIN, 0, 0, 0, 0)),
        (errno.EINVAL, abi.IOC_PIN, abi.PIN.pack(0, most, abi.FOLL_PIN, 0, 0, 0, 0)),
        (errno.ENXIO, abi.IOC_PIN, abi.PIN.pack(most - BLOCK + 1, BLOCK, abi.FOLL_PIN, 0, 0, 0, 0)),
        (errno.ENXIO, abi.IOC_PIN, abi.PIN.pack(0, most - BLOCK + 1, abi.FOLL_PIN, 0, 0, 0, 0)),
        (errno.EINVAL, abi.IOC_PIN, abi.PIN.pack(0, BLOCK, abi.FOLL_PIN, 1, 0, 0, 0)),
        (errno.ENOENT, abi.IOC_UNPIN, abi.UNPIN.pack(p.id, 0, 0)),
        (errno.ENOENT, abi.IOC_UNPIN, abi.UNPIN.pack(most, 0, 0)),
        (errno.EINVAL, abi.IOC_UNPIN, abi.UNPIN.pack(p.id, 1 << 31, 0)),
        (errno.ENOENT, abi.IOC_PIN_RUNS, abi.PAGE.pack(p.id, 0, 0, 0).ljust(abi.PAGE_BYTES, b"\0")),
        (errno.ENOENT, abi.IOC_ACK, abi.ACK.pack(p.id, 0)),
        (errno.EINVAL, abi.IOC_LEASE, abi.LEASE.pack(0, 0, 77, 0)),
        (errno.ENOENT, abi.IOC_LEASE, abi.LEASE.pack(0, 0, abi.LEASE_RELEASE, 0)),
        (errno.EAGAIN, abi.IOC_NEXT_EVENT, bytes(abi.EVENT.size)),
        (errno.EINVAL, abi.IOC_REPORT, abi.PAGE.pack(4711, 0, 0, 0).ljust(abi.PAGE_BYTES, b"\0")),
        (errno.EINVAL, abi.IOC_CHANGE, abi.CHANGE.pack(0, 0, 77, 0)),
    ]
    for code, number, argument in calls:
        lab.refuses(code, q, acts.ioctl, q.file, number, argument)
    lab.refuses(errno.EINVAL, p.holder, acts.ioctl, p.holder.file, abi.IOC_ACK, abi.ACK.pack(p.id, 0))
    lab.equal([pin["id"] for pin in lab.pins()], [p.id], "pins")
    p.unpin()
    lab.refuses(errno.ENOENT, p.holder, acts.unpin_any, p.holder.file, p.id)


@story(
    "many-pins",
    "a holder takes two thousand tiny pins and dies: others are not slowed down, all is released",
    source="issue 9",
    pins="P: A[0,1), 2,000 times",
    call="SIGKILL to P",
    sees="others go on; all pins are released",
)
def many_pins(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    taking = holder.start(pin_again, holder.file, 2_000)
    someone, slowest = lab.process(), 0.0
    while not taking.done(0.05):
        started = time.monotonic()
        someone.do(acts.write, lab.file(f"C{time.monotonic_ns()}", blocks=1), 0, b"x")
        slowest = max(slowest, time.monotonic() - started)
    lab.returns(taking)
    lab.see(slowest < 1, f"a write beside it took {slowest:.1f} s")
    lab.equal(lab.info()["pinned"], 1, "pinned blocks")
    holder.process.kill()
    eventually("the pins are released", lambda: lab.info()["pinned"] == 0)


def pin_again(file: int, count: int) -> None:
    """Take a pin so many times; none is given back."""
    argument = abi.PIN.pack(0, BLOCK, abi.FOLL_PIN, 0, 0, 0, 0)
    for _ in range(count):
        acts.ioctl(file, abi.IOC_PIN, argument)


@story(
    "pins-max",
    "a limit of pinned and busy blocks: further pins are refused, truncates still work",
    source="S48; RLIMIT_MEMLOCK",
    pins="P: A[0,8), then C[0,1); busy ones count too",
    call="PIN; truncate(A, 0)",
    sees={"busy": "ENOMEM at the limit, also when the blocks are busy; the truncate works"},
    options={"pins_max": "8"},
)
def pins_max(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p = lab.holder(path).pin(0, 8)
    file = p.holder.do(acts.open_file, other)
    lab.refuses(errno.ENOMEM, p.holder, acts.pin, file, 0, BLOCK, abi.FOLL_PIN)
    lab.returns(lab.process().start(acts.truncate, path, 0))
    lab.refuses(errno.ENOMEM, p.holder, acts.pin, file, 0, BLOCK, abi.FOLL_PIN)
    lab.holder(other).pin().unpin()  # another process has a limit of its own
    p.unpin()
    p.holder.do(acts.pin, file, 0, BLOCK, abi.FOLL_PIN)
