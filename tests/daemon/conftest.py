"""The mounts of tests/mount, for the daemon's own tests."""

from tests.mount.conftest import base, make_mount, mount

__all__ = ["base", "make_mount", "mount"]
