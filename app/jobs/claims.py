"""Who is next: one statement takes a waiting job and makes it running.

What comes in: which trainers have room for how many. What goes out: a job with its lease, or none.

The order, for each trainer: the highest priority; then the key that the trainer served longest
ago at this priority, so that a key with a thousand jobs does not keep the others waiting; then the
order of submission. A job waits while another one runs under its lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Float,
    Integer,
    ScalarSelect,
    bindparam,
    case,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.clock import Clock
from app.db.engine import POSTGRESQL, SQLITE
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.db.tables import Instant
from app.domain import Job, JobEventType, JobKind, JobStatus
from app.jobs.rows import NewEvent, event_row, has, job_of

#: Any number, as long as no other program takes it on the same database.
CLAIM_LOCK = 7_041_778


async def claim(
    session: AsyncSession,
    clock: Clock,
    *,
    capacities: Mapping[str | None, int],
    kinds: Collection[JobKind],
    token: str,
    lease_s: float,
) -> Job | None:
    """Take the next job of these kinds, for a trainer that has room; None if there is none.

    `capacities`: how many running jobs each trainer may have, over all gateways; None stands for
    jobs without a trainer. The job's lease ends `lease_s` from now by the database's clock.
    """
    if session.get_bind().dialect.name == POSTGRESQL:
        # Claimers take turns: a count of what runs must not be made by two at the same moment.
        await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": CLAIM_LOCK})
    given = {"a_token": token, "a_lease_s": lease_s, "a_now": clock.now()}
    for trainer, capacity in capacities.items():
        statement = _statement(trainer is None, tuple(kinds))
        row = await _take(
            session, statement, given | {"a_trainer": trainer, "a_capacity": capacity}
        )
        if row is not None:
            again = f" again, attempt {row.attempts}" if row.attempts > 1 else ""
            data = {"status": JobStatus.RUNNING.value, "attempt": row.attempts}
            event = NewEvent(JobEventType.STATUS, f"The job has started{again}.", data=data)
            session.add(event_row(clock, row, event))
            await session.flush()
            return job_of(row)
    return None


def on_trainer(row: type[JobRow], trainer: Any) -> ColumnElement[bool]:
    return row.trainer.is_(None) if trainer is None else row.trainer == trainer


def last_served(trainer: Any, priority: Any, key_id: Any) -> ColumnElement[int]:
    """The trainer's count of claims when it last served this key, at this priority; 0 if never."""
    served = aliased(JobRow)
    newest = select(func.max(served.claim_number)).where(
        on_trainer(served, trainer), served.priority == priority, served.key_id == key_id
    )
    return func.coalesce(newest.scalar_subquery(), 0)


async def _take(
    session: AsyncSession, statement: Executable, given: Mapping[str, Any]
) -> JobRow | None:
    options = {"synchronize_session": False, "populate_existing": True}
    row: JobRow | None
    if session.get_bind().dialect.name == SQLITE:  # nobody writes beside us
        row = await session.scalar(statement, given, execution_options=options)
        return row
    try:
        async with session.begin_nested():
            row = await session.scalar(statement, given, execution_options=options)
            return row
    except IntegrityError:  # the index on locks: someone has just started a job beside us
        return None


@cache
def _statement(without_trainer: bool, kinds: tuple[JobKind, ...]) -> Executable:
    """The claim. Made once: it takes longer to put together than to execute."""
    trainer = None if without_trainer else bindparam("a_trainer", type_=JobRow.trainer.type)
    counted = aliased(JobRow)
    claims = select(func.max(counted.claim_number)).where(on_trainer(counted, trainer))
    return (
        update(JobRow)
        .where(JobRow.number == _next(trainer, kinds), has(JobStatus.QUEUED))
        .values(
            status=JobStatus.RUNNING.value,
            attempts=JobRow.attempts + 1,
            claim_number=func.coalesce(claims.scalar_subquery(), 0) + 1,
            lease_token=bindparam("a_token"),
            lease_expires_at=database_time(bindparam("a_lease_s", type_=Float())),
            not_before=None,
            started_at=func.coalesce(JobRow.started_at, bindparam("a_now", type_=Instant())),
            last_event=JobRow.last_event + 1,
        )
        .returning(JobRow)
    )


def _next(trainer: Any, kinds: Collection[JobKind]) -> ScalarSelect[int]:
    # First one job a key, and only then when each key was served: a key may have thousands.
    first, waiting, running = aliased(JobRow), aliased(JobRow), aliased(JobRow)
    runs = select(func.count()).where(has(JobStatus.RUNNING, running), on_trainer(running, trainer))
    top = (
        select(first.priority)
        .where(*_claimable(first, trainer, kinds))
        .order_by(first.priority.desc())
        .limit(1)
    )
    heads = (
        select(waiting.key_id, waiting.priority, func.min(waiting.number).label("number"))
        .where(*_claimable(waiting, trainer, kinds), waiting.priority == top.scalar_subquery())
        .group_by(waiting.key_id, waiting.priority)
        .subquery()
    )
    served = last_served(trainer, heads.c.priority, heads.c.key_id)
    room = case((runs.scalar_subquery() < bindparam("a_capacity", type_=Integer()), 1), else_=0)
    # A limit of 0 is looked at before all else: a trainer without room costs no search.
    return select(heads.c.number).order_by(served, heads.c.number).limit(room).scalar_subquery()


def _claimable(
    row: type[JobRow], trainer: Any, kinds: Collection[JobKind]
) -> list[ColumnElement[bool]]:
    holder = aliased(JobRow)
    busy = select(holder.lock).where(has(JobStatus.RUNNING, holder), holder.lock.is_not(None))
    return [
        has(JobStatus.QUEUED, row),
        on_trainer(row, trainer),
        row.kind.in_([kind.value for kind in kinds]),
        or_(row.not_before.is_(None), row.not_before <= database_time()),
        or_(row.lock.is_(None), row.lock.not_in(busy)),
    ]
