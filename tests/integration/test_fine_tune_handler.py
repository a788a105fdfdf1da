"""The handler of fine-tune jobs, on both databases, with a worker in memory that can be killed."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from sqlalchemy import select

from app.control import adapters, files, probes
from app.control.driver import Activator
from app.control.tasks.publish import Publish
from app.control.views import Targets
from app.db.file_tables import FileRow
from app.db.job_tables import CheckpointRow
from app.db.tables import AdapterRow, VersionRow
from app.domain import (
    AdapterVersion,
    File,
    Job,
    JobKind,
    JobStatus,
)
from app.errors import (
    AdapterLoadFailed,
    AdapterRejected,
    Conflict,
    InvalidTrainingFile,
    NonFiniteLoss,
    NotFound,
    NotTrainable,
    StorageUnavailable,
    TrainerUnavailable,
    UpstreamError,
)
from app.jobs import queue
from app.jobs.queue import Flags
from app.jobs.runner import Runner
from app.serving.snapshot import Snapshot
from app.training.spec import FineTuneResult
from tests.fakes.training_worker import no_trouble, unavailable
from tests.integration.fine_tune_desk import (
    ANSWERS,
    BASE,
    KEY,
    TRAINER,
    Desk,
    GatewayKilled,
    adapter_files,
    chat,
    desk,
    training,
)
from tests.unit.training.made import LORA
from tests.waiting import until

__all__ = ["desk", "training"]


async def test_a_job_ends_as_a_model_that_can_be_asked_for(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    await desk.attempt()
    done = await desk.get(job.id)
    assert done.status is JobStatus.SUCCEEDED
    result = FineTuneResult.from_json(done.result or {})
    assert result.model == job.spec["model"]
    # "Well?" and its end, the answer and its end; the last token predicts nothing.
    assert result.trained_tokens == 2 * sum(6 + len(answer) for answer in ANSWERS)
    assert result.hyperparameters["n_epochs"] == 2
    assert result.hyperparameters["target_modules"] == ["q_proj", "v_proj"]
    async with desk.db.read() as session:
        view = await adapters.show(session, result.model)
        probe = await probes.show(session, result.model, 2)
    assert view.aliases == {
        "latest": ((2, 1),),
        "ckpt-step-3": ((1, 1),),
        "ckpt-step-6": ((2, 1),),
    }
    assert len(probe.token_ids) == 4
    newest = view.versions[-1]
    assert newest.source == f"job:{job.id}"
    assert newest.metadata["job"] == job.id
    assert newest.metadata["training_file"]["id"] == training.id
    assert newest.metadata["step"] == 6
    assert newest.metadata["metrics"]["train_loss"] > 0
    assert desk.store.path(newest.digest).is_dir()
    assert not desk.worker.live
    assert not desk.worker.states
    assert not desk.worker.files


async def test_its_name_answers_from_its_end_on(desk: Desk, training: File) -> None:
    """Until then, and if the gateway is lost just before, there are only checkpoints."""

    def lost_at_the_end(request: str) -> None:
        if request == "ending":
            raise GatewayKilled

    job = await desk.submit(training, n_epochs=3)
    with pytest.raises(GatewayKilled):
        await desk.attempt(lost_at_the_end)
    checkpoints = {"ckpt-step-3": ((1, 1),), "ckpt-step-6": ((2, 1),)}
    assert await aliases_of(desk, job) == checkpoints
    await desk.give_back(job.id)
    await desk.attempt()
    last = ((3, 1),)
    assert await aliases_of(desk, job) == checkpoints | {"ckpt-step-9": last, "latest": last}


async def aliases_of(desk: Desk, job: Job) -> Mapping[str, Targets]:
    async with desk.db.read() as session:
        return (await adapters.show(session, job.spec["model"])).aliases


class Replicas:
    """A fleet that is told what to load; `error` is what comes of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.pools: dict[str, Any] = {}
        self.asked: list[str] = []
        self.error = error

    async def sync(self, _: Snapshot) -> None:
        """Nothing here follows the registry."""

    async def prepare(self, version: AdapterVersion, pool: str, like: Iterable[str]) -> None:
        self.asked.append(version.upstream_name)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, AdapterLoadFailed("no"), UpstreamError("away")])
async def test_its_model_is_loaded_before_anyone_asks_for_it(
    desk: Desk, training: File, error: Exception | None
) -> None:
    desk.fleet = Replicas(error)
    published = Publish(desk.db, desk.snapshots, desk.fleet, desk.settings)
    desk.publish = Activator("publish", published.activate, 60.0, desk.clock)
    publishing = asyncio.ensure_future(desk.publish.loop())
    job = await desk.submit(training)
    await desk.attempt()
    publishing.cancel()
    assert desk.fleet.asked == [f"{job.spec['model']}@2"]
    assert (await desk.get(job.id)).status is JobStatus.SUCCEEDED
    assert not desk.worker.live  # and its run is forgotten all the same


async def test_events_tell_what_happens(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    await desk.attempt()
    model = job.spec["model"]
    events = await desk.events(job)
    said = [event.message.partition("=")[0] for event in events]
    assert said == [
        "Training started: 6 steps over 5 examples",
        *(f"Step {step}/6: training loss" for step in (1, 2, 3)),
        f"Checkpoint created: {model}:ckpt-step-3",
        *(f"Step {step}/6: training loss" for step in (4, 5, 6)),
        f"Checkpoint created: {model}:ckpt-step-6",
        f"New fine-tuned model created: {model}",
    ]
    first = events[1].data
    assert first["step"] == 1
    assert first["total_steps"] == 6
    assert {"train_loss", "train_mean_token_accuracy", "learning_rate", "grad_norm"} <= set(first)
    assert first["tokens_per_second"] == first["tokens"] / 0.5
    steps = [event.data for event in events if event.step is not None]
    assert desk.meter.trained_tokens == {"gpu": sum(step["tokens"] for step in steps)}
    assert sum(desk.meter.steps["gpu"][0]) == 6


async def test_checkpoints_and_the_table_have_the_numbers_of_validation(
    desk: Desk, training: File
) -> None:
    held_out = await desk.upload(chat("aye"), chat("nay"), chat("hm"))
    job = await desk.submit(training, held_out)
    await desk.attempt()
    checkpoints = await desk.checkpoints(job)
    assert [(c.step, c.model) for c in checkpoints] == [
        (step, f"{job.spec['model']}:ckpt-step-{step}") for step in (3, 6)
    ]
    assert all(0 < c.metrics["full_valid_loss"] < 1 for c in checkpoints)
    outcome = await desk.outcome(job.id)
    rows = list(csv.DictReader(io.StringIO(outcome["table"].decode())))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["valid_loss"]) for row in rows] == [False, False, True] * 2
    assert float(rows[5]["valid_loss"]) == checkpoints[1].metrics["full_valid_loss"]
    assert float(rows[5]["train_loss"]) == checkpoints[1].metrics["train_loss"]


async def test_pairs_are_trained_on_with_dpo(desk: Desk) -> None:
    pair = {
        "input": {"messages": [{"role": "user", "content": "Well?"}]},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    job = await desk.submit(await desk.upload(pair, pair), method="dpo")
    await desk.attempt()
    outcome = await desk.outcome(job.id)
    assert outcome["hyperparameters"]["beta"] == 0.1
    assert "train_reward_accuracy" in outcome["events"][1][2]


WAYS = ("gateway", "worker", "both", "connection")


@pytest.mark.parametrize("way", WAYS)
async def test_killed_at_any_moment_a_job_ends_once_and_the_same(
    desk: Desk, training: File, way: str
) -> None:
    held_out = await desk.upload(chat("aye"), chat("nay"), chat("hm"))
    calls: list[str] = []
    desk.worker.trouble = calls.append
    plain = await desk.submit(training, held_out)
    await desk.attempt(calls.append)
    expected = await desk.outcome(plain.id)

    # Moments that differ from way to way: over all of them, about every other one.
    for moment in range(1 + 3 * WAYS.index(way), len(calls), 13):
        left = moment

        def trouble(request: str) -> None:
            nonlocal left
            left -= 1
            if left:
                return
            ours = request in ("heartbeat", "recorded", "ending", "ended")
            if way in ("worker", "both"):
                desk.worker.kill()
            if way in ("gateway", "both"):
                raise GatewayKilled
            if not ours:
                raise unavailable()

        desk.worker.trouble = trouble
        job = await desk.submit(training, held_out)
        while not (await desk.get(job.id)).status.terminal:
            try:
                await desk.attempt(trouble)
            except GatewayKilled:
                await desk.give_back(job.id)
        assert await desk.outcome(job.id) == expected, f"{way} at {calls[moment - 1]} ({moment})"
        # What the last request of a job leaves, if it was lost, is for `tidy_runs`.
        await desk.worker.run(job.id).delete()
        assert not desk.worker.live
    assert not list(desk.store.root.glob("tmp/*"))
    assert not list(desk.files.root.glob("tmp/*"))


async def test_a_lost_lease_leaves_nothing_of_what_came_with_it(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    context = await desk.claim()

    def overtake(request: str) -> None:
        if request == "download":
            taken.append(asyncio.ensure_future(desk.give_back(job.id)))

    taken: list[asyncio.Future[None]] = []
    desk.worker.trouble = overtake
    before = await desk.count(VersionRow)

    async def slowly(*args: Any) -> None:
        await original(*args)
        await asyncio.gather(*taken)

    run = desk.worker.run(job.id)
    original = run.download
    run.download = slowly  # type: ignore[method-assign]
    desk.worker.run = lambda _: run  # type: ignore[method-assign]
    with pytest.raises(queue.LeaseLost):
        await desk.handler(context.job, context)
    assert await desk.count(VersionRow) == before
    assert await desk.count(CheckpointRow) == 0
    assert (await desk.get(job.id)).status is JobStatus.QUEUED


async def test_cancelled_it_ends_within_a_step(desk: Desk, training: File) -> None:
    desk.worker.op_s = 0.02
    job = await desk.submit(training, n_epochs=50)
    runner = Runner(
        desk.db,
        desk.clock,
        {JobKind.FINE_TUNE: desk.handler},
        {TRAINER.name: 4},
        token="runner-1",
        lease_s=60.0,
    )
    running = asyncio.get_running_loop().create_task(runner.run())
    try:
        await until(lambda: len(desk.worker.done) > 10)
        async with desk.db.begin() as session:
            await queue.request_cancel(session, desk.clock, job.id)
        done = len(desk.worker.done)
        runner.nudge(job.id)
        await until(lambda: job.id not in runner.running)
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert (await desk.get(job.id)).status is JobStatus.CANCELLED
    assert len(desk.worker.done) <= done + 4, "two steps"
    steps = [event.step for event in await desk.events(job) if event.step]
    assert steps == list(range(1, len(steps) + 1))
    assert not desk.worker.live
    assert not desk.worker.states
    names = {f"ckpt-step-{c.step}" for c in await desk.checkpoints(job)}
    assert (await aliases_of(desk, job)).keys() == names


@pytest.mark.parametrize("at", [1, 6, 9])
async def test_paused_and_resumed_it_goes_on_exactly(desk: Desk, training: File, at: int) -> None:
    plain = await desk.submit(training)
    await desk.attempt()
    expected = await desk.outcome(plain.id)
    before = len(desk.worker.done)

    job = await desk.submit(training)
    context = await desk.claim()

    def trouble(request: str) -> None:
        if request == "performed" and len(desk.worker.done) == before + at:
            context._see(Flags(pause=True))

    desk.worker.trouble = trouble
    async with desk.db.begin() as session:
        await queue.request_pause(session, desk.clock, job.id)
    await desk.handler(context.job, context)
    paused = await desk.get(job.id)
    assert paused.status is JobStatus.PAUSED
    assert not desk.worker.live, "it holds the worker's memory while it is paused"
    assert len(desk.worker.done) <= before + at + 1
    async with desk.db.begin() as session:
        await queue.resume(session, desk.clock, job.id)
    await desk.attempt()
    resumed = await desk.outcome(job.id)
    resumed["events"] = [e for e in resumed["events"] if "pause" not in e[0]]
    assert resumed == expected
    assert len(desk.worker.done) == 2 * before, "something was done twice"


async def test_paused_while_the_worker_cannot_be_told_it_loses_nothing(
    desk: Desk, training: File
) -> None:
    plain = await desk.submit(training)
    await desk.attempt()
    job = await desk.submit(training)
    context = await desk.claim()

    def trouble(request: str) -> None:
        if request == "performed":
            context._see(Flags(pause=True))
        if request == "cancel_ops":
            raise unavailable()

    desk.worker.trouble = trouble
    async with desk.db.begin() as session:
        await queue.request_pause(session, desk.clock, job.id)
    await desk.handler(context.job, context)
    assert (await desk.get(job.id)).status is JobStatus.PAUSED
    desk.worker.trouble = no_trouble
    async with desk.db.begin() as session:
        await queue.resume(session, desk.clock, job.id)
    await desk.attempt()
    resumed = await desk.outcome(job.id)
    assert resumed["versions"] == (await desk.outcome(plain.id))["versions"]


async def test_stopped_before_it_began_it_can_begin_later(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    context = await desk.claim()
    context._see(Flags(pause=True))
    async with desk.db.begin() as session:
        await queue.request_pause(session, desk.clock, job.id)
    await desk.handler(context.job, context)
    assert (await desk.get(job.id)).status is JobStatus.PAUSED
    assert not desk.worker.done


async def test_a_pause_that_was_taken_back_is_none(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    context = await desk.claim()
    context._see(Flags(pause=True))
    await desk.handler(context.job, context)
    assert (await desk.get(job.id)).status is JobStatus.QUEUED


async def test_lines_that_are_too_long_are_named(desk: Desk, training: File) -> None:
    desk.worker.max_length = 13
    await desk.submit(training)
    with pytest.raises(InvalidTrainingFile, match=r"line 3: 15 tokens .*, 13 are") as caught:
        await desk.attempt()
    assert caught.value.param == "training_file"
    held_out = await desk.upload(chat("x" * 20))
    desk.worker.max_length = 20
    await desk.submit(training, held_out)
    with pytest.raises(InvalidTrainingFile, match="line 1: 27 tokens") as caught:
        await desk.attempt()
    assert caught.value.param == "validation_file"
    assert not desk.worker.done


async def test_a_limit_of_the_job_is_kept(desk: Desk, training: File) -> None:
    await desk.submit(training, max_length=10)
    with pytest.raises(InvalidTrainingFile, match="10 are allowed"):
        await desk.attempt()


async def test_a_loss_that_is_not_finite_fails_the_job_and_frees_the_worker(
    desk: Desk, training: File
) -> None:
    job = await desk.submit(training)
    desk.worker.poison.add(12)
    with pytest.raises(NonFiniteLoss, match="Step 5 of 6 failed"):
        await desk.attempt()
    assert not desk.worker.live
    assert not desk.worker.states
    # The first epoch's weights are good, and stay; the steps up to there may tell why. They are not
    # the model that was asked for.
    assert [c.step for c in await desk.checkpoints(job)] == [3]
    assert await aliases_of(desk, job) == {"ckpt-step-3": ((1, 1),)}
    assert [e.step for e in await desk.events(job) if e.step is not None] == [1, 2, 3, 4]


async def test_weights_that_the_base_cannot_serve_fail_the_job(desk: Desk, training: File) -> None:
    def broken(weights: str) -> dict[str, bytes]:
        return {**adapter_files(weights), "adapter_model.safetensors": b"noise"}

    desk.worker.make_files = broken
    await desk.submit(training)
    with pytest.raises(AdapterRejected, match=r"adapter_model\.safetensors"):
        await desk.attempt()
    assert await desk.count(AdapterRow) == await desk.count(CheckpointRow) == 0
    assert not list(desk.store.digests())
    assert not desk.worker.live


async def test_a_worker_that_is_away_is_no_fault_of_the_job(desk: Desk, training: File) -> None:
    def away(request: str) -> None:
        raise unavailable()

    await desk.submit(training)
    desk.worker.trouble = away
    with pytest.raises(TrainerUnavailable):
        await desk.attempt()


async def test_files_that_are_not_on_this_machine_give_the_job_back(
    desk: Desk, training: File
) -> None:
    await desk.submit(training)
    desk.files.path(training.digest).unlink()
    with pytest.raises(StorageUnavailable, match=training.id):
        await desk.attempt()


async def test_a_job_whose_trainer_or_pool_is_gone_says_so(desk: Desk, training: File) -> None:
    await desk.submit(training, base_model="other")
    with pytest.raises(NotFound, match="'other'"):
        await desk.attempt()
    desk.trainers.clear()
    await desk.submit(training)
    with pytest.raises(NotTrainable, match="'gpu'"):
        await desk.attempt()


async def test_a_run_of_another_shape_is_a_conflict(desk: Desk, training: File) -> None:
    job = await desk.submit(training)
    await desk.worker.run(job.id).open(BASE, LORA, 0)
    with pytest.raises(Conflict):
        await desk.attempt()


async def test_steps_are_written_together_when_they_are_fast(desk: Desk, training: File) -> None:
    calls: list[str] = []
    job = await desk.submit(training, n_epochs=1, batch_size=1)
    await desk.attempt(calls.append)
    steps = [event.step for event in await desk.events(job) if event.step]
    assert steps == [1, 2, 3, 4, 5]
    assert calls.count("recorded") < 5


async def test_the_bytes_of_results_are_the_callers(desk: Desk, training: File) -> None:
    await desk.submit(training)
    await desk.attempt()
    async with desk.db.read() as session:
        row = await session.scalar(select(FileRow).where(FileRow.purpose == files.RESULTS))
    assert row is not None
    assert (row.key_id, row.filename) == (KEY, "step_metrics.csv")
    assert row.bytes == desk.files.path(row.digest).stat().st_size
