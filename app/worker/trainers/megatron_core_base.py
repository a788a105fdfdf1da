"""A Llama-like model in Megatron-Core alone, whose linears follow the active run.

What comes in: a model folder. What goes out: the base that the engine asks for. It must not know:
losses, optimizers, runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from app.worker.trainers.megatron_base import Linear
from app.worker.trainers.megatron_lora import Active, ColumnLora, RowLora
from app.worker.trainers.megatron_model import build
from app.worker.trainers.megatron_packing import Packed
from app.worker.trainers.megatron_shapes import PROJECTIONS, Cut
from app.worker.trainers.megatron_vectors import Local


class CoreBase:
    """GPTModel over torch's attention; see `megatron_base.Base`."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, recompute: bool
    ) -> None:
        """Have this rank's part of the model.

        Raises:
            ConfigurationError: a model this engine cannot compute, or that lacks a weight.
        """
        self.model, self.shapes = build(folder, dtype, device, recompute=recompute)
        self.max_length, self.hidden = self.shapes.max_length, self.shapes.hidden
        self.first, self.last = self.model.pre_process, self.model.post_process
        self.linears = [
            Linear(f"model.layers.{layer}.{name}", ins, outs, self.shapes.weight(name))
            for layer in range(self.shapes.layers)
            for name in PROJECTIONS
            for outs, ins in (self.shapes.features(name),)
        ]
        self.active = Active()
        self.here: list[str] = []
        for layer in self.model.decoder.layers:
            self._wrap(layer, f"model.layers.{layer.layer_number - 1}")

    def cuts(self, linear: Linear, rank: int) -> tuple[Cut, Cut]:
        return (Cut(), linear.cut) if linear.cut.dim == 0 else (linear.cut, Cut())

    def wear(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        self.active.set(local, weights, gradient)

    def bare(self) -> None:
        self.active.clear()

    def forward(
        self, packed: Packed, targets: Tensor, taken: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if taken is not None:
            self.model.set_input_tensor(taken)
        found = self.model(packed.ids[None], packed.positions[None], packed, labels=targets[None])
        return cast("Tensor | tuple[Tensor, Tensor]", found)

    def _wrap(self, layer: Any, prefix: str) -> None:
        attention, mlp, sizes = layer.self_attention, layer.mlp, self.shapes
        q, k, v, o, gate, up, down = (f"{prefix}.{name}" for name in PROJECTIONS)
        self.here += [q, k, v, o, gate, up, down]
        head, per_group = sizes.head_dim, sizes.heads_per_group
        groups = sizes.padded_groups // sizes.ranks
        attention.linear_qkv = ColumnLora(
            attention.linear_qkv, self.active, (q, k, v), (per_group * head, head, head), groups
        )
        attention.linear_proj = RowLora(attention.linear_proj, self.active, o)
        ffn = sizes.padded_ffn // sizes.ranks
        mlp.linear_fc1 = ColumnLora(mlp.linear_fc1, self.active, (gate, up), (ffn, ffn), 1)
        mlp.linear_fc2 = RowLora(mlp.linear_fc2, self.active, down)
