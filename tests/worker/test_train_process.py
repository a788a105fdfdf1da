"""A worker that trains for real, killed in the middle: what it does next is what it would have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.domain import LoraSpec, Trainer, TrainerKind
from app.errors import RunLost, TrainerUnavailable
from app.ops import Datum, ForwardBackward, Op, OptimStep, Result, SaveState, Tensor
from app.training.trainers import RunClient, TrainerClient
from tests.processes import LORAGATE, Process, free_port
from tests.worker.made_runs import ids

pytestmark = pytest.mark.worker

SPEC = LoraSpec(4, 8, ("q_proj", "v_proj"), 1)
ROW = (5, 6, 7, 8, 9, 10)
ONES = Tensor("float32", (len(ROW) - 1,), bytes.fromhex("0000803f") * (len(ROW) - 1))
STEP: list[Op] = [
    ForwardBackward([Datum(ids(*ROW[:-1]), ids(*ROW[1:]), ONES)]),
    OptimStep(0.01),
]


@pytest.fixture
def worker(tiny: Path, tmp_path: Path) -> Iterator[tuple[Process, str]]:
    port = free_port()
    env = {
        "LORAGATE_DATA_DIR": str(tmp_path),
        "LORAGATE_WORKER_PORT": str(port),
        "LORAGATE_WORKER_MODEL": str(tiny / "model"),
        "LORAGATE_WORKER_SERVED_NAME": "tiny",
        "LORAGATE_WORKER_THREADS": "1",
        "LORAGATE_WORKER_API_KEY": "k3y",
    }
    with Process([LORAGATE, "worker"], log=tmp_path / "log", env=env) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_http(f"{url}/health")
        yield process, url


async def done(run: RunClient, first: int, ops: list[Op]) -> list[Result]:
    for seq, op in enumerate(ops, first):
        await run.submit(seq, op)
    return [await run.outcome(seq) for seq in range(first, first + len(ops))]


async def test_killed_and_taken_up_again(worker: tuple[Process, str], tmp_path: Path) -> None:
    process, url = worker
    trainer = Trainer("here", TrainerKind.HF, "tiny", url, api_key="k3y")
    async with TrainerClient(trainer) as client:
        assert (await client.info()).kind == "hf"
        run = client.run("job")
        await run.open("tiny", SPEC, 1)
        first = await done(run, 1, [*STEP, SaveState()])
        uninterrupted = await done(run, 4, [*STEP, *STEP])
        assert uninterrupted[2].metrics["loss:sum"] < first[0].metrics["loss:sum"]
        process.kill()
        with pytest.raises(TrainerUnavailable):
            await run.outcome(4)
        process.start()
        process.wait_http(f"{url}/health")
        with pytest.raises(RunLost):
            await run.outcome(4)
        status = await run.open("tiny", SPEC, 2)
        assert (status.origin, status.next_seq, status.first_outcome) == ("restored", 4, 1)
        assert await run.outcome(1) == first[0]
        again = await done(run, 4, [*STEP, *STEP])
        for before, after in zip(uninterrupted, again, strict=True):
            assert after.metrics.get("loss:sum") == before.metrics.get("loss:sum")
            assert after.metrics.get("grad_norm:mean") == before.metrics.get("grad_norm:mean")
        await run.delete()
    assert [each.name for each in (tmp_path / "runs").iterdir()] == [".lock"]


async def test_told_to_end_and_taken_up_where_it_was(worker: tuple[Process, str]) -> None:
    process, url = worker
    trainer = Trainer("here", TrainerKind.HF, "tiny", url, api_key="k3y")
    async with TrainerClient(trainer) as client:
        run = client.run("job")
        await run.open("tiny", SPEC, 1)
        first = await done(run, 1, [*STEP, STEP[0]])
        process.terminate()
        process.start()
        process.wait_http(f"{url}/health")
        status = await run.open("tiny", SPEC, 2)
        assert (status.origin, status.next_seq, status.optim_steps) == ("restored", 4, 1)
        assert await run.outcome(3) == first[2]
        await run.delete()
