"""What people do on a file system: unpack, build and delete a source tree; git; sqlite; a maildir; rsync-like copies."""

from __future__ import annotations

import filecmp
import io
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tests.mount import parity
from tests.mount.harness import Mounted, eventually

MODULES = 60
ENVIRONMENT = os.environ | {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_AUTHOR_NAME": "A", "GIT_COMMITTER_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_EMAIL": "a@example.org", "LC_ALL": "C",
}  # fmt: skip


def sh(command: str, directory: Path, timeout_s: float = 100) -> str:
    done = subprocess.run(
        ["sh", "-euc", command], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def source_tree() -> dict[str, bytes]:
    """A C program of many modules in several directories, with headers, a library and a Makefile."""
    files: dict[str, str] = {}
    for n in range(MODULES):
        folder = f"src/part{n % 7}"
        files[f"{folder}/module{n}.h"] = f"#pragma once\nint module{n}(int x);\n"
        below = f'#include "../part{(n - 1) % 7}/module{n - 1}.h"\n' if n else ""
        call = f"module{n - 1}(x)" if n else "x"
        body = "".join(
            f'  static const char text{i}[] = "{n} {i} {"filler " * 20}";\n  sum += sizeof text{i};\n' for i in range(20)
        )
        files[f"{folder}/module{n}.c"] = (
            f'#include "module{n}.h"\n{below}int module{n}(int x) {{\n  int sum = 0;\n{body}'
            f"  return {call} + {n} + sum % 2;\n}}\n"
        )
    files["src/main.c"] = (
        f'#include <stdio.h>\n#include "part{(MODULES - 1) % 7}/module{MODULES - 1}.h"\n'
        f'int main(void) {{ printf("%d\\n", module{MODULES - 1}(1)); return 0; }}\n'
    )
    files["Makefile"] = (
        "SOURCES := $(wildcard src/*.c src/*/*.c)\nOBJECTS := $(SOURCES:%.c=build/%.o)\n"
        "program: build/libparts.a build/src/main.o\n\t$(CC) -o $@ build/src/main.o build/libparts.a\n"
        "build/libparts.a: $(filter-out build/src/main.o,$(OBJECTS))\n\t$(AR) rcs $@ $^\n"
        "build/%.o: %.c\n\t@mkdir -p $(@D)\n\t$(CC) -O0 -g -MMD -c -o $@ $<\n"
        "clean:\n\trm -rf build program\n-include $(OBJECTS:.o=.d)\n"
    )
    files |= {f"docs/chapter{n}/{'deep/' * (n % 6)}page{n}.txt": f"page {n}\n" * n for n in range(120)}
    return {name: text.encode() for name, text in files.items()}


def tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"tree/{name}")
            entry.size, entry.mtime, entry.mode = len(data), 1_600_000_000, 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("tree/latest")
        link.type, link.linkname = tarfile.SYMTYPE, "docs"
        tar.addfile(link)
        hard = tarfile.TarInfo("tree/Makefile.copy")
        hard.type, hard.linkname = tarfile.LNKTYPE, "tree/Makefile"
        tar.addfile(hard)


@pytest.mark.slow
def test_unpack_build_delete(mount: Mounted) -> None:
    files = source_tree()
    archive = mount.home / "tree.tar.gz"
    tarball(archive, files)
    sh(f"tar xzf {archive}", mount.path)
    tree = mount.path / "tree"
    assert {name: (tree / name).read_bytes() for name in files} == files
    assert os.stat(tree / "Makefile").st_mtime == 1_600_000_000
    assert os.stat(tree / "Makefile").st_nlink == 2
    sh("make -j4 program", tree)
    answer = sh("./program", tree)
    assert int(answer) > MODULES
    sh("make -q program", tree)  # nothing is to be done: times are kept
    sh("touch src/part3/module3.h && make -j4 program && ./program", tree)
    mount.remount()
    assert sh("./program", tree) == answer
    sh("cp -a tree copy && diff -r tree copy && tar cf - tree | tar df - && rm -rf copy", mount.path)
    sh("make clean && find . -type f | sort | xargs cksum > /dev/null", tree)
    sh("rm -rf tree", mount.path)
    assert os.listdir(mount.path) == []
    eventually("all blocks are free", lambda: mount.info()["free"] >= mount.free_at_mount - 40)


@pytest.mark.slow
def test_git(mount: Mounted) -> None:
    repository = mount.path / "repository"
    repository.mkdir()
    files = source_tree()
    for name, data in files.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(data)
    sh("git init -q . && git add . && git commit -qm first && git status --porcelain", repository)
    assert sh("git status --porcelain", repository) == ""
    sh("git checkout -qb side && git mv src/part1 src/moved && git commit -qam moved", repository)
    sh("git checkout -q - && echo more >> docs/chapter1/deep/page1.txt && git commit -qam more", repository)
    sh("git merge -q side -m merged", repository)
    sh(
        "git gc -q --prune=now && git fsck --strict && git clone -q . ../clone && diff -r --exclude=.git . ../clone",
        repository,
    )
    mount.remount()
    assert sh("git status --porcelain && git fsck --strict", repository) == ""
    assert len(sh("git log --format=%h", repository).split()) == 4
    sh("rm -rf repository clone", mount.path)


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_sqlite(journal: str, mount: Mounted) -> None:
    """Three processes write to one database; WAL shares memory through a mapped file on the mount."""
    path = mount.path / "data.db"
    with sqlite3.connect(path) as db:
        assert db.execute(f"PRAGMA journal_mode={journal}").fetchone()[0] == journal.lower()
        db.execute("CREATE TABLE t (who INTEGER, n INTEGER, data BLOB, PRIMARY KEY (who, n))")
    db.close()
    code = (
        "import sqlite3, sys, os\n"
        "db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
        "for n in range(40):\n"
        "    db.execute('BEGIN IMMEDIATE')\n"
        "    db.execute('INSERT INTO t VALUES (?, ?, ?)', (int(sys.argv[2]), n, os.urandom(3000)))\n"
        "    db.execute('COMMIT')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(who)]) for who in range(3)]
    assert [writer.wait(100) for writer in writers] == [0, 0, 0]
    mount.remount()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert db.execute("SELECT who, count(*), sum(length(data)) FROM t GROUP BY who").fetchall() == [
        (w, 40, 120_000) for w in range(3)
    ]
    db.close()


def test_copying_a_tree_both_ways(mount: Mounted, peer: Path) -> None:
    """cp -a to the mount and back: nothing of what stat, xattrs and ACLs show is lost."""
    origin = peer / "origin"
    origin.mkdir()
    for name, data in source_tree().items():
        if name.startswith(("docs", "Make")):
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            (origin / name).write_bytes(data)
    os.truncate(origin / "Makefile", 50 << 20)  # sparse
    os.setxattr(origin / "Makefile", "user.note", b"value")
    os.mkfifo(origin / "fifo", 0o640)
    os.symlink("nowhere", origin / "dangling")
    os.link(origin / "Makefile", origin / "hard")
    sh(f"setfacl -m u:1001:r origin/Makefile && cp -a --sparse=always origin {mount.path}/there", peer)
    sh(f"cp -a {mount.path}/there back", peer)
    want = parity.tree(origin)
    assert not parity.differences(parity.tree(mount.path / "there"), want)
    assert not parity.differences(parity.tree(peer / "back"), want)
    assert os.stat(mount.path / "there" / "Makefile").st_blocks < 100
    for name in ("Makefile", "fifo", "dangling", "docs"):
        assert os.lstat(mount.path / "there" / name).st_mtime_ns == os.lstat(origin / name).st_mtime_ns


def test_many_threads(mount: Mounted) -> None:
    """Eight threads, each in its own directory, each with the whole life of many files; then everything is compared."""
    problems: list[BaseException] = []

    def life(me: int) -> None:
        try:
            home = mount.path / f"thread-{me}"
            home.mkdir()
            for n in range(60):
                path = home / f"file-{n}"
                path.write_bytes(bytes([me]) * (n * 700))
                with open(path, "ab") as file:
                    file.write(b"tail")
                os.rename(path, home / f"kept-{n}")
                if n % 3 == 0:
                    os.unlink(home / f"kept-{n}")
            shutil.copytree(home, mount.path / f"copy-{me}")
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=life, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    for me in range(8):
        home = mount.path / f"thread-{me}"
        assert {p.name: p.read_bytes() for p in home.iterdir()} == {
            f"kept-{n}": bytes([me]) * (n * 700) + b"tail" for n in range(60) if n % 3
        }
        assert not filecmp.dircmp(home, mount.path / f"copy-{me}").diff_files
