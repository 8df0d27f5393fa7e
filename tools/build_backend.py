"""The build backend: setuptools, told by pkg-config where the FUSE library is.

Everything else about the build is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import subprocess

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a backend is a module with these functions

HELP = "install it with: apt install pkg-config libfuse3-dev"


def _pkg_config(what: str) -> list[str]:
    try:
        return shlex.split(subprocess.check_output(["pkg-config", what, "fuse3"], text=True))
    except FileNotFoundError:
        raise SystemExit(f"daxfs needs pkg-config to build; {HELP}") from None
    except subprocess.CalledProcessError:
        raise SystemExit(f"daxfs needs the headers of libfuse 3 to build; {HELP}") from None


def _with_fuse() -> None:
    """Add the flags to the environment, which is where setuptools takes more flags from."""
    for variable, what in (("CFLAGS", "--cflags"), ("LDFLAGS", "--libs-only-L")):
        given = os.environ.get(variable, "")
        os.environ[variable] = " ".join([given, *_pkg_config(what)]).strip()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _with_fuse()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _with_fuse()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
