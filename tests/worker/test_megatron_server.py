"""The Megatron backend against Megatron-Core's own routes and engine, on the CPU.

Both servers have the same weights and are greedy, so they must say the same; and what PUT /api
answers to a bare client is what the texts and logprobs are compared with.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.backends.base import Reply
from app.backends.megatron import MegatronBackend
from app.backends.wire import Limits
from app.errors import AdapterLoadFailed, InvalidRequest, UpstreamError
from tests.processes import Process, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
MISSING = [
    name
    for name in ("megatron.core", "flask", "flask_restful", "asgiref")
    if not (find_spec(name.partition(".")[0]) and find_spec(name))
]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(180),
]
KINDS = ("static", "dynamic")
PROMPT = "The sea is"


@dataclass(frozen=True)
class Server:
    """A running server, asked through the backend as the data plane asks it."""

    kind: str
    url: str

    def ask(self, path: str, **body: Any) -> Any:
        """The answer's JSON, or the events of its stream."""

        async def asked() -> tuple[Reply, bytes]:
            backend = MegatronBackend(self.url, api_key=None, limits=Limits(), load_s=5)
            try:
                reply = await backend.send(path, json.dumps({"model": "tiny"} | body).encode(), b"")
                return reply, reply.take()
            finally:
                await backend.close()

        reply, data = asyncio.run(asked())
        assert reply.status == 200
        if dict(reply.headers)[b"content-type"] == b"application/json":
            return json.loads(data)
        *events, done, rest = data.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def complete(self, **body: Any) -> Any:
        return self.ask("/v1/completions", **({"prompt": PROMPT, "temperature": 0} | body))


def run(kind: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tests.worker.megatron_server", kind]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = Process([*command, str(port)], log=folder / f"{kind}.log", env=os.environ | env)
    server = Server(kind, f"http://127.0.0.1:{port}")

    def answers() -> bool:
        assert process.running, process.output()[-4000:]
        try:
            httpx.get(f"{server.url}/health", timeout=5)
        except httpx.TransportError:
            return False
        return True

    with process:
        wait_until(answers, within_s=120, every_s=0.1)
        yield server


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from run("static", tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from run("dynamic", tmp_path_factory.mktemp("megatron"))


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def truth(static: Server) -> dict[str, Any]:
    """What a bare client gets from PUT /api for eight greedy tokens."""
    asked = {"prompts": [PROMPT], "tokens_to_generate": 8, "logprobs": True, "top_k": 1}
    found: dict[str, Any] = httpx.put(f"{static.url}/api", json=asked, timeout=60).json()
    assert found["text"][0].startswith(PROMPT)
    assert len(found["tokens"][0]) == len(PROMPT) + 8  # it did not happen to end early
    return found


def test_a_completion_is_the_text_after_the_prompt(server: Server, truth: dict[str, Any]) -> None:
    found = server.complete(max_tokens=8)
    (choice,) = found["choices"]
    assert choice["text"] == truth["text"][0].removeprefix(PROMPT)
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert (found["model"], found["object"]) == ("tiny", "text_completion")
    assert found["usage"]["completion_tokens"] == 8


def test_logprobs_are_those_of_the_generated_tokens(server: Server, truth: dict[str, Any]) -> None:
    (choice,) = server.complete(max_tokens=8, logprobs=0)["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == list(choice["text"])
    assert found["token_logprobs"] == pytest.approx(truth["logprobs"][0][-8:], abs=1e-5)
    assert found["text_offset"] == list(range(8))


def test_token_ids_of_what_was_generated(static: Server, truth: dict[str, Any]) -> None:
    (choice,) = static.complete(max_tokens=8, return_token_ids=True)["choices"]
    assert choice["token_ids"] == truth["tokens"][0][-8:]


def test_echo_tells_the_prompt_s_logprobs_too(server: Server, truth: dict[str, Any]) -> None:
    found = server.complete(max_tokens=8, logprobs=0, echo=True)
    (choice,) = found["choices"]
    assert choice["text"] == truth["text"][0]
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(truth["logprobs"][0], abs=1e-5)
    assert found["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 8,
        "total_tokens": len(PROMPT) + 8,
    }


def test_a_prompt_alone_can_be_scored(static: Server, truth: dict[str, Any]) -> None:
    (choice,) = static.complete(max_tokens=0, logprobs=0, echo=True)["choices"]
    assert choice["text"] == PROMPT
    told = choice["logprobs"]["token_logprobs"][1:]
    assert told == pytest.approx(truth["logprobs"][0][: len(PROMPT) - 1], abs=1e-5)


def test_prompts_and_samples_keep_their_order(server: Server) -> None:
    prompts = ["one", "another", "third one"]
    alone = [server.complete(prompt=p, max_tokens=4)["choices"][0]["text"] for p in prompts]
    found = server.complete(prompt=prompts, max_tokens=4, n=2)["choices"]
    assert [choice["index"] for choice in found] == list(range(6))
    assert [choice["text"] for choice in found] == [text for text in alone for _ in range(2)]


def test_more_prompts_than_one_call_takes(static: Server) -> None:
    found = static.complete(prompt=["a"] * 130, max_tokens=1)
    assert len(found["choices"]) == 130
    assert found["usage"]["prompt_tokens"] == 130


def test_a_string_to_stop_at_is_cut_here(server: Server, truth: dict[str, Any]) -> None:
    text = truth["text"][0].removeprefix(PROMPT)
    stop = text[3:5]
    found = server.complete(max_tokens=8, stop=[stop], logprobs=0)
    (choice,) = found["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"])
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] + stop


def test_a_stream_comes_in_one_piece(server: Server, truth: dict[str, Any]) -> None:
    first, usage = server.complete(
        max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    (choice,) = first["choices"]
    assert choice["text"] == truth["text"][0].removeprefix(PROMPT)
    assert choice["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7, "top_p": 1}, {"top_p": 0.9}, {"top_k": 4}]
)
def test_sampling_options_reach_the_engine(server: Server, sampling: dict[str, Any]) -> None:
    found = server.complete(max_tokens=4, **({"temperature": 1} | sampling))
    assert 0 < found["usage"]["completion_tokens"] <= 4


def test_a_chat_is_answered(server: Server) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    found = server.ask("/v1/chat/completions", messages=messages, max_tokens=6, n=2, temperature=0)
    one, other = found["choices"]
    assert one["message"] == other["message"]
    assert one["message"]["role"] == "assistant"
    assert (one["index"], other["index"]) == (0, 1)
    assert found["usage"]["prompt_tokens"] > 0
    *chunks, usage = server.ask(
        "/v1/chat/completions",
        messages=messages,
        max_completion_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [one["message"]]
    assert usage["usage"]["prompt_tokens"] > 0


def test_token_ids_where_they_are_understood(static: Server, dynamic: Server) -> None:
    ids = [3 + byte for byte in PROMPT.encode()]
    texts = [dynamic.complete(prompt=p, max_tokens=4)["choices"][0]["text"] for p in (ids, PROMPT)]
    assert texts[0] == texts[1]
    with pytest.raises(InvalidRequest, match="as text, not as token ids"):
        static.complete(prompt=ids)


async def test_it_has_no_adapters(server: Server) -> None:
    backend = MegatronBackend(server.url, api_key=None, limits=Limits(), load_s=5)
    try:
        assert await backend.healthy()
        assert await backend.list_adapters() == {}
        with pytest.raises(AdapterLoadFailed, match="one set of weights"):
            await backend.load_adapter("a@1", "/nowhere")
    finally:
        await backend.close()


def test_a_request_over_its_context(static: Server) -> None:
    """The server's own failure; 0.16 then answers 500 to everything, so this comes last."""
    with pytest.raises(UpstreamError, match="The Megatron server answered 500"):
        static.complete(prompt="x" * 600)
