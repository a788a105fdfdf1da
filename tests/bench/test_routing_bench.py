"""The routing bench: its traffic, its sender, its verdicts, and a small run from end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import routing
from bench.batch_scale import Scaling
from bench.contest import Figures, goodput, lag_of
from bench.decisions import Decisions
from bench.openloop import Shot, Volley, fire
from bench.routing_report import Record, judge
from bench.sim import Config, Fault, Kind, Simulation
from bench.traffic import Workload, body, trace

WORKLOAD = Workload()


def test_the_same_calls_at_any_rate_closer_together() -> None:
    slow, fast = trace(WORKLOAD, 10, 500), trace(WORKLOAD, 20, 500)
    assert [replace(call, due_s=0) for call in slow] == [replace(call, due_s=0) for call in fast]
    for one, other in zip(slow, fast, strict=True):
        assert one.due_s == pytest.approx(2 * other.due_s)


def test_popularity_follows_zipf() -> None:
    asked = Counter(call.adapter for call in trace(WORKLOAD, 10, 20_000))
    counts = [count for _, count in asked.most_common()]
    harmonic = sum(1 / rank for rank in range(1, WORKLOAD.adapters + 1))
    assert counts[0] / 20_000 == pytest.approx(1 / harmonic, rel=0.1)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)


def test_a_system_prompt_is_as_long_as_it_should_be_and_only_its_adapters() -> None:
    prompts = {}
    for call in trace(WORKLOAD, 10, 300):
        system = json.loads(body(WORKLOAD, call, "m"))["messages"][0]["content"]
        assert abs(len(system) / 4 - WORKLOAD.system_tokens) < 10
        prompts.setdefault(system[:64], (call.adapter, call.system))
    assert len(prompts) == len(set(prompts.values()))


@pytest.fixture
async def simulation() -> AsyncIterator[Simulation]:
    async with Simulation(Config(replicas=1, speed=50, resolver=True)) as sim:
        yield sim


def shots(sim: Simulation, count: int) -> list[Shot]:
    made = []
    for number in range(count):
        model = f"adapter-{number % 3}"
        payload = {
            "model": model,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
            "stream": True,
        }
        content = json.dumps(payload).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}"
        expected = f'"content":"{model}"'.encode()
        made.append(Shot(number * 0.005, head.encode() + b"\r\n\r\n" + content, expected))
    return made


async def test_every_shot_is_timed_from_when_it_was_due(simulation: Simulation) -> None:
    volley = await fire(simulation.replicas[0].port, shots(simulation, 20), patience_s=5)
    assert all(outcome.whole for outcome in volley.outcomes)
    for outcome in volley.outcomes:
        assert outcome.first_s is not None
        assert outcome.first_s >= max(0.0, outcome.late_s)
    assert volley.wall_s >= 19 * 0.005


async def test_another_adapter_s_answer_is_found_out(simulation: Simulation) -> None:
    await simulation.play(0, Fault(Kind.LYING))
    assert await _troubles(simulation) == {"another adapter answered"}


async def test_refusals_and_silence_are_told_apart(simulation: Simulation) -> None:
    await simulation.play(0, Fault(Kind.UNAVAILABLE, times=6))
    assert {each.split(":")[0] for each in await _troubles(simulation)} == {"status 503"}
    await simulation.play(0, Fault(Kind.HANG))
    assert await _troubles(simulation, patience_s=0.1) == {"no answer in time"}
    await simulation.play(0, Fault(Kind.KILL))
    (trouble,) = await _troubles(simulation)
    assert trouble.startswith("no connection")


async def _troubles(simulation: Simulation, patience_s: float = 5) -> set[str]:
    port = simulation.replicas[0].port
    volley: Volley = await fire(port, shots(simulation, 6), patience_s=patience_s)
    assert not any(outcome.whole for outcome in volley.outcomes)
    return {str(outcome.trouble) for outcome in volley.outcomes}


def run(rate: float = 10.0, *, kept: bool = True, **changes: Any) -> Figures:
    counts = {
        "adapter_loads": 100.0,
        "reads_again": 0.0,
        "slot_swaps": 0.0,
        "prefix_hit_tokens": 1000.0,
        "prefix_queried_tokens": 2000.0,
    } | changes.pop("counts", {})
    figures = Figures(
        rate, 100, 100, 0, rate, kept, 10.0, 20.0, counts, 1.0, 0.1, 0.1, 0.1, []
    )  # fmt: skip
    return replace(figures, **changes)


def test_goodput_is_of_the_highest_rate_kept() -> None:
    assert goodput([run(10), run(20), run(30, kept=False)]) == 20
    assert goodput([run(10, kept=False)]) == 0


def test_a_sender_that_lags_is_no_measurement() -> None:
    assert lag_of(run(), 10.0) is None
    for changes in ({"late_p99_ms": 11.0}, {"sender_share": 0.7}, {"simulator_share": 0.9}):
        assert lag_of(run(**changes), 10.0) is not None


def test_targets_are_against_the_best_of_the_policies() -> None:
    def record(name: str, loads: float, hits: float, rate: float) -> Record:
        cold = run(counts={"adapter_loads": loads, "prefix_hit_tokens": hits})
        return Record(name, name, cold=cold, ladder=[run(rate)])

    records = [
        record("loragate", 100, 1200, 30),
        record("vllm-router-round-robin", 600, 900, 10),
        record("vllm-router-cache-aware", 900, 1000, 15),
        record("vllm-router-consistent-hash", 700, 1000, 21),
    ]
    batch = Scaling(256, 700, 4, 4.0, 1.0, [64] * 4)
    decided = Decisions(64, 5000, 14.0, 14.0, 40.0, 60.0)
    verdicts = judge(records, batch, decided)
    found = [
        (verdict.measured and round(verdict.measured, 3), verdict.kept) for verdict in verdicts
    ]
    assert found == [
        (0.167, True),
        (1.429, False),
        (1.2, True),
        (None, False),
        (None, False),
        (None, False),
        (4.0, True),
        (14.0, True),
        (60.0, False),
    ]


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 or shutil.which("setpriv") is None,
    reason="the routing bench needs two cores and util-linux",
)
def test_a_small_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """loragate before four simulated replicas: real processes, every answer checked."""
    allowed = os.sched_getaffinity(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert routing.main(["--tiny", "--only", "loragate", "--out", str(tmp_path)]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert os.sched_getaffinity(0) == allowed
    document = json.loads((tmp_path / "routing.json").read_text())
    (ours,) = document["contenders"]
    assert (ours["name"], ours["trouble"], ours["cold"]["failed"]) == ("loragate", None, 0)
    assert ours["cold"]["counts"]["adapter_loads"] >= 10
    assert ours["cold"]["counts"]["requests"] == 60
    assert "## What loragate holds itself to" in (tmp_path / "routing.md").read_text()
    assert "goodput" in capsys.readouterr().out
