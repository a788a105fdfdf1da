"""What a vLLM without our plugin gets right, told from outside.

What comes in: the text of its /metrics. What goes out: `Features`. On a CPU vLLM dies of prompt
logprobs when LoRA is enabled, but nothing it shows says "CPU": so an engine whose cache is
laid out as on a CPU is taken for one, and one that shows nothing is as well.
"""

from __future__ import annotations

import re

from app.backends.base import Features

#: The family is there as soon as LoRA is enabled, before any adapter is.
_LORA = "vllm:lora_requests_info"
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

#: What GPUs use unless told otherwise. CPUs use multiples of 32, and 16 for MLA alone.
_GPU_BLOCK = "16"

_SAFE = Features(prompt_logprobs=True, lora_prompt_logprobs=True, lm_head_prompt_logprobs=False)
_UNSAFE = Features(prompt_logprobs=False, lora_prompt_logprobs=False, lm_head_prompt_logprobs=False)


def plain_features(metrics: str) -> Features:
    """What the vLLM with these metrics gets right without the plugin."""
    cache = _CACHE.search(metrics)
    if cache is None:
        return _UNSAFE
    safe = _LORA not in metrics or not _may_be_cpu(dict(_LABEL.findall(cache[1])))
    return _SAFE if safe else _UNSAFE


def _may_be_cpu(cache: dict[str, str]) -> bool:
    as_on_gpu = {
        "block_size": _GPU_BLOCK,
        "user_specified_block_size": "False",
        # Where VLLM_CPU_KVCACHE_SPACE ends up.
        "kv_cache_memory_bytes": "None",
    }
    return any(cache.get(label) != value for label, value in as_on_gpu.items())
