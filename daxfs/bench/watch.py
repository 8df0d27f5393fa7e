"""Another client of a mount: `python -m daxfs.bench.watch FILE` asks for the file's attributes again and again, and answers
each line on its standard input with the longest wait since the last one, in seconds. It ends with its input."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daxfs.bench.work import stat_served

PAUSE_S = 0.0005


def main() -> int:
    path, longest = os.fsencode(sys.argv[1]), 0.0
    while True:
        began = time.perf_counter()
        stat_served(path)
        longest = max(longest, time.perf_counter() - began)
        if select.select([sys.stdin], [], [], PAUSE_S)[0]:
            if not sys.stdin.readline():
                return 0
            print(longest, flush=True)
            longest = 0.0


class Watcher:
    """The other client, as a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def longest(self) -> float:
        """The longest wait (seconds) since this was asked last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def idle(self, seconds: float) -> float:
        """The longest wait while nothing else is asked of the mount: what the machine itself makes it wait."""
        self.longest()
        time.sleep(seconds)
        return self.longest()


@contextmanager
def watching(path: Path) -> Iterator[Watcher]:
    command = [sys.executable, "-m", "daxfs.bench.watch", str(path.absolute())]
    tree = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree) as process:
        watcher = Watcher(process)
        watcher.longest()
        yield watcher
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    sys.exit(main())
