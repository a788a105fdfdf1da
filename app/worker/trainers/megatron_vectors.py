"""How an adapter lies in vectors: the whole, as in every engine, and this rank's part.

What comes in: a spec, and the linears of a base. What goes out: layouts, and what is where in a
rank's vector. It must not know: models, losses, optimizers, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from app.domain import LoraSpec
from app.errors import InvalidRequest
from app.worker.trainers.lora import Layout, Part
from app.worker.trainers.megatron_base import Base
from app.worker.trainers.megatron_shapes import Cut


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
    """How this rank's part of a run lies in its vector; the first `shared` numbers all have.

    `layout` is of the whole.
    """

    layout: Layout
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

    def fill(self, vector: Tensor, whole: Tensor, rank: int, ranks: int) -> None:
        """Take this rank's part out of a whole vector."""
        for name, tensor in self.layout.tensors(whole):
            if name in self.slots:
                slot = self.slots[name]
                slot.view(vector).copy_(slot.cut.piece(tensor, rank, ranks))


class Adapters:
    """The adapters that a base may wear; `ranks` share each of its layers."""

    def __init__(self, base: Base, ranks: int) -> None:
        self._base, self._ranks = base, ranks
        self._linears = {linear.name: linear for linear in base.linears}
        #: The last parts of the names: what a spec may target.
        self.kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in self._linears))

    def layout(self, spec: LoraSpec) -> Layout:
        """How the whole of such an adapter lies in a vector, as for any other engine.

        Raises:
            InvalidRequest: a target module that the model does not have, or a rank that its
                tensor-parallel ranks cannot share.
        """
        for target in spec.target_modules or ("",):
            if not any(_matches(name, target) for name in self._linears):
                raise InvalidRequest(
                    f"The Megatron trainer has no linear module {target!r}; an adapter needs one "
                    f"or more of {', '.join(self.kinds)}.",
                    param="target_modules",
                )
        parts, offset = [], 0
        for name, linear in self._linears.items():
            if any(_matches(name, target) for target in spec.target_modules):
                up = offset + spec.rank * linear.ins
                parts.append(Part(name, linear.ins, linear.outs, offset, up))
                offset = up + spec.rank * linear.outs
        layout = Layout(spec.rank, spec.alpha, tuple(parts))
        self.cuts(layout)
        return layout

    def cuts(self, layout: Layout) -> dict[str, Cut]:
        """How every tensor is cut, by the name PEFT has for it."""
        found = {}
        for part in layout.parts:
            down, up = self._base.cuts(self._linears[part.module], layout.rank)
            found[f"{part.module}.lora_A.weight"] = down
            found[f"{part.module}.lora_B.weight"] = up
        return found

    def local(self, layout: Layout) -> Local:
        """How this rank's part of an adapter lies in its vector.

        What all ranks have comes first, so that a norm can count it once.
        """
        cuts, wanted = self.cuts(layout), []
        for part in layout.parts:
            if part.module in self._base.here:
                wanted.append((f"{part.module}.lora_A.weight", (layout.rank, part.in_features)))
                wanted.append((f"{part.module}.lora_B.weight", (part.out_features, layout.rank)))
        wanted.sort(key=lambda each: cuts[each[0]].dim is not None)
        slots: dict[str, Slot] = {}
        offset = shared = 0
        for name, shape in wanted:
            cut = cuts[name]
            slots[name] = slot = Slot(name, cut, cut.shape(shape, self._ranks), offset)
            offset = slot.stop
            if cut.dim is None:
                shared = offset
        return Local(layout, slots, shared, offset)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
