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
MAX_PROMPTS = 1024
VOCABULARY = 259

#: A vLLM with loragate-vllm beside it.
FEATURES = {
    "plugin": "0.1.0",
    "vllm": "0.32.0",
    "dtype": "float32",
    "prompt_logprobs": True,
    "prompt_logprobs_with_lora": True,
    "prompt_logprobs_with_lm_head_lora": True,
}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.body = dumps({"error": error})


class UnknownToken(Refusal):
    """What vLLM notices only when a stream's head has gone out."""


@dataclass(frozen=True)
class Choice:
    """One generated text: `index`, its words, and why it ended."""

    index: int
    words: list[str]
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(self.words)


@dataclass(frozen=True)
class Prompt:
    """What a completion goes on from: its text, its tokens, and an id for each of them."""

    text: str
    tokens: list[str]
    ids: list[int]


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
    if limit == 0 and payload.get("echo"):
        limit = 1  # as vLLM has it: it generates one token, counts it and does not show it
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


def prompts_of(payload: dict[str, Any]) -> list[Prompt]:
    given = payload.get("prompt", "")
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    found = [given] if single else given
    if len(found) > MAX_PROMPTS:
        message = (
            f"prompt list length {len(found)} exceeds the maximum allowed count of {MAX_PROMPTS}. "
            "To increase this limit, set the VLLM_MAX_COMPLETION_PROMPTS environment variable."
        )
        raise Refusal(400, message, "BadRequestError", "prompt")
    return [_prompt(one) for one in found]


def _prompt(given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        tokens = words(given)
        prompt = Prompt(given, tokens, [3 + sum(token.encode()) % 256 for token in tokens])
    else:
        odd = [token for token in given if not 0 <= token < VOCABULARY]
        if odd:
            message = f"Token id {max(odd)} is out of vocabulary"
            raise UnknownToken(400, message, "BadRequestError")
        text = detokenize(given)
        prompt = Prompt(text, [detokenize([token]) for token in given], given)
    if len(prompt.ids) >= MAX_MODEL_LEN:
        message = (
            f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt "
            f"contains {len(prompt.ids)} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt."
        )
        raise Refusal(400, message, "BadRequestError", "input_tokens")
    return prompt


def last_message(payload: dict[str, Any]) -> str:
    content = payload["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def metrics(*, cpu: bool = False, lora: bool = True) -> str:
    """What vLLM's /metrics says that a gateway reads to know it by; recorded from 0.32."""
    labels = {
        "block_size": "128" if cpu else "16",
        "enable_prefix_caching": "True",
        "engine": "0",
        "kv_cache_memory_bytes": "1073741824" if cpu else "None",
        "user_specified_block_size": "False",
    }
    cache = ",".join(f'{name}="{value}"' for name, value in labels.items())
    lines = ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{{{cache}}} 1.0"]
    if lora:
        lines += ["# TYPE vllm:lora_requests_info gauge"]
    return "\n".join([*lines, ""])


def tokenize(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def detokenize(tokens: list[int]) -> str:
    return bytes(max(0, token - 3) for token in tokens).decode(errors="replace")


def usage(prompt_tokens: int, choices: list[Choice]) -> dict[str, int]:
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
            "usage": usage(sum(len(words(prompt)) for prompt in prompts), choices),
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
    yield from _ending(
        shell, payload, usage(sum(len(words(prompt)) for prompt in prompts), choices)
    )


def completion_body(model: str, payload: dict[str, Any], rid: str) -> bytes:
    prompts = prompts_of(payload)
    choices = generate(model, payload, [prompt.text for prompt in prompts])
    n = len(choices) // len(prompts)
    ids = payload.get("return_token_ids")
    return dumps(
        {
            "id": f"cmpl-{rid}",
            "object": "text_completion",
            "created": CREATED,
            "model": model,
            "choices": [
                {
                    "index": choice.index,
                    **_said(payload, prompts[choice.index // n], choice.words, first=True),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": None,
                    "token_ids": tokenize(choice.text) if ids else None,
                    "prompt_logprobs": prompt_logprobs(payload, prompts[choice.index // n]),
                    "prompt_token_ids": prompts[choice.index // n].ids if ids else None,
                }
                for choice in choices
            ],
            "service_tier": None,
            "system_fingerprint": "fake-vllm",
            "usage": usage(sum(len(prompt.ids) for prompt in prompts), choices),
            "kv_transfer_params": None,
            "metrics": None,
        }
    )


def completion_events(model: str, payload: dict[str, Any], rid: str) -> Iterator[bytes]:
    try:
        prompts = prompts_of(payload)
    except UnknownToken as exc:
        yield b"data: " + exc.body + b"\n\n"
        yield b"data: [DONE]\n\n"
        return
    if payload.get("prompt_logprobs"):
        message = "`prompt_logprobs` are not available when `stream=True`."
        raise Refusal(400, message, "BadRequestError", "prompt_logprobs")
    choices = generate(model, payload, [prompt.text for prompt in prompts])
    n = len(choices) // len(prompts)
    shell = {"id": f"cmpl-{rid}", "object": "text_completion", "created": CREATED, "model": model}
    begun: set[int] = set()
    for index, word, finish in _interleaved(choices):
        said = _said(payload, prompts[index // n], [word], first=index not in begun)
        begun.add(index)
        choice = {"index": index, **said, "finish_reason": finish}
        yield _event(shell, choice | {"stop_reason": None, "token_ids": None})
    yield from _ending(shell, payload, usage(sum(len(p.ids) for p in prompts), choices))


def _said(
    payload: dict[str, Any], prompt: Prompt, spoken: list[str], *, first: bool
) -> dict[str, Any]:
    """The text of a choice and its logprobs, after the prompt and its own if that is echoed."""
    echo = first and payload.get("echo")
    if payload.get("echo") and payload.get("max_tokens") == 0:
        spoken = []
    # As vLLM has it: with the ids at hand nobody needs the prompt's text again.
    told = prompt.text if echo and not payload.get("return_token_ids") else ""
    logprobs = completion_logprobs(payload, spoken, prompt.tokens if echo else [])
    return {"text": told + "".join(spoken), "logprobs": logprobs}


def prompt_logprobs(payload: dict[str, Any], prompt: Prompt) -> list[Any] | None:
    """None for the first token, then what the weights say of each next one."""
    if payload.get("prompt_logprobs") is None:
        return None
    ids = prompt.ids
    rows = [
        {"logprob": _scored(payload, ids[: at + 1]), "rank": 1, "decoded_token": prompt.tokens[at]}
        for at in range(1, len(ids))
    ]
    return [None] + [{str(id): row} for id, row in zip(ids[1:], rows, strict=True)]


def chat_logprobs(payload: dict[str, Any], spoken: list[str]) -> dict[str, Any] | None:
    if not payload.get("logprobs"):
        return None
    rows = []
    for word in spoken:
        row = {"token": word, "logprob": _logprob(word), "bytes": list(word.encode())}
        top = [row] * min(1, payload.get("top_logprobs") or 0)
        rows.append(row | {"top_logprobs": top})
    return {"content": rows}


def completion_logprobs(
    payload: dict[str, Any], spoken: list[str], echoed: list[str]
) -> dict[str, Any] | None:
    if payload.get("logprobs") is None:
        return None
    tokens = [*echoed, *spoken]
    unknown = 1 if echoed else 0  # nothing comes before a prompt's first token
    wanted = payload.get("logprob_token_ids")
    rows = [
        {str(number): _logprob(str(number)) for number in wanted} if wanted else {token: logprob}
        for token, logprob in ((token, _logprob(token)) for token in tokens[unknown:])
    ]
    return {
        "text_offset": [sum(map(len, tokens[:i])) for i in range(len(tokens))],
        "token_logprobs": [None] * unknown + [_logprob(token) for token in tokens[unknown:]],
        "tokens": tokens,
        "top_logprobs": [None] * unknown + rows,
    }


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
