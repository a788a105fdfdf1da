"""What the worker's own trainer made, served by a real vLLM: its logprobs, and PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import MAX_LORA_RANK, ModelServer
from tests.training_jobs import (
    chat,
    finished,
    forget,
    furthest,
    gateway_with,
    logprobs_of,
    submit,
    verified,
)

pytestmark = [pytest.mark.vllm, pytest.mark.worker]


def test_served_by_vllm_as_trained_by_the_worker(vllm_server: ModelServer, tmp_path: Path) -> None:
    with gateway_with(
        tmp_path,
        USE_MEGATRON="false",
        USE_VLLM="true",
        VLLM_BASE_URL=vllm_server.url,
        VLLM_MAX_LORA_RANK=MAX_LORA_RANK,
    ) as gateway:
        model = finished(gateway, submit(gateway, epochs=3)).fine_tuned_model
        assert model is not None
        assert chat(gateway, model)
        assert verified(gateway, model)
        found = logprobs_of(gateway, model)
        assert furthest(found.served, found.trained) < 1e-3
        assert furthest(found.served, found.peft) < 1e-3
        forget(gateway)
