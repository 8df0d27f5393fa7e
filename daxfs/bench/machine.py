"""The machine a run had: what others took of it, and how evenly it worked. Wall times of a noisy one mean little."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALIBRATION_LOOPS = 100_000
UNEVEN = 0.15  # a computation that now and then takes so much longer
STOLEN = 0.01  # of all CPU time, by the hypervisor
OTHERS = 0.05  # CPUs that other processes use
MS = 1e-3


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads. ProcessLookupError: there is none."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) gives
    except OSError:
        raise ProcessLookupError(pid) from None


@dataclass(frozen=True)
class _Ticks:
    """Seconds of all CPUs since boot, and those of ours."""

    wall: float
    stolen: float
    busy: float
    ours: float

    @classmethod
    def now(cls, servers: list[int]) -> _Ticks:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _wait, irq, softirq, stolen = (int(word) / os.sysconf("SC_CLK_TCK") for word in words)
        ours = 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            ours += usage.ru_utime + usage.ru_stime
        for pid in servers:
            try:
                ours += cpu_seconds(pid)
            except ProcessLookupError:
                continue
        return cls(time.monotonic(), stolen, user + nice + system + irq + softirq, ours)


@dataclass
class Machine:
    """What was seen of it. Shares are of all CPUs; `others` is a number of CPUs."""

    calibration_ms: list[float] = field(default_factory=list)
    stolen: float = 0.0
    others: float = 0.0
    load: float = 0.0
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    kernel: str = field(default_factory=platform.release)
    _began: _Ticks | None = field(default=None, repr=False)

    def begin(self, servers: list[int]) -> None:
        self._began = _Ticks.now(servers)

    def end(self, servers: list[int]) -> None:
        """The same servers; they still run."""
        assert self._began is not None
        before, after = self._began, _Ticks.now(servers)
        wall = max(after.wall - before.wall, MS)
        self.stolen = (after.stolen - before.stolen) / wall / self.cpus
        self.others = max(0.0, (after.busy - before.busy) - (after.ours - before.ours)) / wall
        self.load = os.getloadavg()[0]

    def calibrate(self) -> None:
        """A fixed piece of computation: how its time varies over a run is the noise of the machine."""
        began = time.perf_counter()
        for _ in range(CALIBRATION_LOOPS):
            pass
        self.calibration_ms.append((time.perf_counter() - began) * 1e3)

    @property
    def uneven(self) -> float:
        """By how much that took longer now and then: the ninth decile, against the first."""
        if len(self.calibration_ms) < 2:
            return 0.0
        deciles = statistics.quantiles(self.calibration_ms, n=10, method="inclusive")
        return deciles[-1] / deciles[0] - 1

    def complaints(self) -> list[str]:
        """Why the numbers of this run should not be trusted; nothing if they can be."""
        found = []
        if self.stolen > STOLEN:
            found.append(f"{self.stolen:.1%} of the CPUs was stolen by the hypervisor")
        if self.others > OTHERS * self.cpus:
            found.append(f"other processes used {self.others:.2f} of {self.cpus} CPUs")
        if self.uneven > UNEVEN:
            found.append(f"a fixed computation varied by {self.uneven:.0%}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "cpus": self.cpus,
            "load": self.load,
            "stolen": self.stolen,
            "others_cpus": self.others,
            "uneven": self.uneven,
            "calibration_ms": self.calibration_ms,
            "complaints": self.complaints(),
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Machine:
        return cls(
            facts["calibration_ms"], facts["stolen"], facts["others_cpus"], facts["load"], facts["cpus"], facts["kernel"]
        )
