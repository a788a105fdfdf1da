"""Megatron's dialects, as requests are read, sent, and answered; and how a server is told apart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.backends.megatron import SERVICE, MegatronBackend
from app.backends.megatron_replies import answer
from app.backends.megatron_requests import CHAT, COMPLETIONS, read
from app.backends.megatron_servers import DynamicServer, ServerFailed, StaticServer
from app.backends.wire import Limits
from app.errors import (
    AdapterLoadFailed,
    InvalidJson,
    InvalidRequest,
    UpstreamBroke,
    UpstreamRefused,
)

HI = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny"} | fields).encode()


class Scripted:
    """Answers calls in turn and remembers what was asked."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self._answers = list(answers)

    async def __call__(self, method: str, path: str, payload: object) -> tuple[int, bytes]:
        self.asked.append((method, path, json.loads(json.dumps(payload))))
        status, given = self._answers.pop(0)
        return status, given if isinstance(given, bytes) else json.dumps(given).encode()


def api(*texts: str, **more: Any) -> tuple[int, object]:
    return 200, {"text": texts, "segments": [list(text) for text in texts], **more}


async def told(server: StaticServer | DynamicServer, call: Scripted, **fields: Any) -> Any:
    path = CHAT if "messages" in fields else COMPLETIONS
    ask = server.limited(read(path, body(**fields)))
    reply = answer(ask, await server.generate(ask, call), created=7)
    return json.loads(reply.take())


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": "x"}, None),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "stop": "y"}, "stop"),
        (COMPLETIONS, {"prompt": "x", "top_k": 3, "top_p": 0.5}, "top_k"),
        (COMPLETIONS, {"prompt": "x", "seed": 1}, "seed"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, None),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, None),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": HI, "top_logprobs": 2, "logprobs": True}, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_no_server_of_megatron_s_does_is_refused(
    path: str, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(path, body(**fields))
    assert refused.value.param == param


def test_a_body_that_is_not_json() -> None:
    with pytest.raises(InvalidJson):
        read(COMPLETIONS, b"{")
    with pytest.raises(InvalidRequest):
        read(COMPLETIONS, b"[]")


def test_fields_that_ask_for_nothing_pass() -> None:
    ask = read(
        COMPLETIONS,
        body(
            prompt="x", user="me", best_of=1, presence_penalty=0, frequency_penalty=0.0, seed=None,
            logit_bias={}, suffix="", top_k=-1, top_p=1, stop=[],
        ),
    )  # fmt: skip
    assert (ask.top_k, ask.top_p, ask.stop, ask.max_tokens, ask.n) == (0, 1.0, (), 16, 1)


@pytest.mark.parametrize(
    ("sampling", "sent"),
    [
        ({}, {"temperature": 1.0}),
        ({"temperature": 0}, {"top_k": 1}),
        ({"temperature": 0, "top_p": 0.5, "top_k": 9}, {"top_k": 1}),
        ({"temperature": 0.5, "top_p": 1}, {"temperature": 0.5}),
        ({"top_p": 0.25}, {"temperature": 1.0, "top_p": 0.25}),
        ({"top_k": 7}, {"temperature": 1.0, "top_k": 7}),
    ],
)
async def test_sampling_options_as_put_api_wants_them(
    sampling: dict[str, Any], sent: dict[str, Any]
) -> None:
    call = Scripted(api("ab c"))
    await told(StaticServer(), call, prompt="ab", max_tokens=2, **sampling)
    payload = {"prompts": ["ab"], "tokens_to_generate": 2, "logprobs": False}
    assert call.asked == [("PUT", "/api", payload | sent)]


async def test_a_float_stays_one_on_the_wire() -> None:
    """PUT /api refuses a top_p that is not a float."""
    seen: list[object] = []

    async def call(method: str, path: str, payload: object) -> tuple[int, bytes]:
        seen.append(payload)
        return 200, json.dumps(api("ab")[1]).encode()

    ask = read(COMPLETIONS, body(prompt="a", top_p=0.5))
    await StaticServer().generate(ask, call)
    (payload,) = seen
    assert isinstance(payload, dict)
    assert type(payload["top_p"]) is float


@pytest.mark.parametrize("status", [200, 400])
async def test_a_bare_string_is_a_refusal_whatever_its_status(status: int) -> None:
    call = Scripted((status, "prompts is empty"))
    with pytest.raises(InvalidRequest, match="refused this: prompts is empty"):
        await told(StaticServer(), call, prompt="x")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ((500, {"message": "Internal Server Error"}), ServerFailed),
        ((200, {"text": ["xy"]}), UpstreamBroke),
        ((200, {"text": [], "segments": []}), UpstreamBroke),
        ((200, {"text": ["xy"], "segments": [["x", "y"]], "logprobs": [[1, 2, 3]]}), UpstreamBroke),
        ((200, b"<html>"), UpstreamBroke),
        ((200, {"text": ["other"], "segments": [["other"]]}), InvalidRequest),
    ],
)
async def test_answers_that_are_none(given: tuple[int, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        await told(StaticServer(), Scripted(given), prompt="x", logprobs=0)


async def test_a_token_over_the_prompt_s_end_belongs_to_the_prompt() -> None:
    call = Scripted((200, {"text": ["say hi you"], "segments": [["say", " hi y", "ou"]]}))
    found = await told(StaticServer(), call, prompt="say hi", max_tokens=1)
    assert found["choices"][0]["text"] == " you"
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


async def test_a_conversation_without_a_template_is_a_transcript() -> None:
    prompt = "system: Be brief.\nuser: hi\nassistant:"
    call = Scripted(api(prompt + " Hello.\nuser: and"))
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    found = await told(StaticServer(), call, messages=messages)
    assert call.asked[0][2]["prompts"] == [prompt]
    (choice,) = found["choices"]
    assert choice["message"]["content"] == " Hello."
    assert choice["finish_reason"] == "stop"


async def test_alternatives_are_not_made_up() -> None:
    with pytest.raises(InvalidRequest, match="no alternatives"):
        await told(StaticServer(), Scripted(), prompt="x", logprobs=2)


async def test_the_dynamic_server_s_choices() -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"a": -1.0}, {"b": -2.0}],
    }
    choice = {"text": "ab", "logprobs": logprobs, "prompt_token_ids": [1, 2, 3], "index": 0}
    call = Scripted((200, {"model": "EMPTY", "choices": [choice, choice]}))
    found = await told(DynamicServer(), call, prompt="x", n=2, logprobs=1, max_tokens=4)
    assert call.asked[0][2]["prompt"] == ["x", "x"]
    assert found["model"] == "tiny"
    assert found["choices"][1] == {
        "index": 1,
        "text": "ab",
        "logprobs": {
            "tokens": ["a", "b"],
            "token_logprobs": [-1.0, -2.0],
            "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
            "text_offset": [0, 1],
        },
        "finish_reason": "stop",
    }
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


async def test_every_answer_of_a_conversation_is_asked_alone() -> None:
    """Old servers number all of them 0 and always end with `length`."""
    said = {
        "message": {"role": "assistant", "content": "yes"},
        "finish_reason": "length",
        "logprobs": {"content": [{"token": "yes", "logprob": -0.5, "bytes": []}]},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    call = Scripted(*[(200, {"choices": [said], "usage": usage})] * 2)
    found = await told(DynamicServer(), call, messages=HI, n=2, max_tokens=4, logprobs=True)
    assert [c["index"] for c in found["choices"]] == [0, 1]
    assert {c["finish_reason"] for c in found["choices"]} == {"stop"}
    (token,) = found["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["logprob"]) == ("yes", -0.5)
    assert found["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("ids", [[7, 8], None])
async def test_token_ids_if_the_dynamic_server_tells_them(ids: list[int] | None) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
    choice = {"text": "ab", "logprobs": logprobs, "generation_token_ids": ids}
    call = Scripted((200, {"choices": [choice]}))
    found = await told(DynamicServer(), call, prompt="x", return_token_ids=True, stop="a")
    assert found["choices"][0]["token_ids"] == (ids and ids[:1])


async def test_plain_text_errors_of_the_dynamic_server() -> None:
    with pytest.raises(InvalidRequest, match="refused this: Missing 'prompt' field"):
        await told(DynamicServer(), Scripted((400, b"Missing 'prompt' field")), prompt="x")
    with pytest.raises(ServerFailed, match="answered 500: Error during inference"):
        await told(DynamicServer(), Scripted((500, b"Error during inference: x")), messages=HI)


Answers = Callable[[str, str], tuple[int, bytes]]


@asynccontextmanager
async def backend_of(answers: Answers) -> AsyncIterator[MegatronBackend]:
    """The backend of a server that answers each (method, path) so."""

    serving: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                status, data = answers(method, path)
                lines = f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n"
                writer.write(lines.encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = MegatronBackend(f"http://127.0.0.1:{port}", api_key=None, limits=Limits(), load_s=1.0)
    try:
        yield backend
    finally:
        await backend.close()
        server.close()
        await asyncio.gather(*(task for task in serving if task is not None))


def dynamic(method: str, path: str) -> tuple[int, bytes]:
    return 200, json.dumps({"service": SERVICE, "ready": True}).encode()


def starting(method: str, path: str) -> tuple[int, bytes]:
    return 200, json.dumps({"service": SERVICE, "ready": False}).encode()


def static(method: str, path: str) -> tuple[int, bytes]:
    return (400, b'"prompts argument required"\n') if method == "PUT" else (404, b"<!doctype html>")


def worker(method: str, path: str) -> tuple[int, bytes]:
    if path == "/v1/models":
        return 200, b'{"data": [{"id": "a@1", "root": "/a", "parent": "tiny"}]}'
    return 200, b""


def stranger(method: str, path: str) -> tuple[int, bytes]:
    return 404, b""


async def refuses_adapters(backend: MegatronBackend) -> bool:
    with pytest.raises(AdapterLoadFailed, match="loragate worker"):
        await backend.load_adapter("a@1", "/a")
    return await backend.list_adapters() == {} and (await backend.features()).prompt_logprobs


async def lists_adapters(backend: MegatronBackend) -> bool:
    return await backend.list_adapters() == {"a@1": "/a"}


@pytest.mark.parametrize(
    ("answers", "is_it"),
    [(dynamic, refuses_adapters), (static, refuses_adapters), (worker, lists_adapters)],
)
async def test_which_server_it_is(
    answers: Answers, is_it: Callable[[MegatronBackend], Awaitable[bool]]
) -> None:
    async with backend_of(answers) as backend:
        assert await is_it(backend)
        assert await backend.healthy()


@pytest.mark.parametrize("answers", [starting, stranger])
async def test_a_server_that_is_not_ready_or_none_of_them(answers: Answers) -> None:
    async with backend_of(answers) as backend:
        assert not await backend.healthy()
        with pytest.raises(UpstreamRefused):
            await backend.send(COMPLETIONS, body(prompt="x"), b"")


async def test_another_server_may_take_its_place() -> None:
    answers = [static]
    async with backend_of(lambda method, path: answers[0](method, path)) as backend:
        assert await backend.healthy()
        assert await refuses_adapters(backend)
        answers[0] = worker
        assert await backend.healthy()
        assert await lists_adapters(backend)
