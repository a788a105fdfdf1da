"""Which example is computed where, and with which others.

What comes in: lengths. What goes out: for each copy of the model its batches of indices, the same
on every rank that asks. Pure. It must not know: tensors, ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.worker.trainers import packing

Unit = tuple[int, ...]


def deal(lengths: Sequence[int], together: int, copies: int) -> list[list[Unit]]:
    """Units of `together` neighbours for each copy of the model, with about as many tokens.

    Longest first, each to the copy that has least. A copy may get none.
    """
    units = [tuple(range(at, at + together)) for at in range(0, len(lengths), together)]
    hands = packing.deal([_tokens(unit, lengths) for unit in units], copies)
    return [[units[place] for place in hand] for hand in hands]


def batches(units: Sequence[Unit], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Units in their order, cut into batches of at most `limit` tokens; a longer one is alone."""
    found: list[list[int]] = []
    room = 0
    for unit in units:
        needed = _tokens(unit, lengths)
        if not found or needed > room:
            found.append([])
            room = limit
        found[-1].extend(unit)
        room -= needed
    return found


def _tokens(unit: Unit, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in unit)
