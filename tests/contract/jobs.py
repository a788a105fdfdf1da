"""A queue to test with: jobs submitted and claimed in one call, leases that run out when told to.

What comes in: a database. What goes out: frozen jobs. Each call is one transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import Clock
from app.db.engine import Database
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.domain import Job, JobEvent, JobKind
from app.jobs import queue
from app.jobs.queue import NewJob

T = TypeVar("T")

#: Longer than any test takes, so that a lease runs out only when told to.
LEASE_S = 600.0
TRAINER = "gpu"


class Queue:
    """A database and a clock, to call the queue's functions with."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self.db = db
        self.clock = clock

    async def do(self, verb: Callable[..., Awaitable[T]], *args: Any, **more: Any) -> T:
        """One verb in one transaction: those that write take the clock too."""
        async with self.db.begin() as session:
            return await verb(session, self.clock, *args, **more)

    async def read(self, look: Callable[..., Awaitable[T]], *args: Any, **more: Any) -> T:
        async with self.db.read() as session:
            return await look(session, *args, **more)

    async def submit(self, key_id: str = "key-a", *, most: int | None = None, **more: Any) -> Job:
        values: dict[str, Any] = {"kind": JobKind.FINE_TUNE, "spec": {}, "trainer": TRAINER}
        return await self.do(queue.submit, NewJob(key_id=key_id, **(values | more)), most=most)

    async def claim(
        self, capacities: Mapping[str | None, int] | None = None, token: str = "gateway-1"
    ) -> Job | None:
        return await self.do(
            queue.claim,
            capacities=capacities or {TRAINER: 1000},
            kinds=list(JobKind),
            token=token,
            lease_s=LEASE_S,
        )

    async def claimed(self, **more: Any) -> Job:
        job = await self.claim(**more)
        assert job is not None
        return job

    async def get(self, job: Job) -> Job:
        return await self.read(queue.get, job.id)

    async def events(self, job: Job) -> list[JobEvent]:
        """All of a job's events, the first one first."""
        found, more = await self.read(queue.events, job, limit=1000, newest_first=False)
        assert not more
        return list(found)

    async def run_out(self, *jobs: Job) -> None:
        """Let the leases of these jobs be over."""
        numbers = [job.number for job in jobs]
        async with self.db.begin() as session:
            await set_lease(session, numbers, in_s=-1.0)

    async def ripen(self) -> None:
        """Let the pause of every job that was given back be over."""
        async with self.db.begin() as session:
            await session.execute(update(JobRow).values(not_before=None))


async def set_lease(session: AsyncSession, numbers: list[int], in_s: float) -> None:
    await session.execute(
        update(JobRow)
        .where(JobRow.number.in_(numbers), JobRow.lease_expires_at.is_not(None))
        .values(lease_expires_at=database_time(in_s))
    )
