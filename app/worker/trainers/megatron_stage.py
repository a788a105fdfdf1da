"""One pipeline stage: batches go through it to the next, their gradients come back.

What comes in: batches of sequences, in one order on every stage. What goes out: logprobs, on the
last stage. It must not know: runs, losses, where batches come from.

Everything flows in one direction at a time (GPipe: Huang et al. 2019): all batches of a round go
forward, then all come back. Two neighbours that both send before they receive would wait for each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from app.worker.trainers.base import Example
from app.worker.trainers.megatron_base import Base
from app.worker.trainers.megatron_core import parallel_state
from app.worker.trainers.megatron_packing import pack

#: Batches of a round for each stage: more keep the stages busier, and more activations in memory.
DEPTH = 4


@dataclass(slots=True)
class Through:
    """A batch that went through this stage: what came in and what went out.

    On the last stage `output` is the logprobs of all targets, end to end in the order of the
    examples, and `correct` whether each was the likeliest.
    """

    input: Tensor | None
    output: Tensor
    correct: Tensor | None = None


class Stage:
    """This rank's layers and its neighbours'."""

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.count = parallel_state.get_pipeline_model_parallel_world_size()
        self.round = 1 if self.count == 1 else DEPTH * self.count
        self._sent: list[tuple[Any, Tensor]] = []

    def forward(self, examples: Sequence[Example]) -> Through:
        """One batch, its gradient kept if gradients are on."""
        lengths = [len(example.tokens) for example in examples]
        order = sorted(range(len(examples)), key=lambda index: -lengths[index])
        packed = pack([examples[index].tokens for index in order], self.device)
        targets = torch.cat([examples[index].targets for index in order]).to(self.device)
        taken = None
        if not self.base.first:
            taken = self._receive(
                len(targets), parallel_state.get_pipeline_model_parallel_prev_rank()
            ).requires_grad_(torch.is_grad_enabled())
        found = self.base.forward(packed, targets, taken)
        if isinstance(found, Tensor):
            self._send(found.detach(), parallel_state.get_pipeline_model_parallel_next_rank())
            return Through(taken, found)
        logprobs, correct = found
        sizes = [lengths[index] for index in order]
        back = sorted(range(len(order)), key=order.__getitem__)
        return Through(taken, _reordered(logprobs, sizes, back), _reordered(correct, sizes, back))

    def backward(self, through: Through, loss: Tensor | None) -> None:
        """The same batch back; `loss` on the last stage."""
        if self.base.last and loss is not None:
            torch.autograd.backward(loss)
        else:
            gradient = self._receive(
                len(through.output), parallel_state.get_pipeline_model_parallel_next_rank()
            )
            # A stage may have nothing to train, nor any before it.
            if through.output.requires_grad:
                torch.autograd.backward(through.output, gradient)
        if through.input is not None:
            back = through.input.grad
            if back is None:
                back = torch.zeros_like(through.input)
            self._send(back, parallel_state.get_pipeline_model_parallel_prev_rank())

    def settle(self) -> None:
        """Wait until the neighbours have all that was sent to them."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _send(self, values: Tensor, rank: int) -> None:
        values = values.contiguous()
        self._sent.append((dist.isend(values, rank), values))

    def _receive(self, tokens: int, rank: int) -> Tensor:
        values = torch.empty(tokens, 1, self.base.hidden, device=self.device, dtype=self.dtype)
        dist.recv(values, rank)
        return values


def _reordered(values: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Parts of these sizes, end to end in another order."""
    if list(order) == sorted(order):
        return values
    parts = torch.split(values, list(sizes))
    return torch.cat([parts[index] for index in order])
