"""What either trainer made, by a job or by single ops, served by a real vLLM: the trainer's own
logprobs, and PEFT's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from app.control import backends, embedded
from app.domain import TrainerKind
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.training_jobs import (
    chat,
    finished,
    forget,
    furthest,
    gateway_with,
    logprobs_of,
    row_of,
    stepped,
    submit,
    verified,
)

pytestmark = [pytest.mark.vllm, pytest.mark.worker]

#: Who a job is given to.
TRAINERS = {TrainerKind.HF: embedded.POOL, TrainerKind.MEGATRON: backends.MEGATRON_TRAINER}

needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="pip install 'loragate[megatron]'"
)


@pytest.mark.parametrize(
    "kind", [TrainerKind.HF, pytest.param(TrainerKind.MEGATRON, marks=needs_megatron)]
)
async def test_served_by_vllm_as_trained(
    kind: TrainerKind, vllm_server: ModelServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    environment: dict[str, object] = {"USE_MEGATRON": "false"}
    if kind is TrainerKind.MEGATRON:
        url = request.getfixturevalue("megatron_server").url
        environment = {"USE_MEGATRON": "true", "MEGATRON_SERVER_URL": url}
    with gateway_with(
        tmp_path,
        USE_VLLM="true",
        VLLM_BASE_URL=vllm_server.url,
        VLLM_MAX_LORA_RANK=MAX_LORA_RANK,
        **environment,
    ) as gateway:
        job = submit(gateway, epochs=3)
        tuned = finished(gateway, job).fine_tuned_model
        assert (await row_of(gateway, job)).trainer == TRAINERS[kind]
        assert tuned is not None
        for model in (tuned, stepped(gateway)):
            assert chat(gateway, model)
            assert verified(gateway, model)
            found = logprobs_of(gateway, model)
            assert furthest(found.served, found.trained) < 1e-3
            assert furthest(found.served, found.peft) < 1e-3
        forget(gateway)
