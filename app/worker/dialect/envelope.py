"""What every reply carries: an id, a time, a model, usage, and how it becomes bytes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

FINGERPRINT = "loragate-worker"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """`created` is seconds since the epoch; `id` is what the client sees."""

    id: str
    created: int
    model: str

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(slots=True)
class Tally:
    """Tokens of a reply so far: `completion` by choice."""

    prompt: list[int]
    n: int
    completion: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.completion = [0] * (len(self.prompt) * self.n)

    def usage(self) -> dict[str, int]:
        return _usage(sum(self.prompt), sum(self.completion))

    def usage_of(self, index: int) -> dict[str, int]:
        return _usage(self.prompt[index // self.n], self.completion[index])


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }


def reply_id(prefix: str, given: str | None) -> str:
    return f"{prefix}-{given or uuid.uuid4().hex[:16]}"


def to_json(body: Any) -> bytes:
    return msgspec.json.encode(body)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
