"""What a model can take, when its sequences end, and what its folder asks for by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.worker.samplers.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """`stop_token_ids` end a sequence beside `eos_id`; unlike it, they are told as the reason."""

    vocab_size: int
    max_model_len: int
    eos_id: int | None
    stop_token_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    def forbidden_early(self, params: SamplingParams) -> list[int]:
        """Tokens that may not be drawn before `min_tokens` is reached."""
        eos = [] if self.eos_id is None else [self.eos_id]
        return [*eos, *self.stop_token_ids, *params.stop_token_ids]
