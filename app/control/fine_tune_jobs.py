"""The verbs on fine-tune jobs that are in the queue or were.

What comes in: a session and ids. What goes out: jobs, events, checkpoints. Knows nothing of how a
job is done.

`owner` is the key that asks, or None for an admin, who sees everybody's jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.job_tables import CheckpointRow, JobRow
from app.domain import Checkpoint, Job, JobEvent, JobKind, JobStatus, Trainer
from app.errors import InvalidRequest, NotFound
from app.jobs import queue


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, and while it waits: how many go before it, and in how many seconds it may start."""

    job: Job
    position: int | None = None
    starts_in_s: float | None = None


async def get(session: AsyncSession, job_id: str, owner: str | None) -> Job:
    """One fine-tune job.

    Raises:
        NotFound: there is none, or it is another key's.
    """
    job = await queue.get(session, job_id, owner)
    if job.kind is not JobKind.FINE_TUNE:
        raise NotFound(f"Job {job_id!r} is no fine-tune job.", param="job_id")
    return job


async def view(
    session: AsyncSession, clock: Clock, job: Job, trainers: Mapping[str, Trainer]
) -> JobView:
    """The job and its place in the queue."""
    if job.status is not JobStatus.QUEUED:
        return JobView(job)
    position = await queue.position(session, job)
    trainer = trainers.get(job.trainer or "")
    starts_in_s = None
    if trainer is not None:
        starts_in_s = await queue.estimate(session, clock, job, capacity=trainer.max_jobs)
    return JobView(job, position, starts_in_s)


async def list_(
    session: AsyncSession,
    owner: str | None,
    *,
    metadata: Mapping[str, str],
    without_metadata: bool,
    after: str | None,
    limit: int,
) -> tuple[Sequence[Job], bool]:
    """Fine-tune jobs, the newest first; and whether there are more."""
    return await queue.list_(
        session,
        kind=JobKind.FINE_TUNE,
        key_id=owner,
        metadata=metadata,
        without_metadata=without_metadata,
        after=after,
        limit=limit,
    )


async def events(
    session: AsyncSession, job: Job, *, after: int | None, limit: int
) -> tuple[Sequence[JobEvent], bool]:
    """The job's events, the newest first; and whether there are more."""
    return await queue.events(session, job, after=after, limit=limit)


async def checkpoints(
    session: AsyncSession, job: Job, *, after: str | None, limit: int
) -> tuple[Sequence[Checkpoint], bool]:
    """The job's checkpoints, the newest first; and whether there are more."""
    of_job = CheckpointRow.job_number == job.number
    query = select(CheckpointRow).where(of_job).order_by(CheckpointRow.step.desc())
    if after is not None:
        step = await session.scalar(
            select(CheckpointRow.step).where(of_job, CheckpointRow.id == after)
        )
        if step is None:
            raise InvalidRequest(f"after names no checkpoint: {after[:100]!r}.", param="after")
        query = query.where(CheckpointRow.step < step)
    rows = (await session.scalars(query.limit(limit + 1))).all()
    found = [
        Checkpoint(row.id, job.id, row.step, row.model, row.metrics, row.created_at)
        for row in rows[:limit]
    ]
    return found, len(rows) > limit


async def cancel(session: AsyncSession, clock: Clock, job_id: str, owner: str | None) -> Job:
    """Stop a job for good: at once if it waits, else at its next step.

    Raises:
        NotFound: as `get`.
        Conflict: it has ended.
    """
    await get(session, job_id, owner)
    return await queue.request_cancel(session, clock, job_id, owner)


async def pause(session: AsyncSession, clock: Clock, job_id: str, owner: str | None) -> Job:
    """Lay a job aside, at once if it waits, else after its step. Raises as `cancel`."""
    await get(session, job_id, owner)
    return await queue.request_pause(session, clock, job_id, owner)


async def resume(session: AsyncSession, clock: Clock, job_id: str, owner: str | None) -> Job:
    """Let a paused job go on. Raises as `cancel`; Conflict also if it is not paused."""
    await get(session, job_id, owner)
    return await queue.resume(session, clock, job_id, owner)


async def maker_of(session: AsyncSession, model: str) -> Job | None:
    """The job that was to make an adapter of this name."""
    spec: Any = JobRow.spec
    query = select(JobRow.id).where(
        JobRow.kind == JobKind.FINE_TUNE.value, spec["model"].as_string() == model
    )
    job_id = await session.scalar(query.limit(1))
    return None if job_id is None else await queue.get(session, job_id)
