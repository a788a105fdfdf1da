"""Scoring requests that may share one call, and the call's answer taken apart again. Pure.

What comes in: a request for the logprobs of one prompt. What goes out: what it must have in common
with another to share its call; and from the answer to many prompts, what each alone would have got.
Knows nothing of when calls are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from app.domain import Route
from app.errors import UpstreamBroke
from app.serving.gather import choices_of, indexed, members_of
from app.serving.request import InferenceRequest

#: A larger prompt is work enough for a call, and its answer too large to be held here.
SHARED_BYTES = 256 << 10
#: Members that are about one request and no other.
_OWN = frozenset(
    {"prompt_embeds", "use_beam_search", "kv_transfer_params", "ec_transfer_params", "suffix"}
)
#: Header lines that name a request and change nothing about its answer.
_NAMES = (b"x-request-id:", b"traceparent:", b"tracestate:")
_NULL, _TRUE, _ZERO = msgspec.Raw(b"null"), msgspec.Raw(b"true"), msgspec.Raw(b"0")


class Count(Enum):
    """Where a prompt's own tokens can be counted; vLLM tells only the sum of all."""

    GIVEN = "the prompt is a list of them"
    ECHOED = "its logprobs begin with the prompt's"
    SCORED = "its prompt_logprobs have one for each"
    RETURNED = "its prompt_token_ids are asked for"


class _Tokens(msgspec.Struct):
    tokens: list[msgspec.Raw]


class _Choice(msgspec.Struct):
    logprobs: _Tokens | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_ids: list[int] | None = None


_choice = msgspec.json.Decoder(_Choice)


@dataclass(frozen=True, slots=True)
class Scoring:
    """A request as its like see it: `key` is equal for those that may share a call.

    `members` are those of the call's body, without `prompt`; `strips` says that token ids are asked
    for on our account. `repeatable`: the same prompt has the same answer each time.
    """

    key: tuple[object, ...]
    prompt: bytes
    members: dict[str, msgspec.Raw]
    headers: bytes
    count: Count
    strips: bool
    repeatable: bool
    generated: int

    def shared(self, request: InferenceRequest, prompts: Sequence[bytes]) -> InferenceRequest:
        """One call for all these prompts, as if this request had asked for them."""
        members = self.members | ({"return_token_ids": _TRUE} if self.strips else {})
        found = request.with_prompt(b"[%b]" % b",".join(prompts), members)
        found.batch, found.scoring = True, False
        return found


def read(request: InferenceRequest, route: Route) -> Scoring | None:
    """What this scoring request may share; None if it may not share anything."""
    if request.content is None or len(memoryview(request.content)) > SHARED_BYTES:
        return None
    members = request.members()
    if not _OWN.isdisjoint(members):
        return None
    members.pop("prompt", None)
    prompt = request.only_prompt()
    of_tokens = prompt.startswith(b"[")
    if prompt in (b"[]", b'""') or not (of_tokens or prompt.startswith(b'"')):
        return None
    call = dict(members)
    for name in ("user", "model"):
        members.pop(name, None)
    count = _count(members, of_tokens=of_tokens)
    if count is None:
        return None
    lines = [line for line in request.headers.split(b"\r\n") if not line.startswith(_NAMES)]
    body = b",".join(b"%b:%b" % (k.encode(), bytes(members[k])) for k in sorted(members))
    only_prompt = members["max_tokens"] == _ZERO
    return Scoring(
        key=(route.pool, route.upstream_name, of_tokens, body, *lines),
        prompt=prompt,
        members=call,
        headers=request.headers,
        count=count,
        strips=count is Count.RETURNED and members.get("return_token_ids") != _TRUE,
        repeatable=only_prompt or _is_zero(members.get("temperature")),
        generated=0 if only_prompt else 1,
    )


def _count(members: dict[str, msgspec.Raw], *, of_tokens: bool) -> Count | None:
    def asks(name: str) -> bool:
        return members.get(name, _NULL) != _NULL

    if members.get("return_token_ids") == _TRUE:
        return Count.RETURNED
    if of_tokens and not asks("truncate_prompt_tokens"):
        return Count.GIVEN
    if asks("prompt_logprobs"):
        return Count.SCORED
    if members.get("echo") == _TRUE:
        # Asking for token ids would take the prompt out of the echoed text.
        return Count.ECHOED if asks("logprobs") else None
    return Count.RETURNED


def _is_zero(number: msgspec.Raw | None) -> bool:
    return number == _ZERO or number == msgspec.Raw(b"0.0")


@dataclass(frozen=True, slots=True)
class Share:
    """What one prompt gets of a call's answer: a reply's members, but for the id."""

    members: dict[str, msgspec.Raw]

    def body(self, rid: bytes) -> bytes:
        """The reply to the request `rid`."""
        return msgspec.json.encode(self.members | {"id": msgspec.Raw(b'"cmpl-%b"' % rid)})


def take_apart(body: bytes, scoring: Scoring, prompts: Sequence[bytes]) -> list[Share]:
    """What each of the prompts would have got alone.

    Raises:
        UpstreamBroke: it is no completion of these prompts, or the tokens do not add up.
    """
    reply = members_of(body)
    choices = choices_of(reply, len(prompts))
    n = len(choices) // len(prompts)
    usage = msgspec.json.decode(reply["usage"])
    counts = [_tokens(scoring, prompt, choices[at * n]) for at, prompt in enumerate(prompts)]
    told = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if told != (sum(counts), len(choices)):
        raise UpstreamBroke(f"A replica counted {told} tokens where {sum(counts)} were expected.")
    shares = []
    for at, count in enumerate(counts):
        mine = [indexed(choices[at * n + k], k) for k in range(n)]
        if scoring.strips:
            mine = [_stripped(choice) for choice in mine]
        members = dict(reply)
        members["choices"] = msgspec.Raw(b"[%b]" % b",".join(mine))
        members["usage"] = msgspec.Raw(msgspec.json.encode(_usage(usage, count, n)))
        shares.append(Share(members))
    return shares


def request_id(headers: bytes) -> bytes:
    """The id that a request goes by."""
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        if name == b"x-request-id":
            return msgspec.json.encode(value.decode("latin-1"))[1:-1]
    return b""


def _tokens(scoring: Scoring, prompt: bytes, choice: bytes) -> int:
    if scoring.count is Count.GIVEN:
        return prompt.count(b",") + 1
    try:
        found = _choice.decode(choice)
    except msgspec.DecodeError as exc:
        raise UpstreamBroke(f"A replica's choice is not a completion's: {exc}") from exc
    if scoring.count is Count.ECHOED:
        return len(found.logprobs.tokens) - scoring.generated if found.logprobs else -1
    if scoring.count is Count.SCORED:
        return len(found.prompt_logprobs or ())
    return len(found.prompt_token_ids or ())


def _stripped(choice: bytes) -> bytes:
    """The choice without the token ids that its request did not ask for."""
    members = members_of(choice)
    for name in ("token_ids", "prompt_token_ids"):
        if name in members:
            members[name] = _NULL
    return msgspec.json.encode(members)


def _usage(usage: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """One prompt's part of the usage; what cannot be told apart is not told."""
    return {name: None if isinstance(value, dict) else value for name, value in usage.items()} | {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }
