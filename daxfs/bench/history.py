"""What earlier runs said: a file of one JSON line for each run, with its medians and ratios."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from daxfs.bench.result import Result

TREND_MAX = 10  # runs that a trend shows


def default_file() -> Path:
    import platformdirs

    return Path(platformdirs.user_state_dir("daxfs", appauthor=False)) / "bench.jsonl"


def entry(result: Result) -> dict[str, Any]:
    """The line of a run. Pins are in it by calls per second: more is better in every row that does not say `lower`."""
    rows: dict[str, dict[str, Any]] = {
        samples.row.name: {
            "unit": samples.row.unit,
            "lower": samples.row.lower,
            "median": {target: median for target in samples.values if (median := samples.median(target)) is not None},
            "spread": samples.spread(result.subject),
        }
        for samples in result.rows
        if samples.measured(result.subject)
    }
    for row in result.pins:
        if row.cells:
            pins = {"unit": "/s", "lower": False, "median": {result.subject: 1 / row.seconds}, "spread": 0.0}
            rows[f"pins: {row.name}"] = pins
    return {
        "time": result.time,
        "version": result.version,
        "subject": result.subject,
        "scale": result.scale,
        "noisy": bool(result.machine.complaints()),
        "rows": rows,
    }


def read(file: Path) -> list[dict[str, Any]]:
    """The runs, oldest first; lines that are no run are left out."""
    if not file.exists():
        return []
    runs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            run = json.loads(line)
        except ValueError:
            continue
        if isinstance(run, dict) and isinstance(run.get("rows"), dict):
            runs.append(run)
    return runs


def add(file: Path, result: Result) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry(result)) + "\n")


def last_of(runs: list[dict[str, Any]], now: dict[str, Any], row: str) -> dict[str, Any] | None:
    """The latest run that has this row, of the same subject, with as much work in a cell."""
    alike = (run for run in reversed(runs) if run["subject"] == now["subject"] and _work(run) == _work(now))
    return next((run for run in alike if row in run["rows"]), None)


def _work(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run["scale"].items() if name not in ("rounds", "seconds")}


def changes(runs: list[dict[str, Any]], result: Result) -> list[str]:
    """Rows whose median is further from that of the run before than both spread, one line each, the largest first."""
    now, found = entry(result), []
    for name, row in now["rows"].items():
        before = last_of(runs, now, name)
        if before is None:
            continue
        was, is_now = before["rows"][name]["median"].get(result.subject), row["median"][result.subject]
        if not was or not is_now:
            continue
        change, spread = is_now / was, row["spread"] + before["rows"][name]["spread"]
        if abs(change - 1) > max(spread, 0.1):
            when = before["time"][:16].replace("T", " ")
            found.append((abs(math.log(change)), f"{name}: {change:.2f}x the run of {when}"))
    return [text for _, text in sorted(found, reverse=True)]


def trend(runs: list[dict[str, Any]], only: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: the subject's medians in the last runs, oldest first."""
    from daxfs.bench.show import number

    shown = [run for run in runs if any(only in name for name in run["rows"])][-TREND_MAX:]
    names = list(dict.fromkeys(name for run in shown for name in run["rows"] if only in name))
    columns = ["row", *(f"{run['time'][5:16].replace('T', ' ')}{' (noisy)' if run['noisy'] else ''}" for run in shown)]
    rows = []
    for name in names:
        cells = [f"{name}, {next(run['rows'][name]['unit'] for run in shown if name in run['rows'])}"]
        for run in shown:
            median = run["rows"].get(name, {}).get("median", {}).get(run["subject"])
            cells.append(number(median) if median is not None else "-")
        rows.append(cells)
    return columns, rows
