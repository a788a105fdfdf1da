"""An adapter on Megatron's column- and row-parallel linears.

What comes in: a linear, and the tensors of the active run. What goes out: a linear that adds what
the run has learnt. It must not know: whole models, losses, optimizers, files.

Of a linear cut by columns every rank has the whole A and its rows of B; of one cut by rows its
columns of A and the whole B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.trainers.megatron_core import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from app.worker.trainers.megatron_vectors import Local


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one linear, leaves of the graph."""

    down: Tensor
    up: Tensor
    scaling: float


class Active:
    """The run whose adapter the model has now: what its linears look up."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}

    def set(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        """Put a vector's tensors into the model. Autograd adds to `gradient`, if there is one."""

        def leaf(name: str) -> Tensor:
            slot = local.slots[name]
            found = slot.view(weights).detach()
            if gradient is not None:
                found.requires_grad_().grad = slot.view(gradient)
            return found

        scaling = local.layout.scaling
        self.pairs = {
            module: Pair(leaf(f"{module}.lora_A.weight"), leaf(f"{module}.lora_B.weight"), scaling)
            for module in local.modules
        }

    def clear(self) -> None:
        """From now on the model is the bare base."""
        self.pairs = {}


class ColumnLora(nn.Module):
    """A linear cut by columns, with the adapters of the `modules` it stands for.

    Its output is `groups` times the outputs of all modules beside each other.
    """

    def __init__(
        self, base: Any, active: Active, modules: Sequence[str], widths: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        self.base, self.active = base, active
        self.modules_, self.widths, self.groups = tuple(modules), tuple(widths), groups

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, bias = self.base(inputs, *args, **kwargs)
        pairs = [self.active.pairs.get(module) for module in self.modules_]
        downs = [pair.down for pair in pairs if pair is not None]
        if not downs:
            return output, bias
        inner = functional.linear(inputs, torch.cat(downs).to(inputs.dtype))
        # Each rank has some of the outputs: what flows back to A is the sum over ranks.
        inner = copy_to_tensor_model_parallel_region(inner)
        pieces = iter(inner.split([len(down) for down in downs], -1))
        added = [
            self._added(pair, None if pair is None else next(pieces), width, output)
            for pair, width in zip(pairs, self.widths, strict=True)
        ]
        return output + torch.cat(added, -1).flatten(-2), bias

    def _added(self, pair: Pair | None, inner: Tensor | None, width: int, output: Tensor) -> Tensor:
        shape = (*output.shape[:-1], self.groups, width)
        if pair is None or inner is None:
            return output.new_zeros(()).expand(shape)
        return functional.linear(inner, pair.up.to(inner.dtype) * pair.scaling).view(shape)


class RowLora(nn.Module):
    """A linear cut by rows, with the adapter of its `module`."""

    def __init__(self, base: Any, active: Active, module: str) -> None:
        super().__init__()
        self.base, self.active, self.module = base, active, module

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, bias = self.base(inputs, *args, **kwargs)
        pair = self.active.pairs.get(self.module)
        if pair is None:
            return output, bias
        inner = functional.linear(inputs, pair.down.to(inputs.dtype))
        inner = reduce_from_tensor_model_parallel_region(inner)
        return output + functional.linear(inner, pair.up.to(inner.dtype) * pair.scaling), bias
