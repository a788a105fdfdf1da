"""What the engine tells of a sequence: new text, new tokens, their logprobs, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """One position: the token that is there first, then the likeliest; its rank counts from 1."""

    ids: list[int]
    logprobs: list[float]
    rank: int


# The first token of a prompt has none.
PromptLogprobs = list[TokenLogprobs | None]


@dataclass(slots=True)
class Delta:
    """What is new of one sequence. `prompt_logprobs` comes once, with the first."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
