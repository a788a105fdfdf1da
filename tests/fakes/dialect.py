"""vLLM's side of the conversation, without a model: it echoes who was asked and what.

What comes in: a request's JSON. What goes out: bodies, events and errors in the shapes and words
of vLLM 0.32, as recorded from a real one; tests/contract/test_dialect.py compares the two.
A token is a word with the blanks behind it; its id, for /tokenize, is made from its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CREATED = 1_795_233_172
MAX_MODEL_LEN = 1024
MAX_LOGPROBS = 20


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.body = dumps({"error": error})


@dataclass(frozen=True)
class Choice:
    """One generated text: `index`, its words, and why it ended."""

    index: int
    words: list[str]
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(self.words)


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|^\s+", text)


def unknown_model(name: str, base: str) -> Refusal:
    message = f"The model `{name}` does not exist. Valid aliases: {base}."
    return Refusal(404, message, "NotFoundError", "model")


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object, or the refusal vLLM gives."""
    try:
        payload = json.loads(body)
    except ValueError as exc:
        raise Refusal(400, f"1 validation error:\n  {exc}", "Bad Request", "body.1") from exc
    if not isinstance(payload, dict):
        raise Refusal(400, "1 validation error:\n  not an object", "Bad Request", "body")
    return payload


def generate(model: str, payload: dict[str, Any], prompts: list[str]) -> list[Choice]:
    """What the model says: its name and the prompt, cut by max_tokens and stop."""
    limit = payload.get("max_completion_tokens") or payload.get("max_tokens")
    if limit is not None and limit < 1:
        message = (
            f"max_tokens must be at least 1, got {limit}. (parameter=max_tokens, value={limit})"
        )
        raise Refusal(400, message, "BadRequestError", "max_tokens")
    asked = payload.get("top_logprobs") or payload.get("logprobs") or 0
    if asked is not True and asked > MAX_LOGPROBS:
        message = (
            f"Requested sample logprobs of {asked}, which is greater than max allowed: "
            f"{MAX_LOGPROBS} (parameter=logprobs, value={asked})"
        )
        raise Refusal(400, message, "BadRequestError", "logprobs")
    n = payload.get("n") or 1
    return [
        _choice(i * n + k, f"{model} heard: {prompt}" + (f" #{k}" if n > 1 else ""), limit, payload)
        for i, prompt in enumerate(prompts)
        for k in range(n)
    ]


def _choice(index: int, text: str, limit: int | None, payload: dict[str, Any]) -> Choice:
    stops = payload.get("stop") or []
    cuts = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
    if found := [cut for cut in cuts if cut >= 0]:
        text = text[: min(found)]
    spoken = words(text)
    if limit is not None and len(spoken) > limit:
        return Choice(index, spoken[:limit], "length")
    return Choice(index, spoken, "stop")


def prompts_of(payload: dict[str, Any]) -> list[str]:
    prompt = payload.get("prompt", "")
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [detokenize(prompt)]
    return [p if isinstance(p, str) else detokenize(p) for p in prompt]


def last_message(payload: dict[str, Any]) -> str:
    content = payload["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def tokenize(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def detokenize(tokens: list[int]) -> str:
    return bytes((token - 3) % 256 for token in tokens).decode(errors="replace")


def usage(prompts: list[str], choices: list[Choice]) -> dict[str, int]:
    prompt_tokens = sum(len(words(prompt)) for prompt in prompts)
    completion_tokens = sum(len(choice.words) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def chat_body(model: str, payload: dict[str, Any], rid: str) -> bytes:
    prompts = [last_message(payload)]
    choices = generate(model, payload, prompts)
    return dumps(
        {
            "id": f"chatcmpl-{rid}",
            "object": "chat.completion",
            "created": CREATED,
            "model": model,
            "choices": [
                {
                    "index": choice.index,
                    "message": {
                        "role": "assistant",
                        "content": choice.text,
                        "refusal": None,
                        "annotations": None,
                        "audio": None,
                        "function_call": None,
                        "reasoning": None,
                    },
                    "logprobs": chat_logprobs(payload, choice.words),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                }
                for choice in choices
            ],
            "service_tier": None,
            "system_fingerprint": "fake-vllm",
            "usage": usage(prompts, choices),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": None,
            "metrics": None,
        }
    )


def chat_events(model: str, payload: dict[str, Any], rid: str) -> Iterator[bytes]:
    prompts = [last_message(payload)]
    choices = generate(model, payload, prompts)
    shell = {
        "id": f"chatcmpl-{rid}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model,
    }
    for choice in choices:
        yield _event(shell, _delta(choice.index, {"role": "assistant", "content": ""}))
    for index, word, finish in _interleaved(choices):
        logprobs = chat_logprobs(payload, [word])
        yield _event(shell, _delta(index, {"content": word}, logprobs, finish))
    yield from _ending(shell, payload, usage(prompts, choices))


def completion_body(model: str, payload: dict[str, Any], rid: str) -> bytes:
    prompts = prompts_of(payload)
    choices = generate(model, payload, prompts)
    ids = payload.get("return_token_ids")
    scored = prompt_logprobs(payload, prompts)
    n = payload.get("n") or 1
    return dumps(
        {
            "id": f"cmpl-{rid}",
            "object": "text_completion",
            "created": CREATED,
            "model": model,
            "choices": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "logprobs": completion_logprobs(payload, choice.words),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": None,
                    "token_ids": tokenize(choice.text) if ids else None,
                    "prompt_logprobs": scored[choice.index // n],
                    "prompt_token_ids": tokenize(prompts[0]) if ids else None,
                }
                for choice in choices
            ],
            "service_tier": None,
            "system_fingerprint": "fake-vllm",
            "usage": usage(prompts, choices),
            "kv_transfer_params": None,
            "metrics": None,
        }
    )


def completion_events(model: str, payload: dict[str, Any], rid: str) -> Iterator[bytes]:
    prompts = prompts_of(payload)
    choices = generate(model, payload, prompts)
    shell = {"id": f"cmpl-{rid}", "object": "text_completion", "created": CREATED, "model": model}
    for index, word, finish in _interleaved(choices):
        logprobs = completion_logprobs(payload, [word])
        choice = {"index": index, "text": word, "logprobs": logprobs, "finish_reason": finish}
        yield _event(shell, choice | {"stop_reason": None, "token_ids": None})
    yield from _ending(shell, payload, usage(prompts, choices))


def chat_logprobs(payload: dict[str, Any], spoken: list[str]) -> dict[str, Any] | None:
    if not payload.get("logprobs"):
        return None
    rows = []
    for word in spoken:
        row = {"token": word, "logprob": _logprob(word), "bytes": list(word.encode())}
        top = [row] * min(1, payload.get("top_logprobs") or 0)
        rows.append(row | {"top_logprobs": top})
    return {"content": rows}


def completion_logprobs(payload: dict[str, Any], spoken: list[str]) -> dict[str, Any] | None:
    if payload.get("logprobs") is None:
        return None
    return {
        "text_offset": [sum(map(len, spoken[:i])) for i in range(len(spoken))],
        "token_logprobs": [_logprob(word) for word in spoken],
        "tokens": spoken,
        "top_logprobs": [{word: _logprob(word)} for word in spoken],
    }


def prompt_logprobs(payload: dict[str, Any], prompts: list[str]) -> list[Any]:
    """For each prompt: None for its first token, then what the weights say of each next one."""
    if payload.get("prompt_logprobs") is None:
        return [None] * len(prompts)
    given = payload["prompt"]
    many = isinstance(given, list) and not isinstance(given[0], int)
    return [
        [
            None,
            *(
                {str(row[at]): {"logprob": _scored(payload, row[: at + 1]), "rank": 1}}
                for at in range(1, len(row))
            ),
        ]
        for row in (
            tokenize(prompt) if isinstance(prompt, str) else prompt
            for prompt in (given if many else [given])
        )
    ]


def _scored(payload: dict[str, Any], ids: list[int]) -> float:
    """Other weights say something else of the same tokens."""
    seen = hashlib.sha256(f"{payload.get('weights')} {ids}".encode()).digest()
    return -int.from_bytes(seen[:2]) / 8192


def _logprob(word: str) -> float:
    return -(sum(word.encode()) % 97) / 16


def _interleaved(choices: list[Choice]) -> Iterator[tuple[int, str, str | None]]:
    for step in range(max(len(choice.words) for choice in choices)):
        for choice in choices:
            if step < len(choice.words):
                last = step == len(choice.words) - 1
                yield choice.index, choice.words[step], choice.finish_reason if last else None


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _event(shell: dict[str, Any], choice: dict[str, Any]) -> bytes:
    return b"data: " + dumps(shell | {"choices": [choice]}) + b"\n\n"


def _ending(
    shell: dict[str, Any], payload: dict[str, Any], total: dict[str, int]
) -> Iterator[bytes]:
    if (payload.get("stream_options") or {}).get("include_usage"):
        ending = shell | {"choices": [], "usage": total, "system_fingerprint": "fake-vllm"}
        yield b"data: " + dumps(ending) + b"\n\n"
    yield b"data: [DONE]\n\n"
