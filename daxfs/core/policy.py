"""What a layout change does about pinned blocks: the break policies, as one table.

The mount has a default policy, a file may have its own (the xattr POLICY_XATTR). `docs/pins.md` and the tests read this
table. Only operations that take whole blocks away from a file are in it. Writes, zeroing in place, growing, preallocating
and everything about names go on whatever is pinned: they move no block.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from daxfs.errors import BadArgument

POLICY_XATTR = b"user.daxfs.policy"


class Operation(StrEnum):
    TRUNCATE = "truncate"  # to a smaller size; O_TRUNC, creat
    PUNCH = "punch"  # a hole over whole blocks
    END = "end"  # the last reference of an unlinked or replaced file


class Outcome(StrEnum):
    DETACH = "detach"  # go ahead; pinned blocks become busy extents
    WAIT = "wait"  # until the pins of the range are gone (EINTR, EBUSY after wait_s)
    FAIL = "fail"  # ETXTBSY; EDEADLK for the holder's own descriptor
    LEASE = "lease"  # tell the holders, wait lease_break_s, then fail or revoke
    REVOKE = "revoke"  # take the holders' access; what a raw mapping may still reach becomes busy
    IGNORE = "ignore"  # free pinned blocks: the bug itself


_T, _P, _E = Operation.TRUNCATE, Operation.PUNCH, Operation.END

POLICIES: dict[str, dict[Operation, Outcome]] = {
    "busy": {_T: Outcome.DETACH, _P: Outcome.DETACH, _E: Outcome.DETACH},
    "wait": {_T: Outcome.WAIT, _P: Outcome.WAIT, _E: Outcome.DETACH},
    "fail": {_T: Outcome.FAIL, _P: Outcome.FAIL, _E: Outcome.DETACH},
    "lease": {_T: Outcome.LEASE, _P: Outcome.LEASE, _E: Outcome.DETACH},
    "revoke": {_T: Outcome.REVOKE, _P: Outcome.REVOKE, _E: Outcome.REVOKE},
    "unsafe": {_T: Outcome.IGNORE, _P: Outcome.IGNORE, _E: Outcome.IGNORE},
}

DEFAULT = "busy"
LONGTERM = ("allow", "deny", "lease")
LEASE_THEN = ("fail", "revoke")


@dataclass(slots=True)
class Settings:
    """What an admin may choose at mount time. Times in seconds, 0: no limit (`enospc_wait_s`: do not wait)."""

    policy: str = DEFAULT
    longterm: str = "allow"  # FOLL_LONGTERM: allow, deny (EOPNOTSUPP, as Linux on DAX), or want a layout lease first
    # Policy `wait`: then EBUSY. Not for ever: the kernel keeps the file's lock in a truncate(2) that waits, and an unlink of
    # the file then the directory's. A holder that needs the directory before it unpins would never come to it.
    wait_s: float = 60.0
    lease_break_s: float = 45.0  # policy `lease`: what holders get (as /proc/sys/fs/lease-break-time)
    lease_then: str = "fail"  # ... and then: fail or revoke
    invalidate_s: float = 5.0  # what an on-demand holder gets to acknowledge; then it is fenced
    enospc_wait_s: float = 0.0  # what an allocation waits for busy space, if there is any
    pins_max: int = 0  # blocks that one process may have pinned or busy, 0: no limit

    @property
    def unsafe(self) -> bool:
        return self.policy == "unsafe"


def check(name: str) -> str:
    """The policy's name. BadArgument names those that there are."""
    if name not in POLICIES:
        raise BadArgument(f"unknown policy {name!r}; there are: {', '.join(POLICIES)}")
    return name
