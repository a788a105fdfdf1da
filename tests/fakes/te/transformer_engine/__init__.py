"""Transformer Engine as far as Megatron's GPT layers use it, in plain torch, for machines without
a GPU.

What comes in: what Megatron-Core hands to the real one. What goes out: what that computes from it.
It must not know: Megatron, adapters.

Megatron and Megatron-Bridge ask for the current CUDA device in places where a CPU will do.
"""

from __future__ import annotations

import torch

from transformer_engine import common, pytorch

__all__ = ["__version__", "common", "pytorch"]

#: The newest before Megatron expects TE's fused operations, which are not here.
__version__ = "1.12.0"

if not torch.cuda.is_available():
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
