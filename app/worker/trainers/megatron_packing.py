"""Sequences laid end to end, and attention that keeps them apart.

What comes in: sequences of any lengths, longest first. What goes out: one long sequence for
everything that looks at one token at a time, and causal attention within each of its parts. It
must not know: runs, losses, parallel ranks.

Only attention needs sequences beside each other, so only there they are padded, and in blocks of
like lengths: in none is a sequence shorter than half the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens `start` to `stop`: `rows` sequences of at most `width` tokens each.

    `places` [stop - start] is where each token is in [rows · width]; None where all are full.
    """

    start: int
    stop: int
    rows: int
    width: int
    places: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """[tokens, heads, size] as [rows, heads, width, size]."""
        part = values[self.start : self.stop]
        if self.places is not None:
            room = part.new_zeros(self.rows * self.width, *part.shape[1:])
            part = room.index_copy(0, self.places, part)
        return part.view(self.rows, self.width, *part.shape[1:]).transpose(1, 2)

    def gather(self, values: Tensor) -> Tensor:
        """What `spread` does, undone."""
        part = values.transpose(1, 2).flatten(0, 1)
        return part if self.places is None else part.index_select(0, self.places)


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of some sequences: ids and positions are [tokens], on the device."""

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    blocks: tuple[Block, ...]


def pack(sequences: Sequence[Tensor], device: torch.device) -> Packed:
    """Lay sequences of ids end to end; they come longest first."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Packed(
        torch.cat(list(sequences)).to(device),
        positions.to(device),
        tuple(lengths),
        tuple(_blocks(lengths, device)),
    )


def _blocks(lengths: Sequence[int], device: torch.device) -> list[Block]:
    blocks, first, start = [], 0, 0
    while first < len(lengths):
        width = lengths[first]
        rows = [length for length in lengths[first:] if 2 * length >= width]
        stop = start + sum(rows)
        places = None
        if rows[-1] != width:
            parts = [torch.arange(length) + at * width for at, length in enumerate(rows)]
            places = torch.cat(parts).to(device)
        blocks.append(Block(start, stop, len(rows), width, places))
        first, start = first + len(rows), stop
    return blocks


class PackedAttention(nn.Module):
    """Megatron's core attention, by torch's own kernels.

    Megatron builds it for each layer with keywords of its own, and hands the `attention_mask` of
    a pass to it untouched: here that is the `Packed`.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, packed: Packed, **_: object
    ) -> Tensor:
        """Query [tokens, 1, heads, size], key and value [tokens, 1, groups, size].

        Returns [tokens, 1, heads · size].
        """
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        parts = [self._within(block, query, key, value) for block in packed.blocks]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.flatten(1).unsqueeze(1)

    def _within(self, block: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            # Not `enable_gqa`: the only kernel that takes it in float32 keeps all the scores.
            key = key.repeat_interleave(repeats, 1)
            value = value.repeat_interleave(repeats, 1)
        found = functional.scaled_dot_product_attention(
            block.spread(query),
            block.spread(key),
            block.spread(value),
            is_causal=True,
            scale=self.scale,
        )
        return block.gather(found)
