"""The modules of a layer, with the constructors and parameters that the real ones have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from transformer_engine.pytorch import distributed, fp8, ops
from transformer_engine.pytorch.distributed import Copied, Summed

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "TransformerLayer",
    "distributed",
    "fp8",
    "ops",
]


class Linear(nn.Module):
    """Cut by `column`, by `row`, or whole."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        tp_size: int,
        tp_group: dist.ProcessGroup | None,
        device: Any = "cpu",
        **_: object,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.use_bias, self.return_bias = bias, return_bias
        given = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.zeros(self.out_features, self.in_features, **given))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **given)) if bias else None

    def forward(self, inputs: Tensor, is_first_microbatch: bool | None = None) -> Any:
        output = self.product(inputs)
        return (output, self.bias) if self.return_bias else output

    def product(self, inputs: Tensor) -> Tensor:
        if self.parallel_mode == "column" and self.tp_size > 1:
            inputs = Copied.apply(inputs, self.tp_group)
        output = functional.linear(inputs, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            output = Summed.apply(output, self.tp_group)
        return output if self.bias is None or self.return_bias else output + self.bias


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        *,
        eps: float,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any = "cpu",
        **_: object,
    ) -> None:
        super().__init__()
        self.eps, self.centre = eps, 1 if zero_centered_gamma else 0
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        return normed(inputs, self.weight + self.centre, self.eps)


class LayerNormLinear(Linear):
    """A norm (here RMS) and a linear, which may hand out what is between."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **given: Any,
    ) -> None:
        super().__init__(in_features, out_features, **given)
        if normalization != "RMSNorm":
            raise NotImplementedError(normalization)
        self.eps, self.centre = eps, 1 if zero_centered_gamma else 0
        self.return_layernorm_output = return_layernorm_output
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=given["params_dtype"]))

    def forward(self, inputs: Tensor, is_first_microbatch: bool | None = None) -> Any:
        between = normed(inputs, self.layer_norm_weight + self.centre, self.eps)
        found = [self.product(between)]
        if self.return_bias:
            found.append(self.bias)
        if self.return_layernorm_output:
            found.append(between)
        return found[0] if len(found) == 1 else tuple(found)


class DotProductAttention(nn.Module):
    """Causal attention within each of the sequences that lie end to end."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, *, softmax_scale: float | None, **_: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        qkv_format: str,
        attn_mask_type: str,
        cu_seqlens_q: Tensor,
        **_: object,
    ) -> Tensor:
        """Query [tokens, heads, size], key and value [tokens, groups, size]."""
        if (qkv_format, attn_mask_type) != ("thd", "padding_causal"):
            raise NotImplementedError(f"{qkv_format} {attn_mask_type}")
        lengths = cu_seqlens_q.diff().tolist()
        parts = [
            functional.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts),
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for parts in zip(*(each.split(lengths) for each in (query, key, value)), strict=True)
        ]
        return torch.cat(parts).flatten(1)


class _Absent(nn.Module):
    """What Megatron derives from when it is imported: never made here."""


class GroupedLinear(_Absent): ...


class LayerNorm(_Absent): ...


class TransformerLayer(_Absent): ...


def normed(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = inputs.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return values.to(inputs.dtype) * weight
