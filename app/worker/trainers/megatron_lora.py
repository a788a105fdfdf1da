"""An adapter on Megatron's column- and row-parallel linears.

What comes in: a spec, a model. What goes out: linears that add what the active run has learnt, and
its weights as a vector of which this rank has its part. It must not know: losses, optimizers,
files.

Of a linear cut by columns every rank has the whole A and its rows of B; of one cut by rows its
columns of A and the whole B. What all ranks have comes first in the vector, so that a norm can
count it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.domain import LoraSpec
from app.errors import InvalidRequest
from app.worker.trainers.lora import Layout, Part
from app.worker.trainers.megatron_core import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from app.worker.trainers.megatron_shapes import PROJECTIONS, Cut, Shapes


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in this rank's vector; `shape` is this rank's, `name` as PEFT has it."""

    name: str
    cut: Cut
    shape: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]

    def view(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class Local:
    """How this rank's part of a run lies in its vector; the first `shared` numbers all have."""

    scaling: float
    slots: Mapping[str, Slot]
    shared: int
    size: int

    @property
    def modules(self) -> list[str]:
        ending = ".lora_A.weight"
        return [name.removesuffix(ending) for name in self.slots if name.endswith(ending)]

    def pieces(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies on the CPU of this rank's part of every tensor."""
        return {name: slot.view(vector).cpu().clone() for name, slot in self.slots.items()}

    def fill(self, vector: Tensor, whole: Mapping[str, Tensor], rank: int, ranks: int) -> None:
        """Take this rank's part out of whole tensors."""
        for name, slot in self.slots.items():
            slot.view(vector).copy_(slot.cut.piece(whole[name], rank, ranks))


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one linear, leaves of the graph."""

    down: Tensor
    up: Tensor
    scaling: float


class Active:
    """The run whose adapter the model has now: what its linears look up."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}

    def set(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        """Put a vector's tensors into the model. Autograd adds to `gradient`, if there is one."""

        def leaf(name: str) -> Tensor:
            slot = local.slots[name]
            found = slot.view(weights).detach()
            if gradient is not None:
                found.requires_grad_().grad = slot.view(gradient)
            return found

        self.pairs = {
            module: Pair(
                leaf(f"{module}.lora_A.weight"), leaf(f"{module}.lora_B.weight"), local.scaling
            )
            for module in local.modules
        }

    def clear(self) -> None:
        """From now on the model is the bare base."""
        self.pairs = {}


class ColumnLora(nn.Module):
    """A linear cut by columns, with the adapters of the `modules` it stands for.

    Its output is `groups` times the outputs of all modules beside each other.
    """

    def __init__(
        self, base: Any, active: Active, modules: Sequence[str], widths: Sequence[int], groups: int
    ) -> None:
        super().__init__()
        self.base, self.active = base, active
        self.modules_, self.widths, self.groups = tuple(modules), tuple(widths), groups

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, bias = self.base(inputs, *args, **kwargs)
        pairs = [self.active.pairs.get(module) for module in self.modules_]
        downs = [pair.down for pair in pairs if pair is not None]
        if not downs:
            return output, bias
        inner = functional.linear(inputs, torch.cat(downs).to(inputs.dtype))
        # Each rank has some of the outputs: what flows back to A is the sum over ranks.
        inner = copy_to_tensor_model_parallel_region(inner)
        pieces = iter(inner.split([len(down) for down in downs], -1))
        added = [
            self._added(pair, None if pair is None else next(pieces), width, output)
            for pair, width in zip(pairs, self.widths, strict=True)
        ]
        return output + torch.cat(added, -1).flatten(-2), bias

    def _added(self, pair: Pair | None, inner: Tensor | None, width: int, output: Tensor) -> Tensor:
        shape = (*output.shape[:-1], self.groups, width)
        if pair is None or inner is None:
            return output.new_zeros(()).expand(shape)
        return functional.linear(inner, pair.up.to(inner.dtype) * pair.scaling).view(shape)


class RowLora(nn.Module):
    """A linear cut by rows, with the adapter of its `module`."""

    def __init__(self, base: Any, active: Active, module: str) -> None:
        super().__init__()
        self.base, self.active, self.module = base, active, module

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, bias = self.base(inputs, *args, **kwargs)
        pair = self.active.pairs.get(self.module)
        if pair is None:
            return output, bias
        inner = functional.linear(inputs, pair.down.to(inputs.dtype))
        inner = reduce_from_tensor_model_parallel_region(inner)
        return output + functional.linear(inner, pair.up.to(inner.dtype) * pair.scaling), bias


class Adapted:
    """A model whose linears follow the active run; `names` are those of this rank's stage."""

    def __init__(self, model: Any, shapes: Shapes) -> None:
        self.shapes = shapes
        self.kinds = tuple(name.rpartition(".")[2] for name in PROJECTIONS)
        self.active = Active()
        self.names: list[str] = []
        for layer in model.decoder.layers:
            self._wrap(layer, f"model.layers.{layer.layer_number - 1}")

    def layout(self, spec: LoraSpec) -> Layout:
        """How the whole of such an adapter lies in a vector, as for any other engine.

        Raises:
            InvalidRequest: a target module that the model does not have.
        """
        every = [
            f"model.layers.{layer}.{name}"
            for layer in range(self.shapes.layers)
            for name in PROJECTIONS
        ]
        for target in spec.target_modules or ("",):
            if not any(_matches(name, target) for name in every):
                raise InvalidRequest(
                    f"The Megatron trainer has no linear module {target!r}; an adapter needs one "
                    f"or more of {', '.join(self.kinds)}.",
                    param="target_modules",
                )
        parts, offset = [], 0
        for name in every:
            if any(_matches(name, target) for target in spec.target_modules):
                outs, ins = self.shapes.features(_projection(name))
                parts.append(Part(name, ins, outs, offset, offset + spec.rank * ins))
                offset += spec.rank * (ins + outs)
        return Layout(spec.rank, spec.alpha, tuple(parts))

    def local(self, layout: Layout) -> Local:
        """How this rank's part of an adapter lies in its vector."""
        chosen = [part.module for part in layout.parts if part.module in self.names]
        wanted = [tensor for name in chosen for tensor in self._tensors(name, layout.rank)]
        wanted.sort(key=lambda tensor: tensor[1].dim is not None)
        slots: dict[str, Slot] = {}
        offset = shared = 0
        for name, cut, shape in wanted:
            slots[name] = slot = Slot(name, cut, shape, offset)
            offset = slot.stop
            if cut.dim is None:
                shared = offset
        return Local(layout.scaling, slots, shared, offset)

    def cut(self, tensor: str) -> Cut:
        """How a tensor, named as PEFT does, is cut."""
        module, letter, _ = tensor.rsplit(".", 2)
        cut = self.shapes.weight(_projection(module))
        return cut if letter == ("lora_B" if cut.dim == 0 else "lora_A") else Cut()

    def _tensors(self, module: str, rank: int) -> Iterator[tuple[str, Cut, tuple[int, int]]]:
        """Name, cut and this rank's shape of A and of B."""
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        outs, ins = self.shapes.features(_projection(module))
        for name, shape in ((down, (rank, ins)), (up, (outs, rank))):
            cut = self.cut(name)
            mine = list(shape)
            if cut.dim is not None:
                mine[cut.dim] = cut.padded // self.shapes.ranks
            yield name, cut, (mine[0], mine[1])

    def _wrap(self, layer: Any, prefix: str) -> None:
        attention, mlp, sizes = layer.self_attention, layer.mlp, self.shapes
        q, k, v, o, gate, up, down = (f"{prefix}.{name}" for name in PROJECTIONS)
        self.names += [q, k, v, o, gate, up, down]
        head, per_group = sizes.head_dim, sizes.heads_per_group
        groups = sizes.padded_groups // sizes.ranks
        attention.linear_qkv = ColumnLora(
            attention.linear_qkv, self.active, (q, k, v), (per_group * head, head, head), groups
        )
        attention.linear_proj = RowLora(attention.linear_proj, self.active, o)
        ffn = sizes.padded_ffn // sizes.ranks
        mlp.linear_fc1 = ColumnLora(mlp.linear_fc1, self.active, (gate, up), (ffn, ffn), 1)
        mlp.linear_fc2 = RowLora(mlp.linear_fc2, self.active, down)


def _projection(module: str) -> str:
    """`mlp.up_proj` of `model.layers.3.mlp.up_proj`."""
    return module.split(".", 3)[3]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
