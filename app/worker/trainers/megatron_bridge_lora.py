"""Adapters as Megatron-Bridge makes them, one for q, k, v, gate and up each, on a model's linears.

What comes in: linears, and the vectors of the active run. What goes out: linears that add what the
run has learnt. It must not know: whole models, losses, optimizers, files.

Bridge shares the small dimension over the ranks, too: A of a linear cut by columns is cut by its
rows, B always is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from app.worker.trainers.megatron_bridge import CanonicalLoRA
from app.worker.trainers.megatron_vectors import Local


@dataclass(frozen=True, slots=True)
class Site:
    """A linear of Megatron's, the attribute `name` of its parent.

    `modules` are those of Hugging Face's that it stands for, by the names that Bridge gives to
    their adapters; there is one with the name "" where it stands for one.
    """

    parent: nn.Module
    prefix: str
    name: str
    modules: Mapping[str, str]


class Pair:
    """A and B of one module, in the model's number format; what flows back goes to vectors."""

    def __init__(self, adapter: Any, module: str) -> None:
        self.adapter, self.module = adapter, module
        self.into: dict[Tensor, Tensor] = {}
        weight: Any
        for weight in self.weights.values():
            weight.register_post_accumulate_grad_hook(self._hand_over)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the name PEFT has for it."""
        return {
            f"{self.module}.lora_A.weight": self.adapter.linear_in.weight,
            f"{self.module}.lora_B.weight": self.adapter.linear_out.weight,
        }

    def wear(self, local: Local, vector: Tensor, gradient: Tensor | None) -> bool:
        """Take the tensors of a vector, and answer whether it has any.

        One that it has not is there all the same, as zeros: Bridge computes q, k and v together
        or not at all, and so gate and up.
        """
        self.adapter.alpha = local.layout.alpha
        self.into.clear()
        for name, weight in self.weights.items():
            slot = local.slots.get(name)
            weight.requires_grad_(slot is not None and gradient is not None)
            weight.data.copy_(slot.view(vector)) if slot is not None else weight.data.zero_()
            if slot is not None and gradient is not None:
                self.into[weight] = slot.view(gradient)
        return f"{self.module}.lora_A.weight" in local.slots

    def _hand_over(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self.into[weight].add_(weight.grad)
            weight.grad = None


class Wardrobe:
    """The adapters of a model's linears, as many sets as there are ranks of adapters."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._linears: list[nn.Module] = [getattr(site.parent, site.name) for site in sites]
        self._sets: dict[int, list[tuple[Any, list[Pair]]]] = {}
        self._worn: list[tuple[Any, list[Pair]]] = []

    def wear(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        """From now on the linears compute with these weights."""
        rank = local.layout.rank
        if rank not in self._sets:
            self._sets[rank] = self._made(rank)
        if self._worn is not self._sets[rank]:
            self._worn = self._sets[rank]
            for site, (wrapper, _) in zip(self._sites, self._worn, strict=True):
                setattr(site.parent, site.name, wrapper)
        for wrapper, pairs in self._worn:
            if any([pair.wear(local, weights, gradient) for pair in pairs]):
                wrapper.enable_adapter_layers()
            else:
                wrapper.disable_adapter_layers()

    def bare(self) -> None:
        """From now on the linears are those of the base.

        They stay wrapped: Bridge has changed what the bare ones answer.
        """
        for wrapper, _ in self._worn:
            wrapper.disable_adapter_layers()

    def _made(self, rank: int) -> list[tuple[Any, list[Pair]]]:
        lora, made = CanonicalLoRA(dim=rank, alpha=rank), []
        for site, linear in zip(self._sites, self._linears, strict=True):
            wrapper = lora.transform(linear, site.name, site.prefix)
            pairs = [
                Pair(wrapper.adapter[key] if key else wrapper.adapter, module)
                for key, module in site.modules.items()
            ]
            made.append((wrapper, pairs))
        return made
