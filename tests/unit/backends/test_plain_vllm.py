"""A vLLM without the plugin, known by its metrics: better taken for a CPU's than trusted."""

from __future__ import annotations

import pytest

from app.backends.base import Features
from app.backends.plain_vllm import plain_features
from tests.fakes import dialect

SAFE = Features(True, True, False)
UNSAFE = Features(False, False, False)
ON_GPU = dialect.metrics()


@pytest.fixture
def loop_kind() -> str:
    return "asyncio"


def test_a_gpu_s_is_safe_but_for_lm_head() -> None:
    assert plain_features(ON_GPU) == SAFE


def test_without_lora_nothing_dies() -> None:
    assert plain_features(dialect.metrics(cpu=True, lora=False)) == SAFE


@pytest.mark.parametrize(
    ("gpu", "cpu"),
    [
        ('block_size="16"', 'block_size="128"'),
        ('block_size="16"', 'block_size="32"'),
        ('user_specified_block_size="False"', 'user_specified_block_size="True"'),
        ('kv_cache_memory_bytes="None"', 'kv_cache_memory_bytes="1073741824"'),
        ('block_size="16",', ""),
    ],
)
def test_one_sign_of_a_cpu_is_enough(gpu: str, cpu: str) -> None:
    assert gpu in ON_GPU
    assert plain_features(ON_GPU.replace(gpu, cpu, 1)) == UNSAFE


@pytest.mark.parametrize("text", ["", "loragate_worker_up 1\n", "vllm:cache_config_info 1\n"])
def test_what_does_not_say_is_not_trusted(text: str) -> None:
    assert plain_features(text) == UNSAFE
