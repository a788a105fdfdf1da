"""Muon: momentum whose update is made orthogonal, for the matrices inside the layers.

What comes in: parameters with gradients. What goes out: the parameters, moved. In trials
of equal length it got the demo model further than AdamW alone, which matters on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """Remembers one momentum buffer per matrix."""

    def __init__(self, matrices: Sequence[torch.nn.Parameter], rate: float, decay: float) -> None:
        self._matrices = matrices
        self._rate = rate
        self._decay = decay
        self._momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, at `factor` times the full rate."""
        rate = self._rate * factor
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            if matrix.grad is None:
                continue
            momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
            update = _orthogonal(matrix.grad.lerp(momentum, _MOMENTUM))
            wide = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.mul_(1 - rate * self._decay).add_(update, alpha=-rate * wide)


def _orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of the gradient's singular value decomposition, by Newton-Schulz steps."""
    a, b, c = _NEWTON_SCHULZ
    tall = gradient.shape[0] > gradient.shape[1]
    x: torch.Tensor = gradient.T if tall else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram: torch.Tensor = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
