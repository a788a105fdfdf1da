"""What a run is on disk: a state to go on from, and an adapter that others load.

What comes in: a run's vectors and their layout. What goes out: safetensors and JSON in a folder.
It must not know: who asked, whether a folder is in its final place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from app.errors import InvalidRequest
from app.worker.trainers.lora import Layout

STATE, VECTORS = "state.json", "state.safetensors"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_state(folder: Path, layout: Layout, vectors: Mapping[str, Tensor], *, steps: int) -> None:
    """Write vectors of the layout's size, and the optimizer's steps."""
    save_file({name: vector.cpu() for name, vector in vectors.items()}, folder / VECTORS)
    _write(folder / STATE, {"shape": _shape(layout), "steps": steps})


def load_state(folder: Path, layout: Layout) -> tuple[dict[str, Tensor], int]:
    """The vectors, on the CPU, and steps that were saved.

    Raises:
        InvalidRequest: they are those of another shape of adapter.
    """
    state = json.loads((folder / STATE).read_bytes())
    for field, here in _shape(layout).items():
        if (there := state["shape"][field]) != here:
            raise InvalidRequest(
                f"The state is of an adapter with {field} {there}; this run has {here}.",
                param=field,
            )
    return load_file(folder / VECTORS), state["steps"]


def save_adapter(folder: Path, layout: Layout, weights: Tensor, base_model: str) -> None:
    """Write what PEFT's `save_pretrained` would; the same weights give the same bytes.

    Only what differs from PEFT's defaults, or is read by other engines, is in the config.
    """
    tensors = {
        f"base_model.model.{name}": tensor.cpu().contiguous()
        for name, tensor in layout.tensors(weights)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": layout.rank,
            "lora_alpha": layout.alpha,
            "target_modules": _targets(layout),
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        },
    )


def _targets(layout: Layout) -> list[str]:
    return sorted({part.module.rpartition(".")[2] for part in layout.parts})


def _shape(layout: Layout) -> dict[str, Any]:
    return {
        "rank": layout.rank,
        "alpha": layout.alpha,
        "target_modules": _targets(layout),
        "weights": layout.size,
    }


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
