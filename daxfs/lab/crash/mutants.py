"""Proof of the explorer: daxfs with one thing wrong, which must be found.

Two kinds of mutant, by name in `MUTANTS`: each flush, fence and commit of the core left out in turn (`sites` finds them
in the source), and the seeded bugs of bugs.py. A site is known by the function it is in (the first fence there is
`journal.Journal.commit.fence1`), so that a line more or less does not matter; while it is left out, the medium asks
which line calls it. Production code does not change.

Sites that no crash can tell from the whole are in `EQUIVALENT`, each with its reason.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from daxfs import core
from daxfs.core import format, superblock
from daxfs.core.journal import Journal
from daxfs.errors import FsError
from daxfs.lab.crash import bugs, calls, making, repairs
from daxfs.lab.crash.bugs import Change, changed
from daxfs.lab.crash.explore import Explorer, Options, Tally
from daxfs.lab.crash.medium import RecordingPmem

_MEDIUM = {"flush": "flush", "fence": "fence", "store_word": "word"}  # methods of the medium -> kind of site


@dataclass(frozen=True)
class Site:
    """A call that makes something durable: in `file` (a full path), from `line` on."""

    name: str
    kind: str
    file: str
    line: int


@dataclass(frozen=True)
class Mutant:
    """`shape`: what is wrong, in a sentence; `workload`: the shortest sequence of calls known to show it."""

    name: str
    shape: str
    workload: tuple[str, ...]


# -- sites --


@cache
def sites() -> tuple[Site, ...]:
    """All flushes, fences, word stores and commits of the core, in the order of its files."""
    (directory,) = core.__path__
    found: list[Site] = []
    for path in sorted(Path(directory).rglob("*.py")):
        if path.name != "pmem.py":
            found += _sites_of(path, path.relative_to(directory).with_suffix("").parts)
    return tuple(found)


def _sites_of(path: Path, module: tuple[str, ...]) -> Iterator[Site]:
    counts: dict[str, int] = {}
    for function, node in _calls(ast.parse(path.read_text()), ()):
        kind = _kind(node)
        if kind:
            where = ".".join((*module, *function, kind))
            counts[where] = counts.get(where, 0) + 1
            yield Site(f"{where}{counts[where]}", kind, str(path), node.lineno)


def _calls(node: ast.AST, function: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    """All calls below a node with the names of the functions and classes they are in, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        inside = (*function, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from _calls(child, inside)


def _kind(node: ast.Call) -> str:
    """What kind of site a call is, "" if it is none."""
    called = ast.unparse(node.func)
    receiver, _, method = called.rpartition(".")
    if receiver.rpartition(".")[2] in ("pmem", "_pmem"):
        return _MEDIUM.get(method, "")
    return "commit" if called == "superblock.store" or called.endswith("journal.commit") or called == "store" else ""


def _left_out(site: Site) -> list[Change]:
    """The changes that make the call at a site do nothing."""

    def passing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_lineno == site.line and caller.f_code.co_filename == site.file:
                return None
            return real(*args, **kwargs)

        return call

    method = {kind: method for method, kind in _MEDIUM.items()}.get(site.kind)
    if method:
        return [(RecordingPmem, method, passing(vars(RecordingPmem)[method]))]
    store = passing(superblock.store)
    return [(superblock, "store", store), (format, "store", store), (Journal, "commit", passing(Journal.commit))]


MKFS = ("mkfs",)  # explored by making.py
REPAIR = "repair"  # and the name of a damage: explored by repairs.py
_USUAL = ("create",)
_WORKLOADS: dict[str, tuple[str, ...]] = {  # that reach a site, and show its loss if that can be seen
    "fileops._store.flush1": ("write_word",),
    "fileops._zero.flush1": ("write_hole",),
    "fileops._zero_run.flush1": ("pin", "zero"),
    "fileops.materialise.flush1": ("open_frag", "pin_frag"),
    "format.format_image.flush1": MKFS,
    "format.format_image.fence1": MKFS,
    "format.format_image.commit1": MKFS,
    "format.format_image.commit2": MKFS,
    "format._make_root.word1": MKFS,
    "fsck.batch.Batch.commit.commit1": (REPAIR, "link-count"),
    "fsck.blocks._settle.flush1": (REPAIR, "two-owners"),
    "fsck.regions._mend_transaction.flush1": (REPAIR, "journal-bit"),
    "fsck.regions._mend_transaction.fence1": (REPAIR, "journal-bit"),
    "fsck.regions.disarm.commit1": (REPAIR, "superblock"),
    "fsck.regions.disarm.commit2": (REPAIR, "superblock"),
    "fsck.regions.repair_journal.flush1": (REPAIR, "journal-header"),
    "fsck.regions.repair_journal.fence1": (REPAIR, "journal-header"),
    "fsck.regions.repair_journal.word1": (REPAIR, "journal-body"),
    "fsck.regions.repair_journal.flush2": (REPAIR, "journal-body"),
    "fsck.regions.repair_journal.fence2": (REPAIR, "journal-body"),
    "fsck.layers.Repair._ledger.flush1": (REPAIR, "ledger-in-a-file"),
    "fsck.layers.Repair._ledger.fence1": (REPAIR, "ledger-in-a-file"),
    "fsck.layers.Repair._ledger.commit1": (REPAIR, "ledger-in-a-file"),
    "fsck.layers.Repair._ledger.commit2": (REPAIR, "ledger-in-a-file"),
    "fsck.layers.Repair._holes.flush1": (REPAIR, "lost-chunk"),
    "fsck.layers.Repair._holes.fence1": (REPAIR, "lost-chunk"),
    "fsck.layers.Repair._snapshot.commit1": (REPAIR, "superblock"),
    "inode.Inode.touch_in_place.word1": ("read",),
    "inode.Inode.touch_in_place.flush1": ("read",),
    "inode.Inode.touch_in_place.fence1": ("read",),
    "journal.Journal.format.word1": MKFS,
    "journal.Journal.format.flush1": MKFS,
    "journal.Journal.format.fence1": MKFS,
    "ledger.Ledger.renew.commit1": ("pin",),
    "ledger.Ledger.insert.flush1": ("pin",),
    "ledger.Ledger.insert.fence1": ("pin",),
    "ledger.Ledger.void.word1": ("unpin_held",),
    "ledger.Ledger.void.flush1": ("unpin_held",),
    "ledger.Ledger.void.fence1": ("unpin_held",),
    "snapshot.store.flush1": ("remount",),
    "snapshot.store.fence1": ("remount",),
    "superblock.store.fence1": ("remount",),
    "transaction.Transaction.fresh.flush1": ("setxattr_chain",),
    "volume.Volume.close.commit1": ("remount",),
}

_VOLATILE = "pins end with the boot of the host: after a power cut nobody reads the entries of the boot before"
_COVERED = "mkfs flushes all regions once more, and fences, before it stores a superblock"
_AGAIN = "a crash before the next fence, which is not far, only means that the next repair does it again"
_ONE_COPY = "one store alone leaves a newest superblock that is right; the other one makes its copy right as well"
EQUIVALENT: dict[str, str] = {
    "fsck.regions._mend_transaction.flush1": "the transaction is applied at once, with its own flushes and fences",
    "fsck.regions._mend_transaction.fence1": "the transaction is applied at once, with its own flushes and fences",
    "fsck.regions.disarm.commit1": _ONE_COPY,
    "fsck.regions.disarm.commit2": _ONE_COPY,
    "fsck.layers.Repair._ledger.fence1": _AGAIN,
    "fsck.layers.Repair._ledger.commit1": _ONE_COPY,
    "fsck.layers.Repair._ledger.commit2": _ONE_COPY,
    "fsck.layers.Repair._holes.fence1": _AGAIN,
    "fsck.layers.Repair._snapshot.commit1": "a clean volume without a snapshot is scanned by the next mount",
    "format.format_image.fence1": "a superblock that is durable before the rest leads to checksums that fail: refused",
    "inode.Inode.touch_in_place.word1": "memory has no copy of times: one that is not stored never was, crash or not",
    "journal.Journal.format.word1": "the file is new, and the word is 0 already",
    "journal.Journal.format.flush1": _COVERED,
    "journal.Journal.format.fence1": _COVERED,
    "ledger.Ledger.insert.flush1": _VOLATILE,
    "ledger.Ledger.insert.fence1": _VOLATILE,
    "ledger.Ledger.void.flush1": _VOLATILE,
    "ledger.Ledger.void.fence1": _VOLATILE,
    "ledger.Ledger.renew.flush1": _VOLATILE,
    "ledger.Ledger.renew.fence1": _VOLATILE,
    "snapshot.store.flush1": "a snapshot that is not whole does not match its checksum: the next mount scans instead",
    "snapshot.store.fence1": "a snapshot that is not whole does not match its checksum: the next mount scans instead",
}


# -- all mutants --


def _mutants() -> dict[str, Mutant]:
    found = {bug.name: Mutant(bug.name, bug.shape, bug.workload) for bug in bugs.BUGS.values()}
    for site in sites():
        if site.name not in EQUIVALENT:
            shape = f"without the {site.kind} in {site.name.rpartition('.')[0]}"
            found[site.name] = Mutant(site.name, shape, workload_of(site.name))
    return found


def workload_of(name: str) -> tuple[str, ...]:
    """The workload of a mutant; of an equivalent one, a workload that reaches its site."""
    return bugs.BUGS[name].workload if name in bugs.BUGS else _WORKLOADS.get(name, _USUAL)


MUTANTS = _mutants()


_applying = threading.RLock()


@contextmanager
def applied(name: str) -> Iterator[None]:
    """daxfs with a mutant of `MUTANTS` (or a site of `EQUIVALENT`) in it, in this process, for one thread at a time; as
    it is if the name is empty. KeyError if there is none of this name."""
    if not name:
        yield
        return
    with _applying:
        calls.base_image()  # of the sound daxfs
        if name in bugs.BUGS:
            changes = bugs.BUGS[name].changes()
        else:
            changes = _left_out({site.name: site for site in sites()}[name])
        with changed(changes):
            yield


def is_of_calls(name: str) -> bool:
    """Whether the workload of a mutant is a sequence of calls, and not mkfs or a repair."""
    return set(workload_of(name)) <= set(calls.ALPHABET)


def hunt(name: str, options: Options | None = None) -> str:
    """Explore the workload of a mutant with the mutant applied: what is found, "" if nothing is."""
    options = options or Options()
    workload = workload_of(name)
    with applied(name):
        if workload == MKFS:
            return making.explore(options.domain, options.seed, options.limits)[1]
        if workload[0] == REPAIR:
            return repairs.explore(workload[1], options.domain, options.seed)[1]
        tally = Tally()
        try:
            Explorer(options).explore(workload, tally)
        except FsError as e:  # the sound daxfs raises none that is not an outcome
            return f"{'+'.join(workload)} fails: {e.why}"
    return tally.found[0].why if tally.found else ""
