"""AdamW on one flat vector.

What comes in: weights, gradient and moments of a run, laid end to end. What goes out: the weights
one step on. It must not know: which module a number belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.ops import OptimStep


@dataclass(slots=True)
class Moments:
    """What AdamW remembers: float32 vectors as long as the weights, and the steps so far."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: int = 0


def adamw(weights: Tensor, gradient: Tensor, moments: Moments, step: OptimStep) -> None:
    """Change weights and moments in place (Loshchilov & Hutter 2019, algorithm 2).

    All the memory that it takes is asked for before anything changes.
    """
    scale = torch.empty_like(weights)
    moments.steps += 1
    moments.exp_avg.lerp_(gradient, 1 - step.beta1)
    moments.exp_avg_sq.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
    if step.weight_decay:
        weights.mul_(1 - step.learning_rate * step.weight_decay)
    first = 1 - step.beta1**moments.steps
    second = 1 - step.beta2**moments.steps
    torch.sqrt(moments.exp_avg_sq, out=scale).div_(math.sqrt(second)).add_(step.eps)
    weights.addcdiv_(moments.exp_avg, scale, value=-step.learning_rate / first)


def clip(gradient: Tensor, norm: float, limit: float) -> None:
    """Shorten a gradient of this norm to the limit; 0 leaves it."""
    if limit and norm > limit:
        gradient.mul_(limit / norm)
