"""The first weights of an adapter, the same in every engine.

What comes in: a seed and which module. What goes out: its A. It must not know: how an engine
holds or splits it.
"""

from __future__ import annotations

import hashlib
import math

import torch


def init_lora_A(seed: int, module_path: str, rank: int, in_features: int) -> torch.Tensor:
    """A of one module: float32 [rank, in_features] on the CPU. B starts as zeros.

    Uniform as PEFT draws it (`kaiming_uniform_` with a = √5: ±1/√in_features), but from a
    generator of the module's own, so that it does not matter which modules came before.

    Args:
        module_path: The module's name in the Hugging Face model, `model.layers.0.mlp.up_proj`.
    """
    digest = hashlib.sha256(f"{seed}/{module_path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
