"""The bodies of /v1/fine_tuning: what a client may ask for, and jobs as OpenAI writes them.

What comes in: JSON, or jobs, events and checkpoints. What goes out: a request that is checked for
its shape, or OpenAI's objects. No verbs.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.api.admin.shapes import Answer, Body
from app.api.openai.shapes import unix, unix_or_none
from app.control.fine_tuning import MAX_SEED, Wanted
from app.domain import Checkpoint, Job, JobEvent, JobEventType, JobStatus
from app.errors import InvalidRequest
from app.training.spec import FineTuneSpec, Method, Schedule

JOB_ID = "ftjob-5f70bf18a08660b1a5d6b0c3"
MODEL = "ft:Llama-3.1-8B-Instruct:pirate:k3v9x2ab"

Auto = Literal["auto"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
#: PostgreSQL stores these in JSON, and then cannot look into it.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
#: Fields of a spec that a request and an answer call hyperparameters; absent ones are "auto".
_COMMON = ("n_epochs", "batch_size", "learning_rate_multiplier")
_OWN = (
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "learning_rate",
    "max_length",
    "warmup_ratio",
    "weight_decay",
    "lr_schedule",
    "grad_clip_norm",
)


class Hyperparameters(Body):
    """OpenAI's hyperparameters, and those of LoRA; `"auto"` or left out: chosen for the data."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = Field(
        "auto", description="Times through the examples.", examples=[3]
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="Examples in a step.", examples=["auto"]
    )
    learning_rate_multiplier: Auto | Positive = Field(
        "auto", description="Scales the learning rate that is chosen.", examples=["auto"]
    )
    beta: Auto | Positive = Field(
        "auto", description="Of dpo: how much to stay near the base.", examples=["auto"]
    )
    lora_rank: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="The adapter's rank, at most what its pool serves.", examples=[16]
    )
    lora_alpha: Auto | Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        "auto", description="The adapter's alpha; twice the rank if left out.", examples=[32]
    )
    target_modules: Auto | Annotated[list[Module], Field(min_length=1, max_length=64)] = Field(
        "auto",
        description="Modules to adapt; all linear ones but the output layer if left out.",
        examples=[["q_proj"]],
    )
    learning_rate: Auto | Annotated[Positive, Field(le=10)] = Field(
        "auto", description="The learning rate itself.", examples=[0.0002]
    )
    max_length: Auto | Annotated[int, Field(ge=2)] = Field(
        "auto", description="Longest example, in tokens.", examples=["auto"]
    )
    warmup_ratio: Auto | Fraction = Field(
        "auto", description="Fraction of all steps until the full learning rate.", examples=[0.05]
    )
    weight_decay: Auto | Fraction = Field(
        "auto", description="AdamW's decoupled weight decay.", examples=["auto"]
    )
    lr_schedule: Auto | Schedule = Field(
        "auto", description="How the learning rate goes on after that.", examples=["cosine"]
    )
    grad_clip_norm: Auto | Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        "auto", description="Largest norm of a step's gradient; 0 clips nothing.", examples=[1.0]
    )


class OfMethod(Body):
    """A method's own part of the request."""

    hyperparameters: Hyperparameters | None = Field(None, description="How to train.")


class NewMethod(Body):
    """What the examples teach: `supervised` conversations, or `dpo` preferences."""

    type: Literal["supervised", "dpo", "reinforcement"] = Field(
        description="`supervised` or `dpo`; `reinforcement` is refused.", examples=["supervised"]
    )
    supervised: OfMethod | None = Field(None, description="With `supervised`.")
    dpo: OfMethod | None = Field(None, description="With `dpo`.")
    reinforcement: dict[str, Any] | None = Field(None, description="Not offered.")


class NewFineTuningJob(Body):
    """A fine-tuning job to create."""

    model: str = Field(description="The base to train on.", examples=["meta-llama/Llama-3.1-8B"])
    training_file: str = Field(
        description="A file uploaded for `fine-tune`.", examples=["file-9f86d081884c7d659a2feaa0"]
    )
    validation_file: str | None = Field(None, description="One of examples held out.")
    method: NewMethod | None = Field(None, description="`supervised` if left out.")
    hyperparameters: Hyperparameters | None = Field(
        None,
        description="As in `method`, where OpenAI has them now; both may be given if they do not "
        "name the same.",
        examples=[{"n_epochs": 3, "lora_rank": 16}],
    )
    suffix: str | None = Field(
        None,
        description="Goes into the model's name: up to 64 letters, digits, `.`, `_`, `-`.",
        examples=["pirate"],
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="What shuffling and first weights depend on."
    )
    integrations: list[Any] | None = Field(None, description="None are offered.")
    metadata: dict[str, str] | None = Field(
        None, description="Up to 16 pairs worth keeping with the job.", examples=[{"team": "sea"}]
    )
    priority: int = Field(
        0, ge=-10, le=10, description="Greater ones first; above 0 for admins only."
    )

    @model_validator(mode="after")
    def _small_metadata(self) -> NewFineTuningJob:
        pairs = self.metadata or {}
        if len(pairs) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in pairs.items()):
            raise ValueError("metadata is up to 16 pairs of 64 and 512 characters")
        if any(_UNSTORABLE.search(text) for pair in pairs.items() for text in pair):
            raise ValueError("metadata has a character that cannot be stored")
        return self

    def wanted(self) -> Wanted:
        """The same without OpenAI's alternatives.

        Raises:
            InvalidRequest: it asks for what is not offered, or contradicts itself.
        """
        if self.integrations:
            raise InvalidRequest("integrations are not offered here.", param="integrations")
        method, of_method = self._method()
        return Wanted(
            training_file=self.training_file,
            validation_file=self.validation_file,
            method=method,
            hyperparameters=_merged(method, self.hyperparameters, of_method),
            suffix=self.suffix or None,
            seed=self.seed,
            metadata=self.metadata or {},
            priority=self.priority,
        )

    def _method(self) -> tuple[Method, Hyperparameters | None]:
        if self.method is None:
            return "supervised", None
        kind = self.method.type
        if kind == "reinforcement":
            raise InvalidRequest(
                "The method 'reinforcement' is not offered here; 'supervised' and 'dpo' are.",
                param="method",
            )
        other = self.method.dpo if kind == "supervised" else self.method.supervised
        if other is not None or self.method.reinforcement is not None:
            raise InvalidRequest(
                f"The method's type is {kind!r}, and another has hyperparameters.", param="method"
            )
        own = self.method.supervised if kind == "supervised" else self.method.dpo
        return kind, None if own is None else own.hyperparameters


def _merged(method: Method, *given: Hyperparameters | None) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in given:
        chosen = {} if each is None else each.model_dump(exclude_unset=True)
        for name, value in chosen.items():
            if merged.setdefault(name, value) != value:
                raise InvalidRequest(
                    f"{name} is given twice, and not the same.", param="hyperparameters"
                )
    chosen = {name: value for name, value in merged.items() if value != "auto"}
    if "beta" in chosen and method != "dpo":
        raise InvalidRequest("beta is for the method 'dpo'.", param="hyperparameters")
    if "target_modules" in chosen:
        chosen["target_modules"] = tuple(chosen["target_modules"])
    return chosen


class JobErrorObject(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class FineTuningJob(Answer):
    """A fine-tuning job. `queue_position` and `estimated_start` are there while it waits."""

    id: str = Field(examples=[JOB_ID])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(examples=[1762300800])
    finished_at: int | None = None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str = Field(examples=["meta-llama/Llama-3.1-8B-Instruct"])
    fine_tuned_model: str | None = Field(None, examples=[MODEL])
    organization_id: str = Field(examples=["key-2f61b90c4d1e"])
    training_file: str = Field(examples=["file-9f86d081884c7d659a2feaa0"])
    validation_file: str | None = None
    result_files: list[str] = Field(examples=[[]])
    method: dict[str, Any] = Field(
        examples=[{"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}]
    )
    hyperparameters: dict[str, Any] = Field(examples=[{"n_epochs": 3, "lora_rank": 16}])
    seed: int = Field(examples=[42])
    user_provided_suffix: str | None = Field(None, examples=["pirate"])
    trained_tokens: int | None = None
    error: JobErrorObject | None = None
    integrations: list[Any] = Field(examples=[[]])
    metadata: dict[str, str] = Field(examples=[{"team": "sea"}])
    priority: int
    estimated_finish: int | None = None
    estimated_start: int | None = Field(None, examples=[1762300900])
    queue_position: int | None = Field(None, examples=[0])


class FineTuningJobs(Answer):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class EventObject(Answer):
    """Something that happened to a job; `data` of a step's metrics are its numbers."""

    id: str = Field(examples=["ftevent-5f70bf18a08660b1a5d6b0c3-2"])
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int = Field(examples=[1762300801])
    level: str = Field(examples=["info"])
    message: str = Field(examples=["Step 1/30: training loss=2.31"])
    type: Literal["message", "metrics"]
    data: dict[str, Any] = Field(examples=[{"step": 1, "train_loss": 2.31}])


class EventObjects(Answer):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointObject(Answer):
    """Weights along the way: `fine_tuned_model_checkpoint` can be put in `model`."""

    id: str = Field(examples=["ftckpt-0b3d7c"])
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int = Field(examples=[1762300900])
    fine_tuned_model_checkpoint: str = Field(examples=[f"{MODEL}:ckpt-step-10"])
    fine_tuning_job_id: str = Field(examples=[JOB_ID])
    step_number: int = Field(examples=[10])
    metrics: dict[str, float] = Field(examples=[{"step": 10, "full_valid_loss": 1.42}])


class CheckpointObjects(Answer):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None = Field(examples=["ftckpt-0b3d7c"])
    last_id: str | None = Field(examples=["ftckpt-0b3d7c"])


def job_json(
    job: Job, *, position: int | None = None, starts_in_s: float | None = None, now: datetime
) -> FineTuningJob:
    """OpenAI's job object; `position` and `starts_in_s` of a job that waits."""
    spec = FineTuneSpec.from_json(job.spec)
    result = job.result or {}
    running = job.status is JobStatus.RUNNING
    used = result.get("hyperparameters") or job.progress.get("hyperparameters") or {}
    hyperparameters = _echoed(spec, used)
    return FineTuningJob(
        id=job.id,
        created_at=unix(job.created_at),
        finished_at=unix_or_none(job.finished_at),
        status=job.status.value,
        model=spec.base_model,
        fine_tuned_model=result.get("model"),
        organization_id=job.key_id,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        result_files=list(result.get("result_files", ())),
        method={"type": spec.method, spec.method: {"hyperparameters": hyperparameters}},
        hyperparameters=hyperparameters,
        seed=spec.seed,
        user_provided_suffix=spec.suffix,
        trained_tokens=result.get("trained_tokens"),
        error=None if job.error is None else JobErrorObject.model_validate(job.error),
        integrations=[],
        metadata=dict(job.metadata),
        priority=job.priority,
        estimated_finish=job.progress.get("estimated_finish") if running else None,
        estimated_start=(
            None if starts_in_s is None else unix(now + timedelta(seconds=starts_in_s))
        ),
        queue_position=position,
    )


def _echoed(spec: FineTuneSpec, used: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, with what was chosen for "auto" once it is known."""
    asked = spec.to_json()
    names = (*_COMMON, *(("beta",) if spec.method == "dpo" else ()), *_OWN)
    echoed = {name: used.get(name, asked[name]) for name in names}
    return {name: "auto" if value is None else value for name, value in echoed.items()}


def event_id(event: JobEvent) -> str:
    return f"ftevent-{event.job_id.removeprefix('ftjob-')}-{event.number}"


def event_number(job_id: str, event: str) -> int:
    """The number in an event's id.

    Raises:
        InvalidRequest: it is no event of this job.
    """
    prefix = f"ftevent-{job_id.removeprefix('ftjob-')}-"
    number = event.removeprefix(prefix)
    if number == event or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise InvalidRequest(f"after names no event of {job_id}: {event[:100]!r}.", param="after")
    return int(number)


def event_json(event: JobEvent) -> EventObject:
    """OpenAI's event object, which knows messages and metrics."""
    metrics = event.type is JobEventType.METRICS
    return EventObject(
        id=event_id(event),
        created_at=unix(event.created_at),
        level=event.level,
        message=event.message,
        type="metrics" if metrics else "message",
        data=dict(event.data),
    )


def checkpoint_json(checkpoint: Checkpoint) -> CheckpointObject:
    return CheckpointObject(
        id=checkpoint.id,
        created_at=unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics=dict(checkpoint.metrics),
    )
