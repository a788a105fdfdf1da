"""What the tests of the handler of single ops share: a gateway's rooms, and ops to do.

What comes in: a database. What goes out: a `Desk`, whose worker is in memory and can be killed. The
weights of that worker depend on every op and their order, so that one done twice, left out, or done
after a failure that its client was told of shows in every version that follows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.backends.base import BufferedBody, Reply
from app.clock import SystemClock
from app.control import adapters, pools, probes, train_ops
from app.control.driver import Activator
from app.control.train_ops import Asking, NewLora
from app.db.blobs import FILES, AdapterStore
from app.db.engine import Database
from app.db.job_tables import OpPayloadRow
from app.domain import (
    BaseModel,
    Job,
    JobError,
    JobKind,
    JobStatus,
    Pool,
    Probe,
    Trainer,
    TrainerKind,
)
from app.errors import (
    LoragateError,
    TrainerError,
)
from app.handlers.train_op import TrainOp
from app.jobs import queue
from app.jobs.context import JobContext
from app.jobs.queue import Flags, NewEvent
from app.serving.snapshot import Snapshots
from app.settings import Settings
from app.training.run import TrainerHost
from app.training.single_ops import FwdBwd, Optim, Sample, Spec
from tests.fakes.adapters import BASE_CONFIG, write_adapter
from tests.fakes.training_worker import FakeWorker

BASE = "tiny"
POOL = Pool("pool", BASE, BASE)
TRAINER = Trainer("gpu", TrainerKind.HF, BASE, "http://nowhere", max_jobs=4)
ASKING = Asking("key-1", "key-1")
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]


class GatewayKilled(BaseException):
    """The process of the gateway ends here."""


class Context(JobContext):
    """A context that tells of its transactions, before and after."""

    trouble: Callable[[str], None] = staticmethod(lambda _: None)

    async def heartbeat(self, events: Sequence[NewEvent] = (), progress: Any = None) -> Flags:
        self.trouble("heartbeat")
        return await super().heartbeat(events, progress)

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[AsyncSession]:
        async with super().ending() as session:
            yield session
            self.trouble("ending")
        self.trouble("ended")


class Sampler:
    """Stands for the data plane: says which model it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    async def serve(self, request: Any, principal: Any, snapshot: Any) -> Reply:
        if self.error is not None:
            raise self.error
        body = json.loads(request.body)
        self.asked.append(body)
        choice = {
            "text": f" from {body['model']}",
            "finish_reason": "stop",
            "token_ids": [1, 2],
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
        }
        data = json.dumps({"choices": [choice] * len(body["prompt"])}).encode()
        return Reply(200, [], BufferedBody(data))


@dataclass
class Desk:
    """A gateway's rooms, without the gateway. A worker's fault is forgiven `forgives` times."""

    db: Database
    store: AdapterStore
    worker: FakeWorker
    settings: Settings = field(default_factory=lambda: Settings(trainer_patience_s=5.0))
    clock: SystemClock = field(default_factory=SystemClock)
    trainers: Mapping[str, Trainer] = field(default_factory=lambda: {TRAINER.name: TRAINER})
    snapshots: Snapshots = field(default_factory=Snapshots)
    request_path: Any = field(default_factory=Sampler)
    fleet: Any = field(default_factory=lambda: SimpleNamespace(pools={}))
    trouble: Callable[[str], None] = field(default=lambda _: None)
    forgives: int = 0

    def __post_init__(self) -> None:
        async def nothing() -> None:
            """There is no data plane to tell."""

        self.publish = Activator("publish", nothing, 60.0, self.clock)
        self.handler = TrainOp(self, self.connect)

    @asynccontextmanager
    async def connect(self, trainer: Trainer) -> AsyncIterator[TrainerHost]:
        assert trainer.name == TRAINER.name
        yield self.worker

    async def claim(self) -> Context | None:
        async with self.db.begin() as session:
            job = await queue.claim(
                session,
                self.clock,
                capacities={None: 4, TRAINER.name: 4},
                kinds=[JobKind.TRAIN_OP],
                token="runner-1",
                lease_s=60.0,
            )
        return None if job is None else Context(self.db, self.clock, job, 60.0)

    async def run(self) -> None:
        """Do every job that waits; a gateway that is killed at one starts again."""
        while (context := await self.claim()) is not None:
            context.trouble = self.trouble  # type: ignore[method-assign]
            try:
                await self.handler(context.job, context)
            except GatewayKilled:
                await self.expire(context.job.id)
            except LoragateError as exc:
                if self.forgives and isinstance(exc, TrainerError):
                    self.forgives -= 1
                    await self.expire(context.job.id)
                else:
                    await self.fail(context, JobError(exc.code, str(exc)))

    async def fail(self, context: Context, error: JobError) -> None:
        async with context.ending() as session:
            await queue.fail(session, self.clock, context.lease, error)

    async def expire(self, job_id: str) -> None:
        async with self.db.begin() as session:
            job = await queue.get(session, job_id)
            if job.status is JobStatus.RUNNING:
                lost = JobError("gateway_lost", "Lost.")
                await queue.give_back(session, self.clock, queue.lease_of(job), lost, count=False)

    async def done(self, job: Job) -> Mapping[str, Any]:
        """What came of a job that had to succeed."""
        await self.run()
        ended = await self.get(job)
        assert ended.status is JobStatus.SUCCEEDED, ended.error
        return ended.result or {}

    async def get(self, job: Job) -> Job:
        async with self.db.read() as session:
            return await queue.get(session, job.id)

    async def add(self, **more: Any) -> str:
        new = NewLora("base", rank=16, alpha=32, **more)
        result = await self.done(await train_ops.add_lora(self, ASKING, POOL, new))
        return str(result["model_id"])

    async def op(self, spec: Spec) -> Mapping[str, Any]:
        return await self.done(await train_ops.submit(self, ASKING, spec))

    async def failed(self, spec: Spec) -> JobError:
        job = await train_ops.submit(self, ASKING, spec)
        await self.run()
        ended = await self.get(job)
        assert ended.status is JobStatus.FAILED
        assert ended.error is not None
        return ended.error

    async def payloads(self) -> list[int]:
        """The numbers of the jobs whose payloads are kept."""
        async with self.db.read() as session:
            return [*await session.scalars(select(OpPayloadRow.job_number).order_by("job_number"))]

    async def probe(self, name: str, number: int) -> Probe:
        async with self.db.read() as session:
            return await probes.show(session, name, number)

    async def digests(self, name: str) -> list[tuple[int, str]]:
        async with self.db.read() as session:
            view = await adapters.show(session, name)
        return [(version.number, version.digest) for version in view.versions]


def fwdbwd(run: str, answer: str = "Ahoy!", **more: Any) -> FwdBwd:
    return FwdBwd(run, [[HI[0], {"role": "assistant", "content": answer}]], **more)


def optim(run: str, rate: float = 0.01) -> Optim:
    return Optim(run, {"learning_rate": rate})


def sample(run: str) -> Sample:
    return Sample(run, ["Hello"], {"max_tokens": 4})


def adapter_files(weights: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        seed = 0 if weights == "new" else int(weights[:8], 16)
        written = write_adapter(Path(folder) / "a", seed=seed, rank=16)
        return {name: (written / name).read_bytes() for name in FILES}


async def new_desk(db: Database, folder: Path) -> Desk:
    worker = FakeWorker()
    worker.make_files = adapter_files
    desk = Desk(db, AdapterStore(folder / "store", SystemClock()), worker)
    async with db.begin() as session:
        await pools.create(session, desk.clock, name="pool", base=BaseModel(BASE, BASE_CONFIG))
    return desk


@pytest.fixture
async def desk(db: Database, tmp_path: Path) -> AsyncIterator[Desk]:
    yield await new_desk(db, tmp_path)  # noqa: PT022
