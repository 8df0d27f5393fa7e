"""Where the microseconds of a request go, in the daemon: python -m tools.request_profile [--row NAME] [--flame FILE]

Mounts daxfs, runs a row of the benchmark on it while perf takes samples of the daemon (`cpu-clock`, no hardware counters
needed), and divides what the row cost the daemon's CPU among the parts that a sample's stack names. User code is compiled
without frame pointers: of it only the leaf is known; stacks in the kernel are complete. Needs perf, fio, and root.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from daxfs.bench import rows, work
from daxfs.bench.peers import PEERS, Missing, program

SECONDS = 4.0
FREQUENCY = 4000
# The first pattern that a frame of the stack has (from the leaf outwards), of the first entry that has one, is the part.
PARTS: tuple[tuple[str, str], ...] = (
    ("kernel: waking the caller", r"try_to_wake_up|__wake_up|wake_up_q|ttwu_|swake_up|complete"),
    ("kernel: preempted, others want the CPU", r"exit_to_user_mode_loop|preempt_schedule|irqentry_exit"),
    ("kernel: sleeping until the next one: poll", r"^__schedule|^schedule\b|hrtimeout|do_sys_poll|ep_poll|do_epoll"),
    ("kernel: page faults", r"asm_exc_page_fault|handle_mm_fault|exc_page_fault"),
    ("kernel: taking the request: read(/dev/fuse)", r"fuse_dev_do_read|fuse_dev_read|ksys_read|vfs_read"),
    ("kernel: the answer: write(/dev/fuse)", r"fuse_dev_do_write|fuse_dev_write|do_writev|ksys_write|vfs_write"),
    ("kernel: other calls", r"\[kernel"),
    ("the hot path, in C", r"\bdx_|session\.cpython"),
    ("copying and flushing data", r"memcpy|memmove|memset|\bpersist"),
    ("clock", r"\[vdso\]|clock_gettime"),
    ("the core, compiled", r"daxfs/core/|(extents|runs|pins|pincounts|\w+)\.cpython"),
    ("libfuse, pyfuse3", r"libfuse3|pyfuse3|__init__\.cpython"),
    ("Python", r"python|libpython|_Py|Py[A-Z]"),
    ("libc and others", r""),
)
COMPILED = [(name, re.compile(pattern)) for name, pattern in PARTS]
_FRAME = re.compile(r"\s+[0-9a-f]+ (?P<symbol>.+?)(?:\+0x[0-9a-f]+)? \((?P<object>[^()]*(?:\([^()]*\))?)\)$")


@dataclass(frozen=True)
class Frame:
    symbol: str
    of: str  # the file that it is of

    @property
    def in_kernel(self) -> bool:
        return self.of.startswith("[kernel") or self.of.endswith("vmlinux")

    def __str__(self) -> str:
        return f"{self.symbol} {'[kernel' if self.in_kernel else self.of}"


Stack = tuple[Frame, ...]  # the leaf first


def stacks(script: str) -> Iterator[Stack]:
    """The samples that `perf script` printed."""
    frames: list[Frame] = []
    for line in [*script.splitlines(), ""]:
        match = _FRAME.match(line)
        if match:
            frames.append(Frame(match["symbol"], match["object"]))
        elif frames and not line.strip():
            yield tuple(frames)
            frames = []


def known(stack: Stack) -> Stack:
    """Its part that can be trusted: the leaf, and all of the kernel."""
    kernel = [frame for frame in stack if frame.in_kernel]
    return tuple(kernel) if kernel else stack[:1]


def part(stack: Stack) -> str:
    """Which entry of PARTS a sample belongs to."""
    texts = [str(frame) for frame in known(stack)]
    for name, pattern in COMPILED:
        kernel = texts[0].endswith("[kernel")
        if kernel == name.startswith("kernel:") and any(pattern.search(text) for text in texts):
            return name
    return PARTS[-1][0]


def record(row: rows.FioRow, seconds: float, peer_name: str) -> tuple[list[Stack], work.Cell]:
    perf = program("perf", "linux-perf")
    scale = replace(rows.FULL, seconds=seconds)
    kind = next(kind for kind in PEERS if kind.name == peer_name)
    with tempfile.TemporaryDirectory(prefix="daxfs-profile-", dir="/dev/shm") as scratch:
        peer, data = kind(Path(scratch), scale.data_bytes * 4), Path(scratch) / "perf.data"
        try:
            peer.start()
            work.lay_out_data(peer, scale)
            work.fio(peer, row, replace(scale, seconds=0.5))  # warm
            command = [perf, "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY), "-g", "-o", str(data)]
            command += ["-p", str(peer.server)]
            with subprocess.Popen([*command, "--", "sleep", str(seconds + 2)], stderr=subprocess.DEVNULL):
                cell = work.fio(peer, row, scale)
            script = subprocess.run(
                [perf, "script", "-F", "ip,sym,dso", "-i", str(data)], capture_output=True, text=True, check=True
            ).stdout
            return list(stacks(script)), cell
        finally:
            peer.end()


def table(samples: Sequence[Stack], cpu_us: float) -> list[tuple[str, float, float]]:
    """Parts, their µs of each request, their share; in the order of PARTS."""
    counts = Counter(part(stack) for stack in samples)
    return [(name, counts[name] / len(samples) * cpu_us, counts[name] / len(samples)) for name, _ in PARTS if counts[name]]


# A flame graph: what called is below, as wide as the samples that have it.

WIDTH, ROW, FONT, LEAST = 1000, 17, 11, 0.002
KERNEL_COLOUR, DAXFS_COLOUR, PYTHON_COLOUR, OTHER_COLOUR = "#f5b26b", "#6aa9f0", "#8fcf8f", "#d6c9e8"


def flame(samples: Sequence[Stack], title: str) -> str:
    """An SVG. Frames of less than LEAST of all samples are left out."""
    counts: Counter[tuple[Frame, ...]] = Counter()
    for stack in samples:
        path = known(stack)[::-1]
        for depth in range(1, len(path) + 1):
            counts[path[:depth]] += 1
    total = len(samples)
    seen = (path for path in counts if counts[path] >= LEAST * total)
    shown = sorted(seen, key=lambda path: [str(frame) for frame in path])
    depth = max(map(len, shown), default=0)
    height = ROW * (depth + 1) + 40
    places: dict[tuple[Frame, ...], float] = {}
    filled: defaultdict[tuple[Frame, ...], float] = defaultdict(float)
    parts = []
    for path in shown:
        above = path[:-1]
        x = places.get(above, 0.0) + filled[above]
        width = counts[path] / total * WIDTH
        places[path], filled[above] = x, filled[above] + width
        parts.append(_box(path[-1], x, height - ROW * (len(path) + 1), width, counts[path] / total))
    parts.append(_box(Frame("the daemon", ""), 0, height - ROW, WIDTH, 1.0))
    shape = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f"<svg xmlns=\"http://www.w3.org/2000/svg\" {shape} font-family=\"'DejaVu Sans', Verdana, sans-serif\">"
    name = f'<text x="4" y="20" font-size="14" font-weight="600">{escape(title)}</text>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>', name, *parts, "</svg>\n"])


def _box(frame: Frame, x: float, y: float, width: float, share: float) -> str:
    of = Path(frame.of).name
    colour = KERNEL_COLOUR if frame.in_kernel else DAXFS_COLOUR if "cpython" in of or not of else OTHER_COLOUR
    if "python" in of and "cpython" not in of:
        colour = PYTHON_COLOUR
    what = f"{frame.symbol} ({of}), {share:.1%}" if of and not frame.in_kernel else f"{frame.symbol}, {share:.1%}"
    letters = int(width / (FONT * 0.62)) - 1
    text = frame.symbol if len(frame.symbol) <= letters else f"{frame.symbol[: max(letters - 1, 0)]}…" if letters > 3 else ""
    label = f'<text x="{x + 3:.1f}" y="{y + ROW - 5}" font-size="{FONT}">{escape(text)}</text>' if text else ""
    box = f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{ROW - 1}" fill="{colour}" rx="1"/>'
    return f"<g><title>{escape(what)}</title>{box}{label}</g>"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--row", default="4k random read QD1", help="of the benchmark's rows of data")
    parser.add_argument("--server", default="daxfs", help="another one of its peers")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--flame", type=Path, metavar="FILE", help="draw a flame graph")
    args = parser.parse_args()
    row = next((row for row in rows.DATA_ROWS if row.name == args.row and not row.fresh), None)
    if row is None:
        parser.error("there is no such row; there are: " + ", ".join(row.name for row in rows.DATA_ROWS if not row.fresh))
    try:
        samples, cell = record(row, args.seconds, args.server)
    except Missing as why:
        print(f"request_profile: {why}", file=sys.stderr)
        return 1
    if not samples or cell.cpu_us is None:
        print("request_profile: perf has no samples of the server", file=sys.stderr)
        return 1
    print(f"{row.name}, {args.server}: {cell.value:,.0f} {row.unit}, {cell.cpu_us:.2f} µs of CPU for each request\n")
    print("| part | µs | share |\n| --- | ---: | ---: |")
    for name, us, share in table(samples, cell.cpu_us):
        print(f"| {name} | {us:.2f} | {share:.0%} |")
    if args.flame:
        args.flame.write_text(flame(samples, f"{args.server}, {row.name}: CPU of the server"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
