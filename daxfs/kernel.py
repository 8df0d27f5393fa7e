"""`daxfs.client.kernel` by its short name."""

from daxfs.client.kernel import *  # noqa: F403
from daxfs.client.kernel import __all__ as __all__
