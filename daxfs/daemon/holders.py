"""Processes as /proc shows them: who takes a pin, whether it still lives, and who has its open file description today.

A description is shared by fork and SCM_RIGHTS, so the process that took a pin need not be the one that keeps it. The kernel
names no description in /proc; kcmp(2) tells whether two descriptors are the same one, and `of_descriptions` sorts out which
one is whose by who opened it and who pinned through it. Where a process has several descriptions of one file with the same
mode they cannot be told apart: then all of their processes are named.

Only texts of /proc are read, never a path on the mount: that would ask this daemon, which is busy asking. A description
that only a mapping, a queued message or the kernel keeps has no descriptor; then whoever took the pin is named while it
lives.

A process that was killed can hang in the kernel for as long as it likes, with all its descriptors: its dirty pages are
written back first. It will never run again, so `dying` says which descriptions no other process has any more. A
description that no process is seen to have is not among them; nor is one that a process may have as far as one can see.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import select
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from daxfs.core.ledger import process_started
from daxfs.core.pins import Holder
from daxfs.daemon import mountpoint

_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "s390x": 343, "ppc64le": 354}.get(platform.machine(), -1)
_KCMP_FILE = 0
_SURE_NS = 50_000_000
_FLAGS, _SIGNALS = 6, 28  # where /proc/PID/stat has them, counted from the state
_PF_EXITING = 0x4
_SIGKILL = 1 << signal.SIGKILL - 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Description:
    """One that the kernel has open: its handle, inode, access mode (O_ACCMODE), and tasks that are known to have had it."""

    fh: int
    ino: int
    mode: int
    known: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Descriptor:
    pid: int
    fd: int
    mode: int
    task: int  # the thread that shows it: the process's first one, unless that has ended


@dataclass(slots=True)
class _Watched:
    holder: Holder
    pidfd: int
    poller: select.poll  # readable: it has ended
    seen: int  # alive, ns


class Known:
    """The records of processes that pin: /proc is read once for each, as long as it lives (which its pidfd tells). A process
    that lived `_SURE_NS` ago needs no look: the kernel goes through all other numbers before it uses one again."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._kept: dict[int, _Watched] = {}

    def of(self, task: int, now: int) -> Holder:
        """The process of a task that calls; `now` in ns."""
        kept = self._kept.get(task)
        if kept is not None:
            if 0 <= now - kept.seen < _SURE_NS:
                return kept.holder
            if not kept.poller.poll(0):
                kept.seen = now
                return kept.holder
        self._forget(task)
        holder = of(task)
        if holder.pid == task:
            self._keep(holder, now)
        return holder

    def _keep(self, holder: Holder, now: int) -> None:
        try:
            pidfd = os.pidfd_open(holder.pid)
        except OSError:
            return
        if len(self._kept) >= self._most:
            self._forget(next(iter(self._kept)))
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        self._kept[holder.pid] = _Watched(holder, pidfd, poller, now)
        if not alive(holder):  # it ended before, and the number is another's
            self._forget(holder.pid)

    def _forget(self, pid: int) -> None:
        kept = self._kept.pop(pid, None)
        if kept is not None:
            os.close(kept.pidfd)


def of(task: int) -> Holder:
    """The record of a process; FUSE names the calling thread."""
    pid = _process(task)
    return Holder(pid, _read(pid, "comm").rstrip("\n") or "?", process_started(_read(pid, "stat")))


def _process(task: int) -> int:
    """The process of a thread; the same number if it has ended."""
    return next((int(line[5:]) for line in _read(task, "status").splitlines() if line.startswith("Tgid:")), task)


def alive(holder: Holder) -> bool:
    stat = _read(holder.pid, "stat")
    return bool(stat) and not _has_ended(stat) and holder.started in (0, process_started(stat))


def may_live(holder: Holder) -> bool:
    """As far as one can see: its number may be another's by now, but then /proc would say when that one started."""
    stat = _read(holder.pid, "stat")
    return not stat or (not _has_ended(stat) and holder.started in (0, process_started(stat)))


def zombie(pid: int) -> bool:
    """Whether the first thread of a process has ended; others may go on."""
    return _has_ended(_read(pid, "stat"))


def _has_ended(stat: str) -> bool:
    return stat.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def of_descriptions(wanted: Iterable[Description], device: str, mount_id: str) -> dict[int, list[Holder]]:
    """The processes that have each description (by handle) of files on the mount of this device (`major:minor`) and id."""
    wanted = list(wanted)
    files: dict[int, list[Description]] = {}
    for one in wanted:
        files.setdefault(one.ino, []).append(one)
    found: dict[int, list[_Descriptor]] = {}
    for ino, descriptor in _descriptors(files.keys(), device, mount_id) if files else []:
        found.setdefault(ino, []).append(descriptor)
    for one in wanted:
        one.known = {_process(task) for task in one.known}
    processes: dict[int, Holder] = {}
    answer: dict[int, list[Holder]] = {}
    for ino, descriptions in files.items():
        for fh, pids in _assign(descriptions, _groups(found.get(ino, []))).items():
            for pid in pids - processes.keys():
                processes[pid] = of(pid)
            answer[fh] = [processes[pid] for pid in sorted(pids)]
    return answer


def _descriptors(inos: Iterable[int], device: str, mount_id: str) -> Iterator[tuple[int, _Descriptor]]:
    """All descriptors of all processes that lead to these inodes of the mount."""
    texts = {str(ino): ino for ino in inos}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        task, names = _descriptor_numbers(pid)
        mounts: set[str] | None = None
        for fd in names:
            facts = dict(line.partition(":\t")[::2] for line in _read(task, f"fdinfo/{fd}").splitlines())
            ino = texts.get(facts.get("ino", ""))
            if ino is None:
                continue
            if mounts is None:
                mounts = {mount_id} | {mounted.id for mounted in mountpoint.table(task) if mounted.device == device}
            if facts.get("mnt_id") in mounts:
                yield ino, _Descriptor(pid, int(fd), int(facts.get("flags", "0"), 8) & os.O_ACCMODE, task)


def _descriptor_numbers(pid: int) -> tuple[int, list[str]]:
    """The descriptors of a process, and the thread that shows them: another one than the first if that has ended."""
    try:
        names = os.listdir(f"/proc/{pid}/fdinfo")
        if names or not zombie(pid):
            return pid, names
        for task in _threads(pid):
            if task != pid and (names := os.listdir(f"/proc/{pid}/task/{task}/fdinfo")):
                return task, names
    except OSError:
        pass  # it has ended, or is none of our business
    return pid, []


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _groups(descriptors: list[_Descriptor]) -> list[list[_Descriptor]]:
    """Descriptors of one inode, by description. kcmp(2) orders them, so this is a sort."""
    if len(descriptors) < 2:
        return [descriptors] if descriptors else []
    ordered = sorted(descriptors, key=functools.cmp_to_key(_compare))
    return [[one for _, one in group] for _, group in groupby(enumerate(ordered), _Steps(ordered))]


class _Steps:
    """A key that changes where one description ends and the next begins."""

    def __init__(self, ordered: list[_Descriptor]) -> None:
        self._ordered = ordered
        self._steps = 0

    def __call__(self, item: tuple[int, _Descriptor]) -> int:
        at, descriptor = item
        if at and _compare(self._ordered[at - 1], descriptor):
            self._steps += 1
        return self._steps


def _compare(one: _Descriptor, other: _Descriptor) -> int:
    """-1, 0 (the same description), 1. Without kcmp all descriptors of a process count as one."""
    order = _libc.syscall(_KCMP, one.task, other.task, _KCMP_FILE, ctypes.c_ulong(one.fd), ctypes.c_ulong(other.fd))
    if order in (0, 1, 2):
        return (0, -1, 1)[order]
    return (one.pid > other.pid) - (one.pid < other.pid)


def _assign(descriptions: list[Description], groups: list[list[_Descriptor]]) -> dict[int, set[int]]:
    """Which processes have which description: first by the processes that are known to have had it, then by what is left."""
    answer: dict[int, set[int]] = {}
    claimed: set[int] = set()
    for one in descriptions:
        mine = [n for n, group in enumerate(groups) if _fits(one, group) and any(d.pid in one.known for d in group)]
        claimed.update(mine)
        answer[one.fh] = {d.pid for n in mine for d in groups[n]}
    for one in descriptions:
        if not answer[one.fh]:
            left = [group for n, group in enumerate(groups) if n not in claimed and _fits(one, group)]
            answer[one.fh] = {d.pid for group in left for d in group}
    return answer


def _fits(one: Description, group: list[_Descriptor]) -> bool:
    return group[0].mode == one.mode


# -- who is dying -----------------------------------------------------------------------------------------------------


def dying(files: Iterable[Description], device: str, mount_id: str) -> set[int]:
    """The handles of the descriptions that only dying processes have. `files`: all descriptions that the kernel has open of
    their inodes, so that those of others can be told apart. It reads /proc: for a thread.

    A descriptor can be passed on from a process that is looked at late to one that was looked at early; so one looks twice.
    """
    files = list(files)
    once = _dying(files, device, mount_id)
    return once & _dying(files, device, mount_id) if once else once


def _dying(files: list[Description], device: str, mount_id: str) -> set[int]:
    ending = {int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_dying(int(name))}
    if not ending:
        return ending
    inos: dict[int, list[Description]] = {}
    for one in files:
        one.known = {_process(task) for task in one.known}
        inos.setdefault(one.ino, []).append(one)
    found: dict[int, list[_Descriptor]] = {}
    for ino, descriptor in _descriptors(inos.keys(), device, mount_id):
        found.setdefault(ino, []).append(descriptor)
    answer: set[int] = set()
    for ino, descriptors in found.items():
        if not ending.isdisjoint(d.pid for d in descriptors) and all(map(_comparable, descriptors)):
            groups = _groups(descriptors)
            for one in inos[ino]:
                having = _may_have(one, inos[ino], groups)
                if having and having <= ending and not any(_unreadable(pid) for pid in one.known - ending):
                    answer.add(one.fh)
    return answer


def _may_have(one: Description, all_: list[Description], groups: list[list[_Descriptor]]) -> set[int]:
    """All processes that may have a description: those with descriptors that fit, and are not explained by other
    descriptions that the process is known to have had."""
    fitting = [group for group in groups if _fits(one, group)]
    seen = Counter(pid for group in fitting for pid in {d.pid for d in group})
    others = Counter(pid for other in all_ if other.fh != one.fh and other.mode == one.mode for pid in other.known)
    having: set[int] = set()
    for group in fitting:
        pids = {d.pid for d in group}
        if not pids.isdisjoint(one.known) or not any(others[pid] >= seen[pid] for pid in pids):
            having |= pids
    return having


def _is_dying(pid: int) -> bool:
    """Whether no thread of a process will run again: it exits, or has a SIGKILL that the kernel has not come to."""
    if not _ends(_read(pid, "stat")):
        return False
    return all(_ends(_read(pid, f"task/{task}/stat")) for task in _threads(pid))


def _ends(stat: str) -> bool:
    fields = stat.rpartition(")")[2].split()
    if len(fields) <= _SIGNALS:
        return True  # it has ended
    return bool(int(fields[_FLAGS]) & _PF_EXITING or int(fields[_SIGNALS]) & _SIGKILL)


def _comparable(one: _Descriptor) -> bool:
    """Whether kcmp(2) can tell it from others."""
    number = ctypes.c_ulong(one.fd)
    return bool(_libc.syscall(_KCMP, one.task, one.task, _KCMP_FILE, number, number) == 0)


def _unreadable(pid: int) -> bool:
    try:
        os.listdir(f"/proc/{pid}/fdinfo")
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _read(pid: int, what: str) -> str:
    try:
        with open(f"/proc/{pid}/{what}", encoding="utf-8", errors="surrogateescape") as text:
            return text.read()
    except OSError:
        return ""
