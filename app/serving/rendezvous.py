"""Rendezvous hashing: an order of the replicas for each adapter, the same in every gateway.

What comes in: names. What goes out: weights to order by. A replica that comes or goes changes the
place of those adapters alone for which it was, or becomes, first. (D. Thaler, C. Ravishankar,
"Using name-based mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

MASK = (1 << 64) - 1


@lru_cache(maxsize=1 << 16)
def key(name: str) -> int:
    """64 well-mixed bits of a name; odd, so that a product of two keys loses nothing."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def weights(adapter: int, replicas: Sequence[int]) -> list[int]:
    """How much an adapter wants each replica, all of them as `key`s. The largest comes first.

    Multiplicative hashing (D. Knuth, The Art of Computer Programming, vol. 3, section 6.4): the
    high bits of a product depend on all bits of both factors, and they decide the order.
    """
    return [adapter * replica & MASK for replica in replicas]
