"""What ranks do together, and twice."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

activation_recompute_forward = nullcontext


class CudaRNGStatesTracker:
    """What Megatron derives from when it is imported: never made here."""


class Copied(torch.autograd.Function):
    """The same input for every rank: what flows back is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.group), None


class Summed(torch.autograd.Function):
    """The sum over ranks: the same flows back to each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values
