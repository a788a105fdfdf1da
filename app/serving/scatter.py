"""Which prompts of a batch go together, and where. Pure.

What comes in: the prompts as they stand in the body, and how busy the replicas are. What goes out:
`Part`s. Prompts with a common beginning go to one replica, whose prefix cache then computes it
once; the replicas' loads come out even all the same. Knows nothing of sending.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgspec

#: vLLM refuses more (its VLLM_MAX_COMPLETION_PROMPTS).
MAX_PROMPTS = 1024
#: About as many tokens as one call may have: what has to be computed again if it is lost.
PART_TOKENS = 1 << 20
#: What makes it worth a second replica: so many prompts for each, or so many tokens.
WORTH_PROMPTS = 8
WORTH_TOKENS = 16 << 10
#: How far from an even load a cut may be, as a part of it, to fall between two prefixes.
_SLACK = 1 / 16
_BYTES_PER_TOKEN = 4

_elements = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Part:
    """One call: the places of its prompts in the client's array, and which share it belongs to."""

    places: tuple[int, ...]
    share: int


def prompts_of(content: msgspec.Raw | None) -> list[bytes]:
    """The prompts of an array of prompts; none if it mixes strings and lists, or has others."""
    if content is None:
        return []
    prompts = [bytes(element) for element in _elements.decode(content)]
    kind = prompts[0][:1] if prompts else b""
    if kind not in (b'"', b"[") or not all(prompt.startswith(kind) for prompt in prompts):
        return []
    return prompts


def tokens(prompt: bytes) -> int:
    """About how many tokens a prompt has."""
    if prompt.startswith(b"["):
        return prompt.count(b",") + 1
    return len(prompt) // _BYTES_PER_TOKEN + 1


def wanted(prompts: Sequence[bytes]) -> int:
    """How many replicas the batch is worth."""
    by_tokens = sum(map(tokens, prompts)) // WORTH_TOKENS
    return max(1, min(len(prompts), max(len(prompts) // WORTH_PROMPTS, by_tokens)))


def shares(inflight: Sequence[int], prompts: int) -> list[float]:
    """What part of the prompts each replica gets, so that all are as busy as can be.

    Filled like connected vessels: those with less in flight get more, the busiest may get nothing.
    """
    level, filled = 0.0, 0
    lowest = sorted(inflight)
    for filled in range(len(lowest), 0, -1):
        level = (prompts + sum(lowest[:filled])) / filled
        if level > lowest[filled - 1]:
            break
    return [max(0.0, level - busy) / prompts for busy in inflight]


def split(prompts: Sequence[bytes], shares: Sequence[float]) -> list[Part]:
    """Every prompt in exactly one part; no part over what one call may have.

    Args:
        shares: what part of the work each replica takes; they add up to 1.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    costs = [tokens(prompts[place]) for place in order]
    cuts = [0, *_cuts([prompts[place] for place in order], costs, shares), len(order)]
    parts: list[Part] = []
    for share, (start, end) in enumerate(pairwise(cuts)):
        size = end - start
        cost = sum(costs[start:end])
        calls = min(size, max(-(-size // MAX_PROMPTS), -(-cost // PART_TOKENS)))
        for call in range(calls):
            first, last = start + call * size // calls, start + (call + 1) * size // calls
            parts.append(Part(tuple(order[first:last]), share))
    return parts


def _cuts(ordered: Sequence[bytes], costs: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Where one share ends and the next begins, for every share but the last."""
    before = [0, *accumulate(costs)]
    total = before[-1]
    slack = total / len(shares) * _SLACK
    cuts: list[int] = []
    least = 0
    for filled in list(accumulate(shares))[:-1]:
        target = total * filled
        even = min(bisect_left(before, target), len(ordered))
        if even and target - before[even - 1] < before[even] - target:
            even -= 1
        low = max(least, bisect_left(before, target - slack))
        high = min(len(ordered), bisect_left(before, target + slack))
        least = _between_prefixes(ordered, range(low, high), max(least, even))
        cuts.append(least)
    return cuts


def _between_prefixes(ordered: Sequence[bytes], near: range, even: int) -> int:
    """The place of `near` where the fewest bytes are common; `even` if that gains little."""
    if not 0 < even < len(ordered):
        return even
    common = {at: _common(ordered[at - 1], ordered[at]) for at in near if 0 < at < len(ordered)}
    if not common:
        return even
    best = min(common, key=lambda at: (common[at], abs(at - even)))
    return best if 2 * common[best] < _common(ordered[even - 1], ordered[even]) else even


def _common(one: bytes, other: bytes) -> int:
    """How many bytes two prompts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
