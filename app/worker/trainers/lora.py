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
from typing import Any, cast

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


class Group:
    """Runs of one layout in a pass: their weights, [runs, size], and the gradient so far."""

    def __init__(self, layout: Layout, weights: Sequence[Tensor]) -> None:
        self.layout = layout
        self.weights = torch.stack(list(weights))
        self.gradient = torch.zeros_like(self.weights)
        self.parts = {part.module: part for part in layout.parts}


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

    def cut(self, batch: Tensor) -> Tensor:
        """Its part of [1, tokens, features] as [runs, tokens each, features]; a view."""
        return batch[0, self.start : self.stop].view(self.runs, -1, batch.shape[-1])

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

    def pair(self, module: str, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Its runs' A and B of a module, of vectors as the group has them; views."""
        layout, part = self.group.layout, self.group.parts[module]
        mine = vectors[self.first : self.first + self.runs]
        return layout.down(part, mine), layout.up(part, mine)


@dataclass(eq=False)
class Site:
    """A linear of the model: what it is called, and its own forward."""

    name: str
    linear: nn.Linear
    lanes: list[Lane] = field(default_factory=list)

    def __call__(self, inputs: Tensor) -> Tensor:
        lanes = [lane for lane in self.lanes if self.name in lane.group.parts]
        apply: Any = _Adapted.apply
        # Weights of runs are no autograd tensors: what makes a gradient come here is the anchor.
        anchor = torch.empty(0, requires_grad=True) if lanes else None
        return cast(Tensor, apply(inputs, anchor, self, lanes))


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


class _Adapted(torch.autograd.Function):
    """linear(x) + scaling · x Aᵀ Bᵀ, where A and B are of the run a token belongs to.

    One node instead of six for each linear: on a small model the difference is most of the cost.
    The base gets no gradient; that of A and B is added to their group's, in float32. Products are
    in the base's number format.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, anchor: Tensor | None, site: Site, at: list[Lane]
    ) -> Tensor:
        inputs = inputs.contiguous()
        output = product(inputs, site.linear.weight, site.linear.bias)
        saved = [inputs]
        for lane in at:
            down, up = (each.to(inputs.dtype) for each in lane.pair(site.name, lane.group.weights))
            inner = torch.bmm(lane.cut(inputs), down.mT)
            lane.cut(output).baddbmm_(inner, up.mT, alpha=lane.group.layout.scaling)
            saved += (inner, down, up)
        ctx.save_for_backward(*saved)
        ctx.site, ctx.lanes = site, at
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, *saved = ctx.saved_tensors
        grad = grads[0].contiguous()
        into = product(grad, ctx.site.linear.weight.mT) if ctx.needs_input_grad[0] else None
        for lane, inner, down, up in zip(
            ctx.lanes, saved[0::3], saved[1::3], saved[2::3], strict=True
        ):
            outer = lane.cut(grad)
            between = torch.bmm(outer, up).mul_(lane.group.layout.scaling)
            if into is not None:
                lane.cut(into).baddbmm_(between, down)
            of_down, of_up = lane.pair(ctx.site.name, lane.group.gradient)
            of_down.add_(torch.bmm(between.mT, lane.cut(inputs)))
            of_up.add_(torch.bmm(outer.mT, inner), alpha=lane.group.layout.scaling)
        return into, None, None, None
