"""What a client asks of a simulated replica, checked as vLLM checks it.

What comes in: the JSON of a request. What goes out: an `Ask`, its prompts and limits, or a
`Refusal` in vLLM's words. It knows nothing of adapters' state.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bench.sim.prefix import Prompt, count_tokens

MAX_PROMPTS = 1024
MAX_LOGPROBS = 20
DEFAULT_TOKENS = 16
#: Ids carry up to four bytes of text behind a leading one: see `answers.tokenize`.
VOCABULARY = 2 << 32


class Refusal(Exception):
    """An answer other than 200, with vLLM's error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.body = msgspec.json.encode({"error": error})


class Ask(msgspec.Struct):
    """The fields a simulated replica reads, of any endpoint; it ignores the rest."""

    model: str | None = None
    prompt: str | list[Any] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    echo: bool | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    tokens: list[int] | None = None
    lora_name: str | None = None
    lora_path: str | None = None

    @property
    def choices_each(self) -> int:
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


_decode = msgspec.json.Decoder(Ask).decode


def parse(body: bytes) -> Ask:
    try:
        return _decode(body)
    except msgspec.DecodeError as exc:
        raise Refusal(400, f"1 validation error:\n  {exc}", "Bad Request", "body") from exc


def missing(field: str) -> Refusal:
    message = f"1 validation error:\n  Field required: body.{field}"
    return Refusal(400, message, "Bad Request", f"body.{field}")


def unknown_model(name: str, base: str) -> Refusal:
    message = f"The model `{name}` does not exist. Valid aliases: {base}."
    return Refusal(404, message, "NotFoundError", "model")


def prompts_of(ask: Ask) -> list[Prompt]:
    """The prompts of a completion: one or an array, each of text or of token ids."""
    prompt = ask.prompt
    if prompt is None:
        raise missing("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(token, int) for token in prompt):
        return [_ids(prompt)]
    if len(prompt) > MAX_PROMPTS:
        message = f"The number of prompts must be at most {MAX_PROMPTS}, got {len(prompt)}."
        raise Refusal(400, message, "BadRequestError", "prompt")
    return [each if isinstance(each, str) else _ids(each) for each in prompt]


def _ids(tokens: Any) -> list[int]:
    """Token ids, which must be of this vocabulary."""
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        message = "1 validation error:\n  a prompt is text or token ids"
        raise Refusal(400, message, "Bad Request", "body.prompt")
    for token in tokens:
        if not 0 <= token < VOCABULARY:
            message = f"Token id {token} is out of vocabulary (parameter=prompt, value={token})"
            raise Refusal(400, message, "BadRequestError", "prompt")
    return tokens


def conversation_of(ask: Ask) -> str:
    """The messages of a chat as one text, roles included, as a template would write them."""
    if ask.messages is None:
        raise missing("messages")
    parts = []
    for message in ask.messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        parts.append(f"<|{message.get('role')}|>{content}")
    return "".join(parts)


def limit_of(ask: Ask, prompts: list[Prompt], max_model_len: int) -> int:
    """How many tokens each answer may have; refuses what vLLM refuses."""
    limit = ask.max_completion_tokens
    if limit is None:
        limit = DEFAULT_TOKENS if ask.max_tokens is None else ask.max_tokens
    if limit < 0 or (limit == 0 and not ask.echo):
        message = (
            f"max_tokens must be at least 1, got {limit}. (parameter=max_tokens, value={limit})"
        )
        raise Refusal(400, message, "BadRequestError", "max_tokens")
    wanted = max(ask.top_logprobs or 0, 0 if ask.logprobs is True else int(ask.logprobs or 0))
    if wanted > MAX_LOGPROBS:
        message = (
            f"Requested sample logprobs of {wanted}, which is greater than max allowed: "
            f"{MAX_LOGPROBS} (parameter=logprobs, value={wanted})"
        )
        raise Refusal(400, message, "BadRequestError", "logprobs")
    for prompt in prompts:
        _check_length(count_tokens(prompt), limit, max_model_len)
    return limit


def _check_length(tokens: int, limit: int, max_model_len: int) -> None:
    if tokens == 0:
        raise Refusal(400, "The prompt is empty.", "BadRequestError", "prompt")
    if tokens + limit > max_model_len:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {limit} output tokens and your prompt contains at least {tokens} input "
            f"tokens, for a total of at least {tokens + limit} tokens. Please reduce the length "
            "of the input prompt or the number of requested output tokens. "
            f"(parameter=input_tokens, value={tokens})"
        )
        raise Refusal(400, message, "BadRequestError", "input_tokens")
