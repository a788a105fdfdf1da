"""Several gateways in processes of their own on one database, one of which is killed at its work:
every job is done once, by one of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.clock import SystemClock
from app.db.engine import Database
from app.domain import Job, JobEventType, JobKind, JobStatus
from app.jobs import queue
from tests.contract.claimer import CAPACITY, TRAINER
from tests.contract.jobs import Queue

ROOT = Path(__file__).parents[2]
JOBS = 200
WITHIN_S = 50.0


class Claimers:
    """The processes; what each says goes to a file."""

    def __init__(self, stack: ExitStack, url: str, folder: Path) -> None:
        self._stack = stack
        self._url = url
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, hangs_at: int = 0) -> None:
        said = self._stack.enter_context((self._folder / name).open("wb"))
        program = [sys.executable, "-W", "error", "-m", "tests.contract.claimer"]
        process = subprocess.Popen(
            [*program, self._url, name, str(hangs_at)], cwd=ROOT, stdout=said
        )
        self._processes[name] = self._stack.enter_context(process)
        self._stack.callback(process.kill)

    def said(self, name: str) -> list[list[str]]:
        return [line.split() for line in (self._folder / name).read_text().splitlines()]

    def kill(self, name: str) -> None:
        self._processes.pop(name).kill()

    def terminate(self) -> None:
        """Ask all that are left to end, and see that they end well."""
        for process in self._processes.values():
            process.terminate()
        assert [process.wait(20) for process in self._processes.values()] == [0] * len(
            self._processes
        )


@pytest.fixture
def claimers(db_url: str, tmp_path: Path) -> Iterator[Claimers]:
    with ExitStack() as stack:
        yield Claimers(stack, db_url, tmp_path)


async def submit(jobs: Queue, count: int) -> list[Job]:
    async with jobs.db.begin() as session:
        return [
            await queue.submit(
                session,
                jobs.clock,
                queue.NewJob(
                    JobKind.FINE_TUNE,
                    f"key-{number % 7}",
                    {},
                    trainer=TRAINER,
                    lock="one" if number % 8 == 0 else None,
                ),
            )
            for number in range(count)
        ]


async def ended(jobs: Queue, count: int) -> None:
    """Until so many jobs have ended; never do more run than may."""
    statuses: Counter[JobStatus] = Counter()
    try:
        async with asyncio.timeout(WITHIN_S):
            while sum(statuses[status] for status in JobStatus if status.terminal) < count:
                await asyncio.sleep(0.05)
                found, _ = await jobs.read(queue.list_, limit=JOBS)
                running = [job for job in found if job.status is JobStatus.RUNNING]
                assert len(running) <= CAPACITY
                assert Counter(job.lock for job in running)["one"] <= 1
                statuses = Counter(job.status for job in found)
    except TimeoutError:
        pytest.fail(f"{count} jobs should have ended by now: {dict(statuses)}")


async def hangs(claimers: Claimers, name: str) -> None:
    async with asyncio.timeout(WITHIN_S):
        while [line[0] for line in claimers.said(name)] != ["hangs"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
async def test_two_hundred_jobs_and_a_claimer_that_is_killed(
    db: Database, claimers: Claimers
) -> None:
    jobs = Queue(db, SystemClock())
    submitted = await submit(jobs, 1)
    claimers.start("victim", hangs_at=1)
    await hangs(claimers, "victim")
    for name in ("other-1", "other-2"):
        claimers.start(name)
    submitted += await submit(jobs, JOBS - 1)
    await ended(jobs, JOBS // 4)
    claimers.kill("victim")
    await ended(jobs, JOBS)
    claimers.terminate()

    begun = [line for name in ("victim", "other-1", "other-2") for line in claimers.said(name)]
    attempts = Counter((job_id, attempt) for _, job_id, attempt in begun)
    assert max(attempts.values()) == 1, "two processes ran one attempt"
    [hung] = [job_id for word, job_id, _ in begun if word == "hangs"]
    for job in submitted:
        done = await jobs.get(job)
        events = await jobs.events(job)
        statuses = [e.data["status"] for e in events if e.type is JobEventType.STATUS]
        assert statuses == [*["queued", "running"] * done.attempts, "succeeded"]
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert [event.step for event in events if event.step is not None] == [1, 2]
        assert done.result == {"attempt": done.attempts}
        assert done.attempts > 1 or job.id != hung
