"""`daxfs policy`: what a file's own layout changes do about pinned blocks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

from daxfs.cli.output import Failure, print_json

XATTR = "user.daxfs.policy"
DEFAULT = "default"


def policy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file on a daxfs mount.")],
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="busy, wait, fail, lease, revoke, unsafe; default: the mount's.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show or set the break policy of FILE.

    A file without a policy of its own has the mount's. The policy is kept as an extended attribute.
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
