"""A daemon with bugs on demand: each handler, ioctl and worker asks, before it does its work, whether it is to fail now.

`install` runs in the process that becomes the daemon (warm.py), `arm` in the test. What is to fail is the text of a file, a
name and an exception; who finds its own name there removes the file and raises.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daxfs import abi
from tests.mount.harness import Mounted

SETUP = "tests.faults.faulty"
TEXT = "a bug for the test"
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (MemoryError, RuntimeError, KeyError, RecursionError, OSError, AssertionError)
}
_VARIABLE = "DAXFS_TEST_FAULT"


def place(mounted: Mounted) -> Path:
    return mounted.home / "fault"


def start(mounted: Mounted, options: str = "allow_other,hotpath=off") -> dict[str, list[str]]:
    """Mount with such a daemon. The names of what can fail, by kind: raw, ioctl, worker."""
    os.environ[_VARIABLE] = str(place(mounted))
    try:
        mounted.mount(options, setup=SETUP)
    finally:
        del os.environ[_VARIABLE]
    with open(f"{place(mounted)}.names") as file:
        names: dict[str, list[str]] = json.load(file)
    return names


def arm(mounted: Mounted, name: str, kind: str) -> None:
    temporary = mounted.home / "fault.new"
    temporary.write_text(f"{name} {kind}")
    temporary.rename(place(mounted))


def install() -> None:
    from daxfs.core.directory import Directory
    from daxfs.core.volume import Volume
    from daxfs.daemon import session, survivors
    from daxfs.daemon.admin import Admin
    from daxfs.daemon.control import Control
    from daxfs.daemon.raw import RawRequests

    where = Path(os.environ[_VARIABLE])
    names: dict[str, list[str]] = {"raw": [], "ioctl": [], "worker": []}

    def strike(name: str) -> None:
        try:
            wanted, kind = where.read_text().split()
        except FileNotFoundError:
            return
        if wanted == name:
            where.unlink()
            raise KINDS[kind](TEXT)

    def striking(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **more: Any) -> Any:
            strike(name)
            return work(*args, **more)

        return first

    translated = RawRequests._translated

    def translated_striking(self: RawRequests, handler: Callable[..., Any]) -> Any:
        names["raw"].append(handler.__name__)
        return translated(self, striking(f"raw:{handler.__name__}", handler))

    RawRequests._translated = translated_striking  # type: ignore[method-assign]
    numbers = {number: key for key, number in vars(abi).items() if key.startswith("IOC_")}
    init = Control.__init__

    def init_striking(self: Control, *args: Any) -> None:
        init(self, *args)
        for number, call in self._calls.items():
            names["ioctl"].append(numbers[number])
            self._calls[number] = striking(f"ioctl:{numbers[number]}", call)

    Control.__init__ = init_striking  # type: ignore[method-assign]
    owners: dict[str, Any] = {
        "lookup": Directory, "free_unpinned": Volume, "gone": survivors, "look": session, "text": Admin,
    }  # fmt: skip
    for name, owner in owners.items():
        names["worker"].append(name)
        setattr(owner, name, striking(f"worker:{name}", getattr(owner, name)))
    put_in = RawRequests.install

    def put_in_and_tell(self: RawRequests, **options: Any) -> None:
        put_in(self, **options)
        Path(f"{where}.names").write_text(json.dumps(names))

    RawRequests.install = put_in_and_tell  # type: ignore[method-assign]
