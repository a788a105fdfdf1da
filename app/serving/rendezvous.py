"""Rendezvous hashing: an order of the replicas for each adapter, the same in every gateway.

What comes in: names. What goes out: weights to order by. A replica that comes or goes changes the
place of those adapters alone for which it was, or becomes, first. (D. Thaler, C. Ravishankar,
"Using name-based mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998.)
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

_MASK = (1 << 64) - 1


@lru_cache(maxsize=1 << 16)
def key(name: str) -> int:
    """64 well-mixed bits of a name; odd, so that products of two keys lose nothing."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def weight(adapter: int, replica: int) -> int:
    """How much an adapter wants a replica, both as `key`s. The larger comes first."""
    product = adapter * replica & _MASK
    # The low bits of a product depend on the low bits of its factors alone: fold the high ones in.
    return (product ^ (product >> 29)) * 0x9E3779B97F4A7C15 & _MASK
