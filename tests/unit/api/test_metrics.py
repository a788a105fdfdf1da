"""/metrics shows what `telemetry` declares, all of it and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app import telemetry
from app.api.health import Families, count
from app.domain import JobStatus, ReplicaState
from app.jobs.queue import Depth
from app.serving.meter import Meter
from app.serving.snapshot import Snapshot


def rooms(meter: Meter) -> Any:
    replica = SimpleNamespace(
        id="llama-1", pool="llama", state=ReplicaState.HEALTHY, inflight=3, quarantined={}
    )
    task = SimpleNamespace(name="publish", last_duration_s=0.25, failures=2)
    adapter = SimpleNamespace(versions={1: None, 2: None})
    snapshot = Snapshot(number=42, adapters={"bot": adapter})  # type: ignore[dict-item]
    return SimpleNamespace(
        meter=meter,
        snapshots=SimpleNamespace(current=snapshot),
        fleet=SimpleNamespace(
            live=lambda: [replica],
            loads=SimpleNamespace(counts={("llama", "loaded"): 7}),
            retries={("llama", "upstream_broke"): 5},
            pools={"llama": SimpleNamespace(waiting=4)},
        ),
        driver=SimpleNamespace(statuses=lambda: [task]),
        expire_jobs=SimpleNamespace(
            depth=[
                Depth("gpu", JobStatus.QUEUED, 6, datetime(2030, 1, 1, tzinfo=UTC)),
                Depth(None, JobStatus.RUNNING, 1, datetime(2030, 1, 1, tzinfo=UTC)),
            ],
            waits=lambda: {"gpu": 12.5},
        ),
    )


def families(meter: Meter) -> dict[str, Any]:
    text = generate_latest(Families(count(rooms(meter)))).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_every_declared_family_appears_and_no_other() -> None:
    found = families(Meter())
    assert set(found) == {metric.name for metric in telemetry.METRICS}
    for metric in telemetry.METRICS:
        assert found[metric.name].type == metric.kind
        assert found[metric.name].documentation == metric.help


def test_values_and_labels() -> None:
    meter = Meter()
    meter.ended("/v1/completions", 200, 0.02)
    meter.ended("/v1/completions", 200, 400.0)
    meter.ended("/v1/completions", 499, 0.02)
    meter.used("key-1", "bot@2", 10, 4)
    meter.trained("gpu", 100, 0.02)
    meter.trained("gpu", 50, 2.0)
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families(meter).values()
        for sample in family.samples
    }
    assert found["loragate_requests_total", "/v1/completions", "200"] == 2
    assert found["loragate_requests_total", "/v1/completions", "499"] == 1
    seconds = "loragate_request_duration_seconds"
    assert found[f"{seconds}_bucket", *sorted(["/v1/completions", "0.01"])] == 0
    assert found[f"{seconds}_bucket", *sorted(["/v1/completions", "0.025"])] == 2
    assert found[f"{seconds}_bucket", *sorted(["/v1/completions", "300.0"])] == 2
    assert found[f"{seconds}_bucket", *sorted(["/v1/completions", "+Inf"])] == 3
    assert found[f"{seconds}_count", "/v1/completions"] == 3
    assert found[f"{seconds}_sum", "/v1/completions"] == pytest.approx(400.04)
    assert found["loragate_tokens_total", "bot@2", "prompt"] == 10
    assert found["loragate_tokens_total", "bot@2", "completion"] == 4
    assert found["loragate_replica_inflight", "llama", "llama-1"] == 3
    assert found["loragate_replica_up", "llama", "llama-1"] == 1
    assert found["loragate_adapter_loads_total", "llama", "loaded"] == 7
    assert found["loragate_snapshot_number",] == 42
    assert found["loragate_snapshot_versions",] == 2
    assert found["loragate_task_last_duration_seconds", "publish"] == 0.25
    assert found["loragate_task_failures_total", "publish"] == 2
    assert found["loragate_jobs", *sorted(["gpu", "queued"])] == 6
    assert found["loragate_jobs", "", "running"] == 1
    assert found["loragate_job_wait_seconds", "gpu"] == 12.5
    took = "loragate_training_step_seconds"
    assert found[f"{took}_bucket", *sorted(["gpu", "0.025"])] == 1
    assert found[f"{took}_count", "gpu"] == 2
    assert found[f"{took}_sum", "gpu"] == pytest.approx(2.02)
    assert found["loragate_training_tokens_total", "gpu"] == 150
