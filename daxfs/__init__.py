"""daxfs: a file system on emulated persistent memory, where a pinned block survives truncate and hole punch."""

__version__ = "0.1.0"
