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
    "odp-zero-range",
    "blocks that an on-demand holder looks into are zeroed in place, as pinned ones are",
    source=f"S22, S60; {WEINY}",
    pins="P: A[0,2), on demand",
    call="fallocate(A, ZERO_RANGE, [0,2))",
    sees=everywhere("returns at once; P hears nothing and sees zeros; what its device writes then is in the file", SAFE),
)
def odp_zero_range(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    held = register(holder, 0, 2)
    lab.returns(lab.process().start(acts.fallocate, path, acts.ZERO_RANGE, 0, 2 * BLOCK))
    holder.no_event()
    lab.bytes_equal(held.view(), bytes(2 * BLOCK), "P's blocks")
    held.dma(b"<DMA of P>")
    lab.bytes_equal(lab.read(path)[:10], b"<DMA of P>", "A")
    held.unpin()


@story(
    "lease-own",
    "who has a lease changes the layout through the same descriptor: it would wait for itself",
    source=f"S61; {WEINY}",
    pins="P: a lease on A, no pin",
    call="ftruncate(P's descriptor, 0)",
    sees={
        **everywhere("returns; the lease is broken, P gets LEASE_BREAK", ("busy", "wait", "fail", "revoke")),
        "lease": "EDEADLK at once, nothing changed; after the release it succeeds",
    },
)
def lease_own(lab: Lab) -> None:
    path = lab.file()
    holder = lab.holder(path)
    holder.do(acts.lease, holder.file, 0, 0)
    pending = holder.start(acts.ftruncate, holder.file, 0)
    if lab.policy == "lease":
        lab.fails(errno.EDEADLK, pending, 2.0)
        lab.bytes_equal(lab.read(path), OLD, "A")
        holder.no_event()
        holder.do(acts.release_lease, holder.file)
        holder.do(acts.ftruncate, holder.file, 0)
    else:
        lab.returns(pending)
        lab.equal(holder.event().type, abi.EVENT_LEASE_BREAK, "event")
    lab.equal(lab.status(path).size, 0, "size")


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
    lab.see(time.monotonic() - started >= 0.3, "the limit is 0.3 s")
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
    sees=everywhere("EPERM, granted, EPERM; the pin that is held stays", SAFE),
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
    "longterm-lease-and-truncate",
    "longterm=lease: a layout change meets a lease and its long-term pin, under each policy",
    source=f"S61; {WEINY}",
    pins="P: a lease on A, A[0,1) with FOLL_LONGTERM",
    call="truncate(A, 0) by another process; a second long-term pin by P meanwhile",
    sees={
        "busy": "returns at once; P gets LEASE_BREAK, its lease is broken: EPERM; 1 busy",
        "wait": "P gets LEASE_BREAK, no new long-term pin under the lease: EPERM; returns after the unpin",
        "fail": "ETXTBSY, nothing changed; P hears nothing and keeps its lease: granted",
        "lease": "P gets LEASE_BREAK for the pin and for the lease: EPERM; returns when it has given both back",
        "revoke": "returns at once; P gets REVOKED and LEASE_BREAK: EPERM; 1 busy",
    },
    options={"longterm": "lease"},
)
def longterm_lease_and_truncate(lab: Lab) -> None:
    path, longterm = lab.file(), abi.FOLL_PIN | abi.FOLL_LONGTERM
    holder = lab.holder(path)
    holder.do(acts.lease, holder.file, 0, 0)
    held = holder.pin(flags=longterm)
    pending = lab.process().start(acts.truncate, path, 0)
    told = {"fail": [], "lease": [abi.EVENT_LEASE_BREAK] * 2, "revoke": [abi.EVENT_REVOKED, abi.EVENT_LEASE_BREAK]}
    for kind in told.get(lab.policy, [abi.EVENT_LEASE_BREAK]):
        lab.equal(holder.event().type, kind, "event")
    if lab.policy == "fail":
        lab.fails(errno.ETXTBSY, pending)
        holder.pin(1, 1, flags=longterm).unpin()
        lab.bytes_equal(lab.read(path), OLD, "A")
    elif lab.policy in ("wait", "lease"):
        lab.waits(pending)
        with lab.refused(errno.EPERM):
            holder.pin(1, 1, flags=longterm)
        held.unpin()
        if lab.policy == "lease":
            lab.waits(pending)
            holder.do(acts.release_lease, holder.file)
        lab.returns(pending)
    else:
        lab.returns(pending)
        lab.equal(lab.busy(), 1, "busy blocks")
        lab.not_reused(held)
        lab.returns(lab.process().start(acts.write, path, 0, OLD))
        with lab.refused(errno.EPERM):
            holder.pin(1, 1, flags=longterm)
        lab.bytes_equal(held.view(), OLD[:BLOCK], "P's block")
    holder.no_event()


@story(
    "longterm-deny",
    "longterm=deny answers as Linux does on DAX",
    source="S59; Linux since 2017",
    pins="P: A[0,1), FOLL_LONGTERM; then FOLL_PIN; then on demand",
    call="PIN",
    sees={"busy": "EOPNOTSUPP; granted; granted"},  # no policy has a say in it
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
