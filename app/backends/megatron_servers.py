"""The two servers that Megatron brings, each asked in its own way.

What comes in: an `Ask`. What goes out: what was generated, in the order of its prompts. The static
server (`tools/run_text_generation_server.py`) knows PUT /api; the dynamic one
(`tools/run_dynamic_text_generation_server.py`) knows /v1, of which it does a part. Both serve one
set of weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import msgspec

from app.backends.megatron_replies import Generated
from app.backends.megatron_requests import CHAT, COMPLETIONS, MAX_SAMPLES, Ask, Message
from app.errors import InvalidRequest, UpstreamBroke, UpstreamError

_Shape = TypeVar("_Shape")
#: Most prompts of one PUT /api.
MAX_PROMPTS = MAX_SAMPLES


class ServerFailed(UpstreamError):
    """It answered that it could not. One that goes on like this is left alone by its breaker."""


class Call(Protocol):
    """Sends one JSON request and reads its whole answer: status and body."""

    async def __call__(self, method: str, path: str, payload: object) -> tuple[int, bytes]: ...


class _Api(msgspec.Struct):
    """What PUT /api answers: `text` and `segments`, its tokens' texts, begin with the prompt.

    `logprobs[i][j]` is that of token j + 1.
    """

    text: list[str]
    segments: list[list[str]]
    tokens: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str
    logprobs: _Logprobs
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None
    generation_token_ids: list[int] | None = None


class _Choices(msgspec.Struct):
    choices: list[_Choice]


class _Said(msgspec.Struct):
    content: str | None = None


class _ChatToken(msgspec.Struct):
    token: str
    logprob: float


class _ChatTokens(msgspec.Struct):
    content: list[_ChatToken] | None = None


class _ChatChoice(msgspec.Struct):
    message: _Said
    finish_reason: str | None = None
    logprobs: _ChatTokens | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _ChatAnswer(msgspec.Struct):
    choices: list[_ChatChoice]
    usage: _Counts = msgspec.field(default_factory=_Counts)


class StaticServer:
    """PUT /api: prompts as text, one call at a time, nothing to stop at, one logprob a token."""

    async def generate(self, ask: Ask, call: Call) -> list[Generated]:
        """Ask for at most `MAX_PROMPTS` prompts at once; it serves one call after the other anyway.

        Raises:
            InvalidRequest: it cannot do this, or says that something in it is wrong.
            ServerFailed: it says that it failed.
            UpstreamBroke: it answered nonsense.
        """
        if (ask.logprobs or 0) > 1:
            raise InvalidRequest(
                "Megatron's PUT /api tells the logprob of each token and no alternatives: ask for "
                "`logprobs` 0 or 1, or serve this model from vLLM or a worker.",
                param="logprobs",
            )
        prompts = [transcript(ask.messages)] * ask.n if ask.messages else _texts(ask)
        done: list[Generated] = []
        for start in range(0, len(prompts), MAX_PROMPTS):
            some = prompts[start : start + MAX_PROMPTS]
            status, data = await call("PUT", "/api", _api_payload(ask, some))
            answer = _api_answer(status, data, len(some))
            done += [_of_api(ask, prompt, answer, at) for at, prompt in enumerate(some)]
        return done

    def limited(self, ask: Ask) -> Ask:
        """A conversation ends where the next speaker's turn would begin: it has no template."""
        if ask.messages is None:
            return ask
        turns = {f"\n{message.role}:" for message in ask.messages} | {"\nuser:"}
        return replace(ask, stop=(*ask.stop, *sorted(turns)))


class DynamicServer:
    """POST /v1/…: token ids, alternatives and chat templates; no streams or stops we rely on."""

    async def generate(self, ask: Ask, call: Call) -> list[Generated]:
        """Ask for completions in one call, and for each answer of a conversation in one.

        Raises:
            InvalidRequest: it says that something in the request is wrong.
            ServerFailed: it says that it failed.
            UpstreamBroke: it answered nonsense.
        """
        if ask.messages is not None:
            conversation = _chat_payload(ask)
            answers = [call("POST", CHAT, conversation) for _ in range(ask.n)]
            return [_of_chat(ask, *answer) for answer in await asyncio.gather(*answers)]
        payload = _sampling(ask) | {
            "prompt": [prompt for prompt in ask.prompts for _ in range(ask.n)],
            "echo": ask.echo,
            # Only the logprobs say how many tokens there are.
            "logprobs": ask.logprobs or 0,
        }
        status, data = await call("POST", COMPLETIONS, payload)
        found = _decoded(status, data, _Choices).choices
        if len(found) != len(payload["prompt"]):
            raise UpstreamBroke(f"The Megatron server answered {len(found)} choices.")
        asked = zip(payload["prompt"], found, strict=True)
        return [_of_choice(ask, prompt, choice) for prompt, choice in asked]

    def limited(self, ask: Ask) -> Ask:
        """It renders conversations itself."""
        return ask


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text: a line for each message, and the assistant's turn begun."""
    lines = [f"{message.role}: {message.text()}\n" for message in messages]
    return f"{''.join(lines)}assistant:"


def _texts(ask: Ask) -> list[str]:
    texts = [prompt for prompt in ask.prompts if isinstance(prompt, str)]
    if len(texts) < len(ask.prompts):
        raise InvalidRequest(
            "Megatron's PUT /api takes prompts as text, not as token ids. Send text, or serve this "
            "model from vLLM or a worker.",
            param="prompt",
        )
    return [text for text in texts for _ in range(ask.n)]


def _api_payload(ask: Ask, prompts: Sequence[str]) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "prompts": prompts,
        "tokens_to_generate": 16 if ask.max_tokens is None else ask.max_tokens,
        "logprobs": ask.logprobs is not None,
    }
    if ask.temperature == 0:  # which it refuses: the greedy choice is the best of one
        return payload | {"top_k": 1}
    payload["temperature"] = ask.temperature
    if ask.top_k:
        payload["top_k"] = ask.top_k
    elif ask.top_p < 1:
        payload["top_p"] = float(ask.top_p)  # it wants a float: 1 is refused
    return payload


def _api_answer(status: int, data: bytes, prompts: int) -> _Api:
    """Its answer. What it finds wrong it says as a bare string, mostly with status 200."""
    if status in (200, 400):
        with suppress(msgspec.DecodeError):
            wrong = msgspec.json.decode(data, type=str)
            raise InvalidRequest(f"The Megatron server refused this: {wrong}")
    answer = _decoded(status, data, _Api)
    told = (answer.text, answer.segments, answer.logprobs, answer.tokens)
    columns = [column for column in told if column is not None]
    if any(len(column) != prompts for column in columns):
        raise UpstreamBroke(f"The Megatron server answered {len(answer.text)} texts.")
    return answer


def _of_api(ask: Ask, prompt: str, answer: _Api, at: int) -> Generated:
    text, tokens = answer.text[at], answer.segments[at]
    start = text.find(prompt)
    if start < 0:
        raise InvalidRequest(
            "The Megatron server's tokenizer changes this prompt, so its end cannot be told in the "
            "answer: send it without special tokens.",
            param="prompt",
        )
    end = start + len(prompt)
    of_prompt = _reaching(tokens, end)
    logprobs = None
    if answer.logprobs is not None:
        logprobs = (None, *answer.logprobs[at])
        if len(logprobs) != len(tokens):
            raise UpstreamBroke("The Megatron server answered other logprobs than tokens.")
    first = 0 if ask.echo else of_prompt
    completion_tokens = len(tokens) - of_prompt
    return Generated(
        text=text[end:],
        tokens=tuple(tokens[first:]),
        prompt_tokens=of_prompt,
        completion_tokens=completion_tokens,
        finished=completion_tokens < (16 if ask.max_tokens is None else ask.max_tokens),
        prompt=text[:end] if ask.echo else "",
        logprobs=None if logprobs is None else logprobs[first:],
        token_ids=None if answer.tokens is None else tuple(answer.tokens[at][of_prompt:]),
    )


def _reaching(tokens: Sequence[str], end: int) -> int:
    """How many tokens it takes for their texts to be `end` characters long."""
    lengths = accumulate(map(len, tokens), initial=0)
    return next((n for n, length in enumerate(lengths) if length >= end), len(tokens))


def _sampling(ask: Ask) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": ask.model, "temperature": ask.temperature}
    if ask.max_tokens is not None:
        asked["max_tokens"] = ask.max_tokens
    if ask.top_k:
        asked |= {"top_k": ask.top_k, "top_p": 0.0}
    else:
        asked["top_p"] = ask.top_p
    return asked


def _chat_payload(ask: Ask) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.text()} for m in ask.messages or ()]
    return _sampling(ask) | {"messages": messages, "logprobs": ask.logprobs is not None}


def _of_choice(ask: Ask, prompt: str | tuple[int, ...], choice: _Choice) -> Generated:
    found = choice.logprobs
    # Old ones put a None before the first generated token as before a prompt's.
    extra = len(found.token_logprobs) - len(found.tokens)
    if extra not in (0, 1):
        raise UpstreamBroke("The Megatron server answered other logprobs than tokens.")
    top = None if found.top_logprobs is None else tuple(found.top_logprobs[extra:])
    of_prompt = len(choice.prompt_token_ids or ())
    if not of_prompt and not isinstance(prompt, str):
        of_prompt = len(prompt)
    elif not of_prompt and ask.echo:
        of_prompt = _reaching(found.tokens, len(prompt))
    completion_tokens = len(found.tokens) - (of_prompt if ask.echo else 0)
    limit, ids = ask.max_tokens, choice.generation_token_ids
    return Generated(
        text=choice.text,
        tokens=tuple(found.tokens),
        prompt_tokens=of_prompt,
        completion_tokens=completion_tokens,
        finished=limit is not None and completion_tokens < limit,
        logprobs=tuple(found.token_logprobs[extra:]),
        top=top,
        token_ids=None if ids is None else tuple(ids),
    )


def _of_chat(ask: Ask, status: int, data: bytes) -> Generated:
    answer = _decoded(status, data, _ChatAnswer)
    if len(answer.choices) != 1:
        raise UpstreamBroke(f"The Megatron server answered {len(answer.choices)} choices.")
    (choice,) = answer.choices
    tokens = (choice.logprobs.content if choice.logprobs else None) or []
    count = answer.usage.completion_tokens
    finished = choice.finish_reason == "stop"  # old ones always say "length"
    return Generated(
        text=choice.message.content or "",
        tokens=tuple(one.token for one in tokens),
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=count,
        finished=finished or (ask.max_tokens is not None and count < ask.max_tokens),
        logprobs=tuple(one.logprob for one in tokens),
    )


def _decoded(status: int, data: bytes, shape: type[_Shape]) -> _Shape:
    told = data[:500].decode(errors="replace").strip()
    if status == 400:
        raise InvalidRequest(f"The Megatron server refused this: {told}")
    if status != 200:
        raise ServerFailed(f"The Megatron server answered {status}: {told}")
    try:
        return msgspec.json.decode(data, type=shape)
    except msgspec.DecodeError as exc:
        raise UpstreamBroke(
            f"The Megatron server's answer is not what it should be: {exc}"
        ) from exc
