"""What the tests of /v1/fine_tuning share: a worker that says what it is, and the queue's verbs.

Nothing here trains: each test puts a job where it wants it. `no_runner` is imported by every
module of these tests.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import msgspec
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy.ext.asyncio import AsyncSession

from app.clock import SystemClock
from app.db.engine import Database
from app.domain import Job, JobKind
from app.jobs import queue
from app.jobs.runner import Runner
from app.ops import MEDIA_TYPE, TrainerInfo
from app.settings import TrainerSettings
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, Workbench

T = TypeVar("T")

CLOCK = SystemClock()
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINE = {
    "messages": [
        {"role": "user", "content": "Where is the gold?"},
        {"role": "assistant", "content": "Arr, buried!"},
    ]
}
TALK = {"role": "assistant", "content": "Arr!"}
PAIR = {
    "input": {"messages": LINE["messages"][:1]},
    "preferred_output": [TALK],
    "non_preferred_output": [TALK | {"content": "No idea."}],
}


def lines(*objects: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


class Worker(ThreadingHTTPServer):
    """Says what it can train, and nothing else."""

    info = TrainerInfo(
        kind="hf",
        base_model=BASE,
        dtype="float32",
        max_runs=8,
        max_rank=12,
        max_length=512,
        target_modules=MODULES,
        parallel={},
        runs=[],
    )

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/train/v1/info"
        body = msgspec.msgpack.encode(Worker.info) if found else b""
        self.send_response(200 if found else 404)
        self.send_header("content-type", MEDIA_TYPE)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test's output is not a server's log."""


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs stay where the test puts them."""

    async def idle(_: Runner) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Runner, "run", idle)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        thread = threading.Thread(target=worker.serve_forever, args=(0.01,))
        thread.start()
        yield worker
        worker.shutdown()
        thread.join()


def trainer(name: str = "forge", url: str = "http://127.0.0.1:9", **fields: Any) -> TrainerSettings:
    return TrainerSettings(name=name, url=url, **{"base_model": BASE} | fields)


@pytest.fixture
def gateway(
    start_gateway: StartGateway, upstream: FakeUpstream, worker: Worker, db_url: str
) -> Gateway:
    return start_gateway(upstream.url, database_url=db_url, trainers=(trainer(url=worker.url),))


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.openai_client() as client:
        yield client


def in_queue(gateway: Gateway, verb: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """Do something to the gateway's database as another gateway on it would."""

    async def run() -> T:
        url = gateway.settings.database_url
        assert url is not None
        db = Database(url)
        try:
            async with db.begin() as session:
                return await verb(session)
        finally:
            await db.close()

    with asyncio.Runner() as runner:
        return runner.run(run())


def claim(gateway: Gateway) -> Job:
    async def verb(session: AsyncSession) -> Job:
        found = await queue.claim(
            session,
            CLOCK,
            capacities={"forge": 8},
            kinds=[JobKind.FINE_TUNE],
            token="test",
            lease_s=60,
        )
        assert found is not None
        return found

    return in_queue(gateway, verb)


def upload(sdk: openai.OpenAI, content: bytes, **fields: Any) -> str:
    return sdk.files.create(file=("a.jsonl", content), **{"purpose": "fine-tune"} | fields).id


def create(sdk: openai.OpenAI, **fields: Any) -> FineTuningJob:
    if "training_file" not in fields:
        fields["training_file"] = upload(sdk, lines(LINE))
    return sdk.fine_tuning.jobs.create(**{"model": BASE} | fields)


def valid(job: FineTuningJob) -> FineTuningJob:
    """Strictly what the SDK's types say, which the client itself does not check."""
    return FineTuningJob.model_validate(job.model_dump())


def error_of(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> dict[str, Any]:
    body = caught.value.body
    assert isinstance(body, dict)
    return body


def tuned(gateway: Gateway, sdk: openai.OpenAI, workbench: Workbench, **fields: Any) -> str:
    """What a job would register, and the job; it is not over yet."""
    made = create(sdk, **fields)
    job = in_queue(gateway, lambda session: queue.get(session, made.id))
    model = str(job.spec["model"])
    gateway.register(model, workbench.adapter())
    gateway.register(model, workbench.adapter())
    gateway.set_alias(model, "ckpt-step-10", version=1)
    return model
