"""The worker over real sockets, asked by the openai client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.worker.http.generate import INLINE_LOGPROBS
from app.worker.samplers.batch import Batch
from tests.waiting import until
from tests.worker.tiny import CONTEXT, Serve

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 5}

pytestmark = pytest.mark.worker


@pytest.fixture
def url(serve: Serve) -> str:
    return serve()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def load(http: httpx.Client, tiny: Path, name: str, folder: str = "wide") -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(tiny / folder)}
    return http.post("/v1/load_lora_adapter", json=body)


def complete(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/v1/completions", json={"prompt": "hello world", **GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(text: str) -> list[Any]:
    *lines, end = [line for line in text.split("\n") if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def sample(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=["hello", "the quick"], **GREEDY)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.id.startswith("cmpl-")
    assert found.model == "tiny"
    assert found.usage is not None
    assert found.usage.completion_tokens == 10
    assert found.usage.total_tokens == found.usage.prompt_tokens + 10


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="hello world", **GREEDY)
    parts = list(
        client.completions.create(
            model="tiny",
            prompt="hello world",
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert whole.usage is not None
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY
    )
    choice = found.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 5
    assert choice.logprobs.content[0].token == choice.logprobs.content[0].top_logprobs[0].token


def test_a_chat_stream_begins_with_the_role(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    parts = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY)
    )
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_template_continues_a_message(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "the quick"}]
    body = {
        "messages": messages,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "return_token_ids": True,
        "return_prompt_text": True,
        **GREEDY,
    }
    found = http.post("/v1/chat/completions", json=body).json()
    assert found["prompt_text"] == "<|user|>hello</s><|assistant|>the quick"
    asked = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert http.post("/tokenize", json=asked).json()["tokens"] == found["prompt_token_ids"]


def test_text_parts_are_joined(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "return_prompt_text": True, **GREEDY}
    found = http.post("/v1/chat/completions", json=body).json()
    assert found["prompt_text"] == "<|user|>a\nb</s><|assistant|>"


def test_echo_with_logprobs(http: httpx.Client) -> None:
    found = complete(http, echo=True, logprobs=1, max_tokens=0)
    (choice,) = found["choices"]
    assert choice["text"] == "hello world"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert "".join(choice["logprobs"]["tokens"]) == "hello world"
    assert choice["prompt_logprobs"][0] is None
    assert found["usage"]["completion_tokens"] == 1
    both = complete(http, echo=True, logprobs=1)["choices"][0]
    assert both["text"].startswith("hello world")
    assert len(both["logprobs"]["tokens"]) == len(choice["logprobs"]["tokens"]) + 5


def test_the_chosen_token_is_listed_when_it_is_not_among_the_likeliest(http: httpx.Client) -> None:
    found = complete(http, logprobs=2, allowed_token_ids=[9], max_tokens=1)
    listed = found["choices"][0]["logprobs"]["top_logprobs"][0]
    assert len(listed) == 3
    assert next(iter(listed)) == found["choices"][0]["logprobs"]["tokens"][0]


def test_token_ids(http: httpx.Client) -> None:
    found = complete(http, prompt=[10, 20], return_token_ids=True, logprobs=0)["choices"][0]
    assert found["prompt_token_ids"] == [10, 20]
    assert len(found["token_ids"]) == 5
    named = complete(http, prompt=[10, 20], return_tokens_as_token_ids=True, logprobs=0)
    tokens = named["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in found["token_ids"]]
    text = http.post("/detokenize", json={"tokens": [10, 20]}).json()
    assert (
        text["prompt"]
        == complete(http, prompt=[10, 20], echo=True, max_tokens=0)["choices"][0]["text"]
    )


def test_stop_strings(http: httpx.Client) -> None:
    free = complete(http, max_tokens=20)["choices"][0]["text"]
    stop = free[6:9]
    cut = complete(http, max_tokens=20, stop=stop)["choices"][0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["text"] == free[: free.index(stop)]
    kept = complete(http, max_tokens=20, stop=[stop], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == free[: free.index(stop) + 3]
    body = {"prompt": "hello world", **GREEDY, "max_tokens": 20, "stop": stop, "stream": True}
    parts = events(http.post("/v1/completions", json=body).text)
    assert "".join(part["choices"][0]["text"] for part in parts) == cut["text"]


def test_seeds(http: httpx.Client) -> None:
    wanted = {"temperature": 1.0, "n": 3, "max_tokens": 8}

    def texts(seed: int) -> list[str]:
        return [choice["text"] for choice in complete(http, seed=seed, **wanted)["choices"]]

    assert texts(1) == texts(1) != texts(2)


def test_truncation_keeps_the_end(http: httpx.Client) -> None:
    ids = complete(http, return_token_ids=True)["choices"][0]["prompt_token_ids"]
    for prompt in ("hello world", ids):
        found = complete(http, prompt=prompt, truncate_prompt_tokens=1, return_token_ids=True)
        assert found["choices"][0]["prompt_token_ids"] == ids[-1:]
    begin = complete(http, truncate_prompt_tokens=1, truncation_side="right", return_token_ids=True)
    assert begin["choices"][0]["prompt_token_ids"] == ids[:1]
    longest = complete(http, prompt=[5] * 999, truncate_prompt_tokens=-1, return_token_ids=True)
    assert len(longest["choices"][0]["prompt_token_ids"]) == CONTEXT - 1


def test_many_scored_prompts(http: httpx.Client) -> None:
    prompts = [[5 + index % 40, *range(10, 40)] for index in range(40)]
    assert INLINE_LOGPROBS < 40 * 31
    found = complete(http, prompt=prompts, prompt_logprobs=1, max_tokens=1)
    assert [len(choice["prompt_logprobs"]) for choice in found["choices"]] == [31] * 40


def test_adapters_come_and_go(http: httpx.Client, tiny: Path) -> None:
    base = complete(http)["choices"][0]["text"]
    name = "support-bot@3"
    assert load(http, tiny, name).text == f"Success: LoRA adapter '{name}' added successfully."
    found = complete(http, model=name)
    assert found["model"] == name
    assert found["choices"][0]["text"] != base
    assert load(http, tiny, name).status_code == 400
    again = {"lora_name": name, "lora_path": str(tiny / "narrow"), "load_inplace": True}
    assert http.post("/v1/load_lora_adapter", json=again).status_code == 200
    assert complete(http, model=name)["choices"][0]["text"] != found["choices"][0]["text"]
    cards = http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), (name, "tiny")]
    assert cards[0]["max_model_len"] == CONTEXT
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    gone = http.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert gone.json()["error"] == {
        "message": f"The model `{name}` does not exist. Valid aliases: tiny.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


def test_a_name_is_loaded_once_however_often_it_is_asked(http: httpx.Client, tiny: Path) -> None:
    statuses: list[int] = []
    asking = [
        threading.Thread(target=lambda: statuses.append(load(http, tiny, "same").status_code))
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(statuses) == [200, 400, 400, 400]


def test_errors_reach_the_openai_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[5] * (CONTEXT + 1))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(
    ("content", "media_type", "param"),
    [
        (b"{", "application/json", "body"),
        (b"", "application/json", "body"),
        (b"{}", "text/plain", None),
        (b'{"prompt": 5}', "application/json", "body.prompt"),
        (b'{"prompt": "x", "max_tokens": "a"}', "application/json", "body.max_tokens"),
    ],
)
def test_malformed_bodies(
    http: httpx.Client, content: bytes, media_type: str, param: str | None
) -> None:
    response = http.post("/v1/completions", content=content, headers={"content-type": media_type})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("Bad Request", param, 400)


def test_a_union_s_branches_are_not_named(http: httpx.Client) -> None:
    error = http.post("/tokenize", json={}).json()["error"]
    assert (error["param"], error["code"]) == ("body.prompt", 400)


def test_tokens_nobody_knows_have_no_text(http: httpx.Client) -> None:
    found = http.post("/detokenize", json={"tokens": [2**62, 10]}).json()["prompt"]
    assert found == http.post("/detokenize", json={"tokens": [10]}).json()["prompt"]


def test_a_body_over_the_limit(serve: Serve) -> None:
    url = serve(max_body_bytes=2000)
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 3000})
    assert response.status_code == 413


@pytest.mark.parametrize("stream", [True, False])
def test_a_departed_client_is_noticed(
    url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """Steps are slowed down so that the request outlives its client, and no doubt about it."""
    decode = Batch.decode
    held = threading.Event()

    def slowly(batch: Batch) -> None:
        held.wait(0.02)
        decode(batch)

    monkeypatch.setattr(Batch, "decode", slowly)
    asked = {"prompt": [5, 6], "max_tokens": CONTEXT - 10, "ignore_eos": True, "n": 8}
    body = json.dumps({**asked, "stream": stream}).encode()
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port)) as client:
        head = f"content-type: application/json\r\ncontent-length: {len(body)}"
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
        client.sendall(body)
        asyncio.run(until(lambda: sample(http, "vllm:num_requests_running") == 8))
    ended = 'vllm:request_success_total{engine="0",finished_reason="abort"'
    asyncio.run(until(lambda: sample(http, ended) == 8))
    held.set()
    asyncio.run(until(lambda: sample(http, "vllm:num_requests_running") == 0))


def test_an_error_before_the_first_token_has_a_status(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Batch, groups: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Batch, "prefill", fail)
    for stream in (True, False):
        response = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "InternalServerError"
    assert http.get("/health").status_code == 200


def test_an_error_later_is_the_last_event(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Batch, "decode", fail)
    response = http.post("/v1/completions", json={"prompt": "x", "stream": True, **GREEDY})
    assert response.status_code == 200
    assert events(response.text)[-1]["error"]["code"] == 500


def test_health_tells_of_a_dead_engine(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(batch: Batch) -> None:
        raise SystemExit

    assert http.get("/health").status_code == 200
    monkeypatch.setattr(Batch, "decode", die)
    response = http.post("/v1/completions", json={"prompt": "x", **GREEDY})
    assert response.status_code == 500
    assert http.get("/health").status_code == 503
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 500


def test_metrics_under_vllm_s_names(http: httpx.Client, tiny: Path) -> None:
    load(http, tiny, "a")
    complete(http, model="a")
    text = http.get("/metrics").text
    for line in (
        'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0',
        'vllm:generation_tokens_total{engine="0",model_name="tiny"} 5.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 1.0',
    ):
        assert line in text
    assert "vllm:lora_requests_info{" in text
    assert http.get("/version").json()["version"]
    assert http.get("/ping").status_code == 200
