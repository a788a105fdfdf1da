"""Who is next, how many run at once, and what a waiting job is told, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import text, update

from app.control.tasks.expire_jobs import ExpireJobs
from app.db.engine import Database
from app.db.job_tables import JobRow
from app.db.leases import database_time
from app.domain import Job, JobError, JobKind, JobStatus
from app.errors import InvalidRequest, NotFound
from app.jobs import queue
from app.jobs.rows import lease_of
from tests.contract.jobs import LEASE_S, TRAINER, Queue
from tests.contract.registry import MovableClock


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def jobs(db: Database, clock: MovableClock) -> Queue:
    return Queue(db, clock)


async def drain(jobs: Queue, capacity: int = 1000) -> list[Job]:
    """Claim all that can be claimed."""
    taken = []
    while (job := await jobs.claim({TRAINER: capacity})) is not None:
        taken.append(job)
    return taken


async def test_a_greater_priority_goes_first_then_the_order_of_submission(jobs: Queue) -> None:
    submitted = [await jobs.submit(priority=priority) for priority in (0, 5, -1, 5, 0)]
    taken = await drain(jobs)
    assert [job.id for job in taken] == [submitted[at].id for at in (1, 3, 0, 4, 2)]


async def test_a_key_with_many_jobs_does_not_keep_the_others_waiting(jobs: Queue) -> None:
    for _ in range(5):
        await jobs.submit("key-a")
    assert (await jobs.claimed()).key_id == "key-a"
    for key_id in ("key-b", "key-b", "key-c"):
        await jobs.submit(key_id)
    assert [job.key_id[-1] for job in await drain(jobs)] == ["b", "c", "a", "b", "a", "a", "a"]


async def test_one_trainer_s_turns_are_not_another_s(jobs: Queue) -> None:
    for _ in range(3):
        await jobs.submit("key-a", trainer="other")
        await jobs.claimed(capacities={"other": 9})
    await jobs.submit("key-b")
    await jobs.claimed()
    late = await jobs.submit("key-b"), await jobs.submit("key-a")
    # key-a was served later than key-b, but never by this trainer.
    assert [job.id for job in await drain(jobs)] == [late[1].id, late[0].id]


async def test_a_trainer_gets_no_more_than_it_takes(jobs: Queue) -> None:
    for trainer in (TRAINER, TRAINER, TRAINER, "other", None):
        await jobs.submit(trainer=trainer)
    capacities: dict[str | None, int] = {TRAINER: 2, "other": 1, None: 1, "idle": 8}
    taken = []
    while (job := await jobs.claim(capacities)) is not None:
        taken.append(job)
    assert [job.trainer for job in taken] == [TRAINER, TRAINER, "other", None]
    await jobs.do(queue.finish, lease_of(taken[0]), {})
    assert (await jobs.claimed(capacities=capacities)).trainer == TRAINER
    assert await jobs.claim(capacities) is None


async def test_a_lock_is_held_by_one_running_job(jobs: Queue) -> None:
    first, second = [await jobs.submit(lock="trainer:gpu") for _ in range(2)]
    free = await jobs.submit()
    assert [job.id for job in await drain(jobs)] == [first.id, free.id]
    await jobs.do(queue.finish, lease_of(await jobs.get(first)), {})
    assert (await jobs.claimed()).id == second.id


async def test_only_the_kinds_asked_for(jobs: Queue) -> None:
    await jobs.submit(kind=JobKind.TRAIN_OP)
    only = {"kinds": [JobKind.FINE_TUNE], "token": "gateway-1", "lease_s": LEASE_S}
    assert await jobs.do(queue.claim, capacities={TRAINER: 8}, **only) is None
    assert await jobs.claim() is not None


async def test_claimers_at_the_same_moment_take_turns(jobs: Queue) -> None:
    for number in range(12):
        await jobs.submit(f"key-{number % 3}", lock=f"lock-{number % 8}")
    tokens = [f"gateway-{number}" for number in range(20)]
    found = await asyncio.gather(*(jobs.claim({TRAINER: 5}, token) for token in tokens))
    taken = [job for job in found if job is not None]
    assert len({job.id for job in taken}) == len({job.lock for job in taken}) == len(taken) == 5


@pytest.fixture
def postgres_url(new_database: Callable[[str], str]) -> str:
    return new_database("postgresql")


@pytest.fixture
async def rival(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(postgres_url)
    yield database
    await database.close()


@pytest.mark.postgres
async def test_the_schema_lets_no_second_job_run_whatever_the_code_does(rival: Database) -> None:
    jobs = Queue(rival, MovableClock())
    first, second = [await jobs.submit(lock="trainer:gpu") for _ in range(2)]
    # Someone who takes no turns starts the second job, and commits while we claim the first.
    async with rival.begin() as session:
        await session.execute(
            update(JobRow).where(JobRow.id == second.id).values(status=JobStatus.RUNNING.value)
        )
        claim = asyncio.ensure_future(jobs.claim())
        await blocked(rival)
    assert await claim is None
    assert (await jobs.get(first)).status is JobStatus.QUEUED


async def blocked(db: Database) -> None:
    """Wait until a statement of someone else waits for a lock."""
    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with asyncio.timeout(10):
        while True:
            async with db.read() as session:
                if await session.scalar(waits):
                    return


async def test_a_waiting_job_s_position_is_the_order_of_claims(jobs: Queue) -> None:
    for key_id, priority in ["a0", "a0", "a0", "b0", "a1", "c0", "b0", "b0", "c1", "a0"]:
        await jobs.submit(f"key-{key_id}", priority=int(priority))
    await jobs.claimed()
    waiting = [job for job in (await jobs.read(queue.list_))[0] if job.status == "queued"]
    told = {job.id: await jobs.read(queue.position, job) for job in waiting}
    taken = await drain(jobs)
    assert [told[job.id] for job in taken] == list(range(9))


async def test_the_estimate_of_a_start(jobs: Queue, clock: MovableClock) -> None:
    async def waits_s(job: Job, capacity: int = 2) -> float | None:
        async with jobs.db.read() as session:
            return await queue.estimate(session, clock, job, capacity=capacity)

    first, second, third, fourth = [await jobs.submit() for _ in range(4)]
    assert await waits_s(second) == 0.0
    assert await waits_s(third) is None  # nothing is known yet
    done = await jobs.claimed()
    clock.forward(100)
    await jobs.do(queue.finish, lease_of(done), {})
    assert await waits_s(third) == 0.0
    assert await waits_s(fourth) == 100.0
    await jobs.claimed()
    clock.forward(30)
    await jobs.claimed()
    assert await waits_s(fourth) == 70.0
    assert await waits_s(fourth, capacity=1) == 100.0
    clock.forward(1000)
    assert await waits_s(fourth) == 0.0
    assert await waits_s(await jobs.get(first)) is None


async def test_pages_of_jobs(jobs: Queue) -> None:
    made = [
        await jobs.submit(
            f"key-{number % 2}",
            kind=JobKind.TRAIN_OP if number == 4 else JobKind.FINE_TUNE,
            metadata={} if number == 3 else {"n": str(number % 2), 'we"ird.$': "x"},
        )
        for number in range(5)
    ]

    async def ids(**query: object) -> list[int]:
        found, _ = await jobs.read(queue.list_, **query)
        return [[job.id for job in made].index(job.id) for job in found]

    assert await ids() == [4, 3, 2, 1, 0]
    assert await ids(kind=JobKind.FINE_TUNE) == [3, 2, 1, 0]
    assert await ids(key_id=made[1].key_id) == [3, 1]
    assert await ids(metadata={"n": "0", 'we"ird.$': "x"}) == [4, 2, 0]
    assert await ids(metadata={"n": "0", 'we"ird.$': "y"}) == []
    assert await ids(without_metadata=True) == [3]
    await jobs.do(queue.request_cancel, made[2].id)
    assert await ids(status=JobStatus.CANCELLED) == [2]
    page, more = await jobs.read(queue.list_, after=made[4].id, limit=2)
    assert ([job.id for job in page], more) == ([made[3].id, made[2].id], True)
    page, more = await jobs.read(queue.list_, after=made[2].id, limit=2)
    assert ([job.id for job in page], more) == ([made[1].id, made[0].id], False)
    for after, key_id in (("none", None), (made[0].id, made[1].key_id)):
        with pytest.raises(NotFound) as found:
            await jobs.read(queue.list_, after=after, key_id=key_id)
        assert found.value.param == "after"
    for limit in (0, 1001):
        with pytest.raises(InvalidRequest, match="limit"):
            await jobs.read(queue.list_, limit=limit)
    assert await jobs.read(queue.unfinished, made[0].key_id) == 2


async def test_pages_of_events(jobs: Queue) -> None:
    job = await jobs.submit()
    for _ in range(2):
        lease = lease_of(await jobs.claimed())
        reason = JobError("x", "Go on elsewhere.")
        await jobs.do(queue.give_back, lease, reason, count=False)

    async def numbers(**query: object) -> tuple[list[int], bool]:
        found, more = await jobs.read(queue.events, job, **query)
        return [event.number for event in found], more

    assert await numbers() == ([5, 4, 3, 2, 1], False)
    assert await numbers(limit=2) == ([5, 4], True)
    assert await numbers(limit=2, after=4) == ([3, 2], True)
    assert await numbers(limit=2, after=3, newest_first=False) == ([4, 5], False)


async def test_lost_jobs_are_taken_over_and_the_queue_is_counted(
    jobs: Queue, db: Database, clock: MovableClock
) -> None:
    woken: list[None] = []
    task = ExpireJobs(db, clock, lambda: woken.append(None))
    await jobs.submit()
    clock.forward(40)
    await jobs.submit()
    await jobs.submit("key-b", trainer=None)
    paused = await jobs.submit()
    await jobs.do(queue.request_pause, paused.id)
    job = await jobs.claimed()
    counts = {"expired": 0, "queued": 2, "running": 1, "paused": 1}
    assert await task.activate() == counts
    assert not woken
    clock.forward(2)
    assert task.waits() == {TRAINER: 2.0, "": 2.0}
    await jobs.run_out(job)
    assert await task.activate() == counts | {"expired": 1, "queued": 3, "running": 0}
    assert len(woken) == 1
    assert task.waits() == {TRAINER: 42.0, "": 2.0}


async def test_a_lease_that_has_time_left_is_not_taken(db: Database) -> None:
    jobs = Queue(db, MovableClock())
    await jobs.submit()
    await jobs.claimed()
    async with db.begin() as session:
        await session.execute(update(JobRow).values(lease_expires_at=database_time(5.0)))
    assert await jobs.do(queue.expire) == []
