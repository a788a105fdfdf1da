"""kill -9 of gateway, worker, or both, at twenty moments of a job: nothing of it is lost or twice.

Cancel and pause are here too: they as well must leave exactly what was done.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from app import demo
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.training import (
    apart,
    ended,
    event_numbers,
    examples,
    losses,
    metrics,
    nothing_is_left,
    served_as_trained,
    submit,
    succeeded,
)
from tests.processes import LORAGATE, Process, free_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.worker, pytest.mark.timeout(400)]

KILLS = 20
#: How long after a new step the next kill comes, at most: some steps, or the whole end of a job.
WAIT_S = 1.0
LINES = 96
#: Three epochs of 24 steps.
WANTED = {"n_epochs": 3, "batch_size": 4, "lora_rank": 4, "learning_rate": 2e-3}
LEASE_S = 1.0
ENDS_WITHIN_S = 240


@dataclass
class Pair:
    """A gateway, and the worker that it trains on and samples from, each killed by itself."""

    gateway: Served
    worker: Process
    runs: Path

    def kill(self, whom: str) -> None:
        if whom != "gateway":
            self.worker.kill()
        if whom != "worker":
            self.gateway.process.kill()
        for process in (self.worker, self.gateway.process):
            if not process.running:
                process.start()
        self.gateway.wait_ready()

    def wait_serving(self, model: str) -> None:
        """Whoever was killed last, maybe once the job had ended, is up and takes requests."""
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        with self.gateway.client() as http:
            wait_until(
                lambda: http.post("/v1/completions", json=body).status_code == 200,
                within_s=60,
                every_s=0.1,
            )

    @property
    def client(self) -> openai.OpenAI:
        return self.gateway.openai_client()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("crash")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    worker = Process(
        [LORAGATE, "worker"],
        log=folder / "worker.log",
        env={
            "LORAGATE_WORKER_PORT": str(port),
            "LORAGATE_WORKER_STATE_DIR": str(folder / "runs"),
            "LORAGATE_WORKER_DEVICE": "cpu",
            "LORAGATE_WORKER_THREADS": "1",
        },
    )
    gateway = served_by(
        folder / "gateway.log",
        data_dir=folder / "data",
        pools=[
            {
                "name": "own",
                "base_model": demo.BASE_NAME,
                "base_model_path": str(demo.MODEL_DIR),
                "replicas": [url],
            }
        ],
        trainers=[{"name": "own", "base_model": demo.BASE_NAME, "url": url}],
        lease_s=LEASE_S,
        checkpoint_period_s=0.3,
        health_period_s=0.2,
    )
    with worker, gateway.process:
        worker.wait_http(f"{url}/health", within_s=120)
        gateway.wait_ready()
        yield Pair(gateway, worker, folder / "runs")


@pytest.fixture(scope="module")
def uninterrupted(pair: Pair) -> list[float]:
    """The losses of the job that everything here is compared with."""
    job = submit(pair.client, examples(LINES), hyperparameters=WANTED)
    succeeded(pair.client, job)
    return losses(pair.client, job)


def test_killed_at_twenty_moments(
    pair: Pair, uninterrupted: list[float], record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(2**32)
    logging.getLogger(__name__).warning("seed %s", seed)  # shown when it fails
    moments = random.Random(seed)
    killed: list[str] = []
    jobs = 0
    while len(killed) < KILLS:
        jobs += 1
        job = submit(pair.client, examples(LINES), hyperparameters=WANTED)
        kill_while_it_runs(pair, job, moments, killed)
        model = succeeded(pair.client, job, within_s=ENDS_WITHIN_S)
        assert apart(losses(pair.client, job), uninterrupted) < 1e-4
        numbers = event_numbers(pair.client, job)
        assert numbers == list(range(1, len(numbers) + 1))
        pair.wait_serving(model)
        served_as_trained(pair.gateway.url, model)
    record_property("killed", f"{killed} in {jobs} jobs")
    nothing_is_left(pair.gateway, pair.runs)


def kill_while_it_runs(pair: Pair, job: str, moments: random.Random, killed: list[str]) -> None:
    """Kill somebody, at a moment after each new step, until the job has ended or enough died."""
    seen = 0
    while len(killed) < KILLS:
        steps = wait_until(lambda: _progress(pair.client, job, seen), within_s=60, every_s=0.02)  # noqa: B023
        if steps < 0:
            return
        seen = steps
        time.sleep(moments.uniform(0, WAIT_S))  # the moment is what is random here
        whom = moments.choice(("gateway", "worker", "both"))
        pair.kill(whom)
        killed.append(whom)


def _progress(client: openai.OpenAI, job: str, seen: int) -> int:
    """How many steps there are, once there are more than `seen`; -1 once the job has ended."""
    if client.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"):
        return -1
    steps = len(metrics(client, job))
    return steps if steps > seen else 0


def test_a_cancelled_job_stops_within_a_step(pair: Pair) -> None:
    client = pair.client
    job = submit(client, examples(LINES), hyperparameters=WANTED | {"n_epochs": 50})
    wait_until(lambda: len(metrics(client, job)) >= 30, within_s=60, every_s=0.02)
    before = len(metrics(client, job))
    client.fine_tuning.jobs.cancel(job)
    found = ended(client, job)
    assert found.status == "cancelled"
    steps = [step["step"] for step in metrics(client, job)]
    # What the API tells may be a quarter of a second old, and two steps are handed over ahead.
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < before + 30, "a step takes over 10 ms"
    wait_until(lambda: not list(pair.runs.glob(f"{job}*")), within_s=30, every_s=0.1)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job).data
    assert [each.step_number for each in checkpoints] == [
        24 * n for n in range(len(steps) // 24, 0, -1)
    ]
    model = checkpoints[0].fine_tuned_model_checkpoint
    answer: Any = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.choices[0].message.content
    unfinished = model.rpartition(":")[0]
    with pytest.raises(openai.NotFoundError, match=f"is not finished. There is {model!r}"):
        client.models.retrieve(unfinished)
    assert unfinished not in {each.id for each in client.models.list()}


def test_a_paused_job_goes_on_exactly(pair: Pair, uninterrupted: list[float]) -> None:
    client = pair.client
    job = submit(client, examples(LINES), hyperparameters=WANTED)
    for least in (5, 40):
        wait_until(lambda: len(metrics(client, job)) >= least, within_s=60, every_s=0.02)  # noqa: B023
        client.fine_tuning.jobs.pause(job)
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job).status == "paused", within_s=30)
        steps = len(metrics(client, job))
        assert least <= steps < len(uninterrupted)
        client.fine_tuning.jobs.resume(job)
    succeeded(client, job)
    assert apart(losses(client, job), uninterrupted) < 1e-4
