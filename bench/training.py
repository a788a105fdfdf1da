"""What many training runs at once cost, beside SkyRL, and how soon an adapter speaks.

    python -m bench.training [--quick] [--only NAMES] [--threads N]

What goes out: bench/results/training.json and training.md. A real worker trains adapters on the
demo model: eight runs at once and one after another; the same beside SkyRL's Tinker server, in
turns; whole jobs through a gateway, until the first token of what they made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from app.domain import Trainer
from app.training.trainers import TrainerClient
from bench import machine, skyrl_peer, training_jobs, training_report
from bench.client import Unready
from bench.overhead import QUIET, RESULTS
from bench.peers import HOME
from bench.processes import Unusable, exit_on_signals
from bench.training_client import (
    Batch,
    Driven,
    Shape,
    adapters,
    distance,
    fresh,
    in_turn,
    runs_open,
    together,
    worker_running,
)
from bench.training_report import Beside, Conditions, Eight, Ending, Found

#: From what leaves a small model's overheads bare to what fills the cores with one run.
SHAPES = (Shape(1, 16), Shape(1, 64), Shape(4, 64), Shape(8, 64), Shape(4, 256))
CONTESTED = (Shape(1, 64), Shape(4, 64))
#: Conversations a batch, and steps a job: one that is nearly all its beginning and end, and one
#: of the hundred steps that the defaults aim at.
JOBS = ((1, 10), (4, 10), (1, 100), (4, 100))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: rounds, steps of a run and of a contest's round, and short jobs."""

    rounds: int
    steps: int
    contest_rounds: int
    contest_steps: int
    endings: int


THOROUGH = Plan(rounds=2, steps=10, contest_rounds=3, contest_steps=8, endings=50)
QUICK = Plan(rounds=1, steps=4, contest_rounds=2, contest_steps=3, endings=3)


@dataclass(slots=True)
class Bench:
    """What every part shares, and what they found so far."""

    plan: Plan
    scratch: Path
    trainer: Trainer
    client: TrainerClient
    runs: dict[str, list[Eight]] = field(default_factory=dict)
    jobs: dict[str, list[Eight]] = field(default_factory=dict)
    beside: dict[str, list[Beside]] = field(default_factory=dict)
    endings: dict[str, list[Ending]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    same_start: float | None = None


async def measure_runs(bench: Bench) -> None:
    """Eight runs at once and in turn, for every shape; which is first alternates."""
    for number in range(bench.plan.rounds):
        for shape in SHAPES:
            found = await _eight_runs(bench, shape, at_once_first=number % 2 == 0)
            bench.runs.setdefault(str(shape), []).append(found)
            print(f"runs {shape}: {_told(found)}, {found.apart:.1e} apart", flush=True)


async def _eight_runs(bench: Bench, shape: Shape, *, at_once_first: bool) -> Eight:
    batches, steps = shape.batches(), bench.plan.steps
    seconds, made = {}, {}
    ways = (together, in_turn) if at_once_first else (in_turn, together)
    for way in ways:
        # Warmed by others, so that those measured begin as they were made.
        async with runs_open(bench.client, f"warm-{next(fresh)}") as driven:
            await way(driven, batches, 1)
        async with runs_open(bench.client, f"run-{next(fresh)}") as driven:
            seconds[way], _ = await way(driven, batches, steps)
            made[way] = await adapters(driven)
    apart = distance(made[together], made[in_turn])
    return Eight(steps, seconds[together], seconds[in_turn], apart)


async def measure_jobs(bench: Bench) -> None:
    """Eight jobs through a gateway that starts all of them, and one that starts one at a time."""
    with (
        training_jobs.gateway_running(bench.scratch, bench.trainer, 8) as many,
        training_jobs.gateway_running(bench.scratch, bench.trainer, 1) as single,
    ):
        for _ in range(bench.plan.rounds):
            for batch, steps in JOBS:
                at_once = await training_jobs.eight(many, steps, batch)
                turns = await training_jobs.eight(single, steps, batch)
                found = Eight(steps, at_once, turns)
                shape = f"{batch} conversations, {steps} steps"
                bench.jobs.setdefault(shape, []).append(found)
                print(f"jobs of {shape}: {_told(found)}", flush=True)


async def measure_beside(bench: Bench) -> None:
    """The same rounds on both, in turns, those that warm up included."""
    if not skyrl_peer.install():
        print("SkyRL is not installed; it is left out")
        return
    bench.versions = skyrl_peer.versions()
    with (
        skyrl_peer.server_running(bench.scratch) as url,
        skyrl_peer.client_running(url) as theirs,
    ):
        async with runs_open(bench.client, f"contest-{next(fresh)}") as driven:
            for shape in CONTESTED:
                await _contest(bench, shape, driven, theirs)


async def _contest(
    bench: Bench, shape: Shape, driven: Sequence[Driven], theirs: skyrl_peer.Client
) -> None:
    batches, plan = shape.batches(), bench.plan
    # SkyRL compiles for every number of runs that may meet in one pass.
    for runs in range(1, len(batches) + 1):
        ours = (await together(driven[:runs], batches[:runs], 2))[1]
        both = await asyncio.to_thread(theirs.round, batches[:runs], 2)
        if bench.same_start is None:
            bench.same_start = abs(ours[0][0] - both[1][0][0])
    for _ in range(plan.contest_rounds):
        found = await _contest_round(driven, theirs, batches, plan.contest_steps)
        bench.beside.setdefault(str(shape), []).append(found)
        print(
            f"beside SkyRL {shape}: {found.ours_per_s:.1f} steps/s, its {found.theirs_per_s:.1f}, "
            f"losses {found.our_losses[1]:.3f} and {found.their_losses[1]:.3f}",
            flush=True,
        )


async def _contest_round(
    driven: Sequence[Driven], theirs: skyrl_peer.Client, batches: Sequence[Batch], steps: int
) -> Beside:
    our_s, ours = await together(driven, batches, steps, outputs=True)
    their_s, others = await asyncio.to_thread(theirs.round, batches, steps)
    done = len(batches) * steps
    return Beside(done / our_s, done / their_s, _ends(ours), _ends(others))


def _told(found: Eight) -> str:
    took = f"{found.together_s:.2f} s at once, {found.in_turn_s:.2f} s in turn"
    return f"{took}, ratio {found.ratio:.2f}"


def _ends(losses: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over runs at the first step and the last."""
    return mean(each[0] for each in losses), mean(each[-1] for each in losses)


async def measure_endings(bench: Bench) -> None:
    """Short jobs one after another; the two ways to learn a model's name take turns."""
    with training_jobs.gateway_running(bench.scratch, bench.trainer, 8) as client:
        examples = training_jobs.SHORT_STEPS * training_jobs.SHORT_BATCH
        file = await training_jobs.upload(client, examples)
        for number in range(bench.plan.endings + 1):
            for way in training_jobs.WAYS:
                found = await training_jobs.ending(client, bench.client, file, way)
                if number:  # the first job warms up
                    bench.endings.setdefault(way, []).append(found)
    for way, endings in bench.endings.items():
        late = training_report.p95([each.token_s for each in endings])
        print(f"first token, {way}: p95 {late:.3f} s of {len(endings)}", flush=True)


PARTS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "runs": measure_runs,
    "jobs": measure_jobs,
    "skyrl": measure_beside,
    "first-token": measure_endings,
}


async def measure(names: Sequence[str], bench: Bench) -> Found:
    """The parts of those names, in order."""
    async with contextlib.aclosing(bench.client):
        for name in names:
            await PARTS[name](bench)
    return Found(bench.runs, bench.jobs, bench.beside, bench.endings)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    exit_on_signals()
    load_average = machine.load_average()
    if load_average > QUIET:
        print(f"load average {load_average:.1f}: somebody else is using this machine", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="loragate-bench-") as folder:
            scratch = Path(folder)
            with worker_running(scratch, args.threads) as trainer:
                plan = QUICK if args.quick else THOROUGH
                bench = Bench(plan, scratch, trainer, TrainerClient(trainer))
                found = asyncio.run(measure(args.only, bench))
    except (Unusable, Unready) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    conditions = Conditions(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=machine.in_words(),
        commit=machine.commit(),
        load_average=load_average,
        load_average_after=machine.load_average(),
        threads=args.threads,
        versions=bench.versions,
        same_start=bench.same_start,
    )
    print(f"\n{training_report.page(found, conditions)}")
    complete = not args.quick and args.only == list(PARTS)
    training_report.write(found, conditions, RESULTS if complete else HOME / "results")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.training",
        description="Measure training of many adapters. A quick or partial run writes to "
        ".bench/results instead of bench/results.",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--threads", type=int, help="of torch; the default is the worker's")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"comma-separated, of: {', '.join(PARTS)}",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    return args


if __name__ == "__main__":
    sys.exit(main())
