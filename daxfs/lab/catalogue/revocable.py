"""Holders that can be told: on-demand registrations, layout leases, revocation by policy or by an admin."""

from __future__ import annotations

import errno
import time

from daxfs import abi
from daxfs.lab import acts
from daxfs.lab.processes import eventually
from daxfs.lab.scenario import BLOCK, SAFE, Held, Holder, Lab, everywhere, pattern, story

WEINY = "Hubbard and Weiny, August 2019"
OLD = b"".join(pattern("A", n) for n in range(8))


def register(holder: Holder, first: int = 0, count: int = 1) -> Held:
    """On demand: no pin."""
    return holder.pin(first, count, flags=abi.PIN_ON_DEMAND | abi.FOLL_WRITE)


@story(
    "odp-acknowledges",
    "an on-demand holder is told, lets go and acknowledges: nobody waits for an unpin",
    source=f"S60; {WEINY}",
    pins="P: A[0,2), on demand",
    call="truncate(A, 0)",
    sees=everywhere("P gets INVALIDATE; the truncate returns after P's ACK; nothing busy", SAFE),
)
def odp_acknowledges(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    held = register(holder, 0, 2)
    pending = lab.process().start(acts.truncate, path, 0)
    event = holder.event()
    lab.equal((event.type, event.pin), (abi.EVENT_INVALIDATE, held.id), "event")
    lab.see(not pending.done(), "the truncate did not wait for the ACK")
    holder.do(acts.acknowledge, holder.file, held.id)
    lab.returns(pending)
    eventually("nothing is busy", lambda: lab.busy() == 0)
    holder.no_event()


@story(
    "odp-fenced",
    "an on-demand holder that never acknowledges is fenced: its blocks stay busy until it is gone",
    source=f"S60; {WEINY}",
    pins="P: A[0,2), on demand, deaf",
    call="truncate(A, 0)",
    sees=everywhere("returns after invalidate_s; 2 busy, given to nobody until P's description ends", SAFE),
)
def odp_fenced(lab: Lab) -> None:
    lab.needs(float(lab.settings.get("invalidate_s", 5)) <= 6, "the mount's invalidate_s is too long to wait for")
    path = lab.file()
    holder = lab.holder(path)
    held = register(holder, 0, 2)
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    lab.returns(pending)
    lab.equal(lab.busy(), 2, "busy blocks")
    lab.not_reused(held)
    lab.bytes_equal(held.view(), OLD[: 2 * BLOCK], "P's blocks")
    lab.equal(holder.event().type, abi.EVENT_INVALIDATE, "event")
    holder.do(acts.acknowledge, holder.file, held.id)  # late, but honest
    eventually("nothing is busy", lambda: lab.busy() == 0)


@story(
    "odp-beside",
    "an on-demand holder of other blocks is left alone",
    source="S60, S4",
    pins="P: A[0,2), on demand",
    call="punch(A, [4,6)), truncate(A, 3 blocks), write(A)",
    sees=everywhere("at once; P hears nothing", SAFE),
)
def odp_beside(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    register(holder, 0, 2)
    caller = lab.process()
    lab.returns(caller.start(acts.punch, path, 4 * BLOCK, 2 * BLOCK), 0.3)
    lab.returns(caller.start(acts.truncate, path, 3 * BLOCK), 0.3)
    lab.returns(caller.start(acts.write, path, 0, b"x"), 0.3)
    holder.no_event()


@story(
    "lease-break-ignored",
    "a holder that does not answer a lease break in time: lease_then=fail",
    source=f"S61, D6.3; {WEINY}",
    pins="P: A[0,1), deaf",
    call="truncate(A, 0)",
    options={"lease_break_s": "0.3"},
    sees={"lease": "P gets LEASE_BREAK; ETXTBSY after 0.3 s, nothing changed"},
)
def lease_break_ignored(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    started = time.monotonic()
    pending = lab.process().start(acts.truncate, path, 0)
    lab.equal(p.holder.event().type, abi.EVENT_LEASE_BREAK, "event")
    lab.fails(errno.ETXTBSY, pending)
    lab.see(0.3 <= time.monotonic() - started < 3, "the limit is 0.3 s")
    lab.bytes_equal(lab.read(path), OLD, "A")
    p.unpin()


@story(
    "lease-break-revokes",
    "a holder that does not answer a lease break in time: lease_then=revoke",
    source="D6.3",
    pins="P: A[0,1), deaf",
    call="truncate(A, 0)",
    options={"lease_break_s": "0.3", "lease_then": "revoke"},
    sees={"lease": "returns after 0.3 s; P gets LEASE_BREAK and REVOKED; 1 busy until it lets go"},
)
def lease_break_revokes(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin()
    pending = lab.process().start(acts.truncate, path, 0)
    lab.waits(pending)
    lab.returns(pending)
    for kind in (abi.EVENT_LEASE_BREAK, abi.EVENT_REVOKED):
        lab.equal(p.holder.event().type, kind, "event")
    lab.equal(lab.busy(), 1, "busy blocks")
    lab.not_reused(p)
    p.unpin()


@story(
    "layout-lease",
    "a layout lease without a pin: its holder hears of the change; under `lease` the change waits for it",
    source=f"S61; {WEINY}",
    pins="P: a lease on A, no pin",
    call="truncate(A, 0)",
    sees={
        **everywhere("returns at once; P gets LEASE_BREAK", ("busy", "wait", "fail", "revoke")),
        "lease": "P gets LEASE_BREAK; the truncate returns when P releases the lease",
    },
)
def layout_lease(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    holder.do(acts.lease, holder.file, 0, 0)
    pending = lab.process().start(acts.truncate, path, 0)
    lab.equal(holder.event().type, abi.EVENT_LEASE_BREAK, "event")
    if lab.policy == "lease":
        lab.waits(pending)
        holder.do(acts.release_lease, holder.file)
    lab.returns(pending)


@story(
    "longterm-lease",
    "longterm=lease: a long-term pin needs a layout lease first",
    source=f"S61; {WEINY}",
    pins="P: A[0,1), FOLL_LONGTERM",
    call="PIN without, with, and after the release of a lease",
    sees={"busy": "EPERM, granted, EPERM; the pin that is held stays"},
    options={"longterm": "lease"},
)
def longterm_lease(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    longterm = abi.FOLL_PIN | abi.FOLL_LONGTERM
    with lab.refused(errno.EPERM):
        holder.pin(flags=longterm)
    holder.do(acts.lease, holder.file, 0, 4 * BLOCK)
    with lab.refused(errno.EPERM):
        holder.pin(4, 1, flags=longterm)
    held = holder.pin(flags=longterm)
    holder.do(acts.release_lease, holder.file)
    with lab.refused(errno.EPERM):
        holder.pin(1, 1, flags=longterm)
    lab.bytes_equal(held.view(), OLD[:BLOCK], "P's block")
    holder.pin(1, 1).unpin()  # a short one needs none
    held.unpin()


@story(
    "longterm-deny",
    "longterm=deny answers as Linux does on DAX",
    source="S59; Linux since 2017",
    pins="P: A[0,1), FOLL_LONGTERM; then FOLL_PIN; then on demand",
    call="PIN",
    sees={"busy": "EOPNOTSUPP; granted; granted"},
    options={"longterm": "deny"},
)
def longterm_deny(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    with lab.refused(errno.EOPNOTSUPP):
        holder.pin(flags=abi.FOLL_PIN | abi.FOLL_LONGTERM)
    holder.pin().unpin()
    register(holder).unpin()


@story(
    "revoked-keeps-blocks",
    "a revoked holder that still maps its blocks keeps them from everybody until it lets go",
    source="S63, D6.3",
    pins="P: A[0,8)",
    call="truncate(A, 0); P dies",
    sees={"revoke": "P gets REVOKED; 8 busy; freed when P is gone"},
)
def revoked_keeps_blocks(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 8)
    lab.returns(lab.process().start(acts.truncate, path, 0))
    lab.equal(p.holder.event().type, abi.EVENT_REVOKED, "event")
    lab.equal(lab.busy(), 8, "busy blocks")
    lab.not_reused(p)
    lab.bytes_equal(p.view(), OLD, "P's blocks")
    p.holder.process.kill()
    eventually("P's blocks are freed", lambda: lab.busy() == 0, 1.0)


@story(
    "admin-releases",
    "an admin takes a pin away: the holder is told, and what it may have mapped is not reused",
    source="S63",
    pins="P: A[0,2)",
    call="truncate(A, 0); ADMIN release of P's pin; P dies",
    sees={"busy": "P gets REVOKED; 2 busy until P is gone"},
)
def admin_releases(lab: Lab) -> None:
    path = lab.file()
    p = lab.holder(path).pin(0, 2)
    lab.returns(lab.process().start(acts.truncate, path, 0))
    release = abi.ADMIN.pack(abi.ADMIN_RELEASE_PIN, 0, p.id, 0)
    lab.process().do(acts.ioctl_path, lab.place.path, abi.IOC_ADMIN, release)
    lab.equal(p.holder.event().type, abi.EVENT_REVOKED, "event")
    lab.equal(lab.busy(), 2, "busy blocks")
    lab.not_reused(p)
    p.holder.process.kill()
    eventually("P's blocks are freed", lambda: lab.busy() == 0, 1.0)
