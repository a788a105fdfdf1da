"""Sampling for a client of the Tink API: through the data plane, like any other completion.

What comes in: a model's name, prompts, options. What goes out: sequences with their tokens and
logprobs. It must not know: runs, trainers, jobs.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from app.domain import Principal, Scope
from app.errors import InvalidRequest, UpstreamError
from app.serving.batches import whole
from app.serving.request import COMPLETIONS, parse
from app.serving.request_path import Serving
from app.serving.snapshot import Snapshots
from app.training.single_ops import Sample


class Rooms(Protocol):
    """What sampling needs of the running gateway."""

    @property
    def request_path(self) -> Serving: ...
    @property
    def snapshots(self) -> Snapshots: ...


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Complaint(msgspec.Struct):
    message: str


class _Envelope(msgspec.Struct):
    error: _Complaint


async def draw(rooms: Rooms, key_id: str, model: str, asked: Sample) -> dict[str, Any]:
    """Completions of every prompt, `n` of each, in the order of the prompts.

    Raises:
        InvalidRequest: the server refuses an option or a prompt.
        LoragateError: it could not be served; see `RequestPath.serve`.
    """
    body = {**asked.params, "model": model, "prompt": asked.prompts}
    request = parse(COMPLETIONS, msgspec.json.encode(body | {"return_token_ids": True}))
    # Whether the key may use the model was decided when it asked.
    principal = Principal(key_id, key_id, frozenset({Scope.INFERENCE}))
    reply = await rooms.request_path.serve(request, principal, rooms.snapshots.current)
    data = await whole(reply)
    if reply.status >= 300:
        raise _refusal(reply.status, data)
    try:
        choices = msgspec.json.decode(data, type=_Answer).choices
    except msgspec.DecodeError as exc:
        raise UpstreamError(f"The replica's answer is no completion: {exc}") from exc
    return {
        "model": model,
        "sequences": [_sequence(choice) for choice in choices],
        "completions": [choice.text for choice in choices],
        "generated_text": choices[0].text if choices else "",
    }


def _sequence(choice: _Choice) -> dict[str, Any]:
    logprobs = choice.logprobs
    return {
        "stop_reason": choice.finish_reason or "length",
        "text": choice.text,
        "tokens": choice.token_ids,
        "logprobs": None if logprobs is None else logprobs.token_logprobs,
    }


def _refusal(status: int, data: bytes) -> InvalidRequest | UpstreamError:
    try:
        told = msgspec.json.decode(data, type=_Envelope).error.message
    except msgspec.DecodeError:
        told = data[:500].decode(errors="replace")
    if status < 500:
        return InvalidRequest(told, param="sampling_params")
    return UpstreamError(f"The replica answered {status}: {told}")
