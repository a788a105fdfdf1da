"""Which prompt of a batch a model server refuses. Knows nothing of sending.

What comes in: the prompts, vLLM's refusal of all of them, and a way to ask about some of them. What
goes out: the refusal as the whole batch would get it, with `param` naming the prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

#: Statuses with which vLLM refuses what is in a request.
REFUSALS = (400, 413, 422)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that says what is wrong with a request."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def error(self) -> dict[str, Any]:
        """OpenAI's error object; empty if there is none."""
        try:
            error = msgspec.json.decode(self.body)["error"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return {}
        return error if isinstance(error, dict) else {}

    def about(self, place: int) -> Refusal:
        """The same, naming the prompt at `place`."""
        error = self.error() | {"param": f"prompt[{place}]"}
        return Refusal(self.status, self.headers, msgspec.json.encode({"error": error}))


class Refused(Exception):
    """A part of a batch was answered with an error that sending it again does not mend."""

    def __init__(self, places: Sequence[int], refusal: Refusal, replica: str) -> None:
        super().__init__(refusal.status)
        self.places = places
        self.refusal = refusal
        self.replica = replica


#: Asks whether these prompts (their places) are refused.
Ask = Callable[[Sequence[int]], Awaitable[Refusal | None]]


def may_be_a_prompt(refusal: Refusal, members: Container[str]) -> bool:
    """Whether one prompt may be what is refused, and not another member of the body."""
    error = refusal.error()
    param = error.get("param")
    if not error or refusal.status not in REFUSALS:
        return False
    return not isinstance(param, str) or param.partition("[")[0] not in members


def in_band(event: bytes) -> Refusal | None:
    """The refusal that a stream begins with; vLLM finds some faults only after the head is out."""
    line = event.partition(b"\n")[0].removeprefix(b"data:").strip()
    refusal = Refusal(400, [(b"content-type", b"application/json")], line)
    error = refusal.error()
    if error.get("code") not in REFUSALS:
        return None
    return Refusal(error["code"], refusal.headers, line)


async def find(places: Sequence[int], longest: int, ask: Ask) -> tuple[int, Refusal] | None:
    """The place of a prompt that is refused alone, and how; None if none is.

    The longest is looked at first, as too long is what prompts mostly are. Then the half that is
    refused is halved again: two calls and one for each doubling of the prompts, at most.
    """
    refusal = await ask([longest])
    if refusal is not None:
        return longest, refusal
    rest = [place for place in places if place != longest]
    while len(rest) > 1:
        half = rest[: len(rest) // 2]
        rest = half if await ask(half) is not None else rest[len(half) :]
    refusal = await ask(rest) if rest else None
    return None if refusal is None else (rest[0], refusal)
