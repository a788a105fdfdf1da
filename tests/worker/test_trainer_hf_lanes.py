"""Linears give each token what its own run has learnt, and each run the gradient of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.domain import LoraSpec
from app.worker.trainers.lora import Group, Layout, Sites, lanes

#: Two shapes of adapter, which share one of the model's three linears; the third nobody targets.
SPECS = (LoraSpec(2, 6, ("wide", "last"), 0), LoraSpec(4, 4, ("last",), 0))


@dataclass(frozen=True)
class Row:
    """Tokens of one run: which of SPECS it has, and how many there are."""

    spec: int
    tokens: int


rows = st.lists(st.builds(Row, st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=6)


class Model(nn.Sequential):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 10)
        self.bare = nn.Linear(10, 5, bias=False)
        self.last = nn.Linear(5, 7)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        self.requires_grad_(False).to(dtype)


class Adapted:
    """A model, and runs of it with weights of their own, grouped as their layouts are."""

    def __init__(self, given: Sequence[Row], dtype: torch.dtype = torch.float32) -> None:
        self.model, self.rows = Model(dtype), given
        self.sites = Sites(self.model)
        self.layouts = [self.sites.layout(spec) for spec in SPECS]
        drawn = [
            torch.randn(self.layouts[row.spec].size, generator=torch.Generator().manual_seed(seed))
            for seed, row in enumerate(given)
        ]
        self.weights = [weights.requires_grad_() for weights in drawn]
        members = [[at for at, row in enumerate(given) if row.spec == spec] for spec in (0, 1)]
        self.groups = [
            Group(layout, [drawn[at].detach() for at in mine], dtype) if mine else None
            for layout, mine in zip(self.layouts, members, strict=True)
        ]
        self.seats = [
            (self.groups[row.spec], members[row.spec].index(at)) for at, row in enumerate(given)
        ]
        self.use()

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    def use(self) -> None:
        places: Any = [(*seat, row.tokens) for seat, row in zip(self.seats, self.rows, strict=True)]
        self.sites.use(lanes(places))

    def gradients(self) -> list[Tensor]:
        return [group.gradient[run] for group, run in self.seats if group is not None]

    def plain(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The outputs and each run's gradient of their squares' sum, by autograd, run by run."""
        outputs = [
            self._alone(part, self.layouts[row.spec], weights)
            for part, row, weights in zip(
                inputs[0].split([row.tokens for row in self.rows]),
                self.rows,
                self.weights,
                strict=True,
            )
        ]
        output = torch.cat(outputs)[None]
        return output, list(torch.autograd.grad(output.float().square().sum(), self.weights))

    def _alone(self, states: Tensor, layout: Layout, weights: Tensor) -> Tensor:
        parts = {part.module: part for part in layout.parts}
        for name, linear in self.model.named_children():
            base = states @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            if name in parts:
                down = layout.down(parts[name], weights).to(states.dtype)
                up = layout.up(parts[name], weights).to(states.dtype)
                base = base + layout.scaling * (states @ down.T @ up.T)
            states = base
        return states


def drawn(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(9)).to(dtype)


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        apart = (one - other).detach().abs().max()
        assert float(apart) <= tolerance * float(other.detach().abs().max())


@given(rows)
def test_each_run_has_its_own_output_and_gradient(given: list[Row]) -> None:
    adapted = Adapted(given)
    inputs = drawn(adapted.tokens)
    wanted, gradients = adapted.plain(inputs)
    output = adapted.model(inputs)
    output.square().sum().backward()
    near([output], [wanted])
    near(adapted.gradients(), gradients)


@given(rows)
def test_a_run_gets_in_company_what_it_gets_alone(given: list[Row]) -> None:
    adapted = Adapted(given)
    inputs = drawn(adapted.tokens)
    adapted.model(inputs).square().sum().backward()
    parts = inputs.split([row.tokens for row in given], 1)
    for number, (row, part) in enumerate(zip(given, parts, strict=True)):
        alone = Adapted([row])
        group = Group(alone.layouts[row.spec], [adapted.weights[number].detach()], inputs.dtype)
        alone.sites.use(lanes([(group, 0, row.tokens)]))
        alone.model(part).square().sum().backward()
        near([adapted.gradients()[number]], [group.gradient[0]])


@given(rows, st.integers(0, 20), st.integers(1, 20))
def test_a_part_of_the_tokens_is_theirs_alone(given: list[Row], start: int, size: int) -> None:
    """As logits are made: a slice of a batch at a time."""
    adapted = Adapted(given)
    inputs = drawn(adapted.tokens)
    wanted, gradients = adapted.plain(inputs)
    cuts = {0, min(start, adapted.tokens), min(start + size, adapted.tokens), adapted.tokens}
    for begin, end in pairwise(sorted(cuts)):
        with adapted.sites.only(begin, end):
            output = adapted.model(inputs[:, begin:end])
        near([output], [wanted[:, begin:end]])
        output.square().sum().backward()
    near(adapted.gradients(), gradients)


MIXED = [Row(0, 4), Row(0, 4), Row(1, 4), Row(0, 2), Row(0, 3), Row(1, 1), Row(1, 1)]


def test_several_batches_add_up() -> None:
    adapted = Adapted(MIXED)
    inputs = drawn(adapted.tokens)
    _, gradients = adapted.plain(inputs)
    for _ in range(2):
        adapted.use()
        adapted.model(inputs).square().sum().backward()
    near(adapted.gradients(), [2 * gradient for gradient in gradients])


def test_computed_twice_for_memory_gradients_come_once() -> None:
    adapted = Adapted(MIXED)
    inputs = drawn(adapted.tokens)
    wanted, gradients = adapted.plain(inputs)
    output: Any = checkpoint(adapted.model, inputs.requires_grad_(), use_reentrant=False)
    output.square().sum().backward()
    near([output], [wanted])
    near(adapted.gradients(), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_products_are_in_the_format_of_the_base_and_gradients_in_float32(
    dtype: torch.dtype,
) -> None:
    adapted = Adapted(MIXED, dtype)
    inputs = drawn(adapted.tokens, dtype)
    wanted, gradients = adapted.plain(inputs)
    output = adapted.model(inputs)
    output.float().square().sum().backward()
    assert output.dtype == dtype
    assert {gradient.dtype for gradient in adapted.gradients()} == {torch.float32}
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-6
    near([output.float()], [wanted.float()], tolerance)
    near(adapted.gradients(), gradients, tolerance)


def test_neighbours_of_one_size_are_one_lane_and_the_bare_model_has_none() -> None:
    adapted = Adapted(MIXED)
    first, second = (group for group in adapted.groups if group is not None)
    found = [(lane.group, lane.first, lane.runs, lane.start, lane.stop) for lane in _lanes(adapted)]
    assert found == [
        (first, 0, 2, 0, 8),
        (second, 0, 1, 8, 12),
        (first, 2, 1, 12, 14),
        (first, 3, 1, 14, 17),
        (second, 1, 2, 17, 19),
    ]
    adapted.sites.use(())
    inputs = drawn(3).requires_grad_()
    output = adapted.model(inputs)
    bare: Any = Model(torch.float32)
    assert torch.allclose(output, bare(inputs), atol=1e-5)
    output.sum().backward()
    assert not any(gradient.any() for gradient in adapted.gradients())


def _lanes(adapted: Adapted) -> Sequence[Any]:
    return next(iter(adapted.sites.sites.values())).lanes
