"""Adapters and a base config small enough to write by hand, without torch.

What comes in: a folder. What goes out: what PEFT would have saved for a one-layer Llama. The
registry reads the config and the safetensors header; the numbers behind it are noise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HIDDEN = 64
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": HIDDEN,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def write_base(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG))
    return folder


def write_adapter(folder: Path, *, seed: int = 0, rank: int = 4, base: str = "tiny") -> Path:
    """An adapter on q_proj and v_proj; another `seed` makes other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "layers_to_transform": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module in ("q_proj", "v_proj"):
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{prefix}.lora_A.weight"] = [rank, HIDDEN]
        tensors[f"{prefix}.lora_B.weight"] = [HIDDEN, rank]
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(tensors, seed))
    return folder


def _safetensors(shapes: dict[str, list[int]], seed: int) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(data), len(data) + size],
        }
        # Exponent bits kept clear of all-ones: noise, but finite.
        noise = hashlib.shake_128(f"{seed} {name}".encode()).digest(size)
        data += bytes(b & 0x3F if i % 4 == 3 else b for i, b in enumerate(noise))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + bytes(data)
