"""What the tests of Megatron's engines ask of each.

What comes in: a trainer, in this process or in a lab. What goes out: its numbers, to be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from app.ops import Loss, OptimStep
from app.worker.trainers.base import Example, Pass
from tests.worker.trainees import spec

STEP = OptimStep(5e-3, weight_decay=0.1, grad_clip_norm=1.0)
STATE = "state.safetensors"


def weighted(given: list[Example]) -> list[Example]:
    """The sum of their weights is 1, so that tolerances are those of a mean."""
    total = sum(float(example.weights.sum()) for example in given)
    return [replace(example, weights=example.weights / total) for example in given]


def vectors(trainer: Any, run: str, folder: Path) -> dict[str, Tensor]:
    """What a state holds; all engines write the same."""
    folder.mkdir()
    trainer.save_state(run, folder)
    return load_file(folder / STATE)


def rows(given: Sequence[Example]) -> list[list[int]]:
    return [[*example.tokens.tolist(), int(example.targets[-1])] for example in given]


def close(found: object, wanted: object, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def flat(logprobs: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in logprobs for value in row])


def learn(trainer: Any, run: str, given: list[Example], steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(trainer.forward_backward([Pass(run, given)])[0].metrics["loss:sum"])
        trainer.optim_step(run, STEP)
    return found


def agree(trainer: Any, other: Any, given: list[Example], loss: Loss, folder: Path) -> None:
    """A pass of both from one state, made by the other, gives the same numbers and gradient."""
    task = Pass("r", given, loss)
    other.create("r", spec(7))
    # Away from the start, where B is zero and the gradient of A is too.
    other.optim_step("r", OptimStep(0.0))
    other.forward_backward([Pass("r", given)])
    other.optim_step("r", STEP)
    vectors(other, "r", folder / "state")
    trainer.create("r", spec(8))
    trainer.load_state("r", folder / "state", optimizer=True)
    found, wanted = trainer.forward_backward([task])[0], other.forward_backward([task])[0]
    assert found.metrics.keys() == wanted.metrics.keys()
    for name in found.metrics.keys() - {"seconds:max"}:
        close(found.metrics[name], wanted.metrics[name], 1e-4)
    for mine, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        close(mine, theirs, 1e-4)
    mine, theirs = vectors(trainer, "r", folder / "a"), vectors(other, "r", folder / "b")
    assert theirs["gradient"].abs().max() > 1e-3
    for kind in theirs:
        close(mine[kind], theirs[kind], 1e-4)
    trainer.drop("r")
