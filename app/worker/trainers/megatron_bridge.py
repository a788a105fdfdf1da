"""Megatron-Bridge's names, imported without the warnings it prints for what it can do without.

What comes in: Megatron-Bridge, and Transformer Engine, without which it cannot be imported. What
goes out: the few names that we use, so that this list is what an upgrade has to keep. It must not
know: our models, runs.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Models that want more packages than are here say so, each for itself.
    warnings.simplefilter("ignore")
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

__all__ = [
    "AutoBridge",
    "CanonicalLoRA",
    "GPTModel",
    "PackedSeqParams",
    "model_parallel_cuda_manual_seed",
]
