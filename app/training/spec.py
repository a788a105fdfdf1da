"""What a fine-tune job was asked to do, and what came of it: the `spec` and `result` of its row.

What comes in: a request that was checked, or the JSON of a job. What goes out: the same, typed.
None stands for "auto": the plan decides it when the data is known, and says in the job's
`progress` and result, under `hyperparameters`, what it chose. Of `progress` the API shows that,
and `estimated_finish` (Unix seconds); the rest is the handler's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Method = Literal["supervised", "dpo"]
Schedule = Literal["constant", "linear", "cosine"]


class FineTuneSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A fine-tune job, as the caller wants it.

    `model` is the name its result gets (`ft:<base>:<suffix>:<id>`), decided at submission and
    taken by no other. Files are ids. `target_modules` None stands for all that the trainer has but
    the output layer. `learning_rate` is absolute and wins over `learning_rate_multiplier`.
    `max_length` is in tokens and never above the trainer's own. `warmup_ratio` is a fraction of
    all steps; `grad_clip_norm` 0 clips nothing.
    """

    base_model: str
    model: str
    training_file: str
    seed: int
    method: Method = "supervised"
    validation_file: str | None = None
    suffix: str | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    target_modules: tuple[str, ...] | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    learning_rate: float | None = None
    beta: float | None = None
    max_length: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    lr_schedule: Schedule | None = None
    grad_clip_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values only, for a job's row."""
        return dict(msgspec.to_builtins(self))

    @classmethod
    def from_json(cls, spec: Mapping[str, Any]) -> FineTuneSpec:
        """Take up what `to_json` gave.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return msgspec.convert(spec, cls)


class FineTuneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a fine-tune job made. `result_files` are ids; `hyperparameters` are those used."""

    model: str
    trained_tokens: int
    result_files: tuple[str, ...] = ()
    hyperparameters: dict[str, Any] = {}

    def to_json(self) -> dict[str, Any]:
        """JSON values only, for a job's row."""
        return dict(msgspec.to_builtins(self))

    @classmethod
    def from_json(cls, result: Mapping[str, Any]) -> FineTuneResult:
        """Take up what `to_json` gave.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return msgspec.convert(result, cls)
