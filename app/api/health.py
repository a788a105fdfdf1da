"""/healthz, /readyz and /metrics: is it alive, can it answer, what has it counted.

What comes in: plain integers that the data plane and the driver keep. What goes out: a word, or
the Prometheus families declared in `telemetry`. It counts nothing itself and asks no database. It
needs no key, but for /metrics if the settings say so: model and replica names are on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from app import telemetry
from app.api.admin.shapes import refusals
from app.api.auth import require
from app.api.rooms import Rooms
from app.domain import ReplicaState, Scope
from app.serving.meter import BUCKETS

router = APIRouter(tags=["Health"])

_admin = require(Scope.ADMIN)

_BOUNDS = (*map(str, BUCKETS), "+Inf")
#: How each kind of family is made, and what its samples' values look like.
_FAMILIES: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}

#: The values of one family: label values, then what `add_metric` of its kind takes.
Samples = list[tuple[Sequence[str], tuple[Any, ...]]]


@router.get(
    "/healthz",
    summary="Is the process alive?",
    responses={200: {"content": {"application/json": {"example": {"status": "ok"}}}}},
)
async def healthz() -> dict[str, str]:
    """Answers 200 while the event loop turns. For a liveness probe: it asks nothing else."""
    return {"status": "ok"}


_READY = {
    "status": "ready",
    "snapshot": 42,
    "pools": {"llama": {"healthy": 1, "replicas": 2}},
}


@router.get(
    "/readyz",
    summary="Can it answer?",
    responses={
        200: {"content": {"application/json": {"example": _READY}}},
        503: {
            "description": "There are replicas, and none is healthy.",
            "content": {
                "application/json": {
                    "example": {
                        "status": "no healthy replica",
                        "snapshot": 42,
                        "pools": {"llama": {"healthy": 0, "replicas": 2}},
                    }
                }
            },
        },
    },
)
async def readyz(request: Request) -> JSONResponse:
    """Answers 200 unless there are replicas and none of them is healthy.

    The counts per pool are in the body, for a script that waits for one pool.
    """
    rooms: Rooms = request.state.rooms
    snapshot, live = rooms.snapshots.current, rooms.fleet.live()
    pools = {name: {"healthy": 0, "replicas": 0} for name in snapshot.pools}
    for replica in live:
        pool = pools.setdefault(replica.pool, {"healthy": 0, "replicas": 0})
        pool["replicas"] += 1
        pool["healthy"] += replica.state is ReplicaState.HEALTHY
    # The registry is loaded before the first request is taken, so it is not asked about here.
    stuck = bool(live) and not any(replica.state is ReplicaState.HEALTHY for replica in live)
    status = "no healthy replica" if stuck else "ready"
    body = {"status": status, "snapshot": snapshot.number, "pools": pools}
    return JSONResponse(body, 503 if stuck else 200)


_METRICS_EXAMPLE = """\
# HELP loragate_requests_total Inference requests ended.
# TYPE loragate_requests_total counter
loragate_requests_total{path="/v1/chat/completions",status="200"} 1204.0
"""


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"example": _METRICS_EXAMPLE}}},
        **refusals(),
    },
)
async def metrics(request: Request) -> Response:
    """Everything the gateway counts, in Prometheus' text format (or OpenMetrics if asked for).

    With LORAGATE_METRICS_AUTH it needs a key with the scope `admin`; otherwise none.
    """
    rooms: Rooms = request.state.rooms
    if rooms.settings.metrics_auth:
        await _admin(request)
    counted = count(rooms)
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    # A label set per model: with very many models writing it all down takes a while.
    body = await asyncio.to_thread(encode, Families(counted))
    return Response(body, media_type=media_type)


def count(rooms: Rooms) -> dict[telemetry.Metric, Samples]:
    """Copy the integers of every declared family. On the event loop, where they are changed."""
    meter, snapshot, live = rooms.meter, rooms.snapshots.current, rooms.fleet.live()
    tasks = rooms.driver.statuses()
    depth, waits = rooms.expire_jobs.depth, rooms.expire_jobs.waits()
    versions = sum(len(adapter.versions) for adapter in snapshot.adapters.values())
    return {
        telemetry.REQUESTS: [((path, str(s)), (n,)) for (path, s), n in meter.requests.items()],
        telemetry.REQUEST_SECONDS: [
            ((path,), _histogram(*counted)) for path, counted in meter.durations.items()
        ],
        telemetry.TOKENS: [
            ((model, kind), (n,))
            for model, counts in meter.tokens.items()
            for kind, n in zip(("prompt", "completion"), counts, strict=True)
        ],
        telemetry.REPLICA_INFLIGHT: [((r.pool, r.id), (r.inflight,)) for r in live],
        telemetry.REPLICA_UP: [
            ((r.pool, r.id), (int(r.state is ReplicaState.HEALTHY),)) for r in live
        ],
        telemetry.ADAPTER_LOADS: [(key, (n,)) for key, n in rooms.fleet.loads.counts.items()],
        telemetry.POOL_WAITING: [
            ((name,), (pool.waiting,)) for name, pool in rooms.fleet.pools.items()
        ],
        telemetry.RETRIES: [(key, (n,)) for key, n in rooms.fleet.retries.items()],
        telemetry.QUARANTINED: [((r.pool, r.id), (len(r.quarantined),)) for r in live],
        telemetry.BATCHES_SPLIT: [((), (meter.batches,))],
        telemetry.BATCH_PARTS: [((), (meter.parts,))],
        telemetry.COALESCED: [((), (meter.coalesced,))],
        telemetry.CALLS_SAVED: [((), (meter.calls_saved,))],
        telemetry.SNAPSHOT_NUMBER: [((), (snapshot.number,))],
        telemetry.SNAPSHOT_VERSIONS: [((), (versions,))],
        telemetry.TASK_SECONDS: [((t.name,), (t.last_duration_s or 0.0,)) for t in tasks],
        telemetry.TASK_FAILURES: [((t.name,), (t.failures,)) for t in tasks],
        telemetry.JOBS: [((d.trainer or "", d.status.value), (d.jobs,)) for d in depth],
        telemetry.JOB_WAIT_SECONDS: [((trainer,), (s,)) for trainer, s in waits.items()],
        telemetry.TRAINING_STEP_SECONDS: [
            ((trainer,), _histogram(*counted)) for trainer, counted in meter.steps.items()
        ],
        telemetry.TRAINING_TOKENS: [((t,), (n,)) for t, n in meter.trained_tokens.items()],
    }


def _histogram(counts: Sequence[int], total: Sequence[float]) -> tuple[Any, ...]:
    return list(zip(_BOUNDS, accumulate(counts), strict=True)), total[0]


@dataclass(frozen=True, slots=True)
class Families:
    """What `prometheus_client` calls a collector, over values already copied."""

    counted: dict[telemetry.Metric, Samples]

    def collect(self) -> Iterator[Metric]:
        for metric, samples in self.counted.items():
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for labels, value in samples:
                family.add_metric(labels, *value)
            yield family
