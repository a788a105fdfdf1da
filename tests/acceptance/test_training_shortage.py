"""Jobs where memory or disks run out: who is to blame fails, the others end as if nothing was.

What is short is short for real: the worker may map so much and no more, and disks are small.
"""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.db.blobs import AdapterStore
from app.domain import Trainer, TrainerKind
from app.training.trainers import TrainerClient
from tests.acceptance.conftest import Served, served_by
from tests.acceptance.training import (
    apart,
    ended,
    losses,
    metrics,
    served_as_trained,
    submit,
    succeeded,
)
from tests.disks import full, small_disk
from tests.processes import LORAGATE, Process, free_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.worker, pytest.mark.timeout(300)]

BASE = "wide"
#: Room for steps of short examples, and not for the logits of a long one, 256 MB.
SPARE = 192 << 20
SHORT, LONG = "Squawk! A swan is white.", "squawk " * 125
#: Two epochs of 20 steps.
WANTED = {"n_epochs": 2, "batch_size": 1, "lora_rank": 4, "learning_rate": 1e-3}
COUNT = 20
#: So often a job is tried that makes no progress.
ATTEMPTS = 2


@dataclass
class Place:
    """A gateway and its worker; `disks` are small file systems by what is on them."""

    gateway: Served
    worker: Process
    url: str
    disks: dict[str, Path]
    client: openai.OpenAI

    def submit(self, count: int = COUNT, *more: str, **wanted: Any) -> str:
        """A job on short examples and what more the assistant says."""
        said = [SHORT] * count + list(more)
        content = b"".join(_line(number, words) for number, words in enumerate(said))
        return submit(self.client, content, model=BASE, hyperparameters=WANTED | wanted)

    def begun(self, **wanted: Any) -> str:
        """A job that has done its first step."""
        job = self.submit(**wanted)
        wait_until(lambda: metrics(self.client, job), within_s=60, every_s=0.02)
        return job

    def registered(self) -> set[str]:
        """Every name that a job's model could be found by."""
        adapters = httpx.get(f"{self.gateway.url}/admin/adapters").raise_for_status().json()["data"]
        return {model.id for model in self.client.models.list()} | {one["name"] for one in adapters}

    def stored(self) -> set[str]:
        """What the adapter store has, and what rows name, which must be the same."""
        with self.gateway.client() as http:
            adapters = http.get("/admin/adapters", params={"limit": 1000}).json()["data"]
        named = {version["digest"] for each in adapters for version in each["versions"]}
        store = self.disks["store"]
        assert set(AdapterStore(store).digests()) == named
        assert list((store / "tmp").iterdir()) == []
        return named

    async def runs(self) -> set[str]:
        """The runs that the worker knows, in memory or on disk."""
        async with TrainerClient(Trainer(BASE, TrainerKind.HF, BASE, self.url)) as worker:
            return {run.run for run in (await worker.info()).runs}

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """The worker may map SPARE more than it has now."""
        pid = self.worker.pid
        mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        _, most = resource.prlimit(pid, resource.RLIMIT_AS)
        limit = mapped * os.sysconf("SC_PAGE_SIZE") + SPARE
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, most))
        try:
            yield
        finally:
            assert self.worker.running
            resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


def _line(number: int, words: str) -> bytes:
    said = [
        {"role": "user", "content": f"Say it, {number}."},
        {"role": "assistant", "content": words},
    ]
    return json.dumps({"messages": said}).encode() + b"\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from tests.worker.tiny import write_wide

    folder = tmp_path_factory.mktemp("shortage")
    model = write_wide(folder / "model")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        disks = {
            name: stack.enter_context(small_disk(folder / name, "16m"))
            for name in ("runs", "store", "data")
        }
        worker = Process(
            [LORAGATE, "worker"],
            log=folder / "worker.log",
            env={
                "LORAGATE_WORKER_PORT": str(port),
                "LORAGATE_WORKER_MODEL": str(model),
                "LORAGATE_WORKER_SERVED_NAME": BASE,
                "LORAGATE_WORKER_STATE_DIR": str(disks["runs"]),
                "LORAGATE_WORKER_DEVICE": "cpu",
                "LORAGATE_WORKER_THREADS": "1",
            },
        )
        pool = {"name": "own", "base_model": BASE, "base_model_path": str(model), "replicas": [url]}
        gateway = served_by(
            folder / "gateway.log",
            data_dir=disks["data"],
            store_dir=disks["store"],
            pools=[pool],
            trainers=[{"name": "own", "base_model": BASE, "url": url}],
            job_attempts=ATTEMPTS,
            lease_s=1.0,
            checkpoint_period_s=0.1,
            health_period_s=0.2,
        )
        with worker, gateway.process, gateway.openai_client() as client:
            worker.wait_http(f"{url}/health", within_s=120)
            gateway.wait_ready()
            yield Place(gateway, worker, url, disks, client)
        said = worker.output() + gateway.process.output()
        assert [sign for sign in ("Traceback", "crashed", "step_failed") if sign in said] == []


@pytest.fixture(scope="module")
def alone(place: Place) -> list[float]:
    """The losses of the job that everything here is compared with."""
    job = place.submit()
    succeeded(place.client, job)
    return losses(place.client, job)


async def test_the_job_that_does_not_fit_fails_beside_one_that_does(
    place: Place, alone: list[float]
) -> None:
    client, before = place.client, place.registered()
    good = place.begun()
    with place.short_of_memory():
        bad = place.submit(5, LONG, n_epochs=1)
        failed = ended(client, bad)
        assert client.fine_tuning.jobs.retrieve(good).status == "running"
        model = succeeded(client, good)
        third = succeeded(client, place.submit(2, n_epochs=1))

    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    assert re.match(r"Step 6 of 6 failed: .* more memory .* Shorten ", failed.error.message)
    assert failed.fine_tuned_model is None
    assert [step["step"] for step in metrics(client, bad)] == [1, 2, 3, 4, 5]
    assert apart(losses(client, good), alone) < 1e-4
    made = {name.partition(":ckpt")[0] for name in place.registered() - before}
    assert {re.split("@|:latest", name)[0] for name in made} == {model, third}
    for each in (model, third):
        served_as_trained(place.gateway.url, each)
    assert place.stored()
    assert await place.runs() == set()


def warnings(client: openai.OpenAI, job: str) -> list[str]:
    events = client.fine_tuning.jobs.list_events(job, limit=100)
    return [event.message for event in events if event.level != "info"]


SAID = {
    "runs": "worker cannot write to its state folder: No space left on device.",
    "store": "adapter store cannot be written: No space left on device.",
}


@pytest.mark.parametrize("disk", SAID)
def test_a_job_waits_for_room_on_a_disk_and_goes_on(
    place: Place, alone: list[float], disk: str
) -> None:
    job = place.begun()
    with full(place.disks[disk]):
        told = wait_until(lambda: warnings(place.client, job), within_s=30, every_s=0.02)
    assert SAID[disk] in told[0]
    assert told[0].endswith("The job is queued again.")
    model = succeeded(place.client, job)
    assert apart(losses(place.client, job), alone) < 1e-4
    served_as_trained(place.gateway.url, model)
    assert place.stored()


def test_a_worker_whose_disk_stays_full_fails_a_job_that_leaves_nothing(place: Place) -> None:
    before, stored = place.registered(), place.stored()
    job = place.begun(count=100, n_epochs=1)
    with full(place.disks["runs"]):
        ended_for_want_of_room(place, job, "runs")
        assert list(place.disks["runs"].glob("*/.tmp-*")) == []
    assert (place.registered(), place.stored()) == (before, stored)
    after_that_a_job_succeeds(place)


def test_a_store_that_stays_full_fails_a_job_that_leaves_nothing(place: Place) -> None:
    before, stored = place.registered(), place.stored()
    with full(place.disks["store"]):
        ended_for_want_of_room(place, place.submit(2, n_epochs=1), "store")
    assert (place.registered(), place.stored()) == (before, stored)
    after_that_a_job_succeeds(place)


def ended_for_want_of_room(place: Place, job: str, disk: str) -> None:
    failed = ended(place.client, job)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "storage_unavailable"
    assert SAID[disk] in failed.error.message
    assert str(place.disks[disk]) not in failed.error.message
    assert failed.fine_tuned_model is None


def after_that_a_job_succeeds(place: Place) -> None:
    model = succeeded(place.client, place.submit(2, n_epochs=1))
    served_as_trained(place.gateway.url, model)


def test_a_job_goes_on_when_the_gateway_can_record_again(place: Place, alone: list[float]) -> None:
    job = place.begun()
    with full(place.disks["data"]):
        wait_until(lambda: "job.unrecorded" in place.gateway.process.output(), within_s=30)
    succeeded(place.client, job)
    assert apart(losses(place.client, job), alone) < 1e-4
    assert place.stored()
