"""docs/pins.md, client.md, verbs.md, cli.md, reliability.md, README: every program and command is run, and does as shown.

And what they say in tables is what the code says: policies, options, events, ioctls.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import uuid
from dataclasses import fields
from pathlib import Path

import pytest

from daxfs import abi
from daxfs.client import EventType
from daxfs.core import events, leases, pins, policy
from daxfs.daemon.coherence import COHERENCE_MS
from daxfs.lab.crash import bugs, mutants
from daxfs.lab.crash.calls import ALPHABET
from tests.client.hosts import why_no_ring
from tests.docs.page import Reader, agrees, blocks
from tests.faults.test_handlers import CASES as HANDLERS
from tests.hostile.classes import CLASSES
from tests.mount.harness import DAXFS, REPOSITORY, eventually, mounts_below
from tools import fuzz
from tools.fuzz_image import STATES

DOCS = REPOSITORY / "docs"
GUIDES = ("pins.md", "client.md", "verbs.md", "cli.md", "reliability.md")
PAGES = [*(DOCS / name for name in GUIDES), REPOSITORY / "README.md"]
PINS = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.mount
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_reader_sees_what_the_page_shows(page: Path, base: Path) -> None:
    home = base / f"reader-{uuid.uuid4().hex[:8]}"
    try:
        with Reader(home, skip=lambda command: "ring.py" in command and why_no_ring() is not None) as reader:
            reader.follow(page)
        assert not mounts_below(home), "the page ends with a mount"
        for image in home.rglob("*.img"):
            subprocess.run([*DAXFS, "fsck", image], check=True, stdout=subprocess.DEVNULL)
    finally:
        for point in mounts_below(home):
            subprocess.run(["umount", "--lazy", point], check=False)
        eventually("nothing is mounted", lambda: not mounts_below(home))
        shutil.rmtree(home)


def test_the_first_holder_has_twenty_lines() -> None:
    holder = next(block for block in blocks(DOCS / "client.md") if block.name)
    assert len([line for line in holder.text.splitlines()[1:] if line.strip()]) <= 20


def test_a_page_with_a_block_that_nobody_runs_is_refused(tmp_path: Path) -> None:
    for fence in ("python\nprint()\n", "sh\nls\n", "text\n$ ls\n", "console\nls\n", "\nls\n"):
        page = tmp_path / "page.md"
        page.write_text(f"Words.\n\n```{fence}```\n")
        with pytest.raises(AssertionError):
            list(blocks(page))


def test_what_agrees() -> None:
    assert agrees("id  pid\n 1  ...\n", "id pid\n1   755\n")
    assert not agrees("a\n", "a\nb\n")
    assert not agrees("a ... b\n", "a c\n")
    assert not agrees("", "a\n")


def table(text: str, head: str) -> dict[str, list[str]]:
    """A table of a page by its head: first column (without backquotes) -> the others."""
    found = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, f"no table with the head {head}"
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in found[1].splitlines()]
    return {re.sub(r"`([^`]*)`.*", r"\1", first): rest for first, *rest in rows}


def test_the_policies_on_the_page_are_those_of_the_code() -> None:
    shown = table(PINS, "policy | truncate | punch | end")
    assert list(shown) == list(policy.POLICIES)
    for name, outcomes in policy.POLICIES.items():
        assert shown[name] == [outcomes[operation].value for operation in policy.Operation], name
    assert f"`{policy.DEFAULT}` (default)" in PINS
    for outcome in policy.Outcome:
        assert f"\n- *{outcome.value}*: " in PINS
    verbs = (DOCS / "verbs.md").read_text(encoding="utf-8")
    assert list(table(verbs, "policy | truncate or punch under an MR")) == list(shown)


def test_the_options_on_the_page_have_these_defaults() -> None:
    defaults = {name: default.strip("`") for name, (default, _) in table(PINS, "option | default").items()}
    for field in fields(policy.Settings):
        value = defaults.pop(field.name)
        assert (float(value) if isinstance(field.default, int | float) else value) == field.default, field.name
    assert defaults == {"coherence_ms": str(COHERENCE_MS)}
    for word in (*policy.LONGTERM, *policy.LEASE_THEN):
        assert f"`{word}`" in PINS


def test_the_ioctls_on_the_page_are_those_of_the_abi() -> None:
    assert set(table(PINS, "ioctl | in")) == {name for name in vars(abi) if re.match(r"IOC_(?!TYPE|SIZE_MAX)", name)}


def test_the_events_on_the_page_are_those_of_the_abi() -> None:
    assert list(table(PINS, "event | who gets it")) == [event.name for event in EventType]


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    shown = table(PINS, "of | at most")
    numbers = {what: [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", cells[0])] for what, cells in shown.items()}
    assert numbers["pins of an open file"] == [pins.PINS_PER_OWNER_MAX]
    assert numbers["pins and pinned extents of a process"][:2] == [pins.PIECES_PER_PROCESS_MAX, pins.PIECES_PER_PIN]
    assert numbers["the same of all processes"] == [pins.PIECES_MAX]
    assert numbers["leases of an open file, of all"] == [leases.LEASES_PER_OWNER_MAX, leases.LEASES_MAX]
    assert numbers["events in a queue"] == [events.EVENTS_PER_OWNER_MAX]
    assert numbers["bytes in a label"] == [abi.LABEL.size - 8]


def test_the_tests_that_the_pages_name_are_there() -> None:
    """`pytest FILES -k WORDS`: the files are there, and have tests of which the words are true."""
    found = 0
    for name in ("reliability.md", "fsck.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        for files, _, words in re.findall(r"pytest ((tests/[\w./]+ ?)+)(?:-k ([\w ]+|\"[\w ]+\"))?`", text):
            paths = [REPOSITORY / file for file in files.split()]
            assert all(path.exists() for path in paths), files
            tests = [test for path in paths if path.is_file() for test in re.findall(r"def (test_\w+)", path.read_text())]
            for word in words.strip('"').split(" or ") if words else []:
                assert any(word in test for test in tests), f"{name}: no test in {files} has {word}"
            found += 1
    assert found > 15


def test_the_figures_of_the_page_on_reliability() -> None:
    """Those that the code has."""
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    bits = sum(8 * length for state in STATES for _, length in fuzz.seed_image(state).metadata)
    cases = sum(len(states) for states, _, _ in CLASSES.values())
    for words in (
        f"all {len(ALPHABET)} calls", f"of {len(ALPHABET) ** 2:,} pairs", f"{len(mutants.sites())} flushes",
        f"{len(mutants.MUTANTS)} of these mutants", f"{len(mutants.EQUIVALENT)} cannot be told", f"{len(bugs.BUGS)}\nbugs",
        f"{len(CLASSES)} classes", f"{cases} images", f"{bits:,}", f"{len(HANDLERS)} handlers and ioctls",
    ):  # fmt: skip
        assert words in text, words
