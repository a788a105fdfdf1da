"""What a decision costs: one pick, and one plan, at 64 replicas and 5,000 adapters.

What comes in: nothing. What goes out: microseconds a pick and milliseconds a plan, of the code that
serves; nothing here is simulated. The picks are of a running fleet: every adapter lives somewhere,
requests are in flight everywhere, and adapters are asked for by Zipf's law, each with a prompt.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, cast

from app.backends.base import Backend
from app.clock import SystemClock
from app.control import placement
from app.control.placement import Seen, Wanted
from app.domain import Pool, Replica, ReplicaState
from app.serving.policies import pick
from app.serving.pool import LivePool
from app.serving.replica import LiveReplica
from app.serving.request import CHAT, InferenceRequest, parse
from bench.traffic import system_prompt

REPLICAS = 64
ADAPTERS = 5000
GPU_SLOTS, CPU_SLOTS = 8, 128
CLAIMS = 400
#: From when on a replica that just became healthy gets its whole share.
WARM_S = 3600.0
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Decisions:
    """Medians over rounds."""

    replicas: int
    adapters: int
    pick_us: float
    pick_base_us: float
    plan_ms: float
    replan_ms: float


def measure(*, quick: bool = False) -> Decisions:
    draw = random.Random(7)
    names = [f"adapter-{number:05}@1" for number in range(ADAPTERS)]
    demand = [100 / (rank + 1) for rank in range(ADAPTERS)]
    wanted = [Wanted(name, share, share / 5) for name, share in zip(names, demand, strict=True)]
    pool, replicas = _fleet()
    seen = [Seen(replica.id, CPU_SLOTS) for replica in replicas]
    rounds = 1 if quick else ROUNDS
    plan_ms = [_timed(lambda: placement.plan(wanted, seen, frozenset())) for _ in range(rounds)]
    plan = placement.plan(wanted, seen, frozenset())
    _inhabit(pool, replicas, plan)
    again = [
        Wanted(one.name, one.demand * draw.uniform(0.7, 1.4), one.concurrency, plan.homes[one.name])
        for one in wanted
    ]
    held = [Seen(r.id, CPU_SLOTS, frozenset(r.residency.known)) for r in replicas]
    replan_ms = [_timed(lambda: placement.plan(again, held, frozenset())) for _ in range(rounds)]
    asked = draw.choices(names, cum_weights=list(accumulate(demand)), k=5000)
    for name in asked[:CLAIMS]:
        chosen = pick(pool, name, _request(0), WARM_S)
        if chosen is not None and chosen.takes(name):
            chosen.claim(name)
    base = [pool.config.served_name] * len(asked)
    return Decisions(
        REPLICAS,
        ADAPTERS,
        median(_picks_us(pool, asked) for _ in range(rounds)),
        median(_picks_us(pool, base) for _ in range(rounds)),
        median(plan_ms),
        median(replan_ms),
    )


def _fleet() -> tuple[LivePool, list[LiveReplica]]:
    clock = SystemClock()
    config = Pool("bench", "base", "base", max_loras=GPU_SLOTS, max_cpu_loras=CPU_SLOTS)
    pool = LivePool(config, clock.monotonic())
    replicas = [
        # No request is sent: a replica's backend is not looked at.
        LiveReplica(
            Replica(f"r{number}", "bench", f"http://r{number}"),
            cast(Backend, None),
            pool,
            clock,
        )
        for number in range(REPLICAS)
    ]
    pool.consists_of(replicas)
    for replica in replicas:
        replica.turned(ReplicaState.HEALTHY, "made so")
    return pool, replicas


def _inhabit(pool: LivePool, replicas: list[LiveReplica], plan: placement.Plan) -> None:
    """Do what the plan says, without engines."""
    by_id = {replica.id: replica for replica in replicas}
    for action in plan.loads:
        by_id[action.replica].residency.loaded(action.name, f"/store/{action.name}")
    homes = {name: [by_id[id] for id in ids] for name, ids in plan.homes.items()}
    pool.rehome(homes)


def _request(number: int) -> InferenceRequest:
    """A request as the gateway reads it: a chat with a long system prompt."""
    messages = [{"role": "system", "content": system_prompt(number, 0, 1000)}]
    return parse(CHAT, json.dumps({"model": "any", "messages": messages}).encode())


def _picks_us(pool: LivePool, names: list[str]) -> float:
    requests = [_request(number) for number in range(32)]
    now = WARM_S * 1e3
    began = time.perf_counter()
    for number, name in enumerate(names):
        pick(pool, name, requests[number % 32], now)
    return (time.perf_counter() - began) / len(names) * 1e6


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
