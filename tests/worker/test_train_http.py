"""The training routes over real sockets, asked by the gateway's own client and by plain HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from app import domain
from app.domain import LoraSpec, TrainerKind
from app.errors import (
    Conflict,
    Fenced,
    InvalidRequest,
    NonFiniteLoss,
    OutOfMemory,
    RunLost,
    StorageUnavailable,
    TrainerBusy,
    TrainerError,
)
from app.ops import (
    MEDIA_TYPE,
    PREFIX,
    Datum,
    ForwardBackward,
    Message,
    OptimStep,
    Sample,
    SavedFile,
    SaveForSampling,
    SaveState,
    Submit,
    Tensor,
)
from app.training.trainers import TrainerClient
from app.worker.http import train
from app.worker.main import Server, create_app
from tests.fakes.trainer import FakeTrainer
from tests.waiting import until, wait_until
from tests.worker.tiny import settings

pytestmark = pytest.mark.worker

SPEC = LoraSpec(4, 8, ("q_proj", "v_proj"), 1)


class Lent(FakeTrainer):
    """Writes an adapter that the sampler can load."""

    def __init__(self, adapter: Path) -> None:
        super().__init__()
        self._adapter = adapter

    def save_adapter(self, run: str, folder: Path) -> None:
        super().save_adapter(run, folder)
        for file in self._adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


class Worker:
    """A server in a thread, with its engine within reach."""

    def __init__(self, root: Path, states: Path, **values: Any) -> None:
        self.trainer = Lent(root / "narrow")
        self.states = states
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(settings(root, worker_state_dir=states, **values), lambda *_: self.trainer)
        self.server = Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=20))
        self._thread = threading.Thread(target=lambda: self.server.run(sockets=[listener]))
        self._thread.start()
        host, port = listener.getsockname()
        self.url = f"http://{host}:{port}"
        wait_until(lambda: self.server.started, within_s=30)

    def client(self, key: str | None = None) -> TrainerClient:
        trainer = domain.Trainer("here", TrainerKind.HF, "tiny", self.url, api_key=key)
        return TrainerClient(trainer)

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        content = None if body is None else msgspec.msgpack.encode(body)
        url = f"{self.url}{PREFIX}{path}"
        return httpx.request(method, url, content=content, timeout=10, **options)

    def stop(self) -> None:
        self.trainer.gate.set()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def start(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(**values: Any) -> Worker:
        started.append(Worker(tiny, tmp_path / "runs", **values))
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def worker(start: Callable[..., Worker]) -> Worker:
    return start()


@pytest.fixture
async def client(worker: Worker) -> AsyncGenerator[TrainerClient]:
    async with worker.client() as client:
        yield client


def ids(*values: int) -> Tensor:
    return Tensor("int32", (len(values),), b"".join(v.to_bytes(4, "little") for v in values))


def passing(tag: int, **config: float) -> ForwardBackward:
    return ForwardBackward([Datum(ids(tag, 2), ids(2, 3))], config=config)


async def test_a_run_from_its_first_op_to_its_files(
    worker: Worker, client: TrainerClient, tmp_path: Path
) -> None:
    info = await client.info()
    assert (info.kind, info.base_model, info.max_rank, info.runs) == ("hf", "tiny", 64, [])
    run = client.run("job:1")
    status = await run.open("tiny", SPEC, 1)
    assert (status.run, status.origin, status.next_seq) == ("job:1", "created", 1)
    ops = [passing(1), OptimStep(0.5), SaveForSampling("ft-1", [[1, 2, 3]]), SaveState()]
    await asyncio.gather(*(run.submit(seq, op) for seq, op in enumerate(ops, 1)))
    results = await asyncio.gather(*(run.outcome(seq) for seq in range(1, 5)))
    assert results[0].metrics["tokens:sum"] == 2
    counted = (await asyncio.to_thread(httpx.get, f"{worker.url}/metrics")).text.splitlines()
    assert {
        "loragate_worker_runs 1.0",
        "loragate_worker_pass_seconds_count 1.0",
        "loragate_worker_optim_step_seconds_count 1.0",
        "loragate_worker_shared_passes_total 0.0",
        "loragate_worker_trained_tokens_total 2.0",
    } <= set(counted)
    assert "grad_norm:mean" in results[1].metrics
    assert results[2].probe is not None
    assert results[2].probe.token_ids == [[1, 2, 3]]
    files = results[2].files
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in files}
    folder = tmp_path / "fetched"
    folder.mkdir()
    await run.download("ft-1", files, folder)
    for file in files:
        assert (folder / file.name).stat().st_size == file.bytes
    wrong = SavedFile(files[0].name, 1, "0" * 64)
    with pytest.raises(TrainerError, match="digest differs"):
        await run.download("ft-1", [wrong], folder)
    await run.delete()
    assert [each.name for each in worker.states.iterdir()] == [".lock"]
    assert (await client.info()).runs == []


async def test_text_from_the_weights_as_they_are(client: TrainerClient) -> None:
    run = client.run("a")
    await run.open("tiny", SPEC, 1)
    await run.submit(1, Sample([[5, 6, 7], [8]], max_tokens=4, n=2, seed=3))
    samples = (await run.outcome(1)).samples
    assert len(samples) == 4
    assert all(1 <= len(each.tokens) == len(each.logprobs) <= 4 for each in samples)
    assert all(logprob <= 0 for each in samples for logprob in each.logprobs)
    assert {each.finish_reason for each in samples} <= {"length", "stop"}


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (Sample([]), "`prompts` is empty"),
        (Sample([[]]), "has 0 tokens"),
        (Sample([[100_000]]), "has the id 100000"),
        (Sample([[1]], temperature=-1), "temperature must be non-negative"),
        (Sample([[1]] * 5000), "more than 4096 sequences"),
    ],
)
async def test_a_sample_that_cannot_be(client: TrainerClient, op: Sample, said: str) -> None:
    run = client.run("a")
    await run.open("tiny", SPEC, 1)
    await run.submit(1, op)
    with pytest.raises(InvalidRequest, match=said):
        await run.outcome(1)


async def test_errors_come_back_as_what_they_are(worker: Worker, client: TrainerClient) -> None:
    run, other = client.run("a"), client.run("b")
    with pytest.raises(RunLost):
        await run.submit(1, passing(1))
    await run.open("tiny", SPEC, 2)
    with pytest.raises(Conflict):
        await client.run("a").open("tiny", LoraSpec(8, 8, ("q_proj",), 1), 2)
    with pytest.raises(Fenced):
        await client.run("a").open("tiny", SPEC, 1)
    with pytest.raises(InvalidRequest, match="this worker trains 'tiny'"):
        await other.open("huge", SPEC, 1)
    await run.submit(1, passing(1, fail=1))
    with pytest.raises(NonFiniteLoss, match="run 'a' is not finite"):
        await run.outcome(1)
    assert (await run.cancel_ops()).next_seq == 1
    with pytest.raises(TrainerBusy):
        await run.submit(5000, passing(1))
    worker.trainer.disk_full = True
    await run.submit(1, SaveState())
    with pytest.raises(StorageUnavailable, match="LORAGATE_WORKER_STATE_DIR"):
        await run.outcome(1)
    worker.trainer._memory = 1
    with pytest.raises(OutOfMemory):
        await other.open("tiny", SPEC, 1)


async def test_a_long_wait_ends_when_the_outcome_is_there(
    worker: Worker, client: TrainerClient
) -> None:
    run = client.run("a")
    await run.open("tiny", SPEC, 1)
    worker.trainer.gate.clear()
    await run.submit(1, passing(1))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(run.outcome(1))
        await until(lambda: worker.trainer.calls)
        assert not waiting.done()
        worker.trainer.gate.set()
    assert waiting.result().metrics


async def test_a_step_is_one_request(worker: Worker, client: TrainerClient) -> None:
    run = client.run("a")
    await run.open("tiny", SPEC, 1)
    steps = [[(seq, passing(seq)), (seq + 1, OptimStep(0.5))] for seq in (1, 3, 5)]
    assert await run.exchange(steps[0], 0, None) == []
    first = await run.exchange(steps[1], 0, (1, 2))
    assert first[0].metrics["tokens:sum"] == 2
    assert "grad_norm:mean" in first[1].metrics
    assert await run.exchange(steps[1], 0, (1, 2)) == first, "asked again it is the same"
    await run.exchange(steps[2], 2, (3, 6))
    with pytest.raises(RunLost, match="no outcome of op 2"):
        await run.exchange([], 0, (2, 6))
    with pytest.raises(Conflict):
        await run.exchange([(6, OptimStep(0.1))], 0, (6, 6))
    await client.run("a").open("tiny", SPEC, 2)
    with pytest.raises(Fenced):
        await run.exchange([], 0, (6, 6))


async def test_who_waits_for_several_may_leave(worker: Worker, client: TrainerClient) -> None:
    run = client.run("a")
    await run.open("tiny", SPEC, 1)
    worker.trainer.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await run.exchange([(1, passing(1))], 0, (1, 1))
    worker.trainer.gate.set()
    (result,) = await run.exchange([], 0, (1, 1))
    assert result.metrics["tokens:sum"] == 2


async def test_it_ends_at_once_though_somebody_waits(start: Callable[..., Worker]) -> None:
    worker = start()
    async with worker.client() as client:
        run = client.run("a")
        await run.open("tiny", SPEC, 1)
        await run.submit(2, passing(2))
        path = f"{worker.url}{PREFIX}/runs/a/ops/2?wait_s=25"
        async with httpx.AsyncClient(timeout=30) as http, asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(http.get(path))
            await until(lambda: len(worker.server.server_state.connections) > 1)
            async with asyncio.timeout(10):
                await asyncio.to_thread(worker.stop)
        assert waiting.result().status_code == 204


def error(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"code", "message"}
    assert found["code"] == code
    assert "Traceback" not in response.text
    return str(found["message"])


OPEN = {"base_model": "tiny", "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/runs/a", {**OPEN, "lora": {**OPEN["lora"], "seed": 1, "dropout": 0}}, "`dropout`"),  # type: ignore[dict-item]
        ("/runs/a", OPEN, "`seed`"),
        ("/runs/a/ops/1", {"op": {"op": "explode"}}, "'explode'"),
        ("/runs/a/ops/1", {"op": {"op": "optim_step"}}, "`learning_rate`"),
        ("/runs/a/ops/1", {"op": {"op": "save_state", "name": "x"}}, "`name`"),
        ("/runs/a/ops/1", {"op": {"op": "save_state"}, "sequence": 1}, "`sequence`"),
        ("/runs/a/ops/1", [1, 2], "Expected `object`"),
        ("/runs/a/ops", {"ops": [{"seq": 1, "op": {"op": "explode"}}]}, "'explode'"),
        ("/runs/a/ops", {"wanted": [1]}, "length 2"),
    ],
)
def test_what_is_wrong_with_a_body_is_named(
    worker: Worker, path: str, body: Any, said: str
) -> None:
    method = "POST" if path.endswith("ops") else "PUT"
    assert said in error(worker.ask(method, path, body), 400, "invalid_request")


def test_what_is_no_msgpack(worker: Worker) -> None:
    response = httpx.put(f"{worker.url}{PREFIX}/runs/a", content=b"\xc1{")
    assert "msgpack" in error(response, 400, "invalid_request")


def test_paths_and_numbers_that_mean_nothing(worker: Worker) -> None:
    error(worker.ask("GET", "/nothing"), 404, "not_found")
    error(worker.ask("POST", "/info"), 405, "not_found")
    error(worker.ask("GET", "/runs/a/ops/1?wait_s=long"), 400, "invalid_request")
    error(worker.ask("GET", "/runs/a/ops/1"), 404, "run_lost")
    error(worker.ask("GET", "/runs/a/files/x/y"), 404, "not_found")
    error(worker.ask("GET", "/runs/..%2f/files/x/run.json"), 404, "not_found")
    error(worker.ask("GET", "/runs/a/files/%2e%2e/run.json"), 400, "invalid_request")


def test_a_body_that_is_too_large(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MAX_BODY_BYTES", 1000)
    submit = Submit(passing(1))
    assert worker.ask("PUT", "/runs/a/ops/1", submit).status_code == 404
    data = [Datum(ids(*range(50)), ids(*range(50)))] * 5
    response = worker.ask("PUT", "/runs/a/ops/1", Submit(ForwardBackward(data)))
    assert "1000 bytes" in error(response, 413, "body_too_large")


def test_a_large_body_is_read_beside_the_loop(worker: Worker) -> None:
    opened = {**OPEN, "lora": {**OPEN["lora"], "seed": 1}}  # type: ignore[dict-item]
    assert worker.ask("PUT", "/runs/a", opened).status_code == 200
    data = [Datum(ids(*range(60)), ids(*range(60)))] * 500
    assert worker.ask("PUT", "/runs/a/ops/1", Submit(ForwardBackward(data))).status_code == 202
    response = worker.ask("GET", "/runs/a/ops/1?wait_s=10")
    assert response.headers["content-type"] == MEDIA_TYPE
    assert msgspec.msgpack.decode(response.content)["result"]["metrics"]["tokens:sum"] == 30000


def test_a_bug_says_nothing_of_its_insides(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("/secret")

    monkeypatch.setattr(worker.trainer, "create", broken)
    opened = {**OPEN, "lora": {**OPEN["lora"], "seed": 1}}  # type: ignore[dict-item]
    response = worker.ask("PUT", "/runs/a", opened)
    assert "secret" not in error(response, 500, "internal_error")


async def test_a_key_is_wanted(start: Callable[..., Worker]) -> None:
    worker = start(worker_api_key="k3y")
    for shown in ({}, {"authorization": "Bearer other"}, {"authorization": "k3y"}):
        error(worker.ask("GET", "/info", headers=shown), 401, "invalid_api_key")
    async with worker.client("other") as client:
        with pytest.raises(TrainerError, match="LORAGATE_WORKER_API_KEY"):
            await client.info()
    async with worker.client("k3y") as client:
        assert (await client.info()).base_model == "tiny"
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{worker.url}/health")).status_code == 200


async def test_a_worker_that_does_not_train(start: Callable[..., Worker]) -> None:
    worker = start(worker_trainer="off")
    said = error(worker.ask("GET", "/info"), 404, "not_found")
    assert "LORAGATE_WORKER_TRAINER" in said
    async with worker.client() as client:
        with pytest.raises(TrainerError, match="LORAGATE_WORKER_TRAINER"):
            await client.run("a").open("tiny", SPEC, 1)


async def test_a_conversation_is_rendered(client: TrainerClient) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am fine."}]
    message = Message(msgspec.json.encode(said))
    (whole,) = await client.render([message], complete=True)
    assert whole.problem is None
    assert whole.tokens is not None
    assert whole.weights is not None
    assert whole.tokens.shape == whole.weights.shape
    good, bad = await client.render(
        [Message(msgspec.json.encode(said[:1])), Message(b"{}")], complete=False
    )
    assert good.tokens is not None
    assert good.weights is None
    assert bad.problem is not None
