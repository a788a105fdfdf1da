"""/v1/fine_tuning with the real SDK: what a job looks like at each point of its life."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from sqlalchemy.ext.asyncio import AsyncSession

from app.control import adapters
from app.control.inspect_adapter import AdapterFacts
from app.db.job_tables import CheckpointRow
from app.domain import Job, JobError, JobEventType, JobKind
from app.jobs import queue
from app.jobs.runner import Runner
from app.training.spec import FineTuneResult, FineTuneSpec
from tests.integration.fine_tuning import (
    CLOCK,
    LINE,
    PAIR,
    claim,
    create,
    gateway,
    in_queue,
    lines,
    no_runner,
    sdk,
    upload,
    valid,
    worker,
)
from tests.integration.gateway import BASE, Gateway

__all__ = ["gateway", "no_runner", "sdk", "worker"]


def test_a_new_job(gateway: Gateway, sdk: openai.OpenAI) -> None:
    training, validation = (upload(sdk, lines(*[LINE] * n)) for n in (2, 1))
    job = create(
        sdk,
        training_file=training,
        validation_file=validation,
        suffix="pirate",
        seed=7,
        metadata={"team": "sea"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    )
    assert valid(job).status == "queued"
    assert (job.object, job.model, job.fine_tuned_model) == ("fine_tuning.job", BASE, None)
    assert (job.training_file, job.validation_file) == (training, validation)
    assert (job.seed, job.metadata, job.result_files) == (7, {"team": "sea"}, [])
    assert (job.error, job.finished_at, job.trained_tokens, job.integrations) == (
        *(None,) * 3,
        [],
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, "auto")
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 3
    extra = job.model_extra or {}
    assert (extra["queue_position"], extra["user_provided_suffix"]) == (0, "pirate")
    assert sdk.fine_tuning.jobs.retrieve(job.id).to_dict() | {"estimated_start": 0} == (
        job.to_dict() | {"estimated_start": 0}
    )
    queued = in_queue(gateway, lambda session: queue.get(session, job.id))
    spec = FineTuneSpec.from_json(queued.spec)
    assert re.fullmatch(r"ft:tiny:pirate:[a-z0-9]{8}", spec.model)
    assert (spec.lora_rank, spec.lora_alpha, spec.target_modules) == (12, 24, None)
    attempts = gateway.settings.job_attempts
    assert (queued.trainer, queued.lock, queued.max_attempts) == ("forge", None, attempts)


def test_loras_own_hyperparameters(gateway: Gateway, sdk: openai.OpenAI) -> None:
    own = {
        "lora_rank": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 1e-3,
        "max_length": 256,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "lr_schedule": "cosine",
        "grad_clip_norm": 1.0,
    }
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    job = create(
        sdk,
        training_file=upload(sdk, lines(PAIR)),
        method=method,
        extra_body={"hyperparameters": own},
    )
    valid(job)
    echoed = job.method.to_dict()["dpo"]["hyperparameters"]  # type: ignore[union-attr, index]
    assert echoed == own | {
        "beta": 0.2,
        "n_epochs": 1,
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    found = in_queue(gateway, lambda session: queue.get(session, job.id))
    spec = FineTuneSpec.from_json(found.spec)
    assert spec.method == "dpo"
    assert {name: getattr(spec, name) for name in own} == own | {
        "target_modules": ("q_proj", "v_proj")
    }


def test_from_running_to_a_model(gateway: Gateway, sdk: openai.OpenAI) -> None:
    made = create(sdk)
    lease = queue.lease_of(claim(gateway))
    chosen = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.5}
    step = queue.NewEvent(
        JobEventType.METRICS,
        "Step 1/6: training loss=2.31",
        data={"step": 1, "train_loss": 2.31, "train_mean_token_accuracy": 0.5},
        step=1,
    )
    progress = {"hyperparameters": chosen, "estimated_finish": made.created_at + 90}
    in_queue(
        gateway,
        lambda session: queue.heartbeat(
            session, CLOCK, lease, lease_s=60, events=[step], progress=progress
        ),
    )
    running = valid(sdk.fine_tuning.jobs.retrieve(made.id))
    assert (running.status, running.estimated_finish) == ("running", made.created_at + 90)
    assert running.hyperparameters.model_dump(include=set(chosen)) == chosen
    assert (running.model_extra or {})["queue_position"] is None

    result = FineTuneResult(
        model="ft:tiny::abcd1234",
        trained_tokens=1234,
        result_files=("file-1",),
        hyperparameters=chosen | {"learning_rate": 0.5},
    )
    in_queue(gateway, lambda session: queue.finish(session, CLOCK, lease, result.to_json()))
    done = valid(sdk.fine_tuning.jobs.retrieve(made.id))
    assert (done.status, done.fine_tuned_model) == ("succeeded", "ft:tiny::abcd1234")
    assert (done.trained_tokens, done.result_files) == (1234, ["file-1"])
    assert done.finished_at is not None
    assert done.estimated_finish is None
    assert (done.hyperparameters.model_extra or {})["learning_rate"] == 0.5

    events = list(sdk.fine_tuning.jobs.list_events(made.id, limit=2))
    for event in events:
        FineTuningJobEvent.model_validate(event.model_dump())
    assert [event.message for event in events] == [
        "The job has succeeded.",
        "Step 1/6: training loss=2.31",
        "The job has started.",
        "The job is queued.",
    ]
    assert [event.type for event in events] == ["message", "metrics", "message", "message"]
    assert events[1].data == step.data
    page = sdk.fine_tuning.jobs.list_events(made.id, after=events[1].id, limit=1)
    assert ([event.id for event in page.data], page.has_more) == ([events[2].id], True)
    for cursor in ("ftevent-x-1", f"{events[0].id}x", events[0].id[:-1] + "²"):
        with pytest.raises(openai.BadRequestError, match="after names no event"):
            sdk.fine_tuning.jobs.list_events(made.id, after=cursor)


def test_nobody_reads_that_a_job_has_succeeded_before_its_model_is_served(
    gateway: Gateway, sdk: openai.OpenAI
) -> None:
    for number in range(5):
        made = create(sdk)
        job = claim(gateway)
        model = job.spec["model"]

        async def end(
            session: AsyncSession, job: Job = job, model: str = model, number: int = number
        ) -> None:
            await adapters.register(
                session,
                CLOCK,
                name=model,
                base_model=BASE,
                digest=f"{number:064}",
                facts=AdapterFacts(rank=4, target_modules=("q_proj",), tensors=2, bytes=9),
                source="test",
                alias="ckpt-step-6",
            )
            lease = queue.lease_of(job)
            progress = {"total_steps": 6}
            await queue.heartbeat(session, CLOCK, lease, lease_s=60, progress=progress)
            result = FineTuneResult(model=model, trained_tokens=1)
            await queue.finish(session, CLOCK, lease, result.to_json())

        in_queue(gateway, end)
        assert sdk.fine_tuning.jobs.retrieve(made.id).status == "succeeded"
        assert {model, f"{model}:ckpt-step-6"} <= {each.id for each in sdk.models.list()}


def test_a_failed_job_says_why(gateway: Gateway, sdk: openai.OpenAI) -> None:
    made = create(sdk)
    lease = queue.lease_of(claim(gateway))
    error = JobError("non_finite_loss", "The loss of step 3 is NaN.", "training_file")
    in_queue(gateway, lambda session: queue.fail(session, CLOCK, lease, error))
    failed = valid(sdk.fine_tuning.jobs.retrieve(made.id))
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.to_dict() == {
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }
    assert sdk.fine_tuning.jobs.list_events(made.id).data[0].level == "error"


def test_cancel_pause_and_resume(gateway: Gateway, sdk: openai.OpenAI) -> None:
    jobs = sdk.fine_tuning.jobs
    made = create(sdk)
    with pytest.raises(openai.ConflictError, match="not paused"):
        jobs.resume(made.id)
    assert str(jobs.pause(made.id).status) == "paused"
    resumed = jobs.resume(made.id)
    assert (resumed.status, (resumed.model_extra or {})["queue_position"]) == ("queued", 0)
    lease = queue.lease_of(claim(gateway))
    assert jobs.cancel(made.id).status == "running", "until its step has ended"
    in_queue(gateway, lambda session: queue.cancelled(session, CLOCK, lease))
    assert valid(jobs.retrieve(made.id)).status == "cancelled"
    for verb in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError, match="has ended"):
            verb(made.id)
    waiting = create(sdk)
    assert valid(jobs.cancel(waiting.id)).status == "cancelled"


def test_a_flag_is_seen_at_once_by_the_runner_of_the_same_gateway(
    gateway: Gateway, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(Runner, "nudge", lambda _, job: said.append(("nudge", job)))
    monkeypatch.setattr(Runner, "wake", lambda _: said.append(("wake", "")))
    job = create(sdk).id
    sdk.fine_tuning.jobs.pause(job)
    sdk.fine_tuning.jobs.resume(job)
    sdk.fine_tuning.jobs.cancel(job)
    assert said == [
        ("wake", ""),
        ("nudge", job),
        ("nudge", job),
        ("wake", ""),
        ("nudge", job),
    ]


def test_pages_of_jobs_and_their_metadata(gateway: Gateway, sdk: openai.OpenAI) -> None:
    file = upload(sdk, lines(LINE))
    pairs: list[dict[str, str] | None] = [
        {"team": "sea"},
        {"team": "sea", "tier": "gold ✓"},
        {"team": "land"},
        None,
    ]
    made = [create(sdk, training_file=file, metadata=each or openai.omit).id for each in pairs]
    jobs = sdk.fine_tuning.jobs
    assert [job.id for job in jobs.list(limit=3)] == made[::-1]
    page = jobs.list(limit=2)
    assert ([job.id for job in page.data], page.has_more) == (made[:1:-1], True)
    assert [job.id for job in jobs.list(metadata={"team": "sea"}, limit=1)] == made[1::-1]
    both = jobs.list(metadata={"team": "sea", "tier": "gold ✓"})
    assert [job.id for job in both] == [made[1]]
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [made[3]]
    assert jobs.list(metadata={"team": "air"}).data == []
    with pytest.raises(openai.BadRequestError, match="metadata"):
        jobs.list(extra_query={"metadata": "sea"})
    with pytest.raises(openai.NotFoundError):
        jobs.list(after="ftjob-none")
    with pytest.raises(openai.BadRequestError, match="limit"):
        jobs.list(limit=0)


def test_the_place_in_the_queue(gateway: Gateway, sdk: openai.OpenAI) -> None:
    file = upload(sdk, lines(LINE))
    create(sdk, training_file=file)
    lease = queue.lease_of(claim(gateway))
    result = FineTuneResult(model="ft:tiny::abcd1234", trained_tokens=1)
    in_queue(gateway, lambda session: queue.finish(session, CLOCK, lease, result.to_json()))
    made = [create(sdk, training_file=file).id for _ in range(3)]
    urgent = create(sdk, training_file=file, extra_body={"priority": 5}).id
    places = {job.id: (job.model_extra or {}) for job in sdk.fine_tuning.jobs.list().data}
    assert [places[job]["queue_position"] for job in (urgent, *made)] == [0, 1, 2, 3]
    now = CLOCK.now().timestamp()
    assert all(abs(places[job]["estimated_start"] - now) < 60 for job in made)


def test_checkpoints(gateway: Gateway, sdk: openai.OpenAI) -> None:
    made = create(sdk)
    job = in_queue(gateway, lambda session: queue.get(session, made.id))

    async def register(session: AsyncSession) -> None:
        for step in (2, 4, 6):
            session.add(
                CheckpointRow(
                    id=f"ftckpt-{step}",
                    job_number=job.number,
                    step=step,
                    model=f"ft:tiny::abcd1234:ckpt-step-{step}",
                    metrics={"step": step, "train_loss": 1 / step, "full_valid_loss": 1.5},
                    created_at=CLOCK.now() + timedelta(seconds=step),
                )
            )

    in_queue(gateway, register)
    found = list(sdk.fine_tuning.jobs.checkpoints.list(made.id, limit=2))
    for each in found:
        FineTuningJobCheckpoint.model_validate(each.model_dump())
    assert [each.step_number for each in found] == [6, 4, 2]
    assert found[0].fine_tuned_model_checkpoint == "ft:tiny::abcd1234:ckpt-step-6"
    assert found[0].fine_tuning_job_id == made.id
    assert (found[0].metrics.step, found[0].metrics.full_valid_loss) == (6, 1.5)
    after = sdk.fine_tuning.jobs.checkpoints.list(made.id, after="ftckpt-4")
    assert [each.id for each in after] == ["ftckpt-2"]
    with pytest.raises(openai.BadRequestError, match="after names no checkpoint"):
        sdk.fine_tuning.jobs.checkpoints.list(made.id, after="ftckpt-5")


def test_a_key_sees_its_own_jobs_and_an_admin_all(gateway: Gateway) -> None:
    gateway.create_key("admin")
    keys = [gateway.create_key("training", "inference") for _ in range(2)]
    mine, yours = (gateway.openai_client(key["secret"]) for key in keys)
    file = upload(mine, lines(LINE))
    job = create(mine, training_file=file).id
    theirs = yours.fine_tuning.jobs
    for call in (
        theirs.retrieve,
        theirs.cancel,
        theirs.pause,
        theirs.resume,
        theirs.list_events,
        theirs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            call(job)
    assert theirs.list().data == []
    with pytest.raises(openai.BadRequestError, match="There is no file"):
        create(yours, training_file=file)
    with pytest.raises(openai.PermissionDeniedError, match="priority above 0"):
        create(mine, training_file=file, extra_body={"priority": 1})
    create(mine, training_file=file, extra_body={"priority": -1})
    listed = gateway.client.get("/v1/fine_tuning/jobs").json()["data"]
    assert {each["organization_id"] for each in listed} == {keys[0]["id"]}
    infers = gateway.openai_client(gateway.create_key("inference")["secret"])
    with pytest.raises(openai.PermissionDeniedError, match="'training' or 'admin'"):
        infers.fine_tuning.jobs.list()


def test_a_key_trains_only_bases_it_may_use(gateway: Gateway) -> None:
    gateway.create_key("admin")
    key = gateway.create_key("training", "inference", models=["ft:*"])
    with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'tiny'"):
        create(gateway.openai_client(key["secret"]))


def test_another_kind_of_job_is_none(gateway: Gateway, sdk: openai.OpenAI) -> None:
    new = queue.NewJob(JobKind.TRAIN_OP, "anonymous", {})
    op = in_queue(gateway, lambda session: queue.submit(session, CLOCK, new)).id
    for call in (sdk.fine_tuning.jobs.retrieve, sdk.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            call(op)
    assert sdk.fine_tuning.jobs.list().data == []
