"""Placeholder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter's files say of themselves, once checked. `rank` is the largest."""

    rank: int
    target_modules: tuple[str, ...]
    tensors: int
    bytes: int
