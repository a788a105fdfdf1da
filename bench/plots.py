"""`make bench`: one plot of each benchmark, drawn from its results.

    python -m bench.plots [--results FOLDER] [--out FOLDER]

What comes in: bench/results/*.json. What goes out: docs/images/overhead.png, routing.png,
batching.png and training.png; a benchmark without results keeps the plot it has. Backgrounds are
transparent and every colour is readable on white and on GitHub's dark page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"

OURS, THEIRS, TEXT, FAINT = "#2f81f7", "#8b949e", "#768390", "#76839055"
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 160,
    "font.size": 9,
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "savefig.transparent": True,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}

Row = tuple[str, float]

#: What `bench.batching` calls its ways, in the order to draw them.
WAYS = {
    "batch": "one batch, straight to vLLM",
    "batch_gateway": "one batch, through the gateway",
    "singles_gateway": "all at once, through the gateway",
    "singles": "all at once, straight to vLLM",
    "in_turn": "one after another, straight to vLLM",
}


def overhead(document: Any) -> Figure:
    """What a gateway's own work costs: CPU a request and a chunk."""
    rows = [each for each in document["contenders"] if each["median"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.34 * len(rows) + 1.2), sharey=True)
    for ax, load, title in (
        (axes[0], "reply_16", "CPU of a request, µs (log)"),
        (axes[1], "stream_64", "CPU of a streamed chunk, µs (log)"),
    ):
        found = [(each["title"], each["median"].get(load, {}).get("cpu_us")) for each in rows]
        _bars(ax, title, [(name, cpu) for name, cpu in found if cpu])
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(low, high * 2)
    return figure


def routing(document: Any) -> Figure:
    """Where requests went: adapter loads, prefix hits, and what could be served in time."""
    rows = [each for each in document["contenders"] if each["cold"]]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.4 * len(rows) + 1.2), sharey=True)
    names = [_short(each["title"]) for each in rows]
    counts = [each["cold"]["counts"] for each in rows]
    shares = [
        100 * one["prefix_hit_tokens"] / max(1, one["prefix_queried_tokens"]) for one in counts
    ]
    bound_ms = document["bound_ms"]
    for ax, title, values in (
        (
            axes[0],
            f"adapter loads in {rows[0]['cold']['requests']:,} requests",
            [one["adapter_loads"] for one in counts],
        ),
        (axes[1], "prompt tokens found cached, %", shares),
        (
            axes[2],
            f"requests/s, p99 first token ≤ {bound_ms / 1000:g} s",
            [each["goodput"] for each in rows],
        ),
    ):
        _bars(ax, title, list(zip(names, values, strict=True)))
    return figure


def batching(document: Any) -> Figure:
    """The same prompts asked for in several ways: the median seconds and the calls of each."""
    rounds = {way: found for way, found in document["rounds"].items() if found}
    prompts = document["conditions"]["prompts"]
    figure, axis = pyplot.subplots(figsize=(7, 0.4 * len(rounds) + 1.2))
    rows = []
    for way in [
        *(way for way in WAYS if way in rounds),
        *(way for way in rounds if way not in WAYS),
    ]:
        calls = round(median(each["calls"] for each in rounds[way]))
        seconds = median(each["seconds"] for each in rounds[way])
        rows.append((f"{WAYS.get(way, way)}: {calls:,} call{'s' * (calls != 1)}", seconds))
    _bars(axis, f"{prompts} prompts with a shared prefix, seconds", rows, "through the gateway")
    return figure


def training(document: Any) -> Figure:
    """Eight runs at once by eight in turn, and steps a second beside SkyRL."""
    runs, beside = document["runs"], document["beside"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.4 * max(len(runs), 2 * len(beside)) + 1.2))
    ratios = [
        (f"loragate, {shape}", median(each["together_s"] / each["in_turn_s"] for each in rounds))
        for shape, rounds in runs.items()
    ]
    _bars(axes[0], "eight runs at once, of their time in turn", ratios)
    speeds = [
        (f"{name}, {shape}", median(each[key] for each in rounds))
        for shape, rounds in beside.items()
        for name, key in (("loragate", "ours_per_s"), ("SkyRL", "theirs_per_s"))
    ]
    _bars(axes[1], "steps/s at eight adapters", speeds)
    figure.tight_layout()
    return figure


PLOTS: dict[str, Callable[[Any], Figure]] = {
    "overhead": overhead,
    "routing": routing,
    "batching": batching,
    "training": training,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.plots", description="Draw the benchmarks.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        source = args.results / f"{name}.json"
        if not source.exists():
            print(f"{name}: no results yet")
            continue
        with pyplot.rc_context(STYLE):
            try:
                figure = draw(json.loads(source.read_text()))
            except (KeyError, IndexError, TypeError, ValueError) as exc:
                print(f"{name}: these results cannot be drawn ({exc!r})", file=sys.stderr)
                return 1
            # Without the date and the version of matplotlib, equal results give equal files.
            figure.savefig(
                args.out / f"{name}.png", bbox_inches="tight", metadata={"Software": None}
            )
            pyplot.close(figure)
        print(f"{name}: drawn")
    return 0


def _bars(axis: Axes, title: str, rows: Sequence[Row], ours: str = "loragate") -> None:
    """One bar a row, those whose name has `ours` in colour, the number at its end."""
    names = [name for name, _ in rows]
    values = [value for _, value in rows]
    colours = [OURS if ours in name else THEIRS for name in names]
    bars = axis.barh(names, values, color=colours, height=0.62)
    axis.bar_label(bars, [_number(value) for value in values], padding=3, color=TEXT)
    axis.set_title(title)
    axis.grid(axis="x", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.margins(x=0.18)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 5 else f"{value:.2f}"


def _short(title: str) -> str:
    """Titles break where they explain."""
    return title.replace(", clients send", ",\nclients send")


if __name__ == "__main__":
    sys.exit(main())
