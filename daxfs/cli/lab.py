"""`daxfs lab`: what the lab explores by itself; so far, crashes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated

import typer

from daxfs.cli.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from daxfs.lab.crash.explore import Options
    from daxfs.lab.crash.parallel import Campaign

_REPRODUCED_MAX = 3  # violations that are made small; the others are counted
_SECONDS = 60
_WORKLOADS = "1,2,3,generated"


def crash(
    seconds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="For how long.", show_default=f"{_SECONDS}, or until --images")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Until so many distinct images were seen.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="To repeat a run.", show_default="random")] = None,
    domain: Annotated[
        str, typer.Option(metavar="DOMAIN", help="What is lost: adr (all that is in caches), eadr (nothing).")
    ] = "adr",
    workloads: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Which, with commas: 1, 2 (all of one, two calls), 3 (a sample), generated, or calls joined by +.",
            show_default=_WORKLOADS,
        ),
    ] = None,
    mutant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put this fault into daxfs, and see it found; list shows them all.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, metavar="N", help="So many processes.", show_default="all")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on the workers of this Dask scheduler.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Cut the power at every fence and every return of many short workloads, recover all that can be left, and judge it.

    An image is mounted, compared with what was acknowledged, proven by fsck and the volume's own check, used, mounted again,
    and crashed while it is recovered. A violation is printed with the shortest workload and the fewest cache lines that
    show it, and the command that finds it again. JSON has images, distinct, images_per_s_per_core, workloads, violations,
    seed, and more. The exit code is 1 if anything was found.
    """
    from daxfs.errors import BadArgument
    from daxfs.lab.crash import mutants, parallel, report
    from daxfs.lab.crash.explore import Explorer, Options
    from daxfs.lab.crash.images import DOMAINS
    from daxfs.lab.crash.reproduce import reproduce

    if domain not in DOMAINS:
        raise BadArgument(f"{domain} is not a persistence domain; take one of: {', '.join(DOMAINS)}")
    if mutant == "list":
        _list_mutants(json)
        return 0
    if mutant is not None and mutant not in mutants.MUTANTS:
        raise BadArgument(f"there is no mutant {mutant}; see: daxfs lab crash --mutant list")
    options = Options(domain, random.randrange(1 << 32) if seed is None else seed, mutant or "")
    if mutant is not None and workloads is None:
        if not mutants.is_of_calls(mutant):
            return _hunt(options, json)
        workloads = "+".join(mutants.workload_of(mutant))
    wanted = [name.strip() for name in (workloads or _WORKLOADS).split(",") if name.strip()]
    if seconds is None and images is None:
        seconds = _SECONDS
    limit = parallel.Limit(seconds, images)
    with progress_bar() as bar:

        def progress(campaign: Campaign) -> None:
            if bar is not None:
                distinct = len(campaign.tally.digests)
                found = f", {len(campaign.tally.found)} violations" if campaign.tally.found else ""
                share = (distinct, images) if images else (min(int(campaign.seconds), seconds or 0), seconds or 0)
                bar(f"{distinct} images{found}", *share)

        tasks = parallel.tasks(wanted, options.seed)
        campaign = parallel.run(options, tasks, limit, scheduler=scheduler, cores=cores, progress=progress)
        with mutants.applied(options.mutant):
            some = campaign.tally.found[:_REPRODUCED_MAX]
            violations = list(dict.fromkeys(reproduce(found, Explorer(options)) for found in some))
    if json:
        print_json(report.as_json(campaign, violations))
    else:
        for line in report.lines(campaign, violations):
            print(line)
    return 1 if violations else 0


def _list_mutants(json: bool) -> None:
    from daxfs.lab.crash.mutants import MUTANTS

    if json:
        print_json([{"name": m.name, "shape": m.shape, "workload": list(m.workload)} for m in MUTANTS.values()])
    else:
        rows = ((m.name, m.shape, "+".join(m.workload)) for m in MUTANTS.values())
        print_table(("name", "what is wrong", "shown by"), rows, left=("name", "what is wrong", "shown by"))


def _hunt(options: Options, json: bool) -> int:
    """A mutant of mkfs or of a repair, which are explored as a whole."""
    from daxfs.lab.crash.mutants import hunt, workload_of

    why = hunt(options.mutant, options)
    what = " ".join(workload_of(options.mutant))
    if json:
        print_json({"workload": what, "violations": [{"why": why}] if why else [], "seed": options.seed})
    else:
        print(f"violation: {what}: {why}" if why else f"no violation of {what} (seed {options.seed})")
    return 1 if why else 0
