"""However many jobs have ended, a claim finds the next of those that wait in an index."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event, insert, text

from app.db.engine import POSTGRESQL, Database
from app.db.job_tables import JobRow
from app.domain import JobKind, JobStatus
from app.jobs import queue
from app.jobs.rows import lease_of
from tests.contract.jobs import TRAINER, Queue
from tests.contract.registry import MovableClock

WAITING, ENDED, KEYS = 2_000, 20_000, 100


def row(number: int) -> dict[str, Any]:
    ended = number < ENDED
    at = datetime(2030, 1, 1, tzinfo=UTC)
    return {
        "id": f"ftjob-{number}",
        "kind": JobKind.FINE_TUNE.value,
        "key_id": f"key-{number % KEYS}",
        "trainer": TRAINER,
        "lock": f"trainer:{TRAINER}",
        "priority": 0,
        "status": (JobStatus.SUCCEEDED if ended else JobStatus.QUEUED).value,
        "spec": {"training_file": "file-abc", "suffix": "x" * 64},
        "progress": {},
        "details": {},
        "attempts": int(ended),
        "max_attempts": 5,
        "claim_number": number + 1 if ended else None,
        "cancel_requested": False,
        "pause_requested": False,
        "last_event": 0,
        "created_at": at,
        "started_at": at if ended else None,
        "finished_at": at if ended else None,
    }


async def settle(db: Database) -> None:
    """What PostgreSQL does by itself with a table that is there for longer than a test."""
    if db.dialect == POSTGRESQL:
        async with db.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("VACUUM ANALYZE jobs"))


async def plan_of_a_claim(jobs: Queue) -> str:
    """What the database says it does for the statement that claims."""
    seen: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, given: Any, *_more: Any) -> None:
        if statement.startswith("UPDATE jobs"):
            seen.append((statement, given))

    event.listen(jobs.db.engine.sync_engine, "before_cursor_execute", note)
    await jobs.do(queue.finish, lease_of(await jobs.claimed()), {})
    event.remove(jobs.db.engine.sync_engine, "before_cursor_execute", note)
    statement, given = seen[0]
    explain = "EXPLAIN" if jobs.db.dialect == POSTGRESQL else "EXPLAIN QUERY PLAN"
    async with jobs.db.begin() as session:
        connection = await session.connection()
        plan = await connection.exec_driver_sql(f"{explain} {statement}", given)
        return "\n".join(str(line[-1]) for line in plan)


@pytest.mark.timeout(120)
async def test_a_claim_reads_an_index_of_what_waits(db: Database) -> None:
    jobs = Queue(db, MovableClock())
    async with db.begin() as session:
        await session.execute(insert(JobRow), [row(n) for n in range(ENDED + WAITING)])
    await settle(db)
    plan = await plan_of_a_claim(jobs)
    for index in ("ix_jobs_status", "ix_jobs_turns", "ix_jobs_claims"):
        assert index in plan
    reads_rows = "Seq Scan" if db.dialect == POSTGRESQL else "SCAN jobs"
    assert reads_rows not in plan, plan

    async with db.read() as session:
        last = await queue.get(session, f"ftjob-{ENDED + WAITING - 1}")
        assert await queue.position(session, last) == WAITING - 2
