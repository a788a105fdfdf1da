"""vLLM's dialect as the gateway relies on it: the fake, the simulator, the worker and vLLM must all
speak it.

The expected words were recorded from a real vLLM 0.32; run with `-m vllm` where one is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.servers import ModelServer

NAME = "contract@1"
CHAT = {"messages": [{"role": "user", "content": "Once upon a time there was"}]}
PROMPT = {"prompt": "Once upon a time there was"}


#: Servers that know what a token is; the simulator only counts them.
WITH_TOKENS = [
    "fake",
    pytest.param("worker", marks=pytest.mark.worker),
    pytest.param("vllm", marks=pytest.mark.vllm),
]
with_tokens = pytest.mark.parametrize("server", WITH_TOKENS, indirect=True)


@pytest.fixture(params=["sim", *WITH_TOKENS])
def server(request: pytest.FixtureRequest) -> ModelServer:
    found = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(found, ModelServer)
    return found


@pytest.fixture
def http(server: ModelServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def loaded(http: httpx.Client, server: ModelServer) -> Iterator[str]:
    assert load(http, NAME, str(server.adapter)).status_code == 200
    yield NAME
    http.post("/v1/unload_lora_adapter", json={"lora_name": NAME})


def load(http: httpx.Client, name: str, path: str) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def error(response: httpx.Response, status: int, kind: str, param: str | None = None) -> str:
    """Check vLLM's error object and return its message."""
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert (found["type"], found["param"], found["code"]) == (kind, param, status)
    return str(found["message"])


def events(response: httpx.Response) -> list[Any]:
    """The decoded events of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = [line for line in response.text.split("\n") if line]
    assert end == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def test_health(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.content) == (200, b"")


def test_models_lists_the_base_and_what_is_loaded(
    http: httpx.Client, server: ModelServer, loaded: str
) -> None:
    base, *adapters = http.get("/v1/models").json()["data"]
    assert (base["id"], base["object"], base["parent"]) == (server.served, "model", None)
    card = next(card for card in adapters if card["id"] == loaded)
    assert (card["root"], card["parent"]) == (str(server.adapter), server.served)


def test_load_and_unload_answer_in_plain_text(http: httpx.Client, server: ModelServer) -> None:
    response = load(http, NAME, str(server.adapter))
    assert response.status_code == 200
    assert response.text == f"Success: LoRA adapter '{NAME}' added successfully."
    response = http.post("/v1/unload_lora_adapter", json={"lora_name": NAME})
    assert response.status_code == 200
    assert response.text == f"Success: LoRA adapter '{NAME}' removed successfully."


def test_load_twice(http: httpx.Client, server: ModelServer, loaded: str) -> None:
    message = error(load(http, loaded, str(server.adapter)), 400, "InvalidUserInput")
    assert message == (
        f"The lora adapter '{loaded}' has already been loaded. If you want to load the adapter "
        "in place, set 'load_inplace' to True."
    )


def test_load_of_nothing(http: httpx.Client, server: ModelServer) -> None:
    missing = str(server.adapter.parent / "missing")
    message = error(load(http, NAME, missing), 404, "NotFoundError")
    assert message.startswith(f"Loading lora {NAME} failed: No adapter found for ")


def test_load_of_too_large_a_rank(http: httpx.Client, server: ModelServer) -> None:
    message = error(load(http, NAME, str(server.oversized)), 500, "InternalServerError")
    assert "greater than max_lora_rank" in message


def test_load_without_a_name(http: httpx.Client, server: ModelServer) -> None:
    message = error(load(http, "", str(server.adapter)), 400, "InvalidUserInput")
    assert message == "Both 'lora_name' and 'lora_path' must be provided."


def test_load_under_the_base_s_name(http: httpx.Client, server: ModelServer) -> None:
    message = error(load(http, server.served, str(server.adapter)), 400, "InvalidUserInput")
    assert message == f"The lora adapter '{server.served}' conflicts with a served base model."


def test_unload_of_nothing(http: httpx.Client) -> None:
    response = http.post("/v1/unload_lora_adapter", json={"lora_name": "nothing"})
    message = error(response, 404, "NotFoundError")
    assert message == "The lora adapter 'nothing' cannot be found."


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_unknown_model(http: httpx.Client, server: ModelServer, path: str) -> None:
    payload = {"model": "nothing"} | (CHAT if "chat" in path else PROMPT)
    message = error(http.post(path, json=payload), 404, "NotFoundError", "model")
    aliases = f"Valid aliases: {server.served}."
    assert message == f"The model `nothing` does not exist. {aliases}"


def test_completion(http: httpx.Client, loaded: str) -> None:
    payload = {
        "model": loaded,
        "max_tokens": 3,
        "ignore_eos": True,
        "logprobs": 1,
        "n": 2,
        "temperature": 1.0,
    }
    answer = http.post("/v1/completions", json=payload | PROMPT).json()
    assert (answer["object"], answer["model"]) == ("text_completion", loaded)
    assert answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == 3
        assert len(choice["logprobs"]["token_logprobs"]) == 3
        assert len(choice["logprobs"]["top_logprobs"]) == 3
        assert len(choice["logprobs"]["text_offset"]) == 3
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6


def test_completion_of_many_prompts(http: httpx.Client, loaded: str) -> None:
    tokens = http.post("/tokenize", json={"model": loaded} | PROMPT).json()["tokens"]
    for prompt in (["one", "two", "three"], [tokens, tokens, tokens]):
        payload = {"model": loaded, "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        answer = http.post("/v1/completions", json=payload).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] == 6


@with_tokens
def test_the_prompt_echoed_and_scored(http: httpx.Client, server: ModelServer) -> None:
    """The one token that is generated is counted and not shown."""
    asked = {"model": server.served, "max_tokens": 0, "echo": True, "logprobs": 0} | PROMPT
    answer = http.post("/v1/completions", json=asked).json()
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT["prompt"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert answer["usage"]["prompt_tokens"] == len(choice["logprobs"]["tokens"])
    assert answer["usage"]["completion_tokens"] == 1
    answer = http.post("/v1/completions", json=asked | {"max_tokens": 1}).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == answer["usage"]["prompt_tokens"] + 1
    answer = http.post("/v1/completions", json=asked | {"return_token_ids": True}).json()
    assert answer["choices"][0]["text"] == ""


def test_prompt_logprobs_have_one_for_each_token(http: httpx.Client, server: ModelServer) -> None:
    asked = {"model": server.served, "max_tokens": 1, "prompt_logprobs": 0} | PROMPT
    answer = http.post("/v1/completions", json=asked | {"return_token_ids": True}).json()
    (choice,) = answer["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert len(choice["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    for row, token in zip(
        choice["prompt_logprobs"][1:], choice["prompt_token_ids"][1:], strict=True
    ):
        assert {"logprob", "rank", "decoded_token"} == set(row[str(token)])


def test_token_ids_of_every_prompt(http: httpx.Client, loaded: str) -> None:
    prompts = [[70, 71, 72], [73, 74]]
    asked = {"model": loaded, "prompt": prompts, "max_tokens": 1, "return_token_ids": True, "n": 2}
    answer = http.post("/v1/completions", json=asked).json()
    told = [choice["prompt_token_ids"] for choice in answer["choices"]]
    assert told == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert answer["usage"]["prompt_tokens"] == 5


@with_tokens
@pytest.mark.parametrize("place", [0, 2])
def test_a_prompt_that_is_too_long(http: httpx.Client, loaded: str, place: int) -> None:
    prompts: list[list[int]] = [[70, 71, 72]] * 3
    prompts[place] = [70] * 5000
    for stream in (False, True):
        asked = {"model": loaded, "prompt": prompts, "max_tokens": 1, "stream": stream}
        response = http.post("/v1/completions", json=asked)
        message = error(response, 400, "BadRequestError", "input_tokens")
        assert message.startswith("This model's maximum context length is ")
        assert "5000 input tokens" in message


@with_tokens
def test_a_token_that_does_not_exist(http: httpx.Client, loaded: str) -> None:
    asked = {"model": loaded, "prompt": [[70, 71], [70, 10**6]], "max_tokens": 1}
    message = error(http.post("/v1/completions", json=asked), 400, "BadRequestError")
    assert message == "Token id 1000000 is out of vocabulary"


def test_completion_stream(http: httpx.Client, loaded: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    payload = {"model": loaded, "max_tokens": 3, "ignore_eos": True} | PROMPT | options
    *chunks, last = events(http.post("/v1/completions", json=payload))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert {chunk["model"] for chunk in chunks} == {loaded}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_chat(http: httpx.Client, loaded: str) -> None:
    payload = {
        "model": loaded,
        "max_tokens": 3,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 1,
    } | CHAT
    answer = http.post("/v1/chat/completions", json=payload).json()
    assert (answer["object"], answer["model"]) == ("chat.completion", loaded)
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    rows = choice["logprobs"]["content"]
    assert len(rows) == 3
    assert set(rows[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert rows[0]["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}
    assert answer["usage"]["completion_tokens"] == 3


def test_chat_stream(http: httpx.Client, loaded: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    payload = {"model": loaded, "max_tokens": 3, "ignore_eos": True} | CHAT | options
    first, *chunks, last = events(http.post("/v1/chat/completions", json=payload))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_stream_without_usage_has_none(http: httpx.Client, loaded: str) -> None:
    payload = {"model": loaded, "max_tokens": 2, "ignore_eos": True, "stream": True} | CHAT
    chunks = events(http.post("/v1/chat/completions", json=payload))
    assert not any(chunk.get("usage") for chunk in chunks)


def test_the_model_left_out_is_the_base(http: httpx.Client, server: ModelServer) -> None:
    answer = http.post("/v1/completions", json=PROMPT | {"max_tokens": 1}).json()
    assert answer["model"] == server.served


def test_values_out_of_range(http: httpx.Client, loaded: str) -> None:
    for field, value in (("max_tokens", -2), ("logprobs", 50)):
        payload = {"model": loaded, field: value} | PROMPT
        error(http.post("/v1/completions", json=payload), 400, "BadRequestError", field)


def test_not_json(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=b"{bad", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "Bad Request"


def test_tokenize_and_back(http: httpx.Client, loaded: str) -> None:
    answer = http.post("/tokenize", json={"model": loaded, "prompt": "once upon"}).json()
    assert answer["count"] == len(answer["tokens"])
    payload = {"model": loaded, "tokens": answer["tokens"]}
    assert http.post("/detokenize", json=payload).json()["prompt"].endswith("once upon")


def test_no_such_path(http: httpx.Client, loaded: str) -> None:
    response = http.post("/v1/embeddings", json={"model": loaded, "input": "hello"})
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


def test_no_such_method(http: httpx.Client) -> None:
    response = http.get("/v1/completions")
    assert (response.status_code, response.json()) == (405, {"detail": "Method Not Allowed"})
