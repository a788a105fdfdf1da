"""Megatron-Core's names, imported without the warnings it prints for what it can do without.

What comes in: the `megatron` extra. What goes out: the few names that the other `megatron_*`
modules use, so that this list is what an upgrade has to keep. It must not know: our models, runs.
"""

from __future__ import annotations

import logging
import warnings

# It tells at length, and once for each of its modules, what it found and what it was given.
logging.getLogger("megatron").setLevel(logging.ERROR)

with warnings.catch_warnings():
    # Neither Transformer Engine nor apex is wanted, and it says so once for each of its modules.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = [
    "GPTModel",
    "TransformerConfig",
    "TransformerLayer",
    "copy_to_tensor_model_parallel_region",
    "get_gpt_layer_local_spec",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "vocab_parallel_cross_entropy",
]
