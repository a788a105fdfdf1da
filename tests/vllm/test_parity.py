"""The same weights, the worker and vLLM: the same greedy tokens, and logprobs as good as equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app import demo
from tests.servers import ModelServer

pytestmark = [pytest.mark.vllm, pytest.mark.worker]

TOKENS = 64
TOLERANCE = 1e-3
SUBJECTS = (
    "the sea",
    "a lemon",
    "two plus three",
    "an old ship",
    "the colour of grass",
    "a spider's legs",
    "the moon at night",
    "bread and butter",
    "a long winter",
    "the king's garden",
)
PROMPTS = [f"Tell me about {subject}." for subject in SUBJECTS] + [
    f"What do you know of {subject}? Answer in one line." for subject in SUBJECTS
]


def complete(server: ModelServer, adapter: Path, name: str) -> list[dict[str, Any]]:
    """Load an adapter, complete every prompt greedily, forget the adapter."""
    with httpx.Client(base_url=server.url, timeout=300) as http:
        body = {"lora_name": name, "lora_path": str(adapter)}
        http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        answer = http.post(
            "/v1/completions",
            json={
                "model": name,
                "prompt": PROMPTS,
                "max_tokens": TOKENS,
                "temperature": 0,
                "logprobs": 1,
                "return_token_ids": True,
                "ignore_eos": True,
            },
        )
        assert answer.status_code == 200, answer.text
        body = {"lora_name": name}
        http.post("/v1/unload_lora_adapter", json=body).raise_for_status()
    choices: list[dict[str, Any]] = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(PROMPTS)))
    return choices


@pytest.mark.parametrize("name", list(demo.ADAPTERS))
def test_worker_and_vllm_agree(
    worker_server: ModelServer, vllm_server: ModelServer, name: str
) -> None:
    ours = complete(worker_server, demo.ADAPTERS[name], f"{name}-alone")
    theirs = complete(vllm_server, demo.ADAPTERS[name], f"{name}-alone")
    for prompt, one, other in zip(PROMPTS, ours, theirs, strict=True):
        assert one["prompt_token_ids"] == other["prompt_token_ids"], prompt
        assert len(other["token_ids"]) == TOKENS, prompt
        assert one["token_ids"] == other["token_ids"], prompt
        assert one["text"] == other["text"], prompt
        mine, its = (choice["logprobs"]["token_logprobs"] for choice in (one, other))
        assert max(abs(a - b) for a, b in zip(mine, its, strict=True)) < TOLERANCE, prompt
    assert len({tuple(choice["token_ids"]) for choice in ours}) > len(PROMPTS) // 2


def test_chat_templates_agree(worker_server: ModelServer, vllm_server: ModelServer) -> None:
    """The same messages become the same prompt."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me about the sea."},
        {"role": "assistant", "content": "It is wide."},
        {"role": "user", "content": "And deep?"},
    ]
    found = []
    for server in (worker_server, vllm_server):
        payload = {"model": server.served, "messages": messages, "max_tokens": TOKENS}
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json=payload | {"temperature": 0}, timeout=300
        ).json()
        found.append((answer["usage"], answer["choices"][0]["message"]["content"]))
    (our_usage, our_text), (their_usage, their_text) = found
    assert our_text == their_text
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert our_usage[field] == their_usage[field]
