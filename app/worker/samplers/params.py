"""How one request wants its tokens chosen, checked against what the model can do.

What comes in: values a client sent. What goes out: a frozen `SamplingParams`, or an
`InvalidRequest` in vLLM's words. It must not know: JSON, tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.worker.errors import bad_value

SMALLEST_TEMPERATURE = 1e-2
GREEDY_BELOW = 1e-5
LOGPROB_TOKEN_IDS_MAX = 128
N_MAX = 16384


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Everything that decides the tokens of a request. `logprobs` counts alternatives."""

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    stream: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def check(params: SamplingParams, *, vocab_size: int, max_logprobs: int) -> None:
    """Raise for the first value that is out of range."""
    _check_ranges(params)
    _check_lengths(params)
    _check_logprobs(params, vocab_size, max_logprobs)
    _check_token_ids(params, vocab_size)


def _check_ranges(params: SamplingParams) -> None:
    if params.n < 1:
        raise InvalidRequest(f"n must be at least 1, got {params.n}.")
    if params.n > N_MAX:
        raise InvalidRequest(f"n must be at most {N_MAX}, got {params.n}.")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2.0 <= value <= 2.0:
            raise InvalidRequest(f"{name} must be in [-2, 2], got {value}.")
    if not (math.isfinite(params.repetition_penalty) and params.repetition_penalty > 0.0):
        value = params.repetition_penalty
        raise InvalidRequest(f"repetition_penalty must be greater than zero, got {value}.")
    _check_temperature(params.temperature)
    if not 0.0 < params.top_p <= 1.0:
        raise bad_value(f"top_p must be in (0, 1], got {params.top_p}.", "top_p", params.top_p)
    if params.top_k < -1:
        raise InvalidRequest(f"top_k must be 0 (disable), or at least 1, got {params.top_k}.")
    if not 0.0 <= params.min_p <= 1.0:
        raise InvalidRequest(f"min_p must be in [0, 1], got {params.min_p}.")


def _check_temperature(value: float) -> None:
    if not math.isfinite(value):
        raise bad_value(f"temperature must be a finite number, got {value}.", "temperature", value)
    if value < 0.0:
        raise bad_value(f"temperature must be non-negative, got {value}.", "temperature", value)
    if value > 2.0:
        raise bad_value(f"temperature must be in [0, 2], got {value}.", "temperature", value)


def _check_lengths(params: SamplingParams) -> None:
    limit, least = params.max_tokens, params.min_tokens
    if limit < 1:
        raise bad_value(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    if least < 0:
        raise InvalidRequest(f"min_tokens must be greater than or equal to 0, got {least}.")
    if least > limit:
        raise InvalidRequest(
            f"min_tokens must be less than or equal to max_tokens={limit}, got {least}."
        )
    if any(not text for text in params.stop):
        raise InvalidRequest("stop cannot contain an empty string.")
    if params.n > 1 and params.greedy:
        raise InvalidRequest(f"n must be 1 when using greedy sampling, got {params.n}.")


def _check_logprobs(params: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    for kind, name in (("sample", "logprobs"), ("prompt", "prompt_logprobs")):
        wanted = getattr(params, name)
        wanted = vocab_size if wanted == -1 else wanted
        if wanted is not None and wanted > max_logprobs:
            raise bad_value(
                f"Requested {kind} logprobs of {wanted}, "
                f"which is greater than max allowed: {max_logprobs}",
                name,
                wanted,
            )
    chosen = params.logprob_token_ids or ()
    if len(chosen) > LOGPROB_TOKEN_IDS_MAX:
        raise bad_value(
            f"Requested logprob_token_ids of length {len(chosen)}, "
            f"which is greater than max allowed: {LOGPROB_TOKEN_IDS_MAX}",
            "logprob_token_ids",
            len(chosen),
        )


def _check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    _check_vocabulary("logprob_token_ids", params.logprob_token_ids or (), vocab_size)
    _check_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_vocabulary("logit_bias", tuple(params.logit_bias), vocab_size)
    allowed = params.allowed_token_ids
    if allowed is None:
        return
    if not allowed:
        raise bad_value("allowed_token_ids is not None and empty!", "allowed_token_ids", [])
    if not all(0 <= token < vocab_size for token in allowed):
        raise bad_value(
            "allowed_token_ids contains out-of-vocab token id!", "allowed_token_ids", list(allowed)
        )


def _check_vocabulary(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    strange = [token for token in tokens if not 0 <= token < vocab_size]
    if strange:
        raise bad_value(
            f"token_id(s) {strange} in {name} contain out-of-vocab token ids. "
            f"Vocabulary size: {vocab_size}",
            name,
            strange,
        )
