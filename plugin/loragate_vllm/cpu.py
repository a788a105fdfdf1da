"""vLLM's LoRA on the CPU, with rows that have no adapter left alone.

vLLM marks such a row with the index -1 and its CPU code then takes the last slot's weights for
it: once the slots are full, the base answers with somebody's adapter. What comes in: vLLM's torch
functions. What goes out: the same, where the weights of a row without an adapter count nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from loragate_vllm.known import check_call, check_has, mark, patched

_INPUTS = ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor")
_PATCHED = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def check(ops: ModuleType, wrapper: type) -> None:
    """Raise `Unknown` unless these are the functions and the class known here."""
    check_has(ops, *_PATCHED)
    for name in _PATCHED:
        check_call(getattr(ops, name), *_INPUTS)
    check_has(wrapper, "sampler_indices", "add_lora_logits")
    check_call(
        wrapper.add_lora_logits,  # type: ignore[attr-defined]
        *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
    )


def install(ops: ModuleType, users: ModuleType, wrapper: type) -> None:
    """Patch the functions of `ops`, in it and in `users` which imported them, and `wrapper`."""
    for name in _PATCHED:
        masked = leave_alone(getattr(ops, name))
        setattr(ops, name, masked)
        setattr(users, name, masked)
    wrapper.add_lora_logits = add_lora_logits  # type: ignore[attr-defined]


def leave_alone(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with the inputs of rows without an adapter taken as zero."""
    if patched(function):
        return function

    @functools.wraps(function)
    def masked(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        indices: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        with_adapter = (indices >= 0).unsqueeze(-1)
        mine = torch.where(with_adapter, inputs[: indices.shape[0]], 0)
        function(mine, weights, output, indices, *args, **kwargs)

    mark(masked)
    return masked


def add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    *,
    buffer: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Add each adapter's lm_head to the logits of its rows.

    Adapter by adapter: vLLM's own copies the weights once for every row, gigabytes for a prompt.
    """
    logits, hidden = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    indices = self.sampler_indices
    if indices.shape[0] != hidden.shape[0]:
        raise ValueError(f"{hidden.shape[0]} rows of logits, {indices.shape[0]} adapters for them")
    for slot in indices.unique().tolist():
        if slot < 0:
            continue
        rows = (indices == slot).nonzero().squeeze(-1)
        down, up = lora_a_stacked[slot, 0].float(), lora_b_stacked[slot, 0].float()
        delta = (hidden[rows].float() @ down.T * scale) @ up.T
        # The model may pad its vocabulary further than the adapter.
        width = min(delta.shape[1], logits.shape[1])
        logits[rows, :width] += delta[:, :width].to(logits.dtype)
