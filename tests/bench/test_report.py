"""What is made of samples: ratios, verdicts, tables, the picture, the history; on runs that are made up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from daxfs.bench import history, plot, show, work
from daxfs.bench.machine import Machine, cpu_seconds
from daxfs.bench.peers import PEERS
from daxfs.bench.pins import Cell as PinCell
from daxfs.bench.pins import PinRow
from daxfs.bench.result import Result, Samples
from daxfs.bench.rows import CPU_ROWS, DATA_ROWS, FULL, LIST_ROWS, NAME_ROWS, QUICK, ROWS, Goal, Row
from daxfs.cli.app import run
from tools import bench_page

SVG = "{http://www.w3.org/2000/svg}"
CALM = Machine(calibration_ms=[1.0, 1.01, 1.0])


def a_run(time: str = "2026-01-02T03:04:05+00:00", ours: float = 300.0) -> Result:
    reads = Row("4k read", "data", "IOPS", (Goal("minimal_ll", 1.4), Goal("fuse2fs", 4.0), Goal("absent", 1.0)))
    cpu = Row("cpu: 4k read", "cpu", "µs", (Goal("minimal_ll", 1.5),), lower=True)
    theirs: dict[str, list[float | None]] = {"minimal_ll": [200.0, 100.0, 150.0], "fuse2fs": [100.0, None, 100.0]}
    rows = [
        Samples(reads, {"daxfs": [ours, ours * 2, ours], **theirs}),
        Samples(cpu, {"daxfs": [6.0, 6.0, 6.0], "minimal_ll": [4.0, 5.0, 3.0]}),
        Samples(Row("create", "names", "/s"), {"daxfs": [10.0, 10.0, 10.0], "fuse2fs": [None, None, None]}),
    ]
    rows[2].failures["fuse2fs"] = "create: <No> space & time"
    pins = [
        PinRow("load 4k", "memcpy", least_per_s=1e6, cells=[PinCell(1e-7, 1e-7)] * 3),
        PinRow("PIN+UNPIN", "two empty ioctls", 1.2, cells=[PinCell(3e-5, 2e-5)] * 3),
        PinRow("free", stall_most=0.01, extents=10, cells=[PinCell(1e-3, stall=0.002)] * 3),
    ]
    targets = ["daxfs", "minimal_ll", "fuse2fs"]
    memory = {"daxfs": {"resident": 1 << 20, "peak": 1 << 20, "anonymous": 1 << 20, "file": 0, "shared": 0}}
    missing, scale, notes = {"ntfs-3g": "not installed"}, {"rounds": 3}, ["somebody lists less"]
    return Result(
        "daxfs", targets, rows, pins, missing, memory, CALM, time=time, version="1", scale=scale, notes=notes
    )  # fmt: skip


def text_of(result: Result) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nobody reads it
    show.draw(result, console)
    console.file.close()
    return console.export_text()


def test_ratios_are_of_the_rounds_and_goals_follow() -> None:
    result = a_run()
    reads, cpu, create = result.rows
    assert reads.ratio("daxfs", "minimal_ll") == 2.0  # of 1.5, 6, 2
    assert reads.ratio("daxfs", "fuse2fs") == 3.0  # the round that failed does not count
    assert reads.ratio("daxfs", "absent") is None
    assert reads.median("daxfs") == 300
    assert reads.spread("daxfs") == 0.5
    assert create.median("fuse2fs") is None
    verdicts = {(verdict.row, verdict.peer): verdict.met for verdict in result.verdicts()}
    assert verdicts == {
        ("4k read", "minimal_ll"): True,
        ("4k read", "fuse2fs"): False,
        ("cpu: 4k read", "minimal_ll"): True,  # 1.5 is at most 1.5
    }
    assert cpu.ratio("daxfs", "minimal_ll") == 1.5
    assert result.goals_met() == (4, 6)
    assert replace(result, is_daxfs=False).verdicts() == []  # the goals are daxfs'
    assert [samples.row.name for samples in result.filtered("cpu").rows] == ["cpu: 4k read"]


def test_a_run_survives_json() -> None:
    result = a_run()
    again = Result.from_dict(json.loads(json.dumps(result.as_dict())))
    assert again.as_dict() == result.as_dict()
    assert text_of(again) == text_of(result)
    for broken in ({}, {"format": 99}, result.as_dict() | {"rows": 3}, result.as_dict() | {"machine": None}):
        with pytest.raises(ValueError, match=r"format|not the JSON"):
            Result.from_dict(broken)


def test_the_table_says_it_all() -> None:
    text = text_of(a_run())
    for said in ("2.00x ≥1.4 ✓", "3.00x ≥4 ✗", "1.50x ≤1.5 ✓", "300 ±50%", "goals: 4 of 6 met", "somebody lists less",
                 "missed: 4k read: 3.00x fuse2fs, goal at least 4x", "not measured: ntfs-3g: not installed",
                 "failed: create on fuse2fs", "at least 1,000,000/s ✓", "1.50x two empty ioctls"):  # fmt: skip
        assert said in text, said
    assert "noisy" not in text
    loud = replace(a_run(), machine=Machine([1.0, 2.0, 1.0, 3.0], stolen=0.2, others=1.5, cpus=2))
    assert text_of(loud).count("noisy:") == 3


def test_the_page_has_the_same() -> None:
    lines = show.markdown(a_run()).splitlines()
    assert "| 4k read, IOPS | 300 | 150<br>2.00x ≥1.4 ✓ | 100<br>**3.00x ≥4 ✗** |" in lines
    assert "| create, /s | 10.0 | - | - |" in lines
    for line in lines:
        if line.startswith("| ---"):
            above = lines[lines.index(line) - 1]
            assert line.count("|") == above.count("|")
    assert any(line.startswith("Goals: 4 of 6 met") for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1, "0.10"), (9.99, "9.99"), (99.94, "99.9"), (947, "947"), (999.6, "1.00k"), (22310, "22.3k"), (1.25e6, "1.25M")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert show.number(value) == text


def test_the_picture_is_well_formed() -> None:
    root = ElementTree.fromstring(plot.svg(a_run()))
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    for said in ("4k read", "create", "PIN+UNPIN", "daxfs beside its peers", "4 of 6 goals met", "minimal_ll"):
        assert said in texts, said
    titles = ["".join(element.itertext()) for element in root.iter(f"{SVG}title")]
    assert "goal: at least 1.4x minimal_ll; it is 2.00x" in titles
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter(f"{SVG}rect"):
        x, y = float(element.attrib.get("x", 0)), float(element.attrib.get("y", 0))
        assert x + float(element.attrib["width"]) <= width
        assert y + float(element.attrib["height"]) <= height
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width
        assert float(element.attrib["y"]) <= height
    ElementTree.fromstring(plot.svg(replace(a_run(), rows=[], pins=[])))
    evil = Samples(Row("<a> & b", "data", "/s"), {"daxfs": [0.0]})
    ElementTree.fromstring(plot.svg(replace(a_run(), rows=[evil], subject="/mnt/<x>", targets=["/mnt/<x>"])))


def test_the_history_knows_what_changed(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "history"
    assert history.read(file) == []
    history.add(file, a_run())
    with file.open("a") as lines:
        lines.write("half a li\n[]\n")
    history.add(file, a_run("2026-01-03T03:04:05+00:00", ours=310.0))
    runs = history.read(file)
    assert [run["time"][:10] for run in runs] == ["2026-01-02", "2026-01-03"]
    assert history.changes(runs, a_run(ours=320.0)) == []  # within the spread
    assert history.changes(runs, a_run(ours=1000.0)) == ["4k read: 3.23x the run of 2026-01-03 03:04"]
    columns, rows = history.trend(runs, "read")
    assert columns == ["row", "01-02 03:04", "01-03 03:04"]
    assert ["4k read, IOPS", "300", "310"] in rows
    assert all("read" in row[0] for row in rows)


def test_what_the_tools_print_is_understood() -> None:
    side = {"iops": 1000.5, "bw_bytes": 3 << 20, "total_ios": 500, "clat_ns": {"percentile": {"50.000000": 9000}}}
    output = "fio: a warning\n" + json.dumps({"jobs": [{"read": side, "write": {}}]})
    by_name = {row.name: row for row in DATA_ROWS}
    cell = work.parse_fio(output, by_name["4k random read QD1"], 0.005)
    assert (cell.value, cell.cpu_us) == (1000.5, pytest.approx(10))
    assert cell.latency == {"p50_us": 9.0, "p99_us": 0.0}
    assert work.parse_fio(output, by_name["1M sequential read"], None).value == 3.0
    cells = work.parse_names("create\t100\t1000000000\t5000000\nstat, repeated\t10\t1000\t0\n")
    assert cells["create"] == work.Cell(100.0, 50.0)
    assert cells["stat, repeated"].cpu_us is None


def test_the_rows_are_named_once_and_their_goals_are_of_peers() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert list(ROWS) == [*DATA_ROWS, *NAME_ROWS, *LIST_ROWS, *CPU_ROWS]
    peers = {kind.name for kind in PEERS}
    assert {goal.peer for row in ROWS for goal in row.goals} <= peers - {"daxfs"}
    assert QUICK.rounds < FULL.rounds
    assert QUICK.seconds < FULL.seconds
    assert set(names) >= {row.cpu for row in DATA_ROWS if row.cpu}


def test_cpu_time_is_of_all_threads_and_of_nobody_else() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) - before < 0.02:
        pass
    assert cpu_seconds(os.getpid()) >= sum(os.times()[:2]) - 0.05
    with pytest.raises(ProcessLookupError):
        cpu_seconds(1 << 22)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--peers nobody", 2, "there is no peer nobody"),
        ("--only nothing-is-called-so", 2, "no row has"),
        ("--rounds 0", 2, "rounds"),
        ("/no/such/directory", 1, "is not a directory"),
        ("--from /no/such/file", 1, "No such file"),
        ("--from {page}", 1, "not the JSON of a run"),
        ("--trend --history /no/such/file", 1, "there is no history"),
    ],
)
def test_mistakes_are_one_line(
    line: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page"
    page.write_text("{}")
    assert run(["bench", *line.format(page=page).split()]) == code
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_saved_run_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, picture = tmp_path / "run.json", tmp_path / "run.svg"
    saved.write_text(json.dumps(a_run().as_dict()))
    assert run(["bench", "--from", str(saved), "--markdown", "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == show.markdown(a_run())
    ElementTree.parse(picture)
    assert run(["bench", "--from", str(saved), "--only", "create"]) == 0
    out = capsys.readouterr().out
    assert "create" in out
    assert "4k read" not in out


def test_a_run_goes_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, saved, profile = tmp_path / "performance.md", tmp_path / "run.json", tmp_path / "profile"
    page.write_text(bench_page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    saved.write_text(json.dumps(a_run().as_dict()))
    profile.write_text("| part | µs |\n")
    for _ in range(2):  # the second run takes the place of the first
        monkeypatch.setattr("sys.argv", ["bench_page", str(saved), "--page", str(page), "--profile", str(profile)])
        assert bench_page.main() == 0
    text = page.read_text(encoding="utf-8")
    assert text.count(show.markdown(a_run()).strip()) == 1
    assert text.count("| part | µs |\n") == 1
    shown = sorted(path.name for path in (tmp_path / "img").iterdir())
    assert shown == ["bench-cpu.svg", "bench-data.svg", "bench-names.svg", "bench-pins.svg"]
    assert all(f"](img/{name})" in text for name in shown)
    page.write_text("no marks")
    assert bench_page.main() == 1
