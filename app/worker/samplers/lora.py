"""Many adapters in one forward pass.

What comes in: adapter files, and which row of a batch wants which adapter. What goes out: a
model whose every forward pass gives each row its own adapter. It must not know: requests, names
clients use, when to evict.

PEFT reads the config, builds the layers and places the weights. Its own mixed-batch forward sorts
the rows by name again in every layer of every step; here the rows of a batch are sorted once,
into `Lanes`, and the layers follow them. They also keep the weights: PEFT walks all that it holds
for each adapter it adds, so it is left none. And it walks the whole model: an adapter that differs
from an earlier one in its numbers alone goes where that one's went.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.functional import delete_adapter, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from app.errors import AdapterLoadFailed, NotFound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Kinds of adapter whose places are kept.
MAX_KINDS = 64
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


@dataclass(frozen=True, slots=True)
class Weights:
    """What one adapter adds to one layer, applied as `up(down(x)) * scaling`."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where tensors of an adapter go, by their names in its file."""

    layer: Mixed
    down: str
    up: str
    bias: str | None
    scaling: float


class LoraLayers:
    """The adapters inside one model, by slot."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lanes: tuple[Lane, ...] = ()
        self.mixed: dict[LoraLayer, Mixed] = {}
        self._places: dict[str, list[Place]] = {}

    def use(self, slots: Sequence[str | None]) -> None:
        """From now on row i of a batch has adapter `slots[i]`; None is the bare base."""
        self.lanes = lanes(slots, next(self.model.parameters()).device)

    def load(self, slot: str, files: AdapterFiles) -> None:
        """Place an adapter's weights; all of them or none."""
        kind = _kind(files)
        if (places := self._places.get(kind)) is not None:
            self._put(slot, files, places)
            return
        try:
            with _peft_at_ease():
                try:
                    self._inject(slot, files)
                finally:
                    self._take_from_peft(slot)
        except Exception as exc:
            self.unload(slot)
            if isinstance(exc, AdapterLoadFailed):
                raise
            raise AdapterLoadFailed(f"Loading lora from {files.path} failed: {exc}") from exc
        if len(self._places) < MAX_KINDS and (places := self._found(slot, files)):
            self._places[kind] = places

    def unload(self, slot: str) -> None:
        """Free a slot; one that is not there is fine."""
        for mixed in self.mixed.values():
            mixed.weights.pop(slot, None)

    def _put(self, slot: str, files: AdapterFiles, places: Sequence[Place]) -> None:
        dtype = next(self.model.parameters()).dtype
        weights = {name: tensor.to(dtype) for name, tensor in files.weights.items()}
        for place in places:
            bias = None if place.bias is None else weights[place.bias]
            kept = Weights(weights[place.down], weights[place.up], bias, place.scaling)
            place.layer.weights[slot] = kept

    def _found(self, slot: str, files: AdapterFiles) -> list[Place] | None:
        """Where PEFT put each tensor; None if it did not leave them as they are in the file."""
        names = {tensor.data_ptr(): name for name, tensor in files.weights.items()}
        places = []
        for mixed in self.mixed.values():
            if (kept := mixed.weights.get(slot)) is None:
                continue
            bias = None if kept.bias is None else names.get(kept.bias.data_ptr())
            down, up = names.get(kept.down.data_ptr()), names.get(kept.up.data_ptr())
            if down is None or up is None or (bias is None) != (kept.bias is None):
                return None
            places.append(Place(mixed, down, up, bias, kept.scaling))
        placed = {name for place in places for name in (place.down, place.up, place.bias)} - {None}
        return places if placed == files.weights.keys() else None

    def _take_from_peft(self, slot: str) -> None:
        if slot in getattr(self.model, "peft_config", {}):
            delete_adapter(self.model, slot, prefix="lora_")
            self.model.peft_config.pop(slot, None)

    def _inject(self, slot: str, files: AdapterFiles) -> None:
        inject_adapter_in_model(files.config, self.model, slot, low_cpu_mem_usage=True)
        dtype = next(self.model.parameters()).dtype
        weights = {name: tensor.to(dtype) for name, tensor in files.weights.items()}
        result: Any = set_peft_model_state_dict(self.model, weights, slot, low_cpu_mem_usage=True)
        missing = [key for key in result.missing_keys if f".{slot}." in f"{key}."]
        if missing or result.unexpected_keys:
            raise AdapterLoadFailed(
                f"The tensors in {files.path} do not fit the base: "
                f"missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}."
            )
        for module in self.model.modules():
            if isinstance(module, LoraLayer) and slot in module.scaling:
                self._mix(module, slot)

    def _mix(self, layer: LoraLayer, slot: str) -> None:
        """Let a layer PEFT made follow the lanes."""
        kind = _KINDS.get(type(layer))
        if kind is None:
            raise AdapterLoadFailed(f"Adapters on {type(layer).__name__} are not supported.")
        if layer not in self.mixed:
            mixed = self.mixed[layer] = kind(self, layer)
            # On the instance: PEFT's own forward, which wants `adapter_names`, stays unused.
            setattr(layer, "forward", mixed)  # noqa: B010
        self.mixed[layer].take(slot)


class Mixed:
    """A layer's forward: the base for all rows, then each lane's addition to its own."""

    def __init__(self, layers: LoraLayers, layer: Any) -> None:
        self.layers = layers
        self.layer = layer
        self.base = layer.base_layer
        self.weights: dict[str, Weights] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base(inputs)
        for lane in self.layers.lanes:
            weights = self.weights.get(lane.slot)
            if weights is None:
                continue
            if lane.rows is None:
                output.add_(self.added(inputs, weights), alpha=weights.scaling)
                continue
            rows = inputs.index_select(0, lane.rows)
            output.index_add_(0, lane.rows, self.added(rows, weights), alpha=weights.scaling)
        return output

    def take(self, slot: str) -> None:
        """Keep hold of the weights PEFT placed in a slot."""
        raise NotImplementedError

    def added(self, rows: Tensor, weights: Weights) -> Tensor:
        """What an adapter adds, before scaling."""
        raise NotImplementedError


class MixedLinear(Mixed):
    """Projections, the head among them."""

    def take(self, slot: str) -> None:
        up = self.layer.lora_B[slot]
        down = self.layer.lora_A[slot].weight
        self.weights[slot] = Weights(down, up.weight, up.bias, self.layer.scaling[slot])

    def added(self, rows: Tensor, weights: Weights) -> Tensor:
        return functional.linear(functional.linear(rows, weights.down), weights.up, weights.bias)


class MixedEmbedding(Mixed):
    """The token embedding; some models scale what comes out of it."""

    def take(self, slot: str) -> None:
        down, up = self.layer.lora_embedding_A[slot], self.layer.lora_embedding_B[slot]
        scale = self.layer._get_embed_scale()
        scaling = self.layer.scaling[slot] * (1.0 if scale is None else float(scale))
        self.weights[slot] = Weights(down.T.contiguous(), up, None, scaling)

    def added(self, rows: Tensor, weights: Weights) -> Tensor:
        return functional.linear(functional.embedding(rows, weights.down), weights.up)


@contextmanager
def _peft_at_ease() -> Iterator[None]:
    """PEFT warns that there is more than one adapter, and which is active: here, all and none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def _kind(files: AdapterFiles) -> str:
    """The same for adapters that PEFT treats alike: all of them but their numbers."""
    settings = files.config.to_dict()  # type: ignore[no-untyped-call]
    config = json.dumps(settings, sort_keys=True, default=_plain)
    tensors = sorted((name, str(t.dtype), *t.shape) for name, t in files.weights.items())
    return f"{config} {tensors}"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def read_adapter(path: str, *, max_rank: int) -> AdapterFiles:
    """Read and check an adapter folder; touches no model."""
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise NotFound(f"No adapter found for {path}")
    try:
        with _peft_at_ease():
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


_KINDS: dict[type, type[Mixed]] = {Linear: MixedLinear, Embedding: MixedEmbedding}
