"""What a request asks of a server that can do much less than the API it is written in.

What comes in: the body of a completion or a chat. What goes out: an `Ask` with everything in it
that a Megatron server can do, or a refusal that names the field. No field is dropped in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import msgspec

from app.errors import InvalidJson, InvalidRequest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_SAMPLES = 128

#: Fields that change no token: an id for the provider's own use, how usage is told, caching.
_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "stream_options",
        "parallel_tool_calls",
        "request_id",
        "priority",
    }
)
#: Fields that ask for nothing when they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "ignore_eos": (False,),
    "top_logprobs": (0,),
}


class _Options(msgspec.Struct):
    """What a completion and a chat have in common."""

    model: str = ""
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1000)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None


class _Completion(_Options):
    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One message of a conversation, as text."""

    role: str
    content: str | list[_Part] | None = None

    def text(self) -> str:
        """Raises InvalidRequest for what is not text: an image, say."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        odd = [part.type for part in self.content if part.text is None]
        if odd:
            _refuse("messages", f"takes text only, not {odd[0]!r}")
        return "".join(part.text or "" for part in self.content)


class _Chat(_Options):
    messages: list[Message] = []
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Streaming(msgspec.Struct):
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request in terms of what these servers do.

    `max_tokens` None leaves it to the server, which a chat may. `temperature` 0 is greedy.
    `top_k` 0 and `top_p` 1 restrict nothing. `logprobs`: of how many alternatives, None for none.
    `echo`: the prompt belongs to the answer. `token_ids`: tell those of what was generated. `chat`:
    there are `messages` and no `prompts`.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Message, ...] | None
    max_tokens: int | None
    n: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    token_ids: bool = False

    @property
    def chat(self) -> bool:
        return self.messages is not None


def read(path: str, body: bytes) -> Ask:
    """Read a request.

    Raises:
        InvalidRequest: it is malformed, or asks for what no Megatron server does.
    """
    if path not in (COMPLETIONS, CHAT):
        _refuse(None, f"has no {path}; it serves {COMPLETIONS} and {CHAT}")
    chat = path == CHAT
    try:
        members = msgspec.json.decode(body, type=dict[str, Any])
        _refuse_unknown(members, _Chat if chat else _Completion)
        usage = msgspec.convert(members, _Streaming).stream_options
        include_usage = usage is not None and bool(usage.include_usage)
        if chat:
            return _chat(msgspec.convert(members, _Chat), include_usage)
        return _completion(msgspec.convert(members, _Completion), include_usage)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"The request is not valid: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise InvalidJson(f"The request body is not valid JSON: {exc}") from exc


def _completion(given: _Completion, include_usage: bool) -> Ask:
    prompts = _prompts(given.prompt)
    echo = bool(given.echo)
    if echo and given.stop:
        _refuse("stop", "cannot stop at a string and echo the prompt")
    max_tokens = 16 if given.max_tokens is None else given.max_tokens
    if max_tokens == 0 and not (echo and given.logprobs is not None):
        _refuse("max_tokens", "generates at least 1 token, unless `echo` and `logprobs` are asked")
    return Ask(
        prompts=prompts,
        messages=None,
        max_tokens=max_tokens,
        logprobs=given.logprobs,
        echo=echo,
        include_usage=include_usage,
        token_ids=bool(given.return_token_ids),
        **_common(given),
    )


def _chat(given: _Chat, include_usage: bool) -> Ask:
    if not given.messages:
        _refuse("messages", "needs at least one message")
    for message in given.messages:
        message.text()
    return Ask(
        prompts=(),
        messages=tuple(given.messages),
        max_tokens=given.max_completion_tokens or given.max_tokens,
        logprobs=0 if given.logprobs else None,
        echo=False,
        include_usage=include_usage,
        **_common(given),
    )


def _common(given: _Options) -> dict[str, Any]:
    stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
    top_k, top_p = max(given.top_k or 0, 0), 1.0 if given.top_p is None else given.top_p
    temperature = 1.0 if given.temperature is None else given.temperature
    if temperature and top_k and top_p < 1:
        _refuse("top_k", "takes `top_k` or `top_p`, not both")
    return {
        "model": given.model,
        "n": given.n or 1,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "stop": tuple(string for string in stop if string),
        "stream": bool(given.stream),
    }


def _prompts(
    given: str | list[str | int | list[int]] | None,
) -> tuple[str | tuple[int, ...], ...]:
    """A string, one prompt's ids, or many of either."""
    if not given:
        _refuse("prompt", "needs a prompt that is not empty")
    if isinstance(given, str):
        return (given,)
    ids = [one for one in given if isinstance(one, int)]
    if len(ids) == len(given):
        return (tuple(ids),)
    if ids or not all(given):
        _refuse("prompt", "needs a text, token ids, or a list of either, none of them empty")
    texts_and_ids = [one for one in given if not isinstance(one, int)]
    return tuple(one if isinstance(one, str) else tuple(one) for one in texts_and_ids)


def _refuse_unknown(members: dict[str, Any], known: type[msgspec.Struct]) -> None:
    for name, value in members.items():
        if name in known.__struct_fields__ or name in _HARMLESS or value is None:
            continue
        if value not in _NEUTRAL.get(name, ()):
            _refuse(name, f"cannot do `{name}`")


def _refuse(param: str | None, why: str) -> NoReturn:
    raise InvalidRequest(
        f"A Megatron server {why}. Leave it out, or serve this model from vLLM or a worker.",
        param=param,
    )
