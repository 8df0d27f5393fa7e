"""`python -m daxfs.cli` is `daxfs`."""

from daxfs.cli.app import main

main()
