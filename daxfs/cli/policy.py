"""`daxfs policy`: what a file's own layout changes do about pinned blocks."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Annotated

import typer

from daxfs.cli.output import Failure, print_json

XATTR = "user.daxfs.policy"
DEFAULT = "default"


def policy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file on a daxfs mount.")],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="busy, wait, fail, lease, revoke or unsafe; `default` takes it away again.",
            show_default=False,
        ),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show or set the break policy of FILE.

    What a truncate or hole punch of the file does about pinned blocks. A file without a policy of its own has the mount's.
    It is kept as an extended attribute (user.daxfs.policy).
    """
    from daxfs import client

    with client.open(file):
        mount = client.info(file)["policy"]
    if name:
        _set(file, name)
    own = _get(file)
    if json:
        print_json({"file": str(file), "policy": own or mount, "own": bool(own)})
    else:
        print(f"{own or mount}{'' if own else ' (of the mount)'}")


def _set(file: Path, name: str) -> None:
    from daxfs.core.policy import POLICIES

    if not stat.S_ISREG(os.stat(file).st_mode):
        raise Failure(f"{file} is not a regular file: only those have a policy of their own")
    if name == DEFAULT:
        try:
            os.removexattr(file, XATTR)
        except OSError as problem:
            if problem.errno != errno.ENODATA:
                raise
    elif name not in POLICIES:
        raise Failure(f"unknown policy {name!r}; there are: {', '.join(POLICIES)}, {DEFAULT}", 2)
    else:
        os.setxattr(file, XATTR, name.encode())


def _get(file: Path) -> str:
    try:
        return os.getxattr(file, XATTR).decode("ascii", "replace")
    except OSError as problem:
        if problem.errno == errno.ENODATA:
            return ""
        raise
