"""What the tests of the fine-tune handler share: a gateway's rooms, and jobs to work at.

What comes in: a database. What goes out: a `Desk`, whose worker is in memory and can be killed,
and attempts at jobs that tell of each of their transactions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import SystemClock
from app.control import adapters, files, pools
from app.control.driver import Activator
from app.db.blobs import FILES, AdapterStore
from app.db.engine import Database
from app.db.file_store import FileStore
from app.db.job_tables import CheckpointRow
from app.domain import (
    BaseModel,
    File,
    Job,
    JobError,
    JobEvent,
    JobEventType,
    JobKind,
    JobStatus,
    Trainer,
    TrainerKind,
)
from app.handlers.fine_tune import FineTune
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import Flags, NewEvent, NewJob
from app.serving.meter import Meter
from app.serving.snapshot import Snapshots
from app.settings import Settings
from app.training.run import TrainerHost
from app.training.spec import FineTuneResult, FineTuneSpec
from tests.fakes.adapters import BASE_CONFIG, write_adapter
from tests.fakes.training_worker import FakeWorker

BASE = "tiny"
KEY = "key-1"
TRAINER = Trainer("gpu", TrainerKind.HF, BASE, "http://nowhere", max_jobs=4)
ANSWERS = ("yes", "no", "maybe so", "never", "perhaps")


class GatewayKilled(BaseException):
    """The process of the gateway ends here."""


class Context(JobContext):
    """A context that tells of its transactions, before and after."""

    trouble: Callable[[str], None] = staticmethod(lambda _: None)

    async def heartbeat(self, events: Sequence[NewEvent] = (), progress: Any = None) -> Flags:
        self.trouble("heartbeat")
        flags = await super().heartbeat(events, progress)
        self.trouble("recorded")
        return flags

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[AsyncSession]:
        async with super().ending() as session:
            yield session
            self.trouble("ending")
        self.trouble("ended")


@dataclass
class Desk:
    """A gateway's rooms, without the gateway; `trouble` is asked at every step of an attempt."""

    db: Database
    store: AdapterStore
    files: FileStore
    worker: FakeWorker
    settings: Settings = field(
        default_factory=lambda: Settings(trainer_patience_s=0.3, checkpoint_period_s=1e6)
    )
    clock: SystemClock = field(default_factory=SystemClock)
    trainers: dict[str, Trainer] = field(default_factory=lambda: {TRAINER.name: TRAINER})
    published: int = 0
    meter: Meter = field(default_factory=Meter)
    snapshots: Snapshots = field(default_factory=Snapshots)
    fleet: Any = field(default_factory=lambda: SimpleNamespace(pools={}))

    def __post_init__(self) -> None:
        self.publish = Activator("publish", self._publish, 60.0, self.clock)
        self.handler = FineTune(self, self.connect)

    async def _publish(self) -> None:
        self.published += 1

    @asynccontextmanager
    async def connect(self, trainer: Trainer) -> AsyncIterator[TrainerHost]:
        assert trainer == TRAINER
        yield self.worker

    async def upload(self, *lines: Any) -> File:
        content = "\n".join(map(json.dumps, lines)).encode()
        with self.files.incoming(len(content)) as incoming:
            incoming.write(content)
            digest = self.files.commit(incoming)
        async with self.db.begin() as session:
            return await files.create(
                session,
                self.clock,
                key_id=KEY,
                filename="x.jsonl",
                purpose="fine-tune",
                size=len(content),
                digest=digest,
            )

    async def submit(self, training: File, validation: File | None = None, **more: Any) -> Job:
        given = {
            "base_model": BASE,
            "model": f"ft:tiny::{self._number():08d}",
            "training_file": training.id,
            "validation_file": None if validation is None else validation.id,
            "seed": 7,
            "n_epochs": 2,
            "batch_size": 2,
        }
        spec = FineTuneSpec.from_json({**given, **more})
        new = NewJob(JobKind.FINE_TUNE, KEY, spec.to_json(), trainer=TRAINER.name, max_attempts=50)
        async with self.db.begin() as session:
            return await queue.submit(session, self.clock, new)

    async def claim(self) -> Context:
        async with self.db.begin() as session:
            job = await queue.claim(
                session,
                self.clock,
                capacities={TRAINER.name: 4},
                kinds=[JobKind.FINE_TUNE],
                token="runner-1",
                lease_s=60.0,
            )
        assert job is not None
        return Context(self.db, self.clock, job, 60.0)

    async def attempt(self, trouble: Callable[[str], None] = lambda _: None) -> None:
        """Claim the next job and work at it."""
        context = await self.claim()
        context.trouble = trouble  # type: ignore[method-assign]
        await self.handler(context.job, context)

    async def give_back(self, job_id: str) -> None:
        """As when a lease has expired."""
        async with self.db.begin() as session:
            job = await queue.get(session, job_id)
            if job.status is JobStatus.RUNNING:
                lost = JobError("gateway_lost", "Lost.")
                await queue.give_back(session, self.clock, queue.lease_of(job), lost, count=False)

    async def get(self, job_id: str) -> Job:
        async with self.db.read() as session:
            return await queue.get(session, job_id)

    async def events(self, job: Job) -> list[JobEvent]:
        async with self.db.read() as session:
            found, more = await queue.events(session, job, limit=1000, newest_first=False)
        assert not more
        assert [event.number for event in found] == list(range(1, len(found) + 1))
        return [event for event in found if event.type is not JobEventType.STATUS]

    async def checkpoints(self, job: Job) -> list[CheckpointRow]:
        query = select(CheckpointRow).where(CheckpointRow.job_number == job.number)
        async with self.db.read() as session:
            return list(await session.scalars(query.order_by(CheckpointRow.step)))

    async def outcome(self, job_id: str) -> dict[str, Any]:
        """All that is left of a job, without names that differ from job to job."""
        job = await self.get(job_id)
        model = job.spec["model"]
        assert job.result is not None, job.error
        result = FineTuneResult.from_json(job.result)
        async with self.db.read() as session:
            view = await adapters.show(session, model)
            table = await files.for_job(session, result.result_files[0])
        events = [
            (event.message.replace(model, "M"), event.step, json.dumps(event.data, sort_keys=True))
            for event in await self.events(job)
        ]
        return {
            "events": [(text, step, data.replace(model, "M")) for text, step, data in events],
            "versions": [(version.number, version.digest) for version in view.versions],
            "aliases": dict(view.aliases),
            "checkpoints": [(c.step, c.metrics) for c in await self.checkpoints(job)],
            "tokens": result.trained_tokens,
            "hyperparameters": result.hyperparameters,
            "table": self.files.path(table.digest).read_bytes(),
        }

    async def count(self, table: type[Any]) -> int:
        async with self.db.read() as session:
            return (await session.scalar(select(func.count()).select_from(table))) or 0

    def _number(self) -> int:
        self._numbers = getattr(self, "_numbers", 0) + 1
        return self._numbers


def chat(answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]
    }


def adapter_files(weights: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        written = write_adapter(Path(folder) / "a", seed=int(weights[:8], 16), rank=16)
        return {name: (written / name).read_bytes() for name in FILES}


@pytest.fixture
async def desk(db: Database, tmp_path: Path) -> AsyncIterator[Desk]:
    worker = FakeWorker()
    worker.make_files = adapter_files
    made = Desk(db, AdapterStore(tmp_path / "store"), FileStore(tmp_path / "files"), worker)
    async with db.begin() as session:
        await pools.create(session, made.clock, name="pool", base=BaseModel(BASE, BASE_CONFIG))
    yield made  # noqa: PT022  # only async generators are fixtures here


@pytest.fixture
async def training(desk: Desk) -> AsyncIterator[File]:
    """Five examples: with batches of two, three steps an epoch."""
    yield await desk.upload(*map(chat, ANSWERS))  # noqa: PT022
