"""What a Megatron server generated, written as OpenAI's API answers.

What comes in: `Generated` texts in the order of the request's prompts. What goes out: a body, or a
stream that comes in one piece: these servers tell nothing before they are done. Strings to stop at
are cut here, because the servers know none.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from app.backends.base import BufferedBody, Reply
from app.backends.megatron_requests import Ask

_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. `tokens` are the texts of its tokens, those of `prompt` first if it is echoed.

    `logprobs` has one for each of `tokens`, None where nothing precedes; `top` has the
    alternatives, and `token_ids` the ids of what was generated, if the server told any. The counts
    are of tokens.
    """

    text: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    finished: bool
    prompt: str = ""
    logprobs: tuple[float | None, ...] | None = None
    top: tuple[dict[str, float] | None, ...] | None = None
    token_ids: tuple[int, ...] | None = None


def answer(ask: Ask, generated: Sequence[Generated], created: int) -> Reply:
    """The reply to a request; `created` is in seconds since the epoch."""
    done = [_stopped(one, ask.stop) for one in generated]
    kind = "chat.completion" if ask.chat else "text_completion"
    shell = {
        "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex[:16]}",
        "object": kind,
        "created": created,
        "model": ask.model,
    }
    choices = [_choice(ask, index, one) for index, one in enumerate(done)]
    usage = _usage(ask, done)
    if not ask.stream:
        body = msgspec.json.encode({**shell, "choices": choices, "usage": usage})
        return Reply(200, list(_JSON), BufferedBody(body))
    if ask.chat:
        shell["object"] = "chat.completion.chunk"
        for choice in choices:
            choice["delta"] = choice.pop("message")
    events: list[dict[str, Any]] = [{**shell, "choices": [choice]} for choice in choices]
    if ask.include_usage:
        events.append({**shell, "choices": [], "usage": usage})
    stream = b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events)
    return Reply(200, list(_EVENTS), BufferedBody(stream + b"data: [DONE]\n\n"))


def _stopped(one: Generated, stop: Sequence[str]) -> Generated:
    """The answer up to the first string to stop at; its tokens up to the one that ends it."""
    found = [(one.text.find(string), string) for string in stop]
    cuts = [(at, string) for at, string in found if at >= 0]
    if not cuts:
        return one
    at, string = min(cuts)
    end = at + len(string)
    kept = 0
    length = 0
    while kept < len(one.tokens) and length < end:
        length += len(one.tokens[kept])
        kept += 1
    return replace(
        one,
        text=one.text[:at],
        tokens=one.tokens[:kept],
        completion_tokens=kept or one.completion_tokens,
        finished=True,
        logprobs=None if one.logprobs is None else one.logprobs[:kept],
        top=None if one.top is None else one.top[:kept],
        token_ids=None if one.token_ids is None else one.token_ids[:kept],
    )


def _choice(ask: Ask, index: int, one: Generated) -> dict[str, Any]:
    finish = "stop" if one.finished else "length"
    if not ask.chat:
        choice = {
            "index": index,
            "text": one.prompt + one.text,
            "logprobs": None if ask.logprobs is None else _completion_logprobs(one),
            "finish_reason": finish,
        }
        return choice | {"token_ids": one.token_ids} if ask.token_ids else choice
    return {
        "index": index,
        "message": {"role": "assistant", "content": one.text},
        "logprobs": None if ask.logprobs is None else {"content": _chat_logprobs(one)},
        "finish_reason": finish,
    }


def _completion_logprobs(one: Generated) -> dict[str, Any]:
    offsets = []
    at = 0
    for token in one.tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": one.tokens,
        "token_logprobs": one.logprobs,
        "top_logprobs": one.top,
        "text_offset": offsets,
    }


def _chat_logprobs(one: Generated) -> list[dict[str, Any]]:
    pairs = zip(one.tokens, one.logprobs or (), strict=True)
    return [
        {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
        for token, value in pairs
    ]


def _usage(ask: Ask, done: Sequence[Generated]) -> dict[str, int]:
    # Samples of one prompt share it.
    prompt = sum(one.prompt_tokens for one in done[:: ask.n])
    completion = sum(one.completion_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
