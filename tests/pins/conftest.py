"""The mounts of tests/mount, for holders on a real one."""

from tests.mount.conftest import base, make_mount, mount, shared_mount

__all__ = ["base", "make_mount", "mount", "shared_mount"]
