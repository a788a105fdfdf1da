"""The durable queue: all that may happen to a job, each as a function over an open transaction.

    queued ──claim──▶ running ──finish, fail, cancelled──▶ succeeded, failed, cancelled
      ▲ ▲                │ │
      │ └─give_back,     │ └─paused─▶ paused
      │   expire─────────┘              │
      └──────────────resume─────────────┘

What comes in: a session, a clock, plain values. What goes out: frozen jobs, or an error: of the
caller (`NotFound`, `Conflict`) or `LeaseLost`, which says that a runner must stop. None commits,
and each writes the event that tells of it in the same transaction. Knows nothing of what a job
does. Leases are measured by the database's clock, other times come from the `Clock`.

A cancellation or a pause of a running job is a flag, which its next heartbeat answers. If its
runner is lost first, the flag decides what becomes of the job.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.engine import POSTGRESQL
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.domain import Job, JobError, JobEventType, JobKind, JobStatus
from app.errors import Conflict
from app.jobs.claims import claim
from app.jobs.heartbeats import heartbeat
from app.jobs.lookup import (
    UNFINISHED,
    Depth,
    depth,
    estimate,
    events,
    get,
    list_,
    position,
    unfinished,
)
from app.jobs.rows import (
    Flags,
    Lease,
    LeaseLost,
    NewEvent,
    add_event,
    has,
    held,
    job_of,
    lease_of,
    locked,
)

__all__ = [
    "UNFINISHED",
    "Depth",
    "Flags",
    "Lease",
    "LeaseLost",
    "NewEvent",
    "NewJob",
    "cancelled",
    "claim",
    "depth",
    "estimate",
    "events",
    "expire",
    "fail",
    "finish",
    "get",
    "give_back",
    "heartbeat",
    "lease_of",
    "list_",
    "paused",
    "position",
    "request_cancel",
    "request_pause",
    "resume",
    "submit",
    "unfinished",
]

#: Leases that one `expire` ends.
BATCH = 100
#: Why a job has failed whose gateway was lost once too often.
GATEWAY_LOST = "gateway_lost"
#: First half of a lock's number; the second is of the key whose submissions take turns.
KEY_LOCK = 7_041_779

_PREFIXES = {JobKind.FINE_TUNE: "ftjob-", JobKind.TRAIN_OP: "op-"}


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to submit. Jobs with one `lock` run one after another; a greater `priority` first."""

    kind: JobKind
    key_id: str
    spec: Mapping[str, Any]
    trainer: str | None = None
    lock: str | None = None
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_attempts: int = 5
    id: str | None = None


async def submit(
    session: AsyncSession, clock: Clock, new: NewJob, *, most: int | None = None
) -> Job:
    """Put a job at the end of the queue.

    Raises:
        Conflict: its `id` is taken, or its key has `most` jobs that have not ended.
    """
    if most is not None:
        await _check_room(session, new.key_id, most)
    taken = None if new.id is None else await session.scalar(_number_of(new.id))
    if taken is not None:
        raise Conflict(f"There is a job {new.id!r} already.", param="id")
    row = JobRow(
        id=new.id or _PREFIXES[new.kind] + secrets.token_hex(12),
        kind=new.kind.value,
        key_id=new.key_id,
        trainer=new.trainer,
        lock=new.lock,
        priority=new.priority,
        status=JobStatus.QUEUED.value,
        spec=dict(new.spec),
        progress={},
        details=dict(new.metadata),
        attempts=0,
        max_attempts=new.max_attempts,
        cancel_requested=False,
        pause_requested=False,
        last_event=0,
        created_at=clock.now(),
    )
    session.add(row)
    await session.flush()
    await _tell(session, clock, row, "The job is queued.")
    return job_of(row)


async def finish(
    session: AsyncSession, clock: Clock, lease: Lease, result: Mapping[str, Any]
) -> None:
    """End a job well. Raises LeaseLost, which undoes all that its transaction did."""
    row = await held(session, lease)
    row.result = dict(result)
    await _end(session, clock, row, JobStatus.SUCCEEDED, "The job has succeeded.")


async def fail(session: AsyncSession, clock: Clock, lease: Lease, error: JobError) -> None:
    """End a job that would fail again. Raises LeaseLost."""
    await _fail(session, clock, await held(session, lease), error)


async def cancelled(session: AsyncSession, clock: Clock, lease: Lease) -> None:
    """End a job whose cancellation was requested, once nothing of it goes on. Raises LeaseLost."""
    await _cancel(session, clock, await held(session, lease))


async def paused(
    session: AsyncSession,
    clock: Clock,
    lease: Lease,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Lay a job aside whose pause was requested. Raises LeaseLost.

    If it was resumed meanwhile it is queued again; if it was cancelled, that is its end.
    """
    row = await held(session, lease)
    if progress is not None:
        row.progress = dict(progress)
    await _let_go(session, clock, row, JobError("resumed", "The job was resumed."), count=False)


async def give_back(
    session: AsyncSession,
    clock: Clock,
    lease: Lease,
    reason: JobError,
    *,
    count: bool,
    delay_s: float = 0.0,
) -> JobStatus:
    """Let someone else go on with a job, not before `delay_s` from now. Raises LeaseLost.

    With `count`, an attempt is used up, and the job fails with `reason` if it was the last one.
    The answer is what became of the job.
    """
    row = await held(session, lease)
    return await _let_go(session, clock, row, reason, count=count, delay_s=delay_s)


async def expire(session: AsyncSession, clock: Clock) -> Sequence[Job]:
    """Take jobs away from runners whose leases ended; they are as they are after that."""
    query = (
        select(JobRow)
        .where(has(JobStatus.RUNNING), JobRow.lease_expires_at < database_time())
        .order_by(JobRow.number)
        .limit(BATCH)
        # A row that is locked is being written by its runner: it is alive.
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    rows = (await session.scalars(query)).all()
    reason = JobError(GATEWAY_LOST, "The gateway that ran the job was lost.")
    for row in rows:
        await _let_go(session, clock, row, reason, count=True)
    return [job_of(row) for row in rows]


async def request_cancel(
    session: AsyncSession, clock: Clock, job_id: str, key_id: str | None = None
) -> Job:
    """Cancel a job: at once if it waits, else by a flag. One that has ended is a Conflict."""
    row = await locked(session, job_id, key_id)
    status = _unfinished(row)
    if status is not JobStatus.RUNNING:
        row.cancel_requested = True
        await _cancel(session, clock, row)
    elif not row.cancel_requested:
        row.cancel_requested = True
        await _say(session, clock, row, "Cancellation was requested.")
    return job_of(row)


async def request_pause(
    session: AsyncSession, clock: Clock, job_id: str, key_id: str | None = None
) -> Job:
    """Pause a job: at once if it waits, else by a flag. One that has ended is a Conflict."""
    row = await locked(session, job_id, key_id)
    status = _unfinished(row)
    if status is JobStatus.QUEUED:
        await _pause(session, clock, row)
    elif status is JobStatus.RUNNING and not row.pause_requested:
        row.pause_requested = True
        await _say(session, clock, row, "A pause was requested.")
    return job_of(row)


async def resume(
    session: AsyncSession, clock: Clock, job_id: str, key_id: str | None = None
) -> Job:
    """Queue a paused job again, or take a pause back that has not begun; else a Conflict."""
    row = await locked(session, job_id, key_id)
    status = _unfinished(row)
    if status is JobStatus.PAUSED:
        row.status = JobStatus.QUEUED.value
        await _tell(session, clock, row, "The job is queued again.")
    elif row.pause_requested:
        row.pause_requested = False
        await _say(session, clock, row, "The pause was taken back.")
    else:
        raise Conflict(f"Job {row.id!r} is {status}, not paused.", param="status")
    return job_of(row)


async def _check_room(session: AsyncSession, key_id: str, most: int) -> None:
    if session.get_bind().dialect.name == POSTGRESQL:
        # Held to the commit: two gateways must not count the same jobs and both add one.
        lock = text("SELECT pg_advisory_xact_lock(:many, :one)")
        whose = zlib.crc32(key_id.encode()) - (1 << 31)
        await session.execute(lock, {"many": KEY_LOCK, "one": whose})
    if await unfinished(session, key_id) >= most:
        raise Conflict(
            f"The key has {most} jobs waiting or running, which is the most it may have: wait "
            "for one to end, or cancel one.",
            code="too_many_jobs",
        )


async def _let_go(
    session: AsyncSession,
    clock: Clock,
    row: JobRow,
    reason: JobError,
    *,
    count: bool,
    delay_s: float = 0.0,
) -> JobStatus:
    """What becomes of a running job that nobody runs any more."""
    if not count or row.progressed_attempt == row.attempts:
        row.max_attempts += 1  # and not one attempt less: that is the fencing token
    if row.cancel_requested:
        await _cancel(session, clock, row)
    elif row.pause_requested:
        await _pause(session, clock, row)
    elif row.attempts >= row.max_attempts:
        tried = f"{reason.message} It was attempt {row.attempts}, and the last one allowed."
        await _fail(session, clock, row, JobError(reason.code, tried, reason.param))
    else:
        row.status = JobStatus.QUEUED.value
        _drop_lease(row)
        if delay_s:
            row.not_before = database_time(delay_s)
        level = "warn" if count else "info"
        await _tell(session, clock, row, f"{reason.message} The job is queued again.", level)
    return JobStatus(row.status)


async def _fail(session: AsyncSession, clock: Clock, row: JobRow, error: JobError) -> None:
    row.error = asdict(error)
    await _end(session, clock, row, JobStatus.FAILED, error.message, "error")


async def _cancel(session: AsyncSession, clock: Clock, row: JobRow) -> None:
    await _end(session, clock, row, JobStatus.CANCELLED, "The job was cancelled.")


async def _end(
    session: AsyncSession,
    clock: Clock,
    row: JobRow,
    status: JobStatus,
    message: str,
    level: str = "info",
) -> None:
    row.status, row.finished_at = status.value, clock.now()
    _drop_lease(row)
    await _tell(session, clock, row, message, level)


async def _pause(session: AsyncSession, clock: Clock, row: JobRow) -> None:
    row.status, row.pause_requested = JobStatus.PAUSED.value, False
    _drop_lease(row)
    await _tell(session, clock, row, "The job is paused.")


def _drop_lease(row: JobRow) -> None:
    row.lease_token = row.lease_expires_at = row.not_before = None


async def _tell(
    session: AsyncSession, clock: Clock, row: JobRow, message: str, level: str = "info"
) -> None:
    """Record the status the job has now."""
    event = NewEvent(JobEventType.STATUS, message, level, {"status": row.status})
    await add_event(session, clock, row, event)


async def _say(session: AsyncSession, clock: Clock, row: JobRow, message: str) -> None:
    await add_event(session, clock, row, NewEvent(JobEventType.MESSAGE, message))


def _unfinished(row: JobRow) -> JobStatus:
    status = JobStatus(row.status)
    if status.terminal:
        raise Conflict(f"Job {row.id!r} has ended already: it is {status}.", param="status")
    return status


def _number_of(job_id: str) -> Any:
    return select(JobRow.number).where(JobRow.id == job_id)
