"""A campaign: which workloads are explored, on all cores of this machine or on a Dask scheduler, for how long.

Work goes out in small batches; each comes back as a tally, and tallies add up. A worker keeps one explorer, with what it
knows, for all its batches; what is explored, and found, depends on the seed and not on who explores it (but the same image
may be recovered by two workers: `distinct` counts it once).

Not here: what happens to one workload (explore.py), and how a tally reads (report.py).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from daxfs.errors import BadArgument, NotSupported
from daxfs.lab.crash import sequences
from daxfs.lab.crash.calls import ALPHABET
from daxfs.lab.crash.explore import Explorer, Options, Tally, Workload
from daxfs.lab.crash.mutants import applied

SETS = ("1", "2", "3", "generated")
BATCH = 4
FOUND_MAX = 10  # so many violations end a campaign
DASK_TIMEOUT = "10s"  # to reach a scheduler
_AHEAD = 2  # batches that wait for each worker

Task = tuple[Workload, int]  # and the first call whose crashes are explored: shorter workloads have those before


@dataclass
class Campaign:
    """What came of it. `seconds` of wall time on `cores` cores; `cpu_s` of work."""

    options: Options
    cores: int = 1
    seconds: float = 0.0
    cpu_s: float = 0.0
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Limit:
    """When it ends, if not for want of workloads: after so many seconds, or with so many distinct images."""

    seconds: float | None = None
    images: int | None = None


def tasks(wanted: Sequence[str], seed: int) -> Iterator[Task]:
    """The workloads of some sets, and those given by name: "1" or "2" (all of so many calls), "3" (a sample), "generated"
    (longer ones, without end), or calls joined by +. BadArgument if there is none of a name."""
    if not wanted:
        raise BadArgument(f"no workloads; name some: {', '.join(SETS)}, or calls joined by +")
    unknown = [call for name in wanted if name not in SETS for call in name.split("+") if call not in ALPHABET]
    if unknown:
        sets = ", ".join(SETS)
        raise BadArgument(f"{unknown[0]!r} is no call and no set of workloads ({sets}); calls: {' '.join(ALPHABET)}")
    found = {
        "1": ((workload, 0) for workload in sequences.exhaustive(1)),
        "2": ((workload, 1) for workload in sequences.exhaustive(2)),
        "3": ((workload, 2) for workload in sequences.sampled(sequences.SAMPLED_LENGTH, sequences.SAMPLED, seed)),
        "generated": ((workload, 2) for workload in sequences.generated(seed)),
    }
    return chain.from_iterable(found[name] if name in SETS else [(tuple(name.split("+")), 0)] for name in wanted)


# -- in a worker --

_mine = threading.local()


def work(options: Options, batch: Sequence[Task], until: float) -> tuple[Tally, float]:
    """Explore some workloads, as long as it is not `until` (s since 1970); the tally, and the CPU seconds it took."""
    begin = time.thread_time()
    tally = Tally()
    with applied(options.mutant):
        if getattr(_mine, "options", None) != options:
            _mine.options, _mine.explorer = options, Explorer(options)
        for workload, first in batch:
            if time.time() < until:
                _mine.explorer.explore(workload, tally, first, until)
    return tally, time.thread_time() - begin


# -- in charge --


def run(options: Options, wanted: Iterable[Task], limit: Limit = Limit(), *, scheduler: str | None = None,
        cores: int | None = None, progress: Callable[[Campaign], None] = lambda _: None) -> Campaign:  # fmt: skip
    """Explore until the workloads, the time or the images come to an end, or too much is found."""
    begin = time.monotonic()
    until = time.time() + limit.seconds if limit.seconds is not None else math.inf
    campaign = Campaign(options)
    source = iter(wanted)
    batches = iter(lambda: list(islice(source, BATCH)), [])
    running: set[Future[tuple[Tally, float]]] = set()
    with _workers(scheduler, cores) as (executor, count):
        campaign.cores = count
        while True:
            while len(running) < count * _AHEAD and not over(campaign, limit) and (batch := next(batches, None)):
                running.add(executor.submit(work, options, batch, until))
            if not running:
                break
            done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for one in done:
                tally, cpu_s = one.result()
                campaign.tally.add(tally)
                campaign.cpu_s += cpu_s
            campaign.seconds = time.monotonic() - begin
            progress(campaign)
            if over(campaign, limit):
                running = {one for one in running if not one.cancel()}
    return campaign


def over(campaign: Campaign, limit: Limit) -> bool:
    """Whether it has come to its end, if it is not the end of its workloads."""
    tally = campaign.tally
    return (
        (limit.seconds is not None and campaign.seconds >= limit.seconds)
        or (limit.images is not None and len(tally.digests) >= limit.images)
        or len(tally.found) >= FOUND_MAX
    )


@contextmanager
def _workers(scheduler: str | None, cores: int | None) -> Iterator[tuple[Executor, int]]:
    """Who works, and how many they are."""
    if scheduler is None:
        count = cores or len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            yield pool, count
        return
    with _dask(scheduler) as client:
        count = sum(client.nthreads().values())
        if not count:
            raise BadArgument(f"the scheduler {scheduler} has no workers; start some with: dask worker {scheduler}")
        with client.get_executor(pure=False) as executor:
            yield executor, count


def _dask(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise NotSupported("--scheduler needs Dask, which is not installed: pip install distributed") from None
    try:
        return Client(scheduler, timeout=DASK_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as e:
        raise BadArgument(f"there is no Dask scheduler at {scheduler}: {e}") from None
