"""The random file-operation exerciser on the mount: 100,000 operations, from seeds that are printed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Maker
from tests.mount.exerciser import Exerciser, Mismatch
from tests.mount.harness import REPOSITORY, Mounted, eventually
from tests.mount.pinexerciser import PinExerciser

OPERATIONS = 25_000
SEEDS = (1, 2)


def fresh_seed() -> int:
    return int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))


@pytest.mark.slow
def test_four_at_once(make_mount: Maker) -> None:
    """100,000 operations by four processes at once, two from fixed and two from fresh seeds."""
    mounted = make_mount(watchdog_s=400)
    fresh = fresh_seed()
    print(f"DAXFS_TEST_SEED={fresh} runs the same again")
    running = []
    for number, seed in enumerate((*SEEDS, fresh, fresh + 1)):
        directory = mounted.path / f"exerciser-{number}"
        directory.mkdir()
        command = [sys.executable, "-m", "tests.mount.exerciser", str(directory)]
        command += ["--seed", str(seed), "--operations", str(OPERATIONS)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
    answers = [process.communicate()[0] for process in running]
    print("\n".join(answers))
    assert [process.returncode for process in running] == [0] * 4, "\n".join(answers)
    mounted.umount()
    mounted.fsck()
    mounted.mount()


def test_with_remounts(mount: Mounted) -> None:
    """The files are as the model has them after each of six remounts, with the page cache and without it in turn."""
    seed = fresh_seed()
    print(f"seed {seed}")
    modes = itertools.cycle(("dax=never", "dax=always"))
    exerciser = Exerciser(mount.fresh_directory(), seed, pause=lambda: mount.remount(next(modes)))
    exerciser.run(1800, pause_every=300)
    exerciser.close()


def test_with_the_page_cache(make_mount: Maker) -> None:
    mounted = make_mount(options="allow_other,dax=never")
    exerciser = Exerciser(mounted.fresh_directory(), 77)
    exerciser.run(5000)
    exerciser.close()


def test_with_and_without_the_hot_path(make_mount: Maker) -> None:
    """In turns, on one volume: what one has written the other one reads."""
    mounted = make_mount(options="allow_other,hotpath=on")
    at_first = mounted.free_at_mount
    turns = itertools.cycle(["hotpath=off", "hotpath=on"])
    exerciser = Exerciser(mounted.fresh_directory(), 77, pause=lambda: mounted.remount(next(turns)))
    exerciser.run(6000, pause_every=750)
    exerciser.close()
    free = eventually("all files are gone", lambda: (f := mounted.info()["free"]) >= at_first - 8 and f)
    assert free <= at_first, "more blocks are free than were at the start"


@pytest.mark.parametrize("block_size", ["16K", "64K"])
def test_larger_blocks(block_size: str, make_mount: Maker) -> None:
    mounted = make_mount(block_size=block_size)
    exerciser = Exerciser(mounted.fresh_directory(), 78)
    exerciser.run(4000)
    exerciser.close()


def test_notices_a_wrong_byte(tmp_path: Path) -> None:
    """The exerciser itself: one flipped byte in a file behind its back is found."""
    exerciser = Exerciser(tmp_path, 5)
    exerciser.run(200)
    victim = max(exerciser.subjects[:2], key=lambda subject: subject.size)
    while not victim.size:
        exerciser.write(victim)
    victim.unmap()
    fd = exerciser.handle(victim).fd
    os.pwrite(fd, bytes([os.pread(fd, 1, victim.size // 2)[0] ^ 1]), victim.size // 2)
    with pytest.raises(Mismatch, match="differ"):
        exerciser.check(victim)
    exerciser.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 0], ids=["fixed", "fresh"])
def test_with_pins(seed: int, make_mount: Maker) -> None:
    """S67's part that the mount delivers: calls, pins and device writes against one model, on a volume that is often full of
    busy blocks; at the end nothing is pinned, busy or lost."""
    seed = seed or fresh_seed()
    print(f"seed {seed} (DAXFS_TEST_SEED={seed} runs it again)")
    mounted = make_mount()
    exerciser = PinExerciser(str(mounted.fresh_directory()), seed)
    exerciser.run(10_000)
    exerciser.close()
    eventually("nothing is pinned or busy", lambda: not mounted.info()["busy"] and not mounted.info()["pinned"])
    eventually("all blocks are free", lambda: mounted.info()["free"] >= mounted.free_at_mount - 8)
