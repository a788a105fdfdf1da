"""Single ops as they wait in the queue: what a client of the Tink API asked for.

What comes in and goes out: the JSON of a job's `spec`, typed here for who writes and who reads it,
and a payload apart from it: what the op works on, which may be large and is not kept for ever. The
spec says the payload's digest. It must not know: SQL, HTTP, workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
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


#: What of an op is its payload.
_PAYLOADS = {"fwdbwd": "data", "sample": "prompts"}


@dataclass(frozen=True, slots=True)
class Stored:
    """An op as it is kept: its job's spec, and its payload if it has one."""

    spec: Mapping[str, Any]
    payload: bytes | None = None


def stored(spec: Spec) -> Stored:
    """The op apart from its payload."""
    told: dict[str, Any] = msgspec.to_builtins(spec)
    field = _PAYLOADS.get(told["op"])
    if field is None:
        return Stored(told)
    payload = msgspec.json.encode(told.pop(field))
    return Stored(told | {"payload": hashlib.sha256(payload).hexdigest()}, payload)


def trains(spec: Mapping[str, Any]) -> bool:
    """Whether the weights of its run depend on the op of a job's `spec`."""
    return spec["op"] == "optim" or (spec["op"] == "fwdbwd" and not spec.get("forward_only"))


def read(spec: Mapping[str, Any], payload: bytes | None = None) -> Spec:
    """The op again. Without its payload, it must be one that has none."""
    told = dict(spec)
    if payload is not None:
        told[_PAYLOADS[told["op"]]] = msgspec.json.decode(payload)
    found: Spec = msgspec.convert(told, Spec)
    return found
