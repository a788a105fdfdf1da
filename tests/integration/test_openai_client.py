"""The real `openai` client, sync and async, streaming and not, through the gateway."""

from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.fakes.faults import Status
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "where is the treasure"}]
HEARD = "pirate@1 heard: where is the treasure"


def test_chat(client: openai.OpenAI, pirate: str) -> None:
    answer = client.chat.completions.create(model=pirate, messages=ASK)
    assert answer.choices[0].message.content == HEARD
    assert answer.model == "pirate@1"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)


async def test_chat_async(async_client: openai.AsyncOpenAI, pirate: str) -> None:
    answer = await async_client.chat.completions.create(model=pirate, messages=ASK)
    assert answer.choices[0].message.content == HEARD


def test_chat_stream(client: openai.OpenAI, pirate: str) -> None:
    with client.chat.completions.create(
        model=pirate, messages=ASK, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HEARD
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {"pirate@1"}
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


async def test_chat_stream_async(async_client: openai.AsyncOpenAI, pirate: str) -> None:
    stream = await async_client.chat.completions.create(model=pirate, messages=ASK, stream=True)
    async with stream:
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HEARD
    assert not any(chunk.usage for chunk in chunks)


def test_completion(client: openai.OpenAI, pirate: str) -> None:
    answer = client.completions.create(model=pirate, prompt="ahoy", max_tokens=2)
    assert answer.choices[0].text == "pirate@1 heard: "
    assert answer.choices[0].finish_reason == "length"


async def test_completion_async(async_client: openai.AsyncOpenAI, pirate: str) -> None:
    answer = await async_client.completions.create(model=pirate, prompt="ahoy")
    assert answer.choices[0].text == "pirate@1 heard: ahoy"


def test_completion_stream(client: openai.OpenAI, pirate: str) -> None:
    with client.completions.create(model=pirate, prompt="ahoy", stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "pirate@1 heard: ahoy"


async def test_completion_stream_async(async_client: openai.AsyncOpenAI, pirate: str) -> None:
    stream = await async_client.completions.create(model=pirate, prompt="ahoy", stream=True)
    async with stream:
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == "pirate@1 heard: ahoy"


def test_prompt_as_a_list_of_strings(client: openai.OpenAI, pirate: str) -> None:
    answer = client.completions.create(model=pirate, prompt=["one", "two", "three"])
    assert [choice.text.split()[-1] for choice in answer.choices] == ["one", "two", "three"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_prompt_as_token_ids(client: openai.OpenAI, pirate: str) -> None:
    tokens = [byte + 3 for byte in b"ahoy"]
    answer = client.completions.create(model=pirate, prompt=[tokens, tokens])
    assert [choice.text for choice in answer.choices] == ["pirate@1 heard: ahoy"] * 2


def test_several_choices(client: openai.OpenAI, pirate: str) -> None:
    answer = client.chat.completions.create(model=pirate, messages=ASK, n=3)
    assert [choice.message.content for choice in answer.choices] == [
        f"{HEARD} #0",
        f"{HEARD} #1",
        f"{HEARD} #2",
    ]


def test_several_choices_streamed(client: openai.OpenAI, pirate: str) -> None:
    texts = ["", "", ""]
    with client.chat.completions.create(model=pirate, messages=ASK, n=3, stream=True) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
    assert texts == [f"{HEARD} #0", f"{HEARD} #1", f"{HEARD} #2"]


@pytest.mark.parametrize("stop", ["treasure", ["map", "treasure"]])
def test_stop(client: openai.OpenAI, pirate: str, stop: str | list[str]) -> None:
    answer = client.chat.completions.create(model=pirate, messages=ASK, stop=stop)
    assert answer.choices[0].message.content == "pirate@1 heard: where is the "
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI, pirate: str) -> None:
    answer = client.chat.completions.create(
        model=pirate, messages=ASK, logprobs=True, top_logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(row.token for row in logprobs.content) == HEARD
    assert all(row.logprob <= 0 and len(row.top_logprobs) == 1 for row in logprobs.content)


def test_completion_logprobs(client: openai.OpenAI, pirate: str) -> None:
    answer = client.completions.create(model=pirate, prompt="ahoy", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["pirate@1 ", "heard: ", "ahoy"]
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 3


def test_vllm_fields_go_there_and_come_back(
    client: openai.OpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    extra = {
        "return_token_ids": True,
        "cache_salt": "salt",
        "vllm_xargs": {"deep": [1, {"π": None}]},
    }
    answer = client.completions.create(model=pirate, prompt="ahoy", extra_body=extra)
    sent = upstream.requests("/v1/completions")[-1].json
    assert sent == {"model": "pirate@1", "prompt": "ahoy", **extra}
    assert answer.choices[0].token_ids == [b + 3 for b in b"pirate@1 heard: ahoy"]  # type: ignore[attr-defined]
    assert answer.kv_transfer_params is None  # type: ignore[attr-defined]


def test_responses(client: openai.OpenAI, pirate: str) -> None:
    answer = client.responses.create(model=pirate, input="ahoy")
    assert answer.output_text == "pirate@1 heard: ahoy"


def test_embeddings_the_model_does_not_have(
    client: openai.OpenAI, pirate: str, upstream: FakeUpstream
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model=pirate, input="ahoy")
    assert caught.value.response.content == b'{"detail":"Not Found"}'
    assert len(upstream.requests("/v1/embeddings")) == 1


def test_the_base_model(client: openai.OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    answer = client.chat.completions.create(model=BASE, messages=ASK)
    assert answer.model == BASE
    assert answer.choices[0].message.content == f"{BASE} heard: where is the treasure"
    assert upstream.loads() == []


def test_models_list(client: openai.OpenAI, pirate: str) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {BASE, "pirate", "pirate@1"} <= set(listed)
    assert listed["pirate"].parent == BASE  # type: ignore[attr-defined]
    assert listed[BASE].parent is None  # type: ignore[attr-defined]
    assert {model.object for model in listed.values()} == {"model"}


async def test_models_list_async(async_client: openai.AsyncOpenAI, pirate: str) -> None:
    names = {model.id async for model in async_client.models.list()}
    assert {BASE, "pirate", "pirate@1"} <= names


@pytest.mark.parametrize("name", [BASE, "pirate", "pirate@1", "pirate:latest"])
def test_models_retrieve(client: openai.OpenAI, pirate: str, name: str) -> None:
    model = client.models.retrieve(name)
    assert (model.id, model.object) == (name, "model")


def test_models_say_nothing_of_paths(gateway: Gateway, pirate: str) -> None:
    for path in ("/v1/models", "/v1/models/pirate", "/v1/models/pirate@1"):
        text = gateway.client.get(path).text
        assert str(gateway.settings.data_path) not in text
        assert str(gateway.settings.import_dirs[0]) not in text
        assert "http://" not in text


def test_models_retrieve_unknown(client: openai.OpenAI, pirate: str) -> None:
    with pytest.raises(openai.NotFoundError, match="pirate") as caught:
        client.models.retrieve("pirat")
    assert caught.value.code == "model_not_found"


def test_the_client_s_own_retry_gets_through(gateway: Gateway, upstream: FakeUpstream) -> None:
    """What the gateway gives up with is marked so that the client may try again."""
    upstream.script("/v1/chat/completions", Status(503, b"{}"))
    with gateway.openai_client(max_retries=2) as client:
        answer = client.chat.completions.create(model=BASE, messages=ASK)
    assert answer.choices[0].message.content == f"{BASE} heard: where is the treasure"
