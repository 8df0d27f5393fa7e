"""Tests that use a real mount with real system calls: conftest.py has the fixtures, harness.py the mount itself."""
