"""The mount and the device under the holders: unmount, a daemon that dies, removal, poison. Each on a mount of its own."""

from __future__ import annotations

import errno
import os
import signal

from daxfs import abi, client
from daxfs.client import admin
from daxfs.lab import acts, place
from daxfs.lab.processes import alive, eventually
from daxfs.lab.scenario import BLOCK, Lab, everywhere, pattern, story

WILLIAMS = "Williams and Gunthorpe, February 2021"
OLD = b"".join(pattern("A", n) for n in range(8))


@story(
    "umount-refused",
    "a mount with live pins is in use; detached, it is served until the last holder lets go",
    source="S43; Linux unmounts under the holder",
    pins="P: A[0,8)",
    call="umount, umount --lazy; P unpins and closes",
    sees={"busy": "in use; then detached, P goes on; the daemon ends with P's close"},
    own_mount=True,
)
def umount_refused(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    done = lab.place.command("umount", lab.place.path)
    lab.see(done.returncode == 1 and "in use" in done.stderr, f"umount said: {done.stderr}")
    lab.see(str(p.holder.process.pid) in done.stderr, f"umount does not name the holder: {done.stderr}")
    lab.see(lab.place.command("umount", "--lazy", lab.place.path).returncode == 0, "umount --lazy failed")
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    p.holder.do(acts.ftruncate, p.holder.file, 0)
    lab.bytes_equal(p.view(), OLD, "P's blocks after its truncate")
    p.unpin()
    lab.see(alive(lab.place.daemon), "the daemon ended before P did")
    lab.mount_is_gone()
    eventually("the daemon ends with its last user", lambda: not alive(lab.place.daemon), 5)
    lab.place.daemon = 0


@story(
    "daemon-dies",
    "kill -9 of the daemon: holders keep their mappings, and the next mount keeps the blocks for them",
    source="S39, D6.5",
    pins="P: A[0,8), mapped",
    call="truncate(A, 0); kill -9 the daemon; mount; fill; P dies",
    sees={"busy": "P's bytes stay; nobody gets its blocks; they are free when P is gone"},
    own_mount=True,
)
def daemon_dies(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    lab.returns(lab.process().start(acts.truncate, path, 0))
    os.kill(lab.place.daemon, signal.SIGKILL)
    eventually("the daemon is dead", lambda: not alive(lab.place.daemon))
    place.mount(lab.place)
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    lab.equal(lab.busy(), 8, "busy blocks")
    lab.not_reused(p)
    p.holder.process.kill()
    eventually("P's blocks are free", lambda: lab.busy() == 0, 10)


@story(
    "dirty-shutdown",
    "the dirty-shutdown count moves when the daemon is killed, and only then",
    source=f"S45; {WILLIAMS}",
    pins="nobody",
    call="umount and mount; kill -9 and mount",
    sees={"busy": "the count stays, then is one more"},
    own_mount=True,
)
def dirty_shutdown(lab: Lab) -> None:
    def count() -> int:
        return int(lab.info()["dirty_shutdowns"])

    before = count()
    lab.see(lab.place.command("umount", lab.place.path).returncode == 0, "umount failed")
    place.mount(lab.place)
    lab.equal(count(), before, "dirty shutdowns after a clean one")
    os.kill(lab.place.daemon, signal.SIGKILL)
    eventually("the daemon is dead", lambda: not alive(lab.place.daemon))
    place.mount(lab.place)
    lab.equal(count(), before + 1, "dirty shutdowns after a kill")


@story(
    "device-remove",
    "the device goes away in order: no new pins, holders are told and drain, then calls fail, umount works",
    source=f"S64; {WILLIAMS}",
    pins="P: A[0,8)",
    call="device remove; P unpins; umount",
    sees=everywhere(
        "P gets DEVICE_REMOVE; a new pin is ENODEV; after the unpin all calls are ENODEV or EIO; umount works",
        ("busy", "wait"),
    ),
    own_mount=True,
)
def device_remove(lab: Lab) -> None:
    path = lab.file()
    p, q = lab.holder(path).pin(0, 8), lab.holder(path)
    lab.clerk.do(admin.remove_device, lab.place.path, 30.0)
    lab.equal(p.holder.event().type, abi.EVENT_DEVICE_REMOVE, "event")
    with lab.refused(errno.ENODEV):
        q.pin()
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    p.unpin()
    p.holder.do(acts.close_file, p.holder.file)
    _is_removed(lab, path)
    q.process.kill()
    _unmount(lab)


@story(
    "device-remove-deadline",
    "a holder that does not let go of a device that goes away: revoked after the deadline",
    source=f"S64; {WILLIAMS}: in Linux the holder's release oopses",
    pins="P: A[0,8), deaf, mapped",
    call="device remove, deadline 0.3 s; umount",
    sees={"busy": "P gets DEVICE_REMOVE and REVOKED; calls fail; P's mapping is still P's; umount succeeds"},
    own_mount=True,
)
def device_remove_deadline(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    lab.clerk.do(admin.remove_device, lab.place.path, 0.3)
    lab.equal(p.holder.event().type, abi.EVENT_DEVICE_REMOVE, "event")
    _is_removed(lab, path)
    lab.bytes_equal(p.view(), OLD, "what P has mapped")
    p.holder.process.kill()
    eventually("P is gone", lambda: p.holder.process.gone)
    _unmount(lab)


def _is_removed(lab: Lab, path: str) -> None:
    gone = (errno.ENODEV, errno.EIO, errno.ENXIO)
    eventually("calls fail", lambda: lab.clerk.errno_of(acts.read, path) in gone, 5)
    lab.see(lab.clerk.errno_of(os.mkdir, lab.path("new")) in gone, "a directory could be made on a removed device")


def _unmount(lab: Lab) -> None:
    done = lab.place.command("umount", lab.place.path)
    lab.see(done.returncode == 0, f"umount failed: {done.stderr}")
    lab.mount_is_gone()
    eventually("the daemon has ended", lambda: not alive(lab.place.daemon), 5)
    lab.place.daemon = 0


@story(
    "other-image",
    "another image is mounted in the place of one that was taken away: old holders cannot touch it",
    source="S65",
    pins="P: A[0,8), mapped, on the first image",
    call="device remove --force; umount --lazy; mount another image",
    sees={"busy": "P's writes and calls do not reach the new mount"},
    own_mount=True,
)
def other_image(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    lab.clerk.do(admin.remove_device, lab.place.path, 0.0, force=True)
    _is_removed(lab, path)
    first = lab.place.daemon
    lab.see(lab.place.command("umount", "--lazy", lab.place.path).returncode == 0, "umount --lazy failed")
    lab.place.image += "2"
    place.make_image(lab.place.image, place.SIZE)
    place.mount(lab.place)
    clerk = lab.process()
    new = f"{lab.place.path}/A"
    clerk.do(acts.create, new, OLD)
    p.dma(b"<DMA into the old image>")
    lab.refuses(errno.ENODEV, p.holder, acts.pin, p.holder.file, 0, BLOCK, abi.FOLL_PIN)
    lab.bytes_equal(clerk.do(acts.read, new), OLD, "A on the new image")
    lab.equal(clerk.do(client.pins, lab.place.path), [], "pins of the new mount")
    lab.mount_is_gone()
    eventually("the first daemon ends with its last user", lambda: not alive(first), 5)


@story(
    "poison",
    "the medium fails under a pinned block: its holder is told, reads fail, and nobody gets the block dirty",
    source="S66",
    pins="P: A[2,3)",
    call="inject an error there; read, punch, write(A); unpin",
    sees={
        "busy": "P gets POISON; reading the block is EIO, its neighbours are fine; after the punch A reads zeros; whoever "
        "gets the block later can read it"
    },
    own_mount=True,
)
def poison(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(2, 1)
    reader = lab.holder(path, "r")
    lab.clerk.do(admin.poison, lab.place.path, p.in_order[0], 1)
    lab.equal(p.holder.event().type, abi.EVENT_POISON, "event")
    lab.refuses(errno.EIO, reader, acts.read_at, reader.file, 2 * BLOCK, BLOCK)
    lab.bytes_equal(reader.do(acts.read_at, reader.file, BLOCK, BLOCK), pattern("A", 1), "the block before")
    lab.bytes_equal(reader.do(acts.read_at, reader.file, 3 * BLOCK, BLOCK), pattern("A", 3), "the block behind")
    lab.returns(lab.process().start(acts.punch, path, 2 * BLOCK, BLOCK))
    lab.bytes_equal(lab.read(path)[2 * BLOCK : 3 * BLOCK], bytes(BLOCK), "the hole")
    lab.process().do(acts.write, path, 2 * BLOCK, b"n" * BLOCK)
    lab.bytes_equal(lab.read(path)[2 * BLOCK : 3 * BLOCK], b"n" * BLOCK, "block 2 of A")
    p.unpin()
    eventually("nothing is busy", lambda: lab.busy() == 0)
    taken = lab.take_all(p)
    lab.read(taken.path)  # EIO would be a failure
