"""What every training engine can do.

What comes in: runs, batches of numbers, folders. What goes out: losses, logprobs, files. All
methods are called on the trainer thread, one at a time. It must not know: HTTP, sequence numbers,
who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from app.domain import LoraSpec, Probe
from app.errors import RequestError
from app.ops import Loss, OptimStep


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of length n; `tokens[i]` predicts `targets[i]`. All tensors are [n], on the CPU.

    `tokens` and `targets` are int64, the others float32. `weights` are zeros where none were
    given for a loss that wants them.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward and backward pass of one run: add the gradient of a loss over `examples`."""

    run: str
    examples: Sequence[Example]
    loss: Loss = "cross_entropy"
    config: Mapping[str, float] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True, slots=True)
class PassResult:
    """`metrics` are those of `ops.Result`; `logprobs[i]` is [n] float32 of example i's targets."""

    metrics: Mapping[str, float]
    logprobs: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine is: see `ops.TrainerInfo`. `parallel` has the sizes of tp, pp and dp."""

    kind: str
    dtype: str
    max_length: int
    target_modules: tuple[str, ...]
    parallel: Mapping[str, int]


class Trainer(Protocol):
    """An engine that holds one frozen base and the adapters of its runs."""

    @property
    def facts(self) -> Facts: ...

    def create(self, run: str, spec: LoraSpec) -> None:
        """Make an adapter that changes nothing yet; its first weights depend on the seed alone.

        Raises:
            InvalidRequest: a target module that the base does not have.
            OutOfMemory: no room for it.
        """

    def drop(self, run: str) -> None:
        """Forget a run and free what it held; one that is not there is fine."""

    def forward_backward(self, passes: Sequence[Pass]) -> list[PassResult | RequestError]:
        """Passes of different runs, together where the engine can; in the order given.

        One that fails (TrainingFailed: a loss that is not finite, no memory even alone;
        InvalidRequest: data or config that its loss cannot take) leaves its run's gradient as it
        was before, and harms no other.
        """

    def optim_step(self, run: str, step: OptimStep) -> Mapping[str, float]:
        """AdamW on the gradient so far, which is cleared; answers `grad_norm:mean` before clipping.

        Raises:
            NonFiniteLoss: the gradient is not finite; weights and moments are as before.
        """

    def save_state(self, run: str, folder: Path) -> None:
        """Write weights, moments, gradient and step count into a folder that is empty."""

    def load_state(self, run: str, folder: Path, *, optimizer: bool) -> None:
        """Take over what `save_state` wrote for a run of the same shape."""

    def save_adapter(self, run: str, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does."""

    def probe(self, run: str, token_ids: Sequence[Sequence[int]]) -> Probe:
        """The logprobs of each row's ids after the first, with the run's weights as they are."""

    def close(self) -> None:
        """Let go of everything; called once, last."""
