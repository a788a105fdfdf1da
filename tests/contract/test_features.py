"""What a replica says it gets right, asked through the driver the gateway uses.

The fake, the worker and a vLLM with the plugin answer alike. A vLLM without it does not answer,
and is then told by its metrics; the fake speaks for one, and tests/vllm asks a real one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from app.backends.base import Features
from app.backends.vllm import VllmBackend
from app.backends.wire import Limits
from app.errors import UpstreamError, UpstreamRefused
from tests.fakes import dialect
from tests.fakes.faults import Status
from tests.fakes.upstream import FakeUpstream
from tests.servers import ModelServer

ALL = Features(True, True, True)
NONE = Features(False, False, False)
NOT_LM_HEAD = Features(True, True, False)
SAID_NOT_LM_HEAD = replace(NOT_LM_HEAD, dtype="float32")


@pytest.fixture(
    params=[
        "fake",
        pytest.param("worker", marks=pytest.mark.worker),
        pytest.param("vllm", marks=pytest.mark.vllm),
    ]
)
def server(request: pytest.FixtureRequest) -> ModelServer:
    found: ModelServer = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    found = FakeUpstream("tiny")
    yield found
    found.close()


@pytest.fixture
async def backend(upstream: FakeUpstream) -> AsyncIterator[VllmBackend]:
    found = connect(upstream.url)
    yield found
    await found.close()


def connect(url: str) -> VllmBackend:
    return VllmBackend(url, api_key=None, limits=Limits(), load_s=30)


async def test_what_it_gets_right(server: ModelServer) -> None:
    backend = connect(server.url)
    try:
        assert await backend.features() == replace(ALL, dtype="float32")
    finally:
        await backend.close()


async def test_a_plugin_may_say_that_it_is_not_at_work(
    upstream: FakeUpstream, backend: VllmBackend
) -> None:
    upstream.engine.features = dialect.FEATURES | {"prompt_logprobs_with_lm_head_lora": False}
    assert await backend.features() == SAID_NOT_LM_HEAD


@pytest.mark.parametrize(
    ("cpu", "lora", "found"),
    [
        (False, True, NOT_LM_HEAD),
        (False, False, NOT_LM_HEAD),
        (True, True, NONE),
        (True, False, NOT_LM_HEAD),
    ],
)
async def test_a_vllm_without_the_plugin(
    upstream: FakeUpstream, backend: VllmBackend, cpu: bool, lora: bool, found: Features
) -> None:
    upstream.engine.features = None
    upstream.engine.metrics = dialect.metrics(cpu=cpu, lora=lora)
    assert await backend.features() == found


async def test_a_server_without_metrics_is_not_trusted(
    upstream: FakeUpstream, backend: VllmBackend
) -> None:
    upstream.engine.features = None
    upstream.script("/metrics", Status(404))
    assert await backend.features() == NONE


async def test_an_answer_that_is_none(upstream: FakeUpstream, backend: VllmBackend) -> None:
    upstream.script("/loragate/features", Status(503))
    with pytest.raises(UpstreamError, match="answered 503 to /loragate/features"):
        await backend.features()
    upstream.engine.features = {"prompt_logprobs": "yes"}  # not ours, whatever it is
    assert await backend.features() == NOT_LM_HEAD
    upstream.stop()
    with pytest.raises(UpstreamRefused):
        await backend.features()
