"""`daxfs.client.gup` by its short name."""

from daxfs.client.gup import *  # noqa: F403
from daxfs.client.gup import __all__ as __all__
