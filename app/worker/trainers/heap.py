"""What the C library does with memory that a pass has done with.

What comes in: nothing. What goes out: a process that keeps it for the next pass. It must not
know: torch, runs.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of mallopt(3), in <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
#: Smaller pieces come from what is kept; glibc takes no more than half of a thread's arena.
PIECE = 32 << 20
#: What an arena keeps at most, and what it asks the system for beyond what it needs now.
KEPT = 1 << 30
PAD = 64 << 20


def keep() -> bool:
    """From now on keep what is freed: whether this C library can be told so.

    By itself glibc gives the activations of a pass back, and the system clears every page of them
    for the next: on a small model a tenth of a pass of many runs.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = ((_M_MMAP_THRESHOLD, PIECE), (_M_TRIM_THRESHOLD, KEPT), (_M_TOP_PAD, PAD))
    return all(mallopt(number, value) for number, value in told)
