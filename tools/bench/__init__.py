"""Benchmarks of daxfs beside its peers, in one run: `python -m tools.bench --help`."""
