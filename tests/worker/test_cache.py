"""The block of keys and values against the plainest model of it: a list of tokens per row."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.worker.samplers.cache import KvRows

LAYERS = 2

pytestmark = pytest.mark.worker


def block(values: list[list[int]], layer: int) -> torch.Tensor:
    """[rows, heads, steps, size] whose numbers name the token they stand for."""
    return (torch.tensor(values, dtype=torch.float32) + 1000 * layer)[:, None, :, None].expand(
        -1, 2, -1, 3
    )


def write(rows: KvRows, values: list[list[int]]) -> None:
    steps = len(values[0])
    rows.reserve(steps)
    for layer in range(LAYERS):
        rows.write(layer, block(values, layer), -block(values, layer))
    rows.advance(steps)


def opened(tokens: list[list[int]], passes: int) -> KvRows:
    rows = KvRows()
    rows.open([len(row) for row in tokens])
    width = max(map(len, tokens))
    padded = [[0] * (width - len(row)) + row for row in tokens]
    size = -(-width // passes)
    for start in range(0, width, size):
        write(rows, [row[start : start + size] for row in padded])
    return rows


class Rows(RuleBasedStateMachine):
    """Rows join, step and leave in any order; each must still hold its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = KvRows()
        self.tokens: list[list[int]] = []
        self.numbers = count(1)

    @rule(
        lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
        passes=st.integers(1, 3),
        data=st.data(),
    )
    def join(self, lengths: list[int], passes: int, data: st.DataObject) -> None:
        new = [[next(self.numbers) for _ in range(length)] for length in lengths]
        index = data.draw(st.lists(st.integers(0, len(new) - 1), min_size=1, max_size=4))
        self.rows.join(opened(new, passes), index)
        self.tokens += [list(new[row]) for row in index]

    @precondition(lambda self: self.tokens)
    @rule(steps=st.integers(1, 40))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            column = [[next(self.numbers)] for _ in self.tokens]
            write(self.rows, column)
            for row, added in zip(self.tokens, column, strict=True):
                row += added

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.tokens) - 1))
        self.rows.remove(row)
        self.tokens[row] = self.tokens[-1]
        self.tokens.pop()

    @invariant()
    def every_row_holds_its_tokens(self) -> None:
        assert len(self.rows) == len(self.tokens)
        for row, tokens in enumerate(self.tokens):
            first, end = self.rows.first[row], self.rows.end
            assert end - first == len(tokens)
            for layer in range(LAYERS):
                expected = block([tokens], layer)[0]
                assert torch.equal(self.rows.keys[layer][row, :, first:end], expected)
                assert torch.equal(self.rows.values[layer][row, :, first:end], -expected)

    @precondition(lambda self: self.tokens)
    @invariant()
    def masks_show_each_row_its_own_tokens_and_no_other(self) -> None:
        mask, positions = self.rows.mask_and_positions(1)
        width = self.rows.width + 1
        for row, tokens in enumerate(self.tokens):
            assert positions[row].tolist() == [len(tokens)]
            seen = width if mask is None else int(mask[row].sum())
            assert seen == len(tokens) + 1

    @precondition(lambda self: self.tokens)
    @invariant()
    def padding_is_finite(self) -> None:
        for tensor in (*self.rows.keys, *self.rows.values):
            assert bool(tensor.isfinite().all())


Rows.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_rows = Rows.TestCase


def test_columns_nobody_needs_are_given_up() -> None:
    rows = opened([[1] * 50, [2] * 2], 1)
    block_ = KvRows()
    block_.join(rows, [0, 1])
    block_.remove(0)
    for _ in range(500):
        write(block_, [[7]])
        if len(block_) and block_.width > 20:
            block_.join(opened([[3]], 1), [0])
            block_.remove(0)
    assert block_.columns < 200
