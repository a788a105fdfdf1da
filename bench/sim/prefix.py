"""A replica's prefix cache: blocks of prompt tokens, found by adapter and by all that precedes.

What comes in: an adapter and a prompt. What goes out: the keys of its full blocks, and how many of
the first are cached. A block is as large as vLLM's; the oldest leaves when there are too many.
A prompt of token ids and one of text share no block: nothing here tokenizes as a model would.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

#: Text is cut into tokens of so many bytes, about what English takes.
BYTES_PER_TOKEN = 4

Prompt = str | Sequence[int]


def prompt_bytes(prompt: Prompt) -> bytes:
    """A prompt as it is hashed."""
    return prompt.encode() if isinstance(prompt, str) else array("q", prompt).tobytes()


def count_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return -(-len(prompt.encode()) // BYTES_PER_TOKEN)
    return len(prompt)


def block_keys(adapter: str, prompt: Prompt, block_tokens: int) -> list[int]:
    """A key for every full block, each made from the one before it."""
    data = prompt_bytes(prompt)
    width = block_tokens * (BYTES_PER_TOKEN if isinstance(prompt, str) else array("q").itemsize)
    key = hash(adapter)
    keys = []
    for end in range(width, len(data) + 1, width):
        key = hash((key, data[end - width : end]))
        keys.append(key)
    return keys


class PrefixCache:
    """Which blocks are in memory. `held` are those that running requests need for their answers."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.held = 0
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cached)

    @property
    def usage(self) -> float:
        """The part of the blocks that running requests hold."""
        return min(1.0, self.held / self.blocks)

    def leading(self, keys: Sequence[int]) -> int:
        """How many of the first blocks are cached; they count as just used."""
        found = 0
        for key in keys:
            if key not in self._cached:
                break
            self._cached.move_to_end(key)
            found += 1
        return found

    def add(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > max(0, self.blocks - self.held):
            self._cached.popitem(last=False)
