"""Policy `wait` (and the waits of `lease`): who waits for whom, what goes on meanwhile, how a wait ends."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from daxfs import abi
from daxfs.lab import acts, naive
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, Lab, everywhere, pattern, story

KARA = "Kara, October 2017"
WAITING = ("wait", "lease")
OLD = b"".join(pattern("A", n) for n in range(8))


@story(
    "naive-wait-deadlock",
    "a model: waiting under the lock that keeps faults out deadlocks, waiting without it does not",
    source=f"S11; {KARA}",
    pins="GUP takes page A, then faults on B",
    call="punch of A and B",
    sees={"wait": "the naive wait ends in a deadlock, which is shown; daxfs's has none in any interleaving"},
)
def naive_wait_deadlock(lab: Lab) -> None:
    states, way = naive.explore(naive.DESIGNS["naive"])
    lab.see(way, "the naive wait did not deadlock")
    for line in [*(way or []), "punch waits for GUP's reference, GUP waits for punch's lock: for ever"]:
        lab.say(f"naive: {line}")
    states, way = naive.explore(naive.DESIGNS["daxfs"])
    lab.see(way is None, f"daxfs's wait deadlocks: {way}")
    lab.say(f"daxfs: no deadlock in any of {states} states")


@story(
    "wait-holder-pins-again",
    "the holder pins a second block while the truncate waits for the first one: no deadlock",
    source=f"S11; {KARA}",
    pins="P: A[0,1), then A[1,2)",
    call="truncate(A, 0)",
    sees=everywhere("P's second pin is granted; the truncate waits for both", WAITING),
)
def wait_holder_pins_again(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    first = holder.pin(0, 1)
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    second = holder.pin(1, 1)
    other_descriptor = holder.do(acts.open_file, path)
    third = holder.do(acts.pin, other_descriptor, 2 * BLOCK, BLOCK, abi.FOLL_PIN)  # the same process
    first.unpin()
    lab.waits(pending)
    second.unpin()
    lab.waits(pending)
    holder.do(acts.unpin, third.id)
    lab.returns(pending)


@story(
    "wait-holds-back-new-pins",
    "a truncate cannot starve: pins of its range that come later wait behind it",
    source=f"S11; {KARA}",
    pins="P: A[0,1); then Q: A[0,1), A[1,2)",
    call="punch(A, [0,1))",
    sees=everywhere(
        "Q's pin of the range waits (NOWAIT: EAGAIN), its pin of another range is granted; P lets go: the punch "
        "returns, and Q gets a new block",
        WAITING,
    ),
)
def wait_holds_back_new_pins(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 1)
    pending = lab.process().start(acts.punch, path, 0, BLOCK)
    lab.waits(pending)
    q = lab.holder(path)
    with lab.refused(errno.EAGAIN):
        q.pin(0, 1, flags=abi.FOLL_PIN | abi.PIN_NOWAIT)
    beside = q.pin(1, 1)
    late = q.start_pin(0)
    lab.waits(late)
    p.unpin()
    lab.returns(pending)
    got = lab.returns(late)
    lab.bytes_equal(q.do(acts.view, got.id), bytes(BLOCK), "the block that Q gets")
    lab.equal({start for start, _ in got.runs} & p.blocks, set(), "P's old block in Q's pin")
    beside.unpin()


@story(
    "wait-leaves-others-alone",
    "while one waits, everybody else goes on",
    source="oracle: in Linux read, write and chmod of the file block",
    pins="P: A[0,1)",
    call="truncate(A, 0); meanwhile stat, read, open, pin and store by P, create, rename, truncate of another file",
    sees=everywhere("all of them return at once", WAITING),
)
def wait_leaves_others_alone(lab: Lab) -> None:
    path, other = lab.file(), lab.file("C")
    p = lab.holder(path).pin(0, 1)
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    someone = lab.process()
    lab.bytes_equal(someone.do(acts.read, path), OLD, "A")
    p.dma(b"still mine")
    lab.bytes_equal(someone.do(acts.read, path)[:10], b"still mine", "A after P has written")
    someone.do(acts.truncate, other, BLOCK)
    someone.do(acts.punch, other, 0, BLOCK)
    someone.do(os.rename, other, lab.path("D"))
    someone.do(acts.create, other, b"new")
    someone.do(os.unlink, other)
    lab.waits(pending)
    p.unpin()
    lab.returns(pending)


@story(
    "wait-queue",
    "two truncates and a write of one file queue up behind a pin and all get their turn",
    source="S12",
    pins="P: A[0,8)",
    call="truncate(A, 4 blocks), truncate(A, 2 blocks), write(A, at 0)",
    sees=everywhere("all return after the unpin; the size is one that some order gives", WAITING),
)
def wait_queue(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    cuts = []
    for size in (4, 2):
        cuts.append(lab.process().start(acts.truncate, path, size * BLOCK))
        lab.waits(cuts[-1])
    write = lab.process().start(acts.write, path, 0, b"written")
    p.unpin()
    for pending in (*cuts, write):
        lab.returns(pending)
    content = lab.read(path)
    lab.see(len(content) in (2 * BLOCK, 4 * BLOCK), f"A has {len(content)} bytes")
    lab.bytes_equal(content[:7], b"written", "A")


@story(
    "waiter-killed",
    "SIGKILL ends a waiting truncate at once",
    source="S13",
    pins="P: A[0,1)",
    call="truncate(A, 0), killed while it waits",
    sees=everywhere("the process is gone within 1 s, A is unchanged, nobody waits any more", WAITING),
)
def waiter_killed(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    caller = lab.process()
    lab.waits(caller.start(acts.truncate, path, 0))
    caller.kill()
    eventually("the killed process is gone", lambda: caller.gone, 1.0)
    lab.bytes_equal(lab.read(path), OLD, "A")
    lab.returns(lab.holder(path).start_pin(0))  # nothing holds pins back any more
    p.unpin()
    lab.bytes_equal(lab.read(path), OLD, "A after the unpin")


@story(
    "waiter-interrupted",
    "a signal with a handler ends a waiting truncate or punch with EINTR",
    source="S13",
    pins="P: A[0,1)",
    call="truncate(A, 0), punch(A, [0,1)), open(A, O_TRUNC); SIGUSR1 while each waits",
    sees=everywhere("EINTR, A is unchanged", WAITING),
)
def waiter_interrupted(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    caller = lab.process()
    caller.do(acts.handle_signal, int(signal.SIGUSR1))
    calls: list[tuple[Callable[..., None], tuple[object, ...]]] = [
        (acts.truncate, (path, 0)), (acts.punch, (path, 0, BLOCK)), (acts.open_truncating, (path,))
    ]  # fmt: skip
    for function, arguments in calls:
        pending = caller.start(function, *arguments)
        lab.waits(pending)
        caller.send_signal(signal.SIGUSR1)
        lab.fails(errno.EINTR, pending, 1.0)
        lab.bytes_equal(lab.read(path), OLD, "A")
    p.unpin()


@story(
    "wait-policy-changes",
    "another policy while a change waits (one by ioctl; in a truncate(2) the kernel has the file's lock): it counts at once",
    source="D6.3",
    pins="P: A[0,1)",
    call="ioctl CHANGE: truncate to 0; then set the file's policy to fail, or to busy",
    sees=everywhere("ETXTBSY, A unchanged; with busy it returns, 1 busy", WAITING),
)
def wait_policy_changes(lab: Lab) -> None:
    path = lab.file()
    p, other = lab.holder(path).pin(0, 1), lab.holder(path)
    for name in ("fail", "busy"):
        pending = other.start(acts.change, other.file, abi.CHANGE_TRUNCATE, 0, 0, 0)
        lab.waits(pending)
        lab.clerk.do(os.setxattr, path, "user.daxfs.policy", name.encode())
        if name == "fail":
            lab.fails(errno.ETXTBSY, pending)
            lab.bytes_equal(lab.read(path), OLD, "A")
            lab.clerk.do(os.setxattr, path, "user.daxfs.policy", lab.policy.encode())
        else:
            lab.returns(pending)
            lab.equal(lab.busy(), 1, "busy blocks")
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    p.unpin()


@story(
    "wait-limit",
    "wait_s: a limit for those who cannot wait for ever",
    source="D6.3",
    pins="P: A[0,1)",
    call="truncate(A, 0)",
    options={"wait_s": "1"},
    sees={"wait": "EBUSY after 1 s, A is unchanged"},
)
def wait_limit(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    started = time.monotonic()
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    lab.fails(errno.EBUSY, pending)
    lab.see(time.monotonic() - started >= 1, "the limit is 1 s")
    lab.bytes_equal(lab.read(path), OLD, "A")
    p.unpin()


@story(
    "wait-and-directory-lock",
    "what daxfs cannot help: Linux holds the file's lock while truncate(2) waits, an unlink of the file waits for that with "
    "the directory's lock, and the holder for this; only wait_s ends it",
    source=f"S11; {KARA}; Linux on ext4 and XFS as well",
    pins="P: A[0,1); then P makes a file in the same directory",
    call="truncate(A, 0), unlink(A)",
    sees={"wait": "the unlink and P queue up behind the truncate; EBUSY after 1 s, and all of them go on"},
    options={"wait_s": "1"},
)
def wait_and_directory_lock(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    cut = lab.process().start(acts.truncate, path, 0)
    lab.waits(cut)
    unlink = lab.process().start(os.unlink, path)
    lab.waits(unlink)
    create = p.holder.start(acts.create, lab.path("new"), b"x")
    lab.waits(create)
    lab.fails(errno.EBUSY, cut)
    lab.returns(unlink)
    lab.returns(create)
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    p.unpin()


@story(
    "waiting-is-idle",
    "a wait costs nothing: the daemon sleeps, also after it was woken in vain",
    source="D3, rule 2",
    pins="P: A[0,1) twice",
    call="truncate(A, 0); P gives one of the two pins back",
    sees=everywhere("the truncate goes on waiting; the daemon uses no CPU time meanwhile", WAITING),
)
def waiting_is_idle(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    first, second = holder.pin(), holder.pin()
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    first.unpin()
    lab.waits(pending)
    before = cpu_s(lab.place.daemon)
    pending.done(0.5)
    used = cpu_s(lab.place.daemon) - before
    lab.see(used < 0.1, f"the daemon used {used:.2f} s of CPU time in 0.5 s of waiting")
    second.unpin()
    lab.returns(pending)


def cpu_s(pid: int) -> float:
    """CPU time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@story(
    "many-waiters",
    "more callers wait than the daemon has workers, and the mount goes on serving",
    source="D8.13",
    pins="P: one block of each of 500 files",
    call="500 processes truncate one each",
    sees={"wait": "all wait; others are served at once; P lets go, all return"},
)
def many_waiters(lab: Lab) -> None:
    count = 500
    holder = lab.process()
    paths = [lab.file(f"A{n}", blocks=1) for n in range(count)]
    files = [holder.do(acts.open_file, path) for path in paths]
    for file in files:
        holder.do(acts.pin, file, 0, BLOCK, abi.FOLL_PIN)
    pending = [lab.process().start(acts.truncate, path, 0) for path in paths]
    lab.waits(pending[-1])
    lab.see(not any(one.done() for one in pending), "some truncate did not wait")
    someone = lab.process()
    for n in range(20):
        started = time.monotonic()
        someone.do(acts.create, lab.path(f"other{n}"), b"x" * BLOCK)
        lab.see(time.monotonic() - started < 1, "the mount is slow while many wait")
    for file in files:
        holder.do(acts.close_file, file)
    for one in pending:
        lab.returns(one)


@story(
    "request-timeout",
    "a wait longer than the kernel's FUSE request time-out does not cost the mount its connection",
    source="S14",
    pins="P: A[0,1)",
    call="truncate(A, 0), for longer than fs.fuse.default_request_timeout",
    sees={"wait": "the mount still answers"},
)
def request_timeout(lab: Lab) -> None:
    setting = Path("/proc/sys/fs/fuse/default_request_timeout")
    seconds = int(setting.read_text()) if setting.exists() else 0
    lab.needs(seconds, "this kernel's FUSE requests have no time-out (fs.fuse.default_request_timeout is 0 or missing)")
    lab.needs(seconds <= 60, f"fs.fuse.default_request_timeout is {seconds} s: too long to wait for")
    path = lab.file()
    p = lab.holder(path).pin()
    pending = lab.process().start(acts.truncate, path, 0)
    pending.done(seconds * 1.5 + 2)
    lab.bytes_equal(p.view(), pattern("A", 0), "P's block")
    lab.identity()
    p.unpin()
