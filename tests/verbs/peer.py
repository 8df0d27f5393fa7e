"""The other side of a connection: a process that does what it is told on its standard input, a JSON object per line.

Each answer is one line: what the request returned, or {"errno": ...} of an OSError.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from daxfs import verbs
from tests.mount.harness import REPOSITORY


class Peer:
    """The process, from the outside."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.verbs.peer"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=REPOSITORY
        )

    def __getattr__(self, name: str) -> Any:
        def ask(**arguments: Any) -> Any:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            answer = json.loads(self.process.stdout.readline())
            if isinstance(answer, dict) and "errno" in answer:
                raise OSError(answer["errno"], answer["strerror"])
            return answer

        return ask

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


class Side:
    """One end of a connection, in either process: a context, a region on a file, a queue pair."""

    def __init__(self, mount: str | Path, file: str | Path, length: int, access: int, offset: int = 0) -> None:
        self.context = verbs.Context(mount)
        self.pd = verbs.PD(self.context)
        self.cq = verbs.CQ(self.context, 64)
        self.mr = verbs.MR(self.pd, length, access, file=file, offset=offset)
        self.qp = verbs.QP(self.pd, verbs.QPInitAttr(self.cq, self.cq))

    def facts(self) -> dict[str, int]:
        return {"qp": self.qp.qp_num, "addr": self.mr.buf, "rkey": self.mr.rkey}

    def rdma(self, opcode: int, key: int, addr: int, length: int, at: int = 0) -> None:
        wr = verbs.SendWR(opcode=opcode, sg=[verbs.SGE(self.mr.buf + at, length, self.mr.lkey)])
        wr.set_wr_rdma(key, addr)
        self.qp.post_send(wr)

    def status(self) -> str:
        found = self.cq.wait(1, 20)
        return verbs.wc_status_to_str(found[0].status) if found else "nothing"


class _Orders:
    def make(self, **arguments: Any) -> dict[str, int]:
        self.side = Side(**arguments)
        return self.side.facts()

    def connect(self, **arguments: Any) -> None:
        self.side.qp.connect(**arguments)

    def receive(self, at: int, length: int) -> None:
        mr = self.side.mr
        self.side.qp.post_recv(verbs.RecvWR(sg=[verbs.SGE(mr.buf + at, length, mr.lkey)]))

    def status(self) -> str:
        return self.side.status()

    def state(self) -> str:
        return self.side.qp.qp_state.name

    def read(self, length: int, offset: int = 0) -> str:
        return self.side.mr.read(length, offset).decode("latin-1")

    def close_mr(self) -> None:
        self.side.mr.close()


def main() -> None:
    orders = _Orders()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = getattr(orders, name)(**arguments)
        except OSError as problem:
            answer = {"errno": problem.errno, "strerror": problem.strerror}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
