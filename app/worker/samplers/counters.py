"""What the engine has done, in plain integers that `/metrics` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.worker.samplers.sequence import Sequence


@dataclass(slots=True)
class Counters:
    """Written by the engine thread only."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    ended: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0)
    )

    def finished(self, reason: str, count: int = 1) -> None:
        self.ended[reason] += count

    def observe(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        self.running, self.waiting = len(running), len(waiting)
        self.running_adapters, self.waiting_adapters = _names(running), _names(waiting)


def _names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.adapter.name for one in sequences if one.adapter is not None))
