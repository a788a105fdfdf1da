"""`make bench`: where requests go, loragate and vllm-router's policies side by side in one run.

    python -m bench.routing [--quick] [--only NAMES]

What goes out: bench/results/routing.json and routing.md. Four simulated replicas with eight GPU
slots each, 200 adapters, Zipf popularity, a few long system prompts for each adapter; the same
arrivals for all (see `traffic` and `contest`). Then a batch of prompts over four replicas and
over one, and what a decision costs. Exit status 1 if any contender misbehaved.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import batch_scale, contest, decisions, loragate, machine, routing_report
from bench.client import Unready
from bench.contest import Ask, Figures, Plan
from bench.loragate import Variant, adapter_name
from bench.measure import Misbehaved
from bench.peers import HOME, Contender, install, vllm_router
from bench.processes import Cores, Unusable, choose_cores, exit_on_signals, staying_on
from bench.routing_report import Record
from bench.sim import figures
from bench.simulated import Ground, standing
from bench.traffic import Workload

RESULTS = Path(__file__).parent / "results"
REPLICAS = 4
NOT_INSTALLED = "not installed"
#: A contender is stood up once more if somebody else took the machine meanwhile.
STANDS = 2

FULL = Plan()
QUICK = Plan(speed=5.0, common_requests=1000, ladder_s=10.0, steps=7, step=1.4)
#: For tests: does it run, end to end.
TINY = Plan(
    speed=20.0,
    common_rate=20.0,
    common_requests=60,
    ladder_s=2.0,
    steps=1,
    late_ms=1000.0,
    workload=Workload(adapters=12, system_tokens=200),
)


def _no_header(adapter: int) -> str:
    return ""


def _session_header(adapter: int) -> str:
    """What consistent_hash looks at first, before the `x-user-id` that all requests carry."""
    return f"x-session-id: {adapter_name(adapter)}\r\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to run the race."""

    name: str
    title: str
    policy: str | None = None
    headers: Callable[[int], str] = _no_header

    def contender(self, workload: Workload, scratch: Path) -> Contender:
        if self.policy is not None:
            return replace(vllm_router(self.policy, self.title), name=self.name)
        slots = figures.read()
        return loragate.registered(
            self.name,
            Variant(self.title, adapters=workload.adapters),
            scratch,
            max_loras=slots.gpu_slots,
            max_cpu_loras=slots.cpu_slots,
        )

    def ask(self) -> Ask:
        if self.policy is not None:
            return Ask(adapter_name, adapter_name, self.headers)
        return Ask(adapter_name, lambda number: f"{adapter_name(number)}@1", self.headers)


ENTRIES = (
    Entry("loragate", "loragate"),
    Entry("vllm-router-round-robin", "vllm-router, round_robin", "round_robin"),
    Entry("vllm-router-cache-aware", "vllm-router, cache_aware", "cache_aware"),
    Entry("vllm-router-consistent-hash", "vllm-router, consistent_hash", "consistent_hash"),
    Entry(
        "vllm-router-hash-adapter",
        "vllm-router, consistent_hash, clients send the adapter as x-session-id",
        "consistent_hash",
        _session_header,
    ),
)
NAMES = tuple(entry.name for entry in ENTRIES)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    exit_on_signals()
    try:
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
        prog="bench.routing", description="Measure where loragate and its peers send requests."
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests and steps")
    parser.add_argument("--tiny", action="store_true", help="does it run at all")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        type=lambda text: text.split(","),
        default=list(NAMES),
        help=f"comma-separated, of: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often; the median goodput's round is shown"
    )
    parser.add_argument("--speed", type=float, help=f"of the replicas, default {FULL.speed:g}")
    parser.add_argument(
        "--late-ms",
        type=float,
        help=f"how late the sender may be before a run is refused, default {FULL.late_ms:g}; "
        "what it is late counts as first-token time",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; the default is bench/results for a complete run and "
        ".bench/results for a quick or partial one",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    args.complete = not (args.quick or args.tiny or args.speed) and args.only == list(NAMES)
    return args


def _plan(args: argparse.Namespace) -> Plan:
    plan = TINY if args.tiny else QUICK if args.quick else FULL
    given = {"speed": args.speed, "late_ms": args.late_ms}
    return replace(plan, **{name: value for name, value in given.items() if value})


def _run(args: argparse.Namespace, cores: Cores, scratch: Path) -> int:
    plan = _plan(args)
    conditions = routing_report.Conditions(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=machine.in_words(),
        commit=machine.commit(),
        load_average=round(machine.load_average(), 2),
        replicas=REPLICAS,
    )
    print(conditions.machine, flush=True)
    entries = [entry for entry in ENTRIES if entry.name in args.only]
    for entry in entries:
        if entry.policy is not None:
            install(vllm_router(entry.policy, entry.title))
    rounds = [_round(entries, plan, cores, scratch / str(n)) for n in range(args.rounds)]
    records = [middle(list(turns)) for turns in zip(*rounds, strict=True)]
    batch = decided = None
    if "loragate" in args.only:
        batch = _batch(cores, scratch, prompts=16 if args.tiny else batch_scale.PROMPTS)
        decided = decisions.measure(quick=args.tiny)
    folder = args.out or (RESULTS if args.complete else HOME / "results")
    routing_report.write(records, conditions, plan, batch, decided, folder)
    print((folder / "routing.md").read_text())
    failed = [each for each in records if each.trouble and each.trouble != NOT_INSTALLED]
    for record in failed:
        print(f"bench: {record.name} {record.trouble}", file=sys.stderr)
    return 1 if failed else 0


def _round(entries: Sequence[Entry], plan: Plan, cores: Cores, scratch: Path) -> list[Record]:
    """All contenders at the same time, each with replicas and a sender of its own.

    None comes near to filling a core, and so each can be given four times as long, with less of a
    speed-up: a gateway's own periods are not sped up.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(entries), context, initializer=exit_on_signals) as pool:
        races = []
        for entry in entries:
            own = scratch / entry.name
            own.mkdir(parents=True)
            races.append(pool.submit(_race, entry, plan, cores, own))
        return [race.result() for race in races]


def middle(turns: Sequence[Record]) -> Record:
    """Of a contender's rounds the one with the median goodput; which of them failed is not lost."""
    measured = sorted((each for each in turns if not each.trouble), key=lambda each: each.goodput)
    if not measured:
        return turns[0]
    chosen = measured[(len(measured) - 1) // 2]
    chosen.goodputs = [round(each.goodput, 1) for each in turns]
    return chosen


def _race(entry: Entry, plan: Plan, cores: Cores, scratch: Path) -> Record:
    record = Record(entry.name, entry.title)
    contender = entry.contender(plan.workload, scratch)
    if not install(contender):
        record.trouble = NOT_INSTALLED
        return record
    record.versions = machine.versions(contender)
    for attempt in range(1, STANDS + 1):
        record.trouble = None
        try:
            with (
                staying_on(cores.load),  # the sender keeps off the gateway's core
                standing(
                    contender, replicas=REPLICAS, speed=plan.speed, cores=cores, scratch=scratch
                ) as ground,
            ):
                _measure(record, ground, plan, entry.ask())
                return record
        except Unusable as exc:
            again = ", once more" if attempt < STANDS else ""
            record.trouble = f"not measured: {exc}"
            print(f"{entry.name:<28} {exc}{again}", flush=True)
        except (Misbehaved, Unready) as exc:
            record.trouble = f"failed: {exc}"
            print(f"{entry.name:<28} FAILED: {exc}", flush=True)
            return record
    return record


def _measure(record: Record, ground: Ground, plan: Plan, ask: Ask) -> None:
    tell = partial(_tell, record.name)
    record.cold = contest.cold(ground, plan, ask)
    tell(record.cold)
    record.ladder = contest.limit(ground, plan, ask, tell)
    print(f"{record.name:<28} goodput {record.goodput:.1f} requests/s", flush=True)


def _tell(name: str, run: Figures) -> None:
    p99 = "-" if run.p99_ms > 1e8 else f"{run.p99_ms:,.0f}"
    print(
        f"{name:<28} {run.rate:5.1f}/s: {run.good} of {run.requests} good, p99 {p99} ms, "
        f"{run.counts['adapter_loads']:.0f} loads, {run.failed} failed; sender "
        f"{run.sender_share:.0%}, simulator {run.simulator_share:.0%}, gateway "
        f"{run.gateway_share:.0%} of a core, {run.late_p99_ms:.1f} ms late",
        flush=True,
    )


def _batch(cores: Cores, scratch: Path, *, prompts: int) -> batch_scale.Scaling | str:
    print(f"a batch of {prompts} prompts, over {REPLICAS} replicas and over one", flush=True)
    entry = ENTRIES[0]
    contender = entry.contender(Workload(adapters=1), scratch / "batch")
    try:
        return batch_scale.measure(
            contender, prompts=prompts, replicas=REPLICAS, cores=cores, scratch=scratch
        )
    except (Misbehaved, Unready) as exc:
        return f"failed: {exc}"


if __name__ == "__main__":
    sys.exit(main())
