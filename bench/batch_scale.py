"""One call with many prompts: how much sooner four replicas answer it than one.

What comes in: a gateway's contender. What goes out: seconds of the same batch over one replica
and over several, simulated. Scoring: each prompt is its own, one token is asked for with its
logprob, so that the prompts' own tokens are the work and more replicas can share it.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import Unready
from bench.measure import Misbehaved
from bench.peers import Contender
from bench.processes import Cores
from bench.simulated import Ground, standing
from bench.traffic import system_prompt

PROMPTS = 256
PROMPT_TOKENS = 700
#: Real time: what the gateway itself takes to split and gather counts as it would.
SPEED = 1.0


@dataclass(frozen=True, slots=True)
class Scaling:
    """Simulated seconds of one call."""

    prompts: int
    prompt_tokens: int
    replicas: int
    one_s: float
    several_s: float
    prompts_each: list[int]

    @property
    def ratio(self) -> float:
        return self.one_s / self.several_s


def measure(
    contender: Contender, *, prompts: int, replicas: int, cores: Cores, scratch: Path
) -> Scaling:
    (scratch / "batch").mkdir(exist_ok=True)
    took: dict[int, float] = {}
    each: list[int] = []
    for count in (1, replicas):
        with standing(
            contender, replicas=count, speed=SPEED, cores=cores, scratch=scratch / "batch"
        ) as ground:
            _ask(ground, prompts, seed=0)  # the adapter is loaded, connections are open
            ground.quiet()
            before = _sequences(ground)
            took[count] = _ask(ground, prompts, seed=1) * SPEED
            each = [now - then for now, then in zip(_sequences(ground), before, strict=True)]
    return Scaling(prompts, PROMPT_TOKENS, replicas, took[1], took[replicas], each)


def _sequences(ground: Ground) -> list[int]:
    return [replica["sequences"] for replica in ground.stats()["replicas"]]


def _ask(ground: Ground, prompts: int, *, seed: int) -> float:
    """Seconds to the whole answer, every part of which is looked at."""
    texts = [system_prompt(seed, number, PROMPT_TOKENS) for number in range(prompts)]
    payload = {
        "model": ground.contender.model,
        "prompt": texts,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
    }
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {ground.contender.key}",
    }
    connection = http.client.HTTPConnection("127.0.0.1", ground.port, timeout=60)
    try:
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(payload), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        took_s = time.perf_counter() - began
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise Unready(f"the batch was not answered: {exc}") from exc
    finally:
        connection.close()
    if response.status != 200:
        raise Misbehaved(f"the batch was answered {response.status}")
    _check(answer, ground.contender.upstream_model, prompts)
    return took_s


def _check(answer: dict[str, Any], speaker: str, prompts: int) -> None:
    choices = answer["choices"]
    if [choice["index"] for choice in choices] != list(range(prompts)):
        raise Misbehaved("the batch's choices are not all there, in order")
    if {choice["text"] for choice in choices} != {speaker}:
        raise Misbehaved("another adapter answered a part of the batch")
