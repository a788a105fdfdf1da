"""Adapter files made to measure: any tensor, any config, any header.

What comes in: what should be odd about them. What goes out: bytes, without torch.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

from app.control.inspect_adapter import AdapterFacts, inspect
from app.domain import BaseModel, Pool

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
BASE = BaseModel("acme/tiny", LLAMA, ("tiny", "/models/tiny"))
POOL = Pool("pool", "acme/tiny", "tiny", max_lora_rank=16)

ATTENTION = "base_model.model.model.layers.0.self_attn"
MLP = "base_model.model.model.layers.1.mlp"

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "acme/tiny",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}
TENSORS: dict[str, tuple[int, ...]] = {
    f"{ATTENTION}.q_proj.lora_A.weight": (4, 64),
    f"{ATTENTION}.q_proj.lora_B.weight": (64, 4),
    f"{ATTENTION}.v_proj.lora_A.weight": (4, 64),
    f"{ATTENTION}.v_proj.lora_B.weight": (32, 4),
}


def config(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


def header_of(tensors: dict[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * {"F32": 4, "BF16": 2, "F64": 8}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header


def safetensors(header: dict[str, Any] | bytes, data_bytes: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data_bytes is None:
        assert isinstance(header, dict)
        data_bytes = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"),
            default=0,
        )
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def looked_at(
    config_: dict[str, Any] | bytes = CONFIG,
    weights: dict[str, tuple[int, ...]] | bytes = TENSORS,
    base: BaseModel = BASE,
    pool: Pool = POOL,
) -> AdapterFacts:
    raw = config_ if isinstance(config_, bytes) else json.dumps(config_).encode()
    body = weights if isinstance(weights, bytes) else safetensors(header_of(weights))
    return inspect(raw, io.BytesIO(body), len(body), base=base, pool=pool)
