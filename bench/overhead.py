"""`make bench`: what a gateway costs, loragate and its peers side by side in one run.

    python -m bench.overhead [--quick] [--only NAMES]

What goes out: bench/results/overhead.json and overhead.md, and a line for each thing done. In each
round every contender is started afresh, measured and stopped, so that noise of the machine hits
all alike and none disturbs another. Exit status 1 if any contender misbehaved.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import loragate, machine, report
from bench.client import Unready
from bench.measure import (
    REPLY_LOADS,
    STREAM_LOADS,
    Figures,
    Load,
    Misbehaved,
    drive,
    measure,
    standing,
)
from bench.null_upstream import CHUNK_GAP_MS, CHUNKS_PER_REPLY, Upstream, replying, streaming
from bench.peers import DIRECT, FLOOR, HOME, PEERS, Contender, install
from bench.processes import Cores, Unusable, choose_cores, exit_on_signals, require_programs
from bench.report import Record

RESULTS = Path(__file__).parent / "results"

NOT_INSTALLED = "not installed"

#: In the order of the table: those compared most closely take turns next to each other.
NAMES = (
    DIRECT.name,
    report.REFERENCE,
    *loragate.VARIANTS,
    *(peer.name for peer in PEERS if peer.name != report.REFERENCE),
    FLOOR.name,
)

#: Above this load average somebody else is using the machine.
QUIET = 0.5
#: What starting and stopping a contender may take, until the first round has shown it.
STARTING_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: rounds, and seconds of each load and of the warm-up before them."""

    rounds: int
    seconds: int
    warm_up_s: int

    @property
    def turn_s(self) -> float:
        """A first guess at what one contender takes in one round."""
        loads = len(REPLY_LOADS) + len(STREAM_LOADS)
        return loads * self.seconds + 2 * (self.warm_up_s + STARTING_S)


THOROUGH = Plan(rounds=3, seconds=5, warm_up_s=2)
QUICK = Plan(rounds=1, seconds=2, warm_up_s=1)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement of a run shares."""

    plan: Plan
    cores: Cores
    scratch: Path
    reply: Upstream
    stream: Upstream


class Progress:
    """Plain lines with the time left: turns taken so far tell how long the others will take."""

    def __init__(self, names: Sequence[str], plan: Plan) -> None:
        self._left = list(names) * plan.rounds
        self._total = len(self._left)
        self._guess_s = plan.turn_s
        self._took_s: dict[str, float] = {}
        self._began = 0.0

    def begin(self, name: str) -> None:
        self._began = time.monotonic()
        seconds = sum(self._took_s.get(each, self._guess_s) for each in self._left)
        number = self._total - len(self._left) + 1
        left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        print(f"[{number:>2}/{self._total}] {name:<26} about {left} left", flush=True)

    def end(self, name: str, outcome: str) -> None:
        self._took_s[name] = time.monotonic() - self._began
        self._left.remove(name)
        print(f"        {outcome}", flush=True)

    def drop(self, name: str) -> None:
        """It takes no more turns."""
        self._left = [each for each in self._left if each != name]


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    exit_on_signals()
    try:
        require_programs()
        cores = choose_cores()
        with tempfile.TemporaryDirectory(prefix="loragate-bench-") as folder:
            return _run(args, cores, Path(folder))
    except (Unusable, Unready) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.overhead", description="Measure the overhead of loragate and of its peers."
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        type=lambda text: text.split(","),
        default=list(NAMES),
        help=f"comma-separated, of: {', '.join(NAMES)}",
    )
    parser.add_argument("--rounds", type=int, help=f"default {THOROUGH.rounds}")
    parser.add_argument("--seconds", type=int, help=f"of each load, default {THOROUGH.seconds}")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; the default is bench/results for a complete run and "
        ".bench/results for a quick or partial one",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    args.complete = not args.quick and args.only == list(NAMES)
    return args


def _plan(args: argparse.Namespace) -> Plan:
    base = QUICK if args.quick else THOROUGH
    return Plan(args.rounds or base.rounds, args.seconds or base.seconds, base.warm_up_s)


def _run(args: argparse.Namespace, cores: Cores, scratch: Path) -> int:
    records, ready = _gather(args.only, scratch)
    plan = _plan(args)
    conditions = report.Conditions(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=machine.in_words(),
        commit=machine.commit(),
        rounds=plan.rounds,
        seconds=plan.seconds,
        load_average=round(machine.load_average(), 2),
        chunks_per_reply=CHUNKS_PER_REPLY,
        chunk_gap_ms=CHUNK_GAP_MS,
    )
    print(conditions.machine)
    if conditions.load_average > QUIET:
        print(f"warning: load average {conditions.load_average}: figures will be noisy")
    with contextlib.ExitStack() as stack:
        reply = stack.enter_context(replying(cores.load, scratch))
        stream = stack.enter_context(streaming(cores.load, scratch))
        _rounds(Bench(plan, cores, scratch, reply, stream), ready, records)
    ordered = list(records.values())
    folder = args.out or (RESULTS if args.complete else HOME / "results")
    report.write(ordered, conditions, folder)
    print(report.page(ordered, conditions))
    failed = [record for record in ordered if record.trouble and record.trouble != NOT_INSTALLED]
    for record in failed:
        print(f"bench: {record.name} {record.trouble}", file=sys.stderr)
    return 1 if failed else 0


def _gather(names: Sequence[str], scratch: Path) -> tuple[dict[str, Record], list[Contender]]:
    """A record for each name, and the contenders among them that can be had here."""
    records: dict[str, Record] = {}
    ready: list[Contender] = []
    for name in names:
        contender = contender_called(name, scratch)
        record = records[name] = Record(name, contender.title)
        if install(contender):
            record.versions = machine.versions(contender)
            ready.append(contender)
        else:
            record.trouble = NOT_INSTALLED
    return records, ready


def contender_called(name: str, scratch: Path) -> Contender:
    """The contender of a name in `NAMES`; loragate's registry is filled for it."""
    if name in loragate.VARIANTS:
        return loragate.seeded(name, scratch)
    return next(each for each in (DIRECT, FLOOR, *PEERS) if each.name == name)


def _rounds(bench: Bench, ready: Sequence[Contender], records: dict[str, Record]) -> None:
    """A B C, A B C: every contender once a round, until the rounds are done or it misbehaves."""
    progress = Progress([contender.name for contender in ready], bench.plan)
    racing = list(ready)
    for _ in range(bench.plan.rounds):
        for contender in list(racing):
            progress.begin(contender.name)
            try:
                figures = _turn(bench, contender)
            except (Misbehaved, Unready) as exc:
                records[contender.name].trouble = f"failed: {exc}"
                progress.end(contender.name, f"FAILED: {exc}")
                progress.drop(contender.name)
                racing.remove(contender)
            else:
                records[contender.name].rounds.append(figures)
                progress.end(contender.name, _outcome(figures))


def _turn(bench: Bench, contender: Contender) -> dict[str, Figures]:
    """One contender, once under each load: before the replying replicas, then the streaming."""
    return {
        **_stand(bench, contender, bench.reply, REPLY_LOADS),
        **_stand(bench, contender, bench.stream, STREAM_LOADS),
    }


def _stand(
    bench: Bench, contender: Contender, upstream: Upstream, loads: Sequence[Load]
) -> dict[str, Figures]:
    cores, plan = bench.cores, bench.plan
    stream = loads[0].stream
    with standing(
        contender, upstream, stream=stream, core=cores.gateway, scratch=bench.scratch
    ) as here:
        drive(here, loads[0], seconds=plan.warm_up_s, load_core=cores.load)
        figures = {
            load.name: measure(here, load, seconds=plan.seconds, load_core=cores.load)
            for load in loads
        }
        if contender.inspect is not None:
            finished = sum(each.requests for each in figures.values())
            contender.inspect(here.port, contender.key, finished, stream=stream)
        return figures


def _outcome(figures: dict[str, Figures]) -> str:
    reply, single, stream = figures["reply_16"], figures["reply_1"], figures["stream_64"]
    parts = [f"{reply.requests_per_s:,.0f} requests/s", f"p50 {single.p50_us} µs at 1 connection"]
    if reply.cpu_us is not None and stream.cpu_us is not None:
        parts += [f"CPU {reply.cpu_us:,.1f} µs/request", f"{stream.cpu_us:,.1f} µs/chunk"]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
