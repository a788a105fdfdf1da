"""What the engine has done, in plain integers that `/metrics` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.worker.samplers.adapters import Adapter
    from app.worker.samplers.sequence import Sequence
    from app.worker.samplers.waiting import Waiting


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

    def observe(self, running: list[Sequence], waiting: Waiting) -> None:
        """Note who is where, once per step."""
        self.running = len(running)
        self.waiting = sum(len(group.sequences) for group in waiting)
        self.running_adapters = _names(one.adapter for one in running)
        self.waiting_adapters = _names(group.adapter for group in waiting)


def _names(adapters: Iterable[Adapter | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.name for one in adapters if one is not None))
