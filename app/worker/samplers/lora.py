"""Many adapters in one forward pass.

What comes in: adapter files, and which row of a batch wants which adapter. What goes out: a
model whose every forward pass gives each row its own adapter. It must not know: requests, names
clients use, when to evict.

PEFT reads the config, builds the layers and places the weights. Its own mixed-batch forward sorts
the rows by name again in every layer of every step; here the rows of a batch are sorted once,
into `Lanes`, and the layers follow them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.functional import delete_adapter, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from app.errors import AdapterLoadFailed, NotFound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Initialisations that also change the base weights; their adapters only fit that changed base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter read from disk, checked as far as it can be without the base."""

    path: str
    config: LoraConfig
    weights: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Lane:
    """The rows of one adapter; `rows` is None when they are the whole batch."""

    slot: str
    rows: Tensor | None


class LoraLayers:
    """The adapters inside one model, by slot."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._lanes: tuple[Lane, ...] = ()
        self._mixed: set[nn.Module] = set()

    def use(self, slots: Sequence[str | None]) -> None:
        """From now on row i of a batch has adapter `slots[i]`; None is the bare base."""
        self._lanes = lanes(slots, self._device())

    def load(self, slot: str, files: AdapterFiles) -> None:
        """Place an adapter's weights; all of them or none."""
        try:
            with warnings.catch_warnings():
                # PEFT warns that there is more than one adapter, which is the point.
                warnings.simplefilter("ignore")
                self._inject(slot, files)
        except Exception as exc:
            self.unload(slot)
            if isinstance(exc, AdapterLoadFailed):
                raise
            raise AdapterLoadFailed(f"Loading lora from {files.path} failed: {exc}") from exc

    def unload(self, slot: str) -> None:
        if slot in getattr(self.model, "peft_config", {}):
            delete_adapter(self.model, slot, prefix="lora_")
            del self.model.peft_config[slot]

    def _inject(self, slot: str, files: AdapterFiles) -> None:
        inject_adapter_in_model(files.config, self.model, slot, low_cpu_mem_usage=True)
        self._mix_layers()
        dtype = next(self.model.parameters()).dtype
        weights = {name: tensor.to(dtype) for name, tensor in files.weights.items()}
        result: Any = set_peft_model_state_dict(self.model, weights, slot, low_cpu_mem_usage=True)
        missing = [key for key in result.missing_keys if f".{slot}." in f"{key}."]
        if missing or result.unexpected_keys:
            raise AdapterLoadFailed(
                f"The tensors in {files.path} do not fit the base: "
                f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}."
            )

    def _mix_layers(self) -> None:
        """Let every layer PEFT made follow the lanes."""
        for module in self.model.modules():
            if not isinstance(module, LoraLayer) or module in self._mixed:
                continue
            forward = _FORWARDS.get(type(module))
            if forward is None:
                raise AdapterLoadFailed(f"Adapters on {type(module).__name__} are not supported.")
            module.forward = partial(forward, self, module)
            self._mixed.add(module)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def linear(self, layer: Linear, inputs: Tensor) -> Tensor:
        output: Tensor = layer.base_layer(inputs)
        for lane in self._lanes:
            if lane.slot not in layer.lora_A:
                continue
            down, up = layer.lora_A[lane.slot], layer.lora_B[lane.slot]
            rows = inputs if lane.rows is None else inputs.index_select(0, lane.rows)
            _add(output, lane, up(down(rows)), layer.scaling[lane.slot])
        return output

    def embedding(self, layer: Embedding, inputs: Tensor) -> Tensor:
        output: Tensor = layer.base_layer(inputs)
        for lane in self._lanes:
            if lane.slot not in layer.lora_embedding_A:
                continue
            down = layer.lora_embedding_A[lane.slot].T
            up = layer.lora_embedding_B[lane.slot].T
            rows = inputs if lane.rows is None else inputs.index_select(0, lane.rows)
            added = functional.embedding(rows, down) @ up
            scale = layer._get_embed_scale()  # type: ignore[no-untyped-call]
            _add(output, lane, added if scale is None else added * scale, layer.scaling[lane.slot])
        return output


def lanes(slots: Sequence[str | None], device: torch.device) -> tuple[Lane, ...]:
    """Sort rows by adapter. The base needs no lane."""
    rows: dict[str, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot is not None:
            rows.setdefault(slot, []).append(row)
    return tuple(
        Lane(slot, None if len(members) == len(slots) else torch.tensor(members, device=device))
        for slot, members in rows.items()
    )


def read_adapter(path: str, *, max_rank: int) -> AdapterFiles:
    """Read and check an adapter folder; touches no model."""
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise NotFound(f"No adapter found for {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
            weights = load_file(folder / WEIGHTS)
    except Exception as exc:
        raise AdapterLoadFailed(f"Reading {path} failed: {exc}") from exc
    if not isinstance(config, LoraConfig):
        raise AdapterLoadFailed(f"{path} is a {config.peft_type} adapter; only LORA is served.")
    _refuse_unsupported(config, max_rank)
    config.inference_mode = True
    config.init_lora_weights = True
    return AdapterFiles(str(path), config, weights)


def _refuse_unsupported(config: LoraConfig, max_rank: int) -> None:
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > max_rank:
        raise AdapterLoadFailed(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    start = str(config.init_lora_weights).lower()
    refused = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
        "target_parameters": getattr(config, "target_parameters", None),
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": getattr(config, "alora_invocation_tokens", None),
        "use_qalora": getattr(config, "use_qalora", None),
        f"init_lora_weights={start}": start.startswith(BASE_CHANGING),
        f"bias={config.bias}": config.bias != "none",
    }
    found = [name for name, value in refused.items() if value]
    if found:
        raise AdapterLoadFailed(f"The adapter uses {', '.join(found)}, which is not supported.")


def _add(output: Tensor, lane: Lane, added: Tensor, scaling: float) -> None:
    if lane.rows is None:
        output.add_(added, alpha=scaling)
    else:
        output.index_add_(0, lane.rows, added.to(output.dtype), alpha=scaling)


_FORWARDS: dict[type, Any] = {Linear: LoraLayers.linear, Embedding: LoraLayers.embedding}
