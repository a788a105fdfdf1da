"""Rows of jobs and events, and who may write them.

What comes in: a session and a lease. What goes out: the row, locked, if the lease is still held;
rows as frozen values; numbered events. Knows nothing of when a job changes its status.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, literal, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.job_tables import JobEventRow, JobRow
from app.domain import Job, JobError, JobEvent, JobEventType, JobKind, JobStatus
from app.errors import NotFound

MAX_MESSAGE = 4096


class LeaseLost(Exception):
    """Someone else has the job now, or it has ended: stop, and write nothing of it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a running job: `attempt` is its fencing token, `token` its runner's."""

    job_id: str
    number: int
    attempt: int
    token: str


@dataclass(frozen=True, slots=True)
class Flags:
    """What was asked of a running job meanwhile."""

    cancel: bool = False
    pause: bool = False


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to record. One that names a `step` is recorded once, the first time."""

    type: JobEventType
    message: str
    level: str = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


def lease_of(job: Job) -> Lease:
    """The lease that came with a claim."""
    assert job.lease_token is not None, "only a running job has a lease"
    return Lease(job.id, job.number, job.attempts, job.lease_token)


def has(status: JobStatus, row: Any = JobRow) -> ColumnElement[bool]:
    """Whether a job is in `status`: written out, as few statuses are as rare as a plan hopes."""
    found: ColumnElement[bool] = row.status == literal(status.value, literal_execute=True)
    return found


def is_held(
    number: Any, attempt: Any, token: Any, row: Any = JobRow
) -> tuple[ColumnElement[bool], ...]:
    """What is true of a job's row as long as this lease of it is held."""
    return (
        row.number == number,
        row.attempts == attempt,
        row.lease_token == token,
        has(JobStatus.RUNNING, row),
    )


def lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"attempt {lease.attempt} at job {lease.job_id} has lost its lease")


async def held(session: AsyncSession, lease: Lease) -> JobRow:
    """The row of a job whose lease is held, locked until the transaction ends; or LeaseLost."""
    query = select(JobRow).where(*is_held(lease.number, lease.attempt, lease.token))
    row = await _locked(session, query)
    if row is None:
        raise lost(lease)
    return row


async def locked(session: AsyncSession, job_id: str, key_id: str | None) -> JobRow:
    """A job's row, locked until the transaction ends; or NotFound. `key_id`: only if it is its."""
    row = await _locked(session, select(JobRow).where(JobRow.id == job_id))
    if row is None or key_id not in (None, row.key_id):
        raise unknown(job_id)
    return row


def unknown(job_id: str, param: str | None = None) -> NotFound:
    return NotFound(f"There is no job {job_id[:200]!r}.", param=param)


async def add_event(session: AsyncSession, clock: Clock, row: JobRow, event: NewEvent) -> None:
    """Record an event that is no step under the next number of a locked job."""
    row.last_event += 1
    session.add(event_row(clock, row, event))
    await session.flush()


def event_row(clock: Clock, row: JobRow, event: NewEvent) -> JobEventRow:
    """The row of the job's last event."""
    return JobEventRow(**event_values(clock, row.number, row.last_event, event))


def event_values(clock: Clock, job_number: int, number: int, event: NewEvent) -> dict[str, Any]:
    """The columns of an event."""
    return {
        "job_number": job_number,
        "number": number,
        "type": event.type.value,
        "level": event.level,
        "message": event.message.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_MESSAGE],
        "data": dict(event.data),
        "step": event.step,
        "created_at": clock.now(),
    }


def job_of(row: JobRow) -> Job:
    return Job(
        id=row.id,
        number=row.number,
        kind=JobKind(row.kind),
        key_id=row.key_id,
        trainer=row.trainer,
        lock=row.lock,
        priority=row.priority,
        status=JobStatus(row.status),
        spec=row.spec,
        progress=row.progress,
        metadata=row.details,
        attempts=row.attempts,
        max_attempts=row.max_attempts,
        cancel_requested=row.cancel_requested,
        pause_requested=row.pause_requested,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        lease_token=row.lease_token,
        result=row.result,
        error=None if row.error is None else JobError(**row.error),
    )


def event_of(job_id: str, row: JobEventRow) -> JobEvent:
    return JobEvent(
        job_id=job_id,
        number=row.number,
        type=JobEventType(row.type),
        level=row.level,
        message=row.message,
        created_at=row.created_at,
        data=row.data,
        step=row.step,
    )


async def _locked(session: AsyncSession, query: Any) -> JobRow | None:
    # What the session knows of the row may be older than the lock.
    fresh = query.with_for_update().execution_options(populate_existing=True)
    found: JobRow | None = await session.scalar(fresh)
    return found
