"""From rounds of prompt batches to a page: medians, ratios, targets kept or missed.

What comes in: every round's seconds, calls and hits by way of asking. What goes out:
`batching.json` with all of them and `batching.md` with their medians. Pure, but for these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

TITLES = {
    "batch": "one batch, straight to vLLM",
    "batch_gateway": "one batch, through the gateway",
    "singles_gateway": "all at once, through the gateway",
    "singles": "all at once, straight to vLLM",
    "in_turn": "one after another, straight to vLLM",
}


@dataclass(frozen=True, slots=True)
class Round:
    """One way once: seconds, calls that reached vLLM, and the part of tokens its cache had.

    `gateway_cpu_s` is what the gateway's process used meanwhile, in ticks of 10 ms.
    """

    seconds: float
    calls: int
    hit_rate: float
    gateway_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Low:
    """Milliseconds of a single request when nothing else is asked, with coalescing and without.

    `added_ms` is the median of the differences within a pair.
    """

    on_ms: float
    off_ms: float
    added_ms: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Conditions:
    """How, where and when it was measured."""

    date: str
    machine: str
    commit: str | None
    load_average: float
    load_average_after: float
    prompts: int
    shared_tokens: int
    own_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """A bound we hold ourselves to, and what was found."""

    what: str
    bound: str
    found: str
    kept: bool


Rounds = Mapping[str, Sequence[Round]]


def ratio(rounds: Rounds, way: str, of: str) -> float:
    """The median, over the rounds that both took part in, of seconds by the other's seconds."""
    pairs = zip(rounds[way], rounds[of], strict=False)
    return median(one.seconds / other.seconds for one, other in pairs)


def targets(rounds: Rounds, bare: Low) -> list[Target]:
    batch = ratio(rounds, "batch_gateway", "batch")
    singles = ratio(rounds, "singles_gateway", "batch_gateway")
    calls = max(each.calls for each in rounds["singles_gateway"])
    compared = ("batch_gateway", "singles_gateway")
    hits = min(each.hit_rate for way in compared for each in rounds[way])
    added = f"{bare.added_ms:+.2f} ms"
    return [
        Target("The batch through the gateway, of it sent straight", "≤ 1.03", f"{batch:.3f}",
               batch <= 1.03),
        Target("All at once through the gateway, of the batch there", "≤ 1.05", f"{singles:.3f}",
               singles <= 1.05),
        Target("Calls that reach vLLM for all at once, worst round", "≤ 8", str(calls),
               calls <= 8),
        Target("Prefix-cache hits through the gateway, worst round", "≥ 98 %", f"{hits:.1%}",
               hits >= 0.98),
        Target("What coalescing adds at one connection, bare replica", "≤ 0.2 ms", added,
               bare.added_ms <= 0.2),
    ]  # fmt: skip


def page(rounds: Rounds, low: Low, bare: Low, conditions: Conditions) -> str:
    """The whole page, in Markdown."""
    c = conditions
    commit = f" at commit {c.commit}" if c.commit else ""
    lines = [
        "# Prompt batches and single prompts",
        "",
        f"Measured {c.date}{commit}, medians of the rounds given; ratios are medians of the ratios "
        "within a round.",
        f"Machine: {c.machine}; load average {c.load_average:.2f} before the start, "
        f"{c.load_average_after:.2f} at the end, this benchmark's own included.",
        "",
        "A real vLLM on the CPU with the demo model in float32 and a LoRA adapter is asked for "
        f"the next token's logprobs (`max_tokens` 1, `logprobs` 5) after {c.prompts} prompts of "
        f"{c.shared_tokens + c.own_tokens} token ids, {c.shared_tokens} of them shared. Every "
        "measurement has a prefix that vLLM has not seen and pays for it once. The ways take "
        "turns; vLLM, gateway and client share the machine's cores. Connections are open before "
        "the clock starts. Calls and hits are vLLM's own counts. Before the first round all ways "
        "gave the same logprobs for the same prompts.",
        "",
        "| | rounds | calls to vLLM | seconds | fastest | slowest | of the batch sent straight "
        "| prefix-cache hits |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(rounds, way) for way in TITLES),
        "",
        "One request after another over one connection, coalescing on and off by turns:",
        "",
        "| | pairs | p50 on, ms | p50 off, ms | median difference, ms |",
        "|---|---:|---:|---:|---:|",
        _low_line("vLLM", low),
        _low_line("a replica that answers at once", bare),
        "",
        f"The gateway's own CPU, on average: {_cpu_ms(rounds, 'batch_gateway'):.0f} ms for the "
        f"batch, {_cpu_ms(rounds, 'singles_gateway'):.0f} ms for the {c.prompts} requests at once.",
        "",
        "## What loragate holds itself to",
        "",
        "| | bound | measured | |",
        "|---|---:|---:|---|",
        *(
            f"| {t.what} | {t.bound} | {t.found} | {'kept' if t.kept else 'missed'} |"
            for t in targets(rounds, bare)
        ),
        "",
    ]
    return "\n".join(lines)


def write(rounds: Rounds, low: Low, bare: Low, conditions: Conditions, folder: Path) -> None:
    """Both files; the JSON one has every round."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "conditions": asdict(conditions),
        "median_s": {way: round(_seconds(found), 4) for way, found in rounds.items()},
        "low_load": {"vllm": asdict(low), "null": asdict(bare)},
        "targets": [asdict(target) for target in targets(rounds, bare)],
        "rounds": {way: [asdict(each) for each in found] for way, found in rounds.items()},
    }
    (folder / "batching.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "batching.md").write_text(page(rounds, low, bare, conditions))


def _line(rounds: Rounds, way: str) -> str:
    found = rounds[way]
    seconds = [each.seconds for each in found]
    calls = sorted({each.calls for each in found})
    told = str(calls[0]) if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    hits = median(each.hit_rate for each in found)
    return (
        f"| {TITLES[way]} | {len(found)} | {told} | {median(seconds):.3f} | {min(seconds):.3f} "
        f"| {max(seconds):.3f} | {ratio(rounds, way, 'batch'):.3f} | {hits:.1%} |"
    )


def _low_line(replica: str, low: Low) -> str:
    return f"| {replica} | {low.pairs} | {low.on_ms:.2f} | {low.off_ms:.2f} | {low.added_ms:+.2f} |"


def _cpu_ms(rounds: Rounds, way: str) -> float:
    """A mean: ticks are too coarse for a median."""
    return 1000 * sum(each.gateway_cpu_s for each in rounds[way]) / len(rounds[way])


def _seconds(found: Sequence[Round]) -> float:
    return median(each.seconds for each in found)
