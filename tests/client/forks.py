"""A parent that has things of the client library, and a child with copies of them that ends in one of the ways there are.

    python -m tests.client.forks DIRECTORY ENDING KIND...     a JSON object: what was wrong with each kind, "" for nothing

The parent asks the daemon before the child ends, after that, and when it has closed its things itself. The directory is an
empty one of a mount.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NoReturn

import trio

from daxfs import client, gup, kernel, verbs
from daxfs.client import aio
from daxfs.client.closing import Closing
from tests.mount.harness import REPOSITORY, eventually

BLOCK = 4096
SIZE = 4 * BLOCK
ALL = verbs.IBV_ACCESS_LOCAL_WRITE | verbs.IBV_ACCESS_REMOTE_WRITE | verbs.IBV_ACCESS_REMOTE_READ


def refusal(call: Callable[[], object]) -> str:
    """What a call says that is refused."""
    try:
        call()
    except client.PinError as problem:
        return str(problem)
    raise AssertionError(f"not refused: {call}")


class Kind:
    """Things on one file. A kind says how they are made, what the daemon counts (`counted`, with `there` of them), and how
    one sees that they work, in the parent and in a child that has not closed anything."""

    there = 1

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / type(self).__name__
        self.path.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(SIZE // BLOCK)))
        self.rounds = 0
        self.stack = ExitStack()

    def make(self, stack: ExitStack) -> None:
        raise NotImplementedError

    def counted(self) -> int:
        """Pins and registrations of the file."""
        return sum(pin["path"].startswith(str(self.path)) for pin in client.pins(self.directory))

    def works(self) -> None:
        raise NotImplementedError

    def works_in_child(self) -> None:
        self.works()

    def refused(self) -> list[Callable[[], object]]:
        """Calls that say in a child that things are closed there."""
        return []

    def check(self) -> None:
        assert self.counted() == self.there, f"the daemon has {self.counted()} of {self.there}"
        self.rounds += 1
        self.works()

    def close(self) -> None:
        """Close everything, the newest first."""
        for thing in reversed(self.things()):
            thing.close()

    def things(self) -> list[Closing]:
        return [value for value in vars(self).values() if isinstance(value, Closing)]

    def descriptors(self) -> list[int]:
        found = [thing.fileno() for thing in self.things() if hasattr(thing, "fileno")]
        return found + [thing._file for thing in self.things() if isinstance(thing, verbs.MR)]


class Mapped(Kind):
    """Kinds with a `pin` to map."""

    pin: client.Pin

    def works(self) -> None:
        view = self.pin.map()
        view[8:16] = b"DMA %4d" % self.rounds
        with open(self.path, "rb") as file:
            assert file.read(17) == b"A" * 8 + view[8:16] + b"A"
        self.pin.label(f"round {self.rounds}")
        assert sum(count for _, count in self.pin.runs) * BLOCK == SIZE

    def refused(self) -> list[Callable[[], object]]:
        return [self.pin.map]


class Pin(Mapped):
    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        self.pin = stack.enter_context(self.file.pin(write=True))

    def refused(self) -> list[Callable[[], object]]:
        return [self.pin.map, self.file.info]


class OnDemand(Mapped):
    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        self.pin = stack.enter_context(self.file.register(write=True))

    def works(self) -> None:
        super().works()
        assert ("nothing to acknowledge" if self.pin.mine else "was made by process") in refusal(self.pin.acknowledge)


class Lease(Kind):
    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        self.lease = stack.enter_context(self.file.lease())

    def counted(self) -> int:
        return min(1, client.status(self.directory)["leases"])

    def works(self) -> None:
        assert self.lease.held
        assert self.file.next_event() is None

    def works_in_child(self) -> None:
        with self.file.lease(0, BLOCK):  # goes together with the parent's, not before it
            pass
        self.works()

    def refused(self) -> list[Callable[[], object]]:
        return [self.file.info]


class Pages(Kind):
    """get_user_pages and pin_user_pages, a mapping of pages."""

    there = 3

    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        vma = stack.enter_context(gup.mmap(self.file, SIZE))
        self.pinned: list[gup.Page] = []
        self.taken: list[gup.Page] = []
        assert gup.pin_user_pages(vma.vm_start, 2, gup.FOLL_WRITE, self.pinned) == 2
        stack.callback(gup.unpin_user_pages_dirty_lock, self.pinned, 2, True)
        assert gup.get_user_pages(vma.vm_start, 1, 0, self.taken) == 1
        stack.callback(gup.put_page, self.taken[0])
        self.view = stack.enter_context(gup.vmap(self.pinned))

    def works(self) -> None:
        self.view[8:16] = b"DMA %4d" % self.rounds
        with open(self.path, "rb") as file:
            assert file.read(17) == b"A" * 8 + self.view[8:16] + b"A"
        assert [(page.pincount, page.refcount) for page in self.pinned] == [(1, 3), (1, 2)]

    def close(self) -> None:
        gup.put_page(self.taken[0])
        gup.unpin_user_pages(self.pinned, 2)

    def refused(self) -> list[Callable[[], object]]:
        return [lambda: self.pinned[0].block + self.pinned[0].pincount, partial(gup.unpin_user_page, self.pinned[0])]


class Region(Kind):
    """A memory region of a path: it has a descriptor of its own."""

    access = ALL

    def file_of(self, stack: ExitStack) -> client.File | Path:
        return self.path

    def make(self, stack: ExitStack) -> None:
        file = self.file_of(stack)
        self.context = stack.enter_context(verbs.Context(self.directory))
        self.pd = stack.enter_context(verbs.PD(self.context))
        self.mr = stack.enter_context(verbs.MR(self.pd, SIZE, self.access, file=file))

    def works(self) -> None:
        said = b"MR %5d" % self.rounds
        self.mr.write(said, offset=8)
        assert self.mr.read(17) == b"A" * 8 + said + b"A"
        with open(self.path, "rb") as file:
            assert file.read(17) == b"A" * 8 + said + b"A"
        assert client.status(self.directory)["hca"]["regions"] == 1

    def refused(self) -> list[Callable[[], object]]:
        return [partial(self.mr.read, 1)]


class RegionOfFile(Region):
    def file_of(self, stack: ExitStack) -> client.File:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        return self.file


class RegionOnDemand(Region):
    access = ALL | verbs.IBV_ACCESS_ON_DEMAND


class Pair(Region):
    """A queue pair that is connected to itself, with its completion queue."""

    def make(self, stack: ExitStack) -> None:
        super().make(stack)
        self.cq = stack.enter_context(verbs.CQ(self.context, 16))
        self.qp = stack.enter_context(verbs.QP(self.pd, verbs.QPInitAttr(scq=self.cq, rcq=self.cq)))
        self.qp.connect(self.qp.qp_num)

    def works(self) -> None:
        super().works()
        request = verbs.SendWR(opcode=verbs.IBV_WR_RDMA_WRITE, sg=[verbs.SGE(self.mr.buf, 17, self.mr.lkey)])
        request.set_wr_rdma(self.mr.rkey, self.mr.buf + BLOCK)
        self.qp.post_send(request)
        assert [done.status for done in self.cq.wait(1, 20)] == [verbs.IBV_WC_SUCCESS]
        assert self.mr.read(17, BLOCK) == self.mr.read(17)
        assert client.status(self.directory)["hca"]["pairs"] == 1

    def refused(self) -> list[Callable[[], object]]:
        return [partial(self.mr.read, 1), self.cq.poll, self.qp.query]


class Spliced(Mapped):
    """A pipe with pages in it: every look takes a byte."""

    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        self.pin = stack.enter_context(self.file.pin(write=True))
        self.pipe = stack.enter_context(kernel.splice(self.pin))

    def works(self) -> None:
        super().works()
        assert self.pipe.read(1) == b"A"

    def refused(self) -> list[Callable[[], object]]:
        return [self.pin.map, partial(self.pipe.read, 1)]


class Ring(Mapped):
    """A registered buffer with a read under way all the time."""

    def make(self, stack: ExitStack) -> None:
        self.file = stack.enter_context(client.open(self.path, "r+"))
        self.pin = stack.enter_context(self.file.pin(write=True))
        self.ring = stack.enter_context(kernel.FixedBuffer(self.pin))
        self.pipe, self.feed = os.pipe()
        stack.callback(os.close, self.pipe)
        stack.callback(os.close, self.feed)
        self.number = self.ring.submit_read(self.pipe, 0, BLOCK, 8)

    def works(self) -> None:
        super().works()
        os.write(self.feed, b"ring%4d" % self.rounds)
        assert self.ring.wait(20) == {self.number: 8}
        assert bytes(self.pin.map()[BLOCK : BLOCK + 8]) == b"ring%4d" % self.rounds
        self.number = self.ring.submit_read(self.pipe, 0, BLOCK, 8)

    def works_in_child(self) -> None:
        super().works()
        for call in (self.ring.wait, partial(self.ring.submit_read, self.pipe, 0, BLOCK, 8)):
            assert "was made by process" in refusal(call)

    def refused(self) -> list[Callable[[], object]]:
        return [self.pin.map, self.ring.wait]

    def descriptors(self) -> list[int]:
        """A ring cannot be sent over a socket (EINVAL)."""
        return [fd for fd in super().descriptors() if fd != self.ring.fileno()]


class Trio(Mapped):
    """A pin through the flavour for trio."""

    def make(self, stack: ExitStack) -> None:
        self.async_file = aio.AsyncFile(client.open(self.path, "r+"))
        self.file = self.async_file.file
        stack.callback(trio.run, self.async_file.aclose)
        self.pin = stack.enter_context(trio.run(partial(self.async_file.pin, write=True)))

    def works(self) -> None:
        super().works()

        async def listen() -> bool:
            with trio.move_on_after(0.05):
                await self.async_file.next_event()
            return True

        assert trio.run(listen)

    def close(self) -> None:
        self.pin.close()
        trio.run(self.async_file.aclose)


KINDS = {
    kind.__name__: kind
    for kind in (Pin, OnDemand, Lease, Pages, Region, RegionOfFile, RegionOnDemand, Pair, Spliced, Ring, Trio)
}


# -- how a child ends -------------------------------------------------------------------------------------------------


def leave(kind: Kind) -> NoReturn:
    """Out of the `with`, then the interpreter ends."""
    sys.exit(3)


def fail(kind: Kind) -> NoReturn:
    raise RuntimeError("an exception that is not caught")


def close(kind: Kind) -> NoReturn:
    """Close everything by hand; what is used afterwards says what has happened."""
    refused = kind.refused()
    kind.close()
    for call in refused:
        assert "in this process" in refusal(call)
    os._exit(3)


def forget(kind: Kind) -> NoReturn:
    """The objects are collected, and then the interpreter ends."""
    kind.stack.pop_all()
    vars(kind).clear()
    gc.collect()
    sys.exit(3)


def vanish(kind: Kind) -> NoReturn:
    os._exit(3)


def die(kind: Kind) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")


def become(kind: Kind) -> NoReturn:
    os.execv("/bin/sh", ["sh", "-c", "exit 3"])


def multiply(kind: Kind) -> NoReturn:
    """A child of the child leaves, then the child."""
    pid = os.fork()
    if not pid:
        kind.works_in_child()
        sys.exit(3)
    _ended(pid)
    sys.exit(3)


FORKED = {each.__name__: each for each in (leave, fail, close, forget, vanish, die, become, multiply)}


def forked(how: Callable[[Kind], NoReturn], kind: Kind) -> None:
    pid = os.fork()
    if pid:
        assert _ended(pid) == {fail: 1, die: -signal.SIGKILL}.get(how, 3)
        return
    _used(kind)
    how(kind)


def _used(kind: Kind) -> None:
    """In a child, before it ends: what it has not closed is there for it."""
    try:
        kind.works_in_child()
    except BaseException:
        traceback.print_exc()
        os._exit(98)


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def thread(kind: Kind) -> None:
    """The fork is in a thread, and nobody else is in the child."""
    code: list[int] = []

    def work() -> None:
        pid = os.fork()
        if not pid:
            _used(kind)
            kind.close()
            os._exit(3)
        code.append(_ended(pid))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert code == [3]


def with_fork(kind: Kind) -> None:
    _processed("fork", _closes, kind)


def with_forkserver(kind: Kind) -> None:
    _processed("forkserver", _receives, *map(Sent, kind.descriptors()))


def with_spawn(kind: Kind) -> None:
    _processed("spawn", _receives, *map(Sent, kind.descriptors()))


def _processed(method: str, target: Callable[..., None], *arguments: object) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _closes(kind: Kind) -> None:
    kind.works_in_child()
    kind.close()


def _receives(*descriptors: int) -> None:
    for fd in descriptors:
        with client.File(fd):
            pass


class Sent:
    """A descriptor as an argument of a process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _received, (reduction.DupFd(self.fd),)


def _received(descriptor: Any) -> int:
    fd: int = descriptor.detach()
    return fd


RECEIVER = """
import socket, sys
from daxfs import client
line = socket.socket(fileno=int(sys.argv[1]))
for fd in socket.recv_fds(line, 1, 8)[1]:
    with client.File(fd) as file:
        pass
"""


def passed(kind: Kind) -> None:
    """SCM_RIGHTS, to a program that was never the parent's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", RECEIVER, str(theirs.fileno())]
        receiver = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=REPOSITORY)
        socket.send_fds(ours, [b"x"], kind.descriptors())
        assert receiver.wait(60) == 0


ENDINGS: dict[str, Callable[[Kind], None]] = {
    **{name: partial(forked, how) for name, how in FORKED.items()},
    **{each.__name__: each for each in (thread, with_fork, with_forkserver, with_spawn, passed)},
}


def play(kind: Kind, ending: Callable[[Kind], None]) -> None:
    with kind.stack as stack:
        kind.make(stack)
        kind.check()
        ending(kind)
        kind.check()
    eventually("all is given back", lambda: kind.counted() == 0)
    hca = client.status(kind.directory)["hca"]
    assert hca is None or not hca["regions"] + hca["pairs"]


def main(directory: str, ending: str, *kinds: str) -> None:
    parent, wrong = os.getpid(), {}
    for name in kinds:
        wrong[name] = ""
        try:
            play(KINDS[name](Path(directory)), ENDINGS[ending])
        except Exception:
            if os.getpid() != parent:
                raise
            wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
