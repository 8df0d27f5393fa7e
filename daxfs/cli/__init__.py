"""What a person types: the commands of `daxfs` (app.py has the list), one module for those that belong together.

Rules: data goes to stdout, messages to stderr; `--json` wherever data is shown; every error is one line and an exit
code (1, or 2 for usage; fsck has fsck(8)'s), never a traceback. Heavy modules are imported by who needs them.
"""

from daxfs.cli.app import main, mount_helper

__all__ = ["main", "mount_helper"]
