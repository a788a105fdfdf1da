"""One heartbeat: keeps a lease, records what happened, and says what was asked meanwhile.

What comes in: a session and a lease. What goes out: flags. A job that trains sends a few a second,
so its statements are made once and its rows are never read. Knows nothing of what a job does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from sqlalchemy import Float, Integer, Table, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.engine import POSTGRESQL
from app.db.job_tables import JobEventRow, JobRow
from app.db.leases import database_time
from app.jobs.rows import (
    Flags,
    Lease,
    NewEvent,
    event_values,
    is_held,
    lost,
)

_JOBS = cast(Table, JobRow.__table__)
_EVENTS = cast(Table, JobEventRow.__table__)
_LOCKED = select(_JOBS.c.number).where(_JOBS.c.number == bindparam("a_number")).with_for_update()
#: Which of some steps a job has.
_RECORDED = select(_EVENTS.c.step).where(
    _EVENTS.c.job_number == bindparam("a_number"),
    _EVENTS.c.step.in_(bindparam("a_steps", expanding=True)),
)
_INSERT = insert(_EVENTS)


async def heartbeat(
    session: AsyncSession,
    clock: Clock,
    lease: Lease,
    *,
    lease_s: float,
    events: Sequence[NewEvent] = (),
    progress: Mapping[str, Any] | None = None,
) -> Flags:
    """Keep the lease for `lease_s` more, record what happened, and see what was asked meanwhile.

    `progress` replaces what the job's handler keeps between attempts. An attempt that records a
    step for the first time is not counted. Raises LeaseLost.
    """
    new = await _unrecorded(session, lease.number, events)
    given: dict[str, Any] = {
        "a_number": lease.number,
        "a_attempt": lease.attempt,
        "a_token": lease.token,
        "a_lease_s": lease_s,
        "a_events": len(new),
    }
    if progress is not None:
        given["a_progress"] = dict(progress)
    progressed = any(event.step is not None for event in new)
    statement = _statement(progressed, progress is not None)
    row = (await session.execute(statement, given)).one_or_none()
    if row is None:
        raise lost(lease)
    if new:
        first = row.last_event - len(new) + 1
        rows = [event_values(clock, lease.number, at, each) for at, each in enumerate(new, first)]
        await session.execute(_INSERT, rows)
    return Flags(cancel=row.cancel_requested, pause=row.pause_requested)


async def _unrecorded(
    session: AsyncSession, number: int, events: Sequence[NewEvent]
) -> list[NewEvent]:
    """Events without those of steps that a job has already, or that come twice."""
    steps = {event.step for event in events if event.step is not None}
    known: set[int | None] = set()
    if steps:
        if session.get_bind().dialect.name == POSTGRESQL:
            # What is read must still be so when it is written; SQLite has one writer anyway.
            await session.execute(_LOCKED, {"a_number": number})
        given = {"a_number": number, "a_steps": sorted(steps)}
        known.update(await session.scalars(_RECORDED, given))
    new = []
    for event in events:
        if event.step is None or event.step not in known:
            new.append(event)
        if event.step is not None:
            known.add(event.step)
    return new


@cache
def _statement(progressed: bool, progress: bool) -> Any:
    """Writes the job's row, if the lease is held. Made once: see `claims._statement`."""
    events = bindparam("a_events", type_=Integer())
    values: dict[str, Any] = {
        "lease_expires_at": database_time(bindparam("a_lease_s", type_=Float())),
        "last_event": _JOBS.c.last_event + events,
    }
    if progressed:
        values["progressed_attempt"] = _JOBS.c.attempts
    if progress:
        values["progress"] = bindparam("a_progress", type_=_JOBS.c.progress.type)
    held = is_held(bindparam("a_number"), bindparam("a_attempt"), bindparam("a_token"), _JOBS.c)
    written = (_JOBS.c.last_event, _JOBS.c.cancel_requested, _JOBS.c.pause_requested)
    return update(_JOBS).where(*held).values(values).returning(*written)
