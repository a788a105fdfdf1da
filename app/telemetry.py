"""Every metric and log event, declared once, and the JSON log format.

What comes in: names and fields. What goes out: lines on stderr and Prometheus families.
Hot paths count in plain integers (`serving.meter`); a collector turns them into the families
declared here when `/metrics` is read.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


@dataclass(frozen=True, slots=True)
class Metric:
    """A Prometheus family: `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Metric("loragate_requests", "counter", "Inference requests ended.", ("path", "status"))
REQUEST_SECONDS = Metric(
    "loragate_request_duration_seconds", "histogram", "Whole request, body to last byte.", ("path",)
)
TOKENS = Metric("loragate_tokens", "counter", "Tokens billed.", ("model", "kind"))
REPLICA_INFLIGHT = Metric(
    "loragate_replica_inflight", "gauge", "Requests on a replica now.", ("pool", "replica")
)
REPLICA_UP = Metric("loragate_replica_up", "gauge", "1 if healthy.", ("pool", "replica"))
ADAPTER_LOADS = Metric(
    "loragate_adapter_loads", "counter", "Adapter loads asked of replicas.", ("pool", "result")
)
POOL_WAITING = Metric(
    "loragate_pool_waiting", "gauge", "Requests that wait for a place on a replica.", ("pool",)
)
RETRIES = Metric("loragate_retries", "counter", "Requests sent once more.", ("pool", "reason"))
QUARANTINED = Metric(
    "loragate_quarantined",
    "gauge",
    "Adapter versions a replica serves wrongly.",
    ("pool", "replica"),
)
BATCHES_SPLIT = Metric(
    "loragate_batches_split", "counter", "Batches of prompts sent in several calls."
)
BATCH_PARTS = Metric("loragate_batch_parts", "counter", "Calls that split batches were sent in.")
COALESCED = Metric(
    "loragate_coalesced_requests", "counter", "Scoring requests answered by a call they shared."
)
CALLS_SAVED = Metric("loragate_calls_saved", "counter", "Calls that coalescing made unnecessary.")
SNAPSHOT_NUMBER = Metric("loragate_snapshot_number", "gauge", "Registry revision being served.")
SNAPSHOT_VERSIONS = Metric("loragate_snapshot_versions", "gauge", "Adapter versions being served.")
TASK_SECONDS = Metric(
    "loragate_task_last_duration_seconds", "gauge", "Last run of a background task.", ("task",)
)
TASK_FAILURES = Metric(
    "loragate_task_failures", "counter", "Runs of a background task that failed.", ("task",)
)
JOBS = Metric("loragate_jobs", "gauge", "Jobs that have not ended.", ("trainer", "status"))
JOB_WAIT_SECONDS = Metric(
    "loragate_job_wait_seconds", "gauge", "Age of the oldest job that waits.", ("trainer",)
)
TRAINING_STEP_SECONDS = Metric(
    "loragate_training_step_seconds",
    "histogram",
    "What a training step took on its worker.",
    ("trainer",),
)
TRAINING_TOKENS = Metric(
    "loragate_training_tokens", "counter", "Tokens of training steps.", ("trainer",)
)
METRICS = (
    REQUESTS,
    REQUEST_SECONDS,
    TOKENS,
    REPLICA_INFLIGHT,
    REPLICA_UP,
    ADAPTER_LOADS,
    POOL_WAITING,
    RETRIES,
    QUARANTINED,
    BATCHES_SPLIT,
    BATCH_PARTS,
    COALESCED,
    CALLS_SAVED,
    SNAPSHOT_NUMBER,
    SNAPSHOT_VERSIONS,
    TASK_SECONDS,
    TASK_FAILURES,
    JOBS,
    JOB_WAIT_SECONDS,
    TRAINING_STEP_SECONDS,
    TRAINING_TOKENS,
)


class Event(StrEnum):
    """What a log line says happened; everything else is in its fields."""

    GATEWAY_STARTED = "gateway.started"
    GATEWAY_STOPPING = "gateway.stopping"
    GATEWAY_ANONYMOUS = "gateway.anonymous"
    GATEWAY_NO_POOL = "gateway.no_pool"
    REQUEST_DONE = "request.done"
    REQUEST_FAILED = "request.failed"
    REQUEST_CRASHED = "request.crashed"
    REPLICA_STATE = "replica.state"
    REPLICA_BREAKER = "replica.breaker"
    ADAPTER_REGISTERED = "adapter.registered"
    ADAPTER_DELETED = "adapter.deleted"
    ADAPTER_LOADED = "adapter.loaded"
    ADAPTER_UNLOADED = "adapter.unloaded"
    ADAPTER_LOST = "adapter.lost"
    ADAPTER_QUARANTINED = "adapter.quarantined"
    ADAPTER_UNVERIFIED = "adapter.unverified"
    ALIAS_MOVED = "alias.moved"
    PROBE_CHANGED = "probe.changed"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    TASK_FAILED = "task.failed"
    STORE_SWEPT = "store.swept"
    JOB_CLAIMED = "job.claimed"
    JOB_FINISHED = "job.finished"
    JOB_GIVEN_BACK = "job.given_back"
    JOB_LEASE_LOST = "job.lease_lost"
    JOB_CRASHED = "job.crashed"
    JOB_UNRECORDED = "job.unrecorded"
    JOB_EXPIRED = "job.expired"
    JOBS_UNAVAILABLE = "jobs.unavailable"
    WORKER_STARTED = "worker.started"
    WORKER_EXITED = "worker.exited"
    WORKER_READY = "worker.ready"
    WORKER_STEP_FAILED = "worker.step_failed"
    TRAINER_RANK_LOST = "trainer.rank_lost"


def log(logger: logging.Logger, level: int, event: Event, **fields: Any) -> None:
    """Log one event and its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event.value, extra={"fields": fields}, stacklevel=2)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, logger, request id, fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        if (rid := request_id.get()) is not None:
            line["request_id"] = rid
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same line for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        fields = "  ".join(f"{k}={v}" for k, v in getattr(record, "fields", {}).items())
        line = f"{at} {record.levelname.lower():7} {record.getMessage()}  {fields}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(level: str, style: str) -> None:
    """Send every logger's records to stderr in the chosen style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic.runtime.migration", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
