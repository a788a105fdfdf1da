"""Runs that workers keep, and whose job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.control import runs
from app.control.tasks.tidy_runs import TidyRuns
from app.db.engine import Database
from app.domain import JobKind, Trainer, TrainerKind
from app.errors import TrainerUnavailable
from app.jobs import queue
from app.jobs.queue import NewJob
from app.training.run import TrainerHost
from tests.contract.registry import MovableClock
from tests.fakes.training_worker import FakeWorker
from tests.unit.training.made import LORA

TRAINERS = {
    name: Trainer(name, TrainerKind.HF, "tiny", f"http://{name}") for name in ("away", "here")
}


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def tidy(db: Database, worker: FakeWorker) -> TidyRuns:
    @asynccontextmanager
    async def connect(trainer: Trainer) -> AsyncIterator[TrainerHost]:
        if trainer.name == "away":
            raise TrainerUnavailable("away")
        yield worker

    return TidyRuns(db, TRAINERS, connect)


async def submit(db: Database, *ids: str, kind: JobKind = JobKind.FINE_TUNE) -> None:
    for job_id in ids:
        async with db.begin() as session:
            await queue.submit(session, MovableClock(), NewJob(kind, "key", {}, id=job_id))


async def test_runs_of_jobs_that_ended_are_deleted_and_no_others(
    db: Database, worker: FakeWorker, tidy: TidyRuns
) -> None:
    await submit(db, "waiting", "ended-live", "ended-on-disk")
    await submit(db, "op", kind=JobKind.TRAIN_OP)
    for job_id in ("ended-live", "ended-on-disk", "op"):
        async with db.begin() as session:
            await queue.request_cancel(session, MovableClock(), job_id)
    for run_id in ("waiting", "ended-live", "ended-on-disk", "op", "unknown"):
        await worker.run(run_id).open("tiny", LORA, 1)
    on_disk = worker.run("ended-on-disk")
    await on_disk.open("tiny", LORA, 1)
    await on_disk.unload()

    assert await tidy.activate() == {
        "trainers": 2,
        "away": ["away"],
        "deleted": ["ended-live", "ended-on-disk"],
    }
    assert set(worker.live) == {"waiting", "op", "unknown"}
    assert not worker.states
    assert (await tidy.activate())["deleted"] == []


async def test_a_removed_run_is_deleted(db: Database, worker: FakeWorker, tidy: TidyRuns) -> None:
    clock = MovableClock()
    for run_id in ("kept", "removed"):
        await worker.run(run_id).open("tiny", LORA, 1)
        async with db.begin() as session:
            await runs.create(
                session,
                clock,
                run_id=run_id,
                key_id="key",
                trainer="here",
                base_model="tiny",
                lora=LORA,
            )
    async with db.begin() as session:
        await runs.remove(session, clock, "removed")
    assert (await tidy.activate())["deleted"] == ["removed"]
    assert set(worker.live) == {"kept"}
