"""Which examples are computed together, and where.

What comes in: the lengths of examples and whose they are. What goes out: batches of a bounded
number of tokens, and shares of like size. Pure. It must not know: tensors, models, losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """Examples that must be in one batch: their places in their owner's list, and lengths."""

    owner: int
    examples: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Share:
    """What one owner has in a batch: `tokens` tokens, `start` the first of them."""

    owner: int
    examples: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """The places of sizes, dealt out so that the sums are about the same. A hand may be empty.

    Largest first, each to the hand that has least (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        least = sums.index(min(sums))
        dealt[least].append(place)
        sums[least] += sizes[place]
    return dealt


def batches(units: Sequence[Unit], limit: int) -> Iterator[list[Share]]:
    """Cut units into batches of at most `limit` tokens; a longer unit is a batch by itself.

    Those of like length go together. In a batch owners are in order, and nothing is between them.
    """
    batch: list[Unit] = []
    for unit in sorted(units, key=lambda unit: -max(unit.lengths)):
        if batch and sum(each.tokens for each in batch) + unit.tokens > limit:
            yield _shares(batch)
            batch = []
        batch.append(unit)
    if batch:
        yield _shares(batch)


def _shares(units: Sequence[Unit]) -> list[Share]:
    owned: dict[int, list[Unit]] = {}
    for unit in units:
        owned.setdefault(unit.owner, []).append(unit)
    shares, start = [], 0
    for owner, mine in sorted(owned.items()):
        mine.sort(key=lambda unit: unit.examples)
        examples = tuple(example for unit in mine for example in unit.examples)
        lengths = tuple(length for unit in mine for length in unit.lengths)
        shares.append(Share(owner, examples, lengths, start))
        start += sum(lengths)
    return shares
