"""/health, /ping, /version and /metrics; what it gets right.

Sampling is counted under the names vLLM gives its own, training under ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.clock import SystemClock
from app.worker.http.served import Served, served
from app.worker.http.training import Training
from app.worker.trainers.runs import Runs

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


async def health(request: Request) -> Response:
    """200 while the engine and the trainer live, then 503."""
    training: Training | None = request.state.training
    alive = served(request).engine.alive and (training is None or training.runs.alive)
    return Response(status_code=200 if alive else 503)


async def show_version(request: Request) -> Response:
    return JSONResponse({"version": version("loragate")})


async def features(request: Request) -> Response:
    """GET /loragate/features, as the plugin of vLLM answers it: every logprob here is right."""
    dtype = served(request).engine.dtype
    here = {"plugin": None, "worker": version("loragate"), "dtype": dtype}
    right = {
        "prompt_logprobs": True,
        "prompt_logprobs_with_lora": True,
        "prompt_logprobs_with_lm_head_lora": True,
    }
    return JSONResponse(here | right)


async def metrics(request: Request) -> Response:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(EngineCollector(served(request)))
    training: Training | None = request.state.training
    if training is not None:
        registry.register(RunsCollector(training.runs))
    return Response(generate_latest(registry), media_type=EXPOSITION)


class EngineCollector(Collector):
    """Turns the engine's counters into vLLM's families when they are asked for."""

    def __init__(self, world: Served) -> None:
        self._world = world

    def collect(self) -> Iterator[Metric]:
        counters = self._world.engine.counters
        labels = ["engine", "model_name"]
        here = ["0", self._world.name]
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch.", counters.running),
            ("num_requests_waiting", "Sequences waiting to be read.", counters.waiting),
            ("kv_cache_usage_perc", "Rows in use, 1 is all of them.", self._usage()),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            gauge.add_metric(here, value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens read.", counters.prompt_tokens),
            ("generation_tokens", "Tokens generated.", counters.generation_tokens),
        ):
            total = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            total.add_metric(here, value)
            yield total
        ended = CounterMetricFamily(
            "vllm:request_success", "Sequences ended.", labels=[*labels, "finished_reason"]
        )
        for reason, count in counters.ended.items():
            ended.add_metric([*here, reason], count)
        yield ended
        yield self._adapters()

    def _usage(self) -> float:
        return self._world.engine.counters.running / self._world.settings.worker_max_batch

    def _adapters(self) -> Metric:
        counters = self._world.engine.counters
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with requests; the value is the time.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        waiting, running = ",".join(counters.waiting_adapters), ",".join(counters.running_adapters)
        limit = str(self._world.engine.max_loras)
        info.add_metric([limit, waiting, running], SystemClock().now().timestamp())
        return info


class RunsCollector(Collector):
    """What a worker that trains has done since it started."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def collect(self) -> Iterator[Metric]:
        turns = self._runs.turns
        yield GaugeMetricFamily(
            "loragate_worker_runs", "Runs in the engine's memory.", self._runs.in_memory
        )
        yield SummaryMetricFamily(
            "loragate_worker_pass_seconds",
            "Forward and backward passes, those of several runs at once counted as one.",
            turns.passing.times,
            turns.passing.seconds,
        )
        yield SummaryMetricFamily(
            "loragate_worker_optim_step_seconds",
            "Optimizer steps.",
            turns.stepping.times,
            turns.stepping.seconds,
        )
        yield CounterMetricFamily(
            "loragate_worker_shared_passes", "Passes of several runs at once.", turns.shared
        )
        yield CounterMetricFamily(
            "loragate_worker_trained_tokens",
            "Targets that gradients were computed of.",
            turns.tokens,
        )
