"""`daxfs.client.verbs` by its short name."""

from daxfs.client.verbs import *  # noqa: F403
from daxfs.client.verbs import __all__ as __all__
