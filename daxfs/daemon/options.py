"""`-o` options of a mount: which there are, what they mean for daxfs, for the kernel, for nobody.

An option that is not in the tables is an error that names it: a mount that quietly ignores a wish is worse than none.
`default_permissions` is always on: the kernel checks every permission, the daemon none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from daxfs.errors import BadArgument, NotPermitted

# Options that go to the kernel's mount call as they are. As mount(8) has it, suid and dev are on when root mounts.
_KERNEL = {"ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync", "allow_other"}
_OPPOSITE = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "ro": "rw", "sync": "async"}
_OPPOSITE |= {no: yes for yes, no in _OPPOSITE.items()}
_OURS = {"rw", "async", "defaults", "default_permissions", "nonempty", "hostsync", "hotpath"}
_PRIVILEGED = {"suid", "dev"}


@dataclass(frozen=True)
class MountOptions:
    readonly: bool = False
    nonempty: bool = False
    hostsync: bool = False
    hotpath: bool = True
    kernel: frozenset[str] = frozenset()

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
            hotpath=chosen.get("hotpath") != "off",
            kernel=frozenset(chosen.keys() & _KERNEL),
        )

    def for_libfuse(self, image: str) -> set[str]:
        """What libfuse gets: `df` and `mount` show the image as the source and daxfs as the type."""
        return {*self.kernel, "default_permissions", "subtype=daxfs", f"fsname={_escape(image)}"}


def _check(name: str, value: str, option: str) -> None:
    if name not in _KERNEL | _OURS:
        known = ", ".join(sorted(_KERNEL | _OURS - {"hotpath"} | {"hotpath=on|off"}))
        raise BadArgument(f"unknown option {option!r} of -o; there are: {known}")
    if name == "hotpath":
        if value not in ("on", "off"):
            raise BadArgument(f"-o {option}: say hotpath=on or hotpath=off")
    elif value or option.endswith("="):
        raise BadArgument(f"-o {option}: {name} takes no value")


def _escape(path: str) -> str:
    """As libfuse's option parser wants it: pyfuse3 passes ASCII only, and commas and backslashes mean something."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=@%:"
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(path))
