"""The runner with handlers that do as a test says, on a real queue in SQLite."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import SystemClock
from app.db.engine import Database
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.domain import Job, JobEventType, JobKind, JobStatus
from app.errors import (
    InvalidRequest,
    LoragateError,
    StorageUnavailable,
    TrainerBusy,
    TrainerError,
    TrainerUnavailable,
)
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import Flags, NewEvent
from app.jobs.runner import Runner
from app.telemetry import Event
from tests.contract.jobs import TRAINER, Queue

WITHIN_S = 10.0
LEASE_S = 600.0

Act = Callable[[Job, JobContext], Awaitable[None]]


class Actor:
    """A handler that does one thing after another, one for each job it is given."""

    def __init__(self, *acts: Act) -> None:
        self._acts = list(acts)
        self.jobs: list[Job] = []

    async def __call__(self, job: Job, ctx: JobContext) -> None:
        self.jobs.append(job)
        await self._acts[min(len(self.jobs), len(self._acts)) - 1](job, ctx)


async def finish(job: Job, ctx: JobContext) -> None:
    async with ctx.ending() as session:
        await queue.finish(session, ctx.clock, ctx.lease, {"by": ctx.lease.attempt})


async def hang(job: Job, ctx: JobContext) -> None:
    await asyncio.Event().wait()


def raising(exc: BaseException) -> Act:
    async def act(job: Job, ctx: JobContext) -> None:
        raise exc

    return act


class Flaky(Database):
    """A database that can be away."""

    away: Exception | None = None
    silent = False

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        if self.silent:
            await asyncio.Event().wait()
        if self.away is not None:
            raise self.away
        async with super().begin() as session:
            yield session


@pytest.fixture
def url(new_database: Callable[[str], str]) -> str:
    return new_database("sqlite")


@pytest.fixture
async def db(url: str) -> AsyncIterator[Flaky]:
    database = Flaky(url)
    yield database
    await database.close()


@pytest.fixture
def jobs(db: Flaky) -> Queue:
    return Queue(db, SystemClock())


@asynccontextmanager
async def running(
    jobs: Queue, handler: Actor, lease_s: float = LEASE_S, capacity: int = 8
) -> AsyncIterator[Runner]:
    """A runner that polls so seldom that only a wake can explain what it does."""
    runner = Runner(
        jobs.db,
        jobs.clock,
        {JobKind.FINE_TUNE: handler},
        {TRAINER: capacity},
        token="gateway-1",
        lease_s=lease_s,
        poll_s=600.0,
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(runner.run())
        yield runner
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], Any]) -> None:
    async def holds() -> bool:
        return bool(condition())

    await until_true(holds)


async def until_true(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await look():  # noqa: ASYNC110  # what is waited for may be in the database
            await asyncio.sleep(0.005)


async def reaches(jobs: Queue, job: Job, status: JobStatus) -> Job:
    async def look() -> bool:
        return (await jobs.get(job)).status is status

    await until_true(look)
    return await jobs.get(job)


def logged(caplog: pytest.LogCaptureFixture, event: Event) -> list[dict[str, Any]]:
    return [
        record.__dict__.get("fields", {})
        for record in caplog.records
        if record.getMessage() == event.value
    ]


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "app.jobs")


async def test_jobs_run_as_soon_as_there_is_room(jobs: Queue) -> None:
    first = [await jobs.submit() for _ in range(2)]
    most = 0

    async def act(job: Job, ctx: JobContext) -> None:
        nonlocal most
        most = max(most, len(runner.running))
        await asyncio.sleep(0)
        await finish(job, ctx)

    handler = Actor(act)
    async with running(jobs, handler, capacity=1) as runner:
        for job in first:
            await reaches(jobs, job, JobStatus.SUCCEEDED)
        late = await jobs.submit()
        runner.wake()
        done = await reaches(jobs, late, JobStatus.SUCCEEDED)
    assert done.result == {"by": 1}
    assert most == 1
    assert [job.id for job in handler.jobs] == [*(job.id for job in first), late.id]


async def test_the_queue_is_looked_at_without_a_wake(jobs: Queue) -> None:
    handler = Actor(finish)
    runner = Runner(
        jobs.db,
        jobs.clock,
        {JobKind.FINE_TUNE: handler},
        {TRAINER: 1},
        token="gateway-1",
        lease_s=LEASE_S,
        poll_s=0.01,
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(runner.run())
        job = await jobs.submit()
        await reaches(jobs, job, JobStatus.SUCCEEDED)
        task.cancel()


@pytest.mark.parametrize("ask", [queue.request_cancel, queue.request_pause])
async def test_a_nudge_lets_the_handler_see_a_flag_at_once(jobs: Queue, ask: Any) -> None:
    seen: list[Flags] = []

    async def act(job: Job, ctx: JobContext) -> None:
        assert ctx.flags == Flags()
        seen.append(await ctx.flagged())
        async with ctx.ending() as session:
            if seen[0].cancel:
                await queue.cancelled(session, ctx.clock, ctx.lease)
            else:
                await queue.paused(session, ctx.clock, ctx.lease, {"at": 3})

    job = await jobs.submit()
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: runner.running)
        await jobs.do(ask, job.id)
        runner.nudge("ftjob-unknown")
        runner.nudge(job.id)
        cancel = ask is queue.request_cancel
        status = JobStatus.CANCELLED if cancel else JobStatus.PAUSED
        await reaches(jobs, job, status)
    assert seen == [Flags(cancel=cancel, pause=not cancel)]


async def test_a_pause_that_was_taken_back_is_no_flag_any_more(jobs: Queue) -> None:
    go_on = asyncio.Event()

    async def act(job: Job, ctx: JobContext) -> None:
        await ctx.flagged()
        await jobs.do(queue.resume, job.id)
        assert await ctx.heartbeat() == Flags()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ctx.flagged(), 0.01)
        go_on.set()
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: runner.running)
        await jobs.do(queue.request_pause, job.id)
        runner.nudge(job.id)
        await reaches(jobs, job, JobStatus.SUCCEEDED)
    assert go_on.is_set()


async def test_a_handler_records_what_happens(jobs: Queue) -> None:
    async def act(job: Job, ctx: JobContext) -> None:
        event = NewEvent(JobEventType.METRICS, "Step 1", data={"loss": 2.0}, step=1)
        await ctx.heartbeat([event], {"at": 1})
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)):
        done = await reaches(jobs, job, JobStatus.SUCCEEDED)
    assert done.progress == {"at": 1}
    assert [event.step for event in await jobs.events(job)] == [None, None, 1, None]


async def test_the_lease_is_renewed_while_the_handler_does_nothing(jobs: Queue) -> None:
    release = asyncio.Event()

    async def act(job: Job, ctx: JobContext) -> None:
        await release.wait()
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act), lease_s=0.15) as runner:
        await until(lambda: runner.running)
        for _ in range(3):
            await jobs.run_out(job)
            await until_true(lambda: is_kept(jobs, job))
        release.set()
        await reaches(jobs, job, JobStatus.SUCCEEDED)


async def is_kept(jobs: Queue, job: Job) -> bool:
    async with jobs.db.read() as session:
        kept = select(JobRow.id).where(
            JobRow.id == job.id, JobRow.lease_expires_at > database_time()
        )
        return await session.scalar(kept) is not None


async def test_a_lost_lease_ends_the_handler_and_nothing_else(
    jobs: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    async def act(job: Job, ctx: JobContext) -> None:
        try:
            await hang(job, ctx)
        finally:
            assert ctx.lost
            ended.set()

    job, other = await jobs.submit(), await jobs.submit()
    handler = Actor(act, hang)
    async with running(jobs, handler) as runner:
        await until(lambda: len(handler.jobs) == 2)
        await jobs.run_out(job)
        await jobs.do(queue.expire)
        assert (await jobs.claimed(token="gateway-2")).id == job.id
        runner.nudge(job.id)
        await asyncio.wait_for(ended.wait(), WITHIN_S)
        await until(lambda: runner.running == [other.id])
        taken = await jobs.get(job)
        assert (taken.status, taken.lease_token) == (JobStatus.RUNNING, "gateway-2")
    assert [fields["job"] for fields in logged(caplog, Event.JOB_LEASE_LOST)] == [job.id]
    assert (await jobs.get(other)).status is JobStatus.QUEUED


async def test_a_job_may_come_back_while_its_first_attempt_still_ends(jobs: Queue) -> None:
    cleaned, release = asyncio.Event(), asyncio.Event()

    async def slow_to_end(job: Job, ctx: JobContext) -> None:
        try:
            await hang(job, ctx)
        finally:
            await cleaned.wait()

    async def act(job: Job, ctx: JobContext) -> None:
        await release.wait()
        await finish(job, ctx)

    job = await jobs.submit()
    handler = Actor(slow_to_end, act)
    async with running(jobs, handler) as runner:
        await until(lambda: handler.jobs)
        await jobs.run_out(job)
        await jobs.do(queue.expire)
        runner.nudge(job.id)
        runner.wake()
        await until(lambda: len(handler.jobs) == 2)
        cleaned.set()
        release.set()
        done = await reaches(jobs, job, JobStatus.SUCCEEDED)
        assert await runner.drain(WITHIN_S)
    assert done.result == {"by": 2}


async def test_a_handler_that_meets_the_lost_lease_itself_stops_too(
    jobs: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(job: Job, ctx: JobContext) -> None:
        await jobs.run_out(job)
        await jobs.do(queue.expire)
        await jobs.claimed(token="gateway-2")
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)):
        await until(lambda: logged(caplog, Event.JOB_LEASE_LOST))
    assert (await jobs.get(job)).lease_token == "gateway-2"


async def test_our_own_end_is_not_a_lost_lease(
    jobs: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    after: list[str] = []

    async def act(job: Job, ctx: JobContext) -> None:
        async with ctx.ending() as session:
            await queue.finish(session, ctx.clock, ctx.lease, {})
            ctx.nudge()
            await asyncio.sleep(0)
        for _ in range(20):  # the heartbeat that was asked for has its chance
            ctx.nudge()
            await asyncio.sleep(0.001)
        after.append(job.id)

    job = await jobs.submit()
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: logged(caplog, Event.JOB_FINISHED) and not runner.running)
    assert after == [job.id]
    assert not logged(caplog, Event.JOB_LEASE_LOST)


async def test_a_stopping_gateway_gives_its_jobs_back_uncounted(jobs: Queue) -> None:
    job = await jobs.submit(max_attempts=1)
    for attempt in (1, 2):
        async with running(jobs, Actor(hang)) as runner:
            await until(lambda: runner.running)
        given = await jobs.get(job)
        assert (given.status, given.attempts) == (JobStatus.QUEUED, attempt)
    async with running(jobs, Actor(finish)):
        await reaches(jobs, job, JobStatus.SUCCEEDED)


async def test_a_gateway_that_stops_after_the_end_leaves_it(jobs: Queue) -> None:
    async def act(job: Job, ctx: JobContext) -> None:
        await finish(job, ctx)
        await hang(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)):
        await reaches(jobs, job, JobStatus.SUCCEEDED)
    assert (await jobs.get(job)).status is JobStatus.SUCCEEDED


async def test_the_user_s_errors_fail_the_job(jobs: Queue) -> None:
    job = await jobs.submit()
    wrong = InvalidRequest("The file is empty.", param="training_file", code="invalid_file")
    async with running(jobs, Actor(raising(wrong))):
        failed = await reaches(jobs, job, JobStatus.FAILED)
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_file", "training_file")
    assert failed.error.message == "The file is empty."
    assert failed.attempts == 1


async def test_an_error_after_the_end_changes_nothing(jobs: Queue) -> None:
    for exc in (InvalidRequest("late"), TrainerUnavailable("late"), ValueError("late")):

        async def act(job: Job, ctx: JobContext, exc: Exception = exc) -> None:
            await finish(job, ctx)
            raise exc

        job = await jobs.submit()
        async with running(jobs, Actor(act)) as runner:
            await reaches(jobs, job, JobStatus.SUCCEEDED)
            await until(lambda: not runner.running)
        assert (await jobs.get(job)).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (TrainerError("The trainer died of it."), "trainer_lost"),
        (StorageUnavailable("The disk is full."), "storage_unavailable"),
        (LoragateError("Something else."), "internal_error"),
    ],
)
async def test_a_lost_trainer_costs_an_attempt_and_a_pause(
    jobs: Queue, caplog: pytest.LogCaptureFixture, exc: Exception, code: str
) -> None:
    job = await jobs.submit(max_attempts=3)
    handler = Actor(raising(exc))
    async with running(jobs, handler) as runner:
        for attempt in (1, 2):
            await until(lambda: len(logged(caplog, Event.JOB_GIVEN_BACK)) == attempt)  # noqa: B023
            assert (await jobs.get(job)).status is JobStatus.QUEUED
            assert await jobs.claim() is None  # it has a pause
            await jobs.ripen()
            runner.wake()
        failed = await reaches(jobs, job, JobStatus.FAILED)
    assert failed.error is not None
    assert failed.error.code == code
    assert str(exc) in failed.error.message
    assert [job.attempts for job in handler.jobs] == [1, 2, 3]


@pytest.mark.parametrize("exc", [TrainerUnavailable("It is away."), TrainerBusy("It is full.")])
async def test_a_trainer_that_is_away_is_waited_for(
    jobs: Queue, caplog: pytest.LogCaptureFixture, exc: Exception
) -> None:
    job = await jobs.submit(max_attempts=1)
    handler = Actor(raising(exc))
    async with running(jobs, handler) as runner:
        for attempt in (1, 2, 3):
            await until(lambda: len(logged(caplog, Event.JOB_GIVEN_BACK)) == attempt)  # noqa: B023
            assert (await jobs.get(job)).status is JobStatus.QUEUED
            assert await jobs.claim() is None  # it has a pause
            await jobs.ripen()
            runner.wake()


async def test_what_was_not_foreseen_fails_the_job_and_is_logged(
    jobs: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    async def forget(job: Job, ctx: JobContext) -> None:
        return

    bad = [raising(ZeroDivisionError("secret")), raising(asyncio.CancelledError()), forget]
    for act in bad:
        job = await jobs.submit()
        async with running(jobs, Actor(act)):
            failed = await reaches(jobs, job, JobStatus.FAILED)
        assert failed.error is not None
        assert failed.error.code == "internal_error"
        assert "secret" not in failed.error.message
    assert len(logged(caplog, Event.JOB_CRASHED)) == 3


async def test_a_drained_runner_claims_nothing_and_waits_for_what_runs(jobs: Queue) -> None:
    release = asyncio.Event()

    async def act(job: Job, ctx: JobContext) -> None:
        await release.wait()
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: runner.running)
        assert not await runner.drain(0.01)
        late = await jobs.submit()
        release.set()
        assert await runner.drain(WITHIN_S)
        runner.wake()
        await asyncio.sleep(0)
    assert (await jobs.get(job)).status is JobStatus.SUCCEEDED
    assert (await jobs.get(late)).attempts == 0


async def test_a_database_that_is_away_costs_no_job(
    jobs: Queue, db: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    release = asyncio.Event()

    async def act(job: Job, ctx: JobContext) -> None:
        await release.wait()
        await finish(job, ctx)

    job = await jobs.submit()
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: runner.running)
        db.away = StorageUnavailable("The database does not answer.")
        runner.nudge(job.id)
        await until(lambda: logged(caplog, Event.JOB_UNRECORDED))
        runner.wake()
        await until(lambda: logged(caplog, Event.JOBS_UNAVAILABLE))
        db.away = None
        release.set()
        await reaches(jobs, job, JobStatus.SUCCEEDED)


@pytest.mark.parametrize("away", [StorageUnavailable("It does not answer."), KeyError("a bug")])
async def test_an_end_that_cannot_be_recorded_is_left_to_the_lease(
    jobs: Queue, db: Flaky, caplog: pytest.LogCaptureFixture, away: Exception
) -> None:
    async def act(job: Job, ctx: JobContext) -> None:
        db.away = away
        raise InvalidRequest("wrong")

    job = await jobs.submit()
    event = Event.JOB_UNRECORDED if isinstance(away, StorageUnavailable) else Event.JOB_CRASHED
    async with running(jobs, Actor(act)) as runner:
        await until(lambda: logged(caplog, event) and not runner.running)
        db.away = None
        assert (await jobs.get(job)).status is JobStatus.RUNNING


async def test_a_silent_database_ends_the_handler_when_the_lease_is_over(
    jobs: Queue, db: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(job: Job, ctx: JobContext) -> None:
        db.silent = True
        await hang(job, ctx)

    await jobs.submit()
    async with running(jobs, Actor(act), lease_s=0.2) as runner:
        await until(lambda: logged(caplog, Event.JOB_LEASE_LOST) and not runner.running)
        db.silent = False
