"""From a request to token ids that fit, and to the sampling it asks for.

What comes in: typed requests. What goes out: `Prompt`s and `SamplingParams`. It must not know:
engines, sockets. Tokenizing is work: callers with long texts do it off the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from app.errors import InvalidRequest
from app.worker.dialect.requests import ChatRequest, CompletionRequest, Sampled, Templated
from app.worker.errors import bad_value
from app.worker.samplers.limits import Limits
from app.worker.samplers.params import SMALLEST_TEMPERATURE, SamplingParams, check
from app.worker.samplers.tokens import Tokens

_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads; `text` is known where there was one."""

    ids: list[int]
    text: str | None = None


def completion_prompts(request: CompletionRequest, tokens: Tokens, limits: Limits) -> list[Prompt]:
    """Every prompt of a completions request, in order."""
    _check_room(request, limits, "max_tokens", request.max_tokens)
    given = request.prompt
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    prompts: Sequence[Any] = [given] if single else given
    if not prompts:
        raise InvalidRequest("You must pass at least one prompt")
    return [_prompt(one, request, tokens, limits) for one in prompts]


def chat_prompt(request: ChatRequest, tokens: Tokens, limits: Limits) -> Prompt:
    """The conversation, through the model's template."""
    if request.max_completion_tokens is not None:
        _check_room(request, limits, "max_completion_tokens", request.max_completion_tokens)
    else:
        _check_room(request, limits, "max_tokens", request.max_tokens or 0)
    text = template(request, tokens)
    ids = _encode(text, request, request.add_special_tokens, tokens, limits)
    return Prompt(_fitting(ids, limits), text)


def template(request: Templated, tokens: Tokens) -> str:
    """The text a template makes of messages."""
    if not request.messages:
        raise InvalidRequest(
            "Cannot apply chat template to an empty conversation. Provide at least one message."
        )
    if not tokens.tokenizer.chat_template:
        raise InvalidRequest("This model has no chat template; use /v1/completions.")
    kwargs = dict(request.chat_template_kwargs or {})
    kwargs.setdefault("add_generation_prompt", request.add_generation_prompt)
    kwargs["continue_final_message"] = request.continue_final_message
    if request.continue_final_message:
        kwargs["add_generation_prompt"] = False
    messages = [_message(message.model_dump(exclude_unset=True)) for message in request.messages]
    try:
        return tokens.apply_chat_template(messages, documents=request.documents, **kwargs)
    except (TemplateError, ValueError, TypeError) as exc:
        raise InvalidRequest(f"The chat template refused the messages: {exc}") from exc


def sampling(
    request: Sampled,
    limits: Limits,
    *,
    max_tokens: int | None,
    prompts: list[Prompt],
    max_logprobs: int,
) -> SamplingParams:
    """What the request, the model's folder and vLLM's defaults say, in this order."""
    values = {
        name: limits.sampling_defaults.get(name, default)
        if (value := getattr(request, name)) is None
        else value
        for name, default in _DEFAULTS.items()
    }
    if 0 < values["temperature"] < SMALLEST_TEMPERATURE:
        values["temperature"] = SMALLEST_TEMPERATURE
    wanted = limits.sampling_defaults.get("max_tokens") if max_tokens is None else max_tokens
    lengths = [len(prompt.ids) for prompt in prompts]
    # The engine ends each sequence at the model's length; here it only has to be possible.
    room = limits.max_model_len - min(lengths) if max(lengths) < limits.max_model_len else 0
    chosen = tuple(request.logprob_token_ids or ()) or None
    params = SamplingParams(
        n=request.n,
        max_tokens=room if wanted is None else min(wanted, room),
        min_tokens=request.min_tokens,
        seed=None if request.seed == -1 else request.seed,
        stop=request.stop_strings,
        include_stop_str_in_output=request.include_stop_str_in_output,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids or ())),
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
        logprobs=None if chosen else request.alternatives,
        logprob_token_ids=chosen,
        prompt_logprobs=request.prompt_alternatives,
        logit_bias=_biases(request.logit_bias or {}),
        allowed_token_ids=None
        if request.allowed_token_ids is None
        else tuple(request.allowed_token_ids),
        stream=request.stream,
        **values,
    )
    check(params, vocab_size=limits.vocab_size, max_logprobs=max_logprobs)
    return params


def _prompt(
    given: str | list[int], request: CompletionRequest, tokens: Tokens, limits: Limits
) -> Prompt:
    if isinstance(given, str):
        ids = _encode(given, request, request.add_special_tokens, tokens, limits)
        return Prompt(_fitting(ids, limits), given)
    ids = _truncated(given, request, limits)
    strange = next((token for token in ids if token >= limits.vocab_size), None)
    if strange is not None:
        raise InvalidRequest(f"Token id {strange} is out of vocabulary")
    return Prompt(_fitting(ids, limits), tokens.decode(ids) if request.echo else None)


def _encode(
    text: str, request: Sampled, special: bool, tokens: Tokens, limits: Limits
) -> list[int]:
    keep = _kept(request, limits)
    if keep is None or keep == 0 or request.truncation_side == "right":
        ids = tokens.encode(text, add_special_tokens=special)
        return _truncated(ids, request, limits)
    return tokens.encode(text, add_special_tokens=special, keep_last=keep)


def _truncated(ids: list[int], request: Sampled, limits: Limits) -> list[int]:
    keep = _kept(request, limits)
    if keep is None or keep >= len(ids):
        return ids
    return ids[:keep] if request.truncation_side == "right" else ids[len(ids) - keep :]


def _kept(request: Sampled, limits: Limits) -> int | None:
    """How many tokens truncation leaves; -1 asks for all that leave room for an answer."""
    wanted = request.truncate_prompt_tokens
    return limits.max_model_len - 1 if wanted == -1 else wanted


def _fitting(ids: list[int], limits: Limits) -> list[int]:
    if not ids:
        raise InvalidRequest("The decoder prompt cannot be empty")
    if len(ids) > limits.max_model_len:
        raise bad_value(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, "
            f"your prompt contains {len(ids)} input tokens, which exceeds this limit even "
            "without any output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
            len(ids),
        )
    return ids


def _check_room(request: Sampled, limits: Limits, name: str, wanted: int) -> None:
    most = limits.max_model_len
    if wanted > most:
        raise bad_value(
            f"{name}={wanted} cannot be greater than max_model_len={most}. "
            "Please request fewer output tokens.",
            name,
            wanted,
        )
    keep = request.truncate_prompt_tokens
    if keep is not None and keep > most:
        raise bad_value(
            f"truncate_prompt_tokens={keep} cannot be greater than max_model_len = {most}. "
            "Please request a smaller truncation size.",
            "truncate_prompt_tokens",
            keep,
        )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Templates want one string: text parts are joined by line breaks, as vLLM does."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": "" if content is None else content}
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if any(text is None for text in texts):
        raise InvalidRequest("This model reads text only; a message has a part that is not text.")
    return {**message, "content": "\n".join(texts)}


def _biases(given: dict[str, float]) -> dict[int, float]:
    strange = [key for key in given if not key.lstrip("-").isdecimal()]
    if strange:
        raise bad_value(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {strange}",
            "logit_bias",
            strange,
        )
    return {int(key): min(100.0, max(-100.0, value)) for key, value in given.items()}
