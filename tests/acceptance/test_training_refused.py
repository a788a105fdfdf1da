"""Jobs that cannot end well: they say why, leave nothing behind, and disturb nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import openai
import pytest

from app import demo
from app.domain import Trainer, TrainerKind
from app.training.trainers import TrainerClient
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.training import apart, ended, examples, losses, submit, succeeded

pytestmark = [pytest.mark.worker, pytest.mark.timeout(300)]

#: Eight steps of an epoch.
COUNT = 32
#: A learning rate that no number of the adapter survives.
DIVERGES = {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 1e30}
LEARNS = {"n_epochs": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`loragate serve` with the worker that it starts itself."""
    folder = tmp_path_factory.mktemp("refused")
    served = served_by(folder / "log", data_dir=folder / "data")
    with served.process:
        served.wait_ready(within_s=120)
        yield served


def worker_of(gateway: Served) -> Trainer:
    """The worker that the gateway started, which also serves the base."""
    (replica,) = httpx.get(f"{gateway.url}/admin/replicas").raise_for_status().json()["data"]
    return Trainer("worker", TrainerKind.HF, demo.BASE_NAME, replica["url"])


async def runs_of(trainer: Trainer) -> set[str]:
    """The runs that a worker knows, in memory or on disk."""
    async with TrainerClient(trainer) as worker:
        return {run.run for run in (await worker.info()).runs}


def registered(client: openai.OpenAI, gateway: Served) -> set[str]:
    """Every name that a job's model could be found by."""
    adapters = httpx.get(f"{gateway.url}/admin/adapters").raise_for_status().json()["data"]
    return {model.id for model in client.models.list()} | {each["name"] for each in adapters}


async def test_a_loss_that_is_not_finite(gateway: Served) -> None:
    client = gateway.openai_client()
    content = examples(COUNT)
    alone = submit(client, content, hyperparameters=LEARNS)
    succeeded(client, alone)

    before = registered(client, gateway)
    good = submit(client, content, hyperparameters=LEARNS)
    bad = submit(client, content, hyperparameters=DIVERGES, suffix="diverges")
    failed = ended(client, bad)
    beside = client.fine_tuning.jobs.retrieve(good).status
    assert beside == "running", "the good job ended before the bad one failed"

    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "non_finite_loss"
    assert re.search(r"\b[Ss]tep \d+\b", failed.error.message), failed.error.message
    assert failed.fine_tuned_model is None

    model = succeeded(client, good)
    assert apart(losses(client, good), losses(client, alone)) < 1e-4
    added = registered(client, gateway) - before
    assert model in added
    assert [name for name in added if re.split("@|:(?=latest|ckpt)", name)[0] != model] == []
    assert bad not in await runs_of(worker_of(gateway))


@pytest.mark.parametrize(
    ("hyperparameters", "words"),
    [({"max_length": 200}, 120), ({}, 3000)],
    ids=["longer than asked", "longer than the model"],
)
async def test_an_example_that_is_too_long(
    gateway: Served, hyperparameters: dict[str, int], words: int
) -> None:
    client = gateway.openai_client()
    said = [
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "squawk " * words},
    ]
    content = examples(10) + json.dumps({"messages": said}).encode() + b"\n"
    before = registered(client, gateway)
    job = submit(client, content, hyperparameters=hyperparameters)
    failed = ended(client, job)

    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert re.search(r"\b[Ll]ine 11\b.*\btokens\b", failed.error.message), failed.error.message
    assert failed.fine_tuned_model is None
    assert registered(client, gateway) == before
    assert job not in await runs_of(worker_of(gateway))
