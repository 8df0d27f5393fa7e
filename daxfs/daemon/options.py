"""`-o` options of a mount: which there are, what they mean for daxfs, for the kernel, for nobody.

An option that is not in the tables is an error that names it: a mount that quietly ignores a wish is worse than none.
`default_permissions` is always on: the kernel checks every permission, the daemon none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from daxfs.core import policy
from daxfs.daemon import caching, coherence, session
from daxfs.errors import BadArgument, NotPermitted

# Options that go to the kernel's mount call as they are. As mount(8) has it, suid and dev are on when root mounts.
_KERNEL = {"ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync", "allow_other"}
_OPPOSITE = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "ro": "rw", "sync": "async"}
_OPPOSITE |= {no: yes for yes, no in _OPPOSITE.items()}
_OURS = {"rw", "async", "defaults", "default_permissions", "nonempty", "hostsync"}
# Options with a value: one of a few words, seconds, or a number of blocks, which are fields of policy.Settings but for
# _PLAIN; and those of how the daemon runs.
_WORDS = {
    "dax": caching.DAX,
    "hotpath": ("on", "off"),
    "policy": tuple(policy.POLICIES),
    "longterm": policy.LONGTERM,
    "lease_then": policy.LEASE_THEN,
}
_PLAIN = {"dax", "hotpath"}
_SECONDS = {"wait_s", "lease_break_s", "invalidate_s", "enospc_wait_s"}
_BLOCKS = {"pins_max"}
_RUNNING = {"cpu", "spin_us", "coherence_ms"}
_PRIVILEGED = {"suid", "dev"}


@dataclass(frozen=True)
class MountOptions:
    readonly: bool = False
    nonempty: bool = False
    hostsync: bool = False
    dax: str = "always"
    hotpath: bool = True
    cpu: int | None = None  # the serving thread runs on this one only
    spin_us: int = session.SPIN_US
    coherence_ms: int = coherence.COHERENCE_MS
    kernel: frozenset[str] = frozenset()
    settings: policy.Settings = field(default_factory=policy.Settings)

    @classmethod
    def parse(cls, given: Iterable[str], *, privileged: bool | None = None) -> MountOptions:
        """From the arguments of `-o`, each a comma-separated list; of opposites the last one counts. BadArgument."""
        privileged = os.geteuid() == 0 if privileged is None else privileged
        chosen: dict[str, str] = dict.fromkeys(_PRIVILEGED if privileged else (), "")
        for option in (part for text in given for part in text.split(",") if part):
            name, _, value = option.partition("=")
            _check(name, value, option)
            if name in _PRIVILEGED and not privileged:
                raise NotPermitted(f"only root may mount with -o {name}: leave it out")
            chosen.pop(_OPPOSITE.get(name, ""), None)
            chosen[name] = value
        return cls(
            readonly="ro" in chosen,
            nonempty="nonempty" in chosen,
            hostsync="hostsync" in chosen,
            dax=chosen.get("dax", "always"),
            hotpath=chosen.get("hotpath") != "off",
            cpu=int(chosen["cpu"]) if "cpu" in chosen else None,
            spin_us=int(chosen.get("spin_us", session.SPIN_US)),
            coherence_ms=int(chosen.get("coherence_ms", coherence.COHERENCE_MS)),
            kernel=frozenset(chosen.keys() & _KERNEL),
            settings=policy.Settings(**_settings(chosen)),
        )

    def for_libfuse(self, image: str) -> set[str]:
        """What libfuse gets: `df` and `mount` show the image as the source and daxfs as the type."""
        return {*self.kernel, "default_permissions", "subtype=daxfs", f"fsname={_escape(image)}"}


def _check(name: str, value: str, option: str) -> None:
    if name in _WORDS:
        if value not in _WORDS[name]:
            raise BadArgument(f"-o {option}: {name} is one of {', '.join(_WORDS[name])}")
    elif name in _SECONDS:
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise BadArgument(f"-o {option}: {name} is a number of seconds, as in {name}=2.5")
    elif name in _RUNNING:
        _check_number(name, value, option)
    elif name in _BLOCKS:
        if not _is_number(value):
            raise BadArgument(f"-o {option}: {name} is a number of blocks, as in {name}=1024")
    elif name not in _KERNEL | _OURS:
        known = [*_KERNEL, *_OURS, *(f"{name}={'|'.join(words)}" for name, words in _WORDS.items()), *_SECONDS, *_BLOCKS]
        known += _RUNNING
        raise BadArgument(f"unknown option {option!r} of -o; there are: {', '.join(sorted(known))}")
    elif value or option.endswith("="):
        raise BadArgument(f"-o {option}: {name} takes no value")


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdecimal() and len(value) < 10


def _check_number(name: str, value: str, option: str) -> None:
    cpus = os.sched_getaffinity(0)
    if name == "cpu" and not (_is_number(value) and int(value) in cpus):
        raise BadArgument(f"-o {option}: there is no such CPU for this process; there are: {_ranges(cpus)}")
    if name == "spin_us" and not (_is_number(value) and int(value) <= session.SPIN_US_MAX):
        raise BadArgument(f"-o {option}: spin_us is a number of microseconds, from 0 to {session.SPIN_US_MAX}")
    if name == "coherence_ms" and not (_is_number(value) and int(value) <= coherence.COHERENCE_MS_MAX):
        most = coherence.COHERENCE_MS_MAX
        raise BadArgument(f"-o {option}: coherence_ms is a number of milliseconds, from 0 (off) to {most}")


def _ranges(numbers: Iterable[int]) -> str:
    """As in "0-3,8"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _settings(chosen: dict[str, str]) -> dict[str, Any]:
    """The fields of policy.Settings that were chosen."""
    words: dict[str, Any] = {name: chosen[name] for name in chosen.keys() & _WORDS.keys() - _PLAIN}
    words.update({name: float(chosen[name]) for name in chosen.keys() & _SECONDS})
    return words | {name: int(chosen[name]) for name in chosen.keys() & _BLOCKS}


def _escape(path: str) -> str:
    """As libfuse's option parser wants it: pyfuse3 passes ASCII only, and commas and backslashes mean something."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=@%:"
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(path))
