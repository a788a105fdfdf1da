"""Scoring token ids through the backend: the fake, the worker and vLLM say what was trained.

A probe computed with transformers and PEFT is the judge, so the worker and vLLM agree with each
other too. On the fake, which has no model, its own weights are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app import demo
from app.backends.vllm import VllmBackend
from app.backends.wire import Limits
from app.domain import Probe
from app.errors import UpstreamBroke, UpstreamError
from app.serving.verify import compare
from tests.fakes.adapters import write_adapter
from tests.fakes.faults import Status
from tests.fakes.upstream import FakeUpstream
from tests.servers import ModelServer

ROWS = [[11, 23, 5, 42, 7], [250, 9], [3, 3, 3, 3]]


@pytest.fixture(
    params=[
        "fake",
        pytest.param("worker", marks=pytest.mark.worker),
        pytest.param("vllm", marks=pytest.mark.vllm),
    ]
)
def server(request: pytest.FixtureRequest) -> ModelServer:
    found = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(found, ModelServer)
    return found


def connect(url: str) -> VllmBackend:
    limits = Limits(connections=4, connect_s=5.0, first_byte_s=60.0, idle_s=60.0)
    return VllmBackend(url, api_key=None, limits=limits, load_s=60.0)


@pytest.fixture
async def backend(server: ModelServer) -> AsyncIterator[VllmBackend]:
    """A connection to the server, which keeps none of the adapters loaded over it."""
    found = connect(server.url)
    yield found
    for name in await found.list_adapters():
        await found.unload_adapter(name)
    await found.close()


def another(server: ModelServer, folder: Path) -> Path:
    """An adapter with other weights than `server.adapter`."""
    if server.process is None:
        return write_adapter(folder / "another", seed=9)
    return list(demo.ADAPTERS.values())[1]


async def test_the_weights_decide_and_not_the_name(
    backend: VllmBackend, server: ModelServer, tmp_path: Path
) -> None:
    await backend.load_adapter("one@1", str(server.adapter))
    await backend.load_adapter("two@7", str(server.adapter))
    await backend.load_adapter("three@1", str(another(server, tmp_path)))
    one = await backend.score("one@1", ROWS)
    assert [len(row) for row in one] == [4, 1, 3]
    assert all(number <= 0 for row in one for number in row)
    probe = Probe(tuple(map(tuple, ROWS)), tuple(map(tuple, one)))
    assert compare(probe, await backend.score("two@7", ROWS), "float32").ok
    assert not compare(probe, await backend.score("three@1", ROWS), "float32").ok
    assert not compare(probe, await backend.score(server.served, ROWS), "float32").ok


async def test_scoring_nobody(backend: VllmBackend) -> None:
    with pytest.raises(UpstreamError, match=r"did not score nobody@1: .* does not exist"):
        await backend.score("nobody@1", ROWS)


@pytest.fixture(scope="session")
def probes() -> dict[str, Probe]:
    """What transformers and PEFT compute for two of the demo's adapters."""
    found = {}
    for name, folder in list(demo.ADAPTERS.items())[:2]:
        words = ["--adapter", str(folder), "--model", str(demo.MODEL_DIR)]
        command = [sys.executable, "-m", "app.worker.probe", *words]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        raw = json.loads(ran.stdout)
        rows = (tuple(map(tuple, raw[field])) for field in ("token_ids", "logprobs"))
        found[name] = Probe(*rows, raw["dtype"])
    return found


@pytest.mark.worker
@pytest.mark.parametrize(
    "kind", ["worker", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=False
)
async def test_what_is_served_is_what_peft_computes(
    kind: str, request: pytest.FixtureRequest, probes: dict[str, Probe]
) -> None:
    server: ModelServer = request.getfixturevalue(f"{kind}_server")
    backend = connect(server.url)
    for name, folder in list(demo.ADAPTERS.items())[:2]:
        await backend.load_adapter(f"{name}@1", str(folder))
    for name in probes:
        served = await backend.score(f"{name}@1", probes[name].token_ids)
        for other, probe in probes.items():
            verdict = compare(probe, served, "float32")
            assert verdict.ok is (name == other), str(verdict)
    for name in probes:
        await backend.unload_adapter(f"{name}@1")
    await backend.close()


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense",
        b'{"choices":[]}',
        b'{"choices":[{"prompt_logprobs":null}]}',
        b'{"choices":[{"prompt_logprobs":[null]}]}',
        b'{"choices":[{"prompt_logprobs":[null,null]}]}',
        b'{"choices":[{"prompt_logprobs":[null,{"8":{"logprob":-1}}]}]}',
        b'{"choices":[{"prompt_logprobs":[null,{"7":{"logprob":"high"}}]}]}',
    ],
)
async def test_an_answer_that_is_none_is_not_believed(body: bytes) -> None:
    upstream = FakeUpstream("tiny")
    upstream.script("/v1/completions", Status(200, body))
    backend = connect(upstream.url)
    with pytest.raises(UpstreamBroke, match="tiny"):
        await backend.score("tiny", [[5, 7]])
    await backend.close()
    upstream.close()
