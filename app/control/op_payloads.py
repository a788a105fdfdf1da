"""The verbs on payloads: what single ops work on, which is kept until nobody can need it.

What comes in: a session and jobs. What goes out: bytes, as they were given. Whether
an op would be done again, and so needs its payload, is known to who drops it. It must not know:
what is in a payload.
"""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.job_tables import JobRow, OpPayloadRow
from app.domain import Job, JobStatus

#: Payloads that one `drop_failed` takes.
BATCH = 500

#: How a job ended whose op is never done again.
_FAILED = (JobStatus.FAILED.value, JobStatus.CANCELLED.value)


async def keep(session: AsyncSession, job: Job, run: str, payload: bytes) -> None:
    """Keep what the op of a job works on; `run` is empty if it is about none."""
    session.add(OpPayloadRow(job_number=job.number, run=run, payload=payload))
    await session.flush()


async def of_job(session: AsyncSession, job: Job) -> bytes | None:
    """The payload of a job's op, if it has one still."""
    found: bytes | None = await session.scalar(
        select(OpPayloadRow.payload).where(OpPayloadRow.job_number == job.number)
    )
    return found


async def drop(session: AsyncSession, job: Job) -> None:
    """Drop what the op of a job worked on."""
    await session.execute(delete(OpPayloadRow).where(OpPayloadRow.job_number == job.number))


async def drop_before(session: AsyncSession, run: str, job: Job) -> None:
    """Drop what the ops of a run before this one worked on."""
    await session.execute(
        delete(OpPayloadRow).where(OpPayloadRow.run == run, OpPayloadRow.job_number < job.number)
    )


async def drop_failed(session: AsyncSession) -> int:
    """Drop what ops worked on that failed or were cancelled; how many there were, of a batch."""
    ended = (
        select(OpPayloadRow.job_number)
        .join(JobRow, JobRow.number == OpPayloadRow.job_number)
        .where(JobRow.status.in_(_FAILED))
        .limit(BATCH)
    )
    numbers = (await session.scalars(ended)).all()
    await session.execute(delete(OpPayloadRow).where(OpPayloadRow.job_number.in_(numbers)))
    return len(numbers)
