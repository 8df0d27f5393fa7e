"""`mount.daxfs`: daxfs as mount(8), fstab(5) and mount.fuse3(8) call a file system.

    mount.daxfs IMAGE DIRECTORY [-fnsv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]

mount(8) looks for mount.daxfs (`-t daxfs`) or mount.fuse.daxfs (`-t fuse.daxfs`) in /sbin; a plain `daxfs IMAGE DIRECTORY
-o OPTIONS`, as mount.fuse3 calls it, is the same. Options that mean something to mount(8) alone are left out; `image_size=`,
`policy=` and `log=` may be given as options, too.
"""

from __future__ import annotations

import getopt

# What fstab(5) and mount(8) keep for themselves, or what is always so.
_IGNORED = {
    "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "relatime", "strictatime",
    "defaults", "loud", "silent",
}  # fmt: skip
_OURS = {"image_size": "--size", "policy": "--policy", "log": "--log"}


def translate(arguments: list[str]) -> list[str] | None:
    """The arguments of `daxfs` for a call by mount(8); None if it is no such call."""
    try:
        options, places = getopt.gnu_getopt(arguments, "fnsvN:t:o:")
    except getopt.GetoptError:
        return None
    if len(places) != 2:
        return None
    image, directory = places
    command = ["mount", "--image", image, directory]
    for name, value in options:
        if name != "-o":
            continue
        for option in value.split(","):
            key, _, given = option.partition("=")
            if key in _OURS:
                command += [_OURS[key], given]
            elif key and key not in _IGNORED and not key.startswith("x-"):
                command += ["-o", option]
    return command
