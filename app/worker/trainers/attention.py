"""Attention over many sequences that lie end to end in one row.

What comes in: queries, keys and values of all tokens, and how long each sequence is. What goes
out: for each token what it sees of its own sequence, and of no other. It must not know: runs,
models.

All else a model does, it does to each token by itself: only here does it matter where a sequence
begins, so only here is there padding, among sequences of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from app.errors import ConfigurationError

NAME = "loragate_flat"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences computed as one batch of rows of `width`.

    `tokens` are the places of their tokens in the whole, `slots` the places in the batch; both are
    None where the batch is all there is and nothing is padded.
    """

    rows: int
    width: int
    tokens: Tensor | None
    slots: Tensor | None


class Sequences:
    """Where sequences begin and end in a row of all their tokens."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.buckets = _buckets(self.lengths, device)

    @property
    def positions(self) -> Tensor:
        """Each token's place in its own sequence: [1, tokens]."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None]


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    sequences: Sequences,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer.

    Args:
        query: [1, heads, tokens, head size]; `key` and `value` may have fewer heads.

    Returns:
        [1, tokens, heads, head size], and no weights.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigurationError(
            f"{type(module).__name__} caps its attention or lets it sink; this trainer cannot "
            "train it. Set LORAGATE_WORKER_TRAINER=off."
        )
    tokens, heads = query.shape[2], query.shape[1]
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    whole: Tensor | None = None
    for bucket in sequences.buckets:
        queries, keys, values = (_spread(states, bucket).transpose(1, 2) for states in flat)
        attended = functional.scaled_dot_product_attention(
            queries,
            _repeated(keys, heads),
            _repeated(values, heads),
            attn_mask=_window(sliding_window, bucket.width, query.device),
            is_causal=sliding_window is None or sliding_window >= bucket.width,
            scale=scaling,
        )
        part = _collected(attended.transpose(1, 2), bucket, tokens)
        whole = part if whole is None else whole + part
    return cast(Tensor, whole)[None], None


AttentionInterface.register(NAME, flat_attention)


def _buckets(lengths: Sequence[int], device: torch.device) -> list[Bucket]:
    """Sequences whose lengths have as many binary digits are padded to one width."""
    if len(set(lengths)) == 1:
        return [Bucket(len(lengths), lengths[0], None, None)]
    members: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        members.setdefault(length.bit_length(), []).append((start, length))
        start += length
    buckets = []
    for spans in members.values():
        width = max(length for _, length in spans)
        tokens = [torch.arange(start, start + length) for start, length in spans]
        slots = [
            torch.arange(row * width, row * width + length) for row, (_, length) in enumerate(spans)
        ]
        buckets.append(
            Bucket(len(spans), width, torch.cat(tokens).to(device), torch.cat(slots).to(device))
        )
    return buckets


def _spread(states: Tensor, bucket: Bucket) -> Tensor:
    """[tokens, heads, size] as [rows, width, heads, size], zeros where a row is padded."""
    if bucket.tokens is None:
        return states.reshape(bucket.rows, bucket.width, *states.shape[1:])
    moved = _moved(states, bucket.tokens, bucket.slots, bucket.rows * bucket.width)
    return moved.view(bucket.rows, bucket.width, *states.shape[1:])


def _collected(states: Tensor, bucket: Bucket, tokens: int) -> Tensor:
    """[rows, width, heads, size] as [tokens, heads, size], zeros for tokens of other buckets."""
    flat = states.flatten(0, 1)
    return flat if bucket.tokens is None else _moved(flat, bucket.slots, bucket.tokens, tokens)


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values for as many heads as there are queries."""
    times = heads // states.shape[1]
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _window(size: int | None, width: int, device: torch.device) -> Tensor | None:
    """True where a token sees another: itself and those before it, `size` in all."""
    if size is None or size >= width:
        return None
    place = torch.arange(width, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < size)


def _moved(states: Tensor, source: Tensor | None, target: Tensor | None, size: int) -> Tensor:
    apply: Any = _Moved.apply
    return cast(Tensor, apply(states, source, target, size))


class _Moved(torch.autograd.Function):
    """Row `source[i]` becomes row `target[i]` of `size`, the others are zeros.

    No row is moved twice, so the way back is the same thing: a copy, where autograd's own would
    have to add.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.size = len(states)
        return _move(states, source, target, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        return _move(grads[0], target, source, ctx.size), None, None, None


def _move(states: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    moved = states.new_zeros(size, *states.shape[1:])
    return moved.index_copy_(0, target, states.index_select(0, source))
