"""Keys and values of all running rows, in one left-padded block per layer.

What comes in: what attention computed. What goes out: the same, with everything before it, for
all rows at once. Rows join and leave by copying themselves, never their neighbours. It must not
know: tokens, requests.

    columns   0        begin              end       capacity
    row 0     . . . . .|x x x x x x x x x |
    row 1     . . . . .|. . . x x x x x x |          x from first[1] on
    row 2     . . . . .|. . . . . . . x x |

Every row ends at `end`, so a step writes one column for all. Columns before `begin` belong to
rows that left. Padding stays finite (zeros, or stale values): its weight is zero, and zero
times NaN would not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

GROWTH = 1.5
SMALLEST_CAPACITY = 64


class KvRows:
    """The block: which rows there are and where each begins."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.end = 0
        self._room = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.view = _View(self)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def begin(self) -> int:
        return min(self.first, default=self.end)

    @property
    def width(self) -> int:
        return self.end - self.begin

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def open(self, lengths: Sequence[int]) -> None:
        """Make room for new rows that will be written together, right-aligned."""
        longest = max(lengths)
        self.first = [longest - length for length in lengths]
        self._room = longest

    def mask_and_positions(self, steps: int) -> tuple[Tensor | None, Tensor]:
        """For the next `steps` columns: which columns count, and each token's position."""
        first = torch.tensor(self.first)
        columns = torch.arange(self.end, self.end + steps)
        positions = (columns[None, :] - first[:, None]).clamp_min_(0)
        begin = self.begin
        if max(self.first) <= begin:
            return None, positions
        seen = torch.arange(begin, self.end + steps)
        return seen[None, :] >= first[:, None], positions

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new columns of one layer; return all columns that are seen."""
        if layer == len(self.keys):
            self._add_layer(keys, values)
        end, rows = self.end + keys.shape[2], len(self.first)
        if end > self.columns:
            raise RuntimeError("reserve() before writing")
        self.keys[layer][:rows, :, self.end : end] = keys
        self.values[layer][:rows, :, self.end : end] = values
        begin = self.begin
        return self.keys[layer][:rows, :, begin:end], self.values[layer][:rows, :, begin:end]

    def advance(self, steps: int) -> None:
        self.end += steps

    def reserve(self, steps: int) -> None:
        """See that `steps` more columns fit, dropping columns no row needs any more."""
        if self.keys and self.end + steps > self.columns:
            self._relocate(rows=self._row_capacity(), end=self.width, spare=steps)

    def join(self, other: KvRows, index: Sequence[int]) -> None:
        """Append rows of `other`: those at `index`, which may repeat."""
        rows = len(self) + len(index)
        width = max(self.width, other.width)
        if not self.keys:
            self._like(other, rows, width)
        elif rows > self._row_capacity() or width > self.end:
            self._relocate(rows=max(rows, self._row_capacity()), end=max(width, self.end), spare=1)
        picked = torch.tensor(index)
        target = slice(len(self), rows)
        left = self.end - other.width
        for ours, theirs in zip(self._blocks(), other._blocks(), strict=True):
            source = theirs[:, :, other.begin : other.end]
            ours[target, :, left : self.end] = source.index_select(0, picked.to(source.device))
        self.first += [self.end - (other.end - other.first[row]) for row in index]

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self) - 1
        if row != last:
            for block in self._blocks():
                block[row] = block[last]
            self.first[row] = self.first[last]
        self.first.pop()
        if not self.first:
            # One large batch must not hold its memory for ever.
            self.keys, self.values, self.end = [], [], 0

    def _row_capacity(self) -> int:
        return self.keys[0].shape[0]

    def _blocks(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def _add_layer(self, keys: Tensor, values: Tensor) -> None:
        for blocks, new in ((self.keys, keys), (self.values, values)):
            blocks.append(new.new_zeros((new.shape[0], new.shape[1], self._room, new.shape[3])))

    def _like(self, other: KvRows, rows: int, width: int) -> None:
        room = _grown(rows, 4), _grown(width)
        keys, values = (
            [
                block.new_zeros((room[0], block.shape[1], room[1], block.shape[3]))
                for block in blocks
            ]
            for blocks in (other.keys, other.values)
        )
        self.keys, self.values, self.end = keys, values, width

    def _relocate(self, *, rows: int, end: int, spare: int) -> None:
        """Copy the living columns to a bigger block, so that they end at `end`.

        Nothing changes until every layer has its copy: memory may run out half way.
        """
        columns = _grown(end + spare)
        capacity = rows if rows == self._row_capacity() else _grown(rows, 4)
        moved: list[Tensor] = []
        for block in self._blocks():
            fresh = block.new_zeros((capacity, block.shape[1], columns, block.shape[3]))
            living = block[: len(self), :, self.begin : self.end]
            fresh[: len(self), :, end - self.width : end] = living
            moved.append(fresh)
        layers = len(self.keys)
        self.keys, self.values = moved[:layers], moved[layers:]
        self.first = [first + end - self.end for first in self.first]
        self.end = end


class _View(Cache):
    """What a transformers model takes for its cache."""

    def __init__(self, rows: KvRows) -> None:
        super().__init__(layers=[])
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.rows.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.width

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.rows.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def _grown(needed: int, least: int = SMALLEST_CAPACITY) -> int:
    return max(least, int(needed * GROWTH))
