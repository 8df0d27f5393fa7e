"""`python -m tools.bench`: daxfs beside a null pyfuse3 file system, libfuse's passthrough_ll and fuse2fs, in one run.

All of them are mounted at once; every round goes through the rows, and every row through the peers, forwards and
backwards in turn, so that a slow minute of the machine hits all alike. Numbers and ratios are medians over the rounds.
Then come the rows of pins (pins.py), which have a mount of their own in each round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tools.bench import pins, work
from tools.bench.peers import PEERS, Missing, Peer
from tools.bench.report import Report, Row

TMPFS = Path("/dev/shm")
WIDTH = 150


def arguments() -> argparse.Namespace:
    example = "Example: python -m tools.bench --quick --json bench.json"
    parser = argparse.ArgumentParser(prog="bench", description="Measures daxfs beside its peers.", epilog=example)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    add("--quick", action="store_true", help="a minute instead of ten: shorter rows, two rounds")
    add("--rounds", type=int, metavar="N", help="rounds (default: 5, quick: 2)")
    add("--only", metavar="TEXT", help="only rows with TEXT in their name; those of pins are called `pins: ...`")
    add("--peers", metavar="NAMES", help="only these, separated by commas: " + ",".join(peer.name for peer in PEERS))
    add("--one-cpu", action="store_true", help="all on one CPU: leaves out what waking the other one costs")
    return parser.parse_args()


def start_peers(
    scratch: Path, wanted: set[str], scale: work.Scale, stack: contextlib.ExitStack
) -> tuple[list[Peer], dict[str, str]]:
    """Those that run here, mounted, with their data file laid out; and why the others do not."""
    started, missing = [], {}
    for kind in PEERS:
        if kind.name not in wanted:
            continue
        peer = kind(scratch, max(scale.data_bytes * 4, 256 << 20))
        stack.callback(peer.end)
        try:
            peer.start()
            work.lay_out(peer.mount, scale)
            started.append(peer)
        except (Missing, OSError) as error:
            missing[kind.name] = str(error)
            peer.end()
    return started, missing


def measure(
    peers: list[Peer], fio_rows: list[work.FioRow], scale: work.Scale, report: Report, progress: Progress
) -> None:
    by_name = {row.name: row for row in report.rows}
    names_wanted = any(name in by_name for name, _, _ in work.NAME_ROWS)
    task = progress.add_task("measuring", total=scale.rounds * len(peers) * (len(fio_rows) + names_wanted))
    for turn in range(scale.rounds):
        order = peers if turn % 2 == 0 else peers[::-1]
        for fio_row in fio_rows:
            row = by_name[fio_row.name]
            for peer in order:
                report.calibration_ms.append(work.calibrate())
                try:
                    value, latency = work.fio(peer.mount, fio_row, scale)
                    row.samples.setdefault(peer.name, []).append(value)
                    row.latency.setdefault(peer.name, []).append(latency)
                except (RuntimeError, OSError) as error:
                    row.failures[peer.name] = str(error)
                progress.advance(task)
        for peer in order if names_wanted else []:
            report.calibration_ms.append(work.calibrate())
            try:
                for name, value in work.names(peer.mount, scale):
                    if name in by_name:
                        by_name[name].samples.setdefault(peer.name, []).append(value)
            except OSError as error:
                by_name.get("create", report.rows[0]).failures[peer.name] = str(error)
            progress.advance(task)


def measure_pins(rows: pins.PinRows, rounds: int, scratch: Path, report: Report, progress: Progress) -> None:
    report.pins = rows.rows
    task = progress.add_task("measuring pins", total=rounds)
    for turn in range(rounds if rows.rows else 0):
        report.calibration_ms.append(work.calibrate())
        rows.measure(scratch / f"pins-{turn}")
        progress.advance(task)


def main() -> int:
    args = arguments()
    console = Console()
    console.width = max(console.width, WIDTH)  # a table in a file or a narrow window is cut by its reader, not by us
    scale = work.QUICK if args.quick else work.FULL
    if args.rounds:
        scale = work.Scale(scale.seconds, args.rounds, scale.data_bytes, scale.files)
    wanted = set(args.peers.split(",")) if args.peers else {peer.name for peer in PEERS}
    if unknown := wanted - {peer.name for peer in PEERS}:
        print(f"bench: unknown peer {', '.join(sorted(unknown))}: see --help", file=sys.stderr)
        return 2
    if args.one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stack below unwinds

    fio_rows = [row for row in work.fio_rows() if not args.only or args.only in row.name]
    if fio_rows and shutil.which("fio") is None:
        print("bench: fio is not installed: apt-get install fio", file=sys.stderr)
        return 1
    rows = [Row(row.name, row.kind, row.unit) for row in fio_rows]
    rows += [Row(name, kind, "/s") for name, kind, _ in work.NAME_ROWS if not args.only or args.only in name]
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="daxfs-bench-", dir=TMPFS if TMPFS.is_dir() else None))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        peers, missing = start_peers(scratch, wanted, scale, stack)
        report = Report(rows, [peer.name for peer in peers], missing, one_cpu=args.one_cpu)
        if not peers:
            print("bench: nothing to measure: " + "; ".join(missing.values()), file=sys.stderr)
            return 1
        stolen, ticks = work.cpu_times()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            if rows:
                measure(peers, fio_rows, scale, report, progress)
            if any(peer.name == "daxfs" for peer in peers):
                null = next((peer.mount / work.DATA for peer in peers if peer.name == "nullfs"), None)
                pin_rows = pins.PinRows(pins.QUICK if args.quick else pins.FULL, args.only or "", null)
                measure_pins(pin_rows, scale.rounds, scratch, report, progress)
        stolen_after, ticks_after = work.cpu_times()
        report.stolen = (stolen_after - stolen) / max(ticks_after - ticks, 1)
        report.memory = {peer.name: peer.memory() for peer in peers}
    report.show(console)
    if args.json:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
