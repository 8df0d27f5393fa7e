"""RDMA between real processes on a real mount, and what happens when the file is truncated under it."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxfs import client, verbs
from daxfs.abi_hca import Access
from tests.mount.harness import Mounted, daxfs, eventually
from tests.verbs.peer import Peer, Side

pytestmark = pytest.mark.mount

BLOCK = 4096
BLOCKS = 8
SIZE = BLOCK * BLOCKS
ALL = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)
READ, WRITE = verbs.IBV_WR_RDMA_READ, verbs.IBV_WR_RDMA_WRITE


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    """A directory with two files of 8 blocks: `here`, full of the letter h, and `there`, full of t."""
    place = shared_mount.fresh_directory()
    for name in ("here", "there"):
        (place / name).write_bytes(name[:1].encode() * SIZE)
    return place


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    if made.process.poll() is None:
        made.end()
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.stdout.close()


@pytest.fixture
def side(path: Path, shared_mount: Mounted) -> Iterator[Side]:
    made = Side(shared_mount.path, path / "here", SIZE, ALL)
    yield made
    made.context.close()


def join(side: Side, peer: Peer, path: Path, access: int = ALL) -> dict[str, int]:
    """The other process registers `there` and is connected; its region's key and address."""
    mount = str(side.context.name)
    theirs = peer.make(mount=mount, file=str(path / "there"), length=SIZE, access=access)
    peer.connect(dest_qp_num=side.qp.qp_num)
    side.qp.connect(theirs["qp"])
    facts: dict[str, int] = theirs
    return facts


def policy(path: Path, name: str) -> None:
    os.setxattr(path, "user.daxfs.policy", name.encode())


def fill(path: Path, mount: Mounted) -> bytes:
    """Another file that takes every free block."""
    secret = b"secret! " * (BLOCK // 8)
    with open(path / "secret", "wb", buffering=0) as file, pytest.raises(OSError, match="No space") as full:
        while True:
            file.write(secret * 64)
    assert full.value.errno == errno.ENOSPC
    return secret


# -- two processes --


def test_read_and_write(side: Side, peer: Peer, path: Path) -> None:
    theirs = join(side, peer, path)
    side.rdma(READ, theirs["rkey"], theirs["addr"] + 5, 100, at=10)
    assert side.status() == "IBV_WC_SUCCESS"
    assert (path / "here").read_bytes()[9:111] == b"h" + b"t" * 100 + b"h"
    side.rdma(WRITE, theirs["rkey"], theirs["addr"] + SIZE - 3, 3)
    assert side.status() == "IBV_WC_SUCCESS"
    assert peer.read(length=4, offset=SIZE - 4) == "thhh"
    assert (path / "there").read_bytes()[-4:] == b"thhh"


def test_messages(side: Side, peer: Peer, path: Path) -> None:
    join(side, peer, path)
    peer.receive(at=100, length=BLOCK)
    side.qp.post_send(verbs.SendWR(sg=[verbs.SGE(0, 5, side.mr.lkey)]))
    assert side.status() == peer.status() == "IBV_WC_SUCCESS"
    assert peer.read(length=7, offset=99) == "thhhhht"


def test_atomics_of_two_processes_add_up(side: Side, peer: Peer, path: Path) -> None:
    theirs = join(side, peer, path)
    side.mr.write(bytes(8))
    side.rdma(WRITE, theirs["rkey"], theirs["addr"] + 64, 8)
    for n in range(40):
        wr = verbs.SendWR(opcode=verbs.IBV_WR_ATOMIC_FETCH_AND_ADD, sg=[verbs.SGE(8, 8, side.mr.lkey)])
        wr.set_wr_atomic(theirs["rkey"], theirs["addr"] + 64, compare_add=1)
        side.qp.post_send(wr)
        if n % 10 == 9:
            side.cq.wait(10 + (n == 9))
    assert int.from_bytes(side.mr.read(8, 8), "little") == 39
    wr = verbs.SendWR(opcode=verbs.IBV_WR_ATOMIC_CMP_AND_SWP, sg=[verbs.SGE(8, 8, side.mr.lkey)])
    wr.set_wr_atomic(theirs["rkey"], theirs["addr"] + 64, compare_add=40, swap=7)
    side.qp.post_send(wr)
    assert side.status() == "IBV_WC_SUCCESS"
    assert (path / "there").read_bytes()[64:72] == (7).to_bytes(8, "little")


def test_a_process_without_permission_for_the_image(shared_mount: Mounted, path: Path) -> None:
    """RDMA is for who may open the file; mapping the image is another matter."""
    os.chmod(path, 0o755)
    os.chmod(path / "here", 0o666)
    os.chmod(shared_mount.path, 0o755)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            one = Side(shared_mount.path, path / "here", SIZE, ALL)
            one.qp.connect(one.qp.qp_num)
            one.rdma(WRITE, one.mr.rkey, 100, 4)
            code = 0 if one.status() == "IBV_WC_SUCCESS" and one.mr.read(4) == b"hhhh" else 2
            with pytest.raises(PermissionError):
                os.open(shared_mount.image, os.O_RDONLY)
            with pytest.raises(OSError, match="denied"):
                verbs.MR(one.pd, SIZE, file=path / "there" / ".." / ".." / ".." / "image")
        except OSError:
            code = code or 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("key", "at", "access", "status"),
    [
        (1, 0, ALL, "REM_ACCESS_ERR"),
        (0, SIZE, ALL, "REM_ACCESS_ERR"),
        (0, SIZE - 9, ALL, "REM_ACCESS_ERR"),
        (0, 0, ALL & ~Access.REMOTE_WRITE, "REM_ACCESS_ERR"),
    ],
)
def test_keys_bounds_access(
    side: Side, peer: Peer, path: Path, key: int, at: int, access: int, status: str
) -> None:
    theirs = join(side, peer, path, int(access))
    side.rdma(WRITE, theirs["rkey"] ^ key, theirs["addr"] + at, 10)
    assert side.status() == f"IBV_WC_{status}"
    assert (path / "there").read_bytes() == b"t" * SIZE
    assert (side.qp.qp_state.name, peer.state()) == ("ERR", "ERR")


def test_a_key_of_a_third_process(side: Side, peer: Peer, path: Path, shared_mount: Mounted) -> None:
    (path / "third").write_bytes(b"3" * SIZE)
    with verbs.Context(shared_mount.path) as context:
        third = verbs.MR(verbs.PD(context), SIZE, ALL, file=path / "third")
        join(side, peer, path)
        side.rdma(READ, third.rkey, third.buf, 10)
        assert side.status() == "IBV_WC_REM_ACCESS_ERR"
    assert (path / "here").read_bytes() == b"h" * SIZE


# -- truncate while a transfer is in flight --


def test_truncate_under_busy(make_mount: object, peer: Peer) -> None:
    """The blocks stay the device's: the transfer arrives, and whoever fills the disk does not meet it."""
    assert callable(make_mount)
    mount: Mounted = make_mount(size="32M")
    for name in ("here", "there"):
        (mount.path / name).write_bytes(name[:1].encode() * SIZE)
    side = Side(mount.path, mount.path / "here", SIZE, ALL)
    theirs = join(side, peer, mount.path)
    side.qp.set_delay(500_000)
    side.rdma(WRITE, theirs["rkey"], theirs["addr"], BLOCK)
    os.truncate(mount.path / "there", 0)
    secret = fill(mount.path, mount)
    assert side.cq.poll() == (0, [])
    assert sum(extent["count"] for extent in client.busy(mount.path)) == BLOCKS
    assert side.status() == "IBV_WC_SUCCESS"
    assert peer.read(length=BLOCK + 1) == "h" * BLOCK + "t"
    with open(mount.path / "secret", "rb") as file:
        while piece := file.read(1 << 20):
            assert piece == (secret * 256)[: len(piece)]
    side.qp.set_delay(0)
    side.rdma(READ, theirs["rkey"], theirs["addr"], SIZE)
    assert side.status() == "IBV_WC_SUCCESS"
    assert side.mr.read(BLOCK + 1) == b"h" * BLOCK + b"t"
    peer.close_mr()
    eventually("the blocks are free", lambda: client.busy(mount.path) == [])
    side.context.close()


def test_truncate_under_revoke(side: Side, peer: Peer, path: Path) -> None:
    policy(path / "there", "revoke")
    theirs = join(side, peer, path)
    side.qp.set_delay(300_000)
    side.rdma(READ, theirs["rkey"], theirs["addr"], SIZE)
    os.truncate(path / "there", 0)
    assert side.status() == "IBV_WC_REM_ACCESS_ERR"
    assert (path / "here").read_bytes() == b"h" * SIZE
    with pytest.raises(OSError, match="not held") as caught:
        peer.read(length=1)
    assert caught.value.errno == errno.EFAULT


def test_truncate_under_wait(side: Side, peer: Peer, path: Path) -> None:
    """It waits for the region, not for the transfer; meanwhile the transfer goes on and others are served."""
    policy(path / "there", "wait")
    theirs = join(side, peer, path)
    side.qp.set_delay(200_000)
    side.rdma(WRITE, theirs["rkey"], theirs["addr"], BLOCK)
    ended: list[float] = []

    def truncate() -> None:
        os.truncate(path / "there", 0)
        ended.append(time.monotonic())

    waiter = threading.Thread(target=truncate)
    waiter.start()
    assert side.status() == "IBV_WC_SUCCESS"
    assert os.stat(path / "here").st_size == SIZE
    assert peer.read(length=BLOCK + 1) == "h" * BLOCK + "t"
    assert waiter.is_alive()
    let_go = time.monotonic()
    peer.close_mr()
    waiter.join(10)
    assert ended
    assert ended[0] >= let_go
    side.rdma(READ, theirs["rkey"], theirs["addr"], 1)
    assert side.status() == "IBV_WC_REM_ACCESS_ERR"


def test_truncate_under_fail(side: Side, peer: Peer, path: Path) -> None:
    policy(path / "there", "fail")
    theirs = join(side, peer, path)
    with pytest.raises(OSError, match="busy") as caught:
        os.truncate(path / "there", 0)
    assert caught.value.errno == errno.ETXTBSY
    side.rdma(READ, theirs["rkey"], theirs["addr"], 1)
    assert side.status() == "IBV_WC_SUCCESS"


@pytest.mark.parametrize("name", ["busy", "wait", "fail", "lease", "revoke"])
def test_on_demand(side: Side, peer: Peer, path: Path, name: str) -> None:
    """No policy waits: the region lets go, then faults in what there is, or fails."""
    policy(path / "there", name)
    theirs = join(side, peer, path, ALL | Access.ON_DEMAND)
    side.rdma(READ, theirs["rkey"], theirs["addr"], 4)
    assert side.status() == "IBV_WC_SUCCESS"
    assert side.mr.read(5) == b"tttth"
    started = time.monotonic()
    os.truncate(path / "there", 0)
    assert time.monotonic() - started < 2
    (path / "there").write_bytes(b"new!" * (SIZE // 4))
    side.rdma(READ, theirs["rkey"], theirs["addr"], 8)
    assert side.status() == "IBV_WC_SUCCESS"
    assert side.mr.read(9) == b"new!new!h"
    os.truncate(path / "there", BLOCK)
    side.rdma(READ, theirs["rkey"], theirs["addr"] + BLOCK, 1)
    assert side.status() == "IBV_WC_REM_ACCESS_ERR"
    assert [pin["path"] for pin in client.pins(path) if pin["path"].startswith(str(path / "there"))] == [str(path / "there")]


# -- lives --


def test_the_death_of_a_process_ends_its_side(side: Side, peer: Peer, path: Path, shared_mount: Mounted) -> None:
    theirs = join(side, peer, path)
    before = client.info(shared_mount.path)["pinned"]
    peer.kill()
    eventually("its pins are gone", lambda: client.info(shared_mount.path)["pinned"] == before - BLOCKS)
    side.rdma(READ, theirs["rkey"], theirs["addr"], 1)
    assert side.status() == "IBV_WC_RETRY_EXC_ERR"


def test_a_context_that_is_passed_on_lives_on(side: Side, peer: Peer, path: Path) -> None:
    """For a while its descriptor and that of the region are only in a socket; whoever receives them goes on."""
    theirs = join(side, peer, path)
    ours, sent = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, sent:
        descriptors = array.array("i", [side.context.fileno(), side.mr._file])
        sent.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        for fd in descriptors:
            os.close(fd)
        _, [(_, _, data)], _, _ = ours.recvmsg(1, socket.CMSG_SPACE(8))
        side.context._fd, side.mr._file = array.array("i", data)
        side.rdma(READ, theirs["rkey"], theirs["addr"], 4)
        assert side.status() == "IBV_WC_SUCCESS"
        assert side.mr.read(4) == b"tttt"


def test_closing_ones_own_descriptor_does_no_harm(side: Side, path: Path) -> None:
    with client.open(path / "there", "r+") as file:
        mr = verbs.MR(side.pd, BLOCK, ALL, file=file)
    fd = os.open(path / "there", os.O_RDONLY)
    reader = verbs.MR(side.pd, BLOCK, file=fd, offset=100)
    os.close(fd)
    assert mr.read(4) == reader.read(4) == b"tttt"
    mr.write(b"over", offset=98)
    assert (path / "there").read_bytes()[97:103] == b"tovert"
    reader.close()
    reader.close()
    mr.close()


def test_refusals(side: Side, path: Path, shared_mount: Mounted, tmp_path: Path) -> None:
    hole = path / "hole"
    with open(hole, "wb") as file:
        file.truncate(SIZE)
    for code, more in (
        (errno.EINVAL, {"access": Access.REMOTE_WRITE}),
        (errno.EINVAL, {"length": 0}),
        (errno.EINVAL, {"length": -1}),
        (errno.EINVAL, {"address": 1}),
        (errno.ENXIO, {"length": SIZE + 1}),
        (errno.EFAULT, {"file": hole}),
        (errno.ENOENT, {"file": path / "nothing"}),
        (errno.ENOTTY, {"file": tmp_path}),
    ):
        pinned = shared_mount.info()["pinned"]
        arguments = {"length": SIZE, "file": path / "there", **more}
        if more.get("file") is tmp_path:
            (tmp_path / "file").write_bytes(b"x" * SIZE)
            arguments["file"] = tmp_path / "file"
        with pytest.raises(verbs.PinError) as caught:
            verbs.MR(side.pd, **arguments)  # type: ignore[arg-type]
        assert caught.value.errno == code, more
        assert caught.value.filename == str(arguments["file"])
        assert shared_mount.info()["pinned"] == pinned
    for name, code in ((path / "here", errno.ENOTDIR), (tmp_path, errno.ENOTTY)):
        with pytest.raises(verbs.PinError) as caught:
            verbs.Context(name)
        assert caught.value.errno == code
    with pytest.raises(verbs.PinError, match="still uses it"):
        side.cq.close()
    with pytest.raises(verbs.PostError, match="not in RTS") as refused:
        side.rdma(READ, 0, 0, 1)
    assert refused.value.posted == 0
    closed = verbs.Context(shared_mount.path)
    closed.close()
    with pytest.raises(verbs.PinError, match="the context is closed"):
        verbs.PD(closed)


def test_many_requests_in_one_call(side: Side) -> None:
    """More than a page of them, and more than the queue holds."""
    cq = verbs.CQ(side.context, 1000)
    cap = verbs.QPCap(max_send_wr=500, max_send_sge=16)
    qp = verbs.QP(side.pd, verbs.QPInitAttr(cq, cq, cap=cap))
    qp.connect(qp.qp_num)
    qp.set_delay(50_000)
    requests = []
    for n in range(501):
        wr = verbs.SendWR(wr_id=n, opcode=WRITE, sg=[verbs.SGE(i, 1, side.mr.lkey) for i in range(16)])
        wr.set_wr_rdma(side.mr.rkey, 100 + n * 16)
        requests.append(wr)
    with pytest.raises(verbs.PostError) as caught:
        qp.post_send(*requests)
    assert (caught.value.errno, caught.value.posted) == (errno.ENOMEM, 500)
    assert [done.wr_id for done in cq.wait(500)] == list(range(500))
    qp.close()
    cq.close()


def test_an_admin_releases_the_pin_of_a_region(side: Side, peer: Peer, path: Path) -> None:
    theirs = join(side, peer, path)
    [pin] = [pin for pin in client.pins(path) if pin["path"] == str(path / "there")]
    daxfs("pins", path, "--release", str(pin["id"]))
    side.rdma(READ, theirs["rkey"], theirs["addr"], 1)
    assert side.status() == "IBV_WC_REM_ACCESS_ERR"
    side.rdma(READ, side.mr.rkey, 0, 1)
    assert side.status() == "IBV_WC_WR_FLUSH_ERR"


def test_mounts_that_restrict_long_term_pins(make_mount: object) -> None:
    """longterm=lease: a lease of the same description counts. longterm=deny: on demand only, as on Linux."""
    assert callable(make_mount)
    mount: Mounted = make_mount(size="32M", options="allow_other,longterm=lease")
    path = mount.path / "file"
    path.write_bytes(b"f" * SIZE)
    with verbs.Context(mount.path) as context, client.open(path, "r+") as file:
        pd = verbs.PD(context)
        with pytest.raises(verbs.PinError, match="layout lease") as caught:
            verbs.MR(pd, SIZE, file=file)
        assert caught.value.errno == errno.EPERM
        with file.lease():
            assert verbs.MR(pd, SIZE, file=file).read(1) == b"f"
            with pytest.raises(verbs.PinError, match="layout lease"):
                verbs.MR(pd, SIZE, file=path)
    mount.umount()
    mount.mount("allow_other,longterm=deny")
    with verbs.Context(mount.path) as context:
        pd = verbs.PD(context)
        with pytest.raises(verbs.PinError) as caught:
            verbs.MR(pd, SIZE, file=path)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert verbs.MR(pd, SIZE, Access.ON_DEMAND, file=path).read(1) == b"f"


def test_device_removal(make_mount: object) -> None:
    """Whoever waits is told, what is under way ends, nothing hangs."""
    assert callable(make_mount)
    mount: Mounted = make_mount(size="32M")
    (mount.path / "file").write_bytes(b"f" * SIZE)
    side = Side(mount.path, mount.path / "file", SIZE, ALL)
    side.qp.connect(side.qp.qp_num)
    side.qp.set_delay(60_000_000)
    side.rdma(WRITE, side.mr.rkey, BLOCK, 4)
    codes: list[int | None] = []

    def wait() -> None:
        with pytest.raises(verbs.PinError) as caught:
            side.cq.wait(1, 20)
        codes.append(caught.value.errno)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.2)
    daxfs("device", "remove", mount.path, "--force")
    waiter.join(10)
    assert codes == [errno.ENODEV]
    with pytest.raises(verbs.PinError) as caught:
        side.qp.set_delay(0)
    assert caught.value.errno == errno.ENODEV
    side.context.close()


def test_the_daemon_dies(make_mount: object) -> None:
    assert callable(make_mount)
    mount: Mounted = make_mount(size="32M")
    (mount.path / "file").write_bytes(b"f" * SIZE)
    side = Side(mount.path, mount.path / "file", SIZE, ALL)
    mount.kill()
    with pytest.raises(verbs.PinError, match="the daxfs daemon of this mount is gone"):
        side.cq.wait(1, 1)
    side.context.close()


# -- waiting --


def test_a_wait_holds_up_nobody(side: Side, path: Path) -> None:
    """Neither the mount nor other threads of this process, and it can be interrupted."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(side.cq.wait(1)))
    thread.start()
    started = time.monotonic()
    for _ in range(50):
        os.stat(path / "here")
        (path / "there").read_bytes()
    assert time.monotonic() - started < 2
    assert thread.is_alive()
    side.qp.connect(side.qp.qp_num)
    side.rdma(WRITE, side.mr.rkey, 100, 1)
    thread.join(5)
    assert len(found) == 1
    started = time.monotonic()
    assert side.cq.wait(3, 0.2) == []
    assert 0.2 <= time.monotonic() - started < 2


def test_a_signal_ends_a_wait(side: Side) -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    started = time.monotonic()
    try:
        with pytest.raises(Alarm):
            side.cq.wait(1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 0.9  # and not only between two calls


def test_large_transfers(mount: Mounted) -> None:
    """Of 64 MiB each, while the mount goes on."""
    size = 64 << 20
    for name in ("one", "two"):
        (mount.path / name).write_bytes(os.urandom(1 << 20) * 64)
    with verbs.Context(mount.path) as context:
        pd, cq = verbs.PD(context), verbs.CQ(context, 16)
        one, two = (verbs.MR(pd, size, ALL, file=mount.path / name) for name in ("one", "two"))
        qp = verbs.QP(pd, verbs.QPInitAttr(cq, cq))
        qp.connect(qp.qp_num)
        for _ in range(8):
            wr = verbs.SendWR(opcode=WRITE, sg=[verbs.SGE(0, size, one.lkey)])
            wr.set_wr_rdma(two.rkey, 0)
            qp.post_send(wr)
        looks = done = 0
        while done < 8:
            assert os.listdir(mount.path) == ["one", "two"]
            looks += 1
            done += cq.poll(8)[0]
        assert looks > 1
    assert (mount.path / "one").read_bytes() == (mount.path / "two").read_bytes()
