"""The service: trio and pyfuse3 around the core.

The native session must be in the process before libfuse is looked up by pyfuse3, so it is loaded here, first of all.
"""

from daxfs.daemon import session as session
