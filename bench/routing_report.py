"""From figures of the routing bench to something to read: targets, one JSON file and one page.

What comes in: each contender's runs, the batch, the decisions. What goes out: `routing.json` with
all of them and `routing.md`. Pure, but for the two files it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.batch_scale import Scaling
from bench.contest import (
    BOUND_MS,
    KEPT,
    Figures,
    Plan,
    goodput,
    most_cached_tokens,
)
from bench.decisions import Decisions

OURS = "loragate"
#: Policies as any client meets them. With a header that names the adapter, the client does the
#: router's work; the second set of targets compares with that.
UNAIDED = (
    "vllm-router-round-robin",
    "vllm-router-cache-aware",
    "vllm-router-consistent-hash",
)
AIDED = "vllm-router-hash-adapter"


@dataclass(slots=True)
class Record:
    """What became of one contender."""

    name: str
    title: str
    versions: Mapping[str, str] = field(default_factory=dict)
    cold: Figures | None = None
    ladder: list[Figures] = field(default_factory=list)
    goodputs: list[float] = field(default_factory=list)
    trouble: str | None = None

    @property
    def goodput(self) -> float:
        return goodput(self.ladder)

    def count(self, name: str) -> float | None:
        return self.cold.counts[name] if self.cold else None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "versions": dict(self.versions),
            "trouble": self.trouble,
            "goodput": round(self.goodput, 2),
            "goodput_by_round": self.goodputs,
            "cold": self.cold.as_json() if self.cold else None,
            "ladder": [run.as_json() for run in self.ladder],
        }


@dataclass(frozen=True, slots=True)
class Conditions:
    """How, where and when it was measured."""

    date: str
    machine: str
    commit: str | None
    load_average: float
    replicas: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bound that we hold ourselves to, and what was measured; None if it was not."""

    what: str
    bound: str
    measured: float | None
    kept: bool

    def line(self) -> str:
        if self.measured is None:
            return f"| {self.what} | {self.bound} | - | not measured |"
        told = "kept" if self.kept else "missed"
        return f"| {self.what} | {self.bound} | {self.measured:.2f} | {told} |"


def write(
    records: Sequence[Record],
    conditions: Conditions,
    plan: Plan,
    batch: Scaling | str | None,
    decided: Decisions | None,
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = judge(records, batch, decided)
    document = {
        "conditions": asdict(conditions),
        "plan": asdict(plan),
        "bound_ms": BOUND_MS,
        "kept_part": KEPT,
        "contenders": [record.as_json() for record in records],
        "batch": asdict(batch) if isinstance(batch, Scaling) else batch,
        "decisions": asdict(decided) if decided else None,
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    (folder / "routing.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "routing.md").write_text(page(records, conditions, plan, batch, decided, verdicts))


def judge(
    records: Sequence[Record], batch: Scaling | str | None, decided: Decisions | None
) -> list[Verdict]:
    found = {record.name: record for record in records if record.cold}
    verdicts = []
    for names, whom in ((UNAIDED, "the best policy"), ((AIDED,), "consistent_hash with a header")):
        theirs = [found[name] for name in names if name in found]
        ours = found.get(OURS)
        verdicts += [
            _at_most(f"adapter loads, of {whom}", 0.2, _part(ours, theirs, _loads, min)),
            _at_least(f"goodput, of {whom}", 1.5, _part(ours, theirs, _goodput, max)),
            _at_least(f"prefix-hit tokens, of {whom}", 1.2, _part(ours, theirs, _hits, max)),
        ]
    ratio = batch.ratio if isinstance(batch, Scaling) else None
    verdicts.append(_at_least("a batch over four replicas, times as fast as over one", 3.6, ratio))
    pick_us = decided.pick_us if decided else None
    plan_ms = max(decided.plan_ms, decided.replan_ms) if decided else None
    verdicts.append(_at_most("a pick at 64 replicas and 5,000 adapters, µs", 15, pick_us))
    verdicts.append(_at_most("a plan at 64 replicas and 5,000 adapters, ms", 50, plan_ms))
    return verdicts


def _loads(record: Record) -> float:
    return record.count("adapter_loads") or 0.0


def _goodput(record: Record) -> float:
    return record.goodput


def _hits(record: Record) -> float:
    return record.count("prefix_hit_tokens") or 0.0


def _part(
    ours: Record | None,
    theirs: Sequence[Record],
    figure: Callable[[Record], float],
    best: Callable[..., float],
) -> float | None:
    if ours is None or not theirs:
        return None
    against = best(figure(each) for each in theirs)
    return figure(ours) / against if against else None


def _at_most(what: str, bound: float, measured: float | None) -> Verdict:
    return Verdict(what, f"≤ {bound:g}", measured, measured is not None and measured <= bound)


def _at_least(what: str, bound: float, measured: float | None) -> Verdict:
    return Verdict(what, f"≥ {bound:g}", measured, measured is not None and measured >= bound)


def page(
    records: Sequence[Record],
    conditions: Conditions,
    plan: Plan,
    batch: Scaling | str | None,
    decided: Decisions | None,
    verdicts: Sequence[Verdict],
) -> str:
    parts = [
        _preface(conditions, plan, Worst.of(records)),
        _table(records),
        f"With every prefix computed once and never forgotten, {most_cached_tokens(plan):,} tokens "
        "would be hit.\n",
        "## What loragate holds itself to\n",
        "| | bound | measured | |\n|---|---:|---:|---|",
        *(verdict.line() for verdict in verdicts),
        "",
        "## A batch\n",
        _batch(batch),
        "## Decisions\n",
        _decisions(decided),
        "## Versions\n",
        *(_versions(record) for record in records if record.versions),
        "",
    ]
    return "\n".join(parts)


def _preface(c: Conditions, plan: Plan, worst: Worst) -> str:
    commit = f" at commit {c.commit}" if c.commit else ""
    work = plan.workload
    return f"""# Routing

Measured {c.date}{commit}. Machine: {c.machine}; load average {c.load_average:.2f} before the start.

{c.replicas} simulated vLLM replicas (`bench/sim`; figures of an 8B model on an H100 in
`bench/sim_figures.toml`: 8 GPU slots and 64 CPU slots each), {work.adapters} adapters asked for by
Zipf's law with exponent {work.exponent:g}, {work.systems_each} system prompts of
{work.system_tokens:,} tokens for each. Arrivals are Poisson, seeded, open loop, and the same for
all. Times are simulated; the simulation ran {plan.speed:g} times as fast as real replicas would,
and so every second of a gateway's own periods (health, placement) counted for {plan.speed:g}.

loragate loads adapters over HTTP; vllm-router loads none, so its replicas load an unknown model on
first use, as vLLM's resolver plugins do. Both count, and so does an adapter that is read again
after its replica had evicted it. All get the same bytes, with an `x-user-id` of one of the
adapter's {work.users_each} users, which vllm-router's consistent_hash goes by; without any such
header it sends every chat to one replica. It runs once more with an `x-session-id` that names the
adapter, which it goes by first: clients that route, in effect.

**Cold:** {plan.common_requests:,} requests at {plan.common_rate:g}/s, to replicas that hold
nothing. **Goodput:** a request is good if it was answered whole and by its adapter, with its first
token within {BOUND_MS:,.0f} ms of when it was due. A rate is kept if {KEPT:.0%} of its requests are
good (p99 within the bound, failures counted as late). Rates are {plan.first_rate:g}/s times powers
of {plan.step:g}, up to {plan.rate(plan.steps - 1):.0f}/s, {plan.ladder_s:g} s each on warm
replicas, found by bisection; goodput is that of the highest rate kept.

Contenders ran at the same time, each with replicas and a sender of its own: gateways on one core,
everything else on another. Hashes depend on the replicas' ports, which differ from round to round:
by luck, a consistent hash puts more or fewer of the popular adapters on one replica.
The sender is no bottleneck: it used {worst.sender_share:.0%} of a core at most and a simulator
{worst.simulator_share:.0%}; 99 % of the requests of any run left within {worst.late_p99_ms:.1f} ms
of when they were due, and what they were late counts as first-token time. Runs in which that is
more than {plan.late_ms:g} ms are refused.
"""


@dataclass(frozen=True, slots=True)
class Worst:
    """The sender's worst of all runs."""

    sender_share: float
    simulator_share: float
    late_p99_ms: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> Worst:
        runs = [run for each in records for run in (each.cold, *each.ladder) if run]
        return cls(
            max((run.sender_share for run in runs), default=0.0),
            max((run.simulator_share for run in runs), default=0.0),
            max((run.late_p99_ms for run in runs), default=0.0),
        )


def _table(records: Sequence[Record]) -> str:
    head = (
        "| | loads, cold | loads per 1,000, warm | slot swaps | prefix-hit tokens "
        "| p50 ms | p99 ms | failed | goodput /s |"
    )
    lines = [head, "|---|" + "---:|" * 8]
    for record in records:
        run = record.cold
        if run is None or record.trouble:
            lines.append(f"| {record.title} | {record.trouble} |" + " |" * 7)
            continue
        counts = run.counts
        hit = counts["prefix_hit_tokens"] / max(1, counts["prefix_queried_tokens"])
        cells = [
            f"{counts['adapter_loads']:,.0f}",
            _warm_loads(record),
            f"{counts['slot_swaps']:,.0f}",
            f"{counts['prefix_hit_tokens']:,.0f} ({hit:.0%})",
            _ms(run.p50_ms),
            _ms(run.p99_ms),
            f"{run.failed}",
            f"{record.goodput:.1f}" if record.goodput else "none kept",
        ]
        lines.append(f"| {record.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _warm_loads(record: Record) -> str:
    """At the highest rate kept."""
    kept = [run for run in record.ladder if run.kept]
    if not kept:
        return "-"
    return f"{kept[-1].counts['adapter_loads'] / kept[-1].requests * 1000:,.0f}"


def _ms(value: float) -> str:
    return "never" if value >= 1e8 else f"{value:,.0f}"


def _batch(batch: Scaling | str | None) -> str:
    if not isinstance(batch, Scaling):
        return f"{batch or 'Not measured.'}\n"
    each = ", ".join(map(str, batch.prompts_each))
    return (
        f"One call with {batch.prompts} prompts of {batch.prompt_tokens} tokens, each its own, one "
        f"token and its logprob asked for: {batch.one_s:.2f} s over one replica, "
        f"{batch.several_s:.2f} s over {batch.replicas} ({batch.ratio:.2f} times as fast; prompts "
        f"by replica: {each}).\n"
    )


def _decisions(decided: Decisions | None) -> str:
    if decided is None:
        return "Not measured.\n"
    return (
        f"At {decided.replicas} replicas and {decided.adapters:,} adapters: "
        f"{decided.pick_us:.1f} µs to pick a replica for an adapter and "
        f"{decided.pick_base_us:.1f} µs for the base; {decided.plan_ms:.1f} ms to plan from "
        f"nothing and {decided.replan_ms:.1f} ms to plan again after demand moved.\n"
    )


def _versions(record: Record) -> str:
    named = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"- {record.title}: {named}"
