"""The life of a job on both databases: every transition, its event, and who may not write."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select, update

from app.db.engine import Database
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.domain import Job, JobError, JobEventType, JobKind, JobStatus
from app.errors import Conflict, NotFound
from app.jobs import queue
from app.jobs.queue import Flags, LeaseLost, NewEvent
from app.jobs.rows import lease_of
from tests.contract.jobs import LEASE_S, Queue
from tests.contract.registry import MovableClock

ERROR = JobError("bad_data", "Line 3 is not JSON.", "training_file")
GONE = JobError("trainer_lost", "The trainer went away.")


@pytest.fixture
def jobs(db: Database) -> Queue:
    return Queue(db, MovableClock())


def metrics(step: int, loss: float = 1.0) -> NewEvent:
    return NewEvent(JobEventType.METRICS, f"Step {step}", data={"loss": loss}, step=step)


async def statuses(jobs: Queue, job: Job) -> list[str]:
    events = await jobs.events(job)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    return [event.data["status"] for event in events if event.type is JobEventType.STATUS]


async def test_a_job_from_its_submission_to_its_end(jobs: Queue) -> None:
    submitted = await jobs.submit(
        spec={"model": "tiny"}, metadata={"who": "me"}, lock="trainer:gpu", priority=3
    )
    assert submitted.id.startswith("ftjob-")
    assert (submitted.status, submitted.attempts) == (JobStatus.QUEUED, 0)
    assert submitted == await jobs.get(submitted)
    assert await jobs.read(queue.position, submitted) == 0

    jobs.clock.forward(10)
    running = await jobs.claimed()
    assert running.id == submitted.id
    assert (running.status, running.attempts, running.lease_token) == ("running", 1, "gateway-1")
    assert running.started_at == jobs.clock.now()
    assert await jobs.read(queue.position, running) is None

    lease = lease_of(running)
    flags = await jobs.do(
        queue.heartbeat, lease, lease_s=LEASE_S, events=[metrics(1), metrics(2)], progress={"at": 2}
    )
    assert flags == Flags()
    await jobs.do(queue.finish, lease, {"model": "ft:tiny::x"})
    ended = await jobs.get(submitted)
    assert (ended.status, ended.result) == (JobStatus.SUCCEEDED, {"model": "ft:tiny::x"})
    assert (ended.progress, ended.finished_at) == ({"at": 2}, jobs.clock.now())
    assert (ended.spec, ended.metadata, ended.priority) == ({"model": "tiny"}, {"who": "me"}, 3)
    assert (ended.lock, ended.lease_token, ended.error) == ("trainer:gpu", None, None)
    assert await statuses(jobs, ended) == ["queued", "running", "succeeded"]
    assert [event.step for event in await jobs.events(ended)] == [None, None, 1, 2, None]


async def test_an_id_is_given_once(jobs: Queue) -> None:
    assert (await jobs.submit(kind=JobKind.TRAIN_OP, id="op-mine")).id == "op-mine"
    assert (await jobs.submit(kind=JobKind.TRAIN_OP)).id.startswith("op-")
    with pytest.raises(Conflict, match="op-mine"):
        await jobs.submit(id="op-mine")


async def test_a_key_never_has_more_jobs_than_it_may(db: Database, db_url: str) -> None:
    """Gateways that submit at the same moment do not count the same jobs."""
    other = Database(db_url)
    gateways = [Queue(each, MovableClock()) for each in (db, other)]
    try:
        came = await asyncio.gather(
            *(gateway.submit(most=3) for gateway in gateways * 6), return_exceptions=True
        )
    finally:
        await other.close()
    assert sum(isinstance(each, Job) for each in came) == 3
    refused = [each for each in came if isinstance(each, Conflict)]
    assert {each.code for each in refused} == {"too_many_jobs"}
    assert len(refused) == len(came) - 3
    assert (await gateways[0].submit("key-b", most=3)).key_id == "key-b"


async def test_a_failed_job_says_why_and_is_not_tried_again(jobs: Queue) -> None:
    job = await jobs.submit()
    await jobs.do(queue.fail, lease_of(await jobs.claimed()), ERROR)
    failed = await jobs.get(job)
    assert (failed.status, failed.error) == (JobStatus.FAILED, ERROR)
    assert (await jobs.events(job))[-1].level == "error"
    assert await jobs.claim() is None


async def test_a_step_is_recorded_once_whatever_is_repeated(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    for batch in ([metrics(1), metrics(2, 0.5), metrics(2, 0.1)], [metrics(2, 9.0), metrics(3)]):
        await jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S, events=batch)
    await statuses(jobs, job)
    recorded = [(event.step, event.data.get("loss")) for event in (await jobs.events(job))[2:]]
    assert recorded == [(1, 1.0), (2, 0.5), (3, 1.0)]


async def test_a_message_can_always_be_stored(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    event = NewEvent(JobEventType.MESSAGE, "\0" + "x" * 5000, "warn")
    await jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S, events=[event])
    last = (await jobs.events(job))[-1]
    assert (last.message, last.level) == ("\ufffd" + "x" * 4095, "warn")


@pytest.mark.parametrize("paused", [False, True])
async def test_a_waiting_job_is_cancelled_at_once(jobs: Queue, paused: bool) -> None:
    job = await jobs.submit()
    if paused:
        assert (await jobs.do(queue.request_pause, job.id)).status is JobStatus.PAUSED
        assert await jobs.claim() is None
        assert await jobs.do(queue.request_pause, job.id) == await jobs.get(job)
    cancelled = await jobs.do(queue.request_cancel, job.id)
    assert (cancelled.status, cancelled.finished_at) == (JobStatus.CANCELLED, jobs.clock.now())
    assert await jobs.claim() is None
    assert (await statuses(jobs, job))[-1] == "cancelled"


async def test_a_running_job_is_asked_to_end(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    for _ in range(2):
        asked = await jobs.do(queue.request_cancel, job.id)
        assert (asked.status, asked.cancel_requested) == (JobStatus.RUNNING, True)
    assert len(await jobs.events(job)) == 3
    assert (await jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S)).cancel
    await jobs.do(queue.cancelled, lease_of(job))
    assert (await jobs.get(job)).status is JobStatus.CANCELLED


async def test_pause_and_resume_keep_the_progress_and_use_up_no_attempt(jobs: Queue) -> None:
    await jobs.submit(max_attempts=1)
    job = await jobs.claimed()
    for _ in range(2):
        await jobs.do(queue.request_pause, job.id)
    assert await jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S) == Flags(pause=True)
    await jobs.do(queue.paused, lease_of(job), {"at": 7})
    paused = await jobs.get(job)
    assert (paused.status, paused.pause_requested) == (JobStatus.PAUSED, False)
    assert await jobs.claim() is None
    resumed = await jobs.do(queue.resume, job.id)
    assert (resumed.status, resumed.progress) == (JobStatus.QUEUED, {"at": 7})
    again = await jobs.claimed()
    assert (again.attempts, again.started_at) == (2, job.started_at)
    assert await jobs.do(queue.give_back, lease_of(again), GONE, count=True) is JobStatus.FAILED


async def test_a_pause_taken_back_too_late_queues_the_job(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    await jobs.do(queue.request_pause, job.id)
    assert not (await jobs.do(queue.resume, job.id)).pause_requested
    with pytest.raises(Conflict, match="running, not paused"):
        await jobs.do(queue.resume, job.id)
    await jobs.do(queue.paused, lease_of(job))
    assert (await jobs.get(job)).status is JobStatus.QUEUED
    assert (await jobs.claimed()).id == job.id


async def test_what_has_ended_stays_as_it_is(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    await jobs.do(queue.finish, lease_of(job), {})
    ended, events = await jobs.get(job), await jobs.events(job)
    for verb in (queue.request_cancel, queue.request_pause, queue.resume):
        with pytest.raises(Conflict, match="has ended already: it is succeeded"):
            await jobs.do(verb, job.id)
    assert (await jobs.get(job), await jobs.events(job)) == (ended, events)


async def zombie_writes(jobs: Queue, job: Job) -> None:
    """Every write that a runner without its lease may try."""
    lease = lease_of(job)
    writes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (queue.heartbeat, (), {"lease_s": 1.0, "events": [metrics(99)], "progress": {"x": 1}}),
        (queue.finish, ({"x": 1},), {}),
        (queue.fail, (ERROR,), {}),
        (queue.cancelled, (), {}),
        (queue.paused, ({"x": 1},), {}),
        (queue.give_back, (GONE,), {"count": True}),
    ]
    for verb, args, more in writes:
        with pytest.raises(LeaseLost):
            await jobs.do(verb, lease, *args, **more)


async def test_a_runner_that_lost_its_lease_writes_nothing(jobs: Queue) -> None:
    await jobs.submit()
    zombie = await jobs.claimed()
    await jobs.run_out(zombie)
    assert [job.status for job in await jobs.do(queue.expire)] == [JobStatus.QUEUED]
    await zombie_writes(jobs, zombie)
    heir = await jobs.claimed()
    before = await jobs.get(heir), await jobs.events(heir)
    await zombie_writes(jobs, zombie)
    assert (await jobs.get(heir), await jobs.events(heir)) == before
    await jobs.do(queue.finish, lease_of(heir), {})


async def test_another_s_token_holds_no_lease(jobs: Queue) -> None:
    await jobs.submit()
    await zombie_writes(jobs, replace(await jobs.claimed(), lease_token="gateway-2"))


async def test_a_lease_that_ran_out_is_still_held_until_someone_takes_it(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    await jobs.run_out(job)
    await jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S)
    assert await jobs.do(queue.expire) == []


async def test_an_end_undoes_what_came_with_it_when_the_lease_is_lost(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    await jobs.run_out(job)
    await jobs.do(queue.expire)

    async def apply(session: Any, clock: Any) -> None:
        await queue.submit(session, clock, queue.NewJob(JobKind.TRAIN_OP, "key-b", {}, id="side"))
        await queue.finish(session, clock, lease_of(job), {})

    with pytest.raises(LeaseLost):
        await jobs.do(apply)
    with pytest.raises(NotFound):
        await jobs.read(queue.get, "side")


async def test_an_attempt_that_makes_progress_is_not_counted(jobs: Queue) -> None:
    await jobs.submit(max_attempts=2)
    for step in range(1, 6):
        running = await jobs.claimed()
        lease = lease_of(running)
        events = [metrics(known) for known in range(1, step + 1)]
        await jobs.do(queue.heartbeat, lease, lease_s=LEASE_S, events=events)
        status = await jobs.do(queue.give_back, lease, GONE, count=True)
        assert status is JobStatus.QUEUED, step

    ended = []
    for _ in range(2):  # the steps it repeats are no progress
        lease = lease_of(await jobs.claimed())
        await jobs.do(queue.heartbeat, lease, lease_s=LEASE_S, events=[metrics(5)])
        ended.append(await jobs.do(queue.give_back, lease, GONE, count=True))
    assert ended == [JobStatus.QUEUED, JobStatus.FAILED]


async def test_a_lost_job_is_tried_again_until_its_attempts_are_used_up(jobs: Queue) -> None:
    await jobs.submit(max_attempts=2)
    for status in (JobStatus.QUEUED, JobStatus.FAILED):
        job = await jobs.claimed()
        await jobs.run_out(job)
        assert [job.status for job in await jobs.do(queue.expire)] == [status]
    dead = await jobs.get(job)
    assert dead.error is not None
    assert dead.error.code == queue.GATEWAY_LOST
    assert "attempt 2" in dead.error.message
    assert await statuses(jobs, dead) == ["queued", "running", "queued", "running", "failed"]
    assert [job.id for job in (await jobs.read(queue.list_, status=JobStatus.FAILED))[0]] == [
        dead.id
    ]


@pytest.mark.parametrize(
    ("ask", "status"),
    [(queue.request_cancel, JobStatus.CANCELLED), (queue.request_pause, JobStatus.PAUSED)],
)
async def test_a_flag_decides_what_becomes_of_a_lost_job(
    jobs: Queue, ask: Any, status: JobStatus
) -> None:
    for _ in range(2):
        await jobs.submit(max_attempts=1)
    lost, given = await jobs.claimed(), await jobs.claimed()
    for job in (lost, given):
        await jobs.do(ask, job.id)
    await jobs.run_out(lost)
    assert [job.status for job in await jobs.do(queue.expire)] == [status]
    assert await jobs.do(queue.give_back, lease_of(given), GONE, count=True) is status


async def test_giving_back_counts_only_what_was_lost(jobs: Queue) -> None:
    await jobs.submit(max_attempts=2)
    stops = JobError(queue.GATEWAY_LOST, "The gateway stops.")
    for _ in range(5):
        lease = lease_of(await jobs.claimed())
        assert await jobs.do(queue.give_back, lease, stops, count=False) is JobStatus.QUEUED
    job = await jobs.claimed()
    assert job.attempts == 6
    assert await jobs.do(queue.give_back, lease_of(job), GONE, count=True) is JobStatus.QUEUED
    job = await jobs.claimed()
    assert await jobs.do(queue.give_back, lease_of(job), GONE, count=True) is JobStatus.FAILED
    dead = await jobs.get(job)
    assert dead.error is not None
    assert dead.error.code == "trainer_lost"


async def test_a_job_given_back_waits_for_its_time(jobs: Queue) -> None:
    await jobs.submit()
    job = await jobs.claimed()
    await jobs.do(queue.give_back, lease_of(job), GONE, count=True, delay_s=60.0)
    assert await jobs.claim() is None
    other = await jobs.submit("key-b")
    assert (await jobs.claimed()).id == other.id
    await jobs.ripen()
    assert (await jobs.claimed()).id == job.id


@pytest.mark.parametrize("verb", [queue.request_cancel, queue.request_pause, queue.resume])
async def test_only_its_own_key_finds_a_job(jobs: Queue, verb: Any) -> None:
    job = await jobs.submit("key-a")
    for job_id, key_id in ((job.id, "key-b"), ("ftjob-none", None)):
        with pytest.raises(NotFound, match=job_id):
            await jobs.do(verb, job_id, key_id)
        with pytest.raises(NotFound, match=job_id):
            await jobs.read(queue.get, job_id, key_id)
    assert await jobs.read(queue.get, job.id, "key-a") == job


async def test_the_database_measures_leases_to_the_millisecond(db: Database) -> None:
    jobs = Queue(db, MovableClock())
    job = await jobs.submit()
    async with db.begin() as session:
        await session.execute(update(JobRow).values(lease_expires_at=database_time(1.5)))
    before = datetime.now(UTC)
    async with db.begin() as session:
        kept = await session.scalar(
            select(JobRow.lease_expires_at).where(
                JobRow.id == job.id, JobRow.lease_expires_at > database_time()
            )
        )
    assert kept is not None
    assert -1.0 < (kept - before).total_seconds() - 1.5 < 1.0
    assert kept.microsecond % 1000 == 0 or db.dialect == "postgresql"


async def test_runners_and_users_that_write_one_job_at_once_take_turns(db: Database) -> None:
    jobs = Queue(db, MovableClock())
    await jobs.submit()
    job = await jobs.claimed()
    beats = [
        jobs.do(queue.heartbeat, lease_of(job), lease_s=LEASE_S, events=[metrics(n), metrics(0)])
        for n in range(1, 9)
    ]
    asks = [jobs.do(queue.request_pause, job.id), jobs.do(queue.resume, job.id)]
    await asyncio.gather(*beats, asks[0])
    await asks[1]
    await statuses(jobs, job)
    steps = [event.step for event in await jobs.events(job) if event.step is not None]
    assert sorted(steps) == list(range(9))
