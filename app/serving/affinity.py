"""Which replicas have lately been sent which prompt prefixes, so that their caches are used again.

What comes in: an adapter version's name and the first bytes of a prompt as they stand in the
request. What goes out: how much of that prefix each replica has seen. An engine's prefix cache is
keyed by adapter, so this is too. Bounded memory; knows no tokens and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Bytes of JSON in a block. A block is counted when it is whole, as an engine counts its own.
BLOCK = 1024
#: Blocks remembered, in two generations.
CAPACITY = 1 << 16


def blocks(name: str, beginning: bytes | memoryview) -> list[int]:
    """Chained hashes of the whole blocks of a prompt's beginning: the last stands for all of it."""
    if len(beginning) < BLOCK:
        return []
    prefix = bytes(beginning)
    chain: list[int] = []
    seed = hash(name)
    for start in range(0, len(prefix) - BLOCK + 1, BLOCK):
        seed = hash((seed, prefix[start : start + BLOCK]))
        chain.append(seed)
    return chain


class PrefixTable:
    """block -> the replicas that were sent it, one bit each (`LiveReplica.bit`).

    When the younger generation is full, the older one is dropped: what was used since then is in
    the younger one, so the table forgets what was used least recently, roughly, without a list.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._half = capacity // 2
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def note(self, chain: Sequence[int], bit: int) -> None:
        """A prompt with these blocks is sent to the replica of `bit`."""
        young, old = self._young, self._old
        if not chain or young.get(chain[-1], 0) & bit:
            return  # and so do all the blocks before it
        for block in chain:
            young[block] = young.get(block, 0) | old.get(block, 0) | bit
        if len(young) >= self._half:
            self._old, self._young = young, {}

    def depths(self, chain: Sequence[int], bits: Sequence[int]) -> list[float]:
        """The share, in [0, 1], of the blocks that each replica has seen from the first one on."""
        young, old = self._young, self._old
        found = [0.0] * len(bits)
        left = len(bits)
        for depth in range(len(chain), 0, -1):
            block = chain[depth - 1]
            seen = young.get(block, 0) | old.get(block, 0)
            if not seen:
                continue
            for at, bit in enumerate(bits):
                if seen & bit and not found[at]:
                    found[at] = depth / len(chain)
                    left -= 1
            if not left:
                break
        return found

    def last_seen(self, chain: Sequence[int]) -> int:
        """The bits of the replicas that have seen most of these blocks."""
        for block in reversed(chain):
            if seen := self._young.get(block, 0) | self._old.get(block, 0):
                return seen
        return 0
