"""Tests that use a real mount with real system calls; see conftest.py for the fixtures and harness.py for the mount itself."""
