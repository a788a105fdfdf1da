"""Two gateways on one database, one of them killed now and then: a job cannot tell.

They share a PostgreSQL, the data folder and a worker, as docs/operators.md says, and nothing else.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from app import demo
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.training import (
    apart,
    event_numbers,
    examples,
    losses,
    nothing_is_left,
    served_as_trained,
    submit,
    succeeded,
)
from tests.databases import Server
from tests.processes import LORAGATE, Process, free_port

pytestmark = [pytest.mark.worker, pytest.mark.postgres, pytest.mark.timeout(300)]

KILLS = 5
#: How long after it was given a job a gateway is killed, at most: about as long as one takes.
WAIT_S = 2.0
#: Six epochs of 6 steps.
WANTED = {"n_epochs": 6, "batch_size": 4, "lora_rank": 4, "learning_rate": 2e-3}
LINES = 24


@dataclass
class Twins:
    """Two gateways and what they share."""

    gateways: list[Served]
    clients: list[openai.OpenAI]
    runs: Path

    def submit(self, at: int) -> str:
        return submit(self.clients[at], examples(LINES), hyperparameters=WANTED)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, postgres: Server) -> Iterator[Twins]:
    folder = tmp_path_factory.mktemp("twins")
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
    pool = {
        "name": "own",
        "base_model": demo.BASE_NAME,
        "base_model_path": str(demo.MODEL_DIR),
        "replicas": [url],
    }
    database = postgres.migrated()
    gateways = [
        served_by(
            folder / f"gateway-{number}.log",
            data_dir=folder / "data",
            database_url=database,
            pools=[pool],
            trainers=[{"name": "own", "base_model": demo.BASE_NAME, "url": url}],
            lease_s=1.0,
            health_period_s=0.2,
        )
        for number in range(2)
    ]
    with ExitStack() as stack:
        stack.callback(postgres.drop, database)
        stack.enter_context(worker)
        for gateway in gateways:
            # One at a time: two cannot add a new pool at the same moment.
            stack.enter_context(gateway.process)
            gateway.process.wait_http(f"{gateway.url}/healthz", within_s=60)
        worker.wait_http(f"{url}/health", within_s=120)
        for gateway in gateways:
            gateway.wait_ready()
        clients = [stack.enter_context(each.openai_client()) for each in gateways]
        yield Twins(gateways, clients, folder / "runs")


def test_killed_one_at_a_time_they_end_every_job_once(twins: Twins) -> None:
    alone = twins.submit(0)
    succeeded(twins.clients[1], alone)
    uninterrupted = losses(twins.clients[1], alone)

    seed = random.randrange(2**32)
    logging.getLogger(__name__).warning("seed %s", seed)  # shown when it fails
    moments = random.Random(seed)
    jobs = [twins.submit(at) for at in range(2)]
    for _ in range(KILLS):
        at = moments.randrange(2)
        twins.gateways[at].wait_ready()
        jobs.append(twins.submit(at))
        time.sleep(moments.uniform(0, WAIT_S))  # the moment is what is random here
        twins.gateways[at].process.kill()
        twins.gateways[at].process.start()
    for gateway in twins.gateways:
        gateway.wait_ready()

    for job in jobs:
        model = succeeded(moments.choice(twins.clients), job)
        told = [history(client, job) for client in twins.clients]
        assert told[0] == told[1]
        assert [told[0].count(end) for end in (*ENDS, made(model))] == [1, 0, 0, 1]
        for client in twins.clients:
            assert apart(losses(client, job), uninterrupted) < 1e-4
            numbers = event_numbers(client, job)
            assert numbers == list(range(1, len(numbers) + 1))
    for gateway in twins.gateways:
        served_as_trained(gateway.url, model)
    nothing_is_left(twins.gateways[0], twins.runs)


ENDS = ("The job has succeeded.", "The job was cancelled.", "The job has failed.")


def made(model: str) -> str:
    return f"New fine-tuned model created: {model}"


def history(client: openai.OpenAI, job: str) -> list[Any]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)]
