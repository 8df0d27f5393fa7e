"""Pins through the mount under policy `busy`: truncate, punch, unlink and rename of pinned files by ordinary system calls,
with holders in other processes that map the image. The numbers are those of the scenario catalogue (S1 ... S50)."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from daxfs import abi, client
from tests.mount import syscalls
from tests.mount.harness import eventually
from tests.mount.pincase import BLOCK, DATA, PUNCH, Case, fallocate, pattern

# -- truncate ---------------------------------------------------------------------------------------------------------


def test_s1_truncate_succeeds_at_once_and_the_holder_keeps_its_block(case: Case) -> None:
    before = case.info()["free"]
    held = case.p.pin(case.a, 0, 1)
    began = time.monotonic()
    os.truncate(case.a, 0)
    assert time.monotonic() - began < 0.5
    assert os.stat(case.a).st_size == 0
    assert case.a.read_bytes() == b""
    assert case.p.read() == pattern(0)
    assert case.busy() == [tuple(held["runs"][0])]
    assert case.info()["free"] == before + 7
    case.p("unpin")
    case.settled(before + 8)


def test_s1_the_pin_is_of_the_blocks_that_the_file_has(case: Case) -> None:
    held = case.p.pin(case.a, 2, 3)
    with client.open(case.a) as file:
        (extent,) = [e for e in file.extents() if e.logical <= 2 < e.logical + e.count]
    assert held["runs"] == [[extent.physical + 2 - extent.logical, 3]]
    assert case.image(held["runs"][0][0], 3) == DATA[2 * BLOCK : 5 * BLOCK]
    (listed,) = client.pins(case.mount.path)
    assert listed["id"] == held["id"]
    assert listed["pid"] == case.p.pid
    assert listed["path"] == str(case.a)
    assert (listed["ino"], listed["offset"], listed["length"]) == (os.stat(case.a).st_ino, 2 * BLOCK, 3 * BLOCK)
    assert listed["runs"] == held["runs"]
    assert listed["age_s"] >= 0
    assert "FOLL_PIN" in listed["flags"]


def test_s2_a_busy_block_is_never_given_to_anyone(small: Case) -> None:
    held = small.p.pin(small.a, 0, 1)
    block = held["runs"][0][0]
    os.truncate(small.a, 0)
    filler = small.fill()
    assert block not in small.blocks_of(filler)
    assert small.p.read() == pattern(0)
    with pytest.raises(OSError, match="No space"):
        (small.mount.path / "more").write_bytes(b"x" * BLOCK * 3)
    free = small.info()["free"]
    small.p("unpin")
    small.settled(free + 1)
    with open(filler, "ab", buffering=0) as file:
        assert file.write(b"x" * BLOCK) == BLOCK, "one more block can be had"
        with pytest.raises(OSError, match="No space"):
            file.write(b"x" * BLOCK)


def test_s3_a_holder_that_writes_on_changes_no_other_file(small: Case) -> None:
    others = {small.mount.path / f"other-{n}": pattern(n, 5) * 3 for n in range(20)}
    for path, data in others.items():
        path.write_bytes(data)
    held = small.p.pin(small.a, 0, 8, write=True)
    small.p("stream", pin=0, byte=0xA5)
    os.truncate(small.a, 0)
    for n in range(20):
        (small.mount.path / f"new-{n}").write_bytes(pattern(n, 6) * 2)
        others[small.mount.path / f"new-{n}"] = pattern(n, 6) * 2
    small.a.write_bytes(DATA)
    filler = small.fill()
    time.sleep(0.2)
    seen = small.p("stop")
    assert seen["foreign"] == 0
    assert seen["passes"] > 0
    assert {path: path.read_bytes() for path in others} == others
    assert small.a.read_bytes() == DATA
    assert set(filler.read_bytes()) == {0xEE}
    start, count = held["runs"][0]
    assert not {*range(start, start + count)} & small.blocks_of(filler)
    assert small.p.read(length=8 * BLOCK) == b"\xa5" * 8 * BLOCK


def test_s4_truncate_frees_only_behind_the_pin(case: Case) -> None:
    before = case.info()["free"]
    case.p.pin(case.a, 2, 1)
    os.truncate(case.a, 5 * BLOCK)
    assert case.busy() == []
    assert case.info()["free"] == before + 3
    assert case.a.read_bytes() == DATA[: 5 * BLOCK]


def test_s5_truncate_into_a_pinned_block_zeroes_its_tail_in_place(case: Case) -> None:
    case.p.pin(case.a, 2, 1)
    os.truncate(case.a, 2 * BLOCK + BLOCK // 2)
    assert case.p.read() == pattern(2)[: BLOCK // 2] + bytes(BLOCK // 2)
    assert case.busy() == []
    os.truncate(case.a, 3 * BLOCK)
    assert case.a.read_bytes()[2 * BLOCK :] == pattern(2)[: BLOCK // 2] + bytes(BLOCK // 2)


def test_s6_truncate_down_and_up_gives_new_blocks(case: Case) -> None:
    held = case.p.pin(case.a, 0, 2, write=True)
    os.truncate(case.a, 0)
    os.truncate(case.a, 2 * BLOCK)
    assert case.a.read_bytes() == bytes(2 * BLOCK)
    with open(case.a, "r+b") as file:
        file.write(b"new" * 1000)
    start, count = held["runs"][0]
    assert not case.blocks_of(case.a) & {*range(start, start + count)}
    assert case.p.read(length=2 * BLOCK) == DATA[: 2 * BLOCK]
    case.p.write(b"\xff" * 2 * BLOCK)
    assert case.a.read_bytes() == (b"new" * 1000).ljust(2 * BLOCK, b"\0")
    assert case.busy_blocks() == {*range(start, start + count)}


def test_s7_growing_leaves_pins_alone(case: Case) -> None:
    held = case.p.pin(case.a, 0, 8)
    os.truncate(case.a, 100 * BLOCK)
    assert case.busy() == []
    assert case.p.read(length=8 * BLOCK) == DATA
    assert case.a.read_bytes() == DATA.ljust(100 * BLOCK, b"\0")
    assert {*range(held["runs"][0][0], held["runs"][0][0] + 8)} <= case.blocks_of(case.a)


@pytest.mark.parametrize("how", ["truncate", "write", "append", "fallocate", "zero_range", "copy"])
def test_a_holder_that_wrote_behind_the_end_does_not_show_when_the_file_grows(case: Case, how: str) -> None:
    end = 3 * BLOCK + 100
    os.truncate(case.a, end)
    case.p.pin(case.a, 3, 1, write=True)
    case.p.write(b"\xdd" * (BLOCK - 100), at=100)
    assert case.a.read_bytes() == DATA[:end]
    with open(case.a, "r+b", buffering=0) as file, open(case.mount.path / "B", "w+b", buffering=0) as other:
        other.write(b"new")
        fd = file.fileno()
        match how:
            case "truncate":
                os.ftruncate(fd, 5 * BLOCK)
            case "write":
                os.pwrite(fd, b"new", 4 * BLOCK + 7)
            case "append":
                os.pwrite(fd, b"new", end + 50)
            case "fallocate":
                syscalls.fallocate(fd, 0, 0, 5 * BLOCK)
            case "zero_range":
                syscalls.fallocate(fd, syscalls.ZERO_RANGE, 4 * BLOCK, BLOCK)
            case "copy":
                syscalls.copy_range(other.fileno(), 0, fd, 4 * BLOCK, 3)
    grown = case.a.read_bytes()
    assert grown[:end] == DATA[:end]
    assert grown[end:].replace(b"new", bytes(3)) == bytes(len(grown) - end)


@pytest.mark.parametrize("flags", [os.O_TRUNC | os.O_WRONLY, os.O_TRUNC | os.O_CREAT | os.O_RDWR, os.O_TRUNC])
def test_s8_opening_with_o_trunc_is_a_truncate(case: Case, flags: int) -> None:
    held = case.p.pin(case.a, 0, 1)
    os.close(os.open(case.a, flags, 0o600))
    assert os.stat(case.a).st_size == 0
    assert case.busy() == [tuple(held["runs"][0])]
    assert case.p.read() == pattern(0)
    case.p("unpin")
    case.settled()


def test_s9_two_pins_of_one_block(case: Case) -> None:
    before = case.info()["free"]
    case.p.pin(case.a, 0, 1)
    case.p("pin", file=0, offset=0, length=BLOCK)
    os.truncate(case.a, 0)
    case.p("unpin", pin=0)
    assert case.info()["busy"] == 1
    assert case.p.read(pin=1) == pattern(0)
    case.p("unpin", pin=1)
    case.settled(before + 8)
    with client.open(case.a) as file:
        buffer = bytearray(abi.UNPIN.pack(1, 0, 0))
        with pytest.raises(OSError, match="No such"):
            fcntl.ioctl(file.fileno(), abi.IOC_UNPIN, buffer)
    case.settled(before + 8)


def test_s10_overlapping_pins_make_busy_extents_that_do_not(case: Case) -> None:
    held = [case.p.pin(case.a, 0, 4), case.p("pin", file=0, offset=2 * BLOCK, length=4 * BLOCK)]
    start = held[0]["runs"][0][0]
    os.truncate(case.a, 0)
    assert case.busy_blocks() == {*range(start, start + 6)}
    case.p("unpin", pin=0)
    eventually("the first two are free", lambda: case.busy_blocks() == {*range(start + 2, start + 6)}, 1.0)
    assert case.p.read(pin=1, length=4 * BLOCK) == DATA[2 * BLOCK : 6 * BLOCK]
    case.p("unpin", pin=1)
    case.settled()


# -- punch, zero, collapse --------------------------------------------------------------------------------------------


def test_s17_punching_a_pinned_block(case: Case) -> None:
    blocks = os.stat(case.a).st_blocks
    held = case.p.pin(case.a, 1, 1)
    fallocate(case.a, PUNCH, BLOCK, BLOCK)
    assert case.a.read_bytes() == DATA[:BLOCK] + bytes(BLOCK) + DATA[2 * BLOCK :]
    assert os.stat(case.a).st_blocks == blocks - 8
    assert case.p.read() == pattern(1)
    assert case.busy() == [tuple(held["runs"][0])]


def test_s18_punching_while_the_holder_streams(case: Case) -> None:
    """Never an error to the holder, and the size stays."""
    case.p.pin(case.a, 0, 8, write=True)
    case.p("stream", pin=0, byte=0x5A)
    for _ in range(100):
        fallocate(case.a, PUNCH, 0, 8 * BLOCK)
        assert os.stat(case.a).st_size == 8 * BLOCK
    assert case.p("stop")["foreign"] == 0
    assert case.a.read_bytes() == bytes(8 * BLOCK)
    assert len(case.busy_blocks()) == 8


def test_s19_punching_inside_a_pinned_block_zeroes_in_place(case: Case) -> None:
    case.p.pin(case.a, 1, 1)
    fallocate(case.a, PUNCH, BLOCK + 100, 1000)
    want = pattern(1)[:100] + bytes(1000) + pattern(1)[1100:]
    assert case.p.read() == want
    assert case.a.read_bytes()[BLOCK : 2 * BLOCK] == want
    assert case.busy() == []


def test_s20_punching_elsewhere_is_an_ordinary_punch(case: Case) -> None:
    free = case.info()["free"]
    case.p.pin(case.a, 0, 1)
    fallocate(case.a, PUNCH, 4 * BLOCK, 2 * BLOCK)
    assert case.busy() == []
    assert case.info()["free"] == free + 2


def test_s21_writing_into_the_punched_hole(case: Case) -> None:
    held = case.p.pin(case.a, 1, 1, write=True)
    fallocate(case.a, PUNCH, BLOCK, BLOCK)
    with open(case.a, "r+b") as file:
        os.pwrite(file.fileno(), pattern(99), BLOCK)
    assert held["runs"][0][0] not in case.blocks_of(case.a)
    case.p.write(b"\x77" * BLOCK)
    assert case.a.read_bytes() == DATA[:BLOCK] + pattern(99) + DATA[2 * BLOCK :]
    assert case.p.read() == b"\x77" * BLOCK
    assert case.image(held["runs"][0][0]) == b"\x77" * BLOCK


@pytest.mark.parametrize("keep", [0, syscalls.KEEP_SIZE])
def test_s22_zero_range_zeroes_pinned_blocks_in_place(case: Case, keep: int) -> None:
    held = case.p.pin(case.a, 3, 2)
    with open(case.a, "r+b") as file:
        syscalls.fallocate(file.fileno(), syscalls.ZERO_RANGE | keep, 2 * BLOCK + 10, 8 * BLOCK)
    size = 8 * BLOCK if keep else 10 * BLOCK + 10
    assert case.a.read_bytes() == DATA[: 2 * BLOCK + 10].ljust(size, b"\0")
    assert case.p.read(length=2 * BLOCK) == bytes(2 * BLOCK)
    assert case.busy() == []
    assert {held["runs"][0][0], held["runs"][0][0] + 1} <= case.blocks_of(case.a), "no pinned block moves"
    with client.open(case.a) as file:
        unwritten = {e.logical + n for e in file.extents() if e.unwritten for n in range(e.count)}
    assert {5, 6, 7} <= unwritten, "unpinned whole blocks become unwritten"
    assert not {3, 4} & unwritten
    case.p("unpin")
    case.settled()


def test_s23_zero_range_beyond_the_end_with_keep_size(case: Case) -> None:
    case.p.pin(case.a, 0, 8)
    fallocate(case.a, syscalls.ZERO_RANGE | syscalls.KEEP_SIZE, 20 * BLOCK, 4 * BLOCK)
    assert os.stat(case.a).st_size == 8 * BLOCK
    assert case.p.read(length=8 * BLOCK) == DATA
    assert case.busy() == []


def test_s26_preallocation_beside_pins(case: Case) -> None:
    fallocate(case.a, PUNCH, 2 * BLOCK, 2 * BLOCK)
    case.p.pin(case.a, 0, 2)
    fallocate(case.a, 0, 0, 20 * BLOCK)
    assert case.p.read(length=2 * BLOCK) == DATA[: 2 * BLOCK]
    assert case.busy() == []
    assert case.a.read_bytes() == (DATA[: 2 * BLOCK] + bytes(2 * BLOCK) + DATA[4 * BLOCK :]).ljust(20 * BLOCK, b"\0")


def test_s27_collapse_through_the_mount_is_not_supported_by_the_kernel(case: Case) -> None:
    for mode in (syscalls.COLLAPSE_RANGE, syscalls.INSERT_RANGE):
        with pytest.raises(OSError, match="not supported"):
            fallocate(case.a, mode, 0, BLOCK)


# -- unlink, rename, link ---------------------------------------------------------------------------------------------


def test_s28_unlink_of_a_pinned_file(case: Case) -> None:
    """No descriptor but the holder's; it goes after the pin does (the pin lives in it)."""
    before = case.info()["free"]
    held = case.p.pin(case.a, 0, 8)
    start = held["runs"][0][0]
    os.unlink(case.a)
    assert not case.a.exists()
    case.a.write_bytes(b"other" * 5000)
    assert not case.blocks_of(case.a) & {*range(start, start + 8)}
    assert case.p.read(length=8 * BLOCK) == DATA
    (listed,) = client.pins(case.mount.path)
    assert "(deleted)" in listed["path"]
    case.p.end()
    os.unlink(case.a)
    case.settled(before + 8)


def test_s29_unlinked_and_open_close_then_unpin(case: Case) -> None:
    before = case.info()["free"]
    fd = os.open(case.a, os.O_RDWR)
    case.p.pin(case.a, 0, 1)
    os.unlink(case.a)
    os.pwrite(fd, b"still", 0)
    assert os.pread(fd, 5, 0) == b"still"
    assert case.p.read(length=5) == b"still"
    os.ftruncate(fd, BLOCK // 2)
    assert case.p.read() == (b"still" + pattern(0)[5 : BLOCK // 2]).ljust(BLOCK, b"\0")
    os.close(fd)
    assert case.info()["free"] == before + 7, "the holder's descriptor keeps the file"
    case.p.end()
    case.settled(before + 8)


def test_s29_unlinked_and_open_unpin_then_close(case: Case) -> None:
    before = case.info()["free"]
    fd = os.open(case.a, os.O_RDWR)
    case.p.pin(case.a, 0, 1)
    os.unlink(case.a)
    os.ftruncate(fd, 0)
    assert case.info()["busy"] == 1
    case.p.end()
    case.settled(before + 8)
    os.close(fd)
    case.settled(before + 8)


def test_s30_rename_over_a_pinned_file(case: Case) -> None:
    before = case.info()["free"]
    held = case.p.pin(case.a, 0, 8)
    other = case.mount.path / "B"
    other.write_bytes(b"B" * 5000)
    os.rename(other, case.a)
    assert case.a.read_bytes() == b"B" * 5000
    start = held["runs"][0][0]
    assert not case.blocks_of(case.a) & {*range(start, start + 8)}
    assert case.p.read(length=8 * BLOCK) == DATA
    case.p.end()
    eventually("the old file's blocks are free", lambda: case.info()["free"] == before + 8 - 2, 1.0)
    case.settled()


def test_s31_a_hard_link_keeps_the_blocks_with_the_file(case: Case) -> None:
    before = case.info()["free"]
    case.p.pin(case.a, 0, 1)
    link = case.mount.path / "L"
    os.link(case.a, link)
    os.unlink(case.a)
    assert case.busy() == []
    assert link.read_bytes() == DATA
    os.truncate(link, 0)
    assert case.info()["busy"] == 1
    os.unlink(link)
    case.p.end()
    case.settled(before + 8)


def test_s32_pins_follow_the_inode(case: Case) -> None:
    directory = case.mount.path / "d"
    directory.mkdir()
    other = case.mount.path / "B"
    other.write_bytes(b"B" * BLOCK)
    case.p.pin(case.a, 0, 8)
    syscalls.rename2(case.a, other, syscalls.RENAME_EXCHANGE)
    assert client.pins(case.mount.path)[0]["path"] == str(other)
    os.truncate(case.a, 0)  # that is B's file now
    assert case.busy() == []
    os.rename(other, directory / "A")
    os.rename(directory, case.mount.path / "e")
    moved = case.mount.path / "e" / "A"
    assert client.pins(case.mount.path)[0]["path"] == str(moved)
    assert moved.read_bytes() == DATA
    os.truncate(moved, 0)
    assert len(case.busy_blocks()) == 8
    assert case.p.read(length=8 * BLOCK) == DATA


def test_s33_a_nameless_file_whose_holder_dies(case: Case) -> None:
    before = case.info()["free"]
    fd = os.open(case.mount.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, DATA)
    case.p.pin(Path(f"/proc/{os.getpid()}/fd/{fd}"), 0, 4, write=True)
    os.close(fd)
    assert case.info()["free"] == before - 8
    assert case.p.read(length=4 * BLOCK) == DATA[: 4 * BLOCK]
    case.p.end(signal.SIGKILL)
    eventually("all is free", lambda: case.info()["free"] == before, 1.0)
    case.settled()


# -- copy -------------------------------------------------------------------------------------------------------------


def test_s34_copying_from_and_into_a_pinned_range(case: Case) -> None:
    held = case.p.pin(case.a, 0, 2, write=True)
    target = case.mount.path / "copy"
    with open(case.a, "r+b") as a, open(target, "w+b") as c:
        assert syscalls.copy_range(a.fileno(), 0, c.fileno(), 0, 8 * BLOCK) == 8 * BLOCK
        case.p.write(b"later")
        assert target.read_bytes() == DATA
        assert syscalls.copy_range(c.fileno(), 4 * BLOCK, a.fileno(), 0, 2 * BLOCK) == 2 * BLOCK
    assert case.p.read(length=2 * BLOCK) == DATA[4 * BLOCK : 6 * BLOCK]
    assert {held["runs"][0][0], held["runs"][0][0] + 1} <= case.blocks_of(case.a)


# -- space ------------------------------------------------------------------------------------------------------------


def test_s46_full_of_busy_blocks(small: Case) -> None:
    """ENOSPC, no hang; after the unpin the same write succeeds."""
    small.p.pin(small.a, 0, 8)
    os.truncate(small.a, 0)
    filler = small.fill()
    with open(filler, "ab", buffering=0) as file:
        began = time.monotonic()
        with pytest.raises(OSError, match="No space"):
            file.write(b"x" * BLOCK)
        assert time.monotonic() - began < 1
        small.p("unpin")
        eventually("nothing is busy", lambda: small.info()["busy"] == 0)
        assert file.write(b"x" * BLOCK) == BLOCK


def together(case: Case) -> tuple[dict[str, Any], os.statvfs_result]:
    """Two reports of one moment, after the delayed free: it may give blocks back between any two calls."""
    eventually("the delayed free is done", lambda: client.status(case.mount.path)["due"] == 0)

    def ask() -> tuple[dict[str, Any], os.statvfs_result] | None:
        before, space, after = case.info(), os.statvfs(case.mount.path), case.info()
        same = all(before[key] == after[key] for key in ("free", "used", "busy", "pinned"))
        return (before, space) if same else None

    found: tuple[dict[str, Any], os.statvfs_result] = eventually("nothing changes for a moment", ask)
    return found


def test_s47_the_numbers_add_up_at_every_step(small: Case) -> None:
    """A random run of calls and pins: used + free + busy is all there is, df says the same, no busy block is anyone's."""
    seed = int(os.environ.get("DAXFS_TEST_SEED") or time.time_ns() % (1 << 32))
    print(f"seed {seed} (DAXFS_TEST_SEED={seed} runs it again)")
    rng = random.Random(seed)
    files = [small.mount.path / f"f{n}" for n in range(5)]
    held: list[int] = []
    model: dict[int, bytes] = {}
    for _ in range(250):
        path = rng.choice(files)
        match rng.randrange(9):
            case 0 | 1 | 2:
                with open(path, "r+b" if path.exists() else "w+b") as file:
                    os.pwrite(file.fileno(), rng.randbytes(rng.randint(1, 60_000)), rng.randrange(100_000))
            case 3 if path.exists():
                os.truncate(path, rng.randrange(120_000))
            case 4 if path.exists():
                fallocate(path, PUNCH, rng.randrange(100_000), rng.randint(1, 50_000))
            case 5 if path.exists():
                os.unlink(path)
            case 6 | 7 if path.exists() and os.stat(path).st_size:
                size = -(-os.stat(path).st_size // BLOCK)
                first = rng.randrange(size)
                pinned = small.p.pin(path, first, rng.randint(1, size - first), write=True)
                held.append(pinned["pin"])
                model[pinned["pin"]] = rng.randbytes(16)
                small.p.write(model[pinned["pin"]], pin=pinned["pin"])
            case 8 if held:
                small.p("unpin", pin=held.pop(rng.randrange(len(held))))
        found, space = together(small)
        assert space.f_blocks == found["blocks"]
        assert space.f_blocks - space.f_bfree == found["used"] + found["busy"]
        busy = small.busy_blocks()
        assert len(busy) <= found["pinned"]
        for other in files:
            if other.exists():
                assert not small.blocks_of(other) & busy, "a busy block has an owner"  # I1, I3
    small.p.end()
    small.settled()


def test_s50_busy_blocks_never_keep_unlink_from_working(small: Case) -> None:
    small.p.pin(small.a, 0, 8)
    os.truncate(small.a, 0)
    for n in range(50):
        (small.mount.path / f"small-{n}").write_bytes(b"x")
    filler = small.fill()
    for n in range(50):
        os.unlink(small.mount.path / f"small-{n}")
    os.unlink(filler)
    os.unlink(small.a)
    (small.mount.path / "again").write_bytes(DATA)
