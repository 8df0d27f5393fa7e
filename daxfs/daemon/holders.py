"""Processes as /proc shows them: who takes a pin, whether it still lives, who has its open file today.

A pin outlives the process that took it when the open file description was inherited or passed on (fork, SCM_RIGHTS).
Only texts of /proc are read, never a path on the mount: that would ask this daemon, which is busy asking.
"""

from __future__ import annotations

import os

from daxfs.core.ledger import process_started
from daxfs.core.pins import Holder
from daxfs.daemon import mountpoint


def of(task: int, path: str = "") -> Holder:
    """The record of a process; FUSE names the calling thread."""
    pid = next((int(line[5:]) for line in _read(task, "status").splitlines() if line.startswith("Tgid:")), task)
    return Holder(pid, _read(pid, "comm").rstrip("\n") or "?", process_started(_read(pid, "stat")), path)


def alive(holder: Holder) -> bool:
    stat = _read(holder.pid, "stat")
    zombie = stat.rpartition(")")[2].split()[:1] in (["Z"], ["X"])
    return bool(stat) and not zombie and holder.started in (0, process_started(stat))


def today(taker: Holder, ino: int, device: str) -> Holder:
    """Who holds a pin now: its taker, as long as it has the inode open on the mount of this device (`major:minor`), else
    another process that has, since somebody must. The taker as it was, if none can be seen."""
    if device and not (alive(taker) and _has_open(taker.pid, ino, device)):
        for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
            if _has_open(pid, ino, device):
                return of(pid)
    return of(taker.pid) if alive(taker) else taker


def _has_open(pid: int, ino: int, device: str) -> bool:
    mount_ids = {mounted.id for mounted in mountpoint.table(pid) if mounted.device == device}
    try:
        descriptors = os.listdir(f"/proc/{pid}/fdinfo") if mount_ids else []
    except OSError:
        return False
    for fd in descriptors:
        facts = dict(line.partition(":\t")[::2] for line in _read(pid, f"fdinfo/{fd}").splitlines())
        if facts.get("ino") == str(ino) and facts.get("mnt_id") in mount_ids:
            return True
    return False


def _read(pid: int, what: str) -> str:
    try:
        with open(f"/proc/{pid}/{what}", encoding="utf-8", errors="surrogateescape") as text:
            return text.read()
    except OSError:
        return ""
