"""The gateway in front of a real vLLM: every form of the client, and vLLM killed and restarted."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from app import demo
from app.settings import PoolSettings, Settings
from tests.integration.gateway import Gateway
from tests.processes import Process
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

NAMES = list(demo.ADAPTERS)
FIRST = NAMES[0]
QUESTION = demo.SAMPLE_PROMPTS[1]
ASK: Any = [{"role": "user", "content": QUESTION}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def gateway(
    vllm_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """One gateway for the module, with the demo's adapters registered."""
    pool = PoolSettings.model_validate(
        {
            "name": "vllm",
            "base_model": demo.BASE_NAME,
            "base_model_path": demo.MODEL_DIR,
            "max_lora_rank": MAX_LORA_RANK,
            "replicas": (vllm_server.url,),
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
        for name, folder in demo.ADAPTERS.items():
            gateway.register(name, folder)
        yield gateway
    finally:
        gateway.close()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.openai_client(timeout=120) as client:
        yield client


@pytest.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway.async_openai_client(timeout=120) as client:
        yield client


def say(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=ASK, **GREEDY)
    return answer.choices[0].message.content or ""


def test_every_adapter_speaks_its_own_way(client: openai.OpenAI) -> None:
    """More adapters than vLLM has slots for: all are served."""
    answers = {name: say(client, name) for name in (*NAMES, demo.BASE_NAME)}
    assert len(set(answers.values())) == len(answers)


def test_the_answer_names_the_version(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=FIRST, messages=ASK, **GREEDY)
    assert answer.model == f"{FIRST}@1"


def test_chat_stream_is_the_plain_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        model=FIRST, messages=ASK, stream=True, stream_options=options, **GREEDY
    ) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == say(client, FIRST)
    assert len(chunks) > 3
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


async def test_async_chat_and_stream(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model=FIRST, messages=ASK, **GREEDY)
    stream = await async_client.chat.completions.create(
        model=FIRST, messages=ASK, stream=True, **GREEDY
    )
    async with stream:
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == answer.choices[0].message.content


def test_completions_with_logprobs_n_and_stop(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=FIRST, prompt=QUESTION, n=3, logprobs=2, max_tokens=8, seed=7, stop=["\n\n"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) >= 1


def test_completions_of_many_prompts_streamed(client: openai.OpenAI) -> None:
    prompts = list(demo.SAMPLE_PROMPTS)
    texts = [""] * len(prompts)
    with client.completions.create(model=FIRST, prompt=prompts, stream=True, **GREEDY) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    whole = client.completions.create(model=FIRST, prompt=prompts, **GREEDY)
    assert texts == [choice.text for choice in whole.choices]


def test_vllm_s_own_fields_pass_both_ways(client: openai.OpenAI) -> None:
    tokens = client.completions.create(
        model=FIRST,
        prompt=QUESTION,
        max_tokens=1,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
        logprobs=1,
    )
    choice: Any = tokens.choices[0]
    assert choice.logprobs.tokens[0] == f"token_id:{choice.token_ids[0]}"
    only = choice.prompt_token_ids[0]
    forced = client.completions.create(
        model=FIRST,
        prompt=choice.prompt_token_ids,
        max_tokens=4,
        extra_body={"allowed_token_ids": [only], "return_token_ids": True, "ignore_eos": True},
    )
    assert forced.choices[0].token_ids == [only] * 4  # type: ignore[attr-defined]


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=FIRST, input=QUESTION, max_output_tokens=8)
    assert answer.output_text


def test_tokenize_and_back(gateway: Gateway) -> None:
    body = {"model": FIRST, "prompt": QUESTION, "add_special_tokens": False}
    tokens = gateway.client.post("/tokenize", json=body).json()["tokens"]
    back = gateway.client.post("/detokenize", json={"model": FIRST, "tokens": tokens})
    assert back.json()["prompt"] == QUESTION


def test_vllm_s_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=FIRST, prompt="x", max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=FIRST, prompt="x", logprobs=1000)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=FIRST, input="x")


def test_models_are_the_gateway_s(client: openai.OpenAI) -> None:
    assert {demo.BASE_NAME, *NAMES} <= {model.id for model in client.models.list()}


def test_mixed_adapters_at_once(client: openai.OpenAI) -> None:
    wanted = {name: say(client, name) for name in NAMES}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: (name, say(client, name)), NAMES * 4))
    assert all(text == wanted[name] for name, text in answers)


def test_an_adapter_vllm_forgot_is_loaded_again(client: openai.OpenAI, gateway: Gateway) -> None:
    wanted = say(client, FIRST)
    (pool,) = gateway.settings.pools
    body = {"lora_name": f"{FIRST}@1"}
    httpx.post(f"{pool.replicas[0]}/v1/unload_lora_adapter", json=body).raise_for_status()
    assert say(client, FIRST) == wanted


def _killed_while_it_streams(
    process: Process, client: openai.OpenAI
) -> tuple[openai.APIError | None, list[str | None]]:
    """How a stream ended whose server was killed after the first event; its finish reasons."""
    reasons: list[str | None] = []
    streaming = threading.Event()

    def read() -> openai.APIError | None:
        try:
            with client.completions.create(
                model=FIRST,
                prompt="x",
                max_tokens=900,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as stream:
                for event in stream:
                    reasons.append(event.choices[0].finish_reason)
                    streaming.set()
        except openai.APIError as exc:
            return exc
        return None

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        assert streaming.wait(60)
        process.kill()
        return reading.result(), reasons


def test_vllm_killed_and_restarted_heals(
    gateway: Gateway, vllm_server: ModelServer, client: openai.OpenAI
) -> None:
    """The gateway is not restarted, and nobody but it loads anything."""
    assert vllm_server.process is not None
    wanted = {name: say(client, name) for name in NAMES}
    try:
        for _ in range(3):
            error, reasons = _killed_while_it_streams(vllm_server.process, client)
            if error is not None:
                break
            # On a busy machine all of it may come at once, before the kill.
            assert reasons[-1] == "length", "a stream that was cut must not look complete"
            vllm_server.process.start()
            vllm_server.wait_healthy()
            wait_until(gateway.ready, within_s=30)
        assert error is not None, "no stream was cut"
        with pytest.raises(openai.APIStatusError) as caught:
            say(client, FIRST)
        assert caught.value.status_code == 503
    finally:
        vllm_server.process.start()
        vllm_server.wait_healthy()
    wait_until(gateway.ready, within_s=30)
    assert {name: say(client, name) for name in NAMES} == wanted
