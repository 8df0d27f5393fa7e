"""What is left of pyfuse3's handlers: none.

The native session hands every request that means anything to raw.py and names.py, which decode it, call the core and reply;
pyfuse3 has the mount, and the first and last words with the kernel (INIT, DESTROY).

Requests that nobody takes (locks, which the kernel keeps itself; BMAP) are libfuse's to refuse.
"""

from __future__ import annotations

import pyfuse3


class Operations(pyfuse3.Operations):
    supports_dot_lookup = True
    enable_acl = True
