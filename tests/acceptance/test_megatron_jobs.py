"""Fine-tune jobs on a Megatron worker of two ranks, and one on every combination of backends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.training_jobs import (
    TRAINS_WITHIN_S,
    chat,
    finished,
    forget,
    furthest,
    gateway_with,
    logprobs_of,
    row_of,
    stepped,
    steps_of,
    submit,
    verified,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.worker
needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="pip install 'loragate[megatron]'"
)

EPOCHS, STEPS = 5, 20
#: What the worker ends with when it has lost a rank: docs/megatron.md.
RANK_LOST = 70


@pytest.fixture(scope="module")
def megatron(
    megatron_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that trains on the Megatron worker and samples there too."""
    with gateway_with(
        tmp_path_factory.mktemp("gateway"),
        USE_MEGATRON="true",
        USE_VLLM="false",
        MEGATRON_SERVER_URL=megatron_server.url,
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with nothing but its embedded worker."""
    with gateway_with(tmp_path_factory.mktemp("hf")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def pair(megatron: Gateway) -> list[FineTuningJob]:
    """Two jobs that were submitted together, ended; never were both running."""
    submitted = [submit(megatron, epochs=EPOCHS, seed=seed) for seed in (7, 8)]
    jobs = megatron.openai_client().fine_tuning.jobs

    def both_ended() -> bool:
        status = [jobs.retrieve(job).status for job in submitted]
        assert status.count("running") <= 1
        return not {"queued", "running"}.intersection(status)

    wait_until(both_ended, within_s=TRAINS_WITHIN_S)
    return [finished(megatron, job) for job in submitted]


@needs_megatron
async def test_jobs_submitted_together_take_turns(
    megatron: Gateway, pair: list[FineTuningJob]
) -> None:
    first, second = [await row_of(megatron, job.id) for job in pair]
    assert first.finished_at is not None
    assert second.started_at is not None
    assert second.started_at >= first.finished_at


@needs_megatron
def test_each_is_served_as_trained(megatron: Gateway, pair: list[FineTuningJob]) -> None:
    for job in pair:
        model = job.fine_tuned_model
        assert model is not None
        assert chat(megatron, model)
        assert verified(megatron, model)
        found = logprobs_of(megatron, model)
        assert furthest(found.peft, found.trained) < 1e-4
        assert furthest(found.served, found.trained) < 1e-3


@needs_megatron
def test_single_ops_are_served_as_trained(megatron: Gateway) -> None:
    model = stepped(megatron)
    assert verified(megatron, model)
    found = logprobs_of(megatron, model)
    assert furthest(found.peft, found.trained) < 1e-4
    assert furthest(found.served, found.trained) < 1e-3


@needs_megatron
def test_the_first_step_is_that_of_the_other_trainer(
    megatron: Gateway, pair: list[FineTuningJob], hugging_face: Gateway
) -> None:
    job = finished(hugging_face, submit(hugging_face, epochs=1, seed=7))
    found, wanted = steps_of(megatron, pair[0].id), steps_of(hugging_face, job.id)
    assert found.losses[1] == pytest.approx(wanted.losses[1], abs=1e-4)
    assert found.grad_norms[1] == pytest.approx(wanted.grad_norms[1], rel=1e-4)
    assert found.losses[STEPS] < found.losses[1] / 2


@needs_megatron
def test_a_job_outlives_a_rank(
    megatron: Gateway, megatron_server: ModelServer, pair: list[FineTuningJob]
) -> None:
    worker = megatron_server.process
    assert worker is not None
    job = submit(megatron, epochs=EPOCHS, seed=7)
    wait_until(lambda: len(steps_of(megatron, job).losses) >= STEPS // 4, within_s=30)
    (rank,) = [pid for pid in worker.group() if _is_rank(pid)]
    os.kill(rank, signal.SIGKILL)
    assert worker.wait() == RANK_LOST
    assert megatron.openai_client().fine_tuning.jobs.retrieve(job).status == "running"
    worker.start()
    assert finished(megatron, job).fine_tuned_model
    found, wanted = steps_of(megatron, job), steps_of(megatron, pair[0].id)
    assert found.losses == pytest.approx(wanted.losses, abs=1e-4)


@pytest.mark.parametrize(
    ("trains", "samples"),
    [
        pytest.param("hf", "hf"),
        pytest.param("hf", "vllm", marks=pytest.mark.vllm),
        pytest.param("megatron", "megatron", marks=needs_megatron),
        pytest.param("megatron", "vllm", marks=[needs_megatron, pytest.mark.vllm]),
    ],
)
async def test_every_combination_trains_and_answers(
    trains: str, samples: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A job of one epoch, and a chat with what it made."""
    with _combination(trains, samples, request, tmp_path) as gateway:
        job = finished(gateway, submit(gateway, epochs=1))
        assert job.fine_tuned_model is not None
        assert chat(gateway, job.fine_tuned_model)
        assert verified(gateway, job.fine_tuned_model)
        pools = gateway.client.get("/admin/pools").json()["data"]
        names = {"hf": "embedded"}
        assert [pool["name"] for pool in pools] == [names.get(samples, samples)]
        assert (await row_of(gateway, job.id)).trainer == names.get(trains, trains)


@contextmanager
def _combination(
    trains: str, samples: str, request: pytest.FixtureRequest, folder: Path
) -> Iterator[Gateway]:
    """A gateway of it; those that others have started already are used again."""
    if samples != "vllm":
        yield request.getfixturevalue({"hf": "hugging_face"}.get(trains, trains))
        return
    environment = {"USE_VLLM": "true", "VLLM_MAX_LORA_RANK": str(MAX_LORA_RANK)}
    environment["VLLM_BASE_URL"] = request.getfixturevalue("vllm_server").url
    if trains == "megatron":
        url = request.getfixturevalue("megatron_server").url
        environment |= {"USE_MEGATRON": "true", "MEGATRON_SERVER_URL": url}
    with gateway_with(folder, **environment) as gateway:
        yield gateway
        forget(gateway)


def _is_rank(pid: int) -> bool:
    return b"megatron_ranks" in Path(f"/proc/{pid}/cmdline").read_bytes()
