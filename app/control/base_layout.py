"""Which modules a base model has, and their sizes, from its config.json.

What comes in: a config. What goes out: a `Layout` for the architectures whose module names we
know, None for the others, whose adapters get only the checks that need no layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Architectures with Llama's module names.
LLAMA_LIKE = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GraniteForCausalLM",
    }
)
#: Those of them whose embeddings vLLM lets an adapter change; for the rest a load fails there.
WITH_EMBEDDINGS = frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM"})

EMBEDDING = "embed_tokens"
_IN_LAYER = re.compile(
    r"model\.layers\.(0|[1-9][0-9]{0,5})\."
    r"(self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The modules an adapter may change. `sizes` is (inputs, outputs) by the name's last part."""

    layers: int
    sizes: Mapping[str, tuple[int, int]]

    def size_of(self, module: str) -> tuple[int, int] | None:
        """(inputs, outputs) of a module by its full name; None if the base has no such module."""
        if module in ("lm_head", f"model.{EMBEDDING}"):
            return self.sizes.get(module.removeprefix("model."))
        found = _IN_LAYER.fullmatch(module)
        if found is None or int(found[1]) >= self.layers:
            return None
        return self.sizes[found[2].partition(".")[2]]

    @property
    def modules(self) -> str:
        """The module names, to be shown."""
        return ", ".join(self.sizes)


def layout_of(config: Mapping[str, Any] | None) -> Layout | None:
    """The layout of a base with this config.json, if it is one we know."""
    architectures = (config or {}).get("architectures")
    if config is None or not isinstance(architectures, list) or len(architectures) != 1:
        return None
    if architectures[0] not in LLAMA_LIKE:
        return None
    hidden, middle = _size(config, "hidden_size"), _size(config, "intermediate_size")
    layers, heads = _size(config, "num_hidden_layers"), _size(config, "num_attention_heads")
    vocab = _size(config, "vocab_size")
    if not (hidden and middle and layers and heads and vocab):
        return None
    head_dim = _size(config, "head_dim") or hidden // heads
    queries = heads * head_dim
    keys = (_size(config, "num_key_value_heads") or heads) * head_dim
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, middle),
        "up_proj": (hidden, middle),
        "down_proj": (middle, hidden),
    }
    if architectures[0] in WITH_EMBEDDINGS:
        sizes |= {EMBEDDING: (vocab, hidden), "lm_head": (hidden, vocab)}
    return Layout(layers, sizes)


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    return value if type(value) is int and value > 0 else 0
