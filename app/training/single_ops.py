"""Single ops as they wait in the queue: what a client of the Tink API asked for.

What comes in and goes out: the JSON of a job's `spec`, typed here for who writes and who reads it.
It must not know: SQL, HTTP, workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from app.ops import Loss, OptimStep


class _Spec(msgspec.Struct, frozen=True, tag_field="op", omit_defaults=True):
    """What all have in common: the `run` they are about."""

    run: str


class AddLora(_Spec, frozen=True, tag="add_lora"):
    """Make the run, and its fresh adapter version 1."""


class RemoveLora(_Spec, frozen=True, tag="remove_lora"):
    """Forget the run, and delete its adapter."""


class FwdBwd(_Spec, frozen=True, tag="fwdbwd"):
    """A forward and backward pass over `data`, in any of the forms of `training.op_data`."""

    data: list[Any]
    loss: Loss = "cross_entropy"
    config: dict[str, float] = {}
    forward_only: bool = False
    outputs: bool = False


class Optim(_Spec, frozen=True, tag="optim"):
    """An optimizer step; its fields are those of `ops.OptimStep`."""

    adam: dict[str, float]

    def step(self) -> OptimStep:
        return OptimStep(**self.adam)


class Sample(_Spec, frozen=True, tag="sample"):
    """Completions of `prompts`. `model` is the name to ask for; without one, it is the version of
    the run's adapter that has the weights as they are at this op. `run` is empty for a base.
    """

    prompts: list[str | list[int]]
    params: dict[str, Any]
    model: str | None = None


Spec = AddLora | RemoveLora | FwdBwd | Optim | Sample


def read(spec: Mapping[str, Any]) -> Spec:
    found: Spec = msgspec.convert(dict(spec), Spec)
    return found


def stored(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(spec)
    return found
