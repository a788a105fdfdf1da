"""The queue's tables: jobs with events, checkpoints and payloads, and runs that outlive a job.

What comes in: values set by `app.jobs` and `app.control`. What goes out: rows, which never leave
the transaction they were read in. Knows nothing of what a job does.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.db.tables import Id, Row

#: The status in which a job holds its lock. A literal: the index below is part of the schema.
_RUNNING = text("status = 'running'")


class JobRow(Row):
    """Durable work. Whoever runs it holds the lease: `lease_token`, until `lease_expires_at`.

    `ix_jobs_lock` lets one running job hold a lock, whatever the code that claims does wrong.
    `claim_number` is the count of its trainer's claims at its last one: at each priority, the key
    that was served longest ago goes first. A job that was given back is not claimed again before
    `not_before`. Of `attempts` at most `max_attempts` are allowed, which grows by one after each
    that made progress (`progressed_attempt`) or was not to blame.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("id"),
        Index(
            "ix_jobs_lock", "lock", unique=True, sqlite_where=_RUNNING, postgresql_where=_RUNNING
        ),
        # Whatever a claim asks of a waiting job, so that it reads no row but the one it takes.
        Index(
            "ix_jobs_status",
            *("status", "trainer", "priority", "key_id", "number", "kind", "lock", "not_before"),
        ),
        Index("ix_jobs_key", "key_id", "number"),
        Index("ix_jobs_claims", "trainer", "claim_number"),
        Index("ix_jobs_turns", "trainer", "priority", "key_id", "claim_number"),
    )

    number: Mapped[int] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(String(40))
    kind: Mapped[str] = mapped_column(String(16))
    key_id: Mapped[str] = mapped_column(String(64))
    trainer: Mapped[str | None] = mapped_column(String(128))
    lock: Mapped[str | None] = mapped_column(String(160))
    priority: Mapped[int]
    status: Mapped[str] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    attempts: Mapped[int]
    max_attempts: Mapped[int]
    progressed_attempt: Mapped[int] = mapped_column(server_default="0")
    claim_number: Mapped[int | None] = mapped_column(BigInteger)
    lease_token: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    cancel_requested: Mapped[bool]
    pause_requested: Mapped[bool]
    last_event: Mapped[int]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEventRow(Row):
    """One thing that happened to a job, numbered from 1 by `jobs.last_event`."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index(
            "ix_job_events_step",
            "job_number",
            "step",
            unique=True,
            sqlite_where=text("step IS NOT NULL"),
            postgresql_where=text("step IS NOT NULL"),
        ),
    )

    job_number: Mapped[int] = mapped_column(
        ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(16))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(4096))
    data: Mapped[dict[str, Any]]
    step: Mapped[int | None]
    created_at: Mapped[datetime]


class CheckpointRow(Row):
    """Weights a fine-tune job registered along the way."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_number", "step"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_number: Mapped[int] = mapped_column(ForeignKey("jobs.number", ondelete="CASCADE"))
    step: Mapped[int]
    model: Mapped[str] = mapped_column(String(300))
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class OpPayloadRow(Row):
    """What a single op works on: large, and needed only until its run's state is saved after it.

    `run` is empty for one that is about no run.
    """

    __tablename__ = "op_payloads"
    __table_args__ = (Index("ix_op_payloads_run", "run", "job_number"),)

    job_number: Mapped[int] = mapped_column(
        Id, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    run: Mapped[str] = mapped_column(String(128))
    payload: Mapped[bytes] = mapped_column(LargeBinary)


class TrainingRunRow(Row):
    """A run that lives across single ops: the adapter it became, and its next op's number.

    `version` is that adapter's newest, whose weights are those after `saved_steps` optimizer steps.
    The probe of the next one is of `probe_tokens`.
    """

    __tablename__ = "training_runs"
    __table_args__ = (Index("ix_training_runs_key", "key_id"),)

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64))
    trainer: Mapped[str] = mapped_column(String(128))
    base_model: Mapped[str] = mapped_column(String(256))
    spec: Mapped[dict[str, Any]]
    next_seq: Mapped[int]
    optim_steps: Mapped[int]
    saved_steps: Mapped[int | None]
    version: Mapped[int | None]
    created_at: Mapped[datetime]
    removed_at: Mapped[datetime | None]
    probe_tokens: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
