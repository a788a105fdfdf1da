"""Batches and coalesced calls on a real vLLM: split and merged, they are what it says alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app import demo
from app.settings import PoolSettings, Settings
from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

COMPLETIONS = "/v1/completions"
FIRST = next(iter(demo.ADAPTERS))
PROMPTS = [f"{demo.SAMPLE_PROMPTS[n % 3]} {n}" for n in range(40)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}

FORMS: dict[str, dict[str, Any]] = {
    "text": GREEDY,
    "next token": {"max_tokens": 1, "logprobs": 5, "temperature": 0},
    "labels": {"max_tokens": 1, "logprobs": 1, "logprob_token_ids": [70, 71], "temperature": 0},
    "token ids": {"max_tokens": 1, "logprobs": 2, "temperature": 0, "return_token_ids": True},
    "n": {"max_tokens": 2, "n": 2, "seed": 5, "temperature": 1.0, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def gateway(
    vllm_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """Two replicas that are one vLLM under two names."""
    pool = PoolSettings.model_validate(
        {
            "name": "vllm",
            "base_model": demo.BASE_NAME,
            "base_model_path": demo.MODEL_DIR,
            "max_lora_rank": MAX_LORA_RANK,
            "replicas": (vllm_server.url, vllm_server.url.replace("127.0.0.1", "localhost")),
        }
    )
    gateway = Gateway(
        Settings(
            data_dir=tmp_path_factory.mktemp("gateway"),
            import_dirs=(demo.MODEL_DIR.parent,),
            pools=(pool,),
            embedded="off",
            health_period_s=0.2,
        )
    )
    try:
        wait_until(gateway.ready)
        gateway.register(FIRST, demo.ADAPTERS[FIRST])
        gateway.client.timeout = httpx.Timeout(120)
        yield gateway
    finally:
        gateway.close()


@pytest.fixture
def alone(gateway: Gateway, vllm_server: ModelServer) -> Iterator[httpx.Client]:
    """The vLLM itself, with the adapter loaded."""
    body = {"model": FIRST, "prompt": "x", "max_tokens": 1}
    assert gateway.client.post(COMPLETIONS, json=body).status_code == 200
    with httpx.Client(base_url=vllm_server.url, timeout=120) as client:
        yield client


def counted(gateway: Gateway, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", gateway.client.get("/metrics").text, re.M)
    assert found is not None
    return float(found[1])


def alike(one: Any, other: Any) -> None:
    """Equal, but for the noise in a logprob that another batch's shape makes."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"id", "created"}:
            alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            alike(mine, its)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    else:
        assert one == other


@pytest.mark.parametrize("form", FORMS)
def test_a_split_batch_is_the_whole_one(gateway: Gateway, alone: httpx.Client, form: str) -> None:
    payload = {"model": f"{FIRST}@1", "prompt": PROMPTS} | FORMS[form]
    before = counted(gateway, "loragate_batch_parts_total")
    answer = gateway.client.post(COMPLETIONS, json=payload)
    assert counted(gateway, "loragate_batch_parts_total") == before + 2
    alike(answer.json(), alone.post(COMPLETIONS, json=payload).json())


def test_a_split_stream_is_the_whole_one(gateway: Gateway, alone: httpx.Client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    payload = {"model": f"{FIRST}@1", "prompt": PROMPTS} | GREEDY | options

    def told(client: httpx.Client) -> tuple[dict[int, str], Any, int]:
        *lines, end = client.post(COMPLETIONS, json=payload).text.split("\n\n")[:-1]
        assert end == "data: [DONE]"
        *events, last = [json.loads(line.removeprefix("data: ")) for line in lines]
        texts: dict[int, str] = {}
        for event in events:
            (choice,) = event["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return texts, last["usage"], len({event["id"] for event in [*events, last]})

    assert told(gateway.client) == told(alone)


@pytest.mark.parametrize("form", ["next token", "labels", "token ids"])
def test_coalesced_requests_are_as_alone(gateway: Gateway, alone: httpx.Client, form: str) -> None:
    payloads = [{"model": f"{FIRST}@1", "prompt": prompt} | FORMS[form] for prompt in PROMPTS]
    before = counted(gateway, "loragate_calls_saved_total")
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda p: gateway.client.post(COMPLETIONS, json=p), payloads))
    assert counted(gateway, "loragate_calls_saved_total") > before
    for answer, payload in zip(answers, payloads, strict=True):
        alike(answer.json(), alone.post(COMPLETIONS, json=payload).json())
    assert len({answer.json()["id"] for answer in answers}) == 40


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bad", ["too long", "no such token"])
def test_one_bad_prompt_is_named(
    gateway: Gateway, alone: httpx.Client, bad: str, stream: bool
) -> None:
    prompts: list[Any] = [[70 + n % 9, 71, 72] for n in range(40)]
    prompts[17] = [70] * 3000 if bad == "too long" else [70, 10**6]
    payload = {"model": f"{FIRST}@1", "prompt": prompts, "stream": stream} | GREEDY
    answer, whole = (client.post(COMPLETIONS, json=payload) for client in (gateway.client, alone))
    assert answer.status_code == whole.status_code
    if answer.status_code == 400:
        named = whole.json()["error"] | {"param": "prompt[17]"}
        assert answer.json() == {"error": named}
    else:
        assert "out of vocabulary" in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


def test_more_prompts_than_vllm_takes(gateway: Gateway, alone: httpx.Client) -> None:
    payload = {"model": f"{FIRST}@1", "prompt": [[70, 71]] * 2200, "max_tokens": 1}
    assert alone.post(COMPLETIONS, json=payload).status_code == 400
    answer = gateway.client.post(COMPLETIONS, json=payload).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(2200))
    assert answer["usage"]["prompt_tokens"] == 4400
