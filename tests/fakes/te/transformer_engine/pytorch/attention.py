"""Positions of sequences that lie end to end."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    values: Tensor,
    angles: Tensor,
    *,
    tensor_format: str,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
    fused: bool,
) -> Tensor:
    """Turn values [tokens, heads, size] by angles [positions, 1, 1, turned size]."""
    if (tensor_format, cp_size) != ("thd", 1):
        raise NotImplementedError(f"{tensor_format} over {cp_size} ranks")
    place = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    angles = angles[place.to(angles.device), 0]
    turned, kept = values.split([angles.shape[-1], values.shape[-1] - angles.shape[-1]], -1)
    left, right = turned.float().chunk(2, -1)
    turned = turned * angles.cos() + torch.cat([-right, left], -1) * angles.sin()
    return torch.cat([turned.to(values.dtype), kept], -1)
