"""From figures to something to read: medians, ratios, targets, one JSON file and one page.

What comes in: every round's figures by contender. What goes out: `overhead.json` with all of
them and `overhead.md` with their medians. Pure, but for the two files it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import Figures

REFERENCE = "vllm-router-round-robin"
CACHE_AWARE = "vllm-router-cache-aware"
OURS = "loragate-compiled"
OURS_PURE = "loragate"
OURS_FULL = "loragate-10k"


@dataclass(slots=True)
class Record:
    """What became of one contender: its rounds, or why there are none."""

    name: str
    title: str
    versions: Mapping[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Figures]] = field(default_factory=list)
    trouble: str | None = None

    def middle(self, load: str, figure: str) -> float | None:
        """The median of a figure over all rounds."""
        found = [getattr(each[load], figure) for each in self.rounds if load in each]
        known = [value for value in found if value is not None]
        return median(known) if known else None

    def as_json(self) -> dict[str, Any]:
        loads = sorted({load for each in self.rounds for load in each})
        return {
            "name": self.name,
            "title": self.title,
            "versions": dict(self.versions),
            "trouble": self.trouble,
            "median": {load: self._medians(load) for load in loads},
            "rounds": [
                {load: figures.as_json() for load, figures in each.items()} for each in self.rounds
            ],
        }

    def _medians(self, load: str) -> dict[str, float | None]:
        names = Figures.__dataclass_fields__
        found = {name: self.middle(load, name) for name in names}
        return {name: None if value is None else round(value, 2) for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Conditions:
    """How, where and when it was measured."""

    date: str
    machine: str
    commit: str | None
    rounds: int
    seconds: int
    load_average: float
    chunks_per_reply: int
    chunk_gap_ms: float


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio we hold ourselves to.

    The compiled build is judged where `ours` is that; `pure` gives the ratio without judging it.
    """

    what: str
    figure: tuple[str, str]
    ours: str
    theirs: str
    at_most: float
    at_least: float = 0.0

    def judge(self, records: Mapping[str, Record]) -> tuple[float, bool] | None:
        """The ratio and whether it is within bounds; None if either side was not measured."""
        ratio = self._ratio(records, self.ours)
        return None if ratio is None else (ratio, self.at_least <= ratio <= self.at_most)

    def pure(self, records: Mapping[str, Record]) -> float | None:
        """The ratio of the build in pure Python, where `ours` is the compiled one."""
        return self._ratio(records, OURS_PURE) if self.ours == OURS else None

    def _ratio(self, records: Mapping[str, Record], name: str) -> float | None:
        if name not in records or self.theirs not in records:
            return None
        ours = records[name].middle(*self.figure)
        theirs = records[self.theirs].middle(*self.figure)
        return ours / theirs if ours and theirs else None


CPU_REPLY = ("reply_16", "cpu_us")
CPU_CHUNK = ("stream_64", "cpu_us")

TARGETS = (
    Target("CPU per request, of vllm-router round_robin: goal", CPU_REPLY, OURS, REFERENCE, 1.0),
    Target("CPU per request, of vllm-router round_robin: limit", CPU_REPLY, OURS, REFERENCE, 1.3),
    Target("CPU per request, of vllm-router cache_aware", CPU_REPLY, OURS, CACHE_AWARE, 0.5),
    Target("CPU per streamed chunk, of vllm-router", CPU_CHUNK, OURS, REFERENCE, 1.1),
    Target("p50 at one connection, of vllm-router", ("reply_1", "p50_us"), OURS, REFERENCE, 1.0),
    Target(
        "CPU per request with 10,000 adapters, of one (pure)",
        CPU_REPLY,
        OURS_FULL,
        OURS_PURE,
        1.05,
        0.95,
    ),
    Target(
        "CPU per chunk with 10,000 adapters, of one (pure)",
        CPU_CHUNK,
        OURS_FULL,
        OURS_PURE,
        1.05,
        0.95,
    ),
)


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of one load, and how to write it."""

    heading: str
    load: str
    figure: str
    write: Callable[[float], str]


def _micro(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("CPU µs/request", "reply_16", "cpu_us", _micro),
    Column("requests/s", "reply_16", "requests_per_s", _whole),
    Column("p50 µs, 16 conn.", "reply_16", "p50_us", _whole),
    Column("p99 µs, 16 conn.", "reply_16", "p99_us", _whole),
    Column("p50 µs, 1 conn.", "reply_1", "p50_us", _whole),
    Column("p99 µs, 1 conn.", "reply_1", "p99_us", _whole),
    Column("CPU µs/chunk", "stream_64", "cpu_us", _micro),
    Column("chunks/s", "stream_64", "units_per_s", _whole),
    Column("memory MB", "reply_16", "resident_mb", _whole),
)


def write(records: Sequence[Record], conditions: Conditions, folder: Path) -> None:
    """Both files; the JSON one has every round."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "conditions": {name: getattr(conditions, name) for name in Conditions.__dataclass_fields__},
        "contenders": [record.as_json() for record in records],
    }
    (folder / "overhead.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "overhead.md").write_text(page(records, conditions))


def page(records: Sequence[Record], conditions: Conditions) -> str:
    """The whole page, in Markdown."""
    by_name = {record.name: record for record in records}
    parts = [
        _preface(conditions, spread(records)),
        table(records),
        "## In proportion to vllm-router, round_robin\n",
        ratios(records, by_name.get(REFERENCE)),
        "## What loragate holds itself to\n",
        _JUDGED,
        targets(by_name),
        "## Versions\n",
        _versions(records),
    ]
    return "\n".join(parts)


_JUDGED = """\
Bounds are for the compiled build, unless a line says pure; beside it, and not judged, stands what
the build in pure Python has.
"""


def table(records: Sequence[Record]) -> str:
    """Medians, absolute."""
    return _grid(records, lambda record, column: _cell(record, column))


def ratios(records: Sequence[Record], reference: Record | None) -> str:
    """The same cells divided by the reference's."""

    def cell(record: Record, column: Column) -> str:
        base = reference.middle(column.load, column.figure) if reference else None
        value = record.middle(column.load, column.figure)
        return f"{value / base:.2f}" if base and value is not None else "-"

    return _grid(records, cell)


def targets(by_name: Mapping[str, Record]) -> str:
    lines = ["| | bound | measured | | pure Python |", "|---|---:|---:|---|---:|"]
    for target in TARGETS:
        bound = f"≤ {target.at_most:.2f}"
        if target.at_least:
            bound = f"{target.at_least:.2f} to {target.at_most:.2f}"
        pure = target.pure(by_name)
        beside = "" if pure is None else f"{pure:.3f}"
        judged = target.judge(by_name)
        if judged is None:
            lines.append(f"| {target.what} | {bound} | - | not measured | {beside} |")
            continue
        ratio, kept = judged
        verdict = "kept" if kept else "missed"
        lines.append(f"| {target.what} | {bound} | {ratio:.3f} | {verdict} | {beside} |")
    return "\n".join(lines) + "\n"


def spread(records: Sequence[Record]) -> float:
    """The farthest that a round's CPU per request is from the median, as a part of that."""
    worst = 0.0
    for record in records:
        middle = record.middle(*CPU_REPLY)
        for each in record.rounds:
            figures = each.get("reply_16")
            if middle and figures and figures.cpu_us:
                worst = max(worst, abs(figures.cpu_us / middle - 1))
    return worst


def _preface(conditions: Conditions, noise: float) -> str:
    c = conditions
    commit = f" at commit {c.commit}" if c.commit else ""
    measured = f"Measured {c.date}{commit}, medians of {c.rounds} round(s) of {c.seconds} s a load."
    machine = f"Machine: {c.machine}; load average {c.load_average:.2f} before the start."
    stream = f"{c.chunks_per_reply} chunks, one every {c.chunk_gap_ms:g} ms"
    return f"""# Gateway overhead

{measured}
{machine}

The gateway has one core; two null replicas and wrk share the other. Contenders take turns, each
started afresh in every round, with no other alive. CPU is user and system time of the gateway's
whole process tree: per request at 16 connections, and per streamed chunk at 64 connections
(replies of {stream}). Meanwhile loragate checks an API key, routes an
adapter's name through its registry, counts metrics and bills usage; LiteLLM checks its master key;
the others let everybody in. Two builds of loragate run: compiled, as in its container image, and
pure Python, as pip installs it unless asked; the code is the same. Every reply was checked for
success. Compare figures of one run only: CPU per request of a round was up to {noise:.0%} away
from the median.
"""


def _grid(records: Sequence[Record], cell: Callable[[Record, Column], str]) -> str:
    head = "| | " + " | ".join(column.heading for column in COLUMNS) + " |"
    rule = "|---|" + "---:|" * len(COLUMNS)
    lines = [head, rule]
    for record in records:
        cells = [cell(record, column) for column in COLUMNS]
        if record.trouble:
            cells = [record.trouble, *[""] * (len(COLUMNS) - 1)]
        lines.append(f"| {record.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(record: Record, column: Column) -> str:
    value = record.middle(column.load, column.figure)
    return "-" if value is None else column.write(value)


def _versions(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        if record.versions:
            named = ", ".join(f"{name} {version}" for name, version in record.versions.items())
            lines.append(f"- {record.title}: {named}")
    return "\n".join(lines) + "\n"
