"""The ABI for C: the header is what abi.py says, a holder in C, and direct I/O against layout changes (S68)."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daxfs import abi, client
from tests.conftest import Maker
from tests.mount.harness import REPOSITORY, Mounted, eventually
from tools import c_header

BLOCK = 4096
INCLUDE = f"-I{c_header.HEADER.parent}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Compile a C program, warnings are errors."""
    place = tmp_path_factory.mktemp("built")

    def build(source: Path) -> Path:
        program = place / source.stem
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", INCLUDE]
        if not program.exists():
            subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, source], check=True)
        return program

    return build


# -- the header -------------------------------------------------------------------------------------------------------


def test_the_header_is_up_to_date() -> None:
    assert c_header.HEADER.read_text(encoding="utf-8") == c_header.render(), "run: python tools/c_header.py"


def test_c_has_the_same_numbers(built: Callable[[Path], Path], tmp_path: Path) -> None:
    """Sizes, offsets of members and every constant, as the compiler sees them."""
    numbers = {name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)}
    del numbers["IOC_SIZE_MAX"]
    structures = {name: value for name, value in vars(abi).items() if isinstance(value, struct.Struct)}
    assert len(numbers) > 40
    assert len(structures) >= 11
    lines = [f'printf("{name} %llu\\n", (unsigned long long)DAXFS_{name});' for name in numbers]
    lines += [f'printf("sizeof {name} %zu\\n", sizeof(struct daxfs_{name.lower()}));' for name in structures]
    source = tmp_path / "numbers.c"
    head = '#define _GNU_SOURCE\n#include <fcntl.h>\n#include <stdio.h>\n#include "daxfs.h"\nint main(void)\n{\n'
    source.write_text(head + "\n".join(lines) + "\nreturn 0;\n}\n")
    said = subprocess.run([built(source)], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = [f"{name} {value}" for name, value in numbers.items()]
    wanted += [f"sizeof {name} {value.size}" for name, value in structures.items()]
    assert said == wanted


def test_c_has_the_members_in_the_same_places(built: Callable[[Path], Path], tmp_path: Path) -> None:
    source = tmp_path / "members.c"
    source.write_text(
        '#include <unistd.h>\n#include "daxfs.h"\nint main(void)\n{\n'
        "struct daxfs_pin p = {.offset = 1, .length = 2, .flags = 3, .zero = 4, .id = 5, .runs = 6, .blocks = 7};\n"
        "struct daxfs_event e = {.type = 1, .lost = 2, .pin_id = 3, .offset = 4, .length = 5};\n"
        "return write(1, &p, sizeof p) < 0 || write(1, &e, sizeof e) < 0;\n}\n"
    )
    said = subprocess.run([built(source)], capture_output=True, check=True).stdout
    assert said == abi.PIN.pack(1, 2, 3, 4, 5, 6, 7) + abi.EVENT.pack(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ('PIN = struct.Struct("<QQIIQQQ")  # offset, length', "must name its 7 members"),
        ('ACK = struct.Struct("<QQ")', "must name its 2 members"),
        ('ACK = struct.Struct("<QQ")  # id, 0', "is not the name of a member"),
    ],
)
def test_what_the_header_cannot_say(definition: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        c_header.render(definition + "\n")


# -- the holder -------------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, program: Path, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def end(self) -> tuple[int, str]:
        _, problem = self.process.communicate(timeout=10)
        return self.process.returncode, problem


@pytest.fixture
def holder(built: Callable[[Path], Path]) -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def start(*arguments: str | Path) -> Holder:
        holders.append(Holder(built(REPOSITORY / "tools" / "holder.c"), *arguments))
        return holders[-1]

    yield start
    for one in holders:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def path(shared_mount: Mounted) -> Path:
    """A file of 8 blocks, block n full of the letter A + n."""
    file = shared_mount.fresh_directory() / "file"
    file.write_bytes(b"".join(bytes([65 + n]) * BLOCK for n in range(8)))
    return file


@pytest.mark.mount
def test_a_c_holder_keeps_its_blocks(path: Path, shared_mount: Mounted, holder: Callable[..., Holder]) -> None:
    process = holder(shared_mount.image, path, "0", str(4 * BLOCK))
    word, pin_id, _, blocks = process.hear()
    assert (word, blocks) == ("pinned", "4")
    assert [pin["id"] for pin in client.pins(path)] == [int(pin_id)]
    process.tell(f"store {BLOCK} written from C")
    process.tell(f"load {BLOCK} 14")
    assert process.hear() == ["loaded", "written", "from", "C"]
    assert path.read_bytes()[BLOCK : BLOCK + 15] == b"written from CB"
    process.tell("fork")
    assert process.hear() == ["forked"]
    assert [pin["id"] for pin in client.pins(path)] == [int(pin_id)]
    os.truncate(path, 0)
    path.write_bytes(b"new" * 8 * BLOCK)
    process.tell(f"load {2 * BLOCK - 2} 4")
    assert process.hear() == ["loaded", "BBCC"]
    process.tell(f"store {3 * BLOCK} nobody sees this")
    process.tell("unpin dirty")
    assert process.hear() == ["unpinned"]
    assert process.end() == (0, "")
    assert path.read_bytes() == b"new" * 8 * BLOCK
    eventually("the blocks are free", lambda: client.busy(path) == [])


@pytest.mark.mount
def test_a_c_holder_of_a_fragmented_file(path: Path, shared_mount: Mounted, holder: Callable[..., Holder]) -> None:
    count = 700  # more runs than one page of an answer has
    with open(path, "r+b", buffering=0) as file, open(path.with_name("noise"), "wb", buffering=0) as noise:
        file.truncate(0)
        for n in reversed(range(count)):
            file.seek(n * BLOCK)
            file.write(b"%04d" % n + bytes(BLOCK - 4))
            noise.write(bytes(BLOCK))
    process = holder("-r", shared_mount.image, path, "0", str(count * BLOCK))
    word, _, runs, _ = process.hear()
    assert word == "pinned"
    assert int(runs) > 510
    for n in (0, 1, 509, 510, 511, 699):
        process.tell(f"load {n * BLOCK} 4")
        assert process.hear() == ["loaded", f"{n:04}"]
    assert process.end() == (0, "")


@pytest.mark.mount
def test_a_c_holder_on_demand(path: Path, shared_mount: Mounted, holder: Callable[..., Holder]) -> None:
    process = holder("-d", shared_mount.image, path, "0", str(8 * BLOCK))
    _, pin_id, *_ = process.hear()
    change = subprocess.Popen(["truncate", "-s", "0", path])
    assert process.hear() == ["event", str(abi.EVENT_INVALIDATE), pin_id, "0", str(8 * BLOCK)]
    assert change.poll() is None
    process.tell("ack")
    assert process.hear() == ["acked"]
    assert change.wait(5) == 0
    assert client.busy(path) == []
    process.tell("load 0 1")
    code, problem = process.end()
    assert code == 1
    assert "load 0 1: Bad address" in problem


@pytest.mark.mount
def test_what_a_c_holder_says_when_it_cannot(path: Path, shared_mount: Mounted, holder: Callable[..., Holder]) -> None:
    for arguments, words in (
        ((shared_mount.image, path, "1", str(BLOCK)), "PIN: Invalid argument"),
        ((shared_mount.image, path, str(8 * BLOCK), str(BLOCK)), "PIN: No such device or address"),
        ((shared_mount.image, path.parent, "0", "4096"), "Is a directory"),
        ((path.with_name("none"), path, "0", "4096"), "No such file"),
    ):
        code, problem = holder(*arguments).end()
        assert code == 1
        assert words in problem
    assert holder("only one").end()[0] == 2
    assert client.pins(path) == []


# -- S68 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> Iterator[Path]:
    """A path on a file system with a disk below it, as far as there is one."""
    place = Path(tempfile.mkdtemp(prefix="daxfs-test-", dir="/var/tmp"))
    yield place / "source"
    shutil.rmtree(place)


def fill(mounted: Mounted, room: int) -> Path:
    """A file that leaves so many blocks of the volume free."""
    path = mounted.path / "witness"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(os.urandom(1 << 16))
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
        file.truncate(file.tell() // BLOCK * BLOCK - room * BLOCK)
    return path


def collide(program: Path, mounted: Mounted, source: Path, *image: Path) -> subprocess.CompletedProcess[str]:
    command = [program, mounted.path / "file", source, *image]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.mount
@pytest.mark.parametrize("policy", ["busy", "wait"])
@pytest.mark.parametrize("target", ["mapping", "pins"])
def test_direct_io_collides_with_layout_changes(
    built: Callable[[Path], Path], make_mount: Maker, source: Path, target: str, policy: str
) -> None:
    """t_mmap_collision, and the same with pinned blocks. The volume is nearly full: freed blocks are used at once."""
    mounted = make_mount(size="64M", options=f"policy={policy}")
    witness = fill(mounted, 128)
    content = witness.read_bytes()
    program = built(REPOSITORY / "tools" / "mmap_collision.c")
    done = collide(program, mounted, source, *([mounted.image] if target == "pins" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["punch", "zero", "truncate", "collapse"]
    assert all(int(rounds) > 20 and int(neighbours) > 20 for _, rounds, neighbours in lines), lines
    assert witness.read_bytes() == content
    eventually("no block is busy", lambda: client.busy(mounted.path) == [])


@pytest.mark.mount
def test_it_sees_the_bug(built: Callable[[Path], Path], make_mount: Maker, source: Path) -> None:
    """Under the policy that frees pinned blocks, other files' bytes are found in them, or theirs in other files."""
    mounted = make_mount(size="64M", options="policy=unsafe")
    fill(mounted, 64)
    program = built(REPOSITORY / "tools" / "mmap_collision.c")
    for _ in range(6):
        done = collide(program, mounted, source, mounted.image)
        if done.returncode:
            break
    assert done.returncode == 1
    assert "somebody else wrote it" in done.stderr or "of the neighbour is" in done.stderr
