"""Reading jobs: one, a page, their events; and where a job is in the queue.

What comes in: a session. What goes out: frozen values. It changes nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.clock import Clock
from app.db.engine import POSTGRESQL
from app.db.job_tables import JobEventRow, JobRow
from app.domain import Job, JobEvent, JobKind, JobStatus
from app.errors import InvalidRequest
from app.jobs.claims import last_served, on_trainer
from app.jobs.rows import event_of, has, job_of, unknown

MAX_PAGE = 1000
#: Ended jobs whose durations say how long the next will take.
RECENT = 20
UNFINISHED = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)


@dataclass(frozen=True, slots=True)
class Depth:
    """How many jobs of a trainer have a status, and since when the oldest of them is there."""

    trainer: str | None
    status: JobStatus
    jobs: int
    oldest_created_at: datetime


async def get(session: AsyncSession, job_id: str, key_id: str | None = None) -> Job:
    """One job, or NotFound; with `key_id`, only one of that key."""
    row = await session.scalar(select(JobRow).where(JobRow.id == job_id))
    if row is None or key_id not in (None, row.key_id):
        raise unknown(job_id)
    return job_of(row)


async def list_(
    session: AsyncSession,
    *,
    kind: JobKind | None = None,
    key_id: str | None = None,
    status: JobStatus | None = None,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
    after: str | None = None,
    limit: int = 20,
) -> tuple[Sequence[Job], bool]:
    """Jobs, newest first, from the one after job `after`; and whether there are more.

    `metadata`: only jobs that have all of these pairs.
    """
    _check(limit)
    query = select(JobRow).order_by(JobRow.number.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(JobRow.number < (await _cursor(session, after, key_id)))
    if kind is not None:
        query = query.where(JobRow.kind == kind.value)
    if key_id is not None:
        query = query.where(JobRow.key_id == key_id)
    if status is not None:
        query = query.where(has(status))
    for name, value in (metadata or {}).items():
        query = query.where(_has_pair(session, name, value))
    if without_metadata:
        query = query.where(~_has_pair(session))
    rows = (await session.scalars(query)).all()
    return [job_of(row) for row in rows[:limit]], len(rows) > limit


async def events(
    session: AsyncSession,
    job: Job,
    *,
    after: int | None = None,
    limit: int = 20,
    newest_first: bool = True,
) -> tuple[Sequence[JobEvent], bool]:
    """A job's events from the one after event number `after`; and whether there are more."""
    _check(limit)
    query = select(JobEventRow).where(JobEventRow.job_number == job.number).limit(limit + 1)
    number = JobEventRow.number
    query = query.order_by(number.desc() if newest_first else number)
    if after is not None:
        query = query.where(number < after if newest_first else number > after)
    rows = (await session.scalars(query)).all()
    return [event_of(job.id, row) for row in rows[:limit]], len(rows) > limit


async def unfinished(session: AsyncSession, key_id: str) -> int:
    """How many jobs of a key are waiting, running or paused."""
    query = select(func.count()).where(
        JobRow.status.in_([status.value for status in UNFINISHED]), JobRow.key_id == key_id
    )
    return (await session.scalar(query)) or 0


async def depth(session: AsyncSession) -> Sequence[Depth]:
    """What every trainer has to do."""
    query = (
        select(JobRow.trainer, JobRow.status, func.count(), func.min(JobRow.created_at))
        .where(JobRow.status.in_([status.value for status in UNFINISHED]))
        .group_by(JobRow.trainer, JobRow.status)
    )
    return [
        Depth(trainer, JobStatus(status), jobs, oldest)
        for trainer, status, jobs, oldest in await session.execute(query)
    ]


async def position(session: AsyncSession, job: Job) -> int | None:
    """How many jobs of its trainer will be claimed before this one; None if it does not wait.

    As if no job came, failed or was given back meanwhile, and without regard to locks. Keys take
    turns: before the n-th job of this key, every other key gets n, or as many as it has.
    """
    if job.status is not JobStatus.QUEUED:
        return None
    waiting = aliased(JobRow)
    at = [has(JobStatus.QUEUED, waiting), on_trainer(waiting, job.trainer)]
    higher = await session.scalar(select(func.count()).where(*at, waiting.priority > job.priority))
    keys = (
        select(
            waiting.key_id,
            func.count().label("jobs"),
            func.min(waiting.number).label("head"),
        )
        .where(*at, waiting.priority == job.priority)
        .group_by(waiting.key_id)
        .subquery()
    )
    turns = await session.execute(
        select(
            keys.c.key_id,
            keys.c.jobs,
            keys.c.head,
            last_served(job.trainer, job.priority, keys.c.key_id),
        )
    )
    lines: dict[str, tuple[int, tuple[int, int]]] = {
        key_id: (jobs, (served, head)) for key_id, jobs, head, served in turns
    }
    own = await session.scalar(
        select(func.count()).where(
            *at,
            waiting.priority == job.priority,
            waiting.key_id == job.key_id,
            waiting.number < job.number,
        )
    )
    mine = own or 0
    _, my_turn = lines.pop(job.key_id, (0, (0, job.number)))
    others = (min(jobs, mine + (turn < my_turn)) for jobs, turn in lines.values())
    return (higher or 0) + mine + sum(others)


async def estimate(session: AsyncSession, clock: Clock, job: Job, *, capacity: int) -> float | None:
    """Seconds until a waiting job starts, if all jobs of its trainer take as long as the last ones.

    `capacity` is how many the trainer does at once. None if the job does not wait, or must wait
    for others and no job like it has ended yet.
    """
    before = await position(session, job)
    if before is None:
        return None
    at = on_trainer(JobRow, job.trainer)
    started = (
        await session.scalars(select(JobRow.started_at).where(has(JobStatus.RUNNING), at))
    ).all()
    if before + len(started) < capacity:
        return 0.0
    last = (
        select(JobRow.started_at, JobRow.finished_at)
        .where(has(JobStatus.SUCCEEDED), at, JobRow.kind == job.kind.value)
        .order_by(JobRow.claim_number.desc())
        .limit(RECENT)
    )
    took = [
        (finished_at - started_at).total_seconds()
        for started_at, finished_at in await session.execute(last)
        if started_at and finished_at
    ]
    if not took:
        return None
    mean, now = sum(took) / len(took), clock.now()
    left = [max(0.0, mean - (now - start).total_seconds()) for start in started if start]
    return _starts_in(before, left, mean, capacity)


def _starts_in(before: int, left: Sequence[float], each_s: float, capacity: int) -> float:
    """When a place is free after `before` others: `left` is what each running job still takes."""
    idle = [0.0] * (capacity - len(left))
    places = [*idle, *sorted(left)[max(0, len(left) - capacity) :]]
    heapq.heapify(places)
    for _ in range(before):
        heapq.heapreplace(places, places[0] + each_s)
    return places[0]


def _has_pair(session: AsyncSession, *pair: str) -> ColumnElement[bool]:
    """Whether a job's metadata has a (name, value); without one, whether it has any."""
    each = func.json_each_text if session.get_bind().dialect.name == POSTGRESQL else func.json_each
    pairs = each(JobRow.details).table_valued("key", "value")
    found = select(1).select_from(pairs)
    if pair:
        found = found.where(pairs.c.key == pair[0], pairs.c.value == pair[1])
    return exists(found)


async def _cursor(session: AsyncSession, job_id: str, key_id: str | None) -> int:
    query = select(JobRow.number).where(JobRow.id == job_id)
    if key_id is not None:
        query = query.where(JobRow.key_id == key_id)
    number = await session.scalar(query)
    if number is None:
        raise unknown(job_id, param="after")
    return number


def _check(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must be 1 to {MAX_PAGE}, not {limit}.", param="limit")
