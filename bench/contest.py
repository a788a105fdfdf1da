"""One contender under the routing bench's loads: a cold start at a common rate, then its limit.

What comes in: a gateway before simulated replicas, and the trace. What goes out: `Figures` of each
run. Times are simulated milliseconds: what a client would see if the replicas were real.

**First-token time** counts from when a request was due to the first byte of its answer's body.
**Goodput** is defined thus. A request is good if it was answered whole, by the adapter it asked
for, with its first token within BOUND_MS. A rate is kept if at least 99 % of all its requests are
good, which is p99 of the first-token time within the bound with failures counted as late. Rates
are the steps of a geometric ladder, found by bisection; a contender's goodput is the good requests
a second of the highest step it kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from bench.measure import Misbehaved
from bench.openloop import Outcome, Shot, Volley, fire
from bench.processes import Unusable
from bench.sim import figures
from bench.sim.prefix import PrefixCache, block_keys
from bench.sim.requests import conversation_of, parse
from bench.simulated import Ground
from bench.traffic import Call, Workload, body, trace

BOUND_MS = 1000.0
KEPT = 0.99
#: How long the last requests of a run may take, in simulated seconds, before they are given up.
PATIENCE_S = 8.0

#: Beyond these, and beyond a plan's `late_ms`, it is not the gateway that is measured.
SENDER_SHARE = 0.6
LOAD_CORE_SHARE = 0.92
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. The ladder's steps are `first_rate * step**n`.

    `late_ms` of the wall clock is how late the sender may be with the latest 1 % of requests.
    """

    speed: float = 2.5
    common_rate: float = 16.0
    common_requests: int = 4000
    ladder_s: float = 30.0
    first_rate: float = 10.0
    step: float = 1.12
    steps: int = 24
    late_ms: float = 10.0
    workload: Workload = field(default_factory=Workload)

    def rate(self, number: int) -> float:
        return self.first_rate * self.step**number


@dataclass(frozen=True, slots=True)
class Figures:
    """One run at one rate."""

    rate: float
    requests: int
    good: int
    failed: int
    goodput: float
    kept: bool
    p50_ms: float
    p99_ms: float
    counts: dict[str, float]
    late_p99_ms: float
    sender_share: float
    simulator_share: float
    gateway_share: float
    troubles: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Ask:
    """How a contender is asked: by which names, with which header lines beside those of all."""

    model: Callable[[int], str]
    answered_by: Callable[[int], str]
    headers: Callable[[int], str]


def cold(ground: Ground, plan: Plan, ask: Ask) -> Figures:
    """From replicas that hold nothing, `common_requests` at a rate that everyone should bear."""
    calls = trace(plan.workload, plan.common_rate, plan.common_requests)
    return _run(ground, plan, ask, calls, plan.common_rate, attempts=1)


def most_cached_tokens(plan: Plan) -> int:
    """Prefix-hit tokens of the cold run if every prefix were computed once and never forgotten."""
    cache = PrefixCache(1 << 40)
    size = figures.read().block_tokens
    found = 0
    for call in trace(plan.workload, plan.common_rate, plan.common_requests):
        ask = parse(body(plan.workload, call, "any"))
        keys = block_keys(str(call.adapter), conversation_of(ask), size)
        found += cache.leading(keys) * size
        cache.add(keys)
    return found


def limit(ground: Ground, plan: Plan, ask: Ask, tell: Callable[[Figures], None]) -> list[Figures]:
    """Bisect the ladder with warm replicas; every run that was needed, by rate."""
    low, high = -1, plan.steps
    runs: dict[int, Figures] = {}
    while high - low > 1:
        middle = (low + high) // 2
        rate = plan.rate(middle)
        calls = trace(plan.workload, rate, int(rate * plan.ladder_s))
        runs[middle] = run = _run(ground, plan, ask, calls, rate, attempts=ATTEMPTS)
        tell(run)
        low, high = (middle, high) if run.kept else (low, middle)
    return [runs[number] for number in sorted(runs)]


def goodput(runs: list[Figures]) -> float:
    return max((run.goodput for run in runs if run.kept), default=0.0)


def _run(
    ground: Ground, plan: Plan, ask: Ask, calls: list[Call], rate: float, *, attempts: int
) -> Figures:
    """One volley; again if the sender lagged, and then no figures at all."""
    for attempt in range(attempts):
        ground.quiet()
        run = _volley(ground, plan, ask, calls, rate)
        lagged = lag_of(run, plan.late_ms)
        if lagged is None:
            return run
        print(f"{ground.contender.name:<28} {lagged}", flush=True)
        if attempt + 1 < attempts:
            continue
    raise Unusable(f"{lagged}; let nothing else run on this machine, or lower the speed")


def lag_of(run: Figures, late_ms: float) -> str | None:
    """Why a run says nothing of the gateway, if it does not."""
    if run.late_p99_ms > late_ms:
        return f"1 % of the requests left {run.late_p99_ms:.1f} ms late or more"
    if run.sender_share > SENDER_SHARE:
        return f"the sender needed {run.sender_share:.0%} of its core"
    both = run.sender_share + run.simulator_share
    if both > LOAD_CORE_SHARE:
        return f"sender and simulator together needed {both:.0%} of their core"
    return None


def _volley(ground: Ground, plan: Plan, ask: Ask, calls: list[Call], rate: float) -> Figures:
    shots = [_shot(ground, plan, ask, call) for call in calls]
    before, cpu_before = ground.counts(), ground.cpu_s()
    volley = uvloop.run(fire(ground.port, shots, patience_s=PATIENCE_S / plan.speed))
    cpu_after = ground.cpu_s()
    after = ground.counts()
    gateway, simulator = (
        (now - then) / volley.wall_s for now, then in zip(cpu_after, cpu_before, strict=True)
    )
    return _figures(
        volley,
        plan.speed,
        rate,
        seconds=calls[-1].due_s,
        counts={name: after[name] - before[name] for name in after},
        shares=(simulator, gateway),
    )


def _shot(ground: Ground, plan: Plan, ask: Ask, call: Call) -> Shot:
    content = body(plan.workload, call, ask.model(call.adapter))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{ground.port}\r\n"
        f"authorization: Bearer {ground.contender.key}\r\ncontent-type: application/json\r\n"
        f"x-user-id: {call.user}\r\n{ask.headers(call.adapter)}"
        f"content-length: {len(content)}\r\n\r\n"
    )
    # The simulator's answer begins with the adapter that gave it: the answer's, not the label's.
    expected = f'"content":"{ask.answered_by(call.adapter)}"'.encode()
    return Shot(call.due_s / plan.speed, head.encode() + content, expected)


def _figures(
    volley: Volley,
    speed: float,
    rate: float,
    *,
    seconds: float,
    counts: dict[str, float],
    shares: tuple[float, float],
) -> Figures:
    scale = speed * 1000
    outcomes = volley.outcomes
    wrong = [each for each in outcomes if each.trouble == "another adapter answered"]
    if wrong:
        raise Misbehaved(f"{len(wrong)} requests were answered by another adapter")
    first_ms = sorted(_first_ms(each, scale) for each in outcomes)
    good = sum(ms <= BOUND_MS for ms in first_ms)
    late = sorted(each.late_s for each in outcomes)
    troubles = sorted({each.trouble for each in outcomes if each.trouble})
    return Figures(
        rate=rate,
        requests=len(outcomes),
        good=good,
        failed=sum(not each.whole for each in outcomes),
        goodput=good / seconds,
        kept=good >= KEPT * len(outcomes),
        p50_ms=percentile(first_ms, 0.5),
        p99_ms=percentile(first_ms, 0.99),
        counts=counts,
        late_p99_ms=percentile(late, 0.99) * 1000,
        sender_share=volley.cpu_share,
        simulator_share=shares[0],
        gateway_share=shares[1],
        troubles=troubles[:3],
    )


def _first_ms(outcome: Outcome, scale: float) -> float:
    """A failed request came never: a number larger than any, and still JSON."""
    if not outcome.whole or outcome.first_s is None:
        return 1e9
    return outcome.first_s * scale


def percentile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
