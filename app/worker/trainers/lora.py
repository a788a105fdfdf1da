"""Adapters of many runs on the linears of one model.

What comes in: the weights of runs, and which rows of a batch are whose. What goes out: a model
each of whose linears adds to a row what its own run has learnt, and the gradient of that. It must
not know: losses, optimizers, files.

The weights of a run are one flat vector. Runs of one shape (rank, alpha, modules) are stacked for
a pass, so that a linear serves all of them in one batched product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from app.domain import LoraSpec
from app.errors import InvalidRequest
from app.worker.trainers.lora_init import init_lora_A
from app.worker.trainers.products import product


@dataclass(frozen=True, slots=True)
class Part:
    """Where the weights of one module are in a run's vector: A from `down` on, B from `up` on."""

    module: str
    in_features: int
    out_features: int
    down: int
    up: int


@dataclass(frozen=True)
class Layout:
    """How the weights of a run lie in its vector: A then B of each module, in the model's order."""

    rank: int
    alpha: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        last = self.parts[-1]
        return last.up + last.out_features * self.rank

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def down(self, part: Part, vectors: Tensor) -> Tensor:
        """A, [..., rank, in_features], of vectors [..., size]; a view."""
        flat = vectors[..., part.down : part.up]
        return flat.view(*vectors.shape[:-1], self.rank, part.in_features)

    def up(self, part: Part, vectors: Tensor) -> Tensor:
        """B, [..., out_features, rank], of vectors [..., size]; a view."""
        flat = vectors[..., part.up : part.up + part.out_features * self.rank]
        return flat.view(*vectors.shape[:-1], part.out_features, self.rank)

    def tensors(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name, as PEFT has it within the model, and view of every tensor of a run."""
        for part in self.parts:
            yield f"{part.module}.lora_A.weight", self.down(part, vector)
            yield f"{part.module}.lora_B.weight", self.up(part, vector)

    def first_weights(self, seed: int) -> Tensor:
        """A vector that changes nothing yet: float32 [size] on the CPU."""
        vector = torch.zeros(self.size)
        for part in self.parts:
            drawn = init_lora_A(seed, part.module, self.rank, part.in_features)
            self.down(part, vector).copy_(drawn)
        return vector


class Pair(NamedTuple):
    """A and B of a module, [runs, rank, in] and [runs, out, rank], and views of their gradients.

    A and B are in the base's number format, the gradients in float32.
    """

    down: Tensor
    up: Tensor
    of_down: Tensor
    of_up: Tensor


class Group:
    """Runs of one layout in a pass: their weights, and the gradient so far, float32 [runs, size].

    `dtype` is the base's number format.
    """

    def __init__(self, layout: Layout, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        stacked = torch.stack(list(weights))
        self.layout = layout
        self.gradient = torch.zeros_like(stacked)
        self._whole = dict(_pairs(layout, stacked.to(dtype), self.gradient))
        self._each: dict[str, list[Pair]] = {}

    def pair(self, module: str, first: int, runs: int) -> Pair | None:
        """Those of `runs` runs from `first` on; None for a module that has no adapter."""
        whole = self._whole.get(module)
        if whole is None or runs == len(self.gradient):
            return whole
        if runs > 1:
            return Pair(*(weights[first : first + runs] for weights in whole))
        if module not in self._each:
            views = (weights.split_with_sizes([1] * len(weights)) for weights in whole)
            self._each[module] = [Pair(*each) for each in zip(*views, strict=True)]
        return self._each[module][first]


@dataclass(frozen=True, slots=True)
class Lane:
    """Tokens `start` to `stop` of a batch are of `runs` runs of a group from `first` on.

    Each has as many of them.
    """

    group: Group
    first: int
    runs: int
    start: int
    stop: int

    def within(self, start: int, stop: int) -> list[Lane]:
        """What of it is among these tokens, counted from their first."""
        if start <= self.start and self.stop <= stop:
            return [Lane(self.group, self.first, self.runs, self.start - start, self.stop - start)]
        each, found = (self.stop - self.start) // self.runs, []
        for run in range(self.runs):
            first = self.start + run * each
            begin, end = max(first, start), min(first + each, stop)
            if begin < end:
                found.append(Lane(self.group, self.first + run, 1, begin - start, end - start))
        return found

    def pair(self, module: str) -> Pair | None:
        """Its runs' A and B of a module."""
        return self.group.pair(module, self.first, self.runs)


@dataclass(eq=False)
class Site:
    """A linear of the model: what it is called, and its own forward."""

    name: str
    linear: nn.Linear
    lanes: list[Lane] = field(default_factory=list)

    def __call__(self, inputs: Tensor) -> Tensor:
        lanes = tuple(self.lanes)
        pairs = [lane.pair(self.name) for lane in lanes]
        apply: Any = _Adapted.apply
        # Weights of runs are no autograd tensors: what makes a gradient come here is the anchor.
        anchor = torch.empty(0, requires_grad=True) if any(pairs) else None
        return cast(Tensor, apply(inputs, anchor, self.linear, lanes, pairs))


class Sites:
    """The linears of one model, which follow `lanes` from now on."""

    def __init__(self, model: nn.Module) -> None:
        self._lanes: list[Lane] = []
        self.sites: dict[str, Site] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                site = self.sites[name] = Site(name, module, self._lanes)
                # On the instance, so that the module tree keeps its names.
                setattr(module, "forward", site)  # noqa: B010

    @property
    def kinds(self) -> tuple[str, ...]:
        """The last parts of their names: what a spec may target."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.sites))

    def use(self, lanes: Sequence[Lane]) -> None:
        """From now on the rows of a batch are these; none means the bare base."""
        self._lanes[:] = lanes

    @contextmanager
    def only(self, start: int, stop: int) -> Iterator[None]:
        """For now a batch is no more than these tokens of it."""
        lanes = list(self._lanes)
        self._lanes[:] = [part for lane in lanes for part in lane.within(start, stop)]
        try:
            yield
        finally:
            self._lanes[:] = lanes

    def layout(self, spec: LoraSpec) -> Layout:
        """Where the weights of such an adapter lie.

        Raises:
            InvalidRequest: a target module that the model does not have.
        """
        for target in spec.target_modules:
            if not any(_matches(name, target) for name in self.sites):
                raise InvalidRequest(
                    f"The base model has no linear module {target!r}; "
                    f"it has {', '.join(self.kinds)}.",
                    param="target_modules",
                )
        if not spec.target_modules:
            raise InvalidRequest(
                f"An adapter needs a target module; the base model has {', '.join(self.kinds)}.",
                param="target_modules",
            )
        parts, offset = [], 0
        for name, site in self.sites.items():
            if not any(_matches(name, target) for target in spec.target_modules):
                continue
            ins, outs = site.linear.in_features, site.linear.out_features
            parts.append(Part(name, ins, outs, offset, offset + spec.rank * ins))
            offset += spec.rank * (ins + outs)
        return Layout(spec.rank, spec.alpha, tuple(parts))


def lanes(places: Iterable[tuple[Group, int, int]]) -> list[Lane]:
    """The lanes of a batch: group, run in the group, and tokens, in the order of the batch.

    Neighbours of one group with as many tokens each share a lane.
    """
    found: list[Lane] = []
    start = 0
    for group, run, tokens in places:
        last = found[-1] if found else None
        if (
            last is not None
            and last.group is group
            and last.first + last.runs == run
            and last.stop - last.start == tokens * last.runs
        ):
            found[-1] = Lane(group, last.first, last.runs + 1, last.start, start + tokens)
        else:
            found.append(Lane(group, run, 1, start, start + tokens))
        start += tokens
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _pairs(layout: Layout, weights: Tensor, gradient: Tensor) -> Iterator[tuple[str, Pair]]:
    """Every module and its views of weights and gradient, [runs, size] both.

    Cut at one go: on a small model views one by one take longer than products.
    """
    sizes, shapes = [], []
    for part in layout.parts:
        shapes += [(layout.rank, part.in_features), (part.out_features, layout.rank)]
        sizes += [part.up - part.down, part.out_features * layout.rank]
    cuts = (whole.split_with_sizes(sizes, 1) for whole in (weights, gradient))
    ours, theirs = (
        [flat.view(-1, *shape) for flat, shape in zip(cut, shapes, strict=True)] for cut in cuts
    )
    for number, part in enumerate(layout.parts):
        both = slice(2 * number, 2 * number + 2)
        yield part.module, Pair(*ours[both], *theirs[both])


class _Adapted(torch.autograd.Function):
    """linear(x) + scaling · x Aᵀ Bᵀ, where A and B are of the run a token belongs to.

    One node instead of six for each linear: on a small model the difference is most of the cost.
    The base gets no gradient; that of A and B is added to their group's, in float32. Products are
    in the base's number format.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        anchor: Tensor | None,
        linear: nn.Linear,
        lanes: Sequence[Lane],
        pairs: Sequence[Pair | None],
    ) -> Tensor:
        inputs = inputs.contiguous()
        output = product(inputs, linear.weight, linear.bias)
        inners: list[Tensor | None] = []
        cuts = _cut(inputs, lanes), _cut(output, lanes)
        for lane, pair, own, its in zip(lanes, pairs, *cuts, strict=True):
            inner = None
            if pair is not None:
                inner = torch.bmm(own, pair.down.mT)
                its.baddbmm_(inner, pair.up.mT, alpha=lane.group.layout.scaling)
            inners.append(inner)
        ctx.save_for_backward(inputs, *inners)
        ctx.linear, ctx.lanes, ctx.pairs = linear, lanes, pairs
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        inputs, *inners = ctx.saved_tensors
        grad, lanes = grads[0].contiguous(), ctx.lanes
        into = product(grad, ctx.linear.weight.mT) if ctx.needs_input_grad[0] else None
        cuts = (
            _cut(inputs, lanes),
            _cut(grad, lanes),
            [None] * len(lanes) if into is None else _cut(into, lanes),
        )
        for lane, pair, inner, own, outer, its in zip(lanes, ctx.pairs, inners, *cuts, strict=True):
            if pair is None:
                continue
            scaling = lane.group.layout.scaling
            between = torch.bmm(outer, pair.up)
            if its is not None:
                its.baddbmm_(between, pair.down, alpha=scaling)
            _add_product(pair.of_down, between.mT, own, scaling)
            _add_product(pair.of_up, outer.mT, inner, scaling)
        return into, None, None, None, None


def _cut(batch: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    """The lanes' parts of [1, tokens, features] as [runs, tokens each, features]; views."""
    if not lanes:
        return []
    # Not `split`, which is Python before it comes to this.
    parts = batch.split_with_sizes([lane.stop - lane.start for lane in lanes], 1)
    return [
        part if lane.runs == 1 else part.view(lane.runs, -1, batch.shape[-1])
        for lane, part in zip(lanes, parts, strict=True)
    ]


def _add_product(total: Tensor, one: Tensor, other: Tensor, scaling: float) -> None:
    """Add scaling · one · other to a total in float32."""
    if one.dtype == total.dtype:
        total.baddbmm_(one, other, alpha=scaling)
    else:
        total.add_(torch.bmm(one, other), alpha=scaling)
