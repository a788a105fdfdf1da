"""From rounds of training to a page: medians, ratios, targets kept or missed.

What comes in: seconds of eight runs at once and in turn, steps a second beside SkyRL, and how long
after the last step an adapter spoke. What goes out: `training.json` with all of them and
`training.md` with their medians. Pure, but for these files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True)
class Eight:
    """Eight runs of `steps` steps once together and once one after another, in seconds.

    `apart` is the largest difference between two numbers of one run's adapter, trained in company
    and alone; whole jobs are not compared.
    """

    steps: int
    together_s: float
    in_turn_s: float
    apart: float | None = None

    @property
    def ratio(self) -> float:
        return self.together_s / self.in_turn_s


@dataclass(frozen=True, slots=True)
class Beside:
    """Steps of eight adapters each, ours and SkyRL's in turn.

    Steps a second are of one adapter; losses are the mean over runs at the first step and the
    last.
    """

    ours_per_s: float
    theirs_per_s: float
    our_losses: tuple[float, float]
    their_losses: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.ours_per_s / self.theirs_per_s


@dataclass(frozen=True, slots=True)
class Ending:
    """Seconds from a job's last optimizer step: until its model's name could be read, and until
    the first token.
    """

    named_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Conditions:
    """How, where and when it was measured. `same_start` is how far the first loss of SkyRL is
    from ours, before anything was learnt.
    """

    date: str
    machine: str
    commit: str | None
    load_average: float
    load_average_after: float
    threads: int | None
    versions: Mapping[str, str]
    same_start: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Everything of a run, by the shape of a batch or by the way a client learns a name."""

    runs: Mapping[str, Sequence[Eight]]
    jobs: Mapping[str, Sequence[Eight]]
    beside: Mapping[str, Sequence[Beside]]
    endings: Mapping[str, Sequence[Ending]]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound we hold ourselves to, and what was found."""

    what: str
    bound: str
    found: str
    kept: bool


#: How the client learns the model's name.
WAYS = {
    "job": "asks for the job every 50 ms",
    "models": "asks for the list of models every 50 ms",
}


def p95(values: Sequence[float]) -> float:
    """The value that 95 in 100 do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def targets(found: Found) -> list[Target]:
    """The bounds, for every shape that was measured."""
    judged = []
    for kind, measured in (("runs", found.runs), ("jobs", found.jobs)):
        for shape, rounds in measured.items():
            ratio = median(each.ratio for each in rounds)
            judged.append(
                Target(f"Eight {kind} at once, of them in turn, {shape}", "≤ 0.5", f"{ratio:.2f}",
                       ratio <= 0.5)
            )  # fmt: skip
    apart = [each.apart for rounds in found.runs.values() for each in rounds]
    if known := [each for each in apart if each is not None]:
        judged.append(
            Target("An adapter trained in company from it trained alone", "≤ 1e-4",
                   f"{max(known):.1e}", max(known) <= 1e-4)
        )  # fmt: skip
    for shape, contest in found.beside.items():
        ratio = median(each.ratio for each in contest)
        judged.append(
            Target(f"Steps a second at eight adapters, of SkyRL's, {shape}", "≥ 1.5",
                   f"{ratio:.2f}", ratio >= 1.5)
        )  # fmt: skip
    for way, endings in found.endings.items():
        late = p95([each.token_s for each in endings])
        judged.append(
            Target(f"Last step to first token, p95, client {WAYS[way]}", "< 1 s",
                   f"{late:.2f} s", late < 1)
        )  # fmt: skip
    return judged


def page(found: Found, conditions: Conditions) -> str:
    """The whole page, in Markdown; what was not measured is left out."""
    parts = [_head(conditions)]
    if found.runs or found.jobs:
        parts.append(_eight(found))
    if found.beside:
        parts.append(_beside(found.beside, conditions))
    if found.endings:
        parts.append(_endings(found.endings))
    parts.append(_judged(found))
    return "\n".join(line for part in parts for line in part)


def write(found: Found, conditions: Conditions, folder: Path) -> None:
    """Both files; the JSON one has every round."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "conditions": asdict(conditions),
        "targets": [asdict(target) for target in targets(found)],
        **asdict(found),
    }
    (folder / "training.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "training.md").write_text(page(found, conditions))


def _head(c: Conditions) -> list[str]:
    commit = f" at commit {c.commit}" if c.commit else ""
    threads = f"{c.threads} torch thread(s)" if c.threads else "torch threads as the worker chooses"
    return [
        "# Training",
        "",
        f"Measured {c.date}{commit}, medians of the rounds given; ratios are medians of the ratios "
        "within a round.",
        f"Machine: {c.machine}; load average {c.load_average:.2f} before the start, "
        f"{c.load_average_after:.2f} at the end, this benchmark's own included.",
        "",
        "The demo model in float32 on the CPU, LoRA of rank 16 on all linears but the output "
        f"layer, a `loragate worker` with {threads}. A batch of 4 x 64 is four sequences of 64 "
        "tokens; a step is a forward and backward pass over one and an AdamW step. Server and "
        "client share the machine's cores.",
        "",
    ]


def _eight(found: Found) -> list[str]:
    lines = [
        "## Eight at once",
        "",
        "Runs are driven through the worker's op protocol, two steps handed over ahead. Jobs go "
        "through a gateway with OpenAI's client, submitted at once to one that gives the worker "
        "eight at a time, and to one that gives it one.",
        "",
        "| | batch | rounds | steps each | at once, s | in turn, s | ratio | steps/s at once "
        "| numbers of an adapter apart |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, measured in (("runs", found.runs), ("jobs", found.jobs)):
        for shape, rounds in measured.items():
            together = median(each.together_s for each in rounds)
            alone = median(each.in_turn_s for each in rounds)
            apart = [each.apart for each in rounds if each.apart is not None]
            lines.append(
                f"| {kind} | {shape} | {len(rounds)} | {rounds[0].steps} | {together:.2f} "
                f"| {alone:.2f} | {median(each.ratio for each in rounds):.2f} "
                f"| {8 * rounds[0].steps / together:.1f} "
                f"| {f'{max(apart):.1e}' if apart else ''} |"
            )
    return [*lines, ""]


def _beside(beside: Mapping[str, Sequence[Beside]], c: Conditions) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    lines = [
        "## Beside SkyRL",
        "",
        f"{versions}. Its Tinker API server with the JAX backend and the Tinker SDK, against our "
        "worker and its op protocol: eight clients at once, each two steps ahead, the same model, "
        "tokens, rank, alpha and optimizer, every token's logprob sent back by both. The two take "
        "turns on the same cores. SkyRL had compiled for every size of a pass before the first "
        "round, has places for these eight adapters and no more, and keeps its defaults otherwise. "
        "First weights are drawn differently, so losses agree at the start and in trend.",
        "",
    ]
    if c.same_start is not None:
        lines += [f"Before anything was learnt the two losses differ by {c.same_start:.1e}.", ""]
    lines += [
        "| batch | rounds | loragate, steps/s | SkyRL, steps/s | ratio | our loss, first to last "
        "| SkyRL's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, rounds in beside.items():
        ours = median(each.ours_per_s for each in rounds)
        theirs = median(each.theirs_per_s for each in rounds)
        lines.append(
            f"| {shape} | {len(rounds)} | {ours:.1f} | {theirs:.1f} "
            f"| {median(each.ratio for each in rounds):.2f} "
            f"| {rounds[0].our_losses[0]:.3f} to {rounds[-1].our_losses[1]:.3f} "
            f"| {rounds[0].their_losses[0]:.3f} to {rounds[-1].their_losses[1]:.3f} |"
        )
    return [*lines, ""]


def _endings(endings: Mapping[str, Sequence[Ending]]) -> list[str]:
    lines = [
        "## From the last step to the first token",
        "",
        "A job of eight steps at a time, with OpenAI's client; once it knows the model's name it "
        "chats with it, streamed. The clock starts when the worker finished the last optimizer "
        "step, which a long poll of the worker itself tells. In between the adapter is written, "
        "probed, fetched, checked, stored, registered, published and loaded.",
        "",
        "| the client | jobs | name known, p50 | p95 | first token, p50 | p95 | slowest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way, found in endings.items():
        named, token = [each.named_s for each in found], [each.token_s for each in found]
        lines.append(
            f"| {WAYS[way]} | {len(found)} | {median(named):.3f} s | {p95(named):.3f} s "
            f"| {median(token):.3f} s | {p95(token):.3f} s | {max(token):.3f} s |"
        )
    return [*lines, ""]


def _judged(found: Found) -> list[str]:
    return [
        "## What loragate holds itself to",
        "",
        "| | bound | measured | |",
        "|---|---:|---:|---|",
        *(
            f"| {t.what} | {t.bound} | {t.found} | {'kept' if t.kept else 'missed'} |"
            for t in targets(found)
        ),
        "",
    ]
