"""What came of a campaign, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from daxfs.lab.crash.parallel import Campaign
from daxfs.lab.crash.reproduce import Violation

_SHOWN = 12


def as_json(campaign: Campaign, violations: Sequence[Violation]) -> dict[str, Any]:
    """`images` that were recovered and judged, `distinct` among them by content; per core: of a second of CPU time."""
    tally = campaign.tally
    return {
        "images": tally.images,
        "distinct": len(tally.digests),
        "images_per_s_per_core": round(per_core(campaign), 1),
        "workloads": tally.workloads,
        "violations": [
            {"workload": v.workload, "where": v.where, "why": v.why, "lines": list(v.lines), "command": v.command}
            for v in violations
        ],
        "seed": campaign.options.seed,
        "domain": campaign.options.domain,
        "seconds": round(campaign.seconds, 1),
        "cores": campaign.cores,
        "points": tally.points,
        "recoveries_crashed": tally.recoveries,
        "judged_alike": tally.shared,
        "redundant": [{"call": call, "what": what, "count": n} for (call, what), n in sorted(tally.redundant.items())],
    }


def per_core(campaign: Campaign) -> float:
    return campaign.tally.images / campaign.cpu_s if campaign.cpu_s else 0.0


def lines(campaign: Campaign, violations: Sequence[Violation]) -> Iterator[str]:
    """The report, line by line."""
    tally = campaign.tally
    for number, violation in enumerate(violations, 1):
        yield f"violation {number}: {violation}"
    more = len(tally.found) - len(violations)
    if more > 0:
        yield f"and {more} more violations"
    yield f"{tally.workloads} workloads, {tally.points} crash points, {len(tally.digests)} distinct images"
    cores = f"{campaign.cores} core{'s' * (campaign.cores > 1)}"
    yield (f"{tally.images} images recovered and judged in {campaign.seconds:.1f} s on {cores}, "
           f"{per_core(campaign):.0f} in a second of CPU time")  # fmt: skip
    share = tally.shared / tally.images if tally.images else 0
    yield f"{share:.0%} of them share the proof and use of another that agrees in all that these read"
    yield f"{tally.recoveries} different recoveries were crashed themselves"
    for what, plural in (("flush", "flushes"), ("fence", "fences")):
        calls = sorted(call for call, kind in tally.redundant if kind == what)
        if calls:
            yield f"{plural} that did nothing: {_some(calls)}"
    count = len(tally.found)
    options = campaign.options
    yield f"{count or 'no'} violation{'' if count == 1 else 's'} (domain {options.domain}, seed {options.seed})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more calls" if len(names) > _SHOWN else "")
