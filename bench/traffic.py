"""Who asks for what, when: a seeded trace that is the same for every contender.

What comes in: a `Workload`. What goes out: `Call`s in order, with the moment each is due in
simulated seconds after the start. Another rate gives the same calls, closer together. Pure.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

#: A word of five letters and a blank; the simulator counts a token for every four bytes.
WORD_BYTES = 6


@dataclass(frozen=True, slots=True)
class Workload:
    """Chats with many adapters, each of which has users and a few long system prompts of its own.

    Popularity of adapters follows Zipf's law with `exponent`; `tail_tokens` and `answer_tokens`
    are the least and the most, drawn evenly.
    """

    adapters: int = 200
    exponent: float = 1.0
    systems_each: int = 3
    users_each: int = 20
    system_tokens: int = 1000
    tail_tokens: tuple[int, int] = (20, 100)
    answer_tokens: tuple[int, int] = (8, 40)
    seed: int = 20261124


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a trace. `due_s` is simulated time; `user` is one of the adapter's."""

    due_s: float
    adapter: int
    system: int
    tail: str
    answer_tokens: int
    user: str


def trace(workload: Workload, rate: float, count: int) -> list[Call]:
    """`count` Poisson arrivals at `rate` requests a second."""
    draw = random.Random(workload.seed)
    weights = [1 / (rank + 1) ** workload.exponent for rank in range(workload.adapters)]
    ranks = list(range(workload.adapters))
    draw.shuffle(ranks)  # a popular adapter is not also the first by name
    chosen = draw.choices(ranks, cum_weights=list(accumulate(weights)), k=count)
    due_s = 0.0
    calls = []
    for adapter in chosen:
        due_s += draw.expovariate(1.0)
        calls.append(
            Call(
                due_s / rate,
                adapter,
                draw.randrange(workload.systems_each),
                _words(draw.randrange(1 << 30), draw.randint(*workload.tail_tokens)),
                draw.randint(*workload.answer_tokens),
                f"user-{adapter:05}-{draw.randrange(workload.users_each)}",
            )
        )
    return calls


def body(workload: Workload, call: Call, model: str) -> bytes:
    """The request as it is sent: a streamed chat."""
    system = system_prompt(call.adapter, call.system, workload.system_tokens)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": call.tail},
    ]
    payload = {
        "model": model,
        "messages": messages,
        "max_tokens": call.answer_tokens,
        "temperature": 0,
        "stream": True,
    }
    return json.dumps(payload, separators=(",", ":")).encode()


@cache
def system_prompt(adapter: int, number: int, tokens: int) -> str:
    """Different from its first words on: nothing is shared between adapters but by design."""
    return _words((adapter * 1000 + number) * 100_000 + tokens, tokens)


def _words(seed: int, tokens: int) -> str:
    digits = f"{random.Random(seed).getrandbits(tokens * 16):0{tokens * 4}x}"
    width = WORD_BYTES - 1
    words = tokens * 4 // WORD_BYTES
    return " ".join(digits[at * width : (at + 1) * width] for at in range(words))
