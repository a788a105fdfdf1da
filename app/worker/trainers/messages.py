"""From a message's numbers to an engine's tensors, and back.

What comes in: `forward_backward` ops of several runs. What goes out: a result or an error for
each. Runs on the trainer thread. It must not know: HTTP, sequence numbers, disks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.errors import InvalidRequest, LoragateError, RequestError
from app.ops import Datum, ForwardBackward, Result, Tensor
from app.worker.trainers.base import Example, Pass, PassResult, Trainer

_WIDTH = 4
_DTYPES = {"int32": torch.int32, "float32": torch.float32}
_POLICY = ("importance_sampling", "ppo", "cispo")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a sequence may be: its length, and the ids that the model has."""

    max_length: int
    vocab_size: int


def together(
    trainer: Trainer, asked: Sequence[tuple[str, ForwardBackward]], bounds: Bounds
) -> list[Result | LoragateError]:
    """Do the ops of several runs in one call of the engine; one that is wrong harms no other."""
    checked = [_pass(run, op, bounds) for run, op in asked]
    passes = [each for each in checked if isinstance(each, Pass)]
    answers = iter(trainer.forward_backward(passes) if passes else ())
    return [
        _result(op, next(answers)) if isinstance(each, Pass) else each
        for each, (_, op) in zip(checked, asked, strict=True)
    ]


def tensor(values: torch.Tensor) -> Tensor:
    """Float32 numbers as a message carries them."""
    array = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return Tensor("float32", tuple(values.shape), array.tobytes())


def _pass(run: str, op: ForwardBackward, bounds: Bounds) -> Pass | InvalidRequest:
    try:
        if not op.data:
            raise InvalidRequest("`data` is empty: a pass needs at least one sequence")
        if op.loss == "dpo" and len(op.data) % 2:
            raise InvalidRequest(
                f"`data` has {len(op.data)} sequences, and the loss dpo takes pairs"
            )
        examples = [_example(place, datum, op, bounds) for place, datum in enumerate(op.data)]
    except InvalidRequest as exc:
        return exc
    return Pass(run, examples, op.loss, op.config, op.forward_only)


def _example(place: int, datum: Datum, op: ForwardBackward, bounds: Bounds) -> Example:
    where = f"data[{place}]"
    tokens = _ids(f"{where}.tokens", datum.tokens, bounds)
    targets = _ids(f"{where}.targets", datum.targets, bounds)
    length = len(tokens)
    if not 1 <= length <= bounds.max_length:
        raise InvalidRequest(
            f"{where} has {length} tokens; 1 to {bounds.max_length} are allowed here"
        )
    weights = _numbers(f"{where}.weights", datum.weights, length)
    logprobs = _numbers(f"{where}.logprobs", datum.logprobs, length)
    advantages = _numbers(f"{where}.advantages", datum.advantages, length)
    if len(targets) != length:
        raise InvalidRequest(f"{where}.targets has {len(targets)} ids for {length} tokens")
    if op.loss in _POLICY and (logprobs is None or advantages is None):
        raise InvalidRequest(f"{where} needs `logprobs` and `advantages` for the loss {op.loss}")
    return Example(
        tokens=tokens,
        targets=targets,
        weights=torch.zeros(length) if weights is None else weights,
        logprobs=logprobs,
        advantages=advantages,
    )


def _ids(where: str, given: Tensor, bounds: Bounds) -> torch.Tensor:
    if given.dtype != "int32":
        raise InvalidRequest(f"{where} is {given.dtype}; token ids are int32")
    ids = _unpacked(where, given).to(torch.int64)
    # A GPU answers an id out of range by failing every later pass of every run.
    strange = ids[(ids < 0) | (ids >= bounds.vocab_size)]
    if len(strange):
        raise InvalidRequest(
            f"{where} has the id {int(strange[0])}; ids are 0 to {bounds.vocab_size - 1}"
        )
    return ids


def _numbers(where: str, given: Tensor | None, length: int) -> torch.Tensor | None:
    if given is None:
        return None
    if given.dtype != "float32":
        raise InvalidRequest(f"{where} is {given.dtype}; it must be float32")
    values = _unpacked(where, given)
    if len(values) != length:
        raise InvalidRequest(f"{where} has {len(values)} numbers for {length} tokens")
    return values


def _unpacked(where: str, given: Tensor) -> torch.Tensor:
    if len(given.shape) != 1 or len(given.data) != _WIDTH * given.shape[0]:
        raise InvalidRequest(
            f"{where} has the shape {list(given.shape)} and {len(given.data)} bytes; it must be "
            f"one-dimensional with {_WIDTH} bytes a number"
        )
    if not given.data:
        return torch.empty(0, dtype=_DTYPES[given.dtype])
    # A copy: torch warns of memory that it may not write to.
    return torch.frombuffer(bytearray(given.data), dtype=_DTYPES[given.dtype])


def _result(op: ForwardBackward, answer: PassResult | RequestError) -> Result | LoragateError:
    if isinstance(answer, RequestError):
        return answer
    outputs = [tensor(each) for each in answer.logprobs] if op.outputs else []
    return Result(metrics=dict(answer.metrics), outputs=outputs)
